"""Verdicts of a rebuild: order, columns that change, reasons for doubt.

Order across partitions and topics.
"""

from __future__ import annotations

import uuid
from typing import Any

import asyncpg
import msgspec
import pytest
from harness import Place, Sent, consume_all, drained, migrated, query, working
from payments_app import payments_app
from rebuild_runs import app_with_handler, message_id, new_app, numbered, rebuilt, unknown_kinds, uuid_payment

from consumer import App, Tx
from consumer.core.errors import Misconfigured
from consumer.handler_records import coverage

TABLES = """
create table orders (id text primary key, status text not null, deleted_at timestamptz);
create table latest (only_one int primary key, value int not null);
"""


class Renamed(msgspec.Struct):
    id: str
    branch: int


async def spread(place: Place) -> None:
    """Move the ledger's transactions apart, as if a minute had passed."""
    await query(
        place.dsn,
        """update consumer.ledger l set applied_at = applied_at + place * interval '1 minute' from
           (select at, rank() over (order by at) as place from (select distinct applied_at as at from consumer.ledger) a) r
           where r.at = l.applied_at""",
    )


async def test_topics_settled_one_after_the_other_are_rebuilt_in_that_order(place: Place) -> None:
    """Three topics insert, pay and ship an order.

    The last status depends on the order of all.
    """
    await migrated(place.dsn, TABLES)
    app = new_app()
    topics = [await place.topic(2) for _ in range(3)]

    @app.handler(topics[0], name="insert")
    async def insert(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into orders (id, status) values ($1, 'new')", str(body["n"]))

    @app.handler(topics[1], name="pay")
    async def pay(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("update orders set status = 'paid' where id = $1 and status = 'new'", str(body["n"]))

    @app.handler(topics[2], name="ship")
    async def ship(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("update orders set status = 'shipped' where id = $1 and status = 'paid'", str(body["n"]))

    async with working(app, place.settings()):
        for topic in topics:
            await place.send(topic, *[Sent({"n": n}, id=message_id(f"{topic}-{n}"), key=str(n)) for n in range(60)])
            await drained(app, place.settings())
    assert await query(place.dsn, "select distinct status from orders") == [("shipped",)]
    await spread(place)
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown
    await query(place.dsn, "update orders set status = 'paid' where id = '7'")
    result = await rebuilt(place, app)
    assert not result.agrees and not result.unknown
    [difference] = result.differences
    assert difference["columns"] == {"status": {"real": "paid", "rebuilt": "shipped"}}


@pytest.mark.parametrize("last", [0, 1])
async def test_last_writer_of_two_partitions_is_the_last_applied(place: Place, last: int) -> None:
    await migrated(place.dsn, TABLES)
    topic = await place.topic(2)

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into latest values (1, $1) on conflict (only_one) do update set value = $1", body["n"])

    app = app_with_handler(topic, handle)
    async with working(app, place.settings()):
        for n, partition in enumerate([1 - last, last, 1 - last, last]):
            await place.send(topic, Sent({"n": n}, id=message_id(f"m{n}"), partition=partition))
            await drained(app, place.settings())
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown
    await query(place.dsn, "update latest set value = 2")
    result = await rebuilt(place, app)  # the four transactions may have overlapped, as far as the ledger knows
    assert unknown_kinds(result) == ["depends_on_order"] and "latest" in result.unknown[0]["text"]
    await spread(place)
    assert not (await rebuilt(place, app)).agrees


async def test_a_lost_soft_delete_is_found_and_a_right_one_agrees(place: Place) -> None:
    await migrated(place.dsn, TABLES)
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        if body["n"] <= 10:
            tx.defer("insert into orders (id, status) values ($1, 'new')", str(body["n"]))
        else:
            tx.defer("update orders set deleted_at = now() where id = $1", str(body["n"] - 10))

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(14))
    await consume_all(app, place.settings())
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown
    await query(place.dsn, "update orders set deleted_at = null where id = '3'")
    await query(place.dsn, "update orders set deleted_at = now() where id = '9'")
    result = await rebuilt(place, app)
    assert [difference["key"]["id"] for difference in result.differences] == ["3", "9"] and not result.unknown


async def test_messages_that_cannot_be_read_any_more_are_a_reason_for_doubt(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic)
    await place.send(topic, *[uuid_payment(f"p{n}") for n in range(5)])
    await consume_all(app, place.settings())
    changed = App(app.name)

    @changed.handler(topic)
    async def settle(payment: Renamed, tx: Tx) -> None:
        tx.defer("insert into effects values ($1, $2, 1)", payment.id, payment.branch)

    result = await rebuilt(place, changed)
    assert "unreadable_now" in unknown_kinds(result)


async def test_a_handler_that_writes_nothing_here_proves_nothing(place: Place) -> None:
    topic = await place.topic()
    enabled = True
    app = new_app()

    @app.handler(topic, name="settle")
    async def settle(body: dict[str, Any], tx: Tx) -> None:
        if enabled:
            tx.defer("insert into effects values ($1, 1, 1)", str(body["n"]))

    await place.send(topic, *numbered(5))
    await consume_all(app, place.settings())
    assert not (await rebuilt(place, app)).unknown
    enabled = False
    result = await rebuilt(place, app)
    assert unknown_kinds(result) == ["nothing_compared"] and "settle" in result.unknown[0]["text"]


async def test_tables_with_triggers_are_a_reason_for_doubt(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic)
    await query(
        place.dsn,
        """create function doubled() returns trigger language plpgsql as
           $$ begin new.amount := new.amount * 2; return new; end $$""",
    )
    await query(place.dsn, "create trigger twice before insert on effects for each row execute function doubled()")
    await place.send(topic, *[uuid_payment(f"p{n}") for n in range(5)])
    await consume_all(app, place.settings())
    assert "triggers" in unknown_kinds(await rebuilt(place, app))


async def test_values_that_python_draws_are_found_by_rebuilding_twice(place: Place) -> None:
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into effects values ($1, $2, 1)", str(uuid.uuid4()), body["n"])

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(5))
    await consume_all(app, place.settings())
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown
    result = await rebuilt(place, app, ignore=["effects.id"])
    assert result.agrees and not result.unknown
    await query(place.dsn, "delete from effects where account = 2")
    assert not (await rebuilt(place, app, ignore=["effects.id"])).agrees


async def test_a_table_that_is_only_deleted_from_asks_for_its_first_rows(place: Place) -> None:
    """Deleted rows are gone from the real table.

    With today's rows nothing of it could be rebuilt.
    """
    await migrated(
        place.dsn, "create table stock (id int primary key, quantity int); insert into stock values (1, 5), (2, 6)"
    )
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        quantity = await tx.fetchval("delete from stock where id = $1 returning quantity", body["n"])
        tx.defer("insert into effects values ($1, 1, $2)", str(body["n"]), quantity or 0)

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(2))
    await consume_all(app, place.settings())
    with pytest.raises(Misconfigured, match=r"handlers delete from it and none inserts into it.*--base"):
        await rebuilt(place, app)
    base = "insert into stock values (1, 5), (2, 6)"
    assert (await rebuilt(place, app, base=base)).agrees
    await query(place.dsn, "update effects set amount = 0")
    assert not (await rebuilt(place, app, base=base)).agrees


