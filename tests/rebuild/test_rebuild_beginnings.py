"""Rebuilds of tables with rows from before the first message.

What is not known of these rows is no fault.
"""

from __future__ import annotations

from typing import Any

import pytest
from harness import Place, Sent, consume_all, migrated, query
from rebuild_runs import app_with_handler, message_id, numbered, rebuilt, unknown_kinds

from consumer import App, Reject, Tx
from consumer.rebuild.update_targets import UpdateTarget, update_target

PEOPLE = """
create table people (id int primary key, kind text not null default 'a', note text, balance int not null default 0);
insert into people (id, note) select n, 'seed ' || n from generate_series(1, 20) n;
"""


@pytest.mark.parametrize(
    ("sql", "sought"),
    [
        ("update people set note = $1 where id = $2", UpdateTarget("people", (("id", 1),))),
        (
            "update people p set note = $1 where p.id = $2::int and p.kind = $3",
            UpdateTarget("people", (("id", 1), ("kind", 2))),
        ),
        (
            "update people set note = 'x' where id = $1 and balance > 3 returning note",
            UpdateTarget("people", (("id", 0),)),
        ),
        ("update people set id = id + 1 where id = $1", None),
        ("update people set note = $1", None),
        ("update people set note = $1 where id = $2 or id = 3", None),
        ("update people set note = $1 where id = any($2)", None),
        ("update public.people set note = $1 where id = $2", None),
        ("delete from people where id = $1", None),
        ("insert into people values ($1)", None),
    ],
)
def test_update_that_looks_for_rows_by_key_is_read(sql: str, sought: UpdateTarget | None) -> None:
    assert update_target(sql) == sought


async def after(place: Place, handle: Any, messages: list[Sent], tables: str = PEOPLE, **options: Any) -> App:
    await migrated(place.dsn, tables)
    topic = await place.topic()
    app = app_with_handler(topic, handle, **options)
    await place.send(topic, *messages)
    await consume_all(app, place.settings())
    return app


WAYS = ["deferred", "awaited", "returning", "many", "condition"]


@pytest.mark.parametrize("way", WAYS)
async def test_deleted_row_that_messages_had_updated_is_a_reason(place: Place, way: str) -> None:
    async def handle(body: dict[str, Any], tx: Tx) -> None:
        key = body["n"]
        match way:
            case "deferred":
                tx.defer("update people set balance = balance + $2 where id = $1", key, 5)
            case "awaited":
                await tx.execute("update people set balance = balance + $2 where id = $1", key, 5)
            case "returning":
                await tx.fetchval("update people set balance = balance + 5 where id = $1 returning balance", key)
            case "many":
                await tx.executemany("update people set balance = balance + 5 where id = $1", iter([(key,)]))
            case _:
                tx.defer("update people set balance = balance + 5 where id = $1 and kind = 'a' and balance < 9", key)

    app = await after(place, handle, numbered(9))
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown
    await query(place.dsn, "delete from people where id = 3")
    result = await rebuilt(place, app)
    assert result.agrees and unknown_kinds(result) == ["rows_gone"]
    text = result.unknown[0]["text"]
    assert "public.people: 1 rows that handler handle updates by id are not there" in text
    assert message_id("m3") in text
    base = "insert into people (id, note) select n, 'seed ' || n from generate_series(1, 20) n"
    result = await rebuilt(place, app, base=base)
    assert not result.agrees and not result.unknown


async def test_rows_that_were_never_there_are_no_reason(place: Place) -> None:
    """Statistics show that the table never lost a row.

    And a rejected message, or a failed one, had no effect.
    """

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tag = await tx.execute("update people set balance = balance + 1 where id = $1", body["n"])
        if tag == "UPDATE 0" and body["n"] % 2:
            raise Reject("no such person")

    app = await after(place, handle, numbered(30))
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown
    await query(place.dsn, "delete from people where id = 20")
    [reason] = (await rebuilt(place, app)).unknown
    assert reason["kind"] == "rows_gone" and reason["count"] == 6  # 20, and 22 to 30


