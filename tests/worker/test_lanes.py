"""Lanes follow the load; a slow handler stops its batch's partitions only."""

from __future__ import annotations

import asyncio

import pytest
from harness import Place, Sent, drained, query, until, value, working

from consumer import App, Tx
from consumer.worker import lane as lane_module

INSERT = "insert into effects values ($1, $2, 1)"


class Gate:
    """A handler that holds its messages until it is opened."""

    def __init__(self, place: Place, topic: str) -> None:
        self.place = place
        self.app = App("lanes")
        self.entered, self.opened = asyncio.Event(), asyncio.Event()
        self.calls: list[str] = []

        @self.app.handler(topic)
        async def settle(message: dict[str, str], tx: Tx) -> None:
            self.calls.append(message["id"])
            tx.defer(INSERT, message["id"], 1)
            if message["holds"]:
                self.entered.set()
                await self.opened.wait()

    async def send(self, topic: str, name: str, count: int, partition: int, *, holds: bool = False) -> None:
        """Produce messages whose ids begin with a name."""
        messages = [
            Sent({"id": f"{name}{n}", "holds": "yes" if holds else ""}, id=f"{name}{n}", partition=partition)
            for n in range(count)
        ]
        await self.place.send(topic, *messages)

    async def applied(self, name: str, count: int) -> None:
        """Wait until so many messages of a name are applied."""

        async def all_there() -> bool:
            return bool(
                await value(self.place.dsn, "select count(*) = $2 from effects where id like $1 || '%'", name, count)
            )

        await until(f"{count} of {name}", all_there, 60)


async def test_stuck_handler_and_full_buffer_stop_only_their_partition(place: Place) -> None:
    topic = await place.topic(3)
    gate = Gate(place, topic)
    settings = place.settings(redis_url=None, lanes_max=2, buffer_messages_max=50, batch_messages_max=20)
    async with working(gate.app, settings):
        await gate.send(topic, "stuck", 1, 0, holds=True)
        await gate.entered.wait()
        await gate.send(topic, "behind", 500, 0)
        await gate.send(topic, "b", 300, 1)
        await gate.send(topic, "c", 300, 2)
        await gate.applied("b", 300)
        await gate.send(topic, "d", 300, 1)
        await gate.applied("d", 300)
        await gate.applied("c", 300)
        assert [name for name in gate.calls if name.startswith(("stuck", "behind"))] == ["stuck0"]
        gate.opened.set()
        await drained(gate.app, settings)
    assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(1401, 1401)]


async def test_one_lane_settles_messages_that_come_one_by_one(place: Place) -> None:
    topic = await place.topic(3)
    gate = Gate(place, topic)
    async with working(gate.app, place.settings(redis_url=None)) as worker:
        for n in range(9):
            await gate.send(topic, f"m{n}-", 1, n % 3)
            await gate.applied(f"m{n}-", 1)
        assert [lane.session is not None for lane in worker.lanes] == [True, False, False, False]


async def test_lanes_begin_beside_slow_ones_and_disconnect_when_spare(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "SPARE_CONNECTION_SECONDS", 0.5)
    topic = await place.topic(4)
    gate = Gate(place, topic)
    settings = place.settings(redis_url=None, lanes_max=3, batch_messages_max=10)
    async with working(gate.app, settings) as worker:
        for partition in range(4):
            await gate.send(topic, f"p{partition}-", 15, partition, holds=True)

        async def all_at_work() -> bool:
            return len({part for lane in worker.lanes if lane.part is not None for part in lane.part.ends}) == 3

        await until("each lane to have a partition", all_at_work)
        gate.opened.set()
        await drained(gate.app, settings)

        async def one_connection() -> bool:
            return [lane.session is not None for lane in worker.lanes] == [True, False, False]

        await until("spare connections to be closed", one_connection)
        await gate.send(topic, "again", 1, 0)
        await gate.applied("again", 1)
    assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(61, 61)]
