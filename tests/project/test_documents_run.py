"""The code of the documents runs as a reader pastes it."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import asyncpg
import documents
import pytest
from documents import PAGES, ROOT, Block
from harness import query, until
from services import Kafka

BLOCKS = [block for page in PAGES for block in documents.blocks(page)]
README = [ROOT / "README.md"]
TUTORIAL = [ROOT / "docs/tutorial/first-handler.md", ROOT / "docs/tutorial/failures.md"]
# What a reader does once, or on the machine's own terms.
_BY_THE_READER = ("python3 -m venv", "pip install", "make ", "export ")
_SETTLED = """select (select coalesce(sum(next_offset), 0) from consumer.positions), (select count(*) from consumer.ledger),
                     (select count(*) from consumer.dead_letters), (select count(*) from consumer.attempts)"""


@pytest.fixture
def own_kafka() -> Iterator[Kafka]:
    """A Kafka of its own.

    With the group and topics of another page, a position in another database would stop the workers.
    """
    with Kafka() as server:
        yield server


class Reader:
    """Follows a page in an empty directory: writes files, runs commands."""

    def __init__(self, directory: Path, kafka: str, dsn: str) -> None:
        self.directory = directory
        self.dsn = dsn
        clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
        self.environment = {
            **clean,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]]),
            "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": kafka,
            "CONSUMER_POSTGRES_DSN": dsn,
            "CONSUMER_TEST_POSTGRES_DSN": dsn,
            "COLUMNS": "120",
        }
        self.output = ""

    async def follow(self, pages: Sequence[Path]) -> None:
        for block in [block for page in pages for block in documents.blocks(page)]:
            if block.file:
                (self.directory / block.file).write_text(block.code, "utf-8")
            elif block.language == "sql":
                await query(self.dsn, block.code)
            elif block.language == "sh":
                for line in documents.commands(block):
                    if not line.startswith(_BY_THE_READER):
                        await self._run(line)

    async def _run(self, line: str) -> None:
        if line.startswith("consumer run"):
            await self._run_workers(line)
            return
        done = await asyncio.to_thread(
            subprocess.run,
            ["/bin/sh", "-c", line],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{line}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        self.output += done.stdout

    async def _run_workers(self, line: str) -> None:
        """Workers until nothing changes any more, then Ctrl-C."""
        command = await asyncio.create_subprocess_exec(
            *shlex.split(line), cwd=self.directory, env=self.environment, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            before = await query(self.dsn, _SETTLED)
            seen: list[object] = []

            async def quiet() -> bool:
                seen.append(await query(self.dsn, _SETTLED))
                return len(seen) > 15 and seen[-1] != before and len({str(state) for state in seen[-15:]}) == 1

            await until("the workers to have nothing to do", quiet, 90)
            command.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(command.wait(), 40) in (0, 130)
        finally:
            if command.returncode is None:
                command.kill()
                await command.wait()


async def test_the_readme_works_as_pasted(own_kafka: Kafka, database: str, tmp_path: Path) -> None:
    reader = Reader(tmp_path, own_kafka.bootstrap_servers, database)
    await reader.follow(README)
    assert await query(database, "select balance, (select count(*) from payments) from accounts") == [(5050, 100)]
    [row] = re.findall(r"settle\s+│\s+(\d+) │\s+(\d+) │", reader.output)
    assert row == ("100", "100")


async def test_the_tutorial_works_as_pasted(own_kafka: Kafka, database: str, tmp_path: Path) -> None:
    reader = Reader(tmp_path, own_kafka.bootstrap_servers, database)
    await reader.follow(TUTORIAL)
    state = await query(database, "select count(*), count(distinct payment_id) from payments where amount = 100")
    assert state == [(1001, 1001)]  # a thousand, and the late one
    assert await query(database, "select balance from accounts where account = 7") == [(100 * 100 - 80,)]
    assert await query(database, "select state, count(*) from consumer.dead_letters group by 1 order by 1") == [
        ("applied", 2),
        ("discarded", 1),
    ]


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "python" and "= App(" in block.code], ids=str
)
def test_a_registration_is_accepted(block: Block, tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(block.code, "utf-8")
    environment = {**os.environ, "BILLING_EAST_DSN": "postgresql://x/a", "BILLING_WEST_DSN": "postgresql://x/b"}
    done = subprocess.run(
        [sys.executable, "-c", "import page; assert page.app.name"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "sql"], ids=str)
async def test_sql_parses(block: Block, database: str) -> None:
    """PL/pgSQL parses each statement of a block that it does not run."""
    connection = await asyncpg.connect(database)
    try:
        body = textwrap.indent(block.code.rstrip().rstrip(";"), "  ")
        await connection.execute(f"do $page$ begin return;\n{_as_statements(body)};\nend $page$")
    finally:
        await connection.close()


def _as_statements(code: str) -> str:
    """A query whose result is not used is `perform` in PL/pgSQL."""
    return re.sub(r"(^|;)(\s*)select\b", r"\1\2perform", code)
