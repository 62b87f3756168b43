"""A rebuild: the state from the topics alone, beside the real one.

On real services; production is never written to.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest
from database_contents import all_rows
from harness import (
    ROOT,
    Place,
    Sent,
    consume_all,
    drained,
    migrated,
    new_topic,
    produce,
    query,
    settings_for,
    until,
    value,
    working,
)
from payments_app import INSERT, UPDATE, Payment, payments_app
from rebuild_runs import (
    Handle,
    app_with_handler,
    differences,
    mark_settled,
    message_id,
    new_app,
    numbered,
    reader,
    rebuilt,
    uuid_payment,
)
from services import Kafka

from consumer import App, Message, Reject, Retry, Tx
from consumer.core.errors import CannotTell, Misconfigured
from consumer.core.message import Partition
from consumer.rebuild.rebuild import rebuild
from consumer.rebuild.result import RebuildResult
from consumer.transaction.handler_runner import HandlerRunner
from handlers import app as billing

# -- the real state and the topics' ---------------------------------------------------------------------------------------


async def test_a_state_that_the_messages_made_agrees(place: Place) -> None:
    topic = await place.topic(3)
    app = payments_app(topic)
    messages = [uuid_payment(f"p{n}", n % 7, n) for n in range(300)]
    await place.send(topic, *messages, *messages[:50])
    await consume_all(app, place.settings())
    before = await all_rows(place.dsn)
    phases: list[tuple[str, int, int]] = []
    settings = place.settings(batch_messages_max=100)  # repeated in the same batch, and in others
    result = await rebuilt(place, app, settings=settings, progress=lambda *event: phases.append(event))
    assert result.agrees and not result.differences and not result.unknown
    assert (result.messages, result.applied, result.repeated) == (350, 300, 50)
    assert sum(span["until"] - span["from"] for span in result.ranges) == 350
    assert {table["table"]: (table["rows"], table["rebuilt"], table["matched_by"]) for table in result.tables} == {
        "public.accounts": (100, 100, ["id"]),
        "public.effects": (300, 300, []),
    }
    assert ("replay", 350, 350) in phases and phases[-1] == ("compare", 2, 2)
    assert await all_rows(place.dsn) == before
    json.dumps(result.as_dict())


async def test_messages_that_nothing_is_wrong_with_are_settled_together(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, between savepoints, it takes eight times as long.

    The result is the same.
    """

    by_itself: list[Any] = []
    run_between_savepoints = HandlerRunner.run_between_savepoints

    async def alone(self: Any, delivery: Any, tx: Any) -> None:
        by_itself.append(delivery)
        await run_between_savepoints(self, delivery, tx)

    monkeypatch.setattr(HandlerRunner, "run_between_savepoints", alone)
    topic = await place.topic()
    app = payments_app(topic)
    await place.send(topic, *[uuid_payment(f"p{n}", n % 7, n) for n in range(40)])
    await consume_all(app, place.settings())
    result = await rebuilt(place, app)
    assert result.agrees and (result.applied, result.failed) == (40, 0)
    assert not by_itself


async def test_a_lost_effect_is_missing_and_has_its_message(place: Place) -> None:
    topic = await place.topic(2)
    app = payments_app(topic)
    await place.send(topic, *[uuid_payment(f"p{n}", n % 3) for n in range(30)])
    await consume_all(app, place.settings())
    await query(place.dsn, "delete from effects where id = 'p7'")
    result = await rebuilt(place, app)
    assert not result.agrees
    [difference] = result.differences
    assert difference["kind"] == "missing" and difference["count"] == 1
    assert difference["columns"]["id"] == {"real": None, "rebuilt": "p7"}
    assert difference["messages"] == [message_id("p7")]


async def test_doubled_effect_is_extra_and_the_balance_names_its_message(place: Place) -> None:
    topic = await place.topic(2)
    app = payments_app(topic)
    await place.send(topic, *[uuid_payment(f"p{n}", 4, 100 + n) for n in range(30)])
    await consume_all(app, place.settings())
    await query(place.dsn, "insert into effects values ('p9', 4, 109)")
    await query(place.dsn, "update accounts set balance = balance + 109 where id = 4")
    result = await rebuilt(place, app)
    balance, effect = sorted(result.differences, key=lambda difference: difference["table"])
    total = sum(100 + n for n in range(30))
    assert balance["key"] == {"id": "4"} and balance["kind"] == "different"
    assert balance["columns"] == {"balance": {"real": str(total + 109), "rebuilt": str(total)}}
    assert balance["messages"] == [message_id("p9")] and balance["explained"]  # of thirty that touched the row
    assert effect["kind"] == "extra" and effect["count"] == 1 and effect["messages"] == [message_id("p9")]
    assert effect["columns"]["amount"] == {"real": "109", "rebuilt": None}


async def test_difference_names_the_messages_that_wrote_the_row(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic)
    await place.send(topic, uuid_payment("a", 1, 10), uuid_payment("b", 1, 20), uuid_payment("c", 2, 5))
    await consume_all(app, place.settings())
    await query(place.dsn, "insert into effects values ('nobody', 9, 9)")
    await query(place.dsn, "update accounts set balance = 1000 where id = 1")
    result = await rebuilt(place, app)
    assert differences(result) == [
        ("accounts", "different", ("1",), (("balance", "1000", "30"),)),
        ("effects", "extra", (), (("id", "nobody", None), ("account", "9", None), ("amount", "9", None))),
    ]
    by_kind = {difference["kind"]: difference for difference in result.differences}
    assert by_kind["extra"]["messages"] == []
    assert sorted(by_kind["different"]["messages"]) == sorted([message_id("a"), message_id("b")])
    assert not by_kind["different"]["explained"]
    assert all(difference["messages"] == [] for difference in (await rebuilt(place, app, trace=False)).differences)


