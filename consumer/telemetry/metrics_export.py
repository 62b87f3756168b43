"""Sends a supervisor's metrics by OTLP over HTTP.

The sums of `/metrics` under the same names and labels, cumulative since the supervisor began, as the SDK's own data model: its
instruments cannot take counts and buckets that are already summed over workers. A receiver that is away costs an export, and the
next one has all that the lost one had. Limitations: no delta temporality, no exemplars.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, Protocol

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from consumer.logs import describe, event
from consumer.metrics import catalog
from consumer.metrics.catalog import Kind
from consumer.metrics.fleet import Fleet
from consumer.metrics.recorder import Distribution, Labels
from consumer.telemetry.daemon_thread import in_thread
from consumer.telemetry.resource import resource_of

_EXPORT_SECONDS = 30.0  # for one export, with the exporter's own attempts
_LAST_SECONDS = 2.0
_CUMULATIVE = AggregationTemporality.CUMULATIVE


class Exporter(Protocol):
    """What sends metrics; waits for its receiver."""

    def export(self, metrics_data: MetricsData) -> MetricExportResult:
        """Send them."""
        ...


class MetricsExport:
    """Exports the metrics of a fleet from time to time.

    seconds: between two exports.
    """

    def __init__(self, fleet: Fleet, seconds: float, exporter: Exporter | None = None) -> None:
        self._fleet = fleet
        self._seconds = seconds
        self._exporter = exporter if exporter is not None else OTLPMetricExporter()
        self._resource = resource_of(fleet.app)
        self._begun_ns = time.time_ns()
        self._is_failing = False

    async def run(self) -> None:
        """Export until cancelled. No failure ends it."""
        while True:
            await asyncio.sleep(self._seconds)
            await self._export(_EXPORT_SECONDS)

    async def last(self) -> None:
        """Export once more, before the process ends."""
        await self._export(_LAST_SECONDS)

    async def _export(self, seconds: float) -> None:
        failure: list[str] = []

        def export(data: MetricsData) -> None:
            try:
                if self._exporter.export(data) is not MetricExportResult.SUCCESS:
                    failure.append("the receiver did not take them")
            except Exception as error:
                failure.append(describe(error))

        try:
            data = data_of(self._fleet, self._resource, self._begun_ns, time.time_ns())
            await in_thread(lambda: export(data), seconds)
        except Exception as error:
            failure.append(describe(error))
        if failure and not self._is_failing:
            event(logging.WARNING, "metrics cannot be exported", error=failure[0])
        self._is_failing = bool(failure)


def data_of(fleet: Fleet, resource: Resource, begun_ns: int, now_ns: int) -> MetricsData:
    """Return the metrics of a fleet that have a value."""
    metrics = [
        Metric(metric.full_name, metric.help, _unit(metric), _data(metric, samples, begun_ns, now_ns))
        for metric, samples in fleet.samples().items()
    ]
    scope = ScopeMetrics(InstrumentationScope("idempotent-consumer"), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _unit(metric: catalog.Metric) -> str:
    """Return the unit, which the name says as well.

    None for a bare count: the unit "1" would become a part of the name in Prometheus.
    """
    name = metric.name.removesuffix("_total")
    return "s" if name.endswith("_seconds") else "By" if name.endswith("_bytes") else ""


def _data(
    metric: catalog.Metric, samples: Sequence[tuple[Labels, Any]], begun_ns: int, now_ns: int
) -> Sum | Gauge | Histogram:
    named = [(dict(zip(("app", *metric.labels), labels, strict=True)), value) for labels, value in samples]
    if metric.kind is Kind.HISTOGRAM:
        points = [_histogram(metric, labels, value, begun_ns, now_ns) for labels, value in named]
        return Histogram(points, _CUMULATIVE)
    if metric.kind is Kind.COUNTER:
        counts = [NumberDataPoint(labels, begun_ns, now_ns, float(value)) for labels, value in named]
        return Sum(counts, _CUMULATIVE, is_monotonic=True)
    return Gauge([NumberDataPoint(labels, 0, now_ns, float(value)) for labels, value in named])


def _histogram(
    metric: catalog.Metric, labels: dict[str, str], value: Distribution, begun_ns: int, now_ns: int
) -> HistogramDataPoint:
    unknown: Any = None  # smallest and largest value
    return HistogramDataPoint(
        labels,
        begun_ns,
        now_ns,
        sum(value.counts),
        value.sum,
        value.counts,
        metric.buckets,
        min=unknown,
        max=unknown,
    )
