"""Writes sent as arrays leave what single writes would leave."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from consumer.deferred_writes.writer import BulkWriter
from consumer.local_servers import Postgres
from consumer.transaction.scope import Scope

TABLES = """
create sequence numbers;
create table entries (place bigint generated always as identity, id uuid, name text, amount numeric, at timestamptz, raw bytea,
                      yes boolean, body jsonb, ratio float8, small int2, note varchar(40) default 'none');
create table accounts (id int primary key, kind text not null default 'a', balance bigint not null default 0,
                       limit_ bigint not null default 1000, log text not null default '');
insert into accounts (id, kind) select n, case when n % 2 = 0 then 'a' else 'b' end from generate_series(0, 19) n;
create table once (id int primary key);
-- These servers are built without ICU, which alone makes such collations: the catalog says so all the same.
create collation blind from "ucs_basic";
update pg_collation set collisdeterministic = false where collname = 'blind';
create table blind (name text collate blind primary key, count int not null default 0);
insert into blind (name) values ('Ann'), ('bob');
create table watched (id int primary key, count int not null default 0);
create function watch() returns trigger language plpgsql as $$ begin
    insert into entries (name) values ('watched'); return null; end $$;
create trigger watch after insert on watched for each statement execute function watch();
create function rows_of_tallied() returns bigint language plpgsql as $$ begin
    return (select count(*) from tallied); end $$;
create table tallied (id int, nth bigint default rows_of_tallied());
create domain few as int check (value < 5);
create table choosy (id int, few few);
create table parent (id int, count int not null default 0);
create table child () inherits (parent);
create table orders (id int primary key, ref int, state text not null default 'new', nth bigint default nextval('numbers'));
create table lines (order_id int not null references orders, name text);
create table notes (ref int, text text, nth bigint default nextval('numbers'));
create table ruled (id int);
create rule ruled as on insert to ruled do also insert into entries (name) values ('ruled');
"""
ENTRY = "insert into entries (id, name, amount, at, raw, yes, body, ratio, small) values ($1, $2, $3, $4, $5, $6, $7, $8, $9)"
ADD = "update accounts set balance = balance + $2 where id = $1"
SPEND = (
    "update accounts set balance = balance - $2, log = log || $3 || ',' where id = $1 and balance >= $2 and kind = $4"
)
BOTH = "update accounts set balance = balance + $2, limit_ = accounts.limit_ - $3, log = 'x' where id = $1"
NEXT = "update accounts set limit_ = balance where id = $1"
ONCE = "insert into once values ($1) on conflict do nothing"


class Counting:
    """A connection that counts what is executed on it."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.rows = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    async def executemany(self, sql: str, arguments: Any) -> None:
        self.rows += len(arguments)
        await self.connection.executemany(sql, arguments)


@pytest.fixture
async def connection(database: str) -> AsyncIterator[Counting]:
    plain = await asyncpg.connect(database)
    await plain.execute(TABLES)
    yield Counting(plain)
    await plain.close()


async def state(connection: Any) -> list[Any]:
    contents = []
    for table in ("entries", "accounts", "once", "blind", "watched", "tallied", "parent", "orders", "lines", "notes"):
        # The identity goes on counting where a transaction was undone: the order is what is compared.
        columns = "row_number() over (order by place), to_jsonb(t) - 'place'" if table == "entries" else "*"
        contents.append([tuple(row) for row in await connection.fetch(f"select {columns} from {table} t order by 1")])
    return contents


async def both(connection: Counting, writes: list[tuple[str, list[tuple[Any, ...]]]]) -> tuple[list[Any], list[Any]]:
    """What one execution for each row leaves, and what we leave."""
    await connection.execute("begin")
    for sql, arguments in writes:
        await connection.connection.executemany(sql, arguments)
    one_by_one = await state(connection)
    await connection.execute("rollback")
    await connection.execute("begin")
    columns = BulkWriter(connection)
    for sql, arguments in writes:
        await columns.send(sql, arguments)
    ours = await state(connection)
    await connection.execute("rollback")
    return one_by_one, ours


def random_story(chance: random.Random) -> list[tuple[str, tuple[Any, ...]]]:
    """Orders and lines as handlers write them, with keys mixed."""
    stories = []
    for key in range(chance.choice([1, 12, 60])):
        story: list[tuple[str, tuple[Any, ...]]] = [("insert into orders (id, ref) values ($1, $1)", (key,))]
        if not chance.randrange(3):
            story.insert(0, ("insert into notes (ref, text) values ($1, $2)", (key, "before")))
        for n in range(chance.randrange(6)):
            story.append(("insert into lines (order_id, name) values ($1, $2)", (key, f"line {n}")))
            story.append(("insert into notes (ref, text) values ($1, $2)", (key, f"note {n}")))
        for state in ("paid", "sent")[: chance.randrange(3)]:
            story.append(("update orders set state = state || $2 where ref = $1", (key, state)))
        if not chance.randrange(4) and not any("lines" in sql for sql, _ in story):
            # Its new id is that of no other, and its line can be there only after it.
            story.append(("update orders set id = $2 where ref = $1", (key, key + 1000)))
            story.append(("insert into lines (order_id, name) values ($1, $2)", (key + 1000, "moved")))
        if not chance.randrange(8):
            story.append(("insert into notes (ref, text) select $1, state from orders where ref = $1", (key,)))
        stories.append(story)
    mixed = []
    while stories:
        story_of_one = chance.choice(stories)
        mixed.append(story_of_one.pop(0))
        stories = [story for story in stories if story]
    return mixed


