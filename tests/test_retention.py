"""The ledger's generations: no interleaving of two claims and a turn applies an id twice, and what is dropped is known to be.

The interleavings are of real connections under the worker's role; a step that waits for another transaction is left waiting,
as PostgreSQL tells it, and the next step is taken.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from harness import as_worker, migrated, query, settings_for

from consumer import App, Tx
from consumer.core.lanes import Delivery
from consumer.core.message import LogRecord
from consumer.ledger import Session

TOPIC = "t"


class Claims:
    """A handler's claims without Kafka: sessions, the numbers of names, and one who looks on."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.settings = settings_for(as_worker(dsn), "127.0.0.1:1")
        self.opened: list[Session] = []
        app = App("retention")

        @app.handler(TOPIC)
        async def settle(value: dict[str, int], tx: Tx) -> None: ...

        self.handler = app.handlers["settle"]
        self.topics: dict[str, int] = {}
        self.watcher: asyncpg.Connection[Any]
        self.leader: asyncpg.Connection[Any]

    async def open(self) -> None:
        self.watcher = await asyncpg.connect(self.dsn)
        self.leader = await asyncpg.connect(self.settings.dsn)
        session = await self.session()
        numbers, self.topics = await session.numbers("retention", ["settle"], [TOPIC])
        self.handler.number = numbers["settle"]

    async def session(self) -> Session:
        self.opened.append(await Session.open(self.settings))
        return self.opened[-1]

    def close(self) -> None:
        for session in self.opened:
            session.close()
        self.watcher.terminate()
        self.leader.terminate()

    def delivery(self, id: UUID, offset: int = 0) -> Delivery:
        made = Delivery(self.handler, LogRecord(TOPIC, 0, offset, 0, None, b"{}", (), ""))
        made.id, made.fingerprint = id.bytes, 1
        return made

    async def claim(self, session: Session, *ids: UUID) -> set[UUID]:
        """Those that were won, in a transaction that is left open."""
        offered = {self.delivery(id): id for id in ids}
        await session.begin()
        lost = await session.claim(list(offered), self.topics)
        return {id for each, id in offered.items() if each not in lost}

    async def version(self) -> int:
        return int(await self.watcher.fetchval("select version from consumer.ledger_state"))

    async def turn(self) -> str:
        return str(await self.leader.fetchval("select consumer.turn($1)", await self.version()))

    async def forget(self, number: int) -> str:
        return str(await self.leader.fetchval("select consumer.forget($1, $2)", await self.version(), number))

    async def drop(self, number: int) -> str:
        return str(await self.leader.fetchval("select consumer.drop_generation($1)", number))

    async def rows(self, id: UUID) -> int:
        return int(await self.watcher.fetchval("select count(*) from consumer.ledger where id = $1", id))

    async def turn_to_the_next(self) -> int:
        """A whole turn; returns the generation that claims go into now."""
        while await self.turn() != "turned":
            pass
        return int(await self.watcher.fetchval("select target from consumer.ledger_state"))

    async def let_go_of_the_old(self) -> None:
        """Keep the present generation alone."""
        for number in [
            row[0] for row in await self.watcher.fetch("select number from consumer.generations order by 1")
        ]:
            if number < await self.watcher.fetchval("select target from consumer.ledger_state"):
                assert await self.forget(number) == "forgotten"
                assert await self.drop(number) == "dropped"


@pytest.fixture
async def claims(database: str) -> AsyncIterator[Claims]:
    await migrated(database)
    made = Claims(database)
    await made.open()
    try:
        yield made
    finally:
        made.close()


def orders(steps: str) -> Iterator[str]:
    """All orders of the steps in which each lower-case letter's capital comes after it."""
    for order in sorted(set(itertools.permutations(steps))):
        if all(order.index(each) < order.index(each.upper()) for each in "ab"):
            yield "".join(order)


async def settled_or_blocked(claims: Claims, session: Session, task: asyncio.Task[Any]) -> None:
    """Until a claim has ended, or waits for another transaction."""
    pid = session.connection.get_server_pid()

    async def is_so() -> bool:
        return task.done() or await claims.watcher.fetchval("select cardinality(pg_blocking_pids($1)) > 0", pid)

    while not await is_so():
        pass


async def run_order(claims: Claims, sessions: dict[str, Session], order: str, ends: dict[str, str]) -> None:
    """a, b: two sessions claim the same id. A, B: they end. L: a step of a turn.

    a has the generations of the beginning, b those of the moment of its claim, as a session has that was just opened.
    """
    id = uuid4()
    won: dict[str, bool] = {}
    running: dict[str, asyncio.Task[set[UUID]]] = {}
    sessions["a"]._generations = await sessions["a"]._read_generations()

    async def end(name: str) -> None:
        won[name] = bool(await running.pop(name)) and ends[name] == "commit"
        await sessions[name].connection.execute(ends[name])

    put_off: list[str] = []
    for step in order:
        if step == "L":
            assert await claims.turn() in ("opened", "moved", "turned", "waiting")
        elif step in sessions:
            if step == "b":
                sessions["b"]._generations = await sessions["b"]._read_generations()
            running[step] = asyncio.create_task(claims.claim(sessions[step], id))
            await settled_or_blocked(claims, sessions[step], running[step])
        elif running[step.lower()].done():
            await end(step.lower())
        else:
            put_off.append(step.lower())  # it waits for the other one, whose end comes later
    for name in put_off:
        await end(name)
    winners = sum(won.values())
    assert winners == 1 if "commit" in ends.values() else winners == 0, (order, ends, won)
    assert await claims.rows(id) == winners, (order, ends)
    # And from now on it is a duplicate, whoever asks.
    for session in sessions.values():
        assert await claims.claim(session, id) == set()
        await session.rollback()


async def test_no_order_of_two_claims_and_a_turn_lets_both_win(claims: Claims) -> None:
    """From each phase of a turn on."""
    sessions = {"a": await claims.session(), "b": await claims.session()}
    tried = 0
    for phase in ("turned", "opened", "moved"):
        for ends in ({"a": "commit", "b": "commit"}, {"a": "rollback", "b": "commit"}):
            for order in orders("aAbBLL"):
                if ends["a"] == "rollback" and ("aA" in order.replace("L", "") or "bB" in order.replace("L", "")):
                    continue  # they do not meet
                await claims.turn_to_the_next()
                await claims.let_go_of_the_old()
                while phase != "turned" and await claims.turn() != phase:
                    pass
                await run_order(claims, sessions, order, ends)
                tried += 1
    assert tried == 3 * (90 + 30)


async def test_a_claim_that_is_running_holds_up_the_turn_and_not_the_reverse(claims: Claims) -> None:
    slow, quick = await claims.session(), await claims.session()
    assert len(await claims.claim(slow, first := uuid4())) == 1  # and its handler takes its time
    assert await claims.turn() == "opened"
    assert [await claims.turn() for _ in range(3)] == ["waiting"] * 3
    assert len(await claims.claim(quick, second := uuid4())) == 1  # held up by nobody
    await quick.commit()
    await slow.commit()
    assert [await claims.turn() for _ in range(2)] == ["moved", "turned"]
    for session in (slow, quick):
        assert await claims.claim(session, first, second, third := uuid4()) == {third}
        await session.commit()
    where = await query(
        claims.dsn, "select tableoid::regclass::text, count(*) from consumer.ledger group by 1 order by 1"
    )
    assert where == [("consumer.ledger", 2), ("consumer.ledger_2", 2)]
