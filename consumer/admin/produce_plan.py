"""Decides what `consumer produce` may send, and under which ids.

Pure. A message passes if a worker of the App would identify it and decode it for every handler of its topic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from consumer.core import identity
from consumer.core.cloudevents import from_event
from consumer.core.delivery import Delivery
from consumer.core.errors import Misconfigured, Unreadable
from consumer.core.handler import Handler
from consumer.core.message import LogRecord
from consumer.core.outcome import Dead
from consumer.outbox.record import MESSAGE_ID
from consumer.transaction.identify import decode_failure, identify


class Problem(Exception):
    """A message cannot be sent; the text says why."""


class Outgoing(NamedTuple):
    """A message to send.

    line: of the file; None for a single message. record: its offset is its place among the messages. id: as `consumer
    show` takes it; None where it is the offset, which is not known yet.
    """

    line: int | None
    record: LogRecord
    id: str | None


def parse_headers(given: Sequence[str]) -> tuple[tuple[str, bytes | None], ...]:
    """Return headers of `name=value`. Raises Misconfigured."""
    headers: list[tuple[str, bytes | None]] = []
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise Misconfigured("--header: not understood; write name=value")  # not quoted: it may be secret
        if name.lower() == MESSAGE_ID:
            raise Misconfigured(
                f"--header {name}: the message id; give it with --message-id, or leave it out for a new one"
            )
        if "\0" in text:
            raise Misconfigured("--header: holds NUL; remove it")
        headers.append((name, value.encode()))
    return tuple(headers)


def id_headers(handlers: Sequence[Handler], record: LogRecord) -> list[str]:
    """Return the headers in which readers look for the id.

    A topic that no handler reads is for other consumers, which look into message-id.
    """
    names: list[str] = [] if handlers else [MESSAGE_ID]
    for handler in handlers:
        match handler.rule:
            case identity.DefaultId():
                names.append(MESSAGE_ID)
            case identity.HeaderId(name):
                names.append(name)
            case _:
                pass
    is_event = _event_id(record) is not None
    return [name for name in dict.fromkeys(names) if not (name == MESSAGE_ID and is_event)]


def with_id(
    handlers: Sequence[Handler], record: LogRecord, wanted: bytes | None, new: bytes
) -> tuple[LogRecord, bytes | None]:
    """Return the record with its id where readers look for it.

    And the id as text; None where only the handlers know it. wanted: by the user. new: for a record without one.
    Raises Problem where readers would not take the wanted id.
    """
    names = id_headers(handlers, record)
    given = [(name, value) for name, value in record.headers if name in names]
    for name, value in given:
        if wanted is not None and value != wanted:
            raise Problem(f"the header {name!r} has another message id; leave one of them out")
    if not names:
        _check_wanted(handlers, record, wanted)
        return record, wanted
    id = wanted if wanted is not None else next((value for _, value in given), None) or new
    there = {name for name, _ in given}
    return _with_headers(record, record.headers + tuple((name, id) for name in names if name not in there)), id


def _check_wanted(handlers: Sequence[Handler], record: LogRecord, wanted: bytes | None) -> None:
    """Raise Problem where readers would take another id."""
    for delivery in _deliveries(handlers, record) if wanted is not None else ():
        assert wanted is not None
        name = delivery.handler.name
        match delivery.handler.rule:
            case identity.OffsetId():
                raise Problem(f"handler {name!r} identifies messages by their offset; leave the message id out")
            case identity.FieldId() | identity.CallableId() as rule:
                if delivery.outcome is None and delivery.id != identity.message_id(wanted):
                    raise Problem(
                        f"handler {name!r} takes the id from {identity.rule_text(rule)}, and that is another one; write it there, "
                        "and leave the message id out"
                    )
            case _:
                raise Problem("a CloudEvent has its id in itself; write it there, and leave the message id out")


def check(handlers: Sequence[Handler], record: LogRecord) -> list[Delivery]:
    """Return the deliveries of a record, identified.

    Raises Problem for a record that would be a dead letter before a handler runs.
    """
    deliveries = _deliveries(handlers, record)
    for delivery in deliveries:
        dead = delivery.outcome if isinstance(delivery.outcome, Dead) else decode_failure(delivery)
        if dead is not None:
            raise Problem(f"handler {delivery.handler.name!r} cannot read it ({dead.reason.value}): {dead.error}")
    return deliveries


class SeenIds:
    """Finds messages of one id with different payloads in a file.

    A worker applies the first, and makes the other a dead letter.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, bytes], tuple[int, int]] = {}

    def add(self, deliveries: Sequence[Delivery], line: int) -> None:
        """Remember ids. Raises Problem."""
        for delivery in deliveries:
            key = delivery.handler.name, delivery.id
            before, fingerprint = self._seen.setdefault(key, (line, delivery.fingerprint))
            if fingerprint != delivery.fingerprint and delivery.handler.idempotent:
                raise Problem(f"it has the message id of line {before} and another value; give it an id of its own")


def shown_id(deliveries: Sequence[Delivery], sent: bytes | None) -> str | None:
    """Return an id as `consumer show` takes it.

    sent: its text. None where the offset is the id.
    """
    if sent is not None:
        return sent.decode("utf-8", "backslashreplace")
    ids = [delivery.id for delivery in deliveries if not isinstance(delivery.handler.rule, identity.OffsetId)]
    return str(UUID(bytes=ids[0])) if ids else None


def _deliveries(handlers: Sequence[Handler], record: LogRecord) -> list[Delivery]:
    deliveries = [Delivery(handler, record) for handler in handlers]
    identify(deliveries)
    return deliveries


def _event_id(record: LogRecord) -> bytes | None:
    try:
        return from_event(record)
    except Unreadable:
        return None


def _with_headers(record: LogRecord, headers: tuple[tuple[str, bytes | None], ...]) -> LogRecord:
    return LogRecord(record.topic, record.partition, record.offset, record.timestamp, record.key, record.value, headers)
