"""Metrics as OTLP: the sums of a fleet, and receivers that fail."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData

from consumer.metrics.catalog import (
    BATCH_MESSAGES,
    LAG_SECONDS,
    LEDGER_BYTES,
    METRICS,
    PREFIX,
    WORKER_RESTARTS,
    WORKERS,
)
from consumer.metrics.catalog import MESSAGES as MESSAGES_TOTAL
from consumer.metrics.fleet import Fleet
from consumer.metrics.recorder import Recorder
from consumer.telemetry.metrics_export import MetricsExport, data_of
from consumer.telemetry.resource import resource_of

pytestmark = pytest.mark.unit

BEGUN, NOW = 1_000, 2_000
APPLIED = ("settle", "payments", "applied", "")


def fleet_of_one(applied: int = 3) -> tuple[Fleet, int]:
    fleet = Fleet.of("billing", 1)
    process = fleet.started(0, 100)
    recorder = Recorder()
    recorder.add(MESSAGES_TOTAL, APPLIED, applied)
    for size in (3, 3, 1e9):
        recorder.observe(BATCH_MESSAGES, (), size)
    beat = recorder.beat([(LAG_SECONDS, ("payments", "0"), 1.5)])
    fleet.report(0, process, {"member": "m", "metrics": beat})
    return fleet, process


def sent(fleet: Fleet) -> dict[str, Any]:
    """The metrics of a fleet as protobuf, by name without the prefix."""
    request = encode_metrics(data_of(fleet, resource_of("billing"), BEGUN, NOW))
    (resource,) = request.resource_metrics
    named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert named["service.name"] == "billing" and named["service.instance.id"]
    return {metric.name.removeprefix(PREFIX): metric for scope in resource.scope_metrics for metric in scope.metrics}


def labels(point: Any) -> dict[str, str]:
    return {pair.key: pair.value.string_value for pair in point.attributes}


def test_counters_are_cumulative_and_monotone() -> None:
    fleet, process = fleet_of_one()
    metric = sent(fleet)[MESSAGES_TOTAL.name]
    assert metric.sum.is_monotonic and metric.description == MESSAGES_TOTAL.help
    assert metric.sum.aggregation_temporality == metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE
    (point,) = metric.sum.data_points
    assert labels(point) == dict(zip(("app", *MESSAGES_TOTAL.labels), ("billing", *APPLIED), strict=True))
    assert (point.as_double, point.start_time_unix_nano, point.time_unix_nano) == (3, BEGUN, NOW)
    fleet.ended(0, process, "killed")  # the counts of a process stay when it ends
    assert sent(fleet)[MESSAGES_TOTAL.name].sum.data_points[0].as_double == 3
    restarts = sent(fleet)[WORKER_RESTARTS.name].sum.data_points
    assert {labels(one)["reason"]: one.as_double for one in restarts}["killed"] == 1
    assert {one.WhichOneof("value") for one in restarts} == {"as_double"}


def test_histograms_and_gauges() -> None:
    fleet, process = fleet_of_one()
    metrics = sent(fleet)
    (batches,) = metrics[BATCH_MESSAGES.name].histogram.data_points
    assert list(batches.explicit_bounds) == list(BATCH_MESSAGES.buckets)
    assert (batches.count, sum(batches.bucket_counts), batches.bucket_counts[-1]) == (3, 3, 1)
    assert batches.sum == 1e9 + 6 and not batches.HasField("min") and not batches.HasField("max")
    (lag,) = metrics[LAG_SECONDS.name].gauge.data_points
    assert lag.as_double == 1.5 and labels(lag) == {"app": "billing", "topic": "payments", "partition": "0"}
    states = {labels(point)["state"]: point.as_double for point in metrics[WORKERS.name].gauge.data_points}
    assert states["running"] == 1 and metrics[LAG_SECONDS.name].unit == "s"
    fleet.ended(0, process, "killed")
    assert LAG_SECONDS.name not in sent(fleet)


def test_units_are_those_of_the_names() -> None:
    fleet, _ = fleet_of_one()
    fleet.totals.set_gauges("database", [(LEDGER_BYTES, ("", "1"), 8192.0)])
    units = {name: metric.unit for name, metric in sent(fleet).items()}
    assert (units[LEDGER_BYTES.name], units[MESSAGES_TOTAL.name]) == ("By", "")
    assert {metric.name for metric in METRICS} >= units.keys()


class Receiver:
    """An exporter that answers as a test says."""

    def __init__(self) -> None:
        self.answer: MetricExportResult | Exception = MetricExportResult.SUCCESS
        self.received: list[MetricsData] = []

    def export(self, metrics_data: MetricsData) -> MetricExportResult:
        if isinstance(self.answer, Exception):
            raise self.answer
        self.received.append(metrics_data)
        return self.answer


async def test_a_receiver_that_fails_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    fleet, _ = fleet_of_one()
    receiver = Receiver()
    export = MetricsExport(fleet, 60, receiver)
    with caplog.at_level(logging.WARNING, "consumer"):
        for answer in (MetricExportResult.FAILURE, ConnectionError("secret"), MetricExportResult.SUCCESS):
            receiver.answer = answer
            await export.last()
    assert caplog.messages == ["metrics cannot be exported"] and len(receiver.received) == 2
    receiver.answer = MetricExportResult.FAILURE
    with caplog.at_level(logging.WARNING, "consumer"):
        await export.last()
    assert caplog.messages == ["metrics cannot be exported"] * 2
