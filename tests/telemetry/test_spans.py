"""Spans of handlers' calls: their parents, links, attributes and failures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from consumer import App, Tx
from consumer.core.delivery import Delivery
from consumer.core.message import LogRecord
from consumer.telemetry.spans import traced
from consumer.transaction.publishing import current_trace

pytestmark = pytest.mark.unit

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traced:
    """A handler whose calls are traced into memory."""

    def __init__(self, *, as_parent: bool = True, batch: int | None = None) -> None:
        self.spans = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.spans))
        app = App("billing")
        self.seen: list[Any] = []
        self.error: BaseException | None = None

        if batch is None:

            @app.handler("payments", name="settle")
            async def settle(payment: dict[str, Any], tx: Tx) -> None:
                await self.handle()
        else:

            @app.handler("payments", name="settle", batch=batch)
            async def settle_all(payments: list[dict[str, Any]], tx: Tx) -> None:
                await self.handle()

        self.handler = app.handlers["settle"]
        self.handler.bind({})
        assert self.handler.call is not None
        self.call = traced(self.handler, self.handler.call, provider.get_tracer("t"), app.name, as_parent=as_parent)

    async def handle(self) -> None:
        source = current_trace.get()
        assert source is not None
        self.seen = [trace.get_current_span().get_span_context(), source()]
        if self.error is not None:
            raise self.error

    def delivery(self, offset: int, *headers: tuple[str, bytes]) -> Delivery:
        return Delivery(self.handler, LogRecord("payments", 3, offset, 0, b"secret-key", b"{}", headers))

    async def run(self, subject: Delivery | list[Delivery]) -> ReadableSpan:
        try:
            await self.call({}, {}, SimpleNamespace(subject=subject))
        finally:
            (span,) = self.spans.get_finished_spans()
        return span


async def test_a_message_context_is_the_parent_and_the_span_is_current() -> None:
    one = Traced()
    span = await one.run(one.delivery(7, ("traceparent", PARENT.encode()), ("tracestate", b"a=1")))
    assert (span.name, span.kind) == ("process payments", SpanKind.CONSUMER)
    assert span.parent is not None and span.parent.span_id == 0xB7AD6B7169203331 and not span.links
    assert span.context is not None and one.seen[0] == span.context
    assert span.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert one.seen[1] == (f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01", "a=1")
    assert span.attributes == {
        "messaging.system": "kafka",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "payments",
        "messaging.destination.partition.id": "3",
        "messaging.consumer.group.name": "billing",
        "messaging.kafka.offset": 7,
        "idempotent_consumer.handler": "settle",
    }
    assert current_trace.get() is None and not trace.get_current_span().get_span_context().is_valid


async def test_linked_messages_begin_traces_of_their_own() -> None:
    one = Traced(as_parent=False)
    span = await one.run(one.delivery(7, ("traceparent", PARENT.encode())))
    assert span.parent is None and [link.context.span_id for link in span.links] == [0xB7AD6B7169203331]


async def test_a_batch_is_linked_to_its_messages() -> None:
    one = Traced(batch=10)
    deliveries = [one.delivery(n, ("traceparent", PARENT.encode())) for n in range(3)] + [one.delivery(9)]
    span = await one.run(deliveries)
    assert span.parent is None and len(span.links) == 3
    assert span.attributes is not None and span.attributes["messaging.batch.message_count"] == 4


@pytest.mark.parametrize("header", [b"", b"nonsense", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01", b"\xff"])
async def test_a_bad_context_is_none(header: bytes) -> None:
    one = Traced()
    span = await one.run(one.delivery(7, ("traceparent", header)))
    assert span.parent is None and not span.links


async def test_an_unsampled_message_has_no_span() -> None:
    one = Traced()
    with pytest.raises(ValueError, match="not enough values"):
        await one.run(one.delivery(7, ("traceparent", PARENT.removesuffix("01").encode() + b"00")))
    assert one.seen[1][0].endswith("-00")


async def test_a_failure_is_named_without_its_text() -> None:
    one = Traced()
    one.error = ValueError("secret")
    with pytest.raises(ValueError, match="secret"):
        await one.run(one.delivery(7))
    (span,) = one.spans.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR and span.status.description is None
    assert span.attributes is not None and span.attributes["error.type"] == "ValueError" and not span.events
    assert "secret" not in span.to_json()
