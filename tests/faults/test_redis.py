"""Redis fails in mid-run: everything is applied, and nothing waits long."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
import redis
from harness import Place, Sent, counts, drained, query, until, value, working
from payments_app import payments_app
from worker_log import is_logged

from consumer.local_servers import Valkey


def payments(first: int, count: int) -> list[Sent]:
    """`count` payments, every tenth of them once more somewhere."""
    chance = random.Random(first)
    payments = [
        Sent({"id": str(n), "account": n % 7, "amount": 1}, id=f"id-{n}", key=str(n % 7))
        for n in range(first, first + count)
    ]
    sent = list(payments)
    for one in chance.sample(payments, count // 10):
        sent.insert(chance.randrange(len(sent)), one)
    return sent


def stop(server: Valkey) -> None:
    server.kill()


def freeze(server: Valkey) -> None:
    os.kill(server.pid, signal.SIGSTOP)


def fill(server: Valkey) -> None:
    with redis.Redis(port=server.port) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)


def make_read_only(server: Valkey) -> None:
    with redis.Redis(port=server.port) as client:
        client.config_set("replica-serve-stale-data", "yes")
        client.execute_command("REPLICAOF", "127.0.0.1", "1")


def empty(server: Valkey) -> None:
    with redis.Redis(port=server.port) as client:
        client.flushall()


def drop_clients(server: Valkey) -> None:
    with redis.Redis(port=server.port) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


@pytest.mark.parametrize("harm", [stop, freeze, fill, make_read_only, empty, drop_clients])
async def test_redis_harmed_in_mid_run_costs_nothing_but_speed(
    place: Place, own_valkey: Valkey, harm: Callable[[Valkey], None]
) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, balances=False)
    settings = place.settings(redis_url=own_valkey.url, batch_messages_max=100)
    async with working(app, settings):
        await place.send(topic, *payments(0, 1000))
        await drained(app, settings)
        harm(own_valkey)
        await place.send(topic, *payments(1000, 2000), *payments(0, 500))  # new ones, and old ones again
        await drained(app, settings)
    rows = await query(place.dsn, "select id, count(*) from effects group by id")
    assert sorted(int(row[0]) for row in rows) == list(range(3000))
    assert {row[1] for row in rows} == {1}
    counted = (await counts(app, place.dsn))["settle"]
    assert counted["applied"] == 3000
    assert sum(counted["duplicates"].values()) == 100 + 200 + 550
    assert counted["dead_lettered"] == 0


async def test_a_frozen_redis_is_asked_once_in_its_budget_and_then_left_alone(
    place: Place, own_valkey: Valkey, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The breaker logs both changes; between them no batch waits."""
    caplog.set_level("INFO", logger="consumer")
    topic = await place.topic()
    app = payments_app(topic, balances=False)
    settings = place.settings(redis_url=own_valkey.url, batch_messages_max=10)
    async with working(app, settings) as worker:
        await place.send(topic, *payments(0, 100))
        await drained(app, settings)
        assert worker.shards[0].precheck is not None
        asked: list[float] = []
        check = worker.shards[0].precheck.check

        async def timed(deliveries: Any, now: float) -> None:
            loop = asyncio.get_running_loop()
            begun = loop.time()
            await check(deliveries, now)
            asked.append(loop.time() - begun)

        monkeypatch.setattr(worker.shards[0].precheck, "check", timed)
        freeze(own_valkey)
        await place.send(topic, *payments(100, 500))
        await drained(app, settings)
        assert len(asked) >= 50
        waited = [
            seconds for seconds in asked if seconds > 0.02
        ]  # a budget of 50 ms: all but the first few went by without asking
        assert len(waited) <= 5

        assert is_logged(caplog, "pre-check off")
        os.kill(own_valkey.pid, signal.SIGCONT)

        async def back() -> bool:
            await place.send(topic, *payments(0, 10))
            await drained(app, settings)
            return bool((await counts(app, place.dsn))["settle"]["duplicates"]["precheck"])

        await until("the pre-check to be used again", back, 40)
    assert await value(place.dsn, "select count(*) from effects") == 600
