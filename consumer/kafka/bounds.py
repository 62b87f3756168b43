"""Resolves where a replay begins and ends in each partition.

Knows offsets and times as numbers; knows no Kafka and no clock. An end is exclusive: the first offset, or the first
time, that is not replayed any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from consumer.core.errors import Misconfigured
from consumer.core.message import Partition


@dataclass(frozen=True, slots=True)
class Earliest:
    """The first record that the log holds."""


@dataclass(frozen=True, slots=True)
class Latest:
    """The end of the log when the replay begins.

    Open transactions of producers are excluded.
    """


@dataclass(frozen=True, slots=True)
class AtPosition:
    """The application's position in PostgreSQL when the replay begins.

    Its workers have settled everything below it.
    """


@dataclass(frozen=True, slots=True)
class Offset:
    """An offset, the same in every partition."""

    number: int


@dataclass(frozen=True, slots=True)
class Time:
    """The first record of that time or later.

    Milliseconds since 1970 UTC, by the records' own timestamps.
    """

    milliseconds: int


Bound: TypeAlias = Earliest | Latest | AtPosition | Offset | Time


class Span(NamedTuple):
    """The offsets of a partition from `first` up to, and without, `end`."""

    partition: Partition
    first: int
    end: int

    @property
    def length(self) -> int:
        """Number of offsets.

        Records may be fewer: the log may be compacted, and holds transaction markers.
        """
        return self.end - self.first


class LogRange(NamedTuple):
    """What is known of a partition's log, to resolve bounds with.

    position: None before its first settled message.
    """

    begin: int
    end: int
    position: int | None
    from_time: int | None  # the offset that Kafka gives for the time of --from; None: no record is that late
    to_time: int | None


def span(partition: Partition, log: LogRange, start: Bound, end: Bound) -> Span:
    """Return a partition's offsets between two bounds; may be empty.

    Raises Misconfigured if the log has dropped records that the bounds ask for.
    """
    first = _offset(start, log, log.from_time)
    last = _offset(end, log, log.to_time)
    name = f"{partition.topic}:{partition.partition}"
    gone = f"the log of {name} begins at offset {log.begin}, and what came before was removed from it"
    match start:
        case Offset(number) if number < log.begin:
            raise Misconfigured(f"--from {number}: {gone}; --from earliest takes what is left")
        case Time() if first == log.begin > 0 and first < log.end:
            raise Misconfigured(
                f"--from: {gone}, and that may be records of the time asked for; --from earliest takes what is left"
            )
        case AtPosition() if log.position is not None and log.position < log.begin:
            raise Misconfigured(
                f"--from position: {gone}, and the position is {log.position}; --from earliest takes what is left"
            )
    match end:
        case Offset() | Time() | AtPosition() if last < log.begin:
            raise Misconfigured(f"--until: {gone}; give a later end")
    first = min(first, log.end)
    return Span(partition, first, max(first, min(last, log.end)))


def _offset(bound: Bound, log: LogRange, at_time: int | None) -> int:
    match bound:
        case Earliest():
            return log.begin
        case Latest():
            return log.end
        case AtPosition():
            return log.begin if log.position is None else log.position
        case Offset(number):
            return number
        case Time():
            return log.end if at_time is None else at_time
