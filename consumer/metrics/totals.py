"""Sums over the worker processes of a supervisor, past and present.

Pure. A process's counts stay when it ends, so counters never fall; its gauges go with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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


class Totals:
    """Counts of all worker processes, of the supervisor, and of its queries."""

    def __init__(self) -> None:
        self._running: dict[int, _Process] = {}
        self._own = _Process()  # of processes that have ended, and of the supervisor
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
        _add(self._own.counters, self._limited(ended.counters))
        _add_distributions(self._own.distributions, ended.distributions)

    def add(self, metric: Metric, labels: Labels = (), amount: float = 1) -> None:
        """Add to a counter of the supervisor."""
        _add(self._own.counters, {(metric, labels): amount})

    def set_gauges(self, group: str, gauges: Iterable[Gauge]) -> None:
        """Replace a group of the supervisor's gauges."""
        self._groups[group] = list(gauges)

    # -- sums go out --------------------------------------------------------------------------------------------------

    def counters(self) -> dict[Series, float]:
        """Return the sum of each counter."""
        sums: dict[Series, float] = {}
        for process in (self._own, *self._running.values()):
            _add(sums, process.counters)
        return self._limited(sums)

    def _limited(self, values: Mapping[Series, float]) -> dict[Series, float]:
        limited: dict[Series, float] = {}
        for (metric, labels), value in values.items():
            _add(limited, {(metric, self._limit.limited(metric, labels)): value})
        return limited

    def distributions(self) -> dict[Series, Distribution]:
        """Return the sum of each histogram."""
        sums: dict[Series, Distribution] = {}
        for process in (self._own, *self._running.values()):
            _add_distributions(sums, process.distributions)
        return sums

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


def _add(sums: dict[Series, float], more: Mapping[Series, float]) -> None:
    for series, value in more.items():
        sums[series] = sums.get(series, 0) + value


def _add_distributions(sums: dict[Series, Distribution], more: Mapping[Series, Distribution]) -> None:
    for series, distribution in more.items():
        if series not in sums:
            sums[series] = Distribution.empty(series[0])
        sums[series].add(distribution)


_Beat = tuple[int, dict[Series, float], dict[Series, Distribution], list[Gauge] | None]


def _read(beat: Any) -> _Beat:
    """Read a beat whole. Raises ValueError, TypeError, KeyError or AttributeError."""
    counters = {_series(name, labels): float(value) for name, labels, value in beat["counters"]}
    distributions = {}
    for name, labels, counts, total in beat["histograms"]:
        series = _series(name, labels)
        if len(counts) != len(series[0].buckets) + 1:
            raise ValueError(name)
        distributions[series] = Distribution([int(count) for count in counts], float(total))
    gauges = beat.get("gauges")
    if gauges is not None:
        gauges = [(*_series(name, labels), float(value)) for name, labels, value in gauges]
    return int(beat["number"]), counters, distributions, gauges


def _series(name: str, labels: list[str]) -> Series:
    metric = BY_NAME[name]
    if len(labels) != len(metric.labels):
        raise ValueError(name)
    return metric, tuple(map(str, labels))
