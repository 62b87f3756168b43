"""What the console remembers of an App's figures.

Pure: times are given, as Unix seconds. Limitations: the memory begins when the console starts and holds one hour;
Prometheus keeps more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from consumer.core.message import Partition

KEEP_SECONDS = 3600.0
_STEP_SECONDS = 5.0  # between two samples that are kept
RATE_SECONDS = 60.0
# The outcomes of a handler, in the order of columns and bars.
OUTCOMES = (
    "applied",
    "duplicate_batch",
    "duplicate_precheck",
    "duplicate_ledger",
    "duplicate_dead_letter",
    "dead_lettered",
    "skipped",
)


class Sample(NamedTuple):
    """Counts and positions at one time.

    outcomes: by handler and outcome, since the first message. positions: up to where partitions are settled.
    """

    at: float
    outcomes: Mapping[str, Mapping[str, int]]
    positions: Mapping[Partition, int]


def outcomes_of(row: Mapping[str, Any]) -> dict[str, int]:
    """Return a handler's counts by outcome, duplicates by cause."""
    flat = {name: int(row[name]) for name in ("applied", "dead_lettered", "skipped")}
    flat |= {f"duplicate_{cause}": int(count) for cause, count in row["duplicates"].items()}
    return {name: flat[name] for name in OUTCOMES if name in flat}


class History:
    """The samples of the last hour, a few seconds apart."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def add(self, sample: Sample) -> None:
        """Add the newest sample; drop old ones."""
        samples = self._samples
        if len(samples) > 1 and sample.at - samples[-2].at < _STEP_SECONDS:
            samples.pop()
        samples.append(sample)
        while samples[0].at < sample.at - KEEP_SECONDS:
            samples.popleft()

    @property
    def since(self) -> float | None:
        """The time of the oldest sample."""
        return self._samples[0].at if self._samples else None

    def rate(self, partition: Partition) -> float | None:
        """Return how many offsets were settled a second, lately.

        None: not known yet, or the position was moved back.
        """
        if not self._samples:
            return None
        last = self._samples[-1]
        lately = [
            sample for sample in self._samples if last.at - sample.at <= RATE_SECONDS and partition in sample.positions
        ]
        if len(lately) < 2 or partition not in last.positions:
            return None
        settled = last.positions[partition] - lately[0].positions[partition]
        return settled / (last.at - lately[0].at) if settled >= 0 else None

    def buckets(self, handler: str, now: float, width: int, count: int) -> list[dict[str, float | int]]:
        """Return a handler's outcomes in steps of `width` seconds, up to now.

        What was counted between two samples belongs to the step of the later one. A counter that falls, as that of dead
        letters does after a retry, counts as unchanged. The first step is the first one with a sample.
        """
        last = int(now // width)
        steps: dict[int, dict[str, float | int]] = {}
        for before, after in zip(self._samples, list(self._samples)[1:], strict=False):
            step = int(after.at // width)
            counts = steps.setdefault(step, {})
            was = before.outcomes.get(handler, {})
            for name, number in after.outcomes.get(handler, {}).items():
                if (grown := number - was.get(name, 0)) > 0:
                    counts[name] = counts.get(name, 0) + grown
        if not steps:
            return []
        first = max(min(steps), last - count + 1)
        return [{"at": step * width, **steps.get(step, {})} for step in range(first, last + 1)]


def with_last_known(rows: Iterable[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return partitions with the last known ends, while Kafka is away.

    known: partitions as Kafka and PostgreSQL described them before. A stop that only Kafka shows holds as long as the
    position has not moved.
    """
    before = {(row["topic"], row["partition"]): row for row in known}
    merged: list[dict[str, Any]] = []
    for row in rows:
        last = before.pop((row["topic"], row["partition"]), None)
        if last is None or last["end"] is None:
            merged.append(dict(row))
            continue
        lag = max(0, last["end"] - row["position"])
        stopped = row["stopped"] or (last["stopped"] if last["position"] == row["position"] else None)
        merged.append({**row, "end": last["end"], "lag": lag, "stopped": stopped})
    merged += [dict(row) for row in before.values() if row["position"] is None]  # it has begun nothing yet
    return merged


def seconds_left(lag: int | None, rate: float | None) -> float | None:
    """Return how long the lag takes at this rate; None: not known."""
    if not lag:
        return None
    return lag / rate if rate else None