async def test_a_transaction_of_a_batch_handler_is_replayed_as_a_whole(place: Place) -> None:
    """Neither duplicates nor slices may cut a transaction.

    Duplicates have no time, and a slice of the rebuild may end inside a transaction.
    """
    await migrated(place.dsn, TABLES)
    app, topic = new_app(), await place.topic()

    @app.handler(topic, name="insert")
    async def insert(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into orders (id, status) values ($1, 'new')", str(body["n"]))

    @app.handler(topic, name="count", batch=10)
    async def count(bodies: list[dict[str, Any]], tx: Tx) -> None:
        for body in bodies:
            there = await tx.fetchval("select count(*) from orders")
            tx.defer("insert into latest values ($1, $2)", body["n"], there)

    messages = numbered(6)
    await place.send(topic, *messages[:3], messages[0], *messages[3:])
    await consume_all(app, place.settings())
    for most in (1, 4, 100):
        result = await rebuilt(place, app, settings=place.settings(batch_messages_max=most))
        assert result.agrees and not result.unknown


async def test_rows_from_before_the_handlers_are_no_fault_of_theirs(place: Place) -> None:
    seeds = "insert into latest select g, 100 from generate_series(1, 3) g"
    await migrated(place.dsn, f"{TABLES}; {seeds}")
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into latest values ($1, 7) on conflict (only_one) do update set value = 7", body["n"])

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(2))
    await consume_all(app, place.settings())
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown and any("latest" in note for note in result.notes)
    assert (await rebuilt(place, app, base=seeds)).agrees
    await query(place.dsn, "delete from latest where only_one = 3")
    assert (await rebuilt(place, app)).agrees
    await query(place.dsn, "insert into latest values (9, 9)")
    result = await rebuilt(place, app)
    assert [difference["kind"] for difference in result.differences] == ["extra"] and not result.unknown


def keeping(topic: str) -> App:
    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into latest values ($1, 7)", body["n"])

    return app_with_handler(topic, handle)


async def test_after_a_restore_nothing_is_said_of_the_first_rows(place: Place) -> None:
    await migrated(place.dsn, TABLES)
    app = keeping(topic := await place.topic())
    await place.send(topic, *numbered(3))
    await consume_all(app, place.settings(batch_messages_max=1))
    # As pg_restore does: each table in a transaction of its own.
    for table, column in (("latest", "value"), ("consumer.handlers", "name"), ("consumer.ledger", "id")):
        await query(place.dsn, f"update {table} set {column} = {column}")
    assert (await rebuilt(place, app)).agrees
    await query(place.dsn, "insert into latest values (9, 9)")
    result = await rebuilt(place, app)
    assert unknown_kinds(result) == ["beginning_not_kept"] and "restored" in result.unknown[0]["text"]
    await query(place.dsn, "delete from latest where only_one = 1")
    result = await rebuilt(place, app)  # a lost row is a fault
    assert not result.unknown and {difference["kind"] for difference in result.differences} == {"missing", "extra"}


