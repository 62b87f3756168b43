"""What one worker process counts.

Pure. Each beat holds the values since the process began, not differences: a beat that is lost changes nothing, since the next
one has the same values or newer ones, and a beat that comes twice says the same twice. Only series that have changed since
the last beat that was sent are in it. Limitation: what was counted after a killed worker's last beat is lost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

from consumer.metrics.catalog import OTHER, VALUES_MAX, Metric

Labels = tuple[str, ...]
Series = tuple[Metric, Labels]
Gauge = tuple[Metric, Labels, float]
_VALUE_LENGTH_MAX = 100


class LabelLimit:
    """Keeps the values of a metric's bounded label few.

    The first VALUES_MAX values stay, any other becomes OTHER.
    """

    def __init__(self) -> None:
        self._known: dict[Metric, set[str]] = {}

    def limited(self, metric: Metric, labels: Labels) -> Labels:
        """Return the labels, with OTHER for one value too many."""
        if metric.bounded is None:
            return labels
        place = metric.labels.index(metric.bounded)
        known, value = self._known.setdefault(metric, set()), labels[place][:_VALUE_LENGTH_MAX]
        if value not in known:
            if len(known) >= VALUES_MAX:
                value = OTHER
            elif value != OTHER:
                known.add(value)
        return (*labels[:place], value, *labels[place + 1 :])


class Distribution:
    """The state of one histogram: counts by bucket, and the sum.

    The last count is of values above every bound.
    """

    __slots__ = ("counts", "sum")

    def __init__(self, counts: list[int], sum: float) -> None:
        self.counts = counts
        self.sum = sum

    @classmethod
    def empty(cls, metric: Metric) -> Distribution:
        """Return a distribution without values."""
        return cls([0] * (len(metric.buckets) + 1), 0.0)


class Recorder:
    """Counts of one worker process."""

    def __init__(self) -> None:
        self._counters: dict[Series, float] = {}
        self._distributions: dict[Series, Distribution] = {}
        self._changed: set[Series] = set()
        self._limit = LabelLimit()
        self._number = 0

    def add(self, metric: Metric, labels: Labels = (), amount: float = 1) -> None:
        """Add to a counter."""
        if metric.bounded is not None:
            labels = self._limit.limited(metric, labels)
        series = (metric, labels)
        self._counters[series] = self._counters.get(series, 0) + amount
        self._changed.add(series)

    def raise_to(self, metric: Metric, labels: Labels, value: float) -> None:
        """Set a counter that is counted elsewhere; it never falls."""
        if value > self._counters.get((metric, labels), 0):
            self.add(metric, labels, value - self._counters.get((metric, labels), 0))

    def observe(self, metric: Metric, labels: Labels, value: float, count: int = 1) -> None:
        """Add a value to a histogram, `count` times.

        A negative one counts as 0.
        """
        series = (metric, labels)
        distribution = self._distributions.get(series)
        if distribution is None:
            distribution = self._distributions[series] = Distribution.empty(metric)
        if value < 0:
            value = 0.0  # clocks of two machines
        distribution.counts[bisect_left(metric.buckets, value)] += count
        distribution.sum += value * count
        self._changed.add(series)

    @property
    def has_changed(self) -> bool:
        """Whether something was counted since the last beat that was sent."""
        return bool(self._changed)

    def beat(self, gauges: Iterable[Gauge] | None = None) -> dict[str, Any]:
        """Return what is new, as JSON can hold it.

        gauges: all of this worker's; None: as in the last beat that had some. Call `sent` if it was sent.
        """
        self._number += 1
        beat: dict[str, Any] = {"number": self._number}
        beat["counters"] = [
            [series[0].name, series[1], self._counters[series]] for series in self._changed if series in self._counters
        ]
        beat["histograms"] = [
            [series[0].name, series[1], distribution.counts, distribution.sum]
            for series in self._changed
            if (distribution := self._distributions.get(series)) is not None
        ]
        if gauges is not None:
            beat["gauges"] = [[metric.name, labels, value] for metric, labels, value in gauges]
        return beat

    def sent(self) -> None:
        """Note that the last beat was sent."""
        self._changed.clear()