async def test_rows_with_a_key_are_missing_extra_or_different(place: Place) -> None:
    await migrated(place.dsn, SHAPES)
    topic = await place.topic(2)

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into items (order_id, line, price) values ($1, $2, $3)", body["n"] // 10, body["n"] % 10, 1)

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(50))
    await consume_all(app, place.settings())
    await query(place.dsn, "update items set price = 2 where order_id = 1")
    await query(place.dsn, "delete from items where order_id = 2")
    await query(place.dsn, "insert into items values (9, 1, 5), (9, 2, 5)")
    result = await rebuilt(place, app, sample_max=6)
    [table] = result.tables
    assert (table["rows"], table["rebuilt"]) == (42, 50)
    assert (table["missing"], table["extra"], table["different"]) == (10, 2, 10)
    assert differences(result) == [
        ("items", "different", ("1", "0"), (("price", "2.00", "1.00"),)),
        ("items", "different", ("1", "1"), (("price", "2.00", "1.00"),)),
        ("items", "extra", ("9", "1"), (("price", "5.00", None), *[(column, None, None) for column in NOTHING])),
        ("items", "extra", ("9", "2"), (("price", "5.00", None), *[(column, None, None) for column in NOTHING])),
        ("items", "missing", ("2", "0"), (("price", None, "1.00"), *[(column, None, None) for column in NOTHING])),
        ("items", "missing", ("2", "1"), (("price", None, "1.00"), *[(column, None, None) for column in NOTHING])),
    ]
    by_key = {tuple(difference["key"].values()): difference["messages"] for difference in result.differences}
    assert by_key["1", "0"] == [message_id("m10")] and by_key["2", "1"] == [message_id("m21")] and not by_key["9", "1"]


NOTHING = ("details", "raw", "tags", "where_")  # columns of items that stay empty


async def test_lost_delete_names_the_messages_of_insert_and_delete(place: Place) -> None:
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        if body["n"] <= 10:
            tx.defer(INSERT, str(body["n"]), 1, 1)
        else:
            tx.defer("delete from effects where id = $1", str(body["n"] - 10))

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(15))
    await consume_all(app, place.settings())
    assert (await rebuilt(place, app)).agrees
    await query(place.dsn, INSERT, "3", 1, 1)
    [difference] = (await rebuilt(place, app)).differences
    assert difference["kind"] == "extra" and difference["messages"] == [message_id("m3"), message_id("m13")]


async def test_effects_from_before_the_framework_are_compared_without_a_ledger(place: Place) -> None:
    topic = await place.topic(2)
    app = payments_app(topic)
    await place.send(topic, *[uuid_payment(f"p{n}", n % 4, 1) for n in range(20)], uuid_payment("p0", 0, 1))
    await mark_settled(place, app)
    # As a consumer without this framework left it: p0 twice, p5 not at all.
    for n in [*range(20), 0]:
        if n != 5:
            await query(place.dsn, INSERT, f"p{n}", n % 4, 1)
            await query(place.dsn, UPDATE, n % 4, 1)
    result = await rebuilt(place, app)
    assert [difference[:3] for difference in differences(result)] == [
        ("accounts", "different", ("0",)),
        ("accounts", "different", ("1",)),
        ("effects", "extra", ()),
        ("effects", "missing", ()),
    ]
    extra, missing = (
        next(difference for difference in result.differences if difference["kind"] == kind)
        for kind in ("extra", "missing")
    )
    assert extra["messages"] == [message_id("p0")] and missing["messages"] == [message_id("p5")]
    assert await value(place.dsn, "select count(*) from consumer.ledger") == 0


async def test_differences_of_a_table_are_sampled_and_all_counted(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic)
    await place.send(topic, *[uuid_payment(f"p{n}", n) for n in range(50)])
    await mark_settled(place, app)
    await query(place.dsn, "insert into effects values ('x', 1, 1)")
    result = await rebuilt(place, app, sample_max=5)
    tables = {table["table"]: table for table in result.tables}
    assert tables["public.effects"]["missing"] == 50 and tables["public.effects"]["extra"] == 1
    assert tables["public.accounts"]["different"] == 50
    kinds = [difference["kind"] for difference in result.differences]
    assert (kinds.count("different"), kinds.count("missing"), kinds.count("extra")) == (5, 4, 1)
    assert all(difference["messages"] for difference in result.differences if difference["kind"] != "extra")


# -- what handlers do -----------------------------------------------------------------------------------------------------

SHAPES = """
create table orders (
    id int, state text not null default 'new', note text, lines int not null default 0,
    check (lines >= 0), constraint "The Key" primary key (id)
);
create table items (
    order_id int not null, line int not null, price numeric(10, 2) not null, details jsonb, raw json, tags text[],
    where_ point, primary key (order_id, line)
);
create table numbered (id serial primary key, n int not null unique, made_at timestamptz not null default now());
create table "Strange ""Name" ("Key Column" int primary key, "select" text, "a""b'c" int default 7);
create schema depot;
create table depot.stock (sku text, place int, amount int not null, changed_at timestamptz, unique (sku, place));
alter table depot.stock alter sku set not null, alter place set not null;
create table rates (currency text primary key, rate numeric not null);
insert into rates values ('EUR', 1.5), ('USD', 2);
"""


async def agrees_after(place: Place, handle: Handle, messages: list[Sent], **options: Any) -> RebuildResult:
    """Settle the messages, then rebuild; fail where the two differ."""
    topic = await place.topic(2)
    app = app_with_handler(topic, handle, **options)
    await place.send(topic, *messages)
    await consume_all(app, place.settings())
    before = await all_rows(place.dsn)
    result = await rebuilt(place, app, settings=place.settings(batch_messages_max=4))
    assert differences(result) == [] and result.agrees and not result.unknown, (result.differences, result.unknown)
    assert await all_rows(place.dsn) == before
    assert result.applied == len({message.headers[0][1] for message in messages}) and not result.dead_lettered
    return result


async def test_awaited_statements_savepoints_upserts_deletes_and_copy(place: Place) -> None:
    await migrated(place.dsn, SHAPES)

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        n = body["n"]
        await tx.execute(
            'insert into orders (id, lines) values ($1, 1) on conflict on constraint "The Key" '
            "do update set lines = orders.lines + excluded.lines",
            n % 5,
        )
        lines = await tx.fetchval("select lines from orders where id = $1 for update", n % 5)
        try:
            async with tx.savepoint():
                await tx.execute("update orders set lines = -1 where id = $1", n % 5)
        except Exception as error:
            assert type(error).__name__ == "CheckViolationError"
        await tx.copy_records_to_table("items", records=[(n % 5, lines, n)], columns=["order_id", "line", "price"])
        await tx.executemany(
            "update items set details = $2, raw = $3, tags = $4, where_ = point(1, 2) where order_id = $1",
            [(n % 5, '{"b": 1, "a": 2}', '{"b": 1, "a": 2}', ["x", None])],
        )
        if n % 3 == 0:
            tx.defer("delete from items where order_id = $1 and line = 1", n % 5)
        tx.defer("update orders set note = $2 where id = $1", n % 5, f"after {n}")

    result = await agrees_after(place, handle, [message for n in range(3) for message in numbered(30)])
    assert {table["table"]: table["matched_by"] for table in result.tables} == {
        "public.items": ["order_id", "line"],
        "public.orders": ["id"],
    }
    await query(place.dsn, 'update items set raw = \'{"a": 2, "b": 1}\', where_ = point(1, 3) where order_id = 1')
    result = await rebuilt_again(place, handle)
    assert {name for difference in result.differences for name in difference["columns"]} == {"raw", "where_"}


