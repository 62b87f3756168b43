"""A replay that applies and a worker respect each other's holds.

The order of effects is checked on real Kafka and PostgreSQL.
"""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from harness import Place, Sent, consume_all, drained, query, until, value, working

from consumer import App, Retry, RunAgain, Tx
from consumer.admin.positions import move_position
from consumer.core.message import Partition
from consumer.dead_letters.retry import DeadLetterRetrier, Filters
from consumer.replay.options import Options, Progress
from consumer.replay.verify import replay


class Shop:
    """An App whose handler fails, waits for a gate and records order."""

    def __init__(self, place: Place, topic: str) -> None:
        self.place, self.topic = place, topic
        self.faults: set[str] = set()
        self.waiting: set[str] = set()  # asked to run again
        self.gates: dict[str, asyncio.Event] = {}
        self.entered: set[str] = set()
        self.app = App(f"holds-{uuid4().hex[:8]}")
        self.settings = place.settings(redis_url=None)

        @self.app.handler(topic, name="settle", retry=Retry(attempts=1, base=0.01, cap=0.01))
        async def settle(body: dict[str, Any], tx: Tx) -> None:
            id = body["id"]
            self.entered.add(id)
            if gate := self.gates.get(id):
                await gate.wait()
            if id in self.waiting:
                raise RunAgain("not yet")
            await tx.execute("insert into done values (default, $1)", id)
            if id in self.faults:
                raise ValueError("no account")

    async def send(self, *ids: str, key: str = "k") -> None:
        await self.place.send(self.topic, *[Sent({"id": id}, id=id, key=key) for id in ids])

    async def move(self, offset: int) -> None:
        connection = await asyncpg.connect(self.place.dsn)
        try:
            await move_position(connection, self.app.name, Partition(self.topic, 0), offset)
        finally:
            await connection.close()

    async def apply(self) -> dict[str, int]:
        findings = await replay(self.app, self.settings, [self.topic], Options(mode="apply"), Progress())
        return {name: n for name, n in findings.as_dict()["handlers"]["settle"].items() if n}

    async def retry_all(self) -> list[str]:
        async with self.app.running():
            retrier = await DeadLetterRetrier.open(self.app, self.settings, "test")
            try:
                return [done.outcome async for done in retrier.retry(await retrier.select(Filters(), waiting=False))]
            finally:
                retrier.close()

    async def done(self) -> list[str]:
        return [row[0] for row in await query(self.place.dsn, "select id from done order by n")]

    async def states(self) -> list[tuple[Any, ...]]:
        return await query(self.place.dsn, 'select "offset", state from consumer.dead_letters order by 1')


@pytest.fixture
async def shop(place: Place) -> Shop:
    await query(place.dsn, "create table done (n serial, id text not null)")
    return Shop(place, await place.topic(1))


async def test_replay_that_applies_waits_behind_a_dead_letter_of_the_key(shop: Shop) -> None:
    shop.faults.add("0")
    await shop.send("0")
    await consume_all(shop.app, shop.settings)
    await shop.send("1", "2")
    await shop.send("x", key="other")
    await shop.move(4)  # by mistake: 1, 2 and x are missing now
    assert await shop.apply() == {"delivered": 4, "applied_now": 1, "dead_lettered": 1, "dead_lettered_now": 2}
    assert await shop.done() == ["x"]
    assert await shop.states() == [(0, "dead"), (1, "waiting"), (2, "waiting")]
    shop.faults.clear()
    assert await shop.retry_all() == ["applied"] * 3
    assert await shop.done() == ["x", "0", "1", "2"]


async def test_worker_waits_behind_a_hold_that_a_replay_has_made(shop: Shop) -> None:
    shop.faults.add("0")
    await shop.send("0")
    await shop.move(0)
    await shop.move(1)
    async with working(shop.app, shop.settings):
        await shop.send("1", "2")
        await drained(shop.app, shop.settings)
        assert await shop.apply() == {"delivered": 3, "applied": 2, "dead_lettered_now": 1}
        await shop.send("3", "4")
        await drained(shop.app, shop.settings)
        assert await shop.done() == ["1", "2"]
        assert await shop.states() == [(0, "dead"), (3, "waiting"), (4, "waiting")]
        shop.faults.clear()
        assert await shop.retry_all() == ["applied"] * 3
        await shop.send("5")
        await drained(shop.app, shop.settings)
    assert await shop.done() == ["1", "2", "0", "3", "4", "5"]
    assert await value(shop.place.dsn, "select count(*) from consumer.held") == 0


@pytest.mark.parametrize("stuck", [False, True], ids=["position moves", "position is held by another message"])
async def test_worker_that_runs_while_a_replay_makes_a_hold_is_undone(shop: Shop, stuck: bool) -> None:
    """Its transaction begins before the hold and commits after it.

    That holds also where its position does not move.
    """
    shop.faults.add("0")
    await shop.send("0")
    await shop.move(0)
    await shop.move(1)
    shop.waiting = {"again"} if stuck else set()
    shop.gates["2"] = asyncio.Event()
    async with working(shop.app, shop.settings):
        await shop.send("again", key="other")
        if stuck:
            await until("it to be put aside", lambda: _is(shop, "again"))
            waits = "select count(*) from consumer.positions where next_offset = 1"
            assert await value(shop.place.dsn, waits) == 1
        else:
            await drained(shop.app, shop.settings)
        await shop.send("2")
        await until("the worker to be in the handler", lambda: _is(shop, "2"))
        options = Options(mode="apply", message_id="0")
        findings = await replay(shop.app, shop.settings, [shop.topic], options, Progress())
        assert findings.total("dead_lettered_now") == 1
        shop.gates["2"].set()
        await until("it to wait", lambda: value(shop.place.dsn, "select count(*) = 2 from consumer.dead_letters"))
        shop.waiting.clear()
        await drained(shop.app, shop.settings)
        assert await shop.done() == ["again"]
        shop.faults.clear()
        assert await shop.retry_all() == ["applied"] * 2
    assert await shop.done() == ["again", "0", "2"]


async def _is(shop: Shop, id: str) -> bool:
    return id in shop.entered
