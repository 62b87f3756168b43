"""Spans of what the outbox sends: parents, attributes and failures."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import SpanKind, StatusCode

from consumer.core.message import Partition
from consumer.kafka.batch_producer import Refused
from consumer.outbox.send_queues import Row
from consumer.outbox.streams import Stream
from consumer.telemetry.send_spans import traced_sends

pytestmark = pytest.mark.unit

TARGET = Partition("ledger", 2)
TRACE, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331


def header(flags: str = "01", parent: int = PARENT) -> tuple[str, bytes]:
    return "traceparent", f"00-{TRACE:032x}-{parent:016x}-{flags}".encode()


def row(seq: int, *headers: tuple[str, bytes | None]) -> Row:
    stream = Stream(1, Partition("payments", 0), TARGET.topic, 0, 0)
    return Row(stream, seq, b"secret-key", b"secret", list(headers), 0, 100)


class Memory:
    """A provider that samples every span, and keeps it in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(ALWAYS_ON)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.sending = traced_sends(self.provider)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())


def test_the_call_that_published_a_row_is_the_parent_of_its_span() -> None:
    memory = Memory()
    rows = [row(0, header(), ("tracestate", b"a=1")), row(1, ("message-id", b"m"), header(parent=7))]
    with memory.sending(TARGET, rows):
        assert memory.spans == []  # they last until Kafka has acknowledged the batch
    first, second = memory.spans
    assert (first.name, first.kind) == ("send ledger", SpanKind.PRODUCER)
    assert first.parent is not None and second.parent is not None and first.context is not None
    assert (first.context.trace_id, first.parent.span_id, second.parent.span_id) == (TRACE, PARENT, 7)
    assert first.parent.trace_state.get("a") == "1" and first.status.status_code is StatusCode.UNSET
    assert first.attributes == {
        "messaging.system": "kafka",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "ledger",
        "messaging.destination.partition.id": "2",
    }
    assert "secret" not in first.to_json()


def test_rows_without_a_sampled_context_have_no_span() -> None:
    memory = Memory()
    malformed = ("traceparent", b"00-nonsense")
    with memory.sending(TARGET, [row(0), row(1, header("00")), row(2, malformed), row(3, header(parent=0))]):
        pass
    assert memory.spans == []


def test_a_refusal_is_named_without_its_text() -> None:
    memory = Memory()
    with pytest.raises(Refused), memory.sending(TARGET, [row(0, header())]):
        raise Refused("secret")
    (span,) = memory.spans
    assert span.status.status_code is StatusCode.ERROR and span.status.description is None
    assert span.attributes is not None and span.attributes["error.type"] == "Refused" and not span.events


def test_a_span_processor_that_fails_stops_no_sending() -> None:
    class Broken(SpanProcessor):
        def on_start(self, *_: object, **__: object) -> None:
            raise RuntimeError("broken")

    memory, sent = Memory(), []
    memory.provider.add_span_processor(Broken())
    with memory.sending(TARGET, [row(0, header())]):
        sent.append(True)
    assert sent == [True]