_last: dict[str, App] = {}


async def rebuilt_again(place: Place, handle: Handle) -> RebuildResult:
    """Rebuild what `agrees_after` has rebuilt before."""
    [(name,)] = await query(place.dsn, "select distinct app from consumer.positions")
    [(topic,)] = await query(place.dsn, "select distinct topic from consumer.positions")
    app = app_with_handler(topic, handle)
    app.name = name
    return await rebuilt(place, app)


async def test_batch_handlers_and_handlers_at_the_same_time(place: Place) -> None:
    topic = await place.topic(2)
    app = new_app()

    @app.handler(topic, batch=7)
    async def book(payments: list[Payment], tx: Tx) -> None:
        await tx.execute(
            "insert into effects select * from unnest($1::text[], $2::int[], $3::bigint[])",
            [payment.id for payment in payments],
            [payment.account for payment in payments],
            [payment.amount for payment in payments],
        )

    @app.handler(topic, concurrency=8)
    async def count(message: Message[Payment], tx: Tx) -> None:
        await asyncio.sleep(0)
        await tx.execute(UPDATE, message.value.account, message.value.amount)

    await place.send(topic, *[uuid_payment(f"p{n}", n % 9) for n in range(60)])
    await consume_all(app, place.settings())
    await query(place.dsn, "delete from effects where id in ('p11', 'p12')")
    result = await rebuilt(place, app)
    assert sorted(difference["messages"] for difference in result.differences) == sorted(
        [[message_id("p11")], [message_id("p12")]]
    )
    assert (result.messages, result.applied) == (60, 120)


async def test_numbers_and_times_that_a_rebuild_cannot_give_again_are_left_out(place: Place) -> None:
    await migrated(
        place.dsn,
        SHAPES + "create schema hidden; create sequence hidden.numbers; "
        "create table made (id bigint generated always as identity primary key, n int, at timestamptz, "
        "twice int generated always as (n * 2) stored, id2 uuid default gen_random_uuid(), who text default current_user, "
        "code text default 'no. ' || nextval('hidden.numbers'))",
    )
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        await tx.fetchval("select nextval('numbered_id_seq') from numbered where n = $1", body["n"] - 1)
        number = await tx.fetchval("insert into numbered (n) values ($1) returning id", body["n"])
        assert number == await tx.fetchval("select lastval()") == await tx.fetchval("select currval('numbered_id_seq')")
        await tx.execute("insert into made (n, at) values ($1, now())", body["n"])

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(5))
    await query(place.dsn, "select nextval('numbered_id_seq') from generate_series(1, 10)")
    await consume_all(app, place.settings())
    before = await all_rows(place.dsn)
    result = await rebuilt(place, app)
    assert result.agrees and await all_rows(place.dsn) == before
    tables = {table["table"]: table for table in result.tables}
    assert tables["public.numbered"]["matched_by"] == ["n"]
    assert tables["public.numbered"]["ignored"] == {
        "id": "default nextval('numbered_id_seq'::regclass)",
        "made_at": "default now()",
    }
    assert tables["public.made"]["ignored"] == {
        "id": "identity",
        "at": "written as now()",
        "twice": "generated",
        "id2": "default gen_random_uuid()",
        "who": "default CURRENT_USER",
        "code": "default ('no. '::text || nextval('hidden.numbers'::regclass))",
    }
    result = await rebuilt(place, app, compare=["made.id", "made_at"], trace=False)
    tables = {table["table"]: table for table in result.tables}
    assert tables["public.made"]["matched_by"] == ["id"] and tables["public.made"]["missing"] == 0
    assert tables["public.numbered"]["different"] == 0  # two rebuilds give two times
    assert [unknown["kind"] for unknown in result.unknown] == ["depends_on_order"] and "made_at" in result.unknown[0][
        "text"
    ]


async def test_a_default_that_handlers_never_leave_to_the_database_is_compared(place: Place) -> None:
    await migrated(place.dsn, "create table docs (id uuid primary key default gen_random_uuid(), n int default 0)")
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into docs values ($1, $2)", message_id(str(body["n"])), body["n"])

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(3))
    await consume_all(app, place.settings())
    await query(place.dsn, "update docs set n = 99 where n = 2")
    result = await rebuilt(place, app)
    assert result.tables[0]["matched_by"] == ["id"] and result.tables[0]["ignored"] == {}
    assert differences(result) == [("docs", "different", (message_id("2"),), (("n", "99", "2"),))]


async def test_strange_names_and_other_schemas_of_the_path(place: Place) -> None:
    await migrated(place.dsn, SHAPES)
    await query(place.dsn, f"alter database {place.dsn.rsplit('/', 1)[1]} set search_path = public, depot, pg_temp")

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer('insert into "Strange ""Name" ("Key Column", "select") values ($1, $2)', body["n"], "it's")
        tx.defer('update "Strange ""Name" set "a""b\'c" = "a""b\'c" + $2 where "Key Column" = $1', body["n"], 1)
        await tx.execute(
            "insert into stock values ($1, $2, 1, now()) on conflict (sku, place) do update set amount = stock.amount + 1",
            "x" * (body["n"] % 3),
            body["n"] % 2,
        )

    result = await agrees_after(place, handle, numbered(20))
    assert [(table["table"], table["matched_by"]) for table in result.tables] == [
        ("depot.stock", ["sku", "place"]),
        ('public.Strange "Name', ["Key Column"]),
    ]
    await query(place.dsn, 'update "Strange ""Name" set "a""b\'c" = 1 where "Key Column" = 4')
    [difference] = (await rebuilt_again(place, handle)).differences
    assert difference["columns"] == {"a\"b'c": {"real": "1", "rebuilt": "8"}} and difference["messages"] == [
        message_id("m4")
    ]