async def test_a_changed_entry_of_a_handler_makes_no_first_rows_of_its_own(place: Place) -> None:
    await migrated(place.dsn, TABLES)
    app = keeping(topic := await place.topic())
    await place.send(topic, *numbered(3))
    await consume_all(app, place.settings())
    await query(place.dsn, "insert into latest values (9, 9)")
    await query(place.dsn, "update consumer.handlers set name = name")  # as a new name, or another topic, does
    result = await rebuilt(place, app)
    assert not result.unknown and [difference["kind"] for difference in result.differences] == ["extra"]


async def test_a_clock_that_stepped_back_makes_the_order_a_reason(place: Place) -> None:
    await migrated(place.dsn, TABLES)
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into latest values (1, $1) on conflict (only_one) do update set value = $1", body["n"])

    app = app_with_handler(topic, handle)
    await place.send(topic, *[Sent({"n": n}, id=message_id(f"m{n}"), key="a") for n in range(6)])
    await consume_all(app, place.settings())
    await query(
        place.dsn,
        """update consumer.ledger set applied_at = applied_at - case when "offset" < 3 then 0 else 1 end * interval '1 hour'""",
    )
    result = await rebuilt(place, app)  # the ledger's order ends with the third message
    assert unknown_kinds(result) == ["depends_on_order"] and result.agrees
    assert any("clock stepped back" in note for note in result.notes)
    await query(place.dsn, "delete from latest")  # missing in any order
    result = await rebuilt(place, app)
    assert [difference["kind"] for difference in result.differences] == ["missing"] and not result.unknown


@pytest.mark.parametrize(
    "doubt", ["a lost delete", "a restored ledger", "a lost row", "a lost older row", "a foreign row", "a function"]
)
async def test_rows_from_before_the_handlers_stay_a_doubt_where_they_may_matter(place: Place, doubt: str) -> None:
    await migrated(place.dsn, f"{TABLES}; insert into latest select g, 100 from generate_series(1, 4) g where g <> 2")
    topic = await place.topic()
    rebuilding: list[bool] = []

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into latest values ($1, 7) on conflict (only_one) do update set value = 7", body["n"])
        if rebuilding and doubt == "a lost delete":
            await tx.execute("delete from latest where only_one = 4")

    app = app_with_handler(topic, handle)
    for message in numbered(2):
        await place.send(topic, message)
        await consume_all(app, place.settings())
    match doubt:
        case "a restored ledger":
            await query(place.dsn, "update consumer.ledger set applied_at = applied_at")
        case "a lost row":
            await query(place.dsn, "delete from latest where only_one = 2")
        case "a lost older row":
            await query(place.dsn, "delete from latest where only_one = 4")
        case "a foreign row":
            await query(place.dsn, "insert into latest values (9, 9)")
        case "a function":
            await query(place.dsn, "create function touch() returns int language sql volatile as 'select 1'")
    rebuilding.append(True)
    result = await rebuilt(place, app)
    assert result.unknown or not result.agrees
    expected = "beginning_not_kept" if doubt == "a restored ledger" else "began_with_rows"
    assert expected in unknown_kinds(result) or doubt in ("a lost row", "a foreign row")


@pytest.mark.parametrize("declared", [True, False])
async def test_message_that_a_new_handler_need_not_settle_is_no_conflict(place: Place, declared: bool) -> None:
    """Two handlers read one topic; the id came twice, with different payloads.

    The first time was before the second handler was there.
    """
    await migrated(place.dsn, TABLES)
    topic = await place.topic()

    def register(app: App, name: str) -> None:
        async def handle(body: dict[str, Any], tx: Tx) -> None:
            tx.defer("insert into orders values ($1, 'new')", f"{name} {body['n']}")

        app.handler(topic, name=name)(handle)

    def app_with(*names: str) -> App:
        app = App(f"app-{topic}")
        for name in names:
            register(app, name)

        return app

    first, both = app_with("a"), app_with("a", "b")
    await place.send(topic, *[Sent({"n": n}, id=message_id("one"), key="k") for n in (1,)], *numbered(2))
    await consume_all(first, place.settings())
    await place.send(topic, Sent({"n": 9}, id=message_id("one"), key="k"))
    await consume_all(both, place.settings())
    if declared:
        connection = await asyncpg.connect(place.dsn)
        await coverage.begin_here(connection, both, "b", topic)
        await connection.close()
    result = await rebuilt(place, both)
    assert unknown_kinds(result) == ([] if declared else ["id_conflict"]) and result.agrees is declared
