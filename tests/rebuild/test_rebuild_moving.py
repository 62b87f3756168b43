"""Rebuilds of values that depend on when a handler ran.

A different value is no fault; a lost row is one.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from datetime import date, timedelta
from typing import Any

import pytest
from harness import Place, Sent, consume_all, drained, migrated, query, working
from rebuild_runs import app_with_handler, message_id, numbered, rebuilt, unknown_kinds

from consumer import App, Message, Tx
from consumer.replay.rebuild_verdict import UNSTABLE

VOLATILE = """
create function stamp() returns text language sql volatile as $$ select 'at ' || clock_timestamp() $$;
create function today() returns date language plpgsql volatile as $$ begin return now()::date; end $$;
"""
# How a table is made and written, and what makes its rows those of a day or more ago.
WAYS = {
    "current_date": ("day date", "insert into made (id, day) values ($1, current_date)", "day = day - 1"),
    "a default of current_date": (
        "day date default current_date",
        "insert into made (id) values ($1)",
        "day = day - 1",
    ),
    "days to come": ("day date", "insert into made (id, day) values ($1, current_date + 30)", "day = day - 1"),
    "a text of the day": (
        "day text",
        "insert into made values ($1, to_char(now(), 'YYYY-MM-DD'))",
        "day = '2020-01-01'",
    ),
    "a function's day": ("day date default today()", "insert into made (id) values ($1)", "day = day - 1"),
    "a function's text": ("at text default stamp()", "insert into made (id) values ($1)", "at = 'at some time'"),
    "the hour": (
        "at timestamptz",
        "insert into made values ($1, date_trunc('hour', now()))",
        "at = at - interval '1 hour'",
    ),
    "the month": (
        "at date",
        "insert into made values ($1, date_trunc('month', now()))",
        "at = at - interval '1 month'",
    ),
    "an hour from now": (
        "at timestamptz",
        "insert into made values ($1, now() + interval '1 hour')",
        "at = at - interval '1 day'",
    ),
    "a default from now": (
        "at timestamp default now() + interval '1 hour'",
        "insert into made (id) values ($1)",
        "at = at - interval '1 day'",
    ),
    "Python's day": ("day date", "insert into made values ($1, $2)", "day = day - 1"),
}


@pytest.mark.parametrize("has_key", [True, False], ids=["with a key", "without a key"])
@pytest.mark.parametrize("way", WAYS)
async def test_values_of_the_day_or_time_are_no_fault_later(place: Place, way: str, has_key: bool) -> None:
    column, insert, earlier = WAYS[way]
    await migrated(place.dsn, f"{VOLATILE} create table made (id int {'primary key' if has_key else ''}, {column})")
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer(insert, body["n"], *([date.today()] if "$2" in insert else []))

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(5))
    await consume_all(app, place.settings())
    await query(place.dsn, f"update made set {earlier}")
    result = await rebuilt(place, app)
    assert not result.differences
    assert all(unknown["kind"] in UNSTABLE and "public.made" in unknown["text"] for unknown in result.unknown)
    await query(place.dsn, "delete from made where id = 3")
    result = await rebuilt(place, app)
    if has_key:
        assert [(difference["kind"], difference["key"]) for difference in result.differences] == [
            ("missing", {"id": "3"})
        ]
    else:
        assert result.differences or result.unknown


async def test_counts_by_day_are_no_fault_later(place: Place) -> None:
    await migrated(place.dsn, "create table daily (day date primary key, n int not null)")
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into daily values (current_date, 1) on conflict (day) do update set n = daily.n + 1")

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(5))
    await consume_all(app, place.settings())
    assert (await rebuilt(place, app)).agrees
    await query(place.dsn, "update daily set day = day - 1")
    result = await rebuilt(place, app)
    assert not result.differences and unknown_kinds(result) and set(unknown_kinds(result)) <= set(UNSTABLE)


async def test_day_that_a_message_says_is_compared(place: Place) -> None:
    """A date that is not the rebuild's own.

    And a soft delete by date that was lost.
    """
    await migrated(place.dsn, "create table due (id int primary key, day date, deleted_on date)")
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        if body["n"] <= 5:
            day = date(2020, 1, 1) + timedelta(days=body["n"])
            tx.defer("insert into due (id, day) values ($1, $2)", body["n"], day)
        else:
            tx.defer("update due set deleted_on = current_date where id = $1", body["n"] - 5)

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(8))
    await consume_all(app, place.settings())
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown
    await query(place.dsn, "update due set day = day - 1 where id = 2")
    await query(place.dsn, "update due set deleted_on = null where id = 3")
    result = await rebuilt(place, app)
    assert [difference["key"]["id"] for difference in result.differences] == ["2", "3"] and not result.unknown


async def test_numbers_with_gaps_are_no_fault(place: Place) -> None:
    """Numbers of a default, and those that the handler asked for.

    A number that a rollback took is not in the table.
    """
    await migrated(place.dsn, "create table numbered (id serial primary key, n int)")
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        await tx.execute("insert into numbered values (nextval('numbered_id_seq'), $1)", body["n"])

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(3))
    await consume_all(app, place.settings())
    await query(place.dsn, "select nextval('numbered_id_seq') from generate_series(1, 7)")
    await place.send(topic, *numbered(6)[3:])
    await consume_all(app, place.settings())
    result = await rebuilt(place, app)
    assert (
        not result.differences and unknown_kinds(result) == ["depends_on_order"] and "id" in result.unknown[0]["text"]
    )


async def test_keys_from_python_are_no_fault_in_any_table(place: Place) -> None:
    await migrated(place.dsn, "create table made (id uuid primary key, n int)")
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into made values ($1, $2)", uuid.uuid4(), body["n"])

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(5))
    await consume_all(app, place.settings())
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown


async def test_id_on_two_partitions_is_replayed_from_where_it_was_applied(place: Place) -> None:
    """The handler stores what only one of the two records has."""
    await migrated(place.dsn, "create table seen (id text primary key, partition int, at bigint)")
    topic = await place.topic(2)
    app = App(f"app-{topic}")

    @app.handler(topic, name="note")
    async def note(message: Message[dict[str, Any]], tx: Tx) -> None:
        at = int(message.timestamp.timestamp() * 1000) if hasattr(message.timestamp, "timestamp") else message.timestamp
        tx.defer("insert into seen values ($1, $2, $3)", message.id, message.partition, at)

    async with working(app, place.settings()):
        for n in range(6):
            for partition in (n % 2, 1 - n % 2):
                await place.send(topic, Sent({"n": n}, id=message_id(f"m{n}"), partition=partition))
                await drained(app, place.settings())
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown
    await query(place.dsn, "update seen set at = at + 1 where id = (select max(id) from seen)")
    assert len((await rebuilt(place, app)).differences) == 1


async def test_trigger_that_sets_a_column_and_rule_are_reasons(place: Place) -> None:
    await migrated(
        place.dsn,
        """
        create table made (id int primary key, twice int); create table other (id int primary key); create table copied (id int);
        create function double() returns trigger language plpgsql as $$ begin new.twice := new.id * 2; return new; end $$;
        create trigger double before insert on made for each row execute function double();
        create rule copy as on insert to other do also insert into copied values (new.id);
        """,
    )
    await query(place.dsn, 'grant all on made, other, copied to "test-worker"')
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into made (id) values ($1)", body["n"])
        tx.defer("insert into other values ($1)", body["n"])

    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(3))
    await consume_all(app, place.settings())
    result = await rebuilt(place, app)
    assert sorted(unknown_kinds(result)) == ["rules", "triggers"]
    assert "public.made" in result.unknown[0]["text"] and "public.other" in result.unknown[1]["text"]


async def test_rebuilds_of_one_command_see_one_moment(place: Place) -> None:
    """A worker changes rows between a command's first and later rebuilds.

    It changes the row that has lost an effect.
    """
    await migrated(place.dsn, "create table totals (id int primary key, n int not null)")
    topic = await place.topic()

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        insert, update = "insert into totals values (1, $1)", "update totals set n = n + $1 where id = 1"
        tx.defer(insert if body["n"] == 1 else update, body["n"])

    app, worker = app_with_handler(topic, handle), app_with_handler(topic, handle)
    worker.name = app.name  # another process of the same service
    await place.send(topic, *numbered(5))
    await consume_all(app, place.settings())
    await query(place.dsn, "update totals set n = n - 3")

    async def go_on() -> None:
        await place.send(topic, *numbered(7)[5:])
        await consume_all(worker, place.settings())

    moved: list[str] = []

    def tell(text: str) -> None:
        if text.startswith("rows differ") and not moved:
            moved.append(text)
            going_on = threading.Thread(target=asyncio.run, args=(go_on(),))
            going_on.start()
            going_on.join()

    result = await rebuilt(place, app, tell=tell)
    assert moved and await query(place.dsn, "select n from totals") == [(25,)]
    assert not result.unknown and [(difference["kind"], difference["key"]) for difference in result.differences] == [
        ("different", {"id": "1"})
    ]