async def test_a_table_that_is_only_read_is_read_where_it_is(place: Place) -> None:
    await migrated(place.dsn, SHAPES + "create view prices as select currency, rate * 2 as price from rates")

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        rate = await tx.fetchval("select rate from public.rates where currency = $1", "EUR")
        price = await tx.fetchval("select price from prices where currency = $1", "USD")
        tx.defer(INSERT, f"{body['n']}", 1, int(rate * 10 + price))

    result = await agrees_after(place, handle, numbered(3))
    assert [table["table"] for table in result.tables] == ["public.effects"]
    assert "only read, as they are now: public.prices, public.rates" in result.notes


async def test_rows_without_an_insert_begin_as_real_rows_with_default_values(
    place: Place,
) -> None:
    await migrated(
        place.dsn,
        "create table people (id int primary key, name text, seen int, times int not null default 0, at timestamptz "
        "default now()); insert into people select n, 'p' || n from generate_series(1, 20) n",
    )

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        await tx.execute("update people set seen = $2, times = times + 1, at = now() where id = $1", body["n"] % 9, 1)

    result = await agrees_after(place, handle, numbered(20))
    [table] = result.tables
    assert table["ignored"] == {"at": "default now()"} and table["rebuilt"] == 20
    await query(place.dsn, "update people set seen = 5 where id = 15")  # no message is of 15
    assert [difference[:3] for difference in differences(await rebuilt_again(place, handle))] == [
        ("people", "different", ("15",))
    ]


async def test_inserts_by_merge_and_functions_are_noticed(place: Place) -> None:
    await migrated(
        place.dsn,
        """create function book(account int, by bigint) returns void language plpgsql as $$
           begin insert into effects values (account::text, account, by); end $$;
           delete from accounts""",
    )

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        await tx.execute(
            """merge into accounts a using (values ($1::int)) as v(id) on a.id = v.id
               when matched then update set balance = a.balance + 1 when not matched then insert values (v.id, 1)""",
            body["n"] % 4,
        )
        await tx.execute("delete from effects where id = 'nothing'")
        await tx.execute("select book($1, $2)", body["n"], 2)

    result = await agrees_after(place, handle, numbered(10))
    assert {table["table"]: table["rebuilt"] for table in result.tables} == {"public.accounts": 4, "public.effects": 10}


async def test_partitioned_tables_are_copied_as_one(place: Place) -> None:
    await migrated(
        place.dsn,
        """create table events (id int, day date, n int, primary key (id, day)) partition by range (day);
           create table events_1 partition of events for values from ('2020-01-01') to ('2021-01-01');
           create table events_2 partition of events default""",
    )

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        n = body["n"]
        tx.defer("insert into events values ($1, date '2020-12-25' + $1::int, 0)", n)
        tx.defer("update events set n = n + 1 where id = $1", n)

    result = await agrees_after(place, handle, numbered(20))
    assert result.tables[0]["table"] == "public.events" and result.tables[0]["rows"] == 20
    await query(place.dsn, "update events_2 set n = 7 where id = 15")
    [difference] = (await rebuilt_again(place, handle)).differences
    assert difference["key"] == {"id": "15", "day": "2021-01-09"} and difference["messages"] == [message_id("m15")]


async def test_deferred_constraints_and_cascades_are_rebuilt(place: Place) -> None:
    await migrated(
        place.dsn,
        """create table ranks (id int primary key, rank int not null,
               constraint one_each unique (rank) deferrable initially deferred);
           create table heads (id int primary key);
           create table lines (id int primary key, head int not null references heads on delete cascade)""",
    )

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        n = body["n"]
        await tx.execute("insert into ranks values ($1, 1)", n)  # until the next statement there are two of the first
        await tx.execute("update ranks set rank = rank + 1 where id <> $1", n)
        await tx.execute("insert into heads values ($1)", n)
        await tx.execute("insert into lines values ($1, $1)", n)
        if n % 3 == 0:
            await tx.execute("delete from heads where id = $1", n - 1)

    result = await agrees_after(place, handle, numbered(12))
    assert {table["table"]: table["rebuilt"] for table in result.tables} == {
        "public.heads": 8, "public.lines": 8, "public.ranks": 12,
    }  # fmt: skip


async def test_tables_without_a_key_count_rows_that_are_alike(place: Place) -> None:
    await migrated(
        place.dsn,
        """create table loose (n int, raw json, at point, long text, tags text[]);
           create table ticks (at timestamptz default clock_timestamp());
           create domain counted as int not null check (value > 0);
           create table strict (n counted)""",
    )

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        n = body["n"]
        tx.defer(
            "insert into loose values ($1::int, '{\"a\": 1}', point(1, $1::int), $2, '{x,null}')",
            n % 3,
            str(n % 3) * 300,
        )
        tx.defer("update loose set n = 100 where n = 2")
        await tx.execute("insert into ticks default values")
        await tx.execute("insert into strict values ($1)", n)  # a null cannot even be planned for it

    result = await agrees_after(place, handle, numbered(9))
    assert {table["table"]: (table["matched_by"], table["rebuilt"]) for table in result.tables} == {
        "public.loose": ([], 9), "public.ticks": ([], 9), "public.strict": ([], 9),
    }  # fmt: skip
    await query(place.dsn, "update loose set raw = '{\"a\":1}' where ctid = (select min(ctid) from loose where n = 1)")
    await query(place.dsn, "insert into ticks values (now())")
    result = await rebuilt_again(place, handle)
    tables = {table["table"]: (table["missing"], table["extra"], table["different"]) for table in result.tables}
    assert tables == {"public.loose": (1, 1, 0), "public.ticks": (0, 1, 0), "public.strict": (0, 0, 0)}
    missing = next(difference for difference in result.differences if difference["kind"] == "missing")
    assert missing["messages"] == [message_id("m1"), message_id("m4"), message_id("m7")]  # any of them: all are alike
    assert missing["columns"]["long"]["rebuilt"] == "1" * 199 + "…"
    await query(place.dsn, "update loose set n = 2 where n = 100")  # as if the updates had been lost
    result = await rebuilt_again(place, handle)
    lost = [
        difference
        for difference in result.differences
        if difference["columns"].get("n") == {"real": "2", "rebuilt": None}
    ]
    assert lost[0]["count"] == 3 and lost[0]["messages"] == [message_id("m2"), message_id("m5"), message_id("m8")]


