"""`consumer run`: check the services, then run worker processes until a signal.

The other commands are imported only when one of them runs, so that a worker starts sooner.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import typer

from consumer import logs, tls
from consumer.admin.readiness import check_ready
from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.framework import AppPath, cli, command
from consumer.core.errors import Misconfigured
from consumer.core.identity import OffsetId
from consumer.metrics.fleet import Fleet
from consumer.settings import Settings
from consumer.telemetry import exporters
from consumer.worker.supervisor import Supervisor
from consumer.worker.telemetry import check_telemetry, counts_metrics

_LAST_LINES_SECONDS = 2.0  # for the last log lines, whose pipe may be full


@command(
    cli,
    "run",
    (
        "kafka_",
        "postgres_",
        "ledger_",
        "outbox_",
        "redis_",
        "precheck_",
        "schema_registry_",
        "allow_",
        "http",
        "tracing",
        "dead_letter_",
        "workers",
        "lanes_max",
        "batch_",
        "buffer_",
        "parked_",
        "grace_",
        "wait_",
        "handler_",
        "worker_",
        "watchdog_",
        "restarts_",
        "log_",
    ),
)
def run(
    app: AppPath,
    settings: Settings,
    reload: Annotated[
        bool,
        typer.Option(
            "--reload",
            help="for development: drain and start again when a file of the App or of --config changes; needs the extra reload",
        ),
    ] = False,
    directories: Annotated[
        list[Path] | None,
        typer.Option(
            "--reload-dir",
            metavar="DIRECTORY",
            help="with --reload: watch this instead of the App's directory; may be repeated",
        ),
    ] = None,
) -> Any:
    """Run worker processes until SIGTERM or Ctrl-C.

    The first signal drains them, a second one ends them at once. Each worker is a member of the Kafka group named like the
    App. Check the configuration first with
    `consumer migrate --check` and `consumer status APP`.
    """
    if directories and not reload:
        raise Misconfigured("--reload-dir: no effect alone; it goes with --reload")
    if reload:
        from consumer.cli import reload as reloading

        if not reloading.is_watched():
            return reloading.watching(app, settings, directories or [])
    loaded = load_app(app)
    tls.check_http(settings)
    check_telemetry(settings)
    return _run(app, loaded, settings)


async def _run(path: str, app: App, settings: Settings) -> int:
    fleet = Fleet.of(app.name, settings.workers)
    async with _observed(app, settings, fleet):
        return await _supervise(path, app, settings, fleet)


@contextlib.asynccontextmanager
async def _observed(app: App, settings: Settings, fleet: Fleet) -> AsyncIterator[None]:
    """Serve and export metrics in this block, if wanted. Raises Misconfigured."""
    if not counts_metrics(settings):
        yield
        return
    # Only if wanted: the libraries take time to import.
    from consumer.monitoring.database_figures import DatabaseFigures

    async with _serving(settings, fleet), _exporting(fleet):
        reading = asyncio.create_task(DatabaseFigures(app, settings, fleet).run())
        try:
            yield
        finally:
            reading.cancel()
            await asyncio.wait([reading], timeout=1)


@contextlib.asynccontextmanager
async def _serving(settings: Settings, fleet: Fleet) -> AsyncIterator[None]:
    address = tls.check_http(settings)
    if address is None:
        yield
        return
    from consumer.monitoring.endpoints import routes_of
    from consumer.monitoring.http_server import HttpServer

    server = HttpServer(routes_of(fleet))
    await server.open(*address)
    try:
        yield
    finally:
        server.close()


@contextlib.asynccontextmanager
async def _exporting(fleet: Fleet) -> AsyncIterator[None]:
    if not exporters.exports_metrics(os.environ):
        yield
        return
    from consumer.telemetry.metrics_export import MetricsExport

    export = MetricsExport(fleet, exporters.interval_seconds(os.environ))
    exporting = asyncio.create_task(export.run())
    try:
        yield
    finally:
        exporting.cancel()
        await export.last()


async def _supervise(path: str, app: App, settings: Settings, fleet: Fleet) -> int:
    supervisor = Supervisor(path, settings, fleet)
    try:
        await supervisor.prepare()
        await check_ready(app, path, settings)
        _warn_of_offset_ids(app)
    except BaseException:
        await supervisor.give_up()
        raise
    logs.never_wait()
    code = 1
    try:
        code = await supervisor.run()
    finally:
        if not logs.end(_LAST_LINES_SECONDS):
            os._exit(code)  # a thread that waits for a full pipe keeps the process alive
    return code


def _warn_of_offset_ids(app: App) -> None:
    for handler in app.handlers.values():
        if isinstance(handler.rule, OffsetId) and handler.idempotent:
            from consumer.worker.message_log import OFFSET_IDS

            logs.event(logging.WARNING, OFFSET_IDS, handler=handler.name)
