"""Turns traces on for one worker, if they are wanted."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.logs import event
from consumer.settings import Settings

_LAST_SPANS_SECONDS = 2.0


def check_traces(settings: Settings) -> None:
    """Raise Misconfigured if traces are wanted and their libraries are missing."""
    modules = ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
    if settings.tracing != "off" and not all(map(_is_installed, modules)):
        raise Misconfigured(
            "CONSUMER_TRACING: OpenTelemetry is not installed; pip install 'idempotent-consumer[otel]', or set it to off"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


@asynccontextmanager
async def tracing(app: App, settings: Settings) -> AsyncIterator[None]:
    """Trace the handlers of an App in this block.

    Sends the last spans at its end. The App's lifespan has begun. Raises Misconfigured.
    """
    if settings.tracing == "off":
        yield
        return
    check_traces(settings)
    from consumer.tracing.spans import provider_of, trace_handlers

    provider = provider_of(app.name)
    trace_handlers(app, provider, as_parent=settings.tracing == "parent")
    event(logging.INFO, "handlers are traced", app=app.name)
    try:
        yield
    finally:
        await _in_thread(lambda: provider.force_flush(int(_LAST_SPANS_SECONDS * 1000)))


async def _in_thread(call: Callable[[], object]) -> None:
    """Run a call in a thread; leave it if it takes long.

    An exporter waits for its receiver.
    """
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            call()
        finally:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=run, name="last-spans", daemon=True).start()
    with suppress(TimeoutError):
        await asyncio.wait_for(ended.wait(), _LAST_SPANS_SECONDS)