async def test_a_function_that_hides_the_refusal_writes_nothing_all_the_same(place: Place) -> None:
    await migrated(place.dsn, FUNCTIONS)
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        await tx.execute(INSERT, str(body["n"]), 1, 1)
        await tx.execute("select swallow($1)", body["n"])

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(3))
    await mark_settled(place, app)
    before = await all_rows(place.dsn)
    assert (await rebuilt(place, app)).applied == 3
    assert await all_rows(place.dsn) == before and before["elsewhere"] == []


async def test_hot_rows_and_many_batches_stay_right(place: Place) -> None:
    topic = await place.topic(2)
    app = payments_app(topic)
    await place.send(topic, *[uuid_payment(f"p{n}", n % 3, n) for n in range(9000)])
    await consume_all(app, place.settings())
    await query(place.dsn, "delete from effects where id = 'p4567'")
    result = await rebuilt(place, app, settings=place.settings(batch_messages_max=500))
    assert [difference["messages"] for difference in result.differences] == [[message_id("p4567")]]
    assert result.applied == 9000


# -- which messages -------------------------------------------------------------------------------------------------------


async def test_dead_letters_are_left_out_and_the_unreadable_are_counted(place: Place) -> None:
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer(INSERT, str(body["n"]), 1, 1)
        if body["n"] == 2 and body.get("refused", True):
            raise Reject("no")
        if body["n"] == 3 and not mended:
            raise ValueError

    mended = False
    app = app_with_handler(topic, handle)
    conflict = Sent({"n": 77}, id=message_id("m1"), key="k")
    await place.send(topic, *numbered(4), conflict, Sent(b"no json", id=message_id("x"), key="k"))
    await consume_all(app, place.settings())
    mended = True  # a deployment later: the message is still a dead letter, and its effects still not there
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown
    assert (result.applied, result.dead_lettered, result.rejected, result.failed) == (
        1,
        5,
        0,
        0,
    )  # one waits behind the third
    # Without what the ledger knows, the handlers decide.
    await query(place.dsn, "delete from consumer.dead_letters")
    await query(place.dsn, "delete from consumer.ledger")
    result = await rebuilt(place, app)
    assert (result.applied, result.dead_lettered, result.rejected, result.unreadable) == (3, 0, 1, 1)
    assert [unknown["kind"] for unknown in result.unknown] == ["id_conflict"]
    assert sorted(difference["columns"]["id"]["rebuilt"] for difference in result.differences) == ["3", "4"]


async def test_failing_handler_makes_the_verdict_unknown_without_payloads(place: Place) -> None:
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        await tx.execute(INSERT, str(body["n"]), 1, 1)
        if body["n"] == 2 and broken:
            raise KeyError("secret payload")

    broken = False
    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(4))
    await consume_all(app, place.settings())
    broken = True
    result = await rebuilt(place, app)
    assert (result.applied, result.failed) == (3, 1)
    [unknown] = result.unknown
    assert unknown["kind"] == "failed" and "handle: KeyError (1)" in unknown["text"] and "secret" not in unknown["text"]
    assert [(difference["kind"], difference["columns"]["id"]["real"]) for difference in result.differences] == [
        ("extra", "2")
    ]


async def test_message_that_needs_another_topics_message_is_retried_in_order(place: Place) -> None:
    payments, refunds = await place.topic(), await place.topic()
    app = new_app()

    @app.handler(payments)
    async def settle(payment: Payment, tx: Tx) -> None:
        await tx.execute(INSERT, payment.id, payment.account, payment.amount)

    @app.handler(refunds, retry=Retry(attempts=1000, base=0.01, cap=0.05))
    async def refund(payment: Payment, tx: Tx) -> None:
        left = await tx.fetchval("select amount from effects where id = $1 for update", payment.id.split("/")[0])
        if left is None:
            raise LookupError
        tx.defer("update effects set amount = $2 where id = $1", payment.id.split("/")[0], min(left, payment.amount))

    # Older by the log's time, and of one key: the last of each payment counts.
    await place.send(refunds, *[uuid_payment(f"p{n}/{k}", n, 9 - k) for n in range(40) for k in range(3)])
    async with working(app, place.settings()):
        await until("a refund to wait", lambda: waits(place, app, refunds))
        await place.send(payments, *[uuid_payment(f"p{n}", n, 100) for n in range(40)])
        await drained(app, place.settings())
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown and result.applied == 160
    assert await value(place.dsn, "select sum(amount) from effects") == 40 * 7


async def test_failed_messages_are_tried_again_while_any_succeeds(place: Place) -> None:
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        n = body["n"]
        if n > 1 and not await tx.fetchval("select true from effects where id = $1", str(n - 1)):
            raise LookupError
        await tx.execute(INSERT, str(n), 1, 1)

    app = app_with_handler(topic, handle, order="none", retry=Retry(attempts=1000, base=0.01, cap=0.02))
    messages = numbered(8)
    del messages[6]  # the eighth waits and is not applied
    await place.send(topic, *reversed(messages))
    await mark_settled(place, app)
    for n in range(1, 7):
        await query(place.dsn, INSERT, str(n), 1, 1)
    result = await rebuilt(place, app)
    assert result.agrees and (result.applied, result.failed) == (6, 1)
    assert [unknown["text"] for unknown in result.unknown] == [
        "1 messages failed in the rebuild, so their effects are not in it: handle: LookupError (1)"
    ]


async def waits(place: Place, app: App, topic: str) -> bool:
    rows = await query(place.dsn, "select 1 from consumer.positions where app = $1 and topic = $2", app.name, topic)
    return bool(rows)


async def test_only_settled_messages_above_a_position_count(place: Place) -> None:
    topic = await place.topic()
    stuck = asyncio.Event()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        if body["n"] == 3 and not stuck.is_set():
            raise LookupError
        tx.defer(INSERT, str(body["n"]), 1, 1)

    app = app_with_handler(topic, handle, order="none", retry=Retry(attempts=1000, base=30, cap=30))
    await place.send(topic, *numbered(6))

    async def five() -> bool:
        return len(await place.effects()) == 5

    async with working(app, place.settings()):
        await until("the others to be settled", five)
        stuck.set()
        result = await rebuilt(place, app)
    assert result.agrees and (result.messages, result.applied) == (6, 5)
    assert result.ranges[0]["until"] == 6
    assert any("1 messages above the positions" in note for note in result.notes)


