"""A row's state moves forward only; and what that leaves open.

On a real PostgreSQL.
"""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from scheme_database import Connect, RecordedDatabase

from consumer import ConsumerError, Reject
from consumer.core.errors import RunAgain
from consumer.schemes.database import Misfit, NotFound
from consumer.schemes.states import Held, IllegalMove, Moved, NotMoved, StateMachine, TooEarly, TooLate

MOVES = {"new": {"paid", "void"}, "paid": {"shipped"}, "shipped": (), "void": ()}
ORDERS = StateMachine("orders", "status", MOVES)
QUOTED = "', '".join(MOVES)


@pytest.fixture(autouse=True)
async def tables(connection: asyncpg.Connection) -> None:
    await connection.execute(
        f"""create table orders (id int primary key, status text check (status in ('{QUOTED}')));
            insert into orders select n, 'new' from generate_series(1, 9) n"""
    )


async def state(connection: asyncpg.Connection, id: int = 1) -> str:
    return str(await connection.fetchval("select status from orders where id = $1", id))


async def test_each_way_in_which_a_move_ends_has_a_word_of_its_own(connection: asyncpg.Connection) -> None:
    with pytest.raises(Held) as held:
        await ORDERS.move(connection, 1, "shipped")
    assert (held.value.current, held.value.to) == ("new", "shipped")
    with pytest.raises(TooEarly):
        await ORDERS.move(connection, 1, "shipped", early="reject")
    assert await ORDERS.move(connection, 1, "paid") is Moved.NOW
    assert await ORDERS.move(connection, 1, "paid") is Moved.REPEATED
    assert await ORDERS.move(connection, 1, "shipped", expected_from="paid") is Moved.NOW
    with pytest.raises(TooLate) as late:
        await ORDERS.move(connection, 1, "paid")
    assert (late.value.current, late.value.to) == ("shipped", "paid")
    with pytest.raises(IllegalMove):
        await ORDERS.move(connection, 1, "void")
    with pytest.raises(NotFound):
        await ORDERS.move(connection, 99, "paid")
    assert await state(connection) == "shipped"


def test_the_reaction_to_each_is_in_its_class() -> None:
    for refused in (IllegalMove, TooLate, TooEarly):
        assert issubclass(refused, NotMoved) and issubclass(refused, Reject)  # a dead letter at once, nothing lost
        assert not issubclass(refused, RunAgain)
    assert issubclass(Held, RunAgain) and not issubclass(Held, Reject)
    assert issubclass(NotFound, ConsumerError) and not issubclass(NotFound, Reject | RunAgain)
    assert bool(Moved.NOW) and not Moved.REPEATED


@pytest.mark.parametrize("final", ["shipped", "void"])
async def test_row_in_a_terminal_state_never_moves(connection: asyncpg.Connection, final: str) -> None:
    await connection.execute("update orders set status = $1 where id = 1", final)
    for to in MOVES:
        if to != final:
            with pytest.raises(NotMoved):
                await ORDERS.move(connection, 1, to)
    assert await state(connection) == final


async def test_of_many_at_the_same_time_one_moves_the_row(connect: Connect) -> None:
    connections = [await connect() for _ in range(10)]
    outcomes = await asyncio.gather(*[ORDERS.move(connection, 1, "paid") for connection in connections])
    assert sorted(map(bool, outcomes)) == [False] * 9 + [True]


async def test_of_two_ways_out_of_a_state_one_is_taken(connect: Connect) -> None:
    for id in range(1, 10):
        outcomes = await asyncio.gather(
            ORDERS.move(await connect(), id, "paid"), ORDERS.move(await connect(), id, "void"), return_exceptions=True
        )
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["IllegalMove", "Moved"]


async def test_a_row_that_moves_between_the_update_and_the_look_is_tried_again(connection: asyncpg.Connection) -> None:
    class Busy(RecordedDatabase):
        """Commits the state that allows the move, before the row is read.

        In another transaction.
        """

        async def fetch(self, sql: str, /, *args: Any) -> list[Any]:
            if not sql.startswith("update"):
                await connection.execute("update orders set status = 'paid' where id = 1")
            return await super().fetch(sql, *args)

    busy = Busy(connection)
    assert await ORDERS.move(busy, 1, "shipped") is Moved.NOW
    assert sum(sql.startswith("update") for sql in busy.statements) == 2


