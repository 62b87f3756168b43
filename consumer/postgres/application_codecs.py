"""Keeps the type codecs of an application away from our own statements.

`App(connection_init=…)` gets an `ApplicationConnection`, which remembers the codecs that are set on it. Where there are
any, our own statements run through `OwnStatements`, which prepares them without these codecs. A codec is looked up when a
statement is prepared, and not again (asyncpg 0.32, protocol/prepared_stmt.pyx), so both kinds share one connection and
one transaction. Limitation: `asyncpg.Connection._protocol` is not documented; pyproject.toml pins the driver.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import asyncpg
from asyncpg import introspection

if TYPE_CHECKING:
    _Connection = asyncpg.Connection[asyncpg.Record]
else:
    _Connection = asyncpg.Connection

ConnectionInit: TypeAlias = Callable[[Any], Awaitable[object]]

_PREPARED_MAX = 200  # of our statements, on one connection


class _Codec(NamedTuple):
    """How to set a codec again: a method of asyncpg's settings."""

    method: str
    arguments: tuple[Any, ...]


class ApplicationConnection(_Connection):
    """An asyncpg connection that remembers the codecs set on it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.codecs: dict[int, _Codec] = {}

    async def set_type_codec(
        self, typename: str, *, schema: str = "public", encoder: Any, decoder: Any, format: Any = "text"
    ) -> None:
        await super().set_type_codec(typename, schema=schema, encoder=encoder, decoder=decoder, format=format)
        introspected = await self._introspect_type(typename, schema)  # type: ignore[attr-defined]
        kind, parts = "scalar", []
        if not introspection.is_scalar_type(introspected):
            kind, parts = "composite", (await self._introspect_types((introspected["oid"],), 10))[0]  # type: ignore[attr-defined]
        arguments = (introspected["oid"], typename, schema, parts, kind, encoder, decoder, format)
        self.codecs[introspected["oid"]] = _Codec("add_python_codec", arguments)

    async def set_builtin_type_codec(
        self, typename: str, *, schema: str = "public", codec_name: str, format: Any = None
    ) -> None:
        await super().set_builtin_type_codec(typename, schema=schema, codec_name=codec_name, format=format)
        introspected = await self._introspect_type(typename, schema)  # type: ignore[attr-defined]
        arguments = (introspected["oid"], typename, schema, "scalar", codec_name, format)
        self.codecs[introspected["oid"]] = _Codec("set_builtin_type_codec", arguments)

    async def reset_type_codec(self, typename: str, *, schema: str = "public") -> None:
        await super().reset_type_codec(typename, schema=schema)
        introspected = await self._introspect_type(typename, schema)  # type: ignore[attr-defined]
        self.codecs.pop(introspected["oid"], None)

    @contextmanager
    def without_codecs(self) -> Iterator[None]:
        """Take the codecs away while statements are prepared; asks nothing."""
        settings = self._protocol.get_settings()  # type: ignore[attr-defined]
        for oid, codec in self.codecs.items():
            settings.remove_python_codec(oid, *codec.arguments[1:3])
        try:
            yield
        finally:
            for codec in self.codecs.values():
                getattr(settings, codec.method)(*codec.arguments)


class _OwnStatement:
    """A prepared statement, with its types as without the codecs."""

    def __init__(self, prepared: Any) -> None:
        parameters, attributes = prepared.get_parameters(), prepared.get_attributes()
        self.get_parameters: Callable[[], Any] = lambda: parameters
        self.get_attributes: Callable[[], Any] = lambda: attributes
        self.get_statusmsg = prepared.get_statusmsg
        self.fetch, self.fetchrow, self.fetchval = prepared.fetch, prepared.fetchrow, prepared.fetchval
        self.executemany = prepared.executemany


class OwnStatements:
    """A connection with codecs, for the statements of ours.

    application: the same connection, for those of handlers. What has no arguments and no rows goes to it as it is.
    """

    def __init__(self, application: ApplicationConnection) -> None:
        self.application = application
        self._prepared: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.application, name)

    async def execute(self, sql: str, *args: Any, timeout: float | None = None) -> str:
        if not args:
            return str(await self.application.execute(sql, timeout=timeout))
        statement = await self.prepare(sql, timeout=timeout)
        await self._run(statement.fetch, *args, timeout=timeout)
        return str(statement.get_statusmsg())

    async def executemany(self, sql: str, args: Iterable[Sequence[Any]], *, timeout: float | None = None) -> None:
        statement = await self.prepare(sql, timeout=timeout)
        await self._run(statement.executemany, args, timeout=timeout)

    async def fetch(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        statement = await self.prepare(sql, timeout=timeout)
        return await self._run(statement.fetch, *args, timeout=timeout)

    async def fetchrow(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        statement = await self.prepare(sql, timeout=timeout)
        return await self._run(statement.fetchrow, *args, timeout=timeout)

    async def fetchval(self, sql: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        statement = await self.prepare(sql, timeout=timeout)
        return await self._run(statement.fetchval, *args, column=column, timeout=timeout)

    async def prepare(self, sql: str, *, name: str | None = None, timeout: float | None = None) -> Any:
        """Prepare a statement that knows no codec of the application.

        One without a name is kept.
        """
        statement = self._prepared.get(sql) if name is None else None
        if statement is None:
            with self.application.without_codecs():
                statement = _OwnStatement(await self.application.prepare(sql, name=name, timeout=timeout))
            if name is None:
                if len(self._prepared) >= _PREPARED_MAX:
                    self._prepared.clear()
                self._prepared[sql] = statement
        return statement

    async def _run(self, method: Any, *args: Any, **options: Any) -> Any:
        try:
            return await method(*args, **options)
        except (asyncpg.InvalidCachedStatementError, asyncpg.OutdatedSchemaCacheError):
            self._prepared.clear()
            raise


class Preparer:
    """Where an ORM prepares statements: without the application's codecs.

    idle: connections of the ORM on this one, for the next message.
    """

    __slots__ = ("idle", "prepare")

    def __init__(self, prepare: Callable[[str], Awaitable[Any]]) -> None:
        self.prepare = prepare
        self.idle: list[Any] = []


def application_connection(connection: Any) -> Any:
    """Return the connection as handlers use it, with the application's codecs."""
    return connection.application if isinstance(connection, OwnStatements) else connection


def coded_types(connection: Any) -> frozenset[int]:
    """Return the oids of types with a codec of the application."""
    return frozenset(connection.application.codecs) if isinstance(connection, OwnStatements) else frozenset()
