"""Which exporters the OTEL_ variables ask for.

Imports nothing of OpenTelemetry: it is asked in every process. Names and values are of OpenTelemetry's specification
(https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from consumer.core.errors import Misconfigured

_MODULES = ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"
_INTERVAL_MS = 60_000


def exports_metrics(environment: Mapping[str, str]) -> bool:
    """Whether metrics are sent by OTLP.

    Only if OTEL_METRICS_EXPORTER says so; the specification's default would do it everywhere.
    """
    return not _is_disabled(environment) and "otlp" in _names(environment, "METRICS")


def exports_spans(environment: Mapping[str, str]) -> bool:
    """Whether spans are sent by OTLP: unless OTEL_TRACES_EXPORTER is none."""
    return not _names(environment, "TRACES") or "otlp" in _names(environment, "TRACES")


def check_exporters(environment: Mapping[str, str], *, traces: str) -> None:
    """Raise Misconfigured for an exporter that is wanted and cannot be had.

    traces: the setting `tracing`.
    """
    if traces != "off":
        _check_installed("CONSUMER_TRACING")
        _check(environment, "TRACES")
    if _names(environment, "METRICS") - {"none"} and not _is_disabled(environment):
        _check_installed("OTEL_METRICS_EXPORTER")
        _check(environment, "METRICS")
        interval_seconds(environment)


def _check(environment: Mapping[str, str], signal: str) -> None:
    if unknown := sorted(_names(environment, signal) - {"otlp", "none"}):
        raise Misconfigured(f"OTEL_{signal}_EXPORTER: {unknown[0][:40]!r} is not supported; set it to otlp or none")
    for name in (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if (protocol := environment.get(name, "").strip()) not in ("", "http/protobuf"):
            raise Misconfigured(f"{name}: {protocol[:40]!r} is not supported; set it to http/protobuf, or unset it")


def _check_installed(variable: str) -> None:
    if not all(map(_is_installed, _MODULES)):
        raise Misconfigured(
            f"{variable}: OpenTelemetry is not installed; pip install 'idempotent-consumer[otel]', or unset it"
        )


def interval_seconds(environment: Mapping[str, str]) -> float:
    """Return the time between two exports of metrics. Raises Misconfigured."""
    text = environment.get(_INTERVAL, "").strip() or str(_INTERVAL_MS)
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise Misconfigured(f"{_INTERVAL}: not a number of milliseconds; write one above 0, or unset it")
    return int(text) / 1000


def _is_disabled(environment: Mapping[str, str]) -> bool:
    return environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def _names(environment: Mapping[str, str], signal: str) -> set[str]:
    given = environment.get(f"OTEL_{signal}_EXPORTER", "")
    return {name.strip().lower() for name in given.split(",") if name.strip()}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False