@pytest.mark.timeout(600)
async def test_a_worker_that_goes_on_makes_no_difference(place: Place) -> None:
    topic = await place.topic(2)
    app = payments_app(topic)
    await place.send(topic, *[uuid_payment(f"p{n}", n % 7) for n in range(500)])
    other = payments_app(topic)
    other.name = app.name
    ended = asyncio.Event()

    async def produce_on() -> int:
        count = 500
        while not ended.is_set():
            sent = count
            await place.send(topic, *[uuid_payment(f"p{count + n}", n % 7) for n in range(50)])
            count += 50

            # At the worker's pace: what is produced during one rebuild is work for the next, which must not grow.
            async def settled_before(sent: int = sent) -> bool:
                return bool(await value(place.dsn, "select count(*) from effects") >= sent)

            await until("the messages before to be settled", settled_before, 120)
        return count

    async with working(app, place.settings()):
        await until("a beginning", lambda: place.effects())
        producing = asyncio.create_task(produce_on())
        try:
            for _ in range(3):
                result = await rebuilt(place, other, settings=place.settings(batch_messages_max=100))
                assert result.agrees and result.messages > 0, result.differences
        finally:
            ended.set()
        count = await producing
        await drained(app, place.settings())
    assert len(await place.effects()) == count > 500


async def test_ranges_that_cannot_be_known_are_no_guess(place: Place) -> None:
    topic = await place.topic(2)
    app = payments_app(topic)
    await place.send(topic, uuid_payment("a", partition=0))
    result = await rebuilt(place, app)
    assert [unknown["kind"] for unknown in result.unknown] == ["nothing_settled"] and result.tables == []
    await mark_settled(place, app)
    await query(place.dsn, "update consumer.positions set next_offset = 99 where partition = 1")
    result = await rebuilt(place, app)
    assert [unknown["kind"] for unknown in result.unknown] == ["log_too_short"] and result.tables == []
    await query(place.dsn, "delete from consumer.positions where partition = 1")
    result = await rebuilt(place, app)
    assert not result.unknown and result.messages == 1
    assert any(f"{topic}:1 has no position" in note for note in result.notes)


async def test_records_that_were_removed_need_a_base(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic)
    await place.send(topic, *[uuid_payment(f"p{n}", 1, 1) for n in range(10)])
    await consume_all(app, place.settings())
    from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
    from aiokafka.structs import TopicPartition

    admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
    await admin.start()
    await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(before_offset=4)})
    await admin.close()
    result = await rebuilt(place, app)
    assert [unknown["kind"] for unknown in result.unknown] == ["records_gone"] and result.tables == []
    base = """
        insert into accounts select n, 0 from generate_series(0, 99) as n;  -- everybody; and then
        update accounts set balance = 4 where id = 1;
        insert into effects select 'p' || n, 1, 1 from generate_series(0, 3) as n
    """
    result = await rebuilt(place, app, base=base)
    assert result.agrees and result.messages == 6
    assert f"{topic}:0 begins at offset 4: --base is taken for the state before that record" in result.notes
    result = await rebuilt(place, app, base=base.replace("balance = 4", "balance = 3"))
    assert differences(result) == [("accounts", "different", ("1",), (("balance", "10", "9"),))]


async def test_a_base_is_looked_at_like_a_handler(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic)
    await place.send(topic, uuid_payment("a"))
    await mark_settled(place, app)
    before = await all_rows(place.dsn)
    for base, text in [
        ("insert into public.accounts values (1000, 1)", "--base: it names public.accounts with its schema"),
        ("insert into accounts values (0, 'x')", "--base: invalid input syntax"),
        ("insert into nowhere values (1)", '--base: relation "nowhere" does not exist'),
        ("copy accounts from stdin", "--base: it runs COPY"),
        ("delete from consumer.ledger", "framework's own"),
    ]:
        with pytest.raises(Misconfigured, match=text):
            await rebuilt(place, app, base=base)
    assert await all_rows(place.dsn) == before


# -- what is refused ------------------------------------------------------------------------------------------------------

FUNCTIONS = """
create table elsewhere (n int);
create sequence tickets;
create view open_accounts as select * from accounts;
create function note(n int) returns void language plpgsql as $$ begin insert into elsewhere values (n); end $$;
create function note_there(n int) returns void language plpgsql as $$ begin insert into public.effects values (n::text, n, n); end $$;
create function look(n int) returns bigint language plpgsql as $$ begin return (select sum(balance) from public.accounts); end $$;
create function swallow(n int) returns void language plpgsql as $$
begin insert into elsewhere values (n); exception when others then null; end $$;
create function wait_for(n int) returns void language plpgsql as $$ begin perform pg_advisory_xact_lock(n); end $$;
create function hidden(n int) returns bigint language sql begin atomic select balance from accounts where id = n; end;
"""
WRITE_BOTH = (INSERT, UPDATE)


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ("insert into public.effects values ('x', 1, $1)", "names public.effects with its schema"),
        ("update public.accounts set balance = $1", "names public.accounts with its schema"),
        ("delete from only public.accounts where id = $1", "names public.accounts with its schema"),
        ("select balance from public.accounts where id = $1", "names public.accounts with its schema"),
        ("select 1 where $1 in (select id from public.accounts)", "names public.accounts with its schema"),
        ("with x as (select * from public.accounts) select count(*) from x where id = $1", "names public.accounts"),
        (
            "select balance from open_accounts where id = $1",
            "reads public.accounts through the view public.open_accounts",
        ),
        ("update open_accounts set balance = $1", "public.open_accounts"),
        ("select note($1::bigint::int)", "handler 'handle': it writes outside the copies, perhaps in a function"),
        ("select note_there($1::bigint::int)", "writes outside the copies, perhaps in a function"),
        ("select look($1::bigint::int)", "reads the real public.accounts and not its copy"),
        ("select hidden($1::bigint::int)", "public.accounts"),
        ("select nextval('tickets') + $1", "cannot execute nextval"),
        ("select setval('tickets', $1)", "cannot execute setval"),
        ("select pg_advisory_xact_lock($1)", "handler 'handle': it takes advisory locks"),
        ("select wait_for($1::bigint::int)", "takes advisory locks"),
        ("select count(*) + $1 from consumer.ledger", "consumer.ledger, which is the framework's own"),
        ("update consumer.positions set next_offset = $1", "consumer.positions, which is the framework's own"),
        ("lock table accounts", "runs LOCK"),
        ("truncate effects", "runs TRUNCATE"),
        ("call nothing()", "runs CALL"),
        ("do $$ begin end $$", "runs DO"),
        ("create temp table mine (n int)", "runs CREATE"),
        ("copy effects from '/etc/passwd'", "runs COPY"),
        ("insert into effects values ('x', 1, 1); update accounts set balance = 1", "several statements"),
        ("select 1; drop table effects", "several statements"),
    ],
)
async def test_statement_that_would_leave_the_copies_does_not_run(place: Place, sql: str, text: str) -> None:
    await migrated(place.dsn, FUNCTIONS)
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        await tx.execute(INSERT, str(body["n"]), 1, 1)
        await tx.execute(UPDATE, 1, 1)
        try:
            async with tx.savepoint():
                await tx.execute(sql, *([body["n"]] if "$1" in sql else []))
        except Exception:
            pass  # a handler that hides it changes nothing
        await tx.execute(UPDATE, 1, 1)

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(3))
    await mark_settled(place, app)
    before = await all_rows(place.dsn)
    with pytest.raises(Misconfigured) as caught:
        await rebuilt(place, app)
    assert text in str(caught.value) and "handle" in str(caught.value) and "\n" not in str(caught.value)
    assert "nothing was changed" in str(caught.value)
    assert await all_rows(place.dsn) == before


