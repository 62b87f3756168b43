"""Tells a worker that is alive but not consuming from one that is idle, busy or waiting for a service.

Knows offsets and times as they are reported; knows no clock and no client. What it cannot see: a broker that reports a
wrong end offset.
"""

from __future__ import annotations

from collections.abc import Mapping

from consumer.core.message import Partition


class Watchdog:
    """Feed it what is observed; it says how long nothing has moved although something should have."""

    def __init__(self) -> None:
        self._received: dict[Partition, int] = {}
        self._since: dict[Partition, float] = {}
        self._settled = -1
        self._settled_since = 0.0

    def fetching_stalled_seconds(
        self, now: float, received: Mapping[Partition, int], ends: Mapping[Partition, int]
    ) -> float:
        """Longest time that a partition's fetch position stood still below the end of its log.

        received: next offset to fetch, for partitions that should be fetching now (not paused, buffers not full).
        """
        longest = 0.0
        for partition, offset in received.items():
            if self._received.get(partition) != offset or offset >= ends.get(partition, 0):
                self._received[partition], self._since[partition] = offset, now
            longest = max(longest, now - self._since[partition])
        for gone in self._received.keys() - received.keys():
            del self._received[gone], self._since[gone]
        return longest

    def settling_stalled_seconds(self, now: float, settled: int, *, has_work: bool) -> float:
        """Time since the number of settled batches last changed while there was work that could be done."""
        if settled != self._settled or not has_work:
            self._settled, self._settled_since = settled, now
        return now - self._settled_since
