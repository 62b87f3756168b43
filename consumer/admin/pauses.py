"""Pause and resume partitions; running workers obey within seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from consumer.admin.outbox import time_text
from consumer.core.audit import ActedBy
from consumer.core.pauses import PauseOrder, target_text
from consumer.core.suggestions import UnknownName, check_known
from consumer.postgres import pauses, positions
from consumer.postgres.protocol import Connection


@dataclass(frozen=True, slots=True)
class Target:
    """What to pause: an App, one of its topics, or one partition."""

    app: str
    topic: str | None
    partition: int | None

    def __str__(self) -> str:
        return target_text(self.topic, self.partition)


@dataclass(frozen=True, slots=True)
class PauseResult:
    """What was changed.

    changed: pauses that began or ended. left: earlier ones that pause the target or a part of it, and stay.
    """

    target: Target
    changed: tuple[PauseOrder, ...]
    left: tuple[PauseOrder, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the answer of `--json`."""
        return {
            "app": self.target.app,
            "topic": self.target.topic,
            "partition": self.target.partition,
            "changed": [pause_as_dict(pause) for pause in self.changed],
            "still_paused_by": [pause_as_dict(pause) for pause in self.left],
        }


def pause_as_dict(pause: PauseOrder) -> dict[str, Any]:
    """Return a pause as `--json` prints it."""
    return {
        "topic": pause.topic,
        "partition": pause.partition,
        "operator": pause.operator,
        "why": pause.why,
        "since": time_text(pause.since),
    }


async def check_target(connection: Connection, target: Target, declared: Iterable[str]) -> None:
    """Raise UnknownName for a topic or partition that does not exist.

    declared: the App's topics. The ledger knows the partitions that some worker has opened; Kafka is not asked, since
    it may be away in an incident.
    """
    if target.topic is None:
        return
    known = await positions.next_offsets(connection, target.app)
    topics = {*declared, *(partition.topic for partition in known)}
    check_known("--topic", target.topic, topics, f"App {target.app!r}")
    numbers = sorted(partition.partition for partition in known if partition.topic == target.topic)
    if target.partition is not None and target.partition not in numbers:
        having = f"it has {numbers[0]} to {numbers[-1]}" if numbers else "no worker has opened one yet"
        raise UnknownName(f"--partition {target.partition}: not known to topic {target.topic!r}; {having}")


async def pause(connection: Connection, target: Target, by: ActedBy) -> PauseResult:
    """Pause a target, unless it is paused already."""
    is_new = await pauses.pause(connection, target.app, target.topic, target.partition, by)
    covering = [
        pause
        for pause in await pauses.read(connection, target.app)
        if pause.topic in (None, target.topic) and pause.partition in (None, target.partition)
    ]
    own = [pause for pause in covering if (pause.topic, pause.partition) == (target.topic, target.partition)]
    wider = [pause for pause in covering if pause not in own]
    return PauseResult(target, tuple(own), tuple(wider)) if is_new else PauseResult(target, (), tuple(covering))


async def resume(connection: Connection, target: Target, by: ActedBy) -> PauseResult:
    """End the pauses of a target and of its parts."""
    ended, left = await pauses.resume(connection, target.app, target.topic, target.partition, by)
    return PauseResult(target, tuple(ended), tuple(left))
