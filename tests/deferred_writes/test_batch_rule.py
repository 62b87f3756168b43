"""A batch leaves what its messages leave one after the other.

Each case is a schema and the writes of some messages. The same messages go through `Scope` in one transaction, and through a
plain connection in a transaction each, on another database with the same schema.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import pytest

from consumer.deferred_writes import writer
from consumer.deferred_writes.catalog import NotBatchedReason
from consumer.deferred_writes.writer import BulkWriter
from consumer.transaction.scope import Scope

Message: TypeAlias = list[tuple[str, tuple[Any, ...]]]
A = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"


class Counting:
    """A connection that counts what is sent."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.statements = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    async def execute(self, sql: str, *args: Any) -> Any:
        self.statements += "savepoint consumer_columns" not in sql
        return await self.connection.execute(sql, *args)

    async def executemany(self, sql: str, args: Any) -> None:
        self.statements += len(args)
        await self.connection.executemany(sql, args)


class Sending:
    """What Scope knows of a message: its writes."""

    is_open, placed, touched = False, False, False

    def __init__(self, writes: Message) -> None:
        self.writes = writes


@asynccontextmanager
async def connected(dsn: str, schema: str) -> AsyncIterator[Any]:
    """A connection of its own: the driver remembers types and statements."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("drop schema public cascade; create schema public")
        await connection.execute(schema)
        yield connection
    finally:
        await connection.close()


async def dump(connection: Any) -> dict[str, list[str]]:
    """All rows of all tables of the schema that comes first."""
    names = await connection.fetch(
        "select relname from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r' order by 1"
    )
    clocks = "order_of_all"
    if await connection.fetchval("select to_regclass($1)", clocks):
        return {clocks: [str(row) for row in await connection.fetch(f"select n, what, rank from {clocks} order by 3")]}
    return {
        name: sorted(row[0] for row in await connection.fetch(f'select t::text from public."{name}" t'))
        for (name,) in names
    }


async def one_by_one(connection: Any, messages: Sequence[Message]) -> tuple[dict[str, list[str]], bool]:
    """What is left, and whether one of the messages failed."""
    for message in messages:
        try:
            async with connection.transaction():
                for sql, args in message:
                    await connection.execute(sql, *args)
        except asyncpg.PostgresError:
            return await dump(connection), True
    return await dump(connection), False


async def batched(connection: Any, messages: Sequence[Message]) -> tuple[dict[str, list[str]], bool, int]:
    """Return what is left, whether the batch failed, and its executions."""
    counting = Counting(connection)
    asked = BulkWriter(counting)
    await connection.execute("begin")
    scope = Scope(counting, asked)
    scope.deferred = [Sending(message) for message in messages]  # type: ignore[misc]
    try:
        await scope.flush()
        await connection.execute("commit")
    except asyncpg.PostgresError:
        await connection.execute("rollback")
        return {}, True, counting.statements
    return await dump(connection), False, counting.statements


async def assert_equal(dsn: str, schema: str, messages: Sequence[Message]) -> int:
    """Compare both ways, and return how many executions the batch sent.

    A batch that fails runs again one message at a time, as in production.
    """
    async with connected(dsn, schema) as connection:
        left, failed = await one_by_one(connection, messages)
    async with connected(dsn, schema) as connection:
        ours, ours_failed, statements = await batched(connection, messages)
    if failed:
        assert ours_failed, "a message fails alone, and not in the batch"
    else:
        assert not ours_failed, "no message fails alone"
        assert ours == left
    return statements


def same_writes(count: int, *writes: tuple[str, Callable[[int], tuple[Any, ...]]]) -> list[Message]:
    """Messages with the same writes, whose arguments depend on their number."""
    return [[(sql, args(n)) for sql, args in writes] for n in range(count)]


ORDERS = """create table orders (id bigserial primary key, customer int);
            create table items (order_id bigint, name int);"""
STOCK = "create table stock (sku int primary key, quantity int not null default 0, note text);"
ACCOUNTS = "create table accounts (id int primary key, balance bigint not null default 0); insert into accounts select generate_series(0, 9);"

CASES: dict[str, tuple[str, list[Message]]] = {
    "currval": (
        ORDERS,
        same_writes(
            20,
            ("insert into orders (customer) values ($1)", lambda n: (n,)),
            ("insert into items values (currval('orders_id_seq'), $1)", lambda n: (n,)),
        ),
    ),
    "lastval": (
        ORDERS,
        same_writes(
            20,
            ("insert into orders (customer) values ($1)", lambda n: (n,)),
            ("insert into items select lastval(), $1", lambda n: (n,)),
        ),
    ),
    "default currval": (
        "create sequence s; create table orders (id bigint default nextval('s'), customer int);"
        "create table items (order_id bigint default currval('s'), name int);",
        same_writes(
            20,
            ("insert into orders (customer) values ($1)", lambda n: (n,)),
            ("insert into items (name) values ($1)", lambda n: (n,)),
        ),
    ),
    "default lastval": (
        "create table orders (id bigserial, customer int); create table items (order_id bigint default lastval(), name int);",
        same_writes(
            20,
            ("insert into orders (customer) values ($1)", lambda n: (n,)),
            ("insert into items (name) values ($1)", lambda n: (n,)),
        ),
    ),
    "identity and lastval": (
        "create table orders (id bigint generated always as identity, customer int);"
        "create table items (order_id bigint, name int);",
        same_writes(
            20,
            ("insert into orders (customer) values ($1)", lambda n: (n,)),
            ("insert into items values (lastval(), $1)", lambda n: (n,)),
        ),
    ),
    "a sequence that two tables share": (
        "create sequence s; create table a (id bigint default nextval('s'), x int); create table b (id bigint default nextval('s'), x int);",
        same_writes(
            20, ("insert into a (x) values ($1)", lambda n: (n,)), ("insert into b (x) values ($1)", lambda n: (n,))
        ),
    ),
    "two inserts that take numbers of one table": (
        "create table t (k int, n int, id bigint generated always as identity);",
        same_writes(
            20,
            ("insert into t (k, n) values ($1, $2)", lambda n: (n, n)),
            ("insert into t (k) values ($1) on conflict do nothing", lambda n: (n + 1,)),
        ),
    ),
    "two tables that note the time": (
        "create table a (n int, at timestamptz default clock_timestamp()); create table b (n int, at timestamptz default clock_timestamp());"
        "create view order_of_all as select n, what, rank() over (order by at) from (select *, 'a' what from a union all select *, 'b' from b) q;",
        same_writes(
            20, ("insert into a (n) values ($1)", lambda n: (n,)), ("insert into b (n) values ($1)", lambda n: (n,))
        ),
    ),
    "delete and insert": (
        "create table lines (cart int, name int);",
        same_writes(
            20,
            ("delete from lines where cart = $1", lambda n: (n % 3,)),
            ("insert into lines values ($1, $2)", lambda n: (n % 3, n)),
        ),
    ),
    "update, and insert where it met no row": (
        STOCK,
        same_writes(
            20,
            ("update stock set quantity = quantity + $2 where sku = $1", lambda n: (n % 4, n)),
            (
                "insert into stock (sku, quantity) select $1, $2 where not exists (select from stock where sku = $1)",
                lambda n: (n % 4, n),
            ),
        ),
    ),
    "update, and insert on conflict do nothing": (
        STOCK,
        same_writes(
            20,
            ("update stock set quantity = quantity + $2 where sku = $1", lambda n: (n % 4, n)),
            ("insert into stock (sku, quantity) values ($1, $2) on conflict do nothing", lambda n: (n % 4, n)),
        ),
    ),
    "swap of unique places": (
        "create table places (name int primary key, place int unique); insert into places select n, n from generate_series(0, 19) n;",
        [
            *same_writes(20, ("update places set place = $2 where name = $1", lambda n: (n, n + 100))),
            *same_writes(20, ("update places set place = $2 where name = $1", lambda n: (n, 19 - n))),
        ],
    ),
    "swap that fails alone": (
        "create table places (name int primary key, place int unique); insert into places select n, n from generate_series(0, 19) n;",
        same_writes(20, ("update places set place = $2 where name = $1", lambda n: (n, (n + 1) % 20))),
    ),
    "a child before its parent": (
        "create table nodes (id int primary key, parent int references nodes);",
        same_writes(20, ("insert into nodes values ($1, $2)", lambda n: (19 - n, 18 - n if n < 19 else None))),
    ),
    "a child before its parent in another table": (
        "create table parents (id int primary key); create table children (parent int references parents);",
        same_writes(
            20,
            ("insert into children values ($1)", lambda n: (n + 1,)),
            ("insert into parents values ($1)", lambda n: (n + 1,)),
        ),
    ),
    "a parent that goes with its children": (
        "create table parents (id int primary key); create table children (parent int references parents on delete cascade, n int);"
        "insert into parents select generate_series(0, 3);",
        same_writes(
            20,
            ("insert into children values ($1, $2)", lambda n: (n % 4, n)),
            ("delete from parents where id = $1", lambda n: (n % 4 if n > 15 else 99,)),
        )[:17],
    ),
    "a trigger that reads another table": (
        ACCOUNTS
        + """create table log (n int, total numeric);
        create function note() returns trigger language plpgsql as $$ begin
            new.total := (select sum(balance) from accounts); return new; end $$;
        create trigger note before insert on log for each row execute function note();""",
        same_writes(
            20,
            ("insert into log (n) values ($1)", lambda n: (n,)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
        ),
    ),
    "a trigger for updates of the column that is updated": (
        ACCOUNTS
        + """create table log (id int primary key, n int default 0, other int, total numeric);
        insert into log select generate_series(0, 19);
        create function note() returns trigger language plpgsql as $$ begin
            new.total := (select sum(balance) from accounts); return new; end $$;
        create trigger note before update of other, n on log for each row execute function note();""",
        same_writes(
            20,
            ("update log set n = n + $2 where id = $1", lambda n: (n, 1)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
        ),
    ),
    "a trigger for updates of a column that is generated from the updated one": (
        ACCOUNTS
        + """create table log (id int primary key, n int default 0, double int generated always as (n * 2) stored, total numeric);
        insert into log select generate_series(0, 19);
        create function note() returns trigger language plpgsql as $$ begin
            new.total := (select sum(balance) from accounts); return new; end $$;
        create trigger note before update of double on log for each row execute function note();""",
        same_writes(
            20,
            ("update log set n = n + $2 where id = $1", lambda n: (n, 1)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
        ),
    ),
    "a row that moves to a partition with a trigger for new rows": (
        ACCOUNTS
        + """create table log (id int, part int, total numeric) partition by list (part);
        create table log0 partition of log for values in (0); create table log1 partition of log for values in (1);
        insert into log select n, 0 from generate_series(0, 19) n;
        create function note() returns trigger language plpgsql as $$ begin
            new.total := (select sum(balance) from accounts); return new; end $$;
        create trigger note before insert on log1 for each row execute function note();""",
        same_writes(
            20,
            ("update log set part = $2 where id = $1", lambda n: (n, 1)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
        ),
    ),
    "a default that reads another table": (
        ACCOUNTS
        + """create function total() returns numeric language sql as 'select sum(balance) from accounts';
        create table log (n int, total numeric default total());""",
        same_writes(
            20,
            ("insert into log (n) values ($1)", lambda n: (n,)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
        ),
    ),
    "a check that reads another table": (
        ACCOUNTS
        + """create function total() returns numeric language sql as 'select sum(balance) from accounts';
        create table log (n int check (n > total()));""",
        same_writes(
            20,
            ("insert into log (n) values ($1)", lambda n: (1000 + n,)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
        ),
    ),
    "a domain that reads another table": (
        ACCOUNTS
        + """create function total() returns numeric language sql as 'select sum(balance) from accounts';
        create domain more as int check (value >= total());
        create table log (n more);""",
        same_writes(
            20,
            ("insert into log (n) values ($1)", lambda n: (sum(range(n)),)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
        ),
    ),
    "a cast of the user's own": (
        ACCOUNTS
        + """create type mark as (n int); create table log (n int, at mark);
        create function marked(int) returns mark language sql as 'select row(sum(balance)::int)::mark from accounts';
        create cast (int as mark) with function marked(int) as assignment;""",
        same_writes(
            20,
            ("insert into log values ($1, $2::int)", lambda n: (n, n)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
        ),
    ),
    "a function called like a column": (
        ACCOUNTS
        + """create table log (id int primary key, n numeric); insert into log select generate_series(0, 19);
        create function seen(log) returns numeric language sql as 'select sum(balance) from accounts';""",
        same_writes(
            20,
            ("update log set n = log.seen where id = $1", lambda n: (n,)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
        ),
    ),
    "an operator of the user's own": (
        ACCOUNTS
        + """create table log (id int primary key, n numeric, t text default '5'); insert into log select generate_series(0, 19);
        create function seen(text, int) returns numeric language sql as 'select sum(balance) from accounts';
        create operator + (leftarg = text, rightarg = int, function = seen);""",
        same_writes(
            20,
            ("update log set n = t + 1 where id = $1", lambda n: (n,)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
        ),
    ),
    "a function that overloads a built-in one": (
        ACCOUNTS
        + """create table log (id int primary key, n numeric, t text default '5'); insert into log select generate_series(0, 19);
        create function abs(text) returns numeric language sql as 'select sum(balance) from accounts';""",
        same_writes(
            20,
            ("update log set n = abs(t) where id = $1", lambda n: (n,)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
        ),
    ),
    "a view": (
        ACCOUNTS + "create view rich as select * from accounts where balance > 5;",
        same_writes(
            30,
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
            ("update rich set balance = 0 where id = $1", lambda n: (n % 3,)),
        ),
    ),
    "a rule": (
        ACCOUNTS + "create table log (n numeric); create table seen (id int);"
        "create rule note as on insert to seen do also insert into log select sum(balance) from accounts;",
        same_writes(
            20,
            ("insert into seen values ($1)", lambda n: (n,)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
        ),
    ),
    "a parent by inheritance": (
        "create table a (id int, n int default 0); create table b () inherits (a); insert into b select generate_series(0, 3);",
        same_writes(
            20,
            ("update a set n = n * 2 where id = $1", lambda n: (n % 4,)),
            ("update b set n = n + 1 where id = $1", lambda n: (n % 4,)),
        ),
    ),
    "a partition and its parent": (
        "create table a (id int, n int) partition by list (id); create table a1 partition of a for values in (0, 1);"
        "create table a2 partition of a default; insert into a select generate_series(0, 3), 0;",
        same_writes(
            20,
            ("update a set n = n * 2 where id = $1", lambda n: (n % 4,)),
            ("update a1 set n = n + 1 where id = $1", lambda n: (n % 4,)),
        ),
    ),
    "deferred constraint that a later message repairs": (
        "create table parents (id int primary key);"
        "create table children (parent int references parents deferrable initially deferred);",
        same_writes(
            20,
            ("insert into children values ($1)", lambda n: (1,)),
            ("insert into parents values ($1)", lambda n: (n,)),
        ),
    ),
    "set constraints": (
        "create table parents (id int primary key);"
        "create table children (parent int references parents deferrable initially immediate);",
        [
            [
                ("set constraints all deferred", ()),
                ("insert into children values ($1)", (1,)),
                ("insert into parents values ($1)", (1,)),
            ],
            [("insert into children values ($1)", (2,)), ("insert into parents values ($1)", (2,))],
        ],
    ),
    "ddl among the writes": (
        "create table log (n int); create table a (id int);",
        [
            *same_writes(10, ("insert into a values ($1)", lambda n: (n,))),
            [
                (
                    "create function note() returns trigger language plpgsql as $$ begin insert into log values (new.id); return null; end $$",
                    (),
                ),
                ("create trigger note after insert on a for each statement when (true) execute function note()", ()),
                ("drop trigger note on a", ()),
                ("create trigger note after insert on a for each row execute function note()", ()),
            ],
            *same_writes(10, ("insert into a values ($1)", lambda n: (n,))),
        ],
    ),
    "a temporary table that shadows another": (
        "create table a (id int);",
        [
            *same_writes(10, ("insert into a values ($1)", lambda n: (n,))),
            [
                ("create temp table a (id int) on commit drop", ()),
                ("insert into a values ($1)", (99,)),
                ("drop table pg_temp.a", ()),
            ],
            *same_writes(10, ("insert into a values ($1)", lambda n: (n,))),
        ],
    ),
    "a column that is added": (
        "create table a (id int);",
        [
            *same_writes(10, ("insert into a (id) values ($1)", lambda n: (n,))),
            [("alter table a add extra int", ())],
            *same_writes(10, ("insert into a (id, extra) values ($1, $1)", lambda n: (n,))),
        ],
    ),
    "several commands in one text": (
        "create table a (n int default 0); insert into a values (0);",
        same_writes(20, ("update a set n = n + 1; update a set n = n * 2", lambda n: ())),
    ),
    "spellings of one uuid": (
        "create table accounts (id uuid primary key, balance bigint not null default 0);"
        f"insert into accounts values ('{A}');",
        same_writes(
            100,
            (
                "update accounts set balance = balance + $2 where id = $1",
                lambda n: ([A, A.upper(), A.replace("-", ""), UUID(A)][n % 4], n),
            ),
        ),
    ),
    "spellings of one uuid in two statements": (
        "create table accounts (id uuid primary key, balance bigint not null default 0);"
        f"insert into accounts values ('{A}');",
        same_writes(
            40,
            ("update accounts set balance = balance + $2 where id = $1", lambda n: ([A, A.upper()][n % 2], n)),
            ("update accounts set balance = balance * 2 - $2 where id = $1", lambda n: ([A.upper(), A][n % 2], n)),
        ),
    ),
    "numeric keys": (
        "create table accounts (id numeric primary key, balance bigint not null default 0); insert into accounts values (1);",
        same_writes(
            40,
            (
                "update accounts set balance = balance + $2 where id = $1",
                lambda n: ([1, Decimal("1.0"), Decimal("1.00"), "1"][n % 4], n),
            ),
        ),
    ),
    "instants in several time zones": (
        "create table accounts (id timestamptz primary key, n int not null default 0); insert into accounts values ('2026-01-01T00:00Z');",
        same_writes(
            40,
            (
                "update accounts set n = n * 3 % 1000 + $2 where id = $1",
                lambda n: (
                    datetime(2026, 1, 1, tzinfo=UTC).astimezone(timezone(timedelta(hours=n % 5))),
                    n,
                ),
            ),
        ),
    ),
    "padded characters": (
        "create table accounts (id char(4) primary key, n int not null default 0); insert into accounts values ('a');",
        same_writes(
            40, ("update accounts set n = n * 3 % 1000 + $2 where id = $1", lambda n: ("a" + " " * (n % 4), n))
        ),
    ),
    "text cut to its length": (
        "create table seen (id varchar(2) primary key, n int);",
        same_writes(
            40,
            (
                "insert into seen (id, n) values ($1, $2) on conflict (id) do update set n = seen.n * 2 % 1000 + excluded.n",
                lambda n: ("ab" + " " * (n % 4), n),
            ),
        ),
    ),
    "floats without a sign": (
        "create table accounts (id float8 primary key, n int not null default 0); insert into accounts values (0), ('NaN');",
        same_writes(
            40,
            (
                "update accounts set n = n * 3 % 1000 + $2 where id = $1",
                lambda n: ([0.0, -0.0, float("nan")][n % 3], n),
            ),
        ),
    ),
    "an upsert that meets a row twice": (
        STOCK,
        same_writes(
            40,
            (
                "insert into stock (sku, quantity) values ($1, $2) on conflict (sku) do update set quantity = stock.quantity * 2 % 1000 + $2, note = excluded.sku || 'x'",
                lambda n: (n % 7, n),
            ),
        ),
    ),
    "an upsert with a condition": (
        STOCK,
        same_writes(
            40,
            (
                "insert into stock as s (sku, quantity) values ($1, $2) on conflict (sku) do update set quantity = excluded.quantity where s.quantity < $2 - 1",
                lambda n: (n % 7, (n * 13) % 40),
            ),
        ),
    ),
    "an upsert beside a second unique index": (
        "create table t (a int primary key, b int unique, n int default 0);",
        same_writes(
            40,
            (
                "insert into t (a, b) values ($1, $2) on conflict (a) do update set n = t.n + 1, b = excluded.b",
                lambda n: (n % 5, n),
            ),
        ),
    ),
    "an upsert that takes numbers": (
        "create table t (a int primary key, n int default 0, id bigserial);",
        same_writes(
            40,
            ("insert into t (a) values ($1) on conflict (a) do update set n = t.n + 1", lambda n: ((n * 7) % 30,)),
        ),
    ),
    "an upsert whose value is rounded": (
        "create table t (a int primary key, n numeric(8, 1) default 0);",
        same_writes(
            40,
            (
                "insert into t (a, n) values ($1, $2) on conflict (a) do update set n = t.n + $2",
                lambda n: (n % 3, Decimal("0.26")),
            ),
        ),
    ),
    "two statements on one table": (
        STOCK + "insert into stock select generate_series(0, 9);",
        same_writes(
            40,
            ("update stock set quantity = quantity + $2 where sku = $1", lambda n: (n % 10, n)),
            ("update stock set quantity = quantity * 2 % 1000 where sku = $1", lambda n: ((n * 3) % 10,)),
        ),
    ),
    "a condition on what another statement changes": (
        STOCK + "insert into stock select generate_series(0, 3);",
        same_writes(
            40,
            ("update stock set note = $2 where sku = $1 and quantity < 10", lambda n: (n % 4, str(n))),
            ("update stock set quantity = quantity + 1 where sku = $1", lambda n: ((n + 1) % 4,)),
        ),
    ),
    "values without a key": (
        STOCK + "insert into stock select generate_series(0, 3);",
        same_writes(
            40,
            ("update stock set quantity = quantity + $2 where sku = $1", lambda n: (None if n % 5 == 0 else n % 4, n)),
            ("update stock set quantity = quantity * 2 % 1000 where sku = $1", lambda n: (n % 4,)),
        ),
    ),
    "exclusion of overlaps": (
        "create table t (id int primary key, span int4range, exclude using gist (span with &&)); insert into t select n, int4range(n, n + 1) from generate_series(0, 9) n;",
        [
            *same_writes(10, ("update t set span = int4range($2, $2 + 1) where id = $1", lambda n: (n, 100 + n))),
            *same_writes(10, ("update t set span = int4range($2, $2 + 1) where id = $1", lambda n: (n, 9 - n))),
        ],
    ),
    "a generated column": (
        "create table t (id int primary key, n int not null default 0, twice int generated always as (n * 2) stored);"
        "insert into t select generate_series(0, 9);",
        same_writes(40, ("update t set n = n + $2 where id = $1", lambda n: (n % 10, n))),
    ),
    "a key that is generated": (
        "create table t (n int not null default 0, twice int generated always as (n * 2) stored); insert into t select generate_series(0, 9);",
        same_writes(40, ("update t set n = n + 1 where twice = $1", lambda n: ((n * 7) % 20 // 2 * 2,))),
    ),
    "a unique column that is generated": (
        "create table t (id int primary key, n int not null, twice int generated always as (n * 2) stored unique);"
        "insert into t select n, n from generate_series(0, 19) n;",
        [
            *same_writes(20, ("update t set n = $2 where id = $1", lambda n: (n, n + 100))),
            *same_writes(20, ("update t set n = $2 where id = $1", lambda n: (n, 119 - n + 100))),
            *same_writes(20, ("update t set n = $2 where id = $1", lambda n: (19 - n, 300 - n))),
        ],
    ),
    "a reference that is generated": (
        "create table parents (id int primary key); insert into parents values (0);"
        "create table children (id int primary key, n int default 0, parent int generated always as (n) stored references parents);"
        "insert into children select n, 0 from generate_series(0, 19) n;",
        same_writes(
            20,
            ("update children set n = $2 where id = $1", lambda n: (n, n)),
            ("insert into parents values ($1)", lambda n: (n + 1,)),
        ),
    ),
    "a reference that is generated and missing": (
        "create table parents (id int primary key); insert into parents values (0);"
        "create table children (id int primary key, n int default 0, parent int generated always as (n) stored references parents);"
        "insert into children select n, 0 from generate_series(0, 19) n;",
        same_writes(
            20,
            ("update children set n = $2 where id = $1", lambda n: (n, n + 1)),
            ("insert into parents values ($1)", lambda n: (n + 1,)),
        ),
    ),
    "an enum": (
        "create type state as enum ('new', 'paid'); create table t (id int primary key, s state default 'new'); create table u (s state);"
        "insert into t select generate_series(0, 9);",
        same_writes(
            40,
            ("update t set s = $2 where id = $1", lambda n: (n % 10, ["paid", "new"][n % 2])),
            ("insert into u values ($1)", lambda n: ("paid",)),
        ),
    ),
    "an overflow on the way": (
        "create table t (id int primary key, n int not null default 2147483640); insert into t select generate_series(0, 3);",
        same_writes(40, ("update t set n = n + $2 where id = $1", lambda n: (n % 4, 9 if n % 8 < 4 else -9))),
    ),
    "numbers without parameters": (
        "create table a (n int default 0); insert into a values (0); create table b (n int);",
        same_writes(
            20,
            ("update a set n = n + 1", lambda n: ()),
            ("insert into b select n from a", lambda n: ()),
            ("insert into b values ($1)", lambda n: (n,)),
        ),
    ),
    "additions across a gap between partitions": (
        "create table t (id int, n int not null) partition by range (n); create table t1 partition of t for values from (0) to (10);"
        "create table t2 partition of t for values from (20) to (100); insert into t values (1, 5);",
        same_writes(8, ("update t set n = n + $2 where id = $1", lambda n: (1, 4))),
    ),
    "additions to what decides the partition, sent to the partition": (
        "create table t (id int, n int) partition by list (n); create table t1 partition of t for values in (0, 3); insert into t values (1, 0);",
        same_writes(8, ("update t1 set n = n + $2 where id = $1", lambda n: (1, 1 if n < 3 else 0))),
    ),
    "an upsert that notes the time": (
        "create table t (id int primary key, v int, at timestamptz default clock_timestamp());"
        "create view order_of_all as select v as n, 't' as what, rank() over (order by at) from t;",
        same_writes(
            10,
            (
                "insert into t (id, v) values ($1, $2) on conflict (id) do update set v = excluded.v",
                lambda n: (10 - n, n),
            ),
        ),
    ),
    "an operator whose signs are two operators apart": (
        "create table t (id int primary key, v int); insert into t select n, 10 from generate_series(0, 19) n;"
        "create function seven(int, int) returns int language sql as 'select 7'; create operator %- (leftarg = int, rightarg = int, function = seven);",
        same_writes(10, ("update t set v = v %- $2 where id = $1", lambda n: (n, n + 1))),
    ),
    "an operator of several signs that reads another table": (
        ACCOUNTS
        + """create table log (id int primary key, n numeric, t text default '5'); insert into log select generate_series(0, 19);
        create function seen(text, int) returns numeric language sql as 'select sum(balance) from accounts';
        create operator %- (leftarg = text, rightarg = int, function = seen);""",
        same_writes(
            20,
            ("update log set n = t %- 1 where id = $1", lambda n: (n,)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (n % 3, n)),
        ),
    ),
    "upserts by a unique index that is blind to case": (
        "create function cmp(text, text) returns int language sql immutable as 'select bttextcmp(lower($1), lower($2))';"
        "create function eq(text, text) returns bool language sql immutable as 'select lower($1) = lower($2)';"
        "create operator =# (leftarg = text, rightarg = text, function = eq);"
        "create operator class blind for type text using btree as operator 3 =#, function 1 cmp(text, text);"
        "create table t (name text not null, n int); create unique index on t (name blind);",
        same_writes(
            20,
            (
                "insert into t (name, n) values ($1, $2) on conflict (name) do update set n = t.n + excluded.n",
                lambda n: ("bob" if n % 2 else "Bob", n),
            ),
        ),
    ),
    "a unique index that is blind to case": (
        "create function cmp(text, text) returns int language sql immutable as 'select bttextcmp(lower($1), lower($2))';"
        "create function eq(text, text) returns bool language sql immutable as 'select lower($1) = lower($2)';"
        "create operator =# (leftarg = text, rightarg = text, function = eq);"
        "create operator class blind for type text using btree as operator 3 =#, function 1 cmp(text, text);"
        "create table t (name text not null, n int); create unique index on t (name blind);",
        [
            [(sql, (f"{name}{n}", number))]
            for n in range(10)
            for sql, name, number in (
                ("insert into t (name, n) values ($1, $2) on conflict do nothing", "eve", 1),
                (
                    "insert into t (name, n) values ($1, $2) on conflict (name) do update set n = t.n + excluded.n",
                    "bob",
                    1,
                ),
                ("insert into t (name, n) values ($1, $2) on conflict do nothing", "Bob", 100),
            )
        ],
    ),
    **{
        f"a domain that reads another table, in {place}": (
            "create table log (n int); create function seen() returns bigint language sql as 'select count(*) from public.log';"
            f"create domain more as int check (value >= public.seen()); {table}",
            same_writes(
                20, ("insert into t (id) values ($1)", lambda n: (15,)), ("insert into log values ($1)", lambda n: (n,))
            ),
        )
        for place, table in {
            "a default": "create table t (id int, x int default ((random() * 0)::int + 15)::more);",
            "the elements of a default": "create table t (id int, x text default (array[(random() * 0)::int + 15]::more[])::text);",
            "a check": "create table t (id int check (id::more > 0));",
            "a generated column": "create table t (id int, x int generated always as (id::more) stored);",
            "an index": "create table t (id int); create index on t ((id::more));",
            "a partition key": "create table t (id int) partition by list ((id::more + 0)); create table t1 partition of t default;",
        }.items()
    },
    "clocks and random numbers": (
        "create table a (id int, at timestamptz default now(), constraint k check (at <= now())); create table b (n int);",
        same_writes(
            20,
            ("insert into b values ($1)", lambda n: (n,)),
            ("update b set n = n + 1 where n = $1", lambda n: (n - 1,)),
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_batch_leaves_what_one_message_after_the_other_leaves(database: str, name: str) -> None:
    schema, messages = CASES[name]
    await assert_equal(database, schema, messages)


PAYMENT = "insert into payments values ($1, $2, $3)"
ADD = "update accounts set balance = balance + $2 where id = $1"
FAST: dict[str, tuple[str, list[Message], int]] = {
    "insert and additive update": (
        "create table payments (id uuid primary key, account int, amount bigint);" + ACCOUNTS,
        same_writes(200, (PAYMENT, lambda n: (UUID(int=n), n % 10, n)), (ADD, lambda n: (n % 10, n))),
        2,
    ),
    "upsert with one key column": (
        STOCK + ORDERS,
        same_writes(
            200,
            ("insert into items values ($1, $1)", lambda n: (n,)),
            (
                "insert into stock (sku, quantity) values ($1, $2) on conflict (sku) do update set quantity = stock.quantity + excluded.quantity",
                lambda n: (n % 100, n),
            ),
        ),
        3,
    ),
    "delete by key": (
        STOCK + "insert into stock select generate_series(0, 199);" + ORDERS,
        same_writes(
            200,
            ("delete from stock where sku = $1", lambda n: (n % 150,)),
            ("insert into items values ($1, $1)", lambda n: (n,)),
        ),
        2,
    ),
    "a transfer between two accounts": (
        "create table accounts (id int primary key, balance bigint not null default 0); insert into accounts select generate_series(0, 999);",
        same_writes(
            200,
            ("update accounts set balance = balance - $2 where id = $1", lambda n: (n, n)),
            ("update accounts set balance = balance + $2 where id = $1", lambda n: (999 - n, n)),
        ),
        2,
    ),
    "partitions": (
        "create table log (id int, n int) partition by range (id); create table log1 partition of log for values from (0) to (100);"
        "create table log2 partition of log default;" + ACCOUNTS,
        same_writes(200, ("insert into log values ($1, $2)", lambda n: (n, n)), (ADD, lambda n: (n % 10, n))),
        2,
    ),
    "fields of a document": (
        "create table t (id int primary key, name text, j jsonb); insert into t select n from generate_series(0, 99) n;",
        same_writes(
            200, ("update t set j = $2, name = $2::jsonb ->> 'a' where id = $1", lambda n: (n % 100, '{"a": "b"}'))
        ),
        2,
    ),
    "additions beside what decides the partition": (
        "create table t (id int primary key, n int default 0) partition by range (id); create table t1 partition of t default;"
        "insert into t select generate_series(0, 9);",
        same_writes(200, ("update t set n = n + $2 where id = $1", lambda n: (n % 10, n))),
        1,
    ),
    "additions beside a trigger for updates of another column": (
        """create table t (id int primary key, n int default 0, other int); insert into t select generate_series(0, 9);
        create function fails() returns trigger language plpgsql as $$ begin raise 'it fires'; end $$;
        create trigger fails before update of other on t for each row execute function fails();
        create trigger fails_too before update of other on t execute function fails();""",
        same_writes(200, ("update t set n = n + $2 where id = $1", lambda n: (n % 10, n))),
        1,
    ),
    "an update with a condition": (
        STOCK + "insert into stock select generate_series(0, 99);" + ORDERS,
        same_writes(
            200,
            ("update stock set note = $2 where sku = $1 and quantity = 0", lambda n: (n % 100, str(n))),
            ("insert into items values ($1, $1)", lambda n: (n,)),
        ),
        3,
    ),
}


@pytest.mark.parametrize("name", FAST)
async def test_batch_forms_of_the_grammar_stay_grouped(database: str, name: str) -> None:
    schema, messages, most = FAST[name]
    assert await assert_equal(database, schema, messages) <= most


async def test_batch_what_is_not_grouped_is_logged_once_and_counted(database: str, caplog: Any) -> None:
    schema = STOCK + "create table log (n numeric unique, secret text); create view seen as select * from log;"
    messages = same_writes(
        20,
        ("insert into seen values ($1, 'hunter2')", lambda n: (n,)),
        ("insert into stock (sku) select $1::int + 4711 where true", lambda n: (n,)),
        ("update log set secret = $2 where n = $1", lambda n: (n, "hunter2")),
    )
    writer.ungrouped.clear()
    writer.logged.clear()
    with caplog.at_level("DEBUG", logger="consumer"):
        await assert_equal(database, schema, messages)
    logged = [record.fields for record in caplog.records if record.message == "deferred statement not batched"]
    statements = {(fields["statement"], fields["sent"], fields["reason"]) for fields in logged}
    assert statements == {
        ("insert into seen values ($1, …)", "in message order", NotBatchedReason.KIND.value),
        ("insert into stock (sku) select $1::int + … where true", "in message order", NotBatchedReason.GRAMMAR.value),
    }
    assert len(logged) == len(statements), "each once"
    assert writer.ungrouped == {NotBatchedReason.KIND: 20, NotBatchedReason.GRAMMAR: 20}
    writer.logged.clear()
    with caplog.at_level("DEBUG", logger="consumer"):
        await assert_equal(
            database, schema, same_writes(20, ("update log set secret = $2 where n = $1", lambda n: (n, "x")))
        )
    assert writer.ungrouped[NotBatchedReason.KEY] == 20
    assert "hunter2" not in caplog.text and "4711" not in caplog.text
