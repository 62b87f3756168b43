"""Connects to every database and registers the App there.

Reads the numbers of the App's handlers and topics. Refuses an App whose databases disagree with it. Limitations: a
later change of a database is noticed by its epoch.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence

from consumer import tls
from consumer.app import App
from consumer.core.shard_route import Router
from consumer.handler_records import coverage, handler_code, id_rules
from consumer.logs import describe, event
from consumer.metrics.recorder import Recorder
from consumer.postgres.connection import translated_errors
from consumer.postgres.errors import Outage
from consumer.postgres.session import Session
from consumer.settings import Settings
from consumer.sharding import shards as shard_registry
from consumer.worker.connections import Connections
from consumer.worker.shard import Shard


async def register_all(app: App, router: Router, shards: Sequence[Shard], connections: Connections) -> bool:
    """Connect to every shard and register the App; False: try again.

    Raises Misconfigured.
    """
    try:
        for number, shard in enumerate(shards):
            shard.control = await connections.open(shard)
            if shard.control is None:
                return False
            shard.epoch = shard.control.epoch
            # A handler has a number of its own in each ledger.
            shard.by_name |= {
                name: handler if number == 0 else copy.copy(handler) for name, handler in app.handlers.items()
            }
            for topic, handlers in app.by_topic().items():
                shard.by_topic[topic] = [shard.by_name[handler.name] for handler in handlers]
            await register(app, shard, shard.control)
        opened = [(shard.settings, shard.control) for shard in shards if shard.control]
        await shard_registry.check(app, router, opened)
    except Outage as error:
        event(logging.WARNING, "waiting for postgresql", error=describe(error.__cause__ or error))
        for shard in shards:
            if shard.control is not None:
                shard.control.close()
        return False
    return True


async def register(app: App, shard: Shard, control: Session) -> None:
    """Read the numbers of handlers and topics.

    A database that went back in time may give others.
    """
    taken = app.topics
    numbers, topics = await control.numbers(app.name, app.handlers, taken)
    with translated_errors(shard.settings):
        await coverage.register(control.connection, app)
        await id_rules.record(control.connection, app)
        await handler_code.record(control.connection, app)
        shard.code_recorded_at = time.monotonic()
    shard.ids.topics = topics
    shard.registered_topics = frozenset(taken)
    shard.installation = control.installation
    for handler in shard.handlers:
        handler.number = numbers[handler.name]
    shard.registered = control.epoch


async def start_prechecks(
    app: App, settings: Settings, shards: Sequence[Shard], on_step: Callable[[str], None], recorder: Recorder | None
) -> None:
    """Start the pre-check of each shard, if Redis is configured."""
    redis_url = tls.redis_url(settings)
    if redis_url is None:
        return
    from consumer.precheck.client import Precheck  # imported only if needed: it takes a quarter of a second

    for shard in shards:
        if shard.control is not None and not shard.control.server.tells_history:
            event(logging.WARNING, "pre-check off: postgresql does not tell its start time", **shard.label)
            continue
        shard.precheck = Precheck(
            redis_url,
            app.name,
            settings.precheck_budget_ms / 1000,
            settings.precheck_window_hours * 3600,
            on_step,
            recorder,
        )
        await shard.precheck.start(shard.epoch)
