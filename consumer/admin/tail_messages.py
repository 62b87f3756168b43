"""What `consumer tail` shows of a message besides its state.

Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from consumer.core import identity
from consumer.core.delivery import Delivery
from consumer.core.errors import Unreadable
from consumer.core.message import Record
from consumer.core.message_state import place_text
from consumer.core.outcome import Dead
from consumer.outbox.record import MESSAGE_ID
from consumer.transaction.identify import decoded


def fault_in(delivery: Delivery) -> str | None:
    """Return why a message is a dead letter for its form."""
    if isinstance(delivery.outcome, Dead):
        return f"{delivery.outcome.reason.value}: {delivery.outcome.error}"
    try:
        decoded(delivery)
    except Unreadable as error:
        return f"{error.reason}: {error}"
    return None


def id_text(delivery: Delivery) -> str:
    """Return the id of a message as its producer wrote it.

    Where it wrote none that is text, as `consumer show` takes it.
    """
    record, rule = delivery.record, delivery.handler.rule
    match rule:
        case identity.DefaultId():
            text = _header(record, MESSAGE_ID)
        case identity.HeaderId(name):
            text = _header(record, name)
        case identity.OffsetId():
            text = None
        case _:
            text = _declared(rule, delivery)
    if text is not None:
        return text
    place = place_text(delivery.partition, record.offset)
    return place if delivery.id == identity.offset_id(record) else str(UUID(bytes=delivery.id))


def _header(record: Record, name: str) -> str | None:
    for key, value in record.headers:
        if key == name and value:
            return value.decode("utf-8", "backslashreplace")
    return None


def _declared(rule: identity.FieldId | identity.CallableId, delivery: Delivery) -> str | None:
    """Return the id in a value, as text."""
    try:
        part = decoded(delivery)
        if isinstance(rule, identity.CallableId):
            part = rule.function(part)
        else:
            for name in rule.path:
                part = part[name] if isinstance(part, dict) else getattr(part, name)
    except Exception:  # unreadable, or the application's own code
        return None
    return str(part) if isinstance(part, str | int | UUID) else None


def in_time_order(records: Sequence[Record]) -> list[Record]:
    """Return records of several partitions by time.

    Those of a partition keep their order, whatever their timestamps say.
    """
    latest: dict[tuple[str, int], int] = {}
    keyed: list[tuple[int, int]] = []
    for number, record in enumerate(records):
        place = (record.topic, record.partition)
        latest[place] = max(latest.get(place, 0), record.timestamp)
        keyed.append((latest[place], number))
    return [records[number] for _, number in sorted(keyed)]
