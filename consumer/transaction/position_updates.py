"""Computes how the positions of a batch's partitions move.

Pure: core/ordering.py knows how far everything is settled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from consumer.core.delivery import Batch, Delivery, PositionUpdate
from consumer.core.fingerprint import BYTES
from consumer.core.identity import fingerprint
from consumer.core.log_identity import Position, RecordFingerprint
from consumer.core.message import Partition
from consumer.core.ordering import Scheduler


def position_updates(
    scheduler: Scheduler, batch: Batch, delayed: Mapping[Delivery, float], logs: Mapping[Partition, Position]
) -> list[PositionUpdate]:
    """Return the updates that a batch's transaction writes, with their logs.

    delayed: the messages that are not settled. logs: the positions as they were read.
    """
    updates = scheduler.position_updates(batch, delayed)
    if scheduler.delayed or delayed:
        updates += _unmoved(scheduler, batch, updates)
    return _with_logs(logs, batch, updates)


def _unmoved(scheduler: Scheduler, batch: Batch, updates: Sequence[PositionUpdate]) -> list[PositionUpdate]:
    """Return updates that leave positions where waiting messages keep them.

    They check ownership: a worker that settles a message must still own the position of its partition.
    """
    partitions = {message.partition for message in batch.deliveries} - {update.partition for update in updates}
    return [
        PositionUpdate(partition, scheduler.position(partition), scheduler.position(partition))
        for partition in scheduler.partitions
        if partition in partitions
    ]


def _with_logs(
    logs: Mapping[Partition, Position], batch: Batch, updates: Sequence[PositionUpdate]
) -> list[PositionUpdate]:
    """Return the updates with their logs and last records."""
    last: dict[Partition, RecordFingerprint] = {}
    partitions = {update.partition for update in updates}
    for delivery in reversed(batch.deliveries):
        if len(last) == len(partitions):
            break
        partition = delivery.partition
        if partition in partitions and partition not in last:
            record = delivery.record
            of_bytes = delivery.handler.fingerprint is BYTES  # the log is compared by its bytes
            value_fingerprint = delivery.fingerprint if of_bytes else fingerprint(record.value)
            last[partition] = RecordFingerprint(record.offset, record.timestamp, value_fingerprint)
    known = [(update, logs.get(update.partition) or Position(0)) for update in updates]
    return [
        update._replace(
            topic_id=at.topic_id, handlers=at.handlers, hold_count=at.hold_count, seen=last.get(update.partition)
        )
        for update, at in known
    ]
