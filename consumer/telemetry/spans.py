"""Makes a span of each call of a handler, and propagates it.

A span is current while the handler runs, so that instrumentation of other libraries attaches, and `tx.publish` passes it on.
Names and attributes follow OpenTelemetry's conventions for messaging (https://opentelemetry.io/docs/specs/semconv/messaging/).
Handlers' calls are wrapped when a worker starts, so nothing is done for a message where traces are off. Limitations: handlers
that opted out of the guarantee have no spans; a span costs more than a short handler, so sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, Tracer

from consumer.app import App
from consumer.core.delivery import Delivery
from consumer.core.handler import Call, Handler
from consumer.outbox.record import trace_of
from consumer.telemetry.context import context_of, current
from consumer.telemetry.resource import resource_of
from consumer.transaction.publishing import current_trace

_LINKS_MAX = 128  # of a span, as the SDK keeps by default


def provider_of(app: str, *, exports: bool) -> TracerProvider:
    """Return the provider of this process.

    An application that has set one keeps it. Else the OTEL_ variables configure one. exports: by OTLP over HTTP; without,
    spans are only propagated.
    """
    present = trace.get_tracer_provider()
    if isinstance(present, TracerProvider):
        return present
    provider = TracerProvider(resource=resource_of(app))
    if exports:
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider


def trace_handlers(app: App, provider: trace.TracerProvider, *, as_parent: bool) -> None:
    """Wrap the calls of an App's handlers, which must be bound.

    as_parent: a single message's context is the parent of its span, and not only linked.
    """
    tracer = provider.get_tracer("idempotent-consumer")
    for handler in app.handlers.values():
        if handler.call is not None and handler.idempotent:
            handler.call = traced(handler, handler.call, tracer, app.name, as_parent=as_parent)


def traced(handler: Handler, call: Call, tracer: Tracer, group: str, *, as_parent: bool) -> Call:
    """Return a handler's call in a span."""

    async def in_span(value: Any, message: Any, tx: Any) -> object:
        deliveries: Sequence[Delivery] = tx.subject if isinstance(tx.subject, list) else [tx.subject]
        with _span(tracer, handler, group, deliveries, as_parent=as_parent):
            token = current_trace.set(current)
            try:
                return await call(value, message, tx)
            finally:
                current_trace.reset(token)

    return in_span


@contextmanager
def _span(
    tracer: Tracer, handler: Handler, group: str, deliveries: Sequence[Delivery], *, as_parent: bool
) -> Iterator[Span]:
    topic = deliveries[0].record.topic
    carried = [trace_of(delivery.record.headers) for delivery in deliveries[:_LINKS_MAX]]
    contexts = [context for texts in carried if (context := context_of(*texts)) is not None]
    parent = Context()
    links = list(_links(contexts))
    if as_parent and handler.batch is None and contexts:
        parent, links = contexts[0], []
    with tracer.start_as_current_span(
        f"process {topic}",
        context=parent,
        kind=SpanKind.CONSUMER,
        attributes=_attributes(handler, group, deliveries),
        links=links,
        record_exception=False,  # its text may quote the payload
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except BaseException as error:
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(Status(StatusCode.ERROR))
            raise


def _attributes(handler: Handler, group: str, deliveries: Sequence[Delivery]) -> Mapping[str, str | int]:
    record = deliveries[0].record
    attributes: dict[str, str | int] = {
        "messaging.system": "kafka",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": record.topic,
        "messaging.consumer.group.name": group,
        "idempotent_consumer.handler": handler.name,
    }
    if handler.batch is not None:
        return attributes | {"messaging.batch.message_count": len(deliveries)}
    return attributes | {
        "messaging.destination.partition.id": str(record.partition),
        "messaging.kafka.offset": record.offset,
    }


def _links(contexts: Iterable[Context]) -> Iterator[Link]:
    for context in contexts:
        yield Link(trace.get_current_span(context).get_span_context())
