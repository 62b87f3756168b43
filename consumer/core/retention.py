"""How long the ledger remembers, and contradictions of its settings.

Pure: times are arguments, in seconds since 1970 UTC by the database's clock. docs/how-to/retention.md explains the
arithmetic. Limitations: it cannot see that a producer sends an id again, with a new timestamp, after its row was
dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

GENERATIONS_PER_RETENTION = 4  # by default; rows are kept for 1 to 1.25 times the retention
GENERATIONS_MAX = 32  # live at a time; a claim looks for each id in all of them
HOUR = 3600.0
# 2000-01-01 in milliseconds. A smaller timestamp is not a record's time: seconds instead of milliseconds, 0, or -1.
_TIMES_BEGIN_MS = 946_684_800_000


class Policy(NamedTuple):
    """The settings, in hours.

    generation: how long claims go into one table. skew: how far clocks are apart at most.
    """

    retention: float
    generation: float
    skew: float

    @classmethod
    def of(cls, retention: float, generation: float | None, skew: float) -> Policy:
        return cls(retention, retention / GENERATIONS_PER_RETENTION if generation is None else generation, skew)


def is_time(timestamp_ms: int) -> bool:
    """Return whether a record's timestamp can be milliseconds since 1970."""
    return timestamp_ms >= _TIMES_BEGIN_MS


def what_is_wrong(timestamp_ms: int) -> str:
    """Return what is wrong with a timestamp that is not a time."""
    if timestamp_ms < 0:
        return "its record has no timestamp"
    if timestamp_ms >= _TIMES_BEGIN_MS // 1000:
        return f"its record's timestamp {timestamp_ms} is in seconds, and Kafka counts milliseconds"
    return f"its record's timestamp {timestamp_ms} is not a time in milliseconds since 1970"


def may_be_forgotten(timestamp_ms: int, offset: int, until_ms: int, below: int | None) -> bool:
    """Return whether a dropped row may have been this message's.

    Then a won claim proves nothing. A message is applied after it was produced, so dropped rows are of messages from
    before `until_ms`. For a timestamp that is not a time, the offset decides: dropped rows are of records below
    `below` in this log (None: no row of it was dropped). Limitation: a duplicate has no row, and may lie beyond.
    """
    if is_time(timestamp_ms):
        return timestamp_ms <= until_ms
    return below is not None and offset < below


class Generation(NamedTuple):
    """One table of the ledger.

    closed_at: every claim in it is older; None while claims are added.
    """

    number: int
    opened_at: float
    closed_at: float | None
    forgotten: bool


@dataclass(frozen=True, slots=True)
class LedgerState:
    """The ledger's generations, oldest first.

    horizon: rows from before it may be gone; None: none are.
    """

    now: float
    version: int
    target: int
    turning: bool
    horizon: float | None
    generations: tuple[Generation, ...]


@dataclass(frozen=True, slots=True)
class RotateGeneration:
    """One step towards the next generation."""


@dataclass(frozen=True, slots=True)
class Forget:
    """Stop looking into the oldest generation.

    closed_at: every row in it is older than that.
    """

    number: int
    closed_at: float


