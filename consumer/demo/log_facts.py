"""What the demo knows of the log better than its broker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from consumer.core.message import Partition
from consumer.kafka.brokers import Brokers
from consumer.kafka.log_inspection import LogInspection


class KnownEnds(LogInspection):
    """Ends of the log as the producer knows them.

    Tansu gives the beginning of the last batch for the end of the log.
    """

    def __init__(self, brokers: Brokers, ends: Mapping[Partition, int]) -> None:
        super().__init__(brokers)
        self._ends = ends

    async def ends(
        self, partitions: Sequence[Partition], *, partial: bool = False, uncommitted: bool = False
    ) -> dict[Partition, int]:
        return {partition: self._ends.get(partition, 0) for partition in partitions}


class Reads:
    """What the killed worker had read, and what others read again.

    From the workers' logs.
    """

    def __init__(self) -> None:
        self._by_pid: dict[int, set[tuple[int, int]]] = {}  # partition and offset
        self._victims: set[tuple[int, int]] = set()
        self.again: set[tuple[int, int]] = set()

    def add(self, pid: int, partition: int, first: int, last: int) -> None:
        read = {(partition, offset) for offset in range(first, last + 1)}
        self._by_pid.setdefault(pid, set()).update(read)
        self.again |= self._victims & read

    def killed(self, pid: int) -> None:
        self._victims = self._by_pid.get(pid, set())
