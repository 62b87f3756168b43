"""Makes a span of each record that the outbox sends.

Its parent is the context that the record carries: the call that published it, so a trace shows how long the record waited. Records
without a context, or with one that is not sampled, have none. The context that the next App reads stays that of the call.
Nothing is done where traces are off. Limitations: a record batch that is sent again has spans again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider

from consumer.core.message import Partition
from consumer.outbox.record import trace_of
from consumer.outbox.send_queues import Row
from consumer.telemetry.context import context_of


def traced_sends(provider: TracerProvider) -> Callable[[Partition, Sequence[Row]], AbstractContextManager[None]]:
    """Return what makes spans of rows while a block sends them."""
    tracer = provider.get_tracer("idempotent-consumer")

    @contextmanager
    def sending(partition: Partition, rows: Sequence[Row]) -> Iterator[None]:
        spans: list[Span] = []
        with suppress(Exception):  # a span processor of the application's
            for row in rows:
                if (context := _sampled(row)) is not None:
                    spans.append(_begun(tracer, partition, context))
        try:
            yield
        except BaseException as error:
            _end(spans, error)
            raise
        else:
            _end(spans, None)

    return sending


def _sampled(row: Row) -> Context | None:
    """Return a row's own context if it is sampled."""
    parent, state = trace_of(row.headers)
    if parent is None or not int(parent[53:55], 16) & 1:
        return None
    return context_of(parent, state)


def _begun(tracer: Tracer, partition: Partition, parent: Context) -> Span:
    return tracer.start_span(
        f"send {partition.topic}",
        context=parent,
        kind=SpanKind.PRODUCER,
        attributes={
            "messaging.system": "kafka",
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": partition.topic,
            "messaging.destination.partition.id": str(partition.partition),
        },
    )


def _end(spans: Sequence[Span], error: BaseException | None) -> None:
    with suppress(Exception):
        for span in spans:
            if error is not None:
                span.set_attribute("error.type", type(error).__qualname__)
                span.set_status(Status(StatusCode.ERROR))
            span.end()
