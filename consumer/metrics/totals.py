"""Sums over the worker processes of a supervisor, past and present.

Pure. A process's counts stay when it ends, so counters never fall; its gauges go with it. Sums are exact until they go out: the
sum of rounded numbers depends on their order, and a counter that falls by its last digit is a reset for Prometheus.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from math import isfinite
from typing import Any

from consumer.metrics.catalog import BY_NAME, Kind, Metric
from consumer.metrics.recorder import Distribution, Gauge, LabelLimit, Labels, Series


@dataclass(slots=True)
class _Process:
    """The latest values of one worker process."""

    number: int = 0  # of its latest beat
    counters: dict[Series, float] = field(default_factory=dict)
    distributions: dict[Series, Distribution] = field(default_factory=dict)
    gauges: list[Gauge] = field(default_factory=list)


class _Sums:
    """Exact sums of counters and histograms."""

    def __init__(self) -> None:
        self.counters: dict[Series, Fraction] = {}
        self.counts: dict[Series, list[int]] = {}  # of histograms, by bucket
        self.sums: dict[Series, Fraction] = {}  # likewise

    def add(self, series: Series, amount: float | Fraction) -> None:
        """Add to a counter."""
        self.counters[series] = self.counters.get(series, Fraction()) + Fraction(amount)

    def add_distribution(self, series: Series, counts: Iterable[int], sum: float | Fraction) -> None:
        """Add to a histogram."""
        known = self.counts.get(series) or [0] * (len(series[0].buckets) + 1)
        self.counts[series] = [mine + theirs for mine, theirs in zip(known, counts, strict=True)]
        self.sums[series] = self.sums.get(series, Fraction()) + Fraction(sum)


class Totals:
    """Counts of all worker processes, of the supervisor, and of its queries."""

    def __init__(self) -> None:
        self._running: dict[int, _Process] = {}
        self._own = _Sums()  # of processes that have ended, and of the supervisor
        self._groups: dict[str, list[Gauge]] = {}
        self._limit = LabelLimit()

    # -- values come in -----------------------------------------------------------------------------------------------

    def begin(self, process: int) -> None:
        """Take beats of a new process. process: any number, never used again."""
        self._running[process] = _Process()

    def report(self, process: int, beat: Any) -> None:
        """Take a beat of a process.

        A beat that was taken already, that is of an ended process, or that cannot be read changes nothing.
        """
        known = self._running.get(process)
        try:
            number, counters, distributions, gauges = _read(beat)
        except (ValueError, TypeError, KeyError, AttributeError):
            return
        if known is None or number <= known.number:
            return
        known.number = number
        known.counters.update(counters)
        known.distributions.update(distributions)
        if gauges is not None:
            known.gauges = gauges

    def end(self, process: int) -> None:
        """Keep an ended process's counts, and forget its gauges."""
        ended = self._running.pop(process, None)
        if ended is None:
            return
        for (metric, labels), value in ended.counters.items():
            self._own.add((metric, self._limit.limited(metric, labels)), value)
        for series, distribution in ended.distributions.items():
            self._own.add_distribution(series, distribution.counts, distribution.sum)

    def add(self, metric: Metric, labels: Labels = (), amount: float = 1) -> None:
        """Add to a counter of the supervisor."""
        self._own.add((metric, labels), amount)

    def set_gauges(self, group: str, gauges: Iterable[Gauge]) -> None:
        """Replace a group of the supervisor's gauges."""
        self._groups[group] = list(gauges)

    # -- sums go out --------------------------------------------------------------------------------------------------

    def counters(self) -> dict[Series, float]:
        """Return the sum of each counter."""
        total = _Sums()
        for series, known in self._own.counters.items():
            total.add(series, known)
        for process in self._running.values():
            for (metric, labels), value in process.counters.items():
                total.add((metric, self._limit.limited(metric, labels)), value)
        return {series: float(value) for series, value in total.counters.items()}

    def distributions(self) -> dict[Series, Distribution]:
        """Return the sum of each histogram."""
        total = _Sums()
        for series, counts in self._own.counts.items():
            total.add_distribution(series, counts, self._own.sums[series])
        for process in self._running.values():
            for series, distribution in process.distributions.items():
                total.add_distribution(series, distribution.counts, distribution.sum)
        return {series: Distribution(counts, float(total.sums[series])) for series, counts in total.counts.items()}

    def gauges(self) -> dict[Series, float]:
        """Return each gauge: the sum over workers, or the largest."""
        values: dict[Series, float] = {}
        for gauges in (*(process.gauges for process in self._running.values()), *self._groups.values()):
            for metric, labels, value in gauges:
                known = values.get((metric, labels))
                if known is None:
                    values[metric, labels] = value
                else:
                    values[metric, labels] = known + value if metric.kind is Kind.GAUGE else max(known, value)
        return values


_Beat = tuple[int, dict[Series, float], dict[Series, Distribution], list[Gauge] | None]


def _read(beat: Any) -> _Beat:
    """Read a beat whole. Raises ValueError, TypeError, KeyError or AttributeError."""
    counters = {_series(name, labels): _finite(value) for name, labels, value in beat["counters"]}
    distributions = {}
    for name, labels, counts, total in beat["histograms"]:
        series = _series(name, labels)
        if len(counts) != len(series[0].buckets) + 1:
            raise ValueError(name)
        distributions[series] = Distribution([int(count) for count in counts], _finite(total))
    gauges = beat.get("gauges")
    if gauges is not None:
        gauges = [(*_series(name, labels), float(value)) for name, labels, value in gauges]
    return int(beat["number"]), counters, distributions, gauges


def _finite(value: Any) -> float:
    number = float(value)
    if not isfinite(number):
        raise ValueError(number)
    return number


def _series(name: str, labels: list[str]) -> Series:
    metric = BY_NAME[name]
    if len(labels) != len(metric.labels):
        raise ValueError(name)
    return metric, tuple(map(str, labels))
