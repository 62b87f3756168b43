"""Buffers what the handlers of one transaction publish.

An entry stays only if its message is applied: what an undone savepoint or a failed message has published is dropped.
Limitations: stores nothing; apply.py does, before the COMMIT.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

from consumer.core.delivery import Delivery
from consumer.core.errors import TransactionMisuse
from consumer.core.message import Message
from consumer.outbox.encoding import encoded
from consumer.outbox.record import (
    TRACEPARENT,
    HeadersArgument,
    Outgoing,
    OutgoingRecord,
    check_size,
    check_topic,
    derived_id,
    encoded_key,
    given_id,
    trace_of,
)

# What returns traceparent and tracestate of the span that is current; None where nothing is traced.
current_trace: ContextVar[Callable[[], tuple[str | None, str | None]] | None] = ContextVar(
    "current_trace", default=None
)

_NO_CAUSE = (
    "publish: in a batch handler, give cause= a message of its list, or id=; another run may call it with another list"
)
_OTHER_CAUSE = "publish: cause= is no message of this call; give one of the handler's list"
_TWICE = "publish: cause= is in the list more than once; annotate list[Message[T]] to tell them apart"


class Publisher:
    """Builds the records of one call of a handler.

    arguments: of a batch handler, in the order of its deliveries.
    """

    def __init__(self, deliveries: Sequence[Delivery], arguments: Sequence[Any] | None) -> None:
        self.deliveries = deliveries
        self.entries: list[Outgoing] = []
        self._arguments = arguments
        self._by_argument: dict[Hashable, Delivery | None] = {}
        self._ordinals: dict[Delivery, int] = {}

    def build(self, topic: str, value: Any, key: Any, headers: HeadersArgument, id: object, cause: object) -> Outgoing:
        """Return a record with its id and its trace. Raises TransactionMisuse."""
        first = self.deliveries[0]
        delivery = self._cause(cause, is_needed=id is None)
        handler = first.handler
        if id is not None:
            message_id = given_id(id)
        else:
            assert delivery is not None
            # Counted also where the call is refused, or its savepoint undone: the ids of later calls stay the same.
            ordinal = self._ordinals.get(delivery, 0)
            self._ordinals[delivery] = ordinal + 1
            message_id = derived_id(handler.app, handler.name, delivery.id, ordinal)
        bytes_max = check_topic(topic, handler.publishes)
        body, own = encoded(topic, value, headers, handler.encode)
        source = delivery or first
        trace: tuple[str | None, str | None] = (None, None)
        if not any(name == TRACEPARENT for name, _ in own):
            trace = own_trace() if (own_trace := current_trace.get()) is not None else trace_of(source.record.headers)
        record = OutgoingRecord(topic, message_id, encoded_key(key), body, own, *trace)
        check_size(record, bytes_max)
        return Outgoing(record, source.partition, handler.number, None if delivery is None else delivery.record.offset)

    def _cause(self, cause: object, *, is_needed: bool) -> Delivery | None:
        if self._arguments is None:
            if cause is not None:
                raise TransactionMisuse("publish: cause= is for batch handlers; this call has one message")
            return self.deliveries[0]
        if cause is None:
            if is_needed:
                raise TransactionMisuse(_NO_CAUSE)
            return None
        if not self._by_argument:
            for argument, delivery in zip(self._arguments, self.deliveries, strict=True):
                key = _key(argument)
                self._by_argument[key] = None if key in self._by_argument else delivery
        try:
            match = self._by_argument[_key(cause)]
        except KeyError:
            raise TransactionMisuse(_OTHER_CAUSE) from None
        if match is None:
            raise TransactionMisuse(_TWICE)
        return match


def _key(argument: object) -> Hashable:
    """Return what distinguishes a handler's argument from the others."""
    if isinstance(argument, Message):  # a dry run passes copies
        return (argument.topic, argument.partition, argument.offset)
    return id(argument)


def in_message_order(publishers: Iterable[Publisher], applied: Sequence[Delivery]) -> list[Outgoing]:
    """Return the records of applied messages, in batch order.

    Within a call, in the order of its publishes.
    """
    places = {delivery: place for place, delivery in enumerate(applied)}
    kept = [publisher for publisher in publishers if publisher.entries and publisher.deliveries[0] in places]
    kept.sort(key=lambda publisher: places[publisher.deliveries[0]])
    return [entry for publisher in kept for entry in publisher.entries]
