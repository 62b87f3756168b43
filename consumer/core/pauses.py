"""Which partitions an operator has paused.

Knows names and numbers. A pause is of a whole App, of a topic, or of one partition; a partition is paused while any
pause covers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from consumer.core.message import Partition


class PauseOrder(NamedTuple):
    """A pause, who asked for it and why.

    topic: None for the whole App. partition: None for all of the topic. since: Unix seconds.
    """

    topic: str | None
    partition: int | None
    operator: str
    why: str
    since: float

    def covers(self, partition: Partition) -> bool:
        """Return whether a partition is paused by this."""
        return self.topic in (None, partition.topic) and self.partition in (None, partition.partition)

    def is_within(self, topic: str | None, partition: int | None) -> bool:
        """Return whether all that this pauses is of that target."""
        return topic in (None, self.topic) and partition in (None, self.partition)

    @property
    def target(self) -> str:
        """What is paused, as text."""
        return target_text(self.topic, self.partition)


def target_text(topic: str | None, partition: int | None) -> str:
    """Return a target as text."""
    if topic is None:
        return "the whole App"
    return f"topic {topic}" if partition is None else f"{topic}:{partition}"


def pause_of(pauses: Sequence[PauseOrder], partition: Partition) -> PauseOrder | None:
    """Return the widest pause that covers a partition."""
    covering = [pause for pause in pauses if pause.covers(partition)]
    return min(covering, key=lambda pause: (pause.topic is not None, pause.partition is not None), default=None)


def paused_among(pauses: Sequence[PauseOrder], partitions: Iterable[Partition]) -> frozenset[Partition]:
    """Return which of these partitions are paused."""
    if not pauses:
        return frozenset()
    return frozenset(partition for partition in partitions if any(pause.covers(partition) for pause in pauses))
