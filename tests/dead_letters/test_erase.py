"""Erased dead letters keep their place and nothing of their message.

Without Kafka, as test_dead_letter_retry.py.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from harness import ROOT, as_worker, consumer, is_one_line, query, value
from retry_desk import Desk

from consumer.dead_letters.edits import Edit
from consumer.retention import settled_dead_letters

SECRET = "4929-secret"
PATH = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'support'}"


@pytest.fixture
async def desk(database: str) -> Desk:
    desk = Desk(database)
    await desk.open()
    return desk


async def dlq(desk: Desk, cwd: Path, *arguments: str) -> Any:
    environment = {"CONSUMER_POSTGRES_DSN": desk.settings.dsn, "TEST_DESK": desk.name, "PYTHONPATH": PATH}
    return await asyncio.to_thread(consumer, cwd, "dlq", *arguments, **environment)


async def quoting(dsn: str) -> list[str]:
    """The tables that hold the secret, as text or bytes."""
    tables = await query(
        dsn, "select relname from pg_class where relnamespace = 'consumer'::regnamespace and relkind in ('r', 'p')"
    )
    held = []
    for (table,) in tables:
        sql = f"select count(*) from consumer.{table} t where t::text like $1 or t::text like $2"
        if await value(dsn, sql, f"%{SECRET}%", f"%{SECRET.encode().hex()}%"):
            held.append(table)
    return sorted(held)


async def test_erased_letter_holds_its_key_until_it_is_discarded(desk: Desk, tmp_path: Path) -> None:
    first = await desk.letter("a", key=SECRET, value=json.dumps({"id": "a", "card": SECRET}).encode())
    behind = await desk.letter("b", key=SECRET, reason="behind", state="waiting")
    other = await desk.letter("c", key="another")
    await query(desk.dsn, "update consumer.dead_letters set error = 'not a card: ' || $1, trace = $1 where dead_letter = $2", SECRET, first)  # fmt: skip
    desk.faults["a"] = "fails"
    assert await desk.outcomes(first, edit=Edit(json.dumps({"id": "a", "card": SECRET}).encode())) == ["failed"]
    assert await quoting(desk.dsn) == ["dead_letters", "letter_results"]
    before = await desk.rows()

    shown = await dlq(desk, tmp_path, "erase", desk.name, "--key", SECRET, "--why", "x", "--dry-run", "--json")
    assert json.loads(shown.stdout) == {"asked": 2, "erased": 0, "open": 2, "dry_run": True}
    refused = await dlq(desk, tmp_path, "erase", desk.name, "--key", SECRET, "--why", "x")
    is_one_line(refused, "erase 2 dead letters for good (2 of them are open", "say --yes")
    assert await desk.rows() == before and await value(desk.dsn, "select count(*) from consumer.audit") == 1

    done = await dlq(
        desk, tmp_path, "erase", desk.name, "--key", SECRET, "--why", "request 7", "--yes", "--operator", "eve"
    )
    assert done.returncode == 0 and "2 dead letters were erased, 2 of them open" in done.stdout, done.stderr
    assert await quoting(desk.dsn) == []
    assert [(row[1], row[2]) for row in (await desk.rows())[1]] == [(row[1], row[2]) for row in before[1]]
    recorded = await query(desk.dsn, "select operator, why, dead_letter from consumer.audit where action = 'dlq erase' order by entry")  # fmt: skip
    assert recorded == [("eve", "request 7", first), ("eve", "request 7", behind)]
    again = await dlq(desk, tmp_path, "erase", desk.name, str(first), "--why", "x", "--yes", "--json")
    assert json.loads(again.stdout)["asked"] == 0

    desk.faults.clear()
    erased = await desk.retry(first)
    assert [result.outcome for result in erased] == ["erased"] and "can only be discarded" in erased[0].text
    assert await desk.outcomes(first, edit=Edit(b'{"id": "a"}')) == ["erased"]
    assert await desk.done() == []
    gone = await dlq(desk, tmp_path, "discard", "retry_desk:app", str(first), "--why", "erased", "--json")
    outcomes = {letter["letter"]: letter["outcome"] for letter in json.loads(gone.stdout)["letters"]}
    assert outcomes == {first: "discarded", behind: "erased"}  # nothing passes the one behind it
    assert await value(desk.dsn, "select count(*) from consumer.held where chain is not null") == 2
    await dlq(desk, tmp_path, "discard", "retry_desk:app", str(behind), "--why", "erased")
    assert await desk.outcomes(other) == ["applied"]
    assert await value(desk.dsn, "select count(*) from consumer.held") == 0


async def test_letters_to_erase_must_be_named_in_one_way(desk: Desk, tmp_path: Path) -> None:
    number = str(await desk.letter("a"))
    why = ["--why", "x"]
    is_one_line(await dlq(desk, tmp_path, "erase", desk.name, number), "--why")
    is_one_line(await dlq(desk, tmp_path, "erase", desk.name, *why), "exactly one way")
    is_one_line(await dlq(desk, tmp_path, "erase", desk.name, number, "--key", "k", *why), "exactly one way")
    is_one_line(await dlq(desk, tmp_path, "erase", desk.name, "77", *why, "--yes"), "no dead letter 77")
    is_one_line(await dlq(desk, tmp_path, "erase", desk.name, "--handler", "setle", *why), "did you mean settle?")
    assert await value(desk.dsn, "select value is not null from consumer.dead_letters")


async def test_settled_letters_are_erased_when_their_time_is_over(desk: Desk) -> None:
    settled, late, still_open = await desk.letter("a"), await desk.letter("b"), await desk.letter("c")
    assert await desk.outcomes(settled, late) == ["applied", "applied"]
    # Settled long ago, and stored long ago but settled just now.
    await query(desk.dsn, "update consumer.audit set at = now() - interval '3 hours' where dead_letter = $1", settled)
    await query(desk.dsn, "update consumer.dead_letters set died_at = now() - interval '9 hours'")
    connection = await asyncpg.connect(as_worker(desk.dsn))
    try:
        assert await settled_dead_letters.erase(connection, "another app", 2) == 0
        assert await settled_dead_letters.erase(connection, desk.name, 2) == 1
        assert await settled_dead_letters.erase(connection, desk.name, 2) == 0
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("update consumer.dead_letters set value = null")
    finally:
        await connection.close()
    rows = await query(desk.dsn, "select dead_letter, value is null from consumer.dead_letters order by 1")
    assert rows == [(settled, True), (late, False), (still_open, False)]
    [entry] = await query(desk.dsn, "select operator, dead_letter from consumer.audit where action = 'dlq erase'")
    assert entry == ("consumer run", settled)