async def test_updates_of_unknown_rows_are_a_doubt_once_rows_are_gone(place: Place) -> None:
    async def handle(body: dict[str, Any], tx: Tx) -> None:
        await tx.execute("update people set balance = balance + 1 where id = any($1)", [body["n"], body["n"] + 1])

    app = await after(place, handle, numbered(5))
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown
    await query(place.dsn, "delete from people where id = 2")
    result = await rebuilt(place, app)
    assert (
        unknown_kinds(result) == ["rows_gone"]
        and "update balance of rows that cannot be derived" in result.unknown[0]["text"]
    )


async def test_updated_column_without_a_default_has_an_unknown_beginning(place: Place) -> None:
    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("update people set note = $2 where id = $1", body["n"], f"note {body['n']}")

    app = await after(place, handle, numbered(5))
    result = await rebuilt(place, app)
    assert not result.differences and unknown_kinds(result) == ["beginning_unknown"]
    assert (
        "public.people: 15 rows differ" in result.unknown[0]["text"] and "(columns note)" in result.unknown[0]["text"]
    )
    await query(place.dsn, "update people set note = 'lost' where id = 2")  # whatever it began with, a message wrote it
    result = await rebuilt(place, app)
    assert [difference["key"] for difference in result.differences] == [{"id": "2"}]
    base = "insert into people (id, note) select n, 'seed ' || n from generate_series(1, 20) n"
    assert [difference["key"] for difference in (await rebuilt(place, app, base=base)).differences] == [{"id": "2"}]


async def test_balances_that_did_not_begin_with_the_default_are_no_fault(place: Place) -> None:
    tables = (
        "create table people (id int primary key, balance int not null default 0); insert into people values (1, 100)"
    )

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("update people set balance = balance + $1 where id = 1", body["n"])

    app = await after(place, handle, numbered(5), tables)
    result = await rebuilt(place, app)
    assert not result.differences and unknown_kinds(result) == ["beginning_unknown"]
    assert (await rebuilt(place, app, base="insert into people values (1, 100)")).agrees


@pytest.mark.parametrize("others", [False, True], ids=["seeded", "not seeded"])
async def test_upsert_into_a_table_with_rows_is_no_fault(place: Place, others: bool) -> None:
    tables = "create table stock (sku text primary key, amount int not null)"
    seeds = "insert into stock select 's' || n, 100 from generate_series(1, 20) n"
    upsert = "insert into stock values ($1, 1) on conflict (sku) do update set amount = stock.amount + 1"

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer(upsert, f"s{body['n']}")

    app = await after(place, handle, numbered(5), f"{tables}; {'' if others else seeds}")
    result = await rebuilt(place, app)
    assert not result.differences
    if others:
        assert result.agrees and not result.unknown
        await query(place.dsn, "update stock set amount = amount + 1 where sku = 's2'")
        await query(place.dsn, "insert into stock values ('foreign', 1)")
        result = await rebuilt(place, app)  # most rows are as if the table had been empty
        assert (
            sorted(difference["kind"] for difference in result.differences) == ["different", "extra"]
            and not result.unknown
        )
    else:
        assert unknown_kinds(result) == ["beginning_unknown"] and "public.stock" in result.unknown[0]["text"]
        assert (await rebuilt(place, app, base=seeds)).agrees
        await query(place.dsn, "delete from stock where sku = 's2'")
        result = await rebuilt(place, app)
        assert [(difference["kind"], difference["key"]["sku"]) for difference in result.differences] == [
            ("missing", "s2")
        ]


async def test_row_decided_by_the_last_message_is_a_fault_despite_its_beginning(place: Place) -> None:
    tables = "create table latest (one int primary key, value int not null)"

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into latest values (1, $1) on conflict (one) do update set value = $1", body["n"])

    app = await after(place, handle, numbered(3), tables)
    assert (await rebuilt(place, app)).agrees
    await query(place.dsn, "update latest set value = 2")
    result = await rebuilt(place, app)
    assert [difference["kind"] for difference in result.differences] == ["different"] and not result.unknown
