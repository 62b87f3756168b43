"""`consumer run`: check the services, then run worker processes until a signal.

The other commands are imported only when one of them runs, so that a worker starts sooner.
"""

from __future__ import annotations

import asyncio
import os
from typing import Annotated, Any

import typer

from consumer import logs, tls
from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.framework import AppPath, cli, command
from consumer.core.errors import Misconfigured, ServiceUnavailable
from consumer.core.identity import OffsetId
from consumer.core.shard_route import Router
from consumer.handler_records import notices
from consumer.kafka.consumer import KafkaConsumer
from consumer.postgres.connection import PAUSE_SECONDS, dsn_label, translated_errors, wait_for
from consumer.postgres.errors import Outage
from consumer.postgres.session import Session
from consumer.retention import task
from consumer.settings import Settings
from consumer.sharding import shards
from consumer.worker.supervisor import Supervisor

_LAST_LINES_SECONDS = 2.0  # for the last log lines, whose pipe may be full


@command(
    cli,
    "run",
    (
        "kafka_",
        "postgres_",
        "ledger_",
        "redis_",
        "precheck_",
        "allow_",
        "dead_letter_",
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
def run(
    app: AppPath,
    settings: Settings,
    workers: Annotated[
        int, typer.Option("--workers", "-w", min=1, max=256, envvar="CONSUMER_WORKERS", help="worker processes")
    ] = 1,
) -> Any:
    """Run worker processes until SIGTERM or Ctrl-C, which drains them; a second one ends them at once.

    Each worker is a member of the Kafka group named like the App. Check the configuration first with
    `consumer migrate --check` and `consumer status APP`.
    """
    loaded = load_app(app)
    return _run(app, loaded, workers, settings)


async def _run(path: str, app: App, workers: int, settings: Settings) -> int:
    supervisor = Supervisor(path, app.name, workers, settings)
    try:
        await supervisor.prepare()
        # Before any worker begins: what is wrong for one is wrong for all, and one line tells it.
        await _ready(app, path, settings)
    except BaseException:
        await supervisor.give_up()
        raise
    logs.never_wait()
    code = 1
    try:
        code = await supervisor.run()
    finally:
        if not logs.end(_LAST_LINES_SECONDS):
            os._exit(code)  # a thread that waits for a full pipe keeps the process
    return code


async def _ready(app: App, path: str, settings: Settings) -> None:
    async def resources() -> None:
        async with app.running():
            pass

    by_shard = shards.settings_of(app, settings)
    for each in by_shard.values():
        each.dsn  # noqa: B018 - raises when there is none
    target = settings.dead_letter_topic
    if target in app.topics:
        raise Misconfigured(
            f"--dead-letter-topic {target}: {app.name!r} consumes that topic itself, so its dead letters would come back to it for ever"
        )
    try:
        async with asyncio.timeout(max(settings.wait_seconds, 1)) as limit:
            await resources()
    except (Misconfigured, asyncio.CancelledError):
        raise
    except (Exception, SystemExit) as error:
        if limit.expired():
            raise Misconfigured(f"the lifespan of {app.name!r} took longer than --wait") from None
        raise Misconfigured(f"the lifespan of {app.name!r} failed: {logs.describe(error)}") from None
    opened = [(each, await _postgres_ready(each)) for each in by_shard.values()]
    try:
        await shards.check(app, Router(tuple(app.shards) or ("",), app.route), opened)
        for on, session in opened:
            with translated_errors(on):
                for notice in await notices.at_start(session.connection, app, path):
                    logs.event(30, notice.text, do=notice.do)
    except Outage as error:
        raise ServiceUnavailable(str(error)) from None
    finally:
        for _, session in opened:
            session.close()
    if (redis_url := tls.redis_url(settings)) is not None:
        from consumer.precheck.client import Precheck

        precheck = Precheck(redis_url, app.name, 1, 1)
        try:
            await precheck.start("")
        finally:
            await precheck.stop()
    source = KafkaConsumer(settings, None)
    await source.start(settings.wait_seconds)
    try:
        missing = [topic for topic, found in (await source.log.partitions(app.topics)).items() if not found]
        if target is not None and not (await source.log.partitions([target]))[target]:
            raise Misconfigured(f"--dead-letter-topic {target}: there is no such topic yet: it is not made by itself")
        await task.check(settings, list(app.topics))
    finally:
        await source.stop(5)
    for topic in missing:
        logs.event(30, "topic does not exist yet; it is consumed as soon as it does", topic=topic)
    for handler in app.handlers.values():
        if isinstance(handler.rule, OffsetId) and handler.idempotent:
            from consumer.worker.message_log import OFFSET_IDS

            logs.event(30, OFFSET_IDS, handler=handler.name)


async def _postgres_ready(settings: Settings) -> Session:
    """Open a session, and wait for PostgreSQL as long as --wait allows."""
    outages = 0

    def after(outage: Outage) -> float:
        nonlocal outages
        outages += 1
        if outages == 1:
            logs.event(30, "waiting for postgresql", place=dsn_label(settings.dsn))
        return PAUSE_SECONDS

    return await wait_for(lambda left: Session.open(settings, left), settings.wait_seconds, after=after)