async def test_one_statement_when_it_moves(connection: asyncpg.Connection) -> None:
    database = RecordedDatabase(connection)
    assert await ORDERS.move(database, 1, "paid")
    assert len(database.statements) == 1
    assert not await ORDERS.move(database, 1, "paid")
    assert len(database.statements) == 3


async def test_state_that_the_moves_do_not_name_is_an_error(connection: asyncpg.Connection) -> None:
    await connection.execute("alter table orders drop constraint orders_status_check")
    await connection.execute(
        "update orders set status = 'lost' where id = 1; update orders set status = null where id = 2"
    )
    with pytest.raises(IllegalMove, match="do not name"):
        await ORDERS.move(connection, 1, "paid")
    with pytest.raises(IllegalMove, match="NULL"):
        await ORDERS.move(connection, 2, "paid")


async def test_a_call_that_cannot_be_meant_is_refused(connection: asyncpg.Connection) -> None:
    with pytest.raises(ValueError, match="is no state"):
        await ORDERS.move(connection, 1, "payed")
    with pytest.raises(ValueError, match="early="):
        await ORDERS.move(connection, 1, "paid", early="wait")  # type: ignore[arg-type]
    with pytest.raises(Misfit, match="no such table"):
        await StateMachine("order", "status", MOVES).move(connection, 1, "paid")
    with pytest.raises(Misfit, match="no such column"):
        await StateMachine("orders", "state", MOVES).move(connection, 1, "paid")


async def test_key_of_several_rows_is_an_error(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "create table lines (id int, status text); insert into lines values (1, 'new'), (1, 'new')"
    )
    machine = StateMachine("lines", "status", MOVES)
    with pytest.raises(Misfit, match="2 rows, which have all moved"):
        async with connection.transaction():
            await machine.move(connection, 1, "paid")
    assert await connection.fetchval("select count(*) from lines where status = 'new'") == 2
    with pytest.raises(Misfit, match=r"names 2 rows$"):
        await machine.move(connection, 1, "shipped")


async def test_an_enum_and_a_domain_are_columns_too(connection: asyncpg.Connection) -> None:
    await connection.execute(
        f"""create schema shop; create type shop.status as enum ('{QUOTED}');
            create domain shop.word as text check (value in ('{QUOTED}'));
            create table shop.orders (id uuid primary key, status shop.status, word shop.word);
            insert into shop.orders values ('00000000-0000-0000-0000-000000000001', 'new', 'new')"""
    )
    for column in ("status", "word"):
        machine = StateMachine("shop.orders", column, MOVES)
        assert await machine.move(connection, "00000000-0000-0000-0000-000000000001", "paid") is Moved.NOW
        assert await machine.move(connection, "00000000-0000-0000-0000-000000000001", "paid") is Moved.REPEATED
        assert await machine.check(connection) == []


# -- limits ---------------------------------------------------------------------------------------------------------------


async def test_limit_statements_beside_a_move_that_ignore_the_answer_are_doubled(
    connection: asyncpg.Connection,
) -> None:
    await connection.execute("create table account (balance int); insert into account values (0)")
    for _ in range(2):
        await ORDERS.move(connection, 1, "paid")
        await connection.execute("update account set balance = balance + 5")  # without asking
        if await ORDERS.move(connection, 2, "paid"):
            await connection.execute("update account set balance = balance + 100")
    assert await connection.fetchval("select balance from account") == 2 * 5 + 100


async def test_limit_a_second_round_through_a_cycle_looks_like_a_repetition(connection: asyncpg.Connection) -> None:
    machine = StateMachine("tries", "state", {"waiting": ["failed"], "failed": ["waiting"]})
    await connection.execute("create table tries (id int, state text); insert into tries values (1, 'waiting')")
    assert await machine.move(connection, 1, "failed") is Moved.NOW
    assert await machine.move(connection, 1, "failed") is Moved.REPEATED  # of the second try, or of the first? Unknown
    assert await machine.move(connection, 1, "waiting") is Moved.NOW
    assert (
        await machine.move(connection, 1, "failed") is Moved.NOW
    )  # and a late one of the first round would do the same


