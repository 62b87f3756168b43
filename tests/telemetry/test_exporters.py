"""Which exporters the OTEL_ variables ask for, and wrong ones."""

from __future__ import annotations

import pytest

from consumer.core.errors import Misconfigured
from consumer.telemetry.exporters import check_exporters, exports_metrics, exports_spans, interval_seconds

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("variables", "metrics", "spans"),
    [
        ({}, False, True),
        ({"OTEL_METRICS_EXPORTER": ""}, False, True),
        ({"OTEL_METRICS_EXPORTER": "none", "OTEL_TRACES_EXPORTER": "none"}, False, False),
        ({"OTEL_METRICS_EXPORTER": " OTLP ", "OTEL_TRACES_EXPORTER": "otlp"}, True, True),
        ({"OTEL_METRICS_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "True"}, False, True),
    ],
)
def test_exporters_that_are_asked_for(variables: dict[str, str], metrics: bool, spans: bool) -> None:
    check_exporters(variables, traces="parent")
    assert (exports_metrics(variables), exports_spans(variables)) == (metrics, spans)


def test_interval_between_exports() -> None:
    assert interval_seconds({}) == 60
    assert interval_seconds({"OTEL_METRIC_EXPORT_INTERVAL": "200"}) == 0.2


METRICS = {"OTEL_METRICS_EXPORTER": "otlp"}


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"OTEL_METRICS_EXPORTER": "prometheus"}, "OTEL_METRICS_EXPORTER: 'prometheus' is not supported"),
        ({"OTEL_METRICS_EXPORTER": "otlp,console"}, "OTEL_METRICS_EXPORTER: 'console'"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: 'zipkin'"),
        ({**METRICS, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL: 'grpc' is not supported"),
        ({**METRICS, "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"),
        ({**METRICS, "OTEL_METRIC_EXPORT_INTERVAL": "1m"}, "OTEL_METRIC_EXPORT_INTERVAL: not a number"),
        ({**METRICS, "OTEL_METRIC_EXPORT_INTERVAL": "0"}, "OTEL_METRIC_EXPORT_INTERVAL: not a number"),
    ],
)
def test_an_exporter_that_cannot_be_had_is_refused(variables: dict[str, str], problem: str) -> None:
    with pytest.raises(Misconfigured, match=problem):
        check_exporters(variables, traces="parent")


def test_variables_of_what_is_off_are_not_checked() -> None:
    check_exporters({"OTEL_TRACES_EXPORTER": "zipkin", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, traces="off")
