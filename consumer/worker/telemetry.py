"""Turns OpenTelemetry on for one worker, if it is wanted."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from consumer.app import App
from consumer.logs import event
from consumer.settings import Settings
from consumer.telemetry import exporters
from consumer.worker.outbox_relay import OutboxRelay

_LAST_SPANS_SECONDS = 2.0


def check_telemetry(settings: Settings) -> None:
    """Raise Misconfigured for telemetry that is wanted and cannot be had."""
    exporters.check_exporters(os.environ, traces=settings.tracing)


def counts_metrics(settings: Settings) -> bool:
    """Whether workers count: if metrics are served or exported."""
    return settings.http is not None or exporters.exports_metrics(os.environ)


@asynccontextmanager
async def tracing(app: App, settings: Settings, relays: Iterable[OutboxRelay]) -> AsyncIterator[None]:
    """Trace an App's handlers and outbox in this block.

    Sends the last spans at its end. The App's lifespan has begun. Raises Misconfigured.
    """
    if settings.tracing == "off":
        yield
        return
    check_telemetry(settings)
    from consumer.telemetry.daemon_thread import in_thread
    from consumer.telemetry.send_spans import traced_sends
    from consumer.telemetry.spans import provider_of, trace_handlers

    provider = provider_of(app.name, exports=exporters.exports_spans(os.environ))
    trace_handlers(app, provider, as_parent=settings.tracing == "parent")
    for relay in relays:
        relay.trace_sends(traced_sends(provider))
    event(logging.INFO, "handlers are traced", app=app.name)
    try:
        yield
    finally:
        await in_thread(lambda: provider.force_flush(int(_LAST_SPANS_SECONDS * 1000)), _LAST_SPANS_SECONDS)
