"""What a Scheduler knows of one partition.

Data only: core/ordering.py reads and writes it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from consumer.core.delivery import SavedAttempts
from consumer.core.message import Record


@dataclass(slots=True)
class PartitionQueue:
    """One partition of a Scheduler."""

    epoch: int  # counts assignments of partitions to this Scheduler
    frontier: int  # everything below was taken, and is settled or open
    position: int  # as this worker last wrote or read it
    fetched: deque[Record] = field(default_factory=deque)
    sizes: deque[int] = field(default_factory=deque)  # of `fetched`, in bytes
    fetched_bytes: int = 0
    received: int = 0  # offset after the last record added
    unsettled: dict[int, int] = field(default_factory=dict)  # offset -> deliveries delayed
    delayed: int = 0  # deliveries, in all
    delayed_bytes: int = 0
    # Keys that a dead letter may hold: the handler's number, and the hash of the ordering key.
    possibly_held: set[tuple[int, bytes]] = field(default_factory=set)
    # Failures from before a restart, by the handler's number and the offset.
    saved_attempts: dict[tuple[int, int], SavedAttempts] = field(default_factory=dict)
    full: bool = False  # until a quarter of what may be delayed is settled: each time, the log is read again