async def test_copies_foreign_parts_and_views_that_cannot_be_copied_are_refused(place: Place) -> None:
    await migrated(
        place.dsn,
        FUNCTIONS
        + """create table logs (n int) partition by list (n); create table logs_1 partition of logs default;
             create table parent (n int); create table child () inherits (parent);
             create materialized view summary as select count(*) from effects""",
    )

    async def both(tx: Tx, *texts: str) -> None:
        for text in texts:
            await tx.execute(text)

    topic = await place.topic()
    for statement, text in [
        (lambda tx: tx.copy_records_to_table("effects", records=[("x", 1, 1)], schema_name="public"), "schema_name"),
        (lambda tx: tx.execute("insert into logs_1 values (1)"), "public.logs_1, a part of another table"),
        (lambda tx: tx.execute("insert into parent values (1)"), "public.parent, a part of another table"),
        (lambda tx: tx.execute("insert into child values (1)"), "public.child, a part of another table"),
        (lambda tx: tx.execute("update open_accounts set balance = 1"), "view public.open_accounts"),
        (
            lambda tx: both(tx, "insert into logs values (1)", "select * from logs_1"),
            "a part of public.logs: name logs",
        ),
        (lambda tx: both(tx, "insert into effects values ('', 1, 1)", "select * from summary"), "public.summary"),
    ]:

        async def handle(body: dict[str, Any], tx: Tx, statement: Any = statement) -> None:
            await statement(tx)

        app = app_with_handler(topic, handle)
        await place.send(topic, *numbered(1))
        await mark_settled(place, app)
        with pytest.raises(Misconfigured, match=text):
            await rebuilt(place, app)


async def test_a_deferred_write_is_refused_with_the_name_of_its_own_handler(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic)

    @app.handler(topic)
    async def audit(payment: Payment, tx: Tx) -> None:
        tx.defer("insert into public.effects values ($1, 0, 0)", payment.id)

    await place.send(topic, uuid_payment("a"), uuid_payment("b"))
    await mark_settled(place, app)
    with pytest.raises(Misconfigured, match=r"handler 'audit': it names public\.effects"):
        await rebuilt(place, app)
    assert (await rebuilt(place, app, handlers=["settle"])).applied == 2


async def test_rows_with_an_unknown_beginning_ask_for_a_base(place: Place) -> None:
    await migrated(
        place.dsn,
        "create table facts (id int primary key, n int not null, unique_ int unique default 5); "
        "insert into facts values (1, 1, 1), (2, 2, 2)",
    )
    topic = await place.topic()
    for column, text in [("n", "update n, which has no default"), ("unique_", "defaults of unique_")]:

        async def handle(body: dict[str, Any], tx: Tx, column: str = column) -> None:
            tx.defer(f"update facts set {column} = {column} + 1 where id = $1", body["n"])

        app = app_with_handler(topic, handle)
        await place.send(topic, *numbered(1))
        await mark_settled(place, app)
        with pytest.raises(Misconfigured, match=f"{text}.*--base"):
            await rebuilt(place, app)
    result = await rebuilt(place, app, base="insert into facts values (1, 1, 0), (2, 2, 2)")
    assert result.agrees


async def test_columns_to_leave_out_are_checked_before_anything_runs(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic)
    await place.send(topic, uuid_payment("a"))
    await consume_all(app, place.settings())
    await query(place.dsn, "update accounts set balance = 5 where id = 3")
    for name in ("balance", "accounts.balance", "public.accounts.balance"):
        result = await rebuilt(place, app, ignore=[name])
        assert result.agrees and result.tables[0]["ignored"] == {"balance": "--ignore"}
    result = await rebuilt(place, app, ignore=["accounts.id"], trace=False)
    assert result.tables[0]["matched_by"] == [] and (result.tables[0]["missing"], result.tables[0]["extra"]) == (1, 1)
    for options, text in [
        ({"ignore": ["balanse"]}, "--ignore balanse: no table has such a column; did you mean balance"),
        ({"compare": ["effects.balance"]}, "--compare effects.balance: no table has such a column"),
        ({"ignore": ["balance"], "compare": ["accounts.balance"]}, "both name public.accounts.balance"),
        ({"handlers": ["setle"]}, "no handler 'setle'; did you mean settle"),
    ]:
        with pytest.raises(Misconfigured, match=text):
            await rebuilt(place, app, **options)


