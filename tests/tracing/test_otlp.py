"""Traces of a running worker, as an OTLP receiver gets them."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer
from harness import Place, Sent, consumer, is_one_line, running, until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

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
    spans: list[Span] = []  # noqa: RUF012 - of the one server of a test

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                Receiver.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def receiver() -> Iterator[str]:
    Receiver.spans = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


async def test_spans_of_a_worker_reach_a_receiver(place: Place, tmp_path: Path, receiver: str) -> None:
    topic, target = await place.topic(), await place.topic()
    (tmp_path / "traced_app.py").write_text(APP.format(topic=topic, target=target))
    await place.send(topic, Sent({}, id="m", headers=[("traceparent", f"00-{TRACE}-{PARENT}-01".encode())]))
    settings = place.settings(tracing="parent")
    reader = AIOKafkaConsumer(target, bootstrap_servers=place.kafka, auto_offset_reset="earliest")
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    async with running(["run", "traced_app:app"], settings, tmp_path, **variables):
        await reader.start()
        try:
            record = await asyncio.wait_for(reader.getone(), 60)
        finally:
            await reader.stop()

        async def both() -> bool:
            return {span.name for span in Receiver.spans} == {"inner", f"process {topic}"}

        await until("the spans", both, 60)
    spans = {span.name: span for span in Receiver.spans}
    process, inner = spans[f"process {topic}"], spans["inner"]
    assert (process.trace_id.hex(), process.parent_span_id.hex()) == (TRACE, PARENT)
    assert inner.parent_span_id == process.span_id
    traceparent = dict(record.headers)["traceparent"].decode()
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
    is_one_line(result, "idempotent-consumer[otel]")
