"""Reads from time to time what only the databases know, for metrics.

On a connection of its own, in a transaction that only reads and has a time limit. A round that fails is counted, and its
figures are missing until the next one that succeeds: no figure rather than an old one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict

from consumer.app import App
from consumer.core.retention import HOUR, forgets_in_seconds, wanted
from consumer.logs import describe, event
from consumer.metrics.catalog import (
    DATABASE_READS,
    DEAD_LETTER_OLDEST,
    DEAD_LETTERS,
    HELD_UNITS,
    LEDGER_BYTES,
    LEDGER_FORGETS_IN,
    LEDGER_RETENTION,
    OUTBOX_OLDEST,
    OUTBOX_STOPPED,
    OUTBOX_UNPUBLISHED,
)
from consumer.metrics.fleet import Fleet
from consumer.metrics.recorder import Gauge
from consumer.postgres import figures, generations, outbox
from consumer.postgres.connection import connect, database_epoch, translated_errors
from consumer.postgres.protocol import Connection
from consumer.retention.task import policy_of
from consumer.settings import Settings
from consumer.sharding import shards

ROUND_SECONDS = 15.0
_START_SECONDS = 0.5
_STATEMENT_SECONDS = 5
_READ_SECONDS = 12.0


class DatabaseFigures:
    """The loop that reads the figures of every database of an App."""

    def __init__(self, app: App, settings: Settings, fleet: Fleet) -> None:
        self._app = app
        self._settings = settings
        self._fleet = fleet
        self._totals = fleet.totals
        self._failing: set[str] = set()

    async def run(self) -> None:
        """Read every ROUND_SECONDS until cancelled.

        From when a worker has joined its group: what is wrong before is one error of `consumer run`.
        """
        while True:
            if not any(slot.has_been_ready for slot in self._fleet.slots):
                await asyncio.sleep(_START_SECONDS)
                continue
            by_shard = shards.settings_of(self._app, self._settings)
            await asyncio.gather(*(self._read(shard, settings) for shard, settings in by_shard.items()))
            await asyncio.sleep(ROUND_SECONDS)

    async def _read(self, shard: str, settings: Settings) -> None:
        """Read one database; whatever fails is counted and tried again."""
        try:
            async with asyncio.timeout(_READ_SECONDS):
                gauges = await read_figures(self._app, shard, settings)
        except Exception as error:
            self._totals.set_gauges(f"database {shard}", [])
            self._totals.add(DATABASE_READS, (shard, "failed"))
            if shard not in self._failing:
                self._failing.add(shard)
                event(
                    logging.WARNING,
                    "the figures of the database cannot be read",
                    error=describe(error.__cause__ or error),
                    **({"shard": shard} if shard else {}),
                )
        else:
            self._totals.set_gauges(f"database {shard}", gauges)
            self._totals.add(DATABASE_READS, (shard, "ok"))
            self._failing.discard(shard)


async def read_figures(app: App, shard: str, settings: Settings) -> list[Gauge]:
    """Read the figures of one database. Raises Misconfigured, Outage, TimeoutError."""
    connection = await connect(settings)
    try:
        with translated_errors(settings):
            await database_epoch(connection, settings)
            async with connection.transaction(readonly=True):
                await connection.execute(f"set local statement_timeout = '{_STATEMENT_SECONDS}s'")
                return [
                    *await _dead_letters(connection, app, shard),
                    *await _outbox(connection, app, shard),
                    *await _ledger(connection, app, shard, settings),
                ]
    finally:
        connection.terminate()


async def _dead_letters(connection: Connection, app: App, shard: str) -> list[Gauge]:
    counts = {(handler, state): 0 for handler in app.handlers for state in ("dead", "waiting")}
    oldest = dict.fromkeys(app.handlers, 0.0)
    for row in await figures.open_dead_letters(connection, app.name):
        counts[row.handler, row.state] = row.messages
        if row.state == "dead":
            oldest[row.handler] = row.oldest_seconds
    held = dict.fromkeys(app.handlers, 0) | await figures.held_units(connection, app.name)
    return [
        *((DEAD_LETTERS, (shard, *labels), float(count)) for labels, count in counts.items()),
        *((DEAD_LETTER_OLDEST, (shard, handler), seconds) for handler, seconds in oldest.items()),
        *((HELD_UNITS, (shard, handler), float(count)) for handler, count in held.items()),
    ]


async def _outbox(connection: Connection, app: App, shard: str) -> list[Gauge]:
    now = await connection.fetchval("select extract(epoch from clock_timestamp())::float8")
    unpublished: defaultdict[str, int] = defaultdict(int, dict.fromkeys(app.publishes, 0))
    oldest: defaultdict[str, float] = defaultdict(float, dict.fromkeys(app.publishes, 0.0))
    stopped: defaultdict[str, int] = defaultdict(int, dict.fromkeys(app.publishes, 0))
    for stream in await outbox.overview(connection, app.name):
        topic = stream.state.topic
        unpublished[topic] += stream.unpublished
        if stream.oldest is not None:
            oldest[topic] = max(oldest[topic], now - stream.oldest)
        stopped[topic] += stream.state.stopped is not None
    return [
        *((OUTBOX_UNPUBLISHED, (shard, topic), float(count)) for topic, count in unpublished.items()),
        *((OUTBOX_OLDEST, (shard, topic), seconds) for topic, seconds in oldest.items()),
        *((OUTBOX_STOPPED, (shard, topic), float(count)) for topic, count in stopped.items()),
    ]


async def _ledger(connection: Connection, app: App, shard: str, settings: Settings) -> list[Gauge]:
    sizes = await figures.ledger_bytes(connection)
    gauges: list[Gauge] = [(LEDGER_BYTES, (shard, str(number)), float(size)) for number, size in sizes.items()]
    if settings.ledger_retention_hours is not None:
        hours, _ = wanted(settings.ledger_retention_hours, await generations.declared(connection, app.name))
        if hours is not None:
            state = await generations.read_state(connection)
            gauges.append((LEDGER_RETENTION, (shard,), hours * HOUR))
            gauges.append((LEDGER_FORGETS_IN, (shard,), forgets_in_seconds(state, policy_of(settings, hours))))
    return gauges
