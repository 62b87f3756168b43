"""Batches that lock the same rows in different orders all proceed."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest
from harness import Place, Sent, consume_all, drained, until, value, working

from consumer import App, Tx
from consumer.postgres.errors import lock_timed_out
from consumer.worker import conflict_turns


class CountedTurns(conflict_turns.Turns):
    """Turns that know how many conflicts there were."""

    conflicts = 0

    def conflicted(self) -> None:
        self.conflicts += 1
        super().conflicted()


async def test_rows_locked_in_opposite_orders_by_many_lanes_do_not_starve(place: Place) -> None:
    """Lanes take turns, since each deadlock of whole batches costs a second."""
    topic = await place.topic(4)
    app = App("contended")

    @app.handler(topic, name="move")
    async def move(body: dict[str, Any], tx: Tx) -> None:
        first, second = (1, 2) if body["n"] % 2 else (2, 1)
        await tx.execute("update accounts set balance = balance - 1 where id = $1", first)
        await tx.execute("update accounts set balance = balance + 1 where id = $1", second)

    settings = place.settings(lanes_max=4, batch_messages_max=200)
    async with working(app, settings) as worker:
        turns = [CountedTurns() for _ in worker.lanes]
        for lane, counted in zip(worker.lanes, turns, strict=True):
            lane.turns = counted
        await place.send(topic, *[Sent({"n": n}, id=f"m{n}", partition=n % 4) for n in range(1200)])
        await drained(app, settings, 120)
        assert sum(counted.conflicts for counted in turns), "no lane took turns"
    assert await value(place.dsn, "select sum(balance) from accounts") == 0
    assert await value(place.dsn, "select count(*) from consumer.ledger where applied_at is not null") == 1200


async def test_a_turn_that_a_slow_transaction_holds_is_waited_for_once_only(place: Place) -> None:
    """A slow transaction delays other lanes once, not for each of theirs."""
    topic = await place.topic()
    app = App("slow-turn")

    @app.handler(topic, name="note")
    async def note(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into effects values ($1, 1, 1)", str(body["n"]))

    settings = place.settings(lanes_max=1, batch_messages_max=1, postgres_lock_timeout_seconds=0.5)
    slow = await asyncpg.connect(place.dsn)
    try:
        async with working(app, settings) as worker:
            [lane] = worker.lanes
            for _ in range(4):
                lane.turns.conflicted()
            await slow.execute("select pg_advisory_lock(1189081, $1)", conflict_turns.turn_of(app.name))
            await place.send(topic, *[Sent({"n": n}, id=f"m{n}") for n in range(20)])
            await drained(app, settings)
            assert not lane.turns.is_needed  # of 64, 20 would have waited
    finally:
        await slow.close()
    assert await value(place.dsn, "select count(*) from effects") == 20


async def test_a_row_that_another_application_locks_makes_no_lane_take_turns(place: Place) -> None:
    """Otherwise the lane that waits for the row would hold the turn."""
    topic = await place.topic()
    app = App("locked-row")

    @app.handler(topic, name="add", order="none")
    async def add(body: dict[str, Any], tx: Tx) -> None:
        await tx.execute("update accounts set balance = balance + 1 where id = $1", body["n"])

    settings = place.settings(lanes_max=1, postgres_lock_timeout_seconds=0.2)
    other = await asyncpg.connect(place.dsn)
    try:
        async with other.transaction():
            await other.execute("update accounts set balance = 0 where id = 3")
            await place.send(topic, *[Sent({"n": n}, id=f"m{n}") for n in range(10)])
            async with working(app, settings) as worker:

                async def others_are_applied() -> bool:
                    return bool(await value(place.dsn, "select count(*) = 9 from accounts where balance = 1"))

                await until("all but the locked one are applied", others_are_applied, 60)
                assert not worker.lanes[0].turns.is_needed
        await consume_all(app, settings, 60)
    finally:
        await other.close()
    assert await value(place.dsn, "select sum(balance) from accounts") == 10


async def test_lock_timeout_differs_from_a_lock_refused_at_once(database: str) -> None:
    """NOWAIT has the same SQLSTATE, and there turns help."""
    one, other = await asyncpg.connect(database), await asyncpg.connect(database)
    try:
        await one.execute("create table t (id int primary key); insert into t values (1)")
        async with one.transaction():
            await one.execute("update t set id = id")
            for sql, timed_out in (("select from t for update nowait", False), ("update t set id = id", True)):
                with pytest.raises(asyncpg.LockNotAvailableError) as raised:
                    async with other.transaction():
                        await other.execute("set local lock_timeout = 50")
                        await other.execute(sql)
                assert lock_timed_out(raised.value) is timed_out
    finally:
        await one.close()
        await other.close()
