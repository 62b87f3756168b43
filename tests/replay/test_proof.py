"""What PostgreSQL's statistics of a transaction count, and what they omit.

consumer/testing and replay/chunk_check.py rely on it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from consumer import Misconfigured
from consumer.replay.effects import Rows, check_countable, rows_written, sequences_moved, wrote_anything

TABLES = """
create schema consumer;
create table consumer.ours (id int);
create table things (id int primary key, name text);
create schema "My Schema";
create table "My Schema"."Odd.Table" (id int);
create table parts (id int) partition by range (id);
create table parts_low partition of parts for values from (0) to (10);
create table parts_high partition of parts for values from (10) to (20);
create table numbered (id int generated always as identity, name text);
create sequence counted;
create sequence "My Schema"."Odd Sequence";
create sequence consumer.ours_too;
"""


@pytest.fixture
async def connection(database: str) -> AsyncIterator[Any]:
    first = await asyncpg.connect(database)
    await first.execute(TABLES)
    await first.close()
    connection = await asyncpg.connect(database)  # a session that has written nothing yet
    yield connection
    await connection.close()


async def written(connection: Any, *statements: str) -> dict[str, Rows]:
    """What the statements write in one transaction, which is undone."""
    await connection.execute("begin")
    try:
        before = await rows_written(connection)
        for statement in statements:
            await connection.execute(statement)
        return await rows_written(connection, before)
    finally:
        await connection.execute("rollback")


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        (["select 1"], {}),
        (["insert into things select generate_series(1, 3)"], {"public.things": Rows(3, 0, 0)}),
        (["insert into things values (1)", "update things set name = 'a'"], {"public.things": Rows(1, 1, 0)}),
        (
            ["insert into things select generate_series(1, 5)", "delete from things where id < 3"],
            {"public.things": Rows(5, 0, 2)},
        ),
        (["insert into things values (1)", "insert into things values (1) on conflict do nothing"],
         {"public.things": Rows(1, 0, 0)}),
        (["insert into things values (1)", "insert into things values (1) on conflict (id) do update set name = 'b'"],
         {"public.things": Rows(1, 1, 0)}),
        (["update things set name = 'a'"], {}),  # of no row
        (["merge into things using (values (1)) v (id) on v.id = things.id when not matched then insert values (v.id)"],
         {"public.things": Rows(1, 0, 0)}),
        (['insert into "My Schema"."Odd.Table" values (1)'], {'"My Schema"."Odd.Table"': Rows(1, 0, 0)}),
        (["insert into parts values (1), (2), (11)"],
         {"public.parts_low": Rows(2, 0, 0), "public.parts_high": Rows(1, 0, 0)}),
        (["insert into parts values (1)", "update parts set id = 11"],
         {"public.parts_low": Rows(1, 0, 1), "public.parts_high": Rows(1, 0, 0)}),
        (["insert into consumer.ours values (1)"], {}),
        (["select * from things for update"], {}),
        (["savepoint a", "insert into things values (1)", "rollback to savepoint a"],
         {"public.things": Rows(1, 0, 0)}),  # written, though not kept
    ],
)  # fmt: skip
async def test_rows_are_counted(connection: Any, statements: list[str], expected: dict[str, Rows]) -> None:
    assert await written(connection, *statements) == expected


async def test_copy_is_counted(connection: Any) -> None:
    await connection.execute("begin")
    await connection.copy_records_to_table("things", records=[(1, "a"), (2, "b")])
    assert await rows_written(connection) == {"public.things": Rows(2, 0, 0)}


async def test_a_long_value_counts_once_for_its_table(connection: Any) -> None:
    long = "insert into things select 1, string_agg(md5(n::text), '') from generate_series(1, 5000) n"
    assert await written(connection, long) == {"public.things": Rows(1, 0, 0)}


async def test_truncate_and_other_ddl_show_in_the_catalogs(connection: Any) -> None:
    await connection.execute("insert into things values (1)")
    effects = await written(connection, "truncate things")
    assert list(effects) == ["pg_catalog.pg_class"] and effects["pg_catalog.pg_class"].updated
    effects = await written(connection, "create table made (id int)")
    assert effects["pg_catalog.pg_class"].inserted == 1 and "pg_catalog.pg_attribute" in effects


async def test_temporary_tables_have_one_name_in_every_session(connection: Any) -> None:
    effects = await written(connection, "create temp table scratch (id int)", "insert into scratch values (1)")
    assert effects["pg_temp.scratch"] == Rows(1, 0, 0)
    assert "pg_catalog.pg_class" in effects


async def test_writes_of_earlier_transactions_of_the_session_are_subtracted(connection: Any) -> None:
    await connection.execute("insert into things select generate_series(1, 7)")
    await written(connection, "insert into things values (8)")  # rolled back, and counted all the same
    await connection.execute("begin")
    before = await rows_written(connection)
    assert before == {"public.things": Rows(8, 0, 0)}, "PostgreSQL hands counts on at once now: `since` is not needed"
    assert await rows_written(connection, before) == {}
    await connection.execute("delete from things where id < 3")
    assert await rows_written(connection, before) == {"public.things": Rows(0, 0, 2)}


async def test_another_session_is_not_counted(connection: Any, database: str) -> None:
    other = await asyncpg.connect(database)
    try:
        await connection.execute("begin")
        await other.execute("insert into things values (1)")
        assert await rows_written(connection) == {}
    finally:
        await other.close()


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("select 1", False),
        ("select * from things", False),
        ("update things set name = 'a' where id = 77", False),
        ("insert into things values (1) on conflict do nothing", False),  # lost: how a claim of a duplicate looks
        ("insert into things values (2)", True),
        ("select * from things for update", True),
        ("truncate things", True),
        ("create temp table scratch (id int)", True),
        ("insert into consumer.ours values (1)", True),
        ("select pg_advisory_xact_lock(1)", False),
    ],
)
async def test_a_transaction_that_writes_or_locks_has_an_id(connection: Any, statement: str, expected: bool) -> None:
    await connection.execute("insert into things values (1)")
    await connection.execute("begin")
    assert not await wrote_anything(connection)
    await connection.execute(statement)
    assert await wrote_anything(connection) is expected


async def test_a_transaction_that_undid_everything_still_has_its_id(connection: Any) -> None:
    await connection.execute("begin")
    await connection.execute("savepoint a")
    await connection.execute("insert into things values (1)")
    await connection.execute("rollback to savepoint a")
    assert await wrote_anything(connection)


async def test_sequences_that_this_session_has_moved(connection: Any, database: str) -> None:
    assert await sequences_moved(connection) == []
    other = await asyncpg.connect(database)
    try:
        await other.execute("select nextval('counted')")
    finally:
        await other.close()
    await connection.execute("begin")
    await connection.execute("insert into numbered (name) values ('a')")
    await connection.execute("""select nextval('"My Schema"."Odd Sequence"'), nextval('consumer.ours_too')""")
    await connection.execute("rollback")  # which takes no number back
    assert await sequences_moved(connection) == ['"My Schema"."Odd Sequence"', "public.numbered_id_seq"]
    await connection.execute("select setval('counted', 50)")
    assert "public.counted" in await sequences_moved(connection)
    assert not connection.is_in_transaction()
    assert await connection.fetchval("select current_setting('consumer.sequences_moved', true)") in (None, "")


async def test_sequences_that_one_may_not_look_at_are_left_out(connection: Any) -> None:
    await connection.execute("select nextval('counted'), nextval('numbered_id_seq')")
    await connection.execute("create role looker; grant usage on sequence counted to looker; set role looker")
    try:
        assert await sequences_moved(connection) == ["public.counted"]
    finally:
        await connection.execute("reset role; drop owned by looker; drop role looker")


async def test_a_server_that_does_not_count_is_refused(connection: Any) -> None:
    await check_countable(connection, "PostgreSQL at here/db")
    await connection.execute("set track_counts = off")
    with pytest.raises(
        Misconfigured, match="PostgreSQL at here/db: it does not count written rows; turn track_counts on"
    ):
        await check_countable(connection, "PostgreSQL at here/db")


def test_rows_read_as_a_sentence() -> None:
    assert str(Rows(2, 0, 1)) == "2 inserted, 1 deleted"
    assert str(Rows(0, 0, 0)) == "nothing"
    assert Rows(2, 3, 4).total == 9
