"""The verdict of a replay as Prometheus' text.

For the textfile collector of its node exporter."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from consumer.metrics.catalog import REPLAY_AT, REPLAY_VERDICT


class _Verdict(Collector):
    def __init__(self, app: str, topics: Iterable[str], mode: str, values: Iterable[float]) -> None:
        self._series = [[app, topic, mode] for topic in topics]
        self._values = values

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for metric, value in zip((REPLAY_VERDICT, REPLAY_AT), self._values, strict=True):
            family = GaugeMetricFamily(metric.full_name, metric.help, labels=["app", *metric.labels])
            for labels in self._series:
                family.add_metric(labels, value)
            yield family


def verdict_text(app: str, topics: Iterable[str], mode: str, exit_code: int, at_seconds: float) -> str:
    """Return the verdict as metrics.

    at_seconds: when it was reached, Unix time.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Verdict(app, sorted(set(topics)), mode, (exit_code, int(at_seconds))))
    return generate_latest(registry).decode()
