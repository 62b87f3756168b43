"""Tells a worker that is alive but not consuming from one that is idle, busy or waiting for a service or a producer.

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


class OpenTransactions:
    """Which partitions a producer's transaction holds back for long. Feed it the offsets at which they are held."""

    def __init__(self) -> None:
        self._held: dict[Partition, tuple[int, float]] = {}
        self._told: dict[Partition, int] = {}

    def news(
        self, now: float, held: Mapping[Partition, int], patience_seconds: float
    ) -> tuple[list[Partition], list[Partition]]:
        """Partitions that have been held at one offset for longer than the patience, and those that go on again: each once."""
        self._held = {
            each: (at, self._held[each][1] if self._held.get(each, (None,))[0] == at else now)
            for each, at in held.items()
        }
        freed = [each for each, at in self._told.items() if held.get(each) != at]
        for each in freed:
            del self._told[each]
        late = [
            each
            for each, (_, since) in self._held.items()
            if now - since >= patience_seconds and each not in self._told
        ]
        self._told |= {each: held[each] for each in late}
        return late, freed
