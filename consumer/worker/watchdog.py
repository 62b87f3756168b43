"""Distinguishes a stalled worker from an idle, busy or waiting one.

Pure: judges offsets and times that it is given. Limitations: a broker that reports a wrong end offset misleads it.
"""

from __future__ import annotations

from collections.abc import Mapping

from consumer.core.message import Partition


class Watchdog:
    """Measures how long nothing has moved although something should have."""

    def __init__(self) -> None:
        self._received: dict[Partition, int] = {}
        self._since: dict[Partition, float] = {}
        self._settled = -1
        self._settled_since = 0.0

    def fetching_stalled_seconds(
        self, now: float, received: Mapping[Partition, int], ends: Mapping[Partition, int]
    ) -> float:
        """Return how long a fetch stood still below its log's end.

        received: next offset to fetch, for partitions that should be fetching now (not paused, buffers not full). Of
        several partitions, the longest time.
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
        """Return how long no batch was settled although there was work."""
        if settled != self._settled or not has_work:
            self._settled, self._settled_since = settled, now
        return now - self._settled_since


class OpenTransactions:
    """Finds partitions that a producer's transaction holds back for long.

    Judges by the offsets at which they are held.
    """

    def __init__(self) -> None:
        self._held: dict[Partition, tuple[int, float]] = {}
        self._reported: dict[Partition, int] = {}

    def changes(
        self, now: float, held: Mapping[Partition, int], patience_seconds: float
    ) -> tuple[list[Partition], list[Partition]]:
        """Return partitions held back beyond the patience, and those freed.

        Each is returned once.
        """
        self._held = {
            partition: (offset, self._held[partition][1] if self._held.get(partition, (None,))[0] == offset else now)
            for partition, offset in held.items()
        }
        freed = [partition for partition, offset in self._reported.items() if held.get(partition) != offset]
        for partition in freed:
            del self._reported[partition]
        late = [
            partition
            for partition, (_, since) in self._held.items()
            if now - since >= patience_seconds and partition not in self._reported
        ]
        self._reported |= {partition: held[partition] for partition in late}
        return late, freed
