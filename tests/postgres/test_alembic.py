"""Alembic beside `consumer migrate`, as docs/how-to/alembic.md sets it up."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import documents
import prefork
import pytest
from harness import ROOT, consumer, query, until

from consumer.postgres.sql_text import transaction_control

PAGE = ROOT / "docs" / "how-to" / "alembic.md"
_PLACES = {"env.py": "migrations/env.py", "conftest.py": "conftest_of_the_page.py"}
_OURS = """
select table_name, column_name, data_type, (select count(*) from consumer.schema_versions),
       (select array_agg(topic::text) from consumer.topics), obj_description('consumer.ledger'::regclass)
from information_schema.columns where table_schema = 'consumer' order by 1, 2
"""

_WAITING = "select count(*) from pg_locks where locktype = 'advisory' and not granted"


def alembic(*arguments: str) -> None:
    """Run Alembic in this process: it takes a second to import."""
    from alembic.config import main

    main(arguments)


@pytest.fixture
def directory(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory of a reader of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CONSUMER_POSTGRES_DSN", database)
    yield tmp_path
    for name in ("models", "conftest_of_the_page"):
        sys.modules.pop(name, None)


def follow_the_page(directory: Path, dsn: str) -> None:
    for block in documents.blocks(PAGE):
        if block.file:
            (directory / _PLACES.get(block.file, block.file)).write_text(block.code)
        for line in documents.commands(block) if block.language == "sh" else ():
            words = shlex.split(line)
            if words[0] == "alembic":
                alembic(*words[1:])
            elif words[0] == "consumer":
                done = consumer(directory, *words[1:], CONSUMER_POSTGRES_DSN=dsn)
                assert done.returncode == 0, (line, done.stderr)


async def upgrade_twice_at_once(directory: Path, dsn: str) -> None:
    """Run two upgrades, as two init containers do, which begin together."""
    upgrade = ["-m", "alembic", "upgrade", "head"]
    lock = await asyncpg.connect(dsn)
    try:
        await lock.execute("select pg_advisory_lock(20110)")
        both = [asyncio.create_task(prefork.answer(upgrade, os.environ, cwd=directory)) for _ in range(2)]

        async def wait_for_it() -> bool:
            return await query(dsn, _WAITING) == [(2,)]

        await until("both to wait for the lock", wait_for_it, 90)
    finally:
        await lock.close()
    assert [done.returncode for done in await asyncio.gather(*both)] == [0, 0], both


@pytest.mark.unit
def test_alembic_files_that_the_image_copies_are_not_ignored() -> None:
    """The .dockerignore of a new service names what may come in."""
    page = PAGE.read_text()
    copied = re.findall(r"`COPY (\S+) ", page)
    assert copied == re.findall(r"`!(\S+)`", page)[:2] == ["alembic.ini", "migrations"]


async def test_alembic_leaves_the_ledger_alone(
    database: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await asyncio.to_thread(follow_the_page, directory, database)  # with `alembic check`: nothing is proposed
    [revision] = (directory / "migrations" / "versions").glob("*_payments.py")
    text = revision.read_text()
    assert "create_table('payments'" in text and "consumer" not in text and text.count("op.") == 2
    assert await query(database, "select to_regclass('public.payments') is not null") == [(True,)]
    await query(database, "insert into consumer.topics (name) values ('kept')")
    before = await query(database, _OURS)

    schema = importlib.import_module("conftest_of_the_page").schema  # a fixture
    written = await asyncio.to_thread(schema.__wrapped__)
    assert "CREATE TABLE payments" in written and transaction_control(written) is None

    await asyncio.to_thread(alembic, "downgrade", "base")
    assert await query(database, "select to_regclass('public.payments')") == [(None,)]
    assert await query(database, _OURS) == before
    await upgrade_twice_at_once(directory, database)
    assert await query(database, _OURS) == before

    env = directory / "migrations" / "env.py"
    env.write_text(env.read_text().replace(", include_name=include_name", ""))
    with pytest.raises(SystemExit):
        await asyncio.to_thread(alembic, "check")
    assert "remove_table', Table('ledger'" in capsys.readouterr().out