def random_writes(chance: random.Random) -> list[tuple[str, list[tuple[Any, ...]]]]:
    def entry() -> tuple[Any, ...]:
        pick = chance.choice
        return (
            pick([None, UUID(int=chance.getrandbits(128)), str(UUID(int=7))]),
            pick([None, "", "né\n'\"", "x" * chance.randrange(50)]),
            pick([None, Decimal("1.50"), 7, Decimal("NaN")]),
            pick([None, datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)]),
            pick([None, b"", b"\x00\xff"]),
            pick([None, True, False]),
            pick([None, '{"a": [1, 2]}', "[]", '"text"']),
            pick([None, 1.5, 2, float("inf")]),
            pick([None, -5, 32767]),
        )

    makers: dict[str, Any] = {
        ENTRY: entry,
        ADD: lambda: (chance.randrange(25), chance.randrange(-50, 100)),
        BOTH: lambda: (chance.randrange(25), chance.randrange(50), chance.choice([0, 3])),
        SPEND: lambda: (chance.randrange(20), chance.randrange(60), chance.choice("xyz"), chance.choice("ab")),
        NEXT: lambda: (chance.randrange(20),),
        ONCE: lambda: (chance.randrange(30),),
    }
    return [
        (sql, [makers[sql]() for _ in range(chance.choice([1, 7, 8, 40, 200]))])
        for sql in chance.choices(list(makers), k=6)
    ]


async def test_many_rows_leave_what_one_after_the_other_would(connection: Counting) -> None:
    for seed in range(40):
        one_by_one, ours = await both(connection, random_writes(random.Random(seed)))
        assert ours == one_by_one, f"seed {seed}"


async def test_writes_of_a_key_meet_each_other_in_order(connection: Counting) -> None:
    """What a statement would miss if another had run before it.

    Foreign keys, sequences and rows that are read.
    """
    seen = """select (select jsonb_agg(to_jsonb(o) order by id) from orders o),
              (select jsonb_agg(to_jsonb(l) order by order_id, name) from lines l),
              (select jsonb_agg(to_jsonb(n) order by nth) from notes n)"""
    sent_as_arrays = 0
    for seed in range(60):
        writes = random_story(random.Random(seed))
        if seed % 2:  # without the statement that fits no array, a barrier to all others
            writes = [write for write in writes if "select" not in write[0]]
        await connection.execute("begin; select setval('numbers', 1)")
        for sql, args in writes:
            await connection.execute(sql, *args)
        one_by_one = tuple(await connection.fetchrow(seen))
        await connection.execute("rollback")
        await connection.execute("begin; select setval('numbers', 1)")
        before = connection.rows
        await Scope(connection, BulkWriter(connection)).send([[write] for write in writes])
        sent_as_arrays += len(writes) - (connection.rows - before)
        ours = tuple(await connection.fetchrow(seen))
        await connection.execute("rollback")
        assert ours == one_by_one, f"seed {seed}"
    assert sent_as_arrays > 1000


async def test_inserts_and_updates_are_sent_as_arrays(connection: Counting) -> None:
    columns = BulkWriter(connection)
    await connection.execute("begin")
    await columns.send(ADD, [(n % 20, 1) for n in range(100)])
    await columns.send(ENTRY, [(None,) * 9 for _ in range(100)])
    assert connection.rows == 0
    await columns.send(SPEND, [(3, 0, "", "b")] * 100)  # one hot row: a round for each would gain nothing
    assert connection.rows == 100


UPDATED = "select n_tup_upd from pg_stat_xact_user_tables where relname = $1"


async def test_additions_to_one_row_are_sent_at_once(connection: Counting) -> None:
    columns = BulkWriter(connection)
    await connection.execute("begin")
    await columns.send(ADD, [(n % 4, n) for n in range(100)])
    assert await connection.fetchval(UPDATED, "accounts") == 4 and connection.rows == 0
    assert [row[0] for row in await connection.fetch("select balance from accounts where id < 4 order by id")] == [
        sum(range(key, 100, 4)) for key in range(4)
    ]
    # One key of both signs runs one by one, and the others do not.
    await columns.send(ADD, [(n % 4, -n if n % 8 == 3 else n) for n in range(100)])
    assert await connection.fetchval(UPDATED, "accounts") == 4 + 3 + 25
    await columns.send(ADD, [(5, 2**62), *[(5, -1)] * 19, (5, 2**62)])
    assert await connection.fetchval("select balance from accounts where id = 5") == 2**63 - 19


