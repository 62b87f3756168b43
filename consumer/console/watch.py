"""Keeps what is known of one database of an App.

One loop asks Kafka and PostgreSQL, with time limits, for all pages, which wait for neither. A service that does not answer is noted
with its error, and what was known stays. The loop ends only with the console.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from consumer.admin.status import Status, read_through, read_without_kafka
from consumer.app import App
from consumer.console.figures import History, Sample, outcomes_of, with_last_known
from consumer.core.errors import ConsumerError
from consumer.core.message import Partition
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import KafkaError
from consumer.logs import describe, event
from consumer.postgres.connection import connect, database_epoch, translated_errors
from consumer.settings import Settings

KAFKA, POSTGRESQL = "Kafka", "PostgreSQL"
_PAUSE_SECONDS = 2.0  # between two rounds
_CONNECT_SECONDS = 2.0
_KAFKA_SECONDS = 5.0
_READ_SECONDS = 12.0
_STATEMENT_SECONDS = 5
_FRESH_SECONDS = 5.0  # how long an action waits for a page that shows it


@dataclass(frozen=True, slots=True)
class Away:
    """A service that does not answer. since: Unix seconds."""

    since: float
    error: str


@dataclass(frozen=True, slots=True)
class Known:
    """What is known now.

    status: None before the first answer of PostgreSQL, which came last at `at`. kafka_at: when Kafka answered last.
    away: services that did not answer in the last round.
    """

    status: Status | None = None
    at: float | None = None
    kafka_at: float | None = None
    away: Mapping[str, Away] = field(default_factory=dict)


class Watch:
    """The loop over one database. `known` and `history` are what pages show."""

    def __init__(self, app: App, path: str, settings: Settings) -> None:
        self._app = app
        self._path = path
        self._settings = settings.model_copy(update={"wait_seconds": _CONNECT_SECONDS})
        self._source: KafkaConsumer | None = None
        self._whole: Status | None = None  # the last one with Kafka's part
        self._refreshed = 0
        self.known = Known()
        self.history = History()

    async def run(self) -> None:
        """Read again and again until cancelled."""
        try:
            while True:
                try:
                    await self._round()
                except Exception as error:  # a fault of ours costs one round
                    event(logging.ERROR, "the console cannot read the status", error=describe(error))
                await asyncio.sleep(_PAUSE_SECONDS)
        finally:
            await self._close()

    async def refresh(self) -> None:
        """Read PostgreSQL's part now, for a page that follows an action.

        If it does not answer in time, the page shows what was known before.
        """
        self._refreshed += 1
        with suppress(ConsumerError, OSError):  # TimeoutError is an OSError
            async with asyncio.timeout(_FRESH_SECONDS):
                status, _ = await self._read(None)
            self.known = replace(self.known, status=self._with_last_known(status), at=time.time())

    async def _round(self) -> None:
        away: dict[str, Away] = {}
        source = None
        refreshed = self._refreshed
        try:
            async with asyncio.timeout(_KAFKA_SECONDS):
                source = await self._connected()
        except (ConsumerError, KafkaError, TimeoutError, OSError) as error:
            away[KAFKA] = self._away(KAFKA, error)
            await self._close()
        status = None
        try:
            async with asyncio.timeout(_READ_SECONDS):
                status, kafka_error = await self._read(source)
            if kafka_error is not None:
                away[KAFKA] = self._away(KAFKA, kafka_error)
                await self._close()
        except (ConsumerError, TimeoutError, OSError) as error:
            away[POSTGRESQL] = self._away(POSTGRESQL, error)
        if refreshed == self._refreshed:  # else it may have read what was before an action
            self._learn(status, away)

    async def _connected(self) -> KafkaConsumer:
        """Return a client that has just answered. Raises KafkaError, ConsumerError."""
        if self._source is None:
            self._source = KafkaConsumer(self._settings, None)
            await self._source.start(self._settings.wait_seconds)
        if self._app.has_patterns:
            self._app.discover(await self._source.log.topics())
        else:
            await self._source.log.partitions(self._app.topics)
        return self._source

    async def _read(self, source: KafkaConsumer | None) -> tuple[Status, Exception | None]:
        """Return the status, and Kafka's error if it lacks Kafka's part."""
        settings = self._settings
        connection = await connect(settings, _CONNECT_SECONDS)
        try:
            with translated_errors(settings):
                await database_epoch(connection, settings)
                kafka_error: Exception | None = None
                async with connection.transaction(readonly=True):
                    await connection.execute(f"set local statement_timeout = '{_STATEMENT_SECONDS}s'")
                    if source is not None:
                        try:
                            async with asyncio.timeout(_KAFKA_SECONDS):
                                return await read_through(connection, source, self._app, self._path, settings), None
                        except (KafkaError, TimeoutError) as error:
                            kafka_error = error
                    return await read_without_kafka(connection, self._app, self._path), kafka_error
        finally:
            connection.terminate()

    def _away(self, service: str, error: Exception) -> Away:
        before = self.known.away.get(service)
        text = " ".join(str(error).split()) or type(error).__name__
        return Away(before.since if before is not None else time.time(), text)

    def _learn(self, status: Status | None, away: Mapping[str, Away]) -> None:
        now = time.time()
        kafka_at = self.known.kafka_at if KAFKA in away else now
        if status is None:
            self.known = replace(self.known, kafka_at=kafka_at, away=away)
            return
        if KAFKA not in away:
            self._whole = status
        else:
            status = self._with_last_known(status)
        self.known = Known(status, now, kafka_at, away)
        self.history.add(Sample(now, _outcomes(status), _positions(status)))

    def _with_last_known(self, status: Status) -> Status:
        """Add what Kafka answered last to a status without its part."""
        if (whole := self._whole) is None:
            return status
        rows = with_last_known(status.partitions, whole.partitions)
        return replace(
            status, partitions=rows, notices=whole.notices, gaps=whole.gaps, missing_topics=whole.missing_topics
        )

    async def _close(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            await source.stop(1)


def _outcomes(status: Status) -> dict[str, dict[str, int]]:
    return {name: outcomes_of(row) for name, row in status.handlers.items()}


def _positions(status: Status) -> dict[Partition, int]:
    rows: list[dict[str, Any]] = list(status.partitions)
    return {Partition(row["topic"], row["partition"]): row["position"] for row in rows if row["position"] is not None}
