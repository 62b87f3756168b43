"""Spans and metrics of a run, as an OTLP receiver gets them."""

from __future__ import annotations

import asyncio
import gzip
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer
from harness import Place, Sent, consumer, counts, is_one_line, running, until
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from consumer import App, Tx
from consumer.metrics.catalog import MESSAGES, PREFIX, WORKER_RESTARTS, Metric

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
APP = """
from opentelemetry import trace
from consumer import App, Tx
app = App("traced", publishes=[{target!r}])

@app.handler({topic!r}, name="settle")
async def settle(payment: dict, tx: Tx) -> None:
    with trace.get_tracer("shop").start_as_current_span("inner"):
        tx.publish({target!r}, payment)
"""


class Receiver(BaseHTTPRequestHandler):
    """Keeps what comes, of the one server of a test."""

    spans: list[Span] = []  # noqa: RUF012
    metrics: list[ExportMetricsServiceRequest] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path == "/v1/metrics":
            Receiver.metrics.append(ExportMetricsServiceRequest.FromString(body))
        else:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    Receiver.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


def sums_of(metric: Metric) -> list[float]:
    """The sum over a counter's points in each export that had it."""
    return [
        sum(point.as_double for point in one.sum.data_points)
        for request in Receiver.metrics
        for resource in request.resource_metrics
        for scope in resource.scope_metrics
        for one in scope.metrics
        if one.name == PREFIX + metric.name
    ]


def same_app(topic: str) -> App:
    """The App of the process, for counting."""
    app = App("traced")

    @app.handler(topic, name="settle")
    async def settle(payment: dict[str, str], tx: Tx) -> None: ...

    return app


@pytest.fixture
def receiver() -> Iterator[str]:
    Receiver.spans, Receiver.metrics = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


async def test_spans_and_metrics_of_a_run_reach_a_receiver(place: Place, tmp_path: Path, receiver: str) -> None:
    topic, target = await place.topic(), await place.topic()
    (tmp_path / "traced_app.py").write_text(APP.format(topic=topic, target=target))
    await place.send(topic, Sent({}, id="m", headers=[("traceparent", f"00-{TRACE}-{PARENT}-01".encode())]))
    settings = place.settings(tracing="parent")
    reader = AIOKafkaConsumer(target, bootstrap_servers=place.kafka, auto_offset_reset="earliest")
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_METRICS_EXPORTER": "otlp",
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
    }
    async with running(["run", "traced_app:app"], settings, tmp_path, **variables) as command:
        await reader.start()
        try:
            record = await asyncio.wait_for(reader.getone(), 60)
        finally:
            await reader.stop()

        async def all_spans() -> bool:
            return {span.name for span in Receiver.spans} == {"inner", f"process {topic}", f"send {target}"}

        async def has_exported(metric: Metric, value: float) -> bool:
            return sums_of(metric)[-1:] == [value]

        await until("the spans", all_spans, 60)
        await until("the first message to be exported", lambda: has_exported(MESSAGES, 1), 60)
        os.kill(command.worker_pids()[0], signal.SIGKILL)
        await until("the restart to be exported", lambda: has_exported(WORKER_RESTARTS, 1), 60)
        await place.send(topic, *(Sent({}, id=f"n{number}") for number in range(20)), Sent({}, id="m"))
        await until("the other messages to be exported", lambda: has_exported(MESSAGES, 22), 60)
    for metric in (MESSAGES, WORKER_RESTARTS):
        assert sums_of(metric) == sorted(sums_of(metric)), "a counter fell"
    ledger = (await counts(same_app(topic), place.dsn))["settle"]
    assert ledger["applied"] + sum(ledger["duplicates"].values()) == sums_of(MESSAGES)[-1]
    check_spans(topic, target, dict(record.headers)["traceparent"].decode())


def check_spans(topic: str, target: str, traceparent: str) -> None:
    spans = {span.name: span for span in Receiver.spans if span.trace_id.hex() == TRACE}
    process, inner, send = spans[f"process {topic}"], spans["inner"], spans[f"send {target}"]
    assert (process.trace_id.hex(), process.parent_span_id.hex()) == (TRACE, PARENT)
    assert inner.parent_span_id == process.span_id
    assert (send.trace_id.hex(), send.parent_span_id, send.kind) == (TRACE, inner.span_id, Span.SPAN_KIND_PRODUCER)
    assert traceparent == f"00-{TRACE}-{inner.span_id.hex()}-01"


async def test_traces_without_the_extra_are_one_line(tmp_path: Path) -> None:
    hidden = tmp_path / "opentelemetry"
    hidden.mkdir()
    (hidden / "__init__.py").write_text("")
    (tmp_path / "one.py").write_text(
        "from consumer import App\napp = App('one')\n@app.handler('t')\nasync def h(m: dict) -> None: ...\n"
    )
    run = ("run", "one:app", "--tracing", "parent")
    result = await asyncio.to_thread(consumer, tmp_path, *run, TERM="dumb")  # TERM: a process of its own
    is_one_line(result, "CONSUMER_TRACING", "idempotent-consumer[otel]")


async def test_an_exporter_that_is_not_supported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "from consumer import App\napp = App('one')\n@app.handler('t')\nasync def h(m: dict) -> None: ...\n"
    )
    result = await asyncio.to_thread(consumer, tmp_path, "run", "one:app", OTEL_METRICS_EXPORTER="prometheus")
    is_one_line(result, "OTEL_METRICS_EXPORTER: 'prometheus' is not supported")