async def test_messages_that_were_not_replayed_are_reported(place: Place) -> None:
    first, second = await place.topic(2), await place.topic()
    app = new_app()

    @app.handler(first, second)
    async def both(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, 1, 1)

    @app.handler(first)
    async def other(payment: Payment, tx: Tx) -> None:
        tx.defer(UPDATE, 1, 1)

    @app.handler(first, idempotent=False)
    async def free(payment: Payment) -> None:
        raise AssertionError("not run in a rebuild")

    await migrated(
        place.dsn,
        """create function nothing() returns trigger language plpgsql as $$ begin return new; end $$;
           create trigger silent before insert on effects for each row execute function nothing()""",
    )
    await place.send(first, uuid_payment("a", partition=0))
    await mark_settled(place, app)
    async with reader(place.settings()) as source, app.running():
        result = await rebuild(app, place.settings(), source, [Partition(first, 0)], handlers=["both"])
    notes = "\n".join(result.notes)
    assert f"1 of 2 partitions of {first}" in notes
    assert "not run: other;" in notes
    assert f"handler both also takes {second}" in notes
    assert any(
        "public.effects has triggers that do not run in a rebuild (silent)" in unknown["text"]
        for unknown in result.unknown
    )
    result = await rebuilt(place, app, first)
    assert "handler free opted out of the ledger and was left out" in result.notes


# -- ends -----------------------------------------------------------------------------------------------------------------


async def test_one_that_is_ended_in_the_middle_leaves_nothing(place: Place) -> None:
    topic = await place.topic()
    reached = asyncio.Event()
    app = new_app()

    @app.handler(topic)
    async def settle(payment: Payment, tx: Tx) -> None:
        await tx.execute(INSERT, payment.id, payment.account, payment.amount)
        await tx.execute(UPDATE, payment.account, payment.amount)
        if payment.id == "p20":
            reached.set()
            await asyncio.Event().wait()

    await place.send(topic, *[uuid_payment(f"p{n}") for n in range(30)])
    await mark_settled(place, app)
    before = await all_rows(place.dsn)
    task = asyncio.create_task(rebuilt(place, app))
    await asyncio.wait_for(reached.wait(), 30)
    assert await value(place.dsn, "select count(*) from pg_class where relpersistence = 't' and relkind = 'r'") == 0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    async def gone() -> bool:
        return not await value(
            place.dsn,
            "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()",
        )

    await until("the connection to be gone", gone)
    assert await all_rows(place.dsn) == before
    written = "select coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0) from pg_stat_user_tables where relname = $1"
    assert await value(place.dsn, written, "effects") == 0


async def test_a_connection_that_is_lost_ends_it_with_one_line(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic)

    @app.handler(topic)
    async def kill(payment: Payment, tx: Tx) -> None:
        if payment.id == "p3":
            pid = await tx.fetchval("select pg_backend_pid()")
            await query(place.dsn, "select pg_terminate_backend($1)", pid)
            await tx.execute(UPDATE, 1, 1)

    await place.send(topic, *[uuid_payment(f"p{n}") for n in range(5)])
    await mark_settled(place, app)
    before = await all_rows(place.dsn)
    with pytest.raises(CannotTell, match="nothing was changed, and it can be run again"):
        await rebuilt(place, app)
    assert await all_rows(place.dsn) == before


async def test_role_without_the_right_to_temporary_tables_is_an_error(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic)
    await place.send(topic, uuid_payment("a"))
    await mark_settled(place, app)
    name = place.dsn.rsplit("/", 1)[1]
    role = f"role_{uuid.uuid4().hex[:8]}"
    await query(place.dsn, f"revoke temporary on database {name} from public")
    await query(place.dsn, f"create role {role} login password 'x'")
    dsn = f"postgresql://{role}:x@{place.dsn.rsplit('@', 1)[1]}"
    await query(place.dsn, f"grant usage on schema consumer to {role}")
    await query(place.dsn, f"grant select on all tables in schema consumer to {role}")
    await query(place.dsn, f"grant pg_read_all_settings, pg_monitor to {role}")
    with pytest.raises(Misconfigured, match="permission denied to create temporary tables in database"):
        await rebuilt(place, app, settings=settings_for(dsn, place.kafka))


async def test_behind_a_pooler_it_works_too(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic)
    await place.send(topic, *[uuid_payment(f"p{n}", n % 3) for n in range(20)])
    await consume_all(app, place.settings())
    await query(place.dsn, "delete from effects where id = 'p4'")
    result = await rebuilt(place, app, settings=place.settings(postgres_pooler=True))
    assert [difference["messages"] for difference in result.differences] == [[message_id("p4")]]


async def test_the_example_application_agrees(
    kafka: Kafka, database: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(billing, "name", f"billing-{uuid.uuid4().hex[:8]}")
    await migrated(database, (ROOT / "handlers" / "schema.sql").read_text())
    place = Place(kafka.bootstrap_servers, database, redis_url)
    for topic in billing.topics:
        async with reader(place.settings()) as source:
            there = (await source.log.partitions([topic]))[topic]
        if not there:
            await new_topic(kafka.bootstrap_servers, 2, topic)
    names = [str(uuid.uuid4()) for _ in range(40)]

    def paid(n: int) -> Sent:
        return Sent({"payment_id": names[n], "account": n % 7, "amount": 1000 + n}, id=names[n], key=str(n % 7))

    await produce(place.kafka, "payments", [*map(paid, range(40)), *map(paid, range(5))])
    refunds = [
        Sent({"refund_id": str(uuid.uuid4()), "payment_id": names[n % 40], "amount": 30 * n - 60}, key=names[n % 40])
        for n in range(60)
    ]
    await produce(place.kafka, "refunds", refunds)
    entries = [Sent({"entry_id": f"{names[0]}-{n % 90}", "account": n % 10, "amount": n % 90}) for n in range(100)]
    await produce(place.kafka, "ledger", entries)
    # Other tests have sent to topics of these names: all of it is settled here, for the first time in this database.
    settings = place.settings()
    await consume_all(billing, settings)
    before = await all_rows(database)
    result = await rebuilt(place, billing)
    assert result.agrees and not result.unknown, (result.differences, result.unknown)
    assert result.dead_lettered > 0 and result.failed == 0
    assert {table["table"] for table in result.tables} == {
        "public.accounts", "public.audit_trail", "public.bookings", "public.payments", "public.receipts",
    }  # fmt: skip
    assert await all_rows(database) == before
    await query(
        database, "update accounts set balance = balance + 1030 where account = 2"
    )  # the payment of 30, doubled
    result = await rebuilt(place, billing, "payments", "refunds")
    account = next(difference for difference in result.differences if difference["table"] == "public.accounts")
    assert account["explained"] and account["messages"] == [names[30]]
