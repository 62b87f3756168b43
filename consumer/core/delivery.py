"""Deliveries, batches of them, and what settling a batch does to positions.

A delivery is one record for one handler.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

import msgspec

from consumer.core.dead_letters import ordering_key_hash
from consumer.core.evidence import FailureCause
from consumer.core.handler import Handler
from consumer.core.log_identity import RecordFingerprint
from consumer.core.message import Partition, Record
from consumer.core.outcome import Outcome

UNDECODED = object()
_HEADER_BYTES = 150  # of the objects that hold a header, besides its bytes: measured 147 with CPython 3.11


def size_of(record: Record) -> int:
    """Return the bytes of a record that its producer decides on.

    Value, key and headers; headers with the objects that hold them.
    """
    size = len(record.value or b"") + len(record.key or b"")
    for key, value in record.headers:
        size += len(key) + len(value or b"") + _HEADER_BYTES
    return size


class Delivery(msgspec.Struct, eq=False):
    """One record for one handler: the unit of work, attempts and outcomes.

    Equal to itself only. One task at a time works on it, that of its lane, so no write needs a lock.

    **Who writes to it.** Values that are known before are given when it is created. Afterwards, and nowhere else
    (tests/core/test_delivery.py compares this with the code):

    - id, fingerprint, value: transaction/identify.py, the first step of a batch.
    - outcome: identify.py (unreadable), precheck/client.py (known to Redis), transaction/observe.py (of handlers that
      opted out), transaction/isolate.py (at fault), transaction/result.py (none again, when it is retried), and
      effects/ (its call failed, or waits), and rebuild/, which settles what the ledger knows.
    - attempts: observe.py, isolate.py, effects/, and result.py after the COMMIT.
    - reruns, call_alone, success_mark, failure_cause: isolate.py.
    - id, outcome, failure_cause of those that wait for a schema: decoders/preparation.py.
    - delayed: core/ordering.py.
    - reply: effects/, before the transaction.

    A frozen Delivery would be as fast (measured: 0.98 to 1.00 times the time from `take` to `complete`), but would need
    three tables beside it (outcomes, histories of failures, decoded values), kept in step over splits, retries and
    revocations.
    """

    handler: Handler
    record: Record
    id: bytes = b""
    fingerprint: int = 0
    value: object = UNDECODED  # a cache: the handler may change the value, so each call takes it out
    attempts: int = 0
    reruns: int = 0  # times that its handler asked to be run again, which are no attempts
    call_alone: bool = False  # a batch handler's call that took too long had this message among others
    delayed: bool = False  # its offset is among the unsettled ones of its partition
    outcome: Outcome | None = None  # settled before its transaction: unreadable, skipped, known to Redis, at fault
    success_mark: int = -1  # successes of its handler when it failed first: see evidence.py
    failure_cause: FailureCause | None = None  # why it waits
    reply: bytes | None = None  # what another system has answered, for the handler of an effect

    @property
    def partition(self) -> Partition:
        return Partition(self.record.topic, self.record.partition)

    def ordering_key(self) -> Hashable:
        """Return the key whose deliveries run in order.

        A message without a key is ordered with nothing, as in Kafka's own contract.
        """
        record, order = self.record, self.handler.order
        if order == "key" and record.key is not None:
            return (self.handler.name, record.topic, record.partition, record.key)
        if order == "partition":
            return (self.handler.name, record.topic, record.partition)
        return (self.handler.name, record.topic, record.partition, record.offset, None)

    def ordering_key_hash(self) -> bytes | None:
        """Return the ordering key as the table of dead letters has it.

        None when nothing waits for this message.
        """
        return ordering_key_hash(self.handler.order, self.record)


class SavedAttempts(NamedTuple):
    """How often a message has failed before, and when it is due."""

    attempts: int
    due: float


class PositionUpdate(NamedTuple):
    """A partition's position: as this worker last knew it, and now.

    topic_id: of the log of both; the same offset of another log is another position. seen: the last record that was
    read. handlers: those that have settled the messages between. hold_count: holds when the owner read them, so that a
    hold which another process adds is noticed.
    """

    partition: Partition
    previous: int
    next: int
    topic_id: UUID | None = None
    seen: RecordFingerprint | None = None
    handlers: str | None = None
    hold_count: int = 0


@dataclass(slots=True)
class Batch:
    """Deliveries to settle in one transaction.

    ends: the frontier of each partition once they are settled. partition_epochs: the epoch of each partition of these, at
    least, when they were taken; a partition that was revoked or assigned again since is not changed by them.
    """

    deliveries: list[Delivery]
    ends: dict[Partition, int]
    partition_epochs: Mapping[Partition, int]

    def split(self, at: int | None = None) -> tuple[Batch, Batch]:
        """Split into two parts to settle one after the other.

        at: halves by default. The ends of the first part stay below all deliveries of the second.
        """
        middle = len(self.deliveries) // 2 if at is None else at
        head, tail = self.deliveries[:middle], self.deliveries[middle:]
        ends = dict(self.ends)
        for delivery in tail:
            partition = delivery.partition
            if not delivery.delayed and partition in ends:
                ends[partition] = min(ends[partition], delivery.record.offset)
        return Batch(head, ends, self.partition_epochs), Batch(tail, self.ends, self.partition_epochs)
