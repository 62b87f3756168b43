"""The two databases of a run: with the ledger, and without.

The framework uses the first one. A case gets a fresh schema in both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from consumer.postgres import grants, migrate
from oracle.case import Case

ROLE, _PASSWORD = "oracle_app", "oracle"
_CASES_MAX = 300  # on one pair: the ledger numbers handlers and topics, and has few numbers

# A role that owns its tables and is no superuser, so that row security binds it.
_FRESH = f"drop schema if exists public cascade; create schema public authorization {ROLE}"
_COLUMNS = """
select c.relname, array_agg(a.attname::text order by a.attnum)
from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and a.attname !~ '_(at|rnd)$'
group by c.relname order by c.relname
"""
_OUTBOX = """
select s.topic, s.source_partition, h.name, o.id::text, convert_from(o.key, 'utf8'), convert_from(o.value, 'utf8')
from consumer.outbox o join consumer.outbox_streams s using (stream) join consumer.handlers h using (handler)
where s.app = $1 order by o.stream, o.seq
"""
_SEQUENCES = "select sequencename::text, last_value from pg_sequences where schemaname = 'public' order by 1"


@dataclass
class Rows:
    """The rows of a table, each column as text."""

    columns: list[str]
    rows: list[tuple[str | None, ...]]


@dataclass
class State:
    """What is in a database."""

    tables: dict[str, Rows]
    sequences: dict[str, int | None]


class Databases:
    """Two databases on one server.

    admin: a superuser's address, whose path ends in the database's name.
    """

    def __init__(self, admin: str) -> None:
        self._admin = admin
        self._number = 0
        self._cases = 0
        self._names: list[str] = []
        self._connections: dict[str, Any] = {}

    async def __aenter__(self) -> Databases:
        await self._renew()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._drop()

    @property
    def framework(self) -> str:
        """The address of the database with the ledger, as the application's role."""
        return self._as_role(self._names[0])

    @property
    def serial(self) -> str:
        """The address of the other one."""
        return self._as_role(self._names[1])

    def _as_role(self, name: str) -> str:
        return f"postgresql://{ROLE}:{_PASSWORD}@{self._admin.rsplit('@', 1)[1].rsplit('/', 1)[0]}/{name}"

    def _as_admin(self, name: str) -> str:
        return f"{self._admin.rsplit('/', 1)[0]}/{name}"

    async def _renew(self) -> None:
        await self._drop()
        self._cases = 0
        self._number += 1
        server = await asyncpg.connect(self._admin)
        try:
            await server.execute(
                f"do $$ begin create role {ROLE} login password '{_PASSWORD}'; exception when duplicate_object then null; end $$"
            )
            for side in ("framework", "serial"):
                name = f"oracle_{side}_{self._number}"
                await server.execute(f"drop database if exists {name} with (force)")
                await server.execute(f"create database {name}")
                await server.execute(f"alter database {name} set search_path = public, ext")
                self._names.append(name)
        finally:
            await server.close()
        for name in self._names:
            connection = self._connections[name] = await asyncpg.connect(self._as_admin(name), statement_cache_size=0)
            await connection.execute(f"create schema ext; create extension citext schema ext; grant usage on schema ext to {ROLE}")  # fmt: skip
        connection = self._connections[self._names[0]]
        await migrate.migrate(connection)
        await connection.execute(grants.as_sql(ROLE, grants.For.WORKER))

    async def _drop(self) -> None:
        for connection in self._connections.values():
            connection.terminate()
        self._connections = {}
        names, self._names = self._names, []
        if names:
            server = await asyncpg.connect(self._admin)
            try:
                for name in names:
                    await server.execute(f"drop database if exists {name} with (force)")
            finally:
                await server.close()

    async def reset(self, case: Case) -> None:
        """Create the case's tables in both.

        Raises asyncpg.PostgresError for a schema that cannot be created.
        """
        self._cases += 1
        if self._cases > _CASES_MAX:
            await self._renew()
        await self._make(self._names[0], case)

    async def reset_serial(self, case: Case) -> None:
        """Make the tables of the serial side again."""
        await self._make(self._names[1], case)

    async def _make(self, name: str, case: Case) -> None:
        connection = self._connections[name]
        await connection.execute(_FRESH)
        statements = ";\n".join(case.schema())
        try:
            await connection.execute(f"set role {ROLE};\n{statements}")
        finally:
            await connection.execute("reset role")

    @asynccontextmanager
    async def serial_connection(self) -> AsyncIterator[asyncpg.Connection]:
        """A new session of the application's role on the serial side."""
        connection = await asyncpg.connect(self.serial, statement_cache_size=0)
        try:
            yield connection
        finally:
            await connection.close()

    async def published(self, app: str) -> list[tuple[str, int, str, str, str | None, str]]:
        """Return the outbox of an App, in the order of sending.

        Topic, input partition, handler, id, key and value.
        """
        connection = self._connections[self._names[0]]
        return [tuple(row) for row in await connection.fetch(_OUTBOX, app)]

    async def state(self, address: str) -> State:
        """What is in a database."""
        connection = self._connections[address.rsplit("/", 1)[1]]
        tables = {}
        for name, columns in await connection.fetch(_COLUMNS):
            selected = ", ".join(f'"{column}"::text' for column in columns)
            rows = await connection.fetch(f'select {selected} from only "{name}"')
            tables[name] = Rows(columns, [tuple(row) for row in rows])
        return State(tables, dict(await connection.fetch(_SEQUENCES)))