# -- the table's own constraint ---------------------------------------------------------------------------------------------


async def test_a_table_that_fits_has_no_differences(connection: asyncpg.Connection) -> None:
    assert await ORDERS.check(connection) == []


async def test_differences_are_reported_both_ways(connection: asyncpg.Connection) -> None:
    wider = StateMachine("orders", "status", {**MOVES, "shipped": ["returned"], "returned": ()})
    assert await wider.check(connection) == [
        "'returned' is a state of the moves, and constraint orders_status_check refuses it"
    ]
    fewer = StateMachine("orders", "status", {"new": ["paid"], "paid": ["shipped"], "shipped": ()})
    await connection.execute("update orders set status = 'void' where id < 3")
    assert await fewer.check(connection) == [
        "'void' is allowed by the table, and no state of the moves",
        "2 rows are in the state 'void', which the moves do not name",
    ]


@pytest.mark.parametrize(
    "constraint",
    [
        "status = 'new' or status = any (array['paid', 'void', 'shipped'])",
        "position(status in 'new paid void shipped') > 0 and status <> '' and status !~ ' '",  # any form: it is evaluated
        "status ~ '^(new|paid|void|shipped)$'",
    ],
)
async def test_a_constraint_of_any_form_is_understood(connection: asyncpg.Connection, constraint: str) -> None:
    await connection.execute("alter table orders drop constraint orders_status_check")
    await connection.execute(f"alter table orders add constraint states check ({constraint})")
    assert [
        problem for problem in await ORDERS.check(connection) if "refuses it" in problem or "through" in problem
    ] == []
    other = StateMachine("orders", "status", {**MOVES, "void": ["gone"], "gone": ()})
    assert "'gone' is a state of the moves, and constraint states refuses it" in await other.check(connection)


async def test_table_that_restricts_nothing_is_reported(connection: asyncpg.Connection) -> None:
    await connection.execute("alter table orders drop constraint orders_status_check")
    assert await ORDERS.check(connection) == [
        "neither an enum type nor a CHECK constraint keeps other states out of the column"
    ]
    await connection.execute("alter table orders add check (status <> '')")
    assert await ORDERS.check(connection) == ["the CHECK constraints let states through that nothing names"]
    await connection.execute("update orders set status = 'lost ' || repeat('x', 100) where id = 1")
    await connection.execute("update orders set status = null where id in (2, 3)")
    problems = await ORDERS.check(connection)
    assert "2 rows are in the state NULL, which the moves do not name" in problems
    assert f"1 rows are in the state 'lost {'x' * 35}', which the moves do not name" in problems


async def test_an_enum_is_compared_label_by_label(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "create type status as enum ('new', 'paid', 'lost'); create table others (id int, status status)"
    )
    assert await StateMachine("others", "status", MOVES).check(connection) == [
        "'shipped' is a state of the moves, and its enum type refuses it",
        "'void' is a state of the moves, and its enum type refuses it",
        "'lost' is allowed by the table, and no state of the moves",
    ]


async def test_a_quote_in_a_state_and_a_constraint_that_is_not_enforced(connection: asyncpg.Connection) -> None:
    await connection.execute("create table odd (id int, s text check (s in ('it''s', 'b')))")
    assert await StateMachine("odd", "s", {"it's": ["b"], "b": ()}).check(connection) == []
    await connection.execute(
        "create table padded (id int, s char(9) check (s in ('new', 'old'))); insert into padded values (1, 'new')"
    )
    padded = StateMachine("padded", "s", {"new": ["old"], "old": ()})
    assert await padded.check(connection) == []
    assert await padded.move(connection, 1, "old")
    await connection.execute("create table lax (id int, s text, check (s in ('a')) not enforced)")
    assert await StateMachine("lax", "s", {"a": ()}).check(connection) == [
        "neither an enum type nor a CHECK constraint keeps other states out of the column"
    ]


async def test_missing_table_or_column_is_reported(connection: asyncpg.Connection) -> None:
    for machine in (StateMachine("nowhere", "status", MOVES), StateMachine("orders", "nothing", MOVES)):
        with pytest.raises(Misfit, match="no such table or column"):
            await machine.check(connection)


def test_the_machine_draws_itself() -> None:
    assert "    new --> paid\n" in ORDERS.mermaid()
