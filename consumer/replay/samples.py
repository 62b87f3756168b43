"""Describe a delivery for the samples of the findings."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from consumer.core.delivery import Delivery
from consumer.core.message import Partition
from consumer.core.outcome import Applied, Dead, Duplicate, Outcome, RetryLater, Skipped
from consumer.transaction.result import BEHIND_RETRY

UNCALLED = RetryLater(0.0, "its handler was not called")  # of a missing message that can be read


def would_text(outcome: Outcome | None) -> str:
    """Return what a handler would do, to go on after "would"."""
    match outcome:
        case None:
            return "be applied"
        case RetryLater() if outcome is UNCALLED:
            return "be tried"
        case Dead(reason):
            return f"become a dead letter ({reason.value})"
        case RetryLater() if outcome is BEHIND_RETRY:
            return "wait behind a failed message of its key"
        case RetryLater():
            return "fail and be tried again"
        case Applied() | Duplicate() | Skipped():
            return "be a duplicate by now"


def delivery_place(delivery: Delivery) -> dict[str, Any]:
    """Return where a delivery is: handler, partition, offset and id."""
    return sample_place(delivery.handler.name, delivery.partition, delivery.record.offset, delivery.id)


def sample_place(handler: str, partition: Partition, offset: int, id: bytes) -> dict[str, Any]:
    """Return the place of a message, for a sample."""
    return {
        "handler": handler,
        "topic": partition.topic,
        "partition": partition.partition,
        "offset": offset,
        "id": str(UUID(bytes=id)),
    }
