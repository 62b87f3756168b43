"""What a function of the application gets for a message."""

from __future__ import annotations

from typing import Any

from consumer.core.delivery import Delivery
from consumer.core.handler import Handler
from consumer.core.message import Message
from consumer.transaction.identify import take_value


def argument_of(delivery: Delivery, function: Handler) -> Any:
    """Return the message or its value, as the function declares. Raises Unreadable.

    function: the handler, or another function for its messages (of an effect).
    """
    return _message(delivery) if function.wants_message else take_value(delivery)


def _message(delivery: Delivery) -> Message[Any]:
    record = delivery.record
    return Message(
        id=delivery.id.hex(),
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=record.key,
        headers=tuple(record.headers),
        timestamp=record.timestamp,
        value=take_value(delivery),
        app=delivery.handler.app,
        handler=delivery.handler.name,
    )