@dataclass(frozen=True, slots=True)
class Drop:
    """Remove the table of a generation that is forgotten."""

    number: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing is due for this time."""

    seconds: float


Step: TypeAlias = RotateGeneration | Forget | Drop | Wait


def due(state: LedgerState, policy: Policy) -> Step:
    """Return the next step.

    A generation is forgotten when its youngest row may be as old as the retention.
    """
    for generation in state.generations:
        if generation.forgotten:
            return Drop(generation.number)
    if state.turning:
        return RotateGeneration()
    oldest = state.generations[0]
    if oldest.closed_at is not None and oldest.closed_at + policy.retention * HOUR <= state.now:
        return Forget(oldest.number, oldest.closed_at)
    forgets_at = math.inf if oldest.closed_at is None else oldest.closed_at + policy.retention * HOUR
    if len(state.generations) >= GENERATIONS_MAX:
        return Wait(forgets_at - state.now)  # the oldest must stay, so the present one grows
    [present] = [generation for generation in state.generations if generation.number == state.target]
    turns_at = present.opened_at + policy.generation * HOUR
    if turns_at <= state.now:
        return RotateGeneration()
    return Wait(min(turns_at, forgets_at) - state.now)


def forgets_in_seconds(state: LedgerState, policy: Policy) -> float:
    """Return the seconds until the oldest generation may be forgotten."""
    oldest = next((generation for generation in state.generations if not generation.forgotten), None)
    if oldest is None:
        return 0.0
    closes_at = oldest.closed_at if oldest.closed_at is not None else oldest.opened_at + policy.generation * HOUR
    return max(
        0.0, max(closes_at, state.now if oldest.closed_at is None else 0.0) + policy.retention * HOUR - state.now
    )


def wanted(own: float, others: Mapping[str, float | None]) -> tuple[float | None, list[str]]:
    """Return the retention that suits every application of the database.

    In hours (None: for ever); and which applications want more than `own`.
    """
    longer = sorted(app for app, hours in others.items() if hours is None or hours > own)
    if any(others[app] is None for app in longer):
        return None, longer
    return max([own, *(hours for app in longer if (hours := others[app]) is not None)]), longer


class TopicRetention(NamedTuple):
    """How long a topic keeps its records; None: for ever, or unknown."""

    topic: str
    retention_hours: float | None
    segment_hours: float
    compacted: bool  # and nothing is deleted for its age
    known: bool = True


def contradictions(
    policy: Policy, window_hours: float | None, logs: Iterable[TopicRetention]
) -> tuple[list[str], list[str]]:
    """Return contradictions of the settings, and warnings, with the arithmetic.

    window: of the marks in Redis, if any.
    """
    errors: list[str] = []
    warnings: list[str] = []
    kept, part, skew = policy
    name = "CONSUMER_LEDGER_RETENTION_HOURS"
    if part > kept:
        errors.append(
            f"CONSUMER_LEDGER_GENERATION_HOURS={part:g} is more than {name}={kept:g}: a row would be kept for up to "
            f"{kept:g} + {part:g} = {kept + part:g} hours; set it to {kept:g} at most; a quarter, {kept / 4:g}, is usual"
        )
    elif kept / part > GENERATIONS_MAX - 2:
        errors.append(
            f"{name}={kept:g} / CONSUMER_LEDGER_GENERATION_HOURS={part:g} = {kept / part:.0f} generations, and a claim looks "
            f"into each of them: {GENERATIONS_MAX - 2} at most; set the second to {kept / (GENERATIONS_MAX - 2):g} at least"
        )
    if kept <= skew:
        errors.append(
            f"{name}={kept:g} is not more than CONSUMER_LEDGER_CLOCK_SKEW_HOURS={skew:g}: every message would be too old to "
            "judge; keep rows for longer"
        )
    if window_hours is not None and window_hours > kept:
        errors.append(
            f"CONSUMER_PRECHECK_WINDOW_HOURS={window_hours:g} is more than {name}={kept:g}: Redis would call an id a duplicate "
            f"that PostgreSQL has forgotten; set it to {kept:g} at most"
        )
    for log in logs:
        _check_topic(log, kept, skew, errors, warnings)
    return errors, warnings


def _check_topic(log: TopicRetention, kept: float, skew: float, errors: list[str], warnings: list[str]) -> None:
    """Add what contradicts the retention of a topic's records."""
    name = "CONSUMER_LEDGER_RETENTION_HOURS"
    if not log.known:
        warnings.append(
            f"the settings of topic {log.topic} may not be read (DescribeConfigs), so it is unknown whether its records "
            f"go within {name}={kept:g}; the start of its log is read again before anything is dropped"
        )
    elif log.compacted:
        errors.append(
            f"topic {log.topic} is compacted (cleanup.policy=compact): it keeps the newest record of a key for ever, and "
            f"{name}={kept:g} would forget it; unset {name}, or set cleanup.policy=compact,delete with a retention.ms of "
            f"{_ms(kept - skew)} at most"
        )
    elif log.retention_hours is None:
        errors.append(
            f"topic {log.topic} keeps its records for ever (retention.ms=-1), and {name}={kept:g} would forget them; unset "
            f"{name}, or set retention.ms to {_ms(kept - skew)} at most"
        )
    elif (needed := log.retention_hours + skew) > kept:
        errors.append(
            f"topic {log.topic} can deliver a record again for {log.retention_hours:g} hours (retention.ms); with "
            f"{skew:g} for clocks that differ that is {needed:g}, and {name}={kept:g} is {needed - kept:g} too few. "
            f"Set it to {needed:g} at least, or retention.ms to {_ms(kept - skew)} at most"
        )
    elif (at_worst := needed + log.segment_hours) > kept:
        warnings.append(
            f"topic {log.topic} may keep records for {log.retention_hours:g} (retention.ms) + {log.segment_hours:g} "
            f"(segment.ms: a log goes by whole segments) + {skew:g} (clocks) = {at_worst:g} hours, and {name} is {kept:g}: "
            "nothing is dropped while the log holds records of that time"
        )


def _ms(hours: float) -> int:
    return max(0, int(hours * HOUR * 1000))
