"""Gives messages their ids and fingerprints, and decodes their values.

Pure. A value is decoded at most once for a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from consumer.core.cloudevents import from_event
from consumer.core.decode import read_again
from consumer.core.delivery import UNDECODED, Delivery
from consumer.core.errors import Unreadable
from consumer.core.fingerprint import BYTES, of_value
from consumer.core.handler import Handler
from consumer.core.identity import (
    CallableId,
    DefaultId,
    FieldId,
    HeaderId,
    OffsetId,
    fingerprint,
    from_headers,
    from_value,
    offset_id,
)
from consumer.core.log_identity import Position
from consumer.core.message import LogRecord, Partition
from consumer.core.outcome import Dead, Reason
from consumer.core.values import canonical

_NO_LOGS: Mapping[Partition, Position] = {}


def identify(deliveries: Iterable[Delivery], logs: Mapping[Partition, Position] = _NO_LOGS) -> set[str]:
    """Set ids and fingerprints.

    A delivery without an id becomes a dead letter.

    Args:
        deliveries: of one record side by side, so that it is hashed once.
        logs: the positions of the partitions, for the salt of ids that come from offsets.

    Returns:
        The topics of messages that are identified by their offset because they have nothing better.
    """
    topics_without_ids: set[str] = set()
    record = None
    record_fingerprint = 0
    is_usual = False
    for delivery in deliveries:
        handler = delivery.handler
        if delivery.record is not record:
            record = delivery.record
            record_fingerprint = fingerprint(record.value)
            is_usual = record.value is not None and not (isinstance(record, LogRecord) and record.fault)
        delivery.fingerprint = record_fingerprint
        try:
            header = handler.rule.header
            id = from_headers(record, header) if is_usual and header is not None else None
            if id is None:
                id, by_offset = _id_of(delivery, handler, logs)
                if by_offset:
                    topics_without_ids.add(record.topic)
            delivery.id = id
            if handler.fingerprint is not BYTES and handler.idempotent:
                delivery.fingerprint = fingerprint_of(delivery)
        except Unreadable as error:
            if not delivery.id:
                delivery.id = _offset_id(delivery, logs)
            if handler.idempotent:
                delivery.outcome = Dead(Reason(error.reason), str(error))
    return topics_without_ids


def _offset_id(delivery: Delivery, logs: Mapping[Partition, Position]) -> bytes:
    position = logs.get(delivery.partition)
    return offset_id(delivery.record, position.salt if position is not None else None)


def _id_of(delivery: Delivery, handler: Handler, logs: Mapping[Partition, Position]) -> tuple[bytes, bool]:
    """Return the id, and whether it is only the offset's.

    For any message; one with its id in a header needs less. Raises Unreadable.
    """
    record = delivery.record
    id: bytes | None
    by_offset = False
    if isinstance(record, LogRecord) and record.fault:
        raise Unreadable(Reason.BAD_HEADER, record.fault)
    match handler.rule:
        case DefaultId():
            id = from_headers(record, "message-id")
            if id is None:
                id = from_event(record)
            if id is None:
                id, by_offset = _offset_id(delivery, logs), handler.idempotent
        case OffsetId():
            id = _offset_id(delivery, logs)
        case HeaderId(name):
            id = from_headers(record, name)
            if id is None:
                raise Unreadable(Reason.NO_MESSAGE_ID, f"no {name!r} header")
        case FieldId() | CallableId() as rule:
            value = decoded(delivery)
            try:
                id = from_value(rule, value)
            except Unreadable:
                if value is not None or record.value is not None:
                    raise
                id, by_offset = _offset_id(delivery, logs), True  # a deletion, which has no fields
    if record.value is None and not handler.takes_none:
        delivery.id = id
        raise Unreadable(Reason.NO_VALUE, "a null value, and the handler does not take None")
    return id, by_offset


def fingerprint_of(delivery: Delivery) -> int:
    """Return the fingerprint under the handler's rule.

    Raises Unreadable where it is of the value, and that cannot be decoded.
    """
    rule = delivery.handler.fingerprint
    if rule is BYTES:
        return fingerprint(delivery.record.value)
    return of_value(rule, decoded(delivery) if rule.of_value is not None else None)


def by_bytes(delivery: Delivery) -> Delivery:
    """Return a copy with the fingerprint of the bytes.

    Rows from before a handler got its rule of comparison have this one.
    """
    return Delivery(delivery.handler, delivery.record, delivery.id, fingerprint(delivery.record.value))


def decoded(delivery: Delivery) -> Any:
    """Return the value as the handler declares it. Raises Unreadable."""
    if delivery.value is UNDECODED:
        handler, record = delivery.handler, delivery.record
        raw = record.value
        if handler.read is not None:
            delivery.value = handler.read(record)
        elif raw is None:
            if not handler.takes_none:
                raise Unreadable(Reason.NO_VALUE, "a null value, and the handler does not take None")
            delivery.value = None
        else:
            try:
                delivery.value = handler.decoder(raw)
            except Exception as error:  # whatever a type's own code raises: these bytes are not of that type
                delivery.value = read_again(handler.decoder, raw, error)
    return delivery.value


def take_value(delivery: Delivery) -> Any:
    """Return the value for one call of the handler.

    The handler may change it, so the next call decodes it again.
    """
    value = decoded(delivery)
    delivery.value = UNDECODED
    return value


def decode_failure(delivery: Delivery) -> Dead | None:
    """Return the outcome of a message that cannot be decoded; else None."""
    try:
        decoded(delivery)
    except Unreadable as error:
        return Dead(Reason(error.reason), printable(str(error)))
    finally:
        delivery.value = UNDECODED
    return None


def equal_values(one: Delivery, other: Delivery) -> bool | None:
    """Return whether two decoded values are equal; None if that is unknown."""
    try:
        return canonical(decoded(one)) == canonical(decoded(other))
    except Exception:  # unreadable, or of a type that cannot be compared
        return None


def printable(text: str) -> str:
    """Replace what PostgreSQL's text cannot hold: NUL and lone surrogates."""
    return text.replace("\0", "?").encode("utf-8", "replace").decode()
