"""Writes that triggers, rules, policies and views suppress.

One line says so, and nothing waits for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from scheme_database import RecordedDatabase

from consumer.core.errors import RunAgain
from consumer.schemes.database import Misfit, NotFound
from consumer.schemes.states import Moved, StateMachine
from consumer.schemes.unique import insert_once
from consumer.schemes.versioned import Stale, update_versioned

TABLE = """
create table orders (id int primary key, status text not null default 'new', version bigint not null default 0);
insert into orders values (1), (2);
do $$ begin create role plain_writer; exception when duplicate_object then null; end $$;
grant all on orders to plain_writer;
"""
ORDERS = StateMachine("orders", "status", {"new": {"paid"}, "paid": {"shipped"}, "shipped": ()})

FUNCTION = "create function act() returns trigger language plpgsql as $$ begin {} end $$;"
TRIGGER = FUNCTION + "create trigger act before {} on orders for each row execute function act();"
WAYS = {
    "a trigger that returns null": TRIGGER.format("return null;", "update"),
    "a trigger for some rows": TRIGGER.format("if old.id = 1 then return null; end if; return new;", "update"),
    "a trigger that returns the old row": TRIGGER.format("return old;", "update"),
    "a rule": "create rule act as on update to orders do instead nothing;",
    "a conditional rule": "create rule act as on update to orders where old.id = 1 do instead nothing;",
    "a policy": """alter table orders enable row level security;
        create policy seen on orders for select using (true);
        create policy changed on orders for update using (id <> 1); set role plain_writer;""",
    "a view with a trigger": """alter table orders rename to real; create view orders as select * from real;"""
    + FUNCTION.format("return null;")
    + "create trigger act instead of update on orders for each row execute function act();",
    "a view that cannot be written": """alter table orders rename to real;
        create view orders as select id, max(status) as status, max(version) as version from real group by id;""",
    "a materialized view": """alter table orders rename to real;
        create materialized view orders as select * from real;""",
    "a generated column": """drop table orders; create table orders (id int primary key, real_status text,
        status text generated always as ('new') stored, version bigint default 0);
        insert into orders values (1);""",
}


@pytest.fixture(autouse=True)
async def tables(connection: asyncpg.Connection) -> None:
    await connection.execute(TABLE)


@pytest.mark.parametrize("way", WAYS)
async def test_update_versioned_that_is_suppressed_is_a_misfit(connection: asyncpg.Connection, way: str) -> None:
    await connection.execute(WAYS[way])
    before = await connection.fetchval("select status from orders where id = 1")
    with pytest.raises(Misfit, match="update_versioned of orders: ") as raised:
        async with asyncio.timeout(30), connection.transaction():
            await update_versioned(connection, "orders", {"id": 1}, expected=0, set={"status": "paid"})
    assert "instead of 0" not in str(raised.value)
    assert await connection.fetchval("select status from orders where id = 1") == before


@pytest.mark.parametrize("way", WAYS)
async def test_move_that_is_suppressed_is_a_misfit(connection: asyncpg.Connection, way: str) -> None:
    await connection.execute(WAYS[way])
    with pytest.raises(Misfit, match="status to 'paid': "):
        async with asyncio.timeout(30), connection.transaction():
            await ORDERS.move(connection, 1, "paid")
    assert await connection.fetchval("select status from orders where id = 1") == "new"


async def test_row_that_a_policy_hides_is_missing(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "alter table orders enable row level security; create policy own on orders using (id <> 1); set role plain_writer"
    )
    with pytest.raises(NotFound):
        await update_versioned(connection, "orders", {"id": 1}, expected=0, set={"status": "paid"})
    with pytest.raises(NotFound):
        await ORDERS.move(connection, 1, "paid")
    assert await ORDERS.move(connection, 2, "paid") is Moved.NOW


async def test_triggers_that_let_the_update_through_do_not_matter(connection: asyncpg.Connection) -> None:
    await connection.execute(TRIGGER.format("new.version = old.version + 1; return new;", "update"))
    assert await update_versioned(connection, "orders", {"id": 1}, expected=0, set={"status": "paid"}) == 1
    assert await ORDERS.move(connection, 1, "shipped") is Moved.NOW


async def test_errors_of_the_applications_trigger_come_as_they_are(connection: asyncpg.Connection) -> None:
    """Their text is the application's, and may hold values."""
    await connection.execute(TRIGGER.format("raise exception 'secret' using errcode = '55000';", "update"))
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError):
        await update_versioned(connection, "orders", {"id": 1}, expected=0, set={"status": "paid"})


async def test_a_version_ahead_of_the_row_is_stale_and_no_misfit(connection: asyncpg.Connection) -> None:
    with pytest.raises(Stale) as raised:
        await update_versioned(connection, "orders", {"id": 1}, expected=3, set={"status": "x"})
    assert isinstance(raised.value, RunAgain) and (raised.value.expected, raised.value.found) == (3, 0)


async def test_a_row_that_another_moves_meanwhile_is_not_taken_for_suppressed(connection: asyncpg.Connection) -> None:
    class Racing(RecordedDatabase):
        """Moves the row before the first statement, and back before the second."""

        raced = False

        async def fetch(self, sql: str, /, *args: Any) -> list[Any]:
            if sql.startswith("update") and not self.raced:
                self.raced = True
                await connection.execute("update orders set version = 9, status = 'shipped'")
                rows = await super().fetch(sql, *args)
                await connection.execute("update orders set version = 0, status = 'new'")
                return rows
            return await super().fetch(sql, *args)

    assert await update_versioned(Racing(connection), "orders", {"id": 1}, expected=0, set={"status": "new"}) == 1
    assert await ORDERS.move(Racing(connection), 1, "paid") is Moved.NOW


@pytest.mark.parametrize(
    ("setup", "says"),
    [
        (TRIGGER.format("return null;", "insert"), "suppresses"),
        ("create rule act as on insert to orders do instead nothing", "rule"),
        ("drop table orders; create table orders (id int, unique (id) deferrable initially immediate)", "deferrable"),
        ("drop table orders; create table orders (id int, unique (id) deferrable initially deferred)", "deferrable"),
        ("alter table orders rename to real; create view orders as select distinct id from real", "view"),
    ],
    ids=["trigger", "rule", "deferrable", "deferred", "view"],
)
async def test_insert_once_that_cannot_insert_is_a_misfit(
    connection: asyncpg.Connection, setup: str, says: str
) -> None:
    await connection.execute(setup)
    with pytest.raises(Misfit, match=says):
        await insert_once(connection, "orders", {"id": 7}, "id")


async def test_insert_once_says_no_only_when_the_row_is_there(connection: asyncpg.Connection) -> None:
    await connection.execute(TRIGGER.format("if new.id = 7 then return null; end if; return new;", "insert"))
    assert await insert_once(connection, "orders", {"id": 8}, "id")
    assert not await insert_once(connection, "orders", {"id": 8}, "id")
    with pytest.raises(Misfit, match="insert_once into orders: no row was inserted"):
        await insert_once(connection, "orders", {"id": 7}, "id")
