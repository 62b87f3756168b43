"""Totals in the formats of Prometheus and OpenMetrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from consumer.metrics import catalog
from consumer.metrics.catalog import METRICS, Kind, Source
from consumer.metrics.fleet import Fleet
from consumer.metrics.recorder import Distribution


class FleetCollector(Collector):
    """Reads a fleet at each scrape. All series have the label `app`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def describe(self) -> list[Metric]:
        """Return nothing: the registry need not collect to find names that repeat."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, those without values too."""
        samples = self._fleet.samples()
        for metric in METRICS:
            if metric.source is Source.REPLAY:
                continue
            family = _family(metric)
            for label_values, value in samples.get(metric, []):
                if isinstance(value, Distribution):
                    family.add_metric(label_values, buckets=_cumulative(metric, value), sum_value=value.sum)
                else:
                    family.add_metric(label_values, value)
            yield family


def _family(metric: catalog.Metric) -> Any:
    kinds: dict[Kind, Callable[..., Metric]] = {
        Kind.COUNTER: CounterMetricFamily,
        Kind.HISTOGRAM: HistogramMetricFamily,
        Kind.GAUGE: GaugeMetricFamily,
        Kind.HIGHEST: GaugeMetricFamily,
    }
    return kinds[metric.kind](metric.full_name, metric.help, labels=["app", *metric.labels])


def _cumulative(metric: catalog.Metric, distribution: Distribution) -> list[tuple[str, float]]:
    buckets: list[tuple[str, float]] = []
    below = 0
    for bound, count in zip([*map(str, metric.buckets), "+Inf"], distribution.counts, strict=True):
        below += count
        buckets.append((bound, below))
    return buckets


class Exposition:
    """Writes a fleet's metrics in the format that a client accepts."""

    def __init__(self, fleet: Fleet) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(FleetCollector(fleet))

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return the text and its content type.

        accept: the header of the request.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
