"""One row for one business key; and what that does not do.

On a real PostgreSQL.
"""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from harness import until
from scheme_database import Connect

from consumer import ConsumerError
from consumer.schemes.database import Misfit
from consumer.schemes.unique import insert_once

TABLES = """
create table invoices (number text, year int, amount bigint not null, note text, primary key (number, year));
create table accounts (id int primary key, balance bigint not null);
insert into accounts values (1, 0);
create schema shop;
create table shop.lines (line int unique);
create table loose (id int);
create unique index on loose (id) where id > 0;
"""
KEY = ("number", "year")


@pytest.fixture(autouse=True)
async def tables(connection: asyncpg.Connection) -> None:
    await connection.execute(TABLES)


async def test_the_first_is_new_and_the_second_is_not(connection: asyncpg.Connection) -> None:
    row = {"number": "A7", "year": 2031, "amount": 5}
    assert await insert_once(connection, "invoices", row, conflict=KEY) is True
    assert await insert_once(connection, "invoices", row, conflict=KEY) is False
    assert await insert_once(connection, "invoices", {**row, "year": 2032}, conflict=KEY) is True
    assert await connection.fetchval("select count(*) from invoices") == 2


async def test_a_table_in_a_schema_and_a_key_of_one_column(connection: asyncpg.Connection) -> None:
    assert await insert_once(connection, "shop.lines", {"line": 1}, "line")
    assert not await insert_once(connection, "shop.lines", {"line": 1}, "line")


async def test_of_twenty_at_the_same_time_one_is_new(connect: Connect) -> None:
    connections = [await connect() for _ in range(20)]
    row = {"number": "A7", "year": 2031, "amount": 5}
    new = await asyncio.gather(*[insert_once(connection, "invoices", row, KEY) for connection in connections])
    assert sorted(new) == [False] * 19 + [True]


async def test_one_that_is_rolled_back_was_never_there(connect: Connect) -> None:
    first, second = await connect(), await connect()
    row = {"number": "A7", "year": 2031, "amount": 5}
    transaction = first.transaction()
    await transaction.start()
    assert await insert_once(first, "invoices", row, KEY)
    waiting = asyncio.create_task(insert_once(second, "invoices", row, KEY))
    await until("the second to wait", lambda: first.fetchval("select exists (select from pg_locks where not granted)"))
    assert not waiting.done()  # it cannot know yet
    await transaction.rollback()
    assert await waiting is True


# -- limits ---------------------------------------------------------------------------------------------------------------


async def test_limit_different_row_under_the_same_key_is_silently_dropped(
    connection: asyncpg.Connection,
) -> None:
    assert await insert_once(connection, "invoices", {"number": "A7", "year": 2031, "amount": 5}, KEY)
    assert not await insert_once(connection, "invoices", {"number": "A7", "year": 2031, "amount": 500}, KEY)
    assert await connection.fetchval("select amount from invoices") == 5


async def test_limit_statements_that_ignore_the_answer_are_doubled(
    connection: asyncpg.Connection,
) -> None:
    row = {"number": "A7", "year": 2031, "amount": 5}
    for _ in range(2):
        await insert_once(connection, "invoices", row, KEY)
        await connection.execute("update accounts set balance = balance + 5")  # without asking: doubled
    assert await connection.fetchval("select balance from accounts") == 10
    await connection.execute("truncate invoices; update accounts set balance = 0")
    for _ in range(2):
        if await insert_once(connection, "invoices", row, KEY):
            await connection.execute("update accounts set balance = balance + 5")
    assert await connection.fetchval("select balance from accounts") == 5


async def test_limit_a_deleted_row_is_new_again(connection: asyncpg.Connection) -> None:
    assert await insert_once(connection, "shop.lines", {"line": 1}, "line")
    await connection.execute("delete from shop.lines")
    assert await insert_once(connection, "shop.lines", {"line": 1}, "line")


# -- what cannot be meant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "conflict", "says"),
    [
        ({}, "number", "row: name at least one column"),
        ({"number": "A7"}, (), "conflict: name at least one column"),
        ({"number": "A7"}, KEY, "'year' is not in the row"),
        ({"number": "A7", "year": None}, KEY, "'year' is None"),
        ({"": 1}, "", "not a name"),
    ],
)
async def test_a_call_that_cannot_be_meant_is_refused_before_it_is_sent(
    connection: asyncpg.Connection, row: dict[str, Any], conflict: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        await insert_once(connection, "invoices", row, conflict)


@pytest.mark.parametrize(
    ("table", "row", "conflict", "says"),
    [
        ("invoices", {"nummer": 1}, "nummer", 'no such column .*"nummer"'),
        ("invoices", {"number": "A7", "year": 1, "amount": 1}, "number", "no unique index"),
        ("loose", {"id": 1}, "id", "no unique index"),  # a partial one: rows outside it would be doubled
        ("invoice", {"number": 1}, "number", "no such table"),
        ("shopp.lines", {"line": 1}, "line", "no such (table|schema)"),
    ],
)
async def test_table_that_does_not_fit_is_an_error_that_names_it(
    connection: asyncpg.Connection, table: str, row: dict[str, Any], conflict: Any, says: str
) -> None:
    with pytest.raises(Misfit, match=says) as raised:
        await insert_once(connection, table, row, conflict)
    assert isinstance(raised.value, ConsumerError)
    assert f"insert_once into {table}" in str(raised.value)
    assert "A7" not in str(raised.value)


async def test_errors_of_the_row_itself_are_the_databases(connection: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.NotNullViolationError):
        await insert_once(connection, "invoices", {"number": "A7", "year": 1, "amount": None}, KEY)
