"""The PostgreSQL that tests run on: databases from templates.

Knows addresses and databases; knows no messages.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from consumer.core.errors import Misconfigured
from consumer.postgres.application_codecs import ConnectionInit, application_connection
from consumer.postgres.connection import connect, translated_errors
from consumer.postgres.errors import sqlstate_of
from consumer.postgres.migrate import migrate
from consumer.replay.effects import check_countable
from consumer.settings import Settings, load

_LOCK_SECONDS = 2.0  # a handler that waits for its own transaction through another connection is found out in this time
_IDLE_SECONDS = 3600.0  # somebody may be looking around in a debugger

# What a connection has counted is handed on at its next idle moment; without this, perhaps much later.
BE_COUNTED = "select pg_stat_force_next_flush()"


def _settings(dsn: str) -> Settings:
    return load(
        postgres_dsn=dsn,
        postgres_pooler=False,
        postgres_lock_timeout_seconds=_LOCK_SECONDS,
        postgres_idle_in_transaction_timeout_seconds=_IDLE_SECONDS,
    )


@asynccontextmanager
async def connection_to(settings: Settings, init: ConnectionInit | None = None) -> AsyncIterator[Any]:
    """Connect for as long as the block, as handlers do.

    init: the App's connection_init. Raises Misconfigured or Outage, naming the place.
    """
    connection = application_connection(await connect(settings, init=init))
    try:
        await connection.execute(BE_COUNTED)
        yield connection
    finally:
        await close(connection)


async def close(connection: Any) -> None:
    """Close a connection, in order if possible.

    Lets the event loop see the end, because a test's loop may end right after.
    """
    with suppress(Exception):
        await connection.close(timeout=5)
    if not connection.is_closed():
        connection.terminate()
    await asyncio.sleep(0)


def _of_database(dsn: str, name: str) -> str:
    parts = urlsplit(dsn)
    query = [(key, value) for key, value in parse_qsl(parts.query) if key not in ("database", "dbname")]
    return parts._replace(path=f"/{name}", query=urlencode(query)).geturl()


class Server:
    """A PostgreSQL with a template database for each schema."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._settings = _settings(dsn)
        self._run = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._templates: dict[str, str] = {}

    async def make(self, name: str, schema: str) -> str:
        """Create a database with the ledger and a schema; return its name.

        name: what to call the schema in an error.
        """
        template = self._templates.get(schema)
        if template is None:
            template = self._templates[schema] = await self._make_template(name, schema)
        return await self._create(f" template {template}")

    @asynccontextmanager
    async def copied(self, database: str) -> AsyncIterator[Settings]:
        """Copy a database for the block; yield how to connect.

        Raises Misconfigured while others are connected.
        """
        try:
            name = await self._create(f" template {database}")
        except Exception as error:
            if sqlstate_of(error.__cause__ or error) != "55006":
                raise
            raise Misconfigured(
                "prove: other sessions are connected to this test's database, so it cannot be copied for an undisturbed run; "
                "close connections and pools of your own before it"
            ) from None
        try:
            yield self.settings(name)
        finally:
            await self.drop([name])

    def settings(self, database: str) -> Settings:
        """Return how to connect to a database."""
        return _settings(_of_database(self._dsn, database))

    async def drop(self, databases: Sequence[str]) -> None:
        """Drop databases, even if sessions are connected to them."""
        async with self._connected() as connection:
            for database in databases:
                await connection.execute(f"drop database if exists {database} with (force)")

    async def drop_templates(self) -> None:
        """Drop what is left at the end."""
        await self.drop(list(self._templates.values()))

    async def _make_template(self, name: str, schema: str) -> str:
        database = await self._create("")
        try:
            async with connection_to(self.settings(database)) as connection:
                await check_countable(connection, "the PostgreSQL to test on")
                await migrate(connection, schema, names=[name])
        except BaseException:
            await self.drop([database])
            raise
        return database

    async def _create(self, rest: str) -> str:
        name = f"consumer_test_{self._run}_{next(self._numbers)}"
        async with self._connected() as connection:
            await connection.execute(f"create database {name}{rest}")
        return name

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        async with connection_to(self._settings) as connection:
            with translated_errors(self._settings):
                yield connection
