"""No update is lost in any order; what a hot row costs.

On a real PostgreSQL.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import asyncpg
import pytest
from harness import until
from scheme_database import Connect, RecordedDatabase

from consumer import ConsumerError, Retry
from consumer.core.errors import RunAgain
from consumer.schemes.database import Misfit, NotFound
from consumer.schemes.versioned import Stale, update_versioned

TASKS, EACH = 8, 10


@pytest.fixture(autouse=True)
async def tables(connection: asyncpg.Connection) -> None:
    await connection.execute(
        """create table accounts (bank text, id int, balance bigint not null, version bigint, primary key (bank, id));
           insert into accounts values ('b', 1, 100, 0), ('b', 2, 0, 7), ('b', 3, 0, null)"""
    )


async def account(connection: asyncpg.Connection, id: int = 1) -> tuple[int, int]:
    [(balance, version)] = await connection.fetch("select balance, version from accounts where id = $1", id)
    return balance, version


async def test_the_version_that_was_read_goes_through_once(connection: asyncpg.Connection) -> None:
    key = {"bank": "b", "id": 1}
    assert await update_versioned(connection, "accounts", key, expected=0, set={"balance": 90}) == 1
    with pytest.raises(Stale) as raised:
        await update_versioned(connection, "accounts", key, expected=0, set={"balance": 80})
    assert (raised.value.expected, raised.value.found) == (0, 1)
    assert await account(connection) == (90, 1)
    assert await update_versioned(connection, "accounts", key, expected=1, set={"balance": 80}) == 2


async def test_missing_row_is_not_another_version(connection: asyncpg.Connection) -> None:
    with pytest.raises(NotFound):
        await update_versioned(connection, "accounts", {"bank": "b", "id": 9}, expected=0, set={"balance": 1})
    with pytest.raises(Stale):  # a version from the future, which a message that came early may carry
        await update_versioned(connection, "accounts", {"bank": "b", "id": 2}, expected=8, set={"balance": 1})
    assert (
        issubclass(NotFound, LookupError) and issubclass(NotFound, ConsumerError) and not issubclass(NotFound, RunAgain)
    )
    assert issubclass(Stale, RunAgain)


async def test_one_statement_when_it_goes_through_and_two_when_not(connection: asyncpg.Connection) -> None:
    database = RecordedDatabase(connection)
    await update_versioned(database, "accounts", {"id": 1}, expected=0, set={"balance": 1})
    assert len(database.statements) == 1
    with pytest.raises(Stale):
        await update_versioned(database, "accounts", {"id": 1}, expected=0, set={"balance": 1})
    assert len(database.statements) == 3


async def test_one_that_waited_for_another_is_stale_and_not_last(connect: Connect) -> None:
    first, second = await connect(), await connect()
    async with first.transaction():
        await update_versioned(first, "accounts", {"id": 1}, expected=0, set={"balance": 90})
        waiting = asyncio.create_task(update_versioned(second, "accounts", {"id": 1}, expected=0, set={"balance": 80}))
        await until(
            "the other to wait", lambda: first.fetchval("select exists (select from pg_locks where not granted)")
        )
    with pytest.raises(Stale):
        await waiting
    assert await account(first) == (90, 1)


# -- what cannot be meant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected", ["0", "x", 0.0, None, True, b"0"])
async def test_a_version_that_is_no_whole_number_is_a_type_error(connection: asyncpg.Connection, expected: Any) -> None:
    with pytest.raises(TypeError, match="whole number"):
        await update_versioned(connection, "accounts", {"id": 1}, expected=expected, set={"balance": 1})


@pytest.mark.parametrize("expected", [-1, 2**63 - 1, 2**80])
async def test_a_number_that_can_be_no_version_is_a_value_error(connection: asyncpg.Connection, expected: int) -> None:
    with pytest.raises(ValueError, match="is a version"):
        await update_versioned(connection, "accounts", {"id": 1}, expected=expected, set={"balance": 1})


@pytest.mark.parametrize(
    ("key", "values", "says"),
    [
        ({}, {"balance": 1}, "key: name at least one"),
        ({"id": 1}, {}, "set: name at least one"),
        ({"id": 1}, {"version": 5}, "names 'version'"),
        ({"id": 1}, {"id": 5}, "names 'id'"),
    ],
)
async def test_a_call_that_cannot_be_meant_is_refused(
    connection: asyncpg.Connection, key: dict[str, Any], values: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        await update_versioned(connection, "accounts", key, expected=0, set=values)


async def test_table_that_does_not_fit_is_an_error_that_names_it(connection: asyncpg.Connection) -> None:
    for wrong in ({"table": "acounts"}, {"key": {"no": 1}}, {"set": {"ballance": 1}}, {"version": "revision"}):
        call: dict[str, Any] = {"table": "accounts", "key": {"id": 1}, "set": {"balance": 1}} | wrong
        with pytest.raises(Misfit, match="there is no such"):
            await update_versioned(connection, call.pop("table"), call.pop("key"), expected=0, **call)
    with pytest.raises(Misfit, match="version is NULL"):
        await update_versioned(connection, "accounts", {"id": 3}, expected=0, set={"balance": 1})


async def test_key_of_several_rows_is_an_error_and_rolled_back_by_the_caller(
    connection: asyncpg.Connection,
) -> None:
    await connection.execute("update accounts set version = 0")
    with pytest.raises(Misfit, match="names 3 rows"):
        async with connection.transaction():
            await update_versioned(connection, "accounts", {"bank": "b"}, expected=0, set={"balance": 1})
    assert await account(connection) == (100, 0)


# -- a hot row ----------------------------------------------------------------------------------------------------------------


async def test_without_either_an_update_is_lost(connect: Connect) -> None:
    """The opposite of the two tests below: read, read, write, write."""
    first, second = await connect(), await connect()
    (one, _), (other, _) = await account(first), await account(second)
    await first.execute("update accounts set balance = $1 where id = 1", one + 1)
    await second.execute("update accounts set balance = $1 where id = 1", other + 1)
    assert (await account(first))[0] == 101


async def test_on_a_hot_row_no_update_is_lost_and_everybody_gets_through(connect: Connect) -> None:
    retry = Retry(attempts=10**6, base=0.001, cap=0.05)
    lost = [0] * TASKS

    async def work(number: int) -> None:
        connection = await connect()
        for _ in range(EACH):
            failures = 0
            while True:
                balance, version = await account(connection)
                try:
                    await update_versioned(
                        connection, "accounts", {"id": 1}, expected=version, set={"balance": balance + 1}
                    )
                    break
                except Stale as error:
                    lost[number] += 1
                    failures += 1
                    await asyncio.sleep(retry.delay_seconds(error, failures, random.random()) or 0)

    await asyncio.gather(*[work(number) for number in range(TASKS)])
    assert await account(await connect()) == (100 + TASKS * EACH, TASKS * EACH)
    # Each loss stands for another's success since the row was read, and no success is behind two losses of one task.
    assert max(lost) <= (TASKS - 1) * EACH


async def test_limit_update_without_a_fresh_read_stays_stale(
    connection: asyncpg.Connection,
) -> None:
    await update_versioned(connection, "accounts", {"id": 1}, expected=0, set={"balance": 1})
    for _ in range(5):
        with pytest.raises(Stale):
            await update_versioned(connection, "accounts", {"id": 1}, expected=0, set={"balance": 2})


async def test_limit_a_writer_that_leaves_the_version_alone_is_overwritten(connection: asyncpg.Connection) -> None:
    balance, version = await account(connection)
    await connection.execute("update accounts set balance = 1000 where id = 1")
    await update_versioned(connection, "accounts", {"id": 1}, expected=version, set={"balance": balance + 1})
    assert await account(connection) == (101, 1)


async def test_row_lock_loses_no_update_and_needs_no_second_try(connect: Connect) -> None:
    attempts = 0

    async def work() -> None:
        nonlocal attempts
        connection = await connect()
        for _ in range(EACH):
            attempts += 1
            async with connection.transaction():
                balance = await connection.fetchval("select balance from accounts where id = 1 for update")
                await connection.execute("update accounts set balance = $1 where id = 1", balance + 1)

    await asyncio.gather(*[work() for _ in range(TASKS)])
    assert attempts == TASKS * EACH
    assert (await account(await connect()))[0] == 100 + TASKS * EACH
