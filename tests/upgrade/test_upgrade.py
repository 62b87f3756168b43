"""Two versions run side by side while the schema is migrated.

previous/ holds the wheel of the version before, as users installed it: a checkout without history has it too.
`make release-check KEEP=yes` replaces it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import zipfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from harness import (
    ROOT,
    TABLES,
    WORKER,
    WORKER_RIGHTS,
    Command,
    as_worker,
    execute,
    new_topic,
    produce,
    query,
    running_program,
    settings_for,
    until,
    value,
)
from payments_app import payment
from services import Kafka

from consumer.postgres import migrate as schema

[WHEEL] = (Path(__file__).parent / "previous").glob("*.whl")
PREVIOUS, CURRENT = 1, 2
# What a batch holds of tables that it does not write. Commands write the first two, a worker that starts the third.
OTHER_LOCKS = {"letter_actions": "access share", "outbox_actions": "access share", "handlers": "row share"}


def _migrations_of_wheel() -> list[tuple[str, str]]:
    """Names and texts of the migrations of the version before."""
    with zipfile.ZipFile(WHEEL) as wheel:
        files = sorted(name for name in wheel.namelist() if "/migrations/" in name and name.endswith(".sql"))
        return [(Path(name).stem, wheel.read(name).decode()) for name in files]


@pytest.mark.unit
def test_migrations_of_the_version_before_are_as_they_were() -> None:
    """Every database that has it refuses a changed one."""
    now = [(f"{migration.version:04}_{migration.name}", migration.sql) for migration in schema.migrations()]
    before = _migrations_of_wheel()
    assert [name for name, text in before if (name, text) not in now] == []
    assert now[: len(before)] == before


async def test_migrations_wait_for_no_worker_and_delay_none(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's transaction is open on every table meanwhile."""
    known, before = schema.migrations(), len(_migrations_of_wheel())
    worker = await asyncpg.connect(database)
    migrating = await asyncpg.connect(database, server_settings={"lock_timeout": "2s"})
    try:
        with monkeypatch.context() as patch:
            patch.setattr(schema, "migrations", lambda: known[:before])
            await schema.migrate(migrating)
        tables = await query(database, "select relname from pg_class where relnamespace = 'consumer'::regnamespace and relkind in ('r', 'p')")  # fmt: skip
        async with worker.transaction():
            for (table,) in tables:
                mode = OTHER_LOCKS.get(table, "row exclusive")
                await worker.execute(f"lock table consumer.{table} in {mode} mode")
            assert await schema.migrate(migrating) == known[before:]
    finally:
        await migrating.close()
        await worker.close()


class Versions:
    """Two versions of `consumer` for one App and one database."""

    def __init__(self, kafka: str, dsn: str, topic: str, directory: Path) -> None:
        self.kafka, self.dsn, self.topic, self.directory = kafka, dsn, topic, directory
        self.name = f"upgrade-{uuid4().hex[:8]}"
        self.places = {PREVIOUS: directory / "previous", CURRENT: ROOT}
        with zipfile.ZipFile(WHEEL) as wheel:
            wheel.extractall(self.places[PREVIOUS])

    def environment(self, version: int) -> dict[str, str]:
        path = [self.places[version], ROOT / "tests" / "support"]
        return {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "TEST_VERSION": str(version),
            "TEST_VERSION_AT": str(self.places[version] / "consumer"),
            "TEST_APP": self.name,
            "TEST_TOPIC": self.topic,
        }

    async def command(self, version: int, *arguments: str) -> str:
        """Run a command of a version as the owner of the database."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "consumer", *arguments,
            cwd=self.directory,
            env={**os.environ, **self.environment(version), "CONSUMER_POSTGRES_DSN": self.dsn},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        return out.decode()

    async def migrate(self, version: int) -> str:
        """Migrate, and give the workers' role what this version needs."""
        answer = await self.command(version, "migrate")
        await execute(self.dsn, await self.command(version, "migrate", "--grants", WORKER))
        return answer

    def run(self, version: int) -> AbstractAsyncContextManager[Command]:
        settings = settings_for(as_worker(self.dsn), self.kafka, None)
        cwd = self.directory / f"run-{version}"
        # A fork has this version's modules.
        return running_program(["run", "upgrade_app:app"], settings, cwd, **self.environment(version))

    async def send(self, first: int, end: int) -> None:
        """Send payments, a tenth of them twice."""
        numbers = [number for n in range(first, end) for number in ([n, n] if n % 10 == 0 else [n])]
        await produce(self.kafka, self.topic, [payment(f"p{n}", n % 7, 1, partition=n % 4) for n in numbers])

    async def applied(self, version: int | None = None) -> int:
        sql = "select count(distinct id) from effects where $1::int is null or account = $1"
        return int(await value(self.dsn, sql, version))


@pytest.fixture
async def versions(kafka: Kafka, migrated_template: str, database: str, tmp_path: Path) -> AsyncIterator[Versions]:
    yield Versions(kafka.bootstrap_servers, database, await new_topic(kafka.bootstrap_servers, 4), tmp_path)


class Sender:
    """Sends payments in hundreds, one after the other, until it is ended."""

    def __init__(self, versions: Versions) -> None:
        self.sent = 0
        self._versions = versions
        self._is_ending = False
        self._task = asyncio.create_task(self._send())

    async def _send(self) -> None:
        while not self._is_ending:
            await self._versions.send(self.sent, self.sent + 100)
            self.sent += 100

    async def end(self) -> None:
        self._is_ending = True
        await self._task


async def _applies(versions: Versions, version: int | None, count: int, *, more: bool = True) -> None:
    """Wait until a version, or any, has applied so many messages more."""
    wanted = count + (await versions.applied(version) if more else 0)

    async def has() -> bool:
        return await versions.applied(version) >= wanted

    await until(f"version {version} to have applied {wanted}", has, 180)


@pytest.mark.timeout(600)
async def test_workers_of_two_versions_apply_once_while_the_schema_is_migrated(versions: Versions) -> None:
    assert "applied: 0001" in await versions.migrate(PREVIOUS)
    await execute(versions.dsn, TABLES + WORKER_RIGHTS)
    sender = Sender(versions)
    async with versions.run(PREVIOUS) as previous:
        await _applies(versions, PREVIOUS, 100)
        # The owner migrates; the workers' role has what the version before gave it, until the grants are run.
        assert f"applied: {len(schema.migrations()):04}" in await versions.command(CURRENT, "migrate")
        await _applies(versions, PREVIOUS, 100)
        await execute(versions.dsn, await versions.command(CURRENT, "migrate", "--grants", WORKER))
        async with versions.run(CURRENT) as current:
            await _applies(versions, CURRENT, 100)
            await _applies(versions, PREVIOUS, 100)
            for pid in previous.worker_pids().values():  # its supervisor starts another
                os.kill(pid, signal.SIGKILL)
            await _applies(versions, PREVIOUS, 100)
            previous.process.send_signal(signal.SIGTERM)
            assert await previous.wait(120) == 0, previous.errors[-2000:]
            await sender.end()
            await _applies(versions, None, sender.sent, more=False)
    assert await query(versions.dsn, "select id from effects group by id having count(*) > 1") == []
    assert await value(versions.dsn, "select sum(balance)::int8 from accounts") == sender.sent
    events = [
        event["event"]
        for command in (previous, current)
        for event in command.events()
        if (event["level"], event["logger"]) == ("error", "consumer")
    ]
    assert events == []
