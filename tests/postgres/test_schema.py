"""Migrations are printed, checked, and applied once."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import asyncpg
import pytest
from harness import consumer, is_one_line, query, settings_for, value

from consumer import Misconfigured
from consumer.local_servers import Postgres
from consumer.postgres import connection as connections
from consumer.postgres import migrate as schema
from consumer.postgres.errors import SchemaMissing
from consumer.postgres.session import Session


async def _migrate(dsn: str) -> int:
    connection = await asyncpg.connect(dsn)
    try:
        return len(await schema.migrate(connection))
    finally:
        await connection.close()


@pytest.fixture
def next_version(monkeypatch: pytest.MonkeyPatch) -> schema.Migration:
    """Another migration after those of the package, and code that needs it."""
    latest = schema.migrations()
    migration = schema.Migration(
        latest[-1].version + 1, "colour", "alter table consumer.topics add column colour text not null default 'red'"
    )
    monkeypatch.setattr(schema, "migrations", lambda: [*latest, migration])
    monkeypatch.setattr(connections, "SCHEMA_VERSION", migration.version)
    return migration


def test_the_code_needs_the_latest_migration() -> None:
    versions = [migration.version for migration in schema.migrations()]
    assert versions == list(range(1, connections.SCHEMA_VERSION + 1))


async def test_a_database_of_the_version_before_is_migrated_with_its_rows(
    database: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    assert await _migrate(database) == len(schema.migrations())
    await query(database, "insert into consumer.topics (name) values ('old') returning topic")
    settings = settings_for(database, "127.0.0.1:1")
    added: schema.Migration = request.getfixturevalue("next_version")
    with pytest.raises(SchemaMissing, match=rf"at version {added.version - 1} and this code needs {added.version};"):
        await Session.open(settings)
    assert await _migrate(database) == 1
    assert await query(database, "select name, colour from consumer.topics") == [("old", "red")]
    assert await query(database, "select max(version) from consumer.schema_versions") == [(added.version,)]
    (await Session.open(settings)).close()
    assert await _migrate(database) == 0

    monkeypatch.undo()  # a worker of the version before goes on beside a migrated schema
    (await Session.open(settings)).close()
    assert await _migrate(database) == 0


async def test_many_at_once_apply_each_migration_once(database: str) -> None:
    applied = await asyncio.gather(*[_migrate(database) for _ in range(8)])
    assert sum(applied) == len(schema.migrations())
    assert await value(database, "select count(*) from consumer.schema_versions") == len(schema.migrations())


async def test_the_printed_sql_makes_the_same_schema(database: str, postgres: Postgres, tmp_path: Path) -> None:
    assert consumer(tmp_path, "migrate", "--check", CONSUMER_POSTGRES_DSN=database).returncode == 1
    assert await query(database, "select 1 from pg_namespace where nspname = 'consumer'") == []  # it only looked
    printed = consumer(tmp_path, "migrate", "--sql")
    assert printed.returncode == 0
    command: list[str | Path] = [postgres.program("psql"), "-v", "ON_ERROR_STOP=1", "-q", database]
    psql = await asyncio.to_thread(
        lambda: subprocess.run(command, input=printed.stdout, text=True, capture_output=True, check=False)
    )
    assert psql.returncode == 0, psql.stderr
    assert consumer(tmp_path, "migrate", "--check", CONSUMER_POSTGRES_DSN=database).returncode == 0
    again = consumer(tmp_path, "migrate", CONSUMER_POSTGRES_DSN=database)
    assert again.returncode == 0 and "up to date" in again.stdout


async def test_own_sql_runs_in_the_same_transaction_or_nothing_does(database: str, tmp_path: Path) -> None:
    (tmp_path / "own.sql").write_text("create table mine (id int); select 1/0;")
    result = consumer(tmp_path, "migrate", "--file", "own.sql", CONSUMER_POSTGRES_DSN=database)
    is_one_line(result, "division by zero", "nothing was changed")
    assert await query(database, "select 1 from pg_namespace where nspname = 'consumer'") == []
    (tmp_path / "own.sql").write_text("create table if not exists mine (id int);")
    for _ in range(2):
        assert consumer(tmp_path, "migrate", "--file", "own.sql", CONSUMER_POSTGRES_DSN=database).returncode == 0
    is_one_line(consumer(tmp_path, "migrate", "--file", "nowhere.sql", CONSUMER_POSTGRES_DSN=database), "nowhere.sql")


async def test_own_tables_do_not_land_in_our_schema(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        await connection.execute("set search_path = consumer, public")
        with pytest.raises(Misconfigured, match="search_path: the first schema"):
            await schema.migrate(connection, "create table mine (id int)")
    finally:
        await connection.close()


async def test_an_altered_migration_is_refused(database: str, tmp_path: Path) -> None:
    assert consumer(tmp_path, "migrate", CONSUMER_POSTGRES_DSN=database).returncode == 0
    await query(database, "update consumer.schema_versions set checksum = 'x' returning 1")
    is_one_line(consumer(tmp_path, "migrate", CONSUMER_POSTGRES_DSN=database), "another text")


async def test_a_schema_older_than_the_code_is_refused_at_start(database: str) -> None:
    settings = settings_for(database, "127.0.0.1:1")
    with pytest.raises(SchemaMissing, match="consumer migrate"):
        await Session.open(settings)
    connection = await asyncpg.connect(database)
    try:
        await schema.migrate(connection)
        await connection.execute("delete from consumer.schema_versions")
    finally:
        await connection.close()
    with pytest.raises(SchemaMissing, match=r"at version 0.*consumer migrate"):
        await Session.open(settings)
