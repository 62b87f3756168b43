"""Turns the texts of `traceparent` and `tracestate` into a context."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from consumer.outbox.record import TRACEPARENT, TRACESTATE

_propagator = TraceContextTextMapPropagator()


def context_of(parent: str | None, state: str | None) -> Context | None:
    """Return the context of two headers; None without a valid one."""
    if parent is None:
        return None
    carrier = {TRACEPARENT: parent} if state is None else {TRACEPARENT: parent, TRACESTATE: state}
    context = _propagator.extract(carrier, Context())
    return context if trace.get_current_span(context).get_span_context().is_valid else None


def current() -> tuple[str | None, str | None]:
    """Return traceparent and tracestate of the span that is current now."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get(TRACEPARENT), carrier.get(TRACESTATE)
