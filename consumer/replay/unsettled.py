"""Keep messages that should be dead letters, and are none so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from consumer.core.delivery import Delivery
from consumer.core.fingerprint import BYTES
from consumer.core.message import Partition
from consumer.transaction.identify import by_bytes


class UnsettledMessage(NamedTuple):
    """A message that should be a dead letter.

    None is stored so far.

    fingerprints: those that its dead letter may have. kind: of its sample.
    """

    handler: str
    partition: Partition
    offset: int
    id: bytes
    fingerprints: tuple[int, ...]
    kind: str

    @classmethod
    def of(cls, delivery: Delivery, kind: str) -> UnsettledMessage:
        """Return a delivery as an unsettled message."""
        handler = delivery.handler
        fingerprints = [delivery.fingerprint]
        if handler.fingerprint is not BYTES:  # older dead letters have the fingerprint of the bytes
            fingerprints.append(by_bytes(delivery).fingerprint)
        offset = delivery.record.offset
        return cls(handler.name, delivery.partition, offset, delivery.id, tuple(fingerprints), kind)

    def as_state(self) -> list[Any]:
        """Return it as JSON can hold it."""
        return [self.handler, *self.partition, self.offset, self.id.hex(), list(self.fingerprints), self.kind]

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> UnsettledMessage:
        """Return what `as_state` wrote."""
        handler, topic, partition, offset, id, fingerprints, kind = state
        return cls(handler, Partition(topic, partition), offset, bytes.fromhex(id), tuple(fingerprints), kind)