@pytest.mark.parametrize(
    "change",
    [
        "alter table accounts add check (balance <> 1000)",
        "create unique index on accounts (balance, id)",
        "create index on accounts ((balance / 2))",
        "create index on accounts (id) where balance > 3",
        "alter table accounts add half bigint generated always as (balance / 2) stored",
        "alter table accounts alter balance type numeric",
        "alter table accounts alter balance type float8",
    ],
)
async def test_sum_that_could_be_seen_in_between_is_added_one_by_one(connection: Counting, change: str) -> None:
    await connection.execute(change)
    await connection.execute("begin")
    await BulkWriter(connection).send(ADD, [(n % 4, 1) for n in range(40)])
    assert await connection.fetchval(UPDATED, "accounts") == 40
    assert await connection.fetchval("select balance from accounts where id = 3") == 10


async def test_trigger_on_every_change_sees_each_change() -> None:
    with Postgres({"wal_level": "logical"}) as server:
        connection = await asyncpg.connect(server.dsn())
        await connection.execute(TABLES)
        await connection.execute("begin")
        await BulkWriter(connection).send(ADD, [(n % 4, 1) for n in range(40)])
        assert await connection.fetchval(UPDATED, "accounts") == 40
        await connection.close()


async def test_a_sum_fails_where_one_of_its_parts_would(connection: Counting) -> None:
    await connection.execute("begin")
    await connection.execute("update accounts set balance = 9223372036854775800 where id = 3")
    with pytest.raises(asyncpg.NumericValueOutOfRangeError):
        await BulkWriter(connection).send(ADD, [(3, 1)] * 8)


@pytest.mark.parametrize(
    ("sql", "arguments"),
    [
        ("update blind set count = count + 1 where name = $1", [("Ann",), ("ANN",), ("bob",), ("BOB",)] * 5),
        ("insert into watched (id) values ($1)", [(n,) for n in range(20)]),
        ("insert into tallied (id) values ($1)", [(n,) for n in range(20)]),
        ("insert into choosy values ($1, $2)", [(n, n % 5) for n in range(20)]),
        ("update parent set count = count + 1 where id = $1", [(n,) for n in range(20)]),
        ("insert into ruled values ($1)", [(n,) for n in range(20)]),
        ("update accounts set balance = balance + 1 where id = $1::text::int", [(str(n),) for n in range(20)]),
    ],
)
async def test_tables_that_could_notice_are_written_row_by_row(
    connection: Counting, sql: str, arguments: list[tuple[Any, ...]]
) -> None:
    one_by_one, ours = await both(connection, [(sql, arguments)])
    assert ours == one_by_one
    assert connection.rows == len(arguments)


async def test_an_alias_that_collides_only_costs_the_speed(connection: Counting) -> None:
    await connection.execute("create table odd (id int primary key, consumer_c1 int)")
    await connection.execute("insert into odd select n, 0 from generate_series(0, 19) n")
    await connection.execute("begin")
    columns = BulkWriter(connection)
    # The name of our own column, ambiguous in the statement that we make: seen when it is prepared, and given up.
    await columns.send("update odd set consumer_c1 = consumer_c1 + 1 where id = $1", [(n,) for n in range(20)])
    assert connection.rows == 20
    assert await connection.fetchval("select sum(consumer_c1) from odd") == 20
    await connection.execute("commit")


async def test_error_of_postgresql_is_raised(connection: Counting) -> None:
    columns = BulkWriter(connection)
    cases: list[tuple[str, list[tuple[Any, ...]], type[Exception]]] = [
        ("insert into once values ($1)", [(1,)] * 20, asyncpg.UniqueViolationError),
        ("insert into missing values ($1)", [(1,)] * 20, asyncpg.UndefinedTableError),
        ("insert into once values ($1)", [("a",)] * 20, asyncpg.DataError),
        ("insert into once values ($1)", [(2**40,)] * 20, asyncpg.DataError),
    ]
    for sql, arguments, expected in cases:
        await connection.execute("begin")
        with pytest.raises(expected):
            await columns.send(sql, arguments)
        await connection.execute("rollback")


async def test_a_trigger_made_later_is_seen_when_the_table_is_looked_at_again(connection: Counting) -> None:
    now = 0.0
    columns = BulkWriter(connection, clock=lambda: now)
    rows = [(n,) for n in range(20)]
    await connection.execute("begin")
    await columns.send(ONCE, rows)
    await connection.execute(
        "create trigger watch after insert on once for each statement execute function watch(); delete from once"
    )
    now += 61
    await columns.send(ONCE, rows)
    assert await connection.fetchval("select count(*) from entries where name = 'watched'") == 20
