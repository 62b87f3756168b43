"""`consumer run`: check the services, then run worker processes until a signal.

The other commands are imported only when one of them runs, so that a worker starts sooner.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from consumer import logs
from consumer.admin.readiness import check_ready
from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.framework import AppPath, cli, command
from consumer.core.identity import OffsetId
from consumer.settings import Settings
from consumer.worker.supervisor import Supervisor

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
        "allow_",
        "dead_letter_",
        "workers",
        "lanes",
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
def run(app: AppPath, settings: Settings) -> Any:
    """Run worker processes until SIGTERM or Ctrl-C.

    The first signal drains them, a second one ends them at once. Each worker is a member of the Kafka group named like the
    App. Check the configuration first with
    `consumer migrate --check` and `consumer status APP`.
    """
    loaded = load_app(app)
    return _run(app, loaded, settings)


async def _run(path: str, app: App, settings: Settings) -> int:
    supervisor = Supervisor(path, app.name, settings.workers, settings)
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
