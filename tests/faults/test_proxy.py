"""The proxy does what it says: other tests rely on it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import asyncpg
import pytest
from harness import ROOT, query, until, value
from proxy import Proxy
from redis import exceptions as redis_errors
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from services import Kafka

from consumer.local_servers import Postgres, Valkey

LOST = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError)


def through(dsn: str, proxy: Proxy) -> str:
    """The address, by way of the proxy."""
    return dsn.replace(f":{dsn.rpartition(':')[2].split('/')[0]}/", f":{proxy.port}/")


@pytest.mark.parametrize("way", ["simple", "prepared"])
@pytest.mark.parametrize(("cut", "stored"), [("before", 0), ("after", 1), ("during", 1)])
async def test_a_commit_is_cut_before_or_after_the_server_has_it(
    postgres: Postgres, database: str, cut: str, stored: int, way: str
) -> None:
    await query(database, "create table t (n int)")
    async with Proxy(postgres.port, "postgres") as proxy:
        connection = await asyncpg.connect(through(database, proxy))
        commit = await connection.prepare("commit") if way == "prepared" else None
        for n in range(2):
            await connection.execute("begin")
            await connection.execute("insert into t values ($1)", n)
            if n:
                proxy.on("commit", cut)  # type: ignore[arg-type]
                with pytest.raises(LOST):
                    await (commit.fetch() if commit else connection.execute("commit"))
            else:
                await connection.execute("commit")
        assert connection.is_closed()
        assert proxy.fired == {("commit", cut): 1}

        async def over() -> bool:
            return not await value(database, "select count(*) from pg_locks where relation = 't'::regclass")

        await until("the server to have ended it", over)
    assert await value(database, "select count(*) from t") == 1 + stored


async def test_a_black_hole_closes_nothing_and_gives_back_what_it_held(postgres: Postgres) -> None:
    async with Proxy(postgres.port, "postgres") as proxy:
        connection = await asyncpg.connect(through(postgres.dsn(), proxy))
        for way in ("up", "down"):
            proxy.black_hole(way)
            asking = asyncio.create_task(connection.fetchval("select 7"))
            await asyncio.wait([asking], timeout=0.1)
            assert not asking.done()
            proxy.heal()
            assert await asking == 7
        proxy.slice_bytes = 1
        assert await connection.fetchval("select repeat('x', 100)") == "x" * 100
        proxy.refuse()
        assert await connection.fetchval("select 8") == 8
        with pytest.raises(OSError):
            await asyncpg.connect(through(postgres.dsn(), proxy))
        await proxy.accept()
        proxy.reset()
        with pytest.raises(LOST):
            await connection.fetchval("select 9")
        await (await asyncpg.connect(through(postgres.dsn(), proxy))).close()


async def test_kafkas_requests_are_seen_and_cut(kafka: Kafka) -> None:
    api_versions = 18
    async with Proxy(kafka.port, "kafka") as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        proxy.on(api_versions, "after", skip=1)
        for correlation in (b"\0\0\0\1", b"\0\0\0\2"):
            writer.write(bytes.fromhex("0000000e 0012 0000") + correlation + b"\0\4demo")
            if correlation[-1] == 1:
                answer = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
                assert answer[:4] == correlation
        with pytest.raises(ConnectionError):
            await reader.readexactly(1)
        assert proxy.seen == {api_versions: 2}
        assert proxy.fired == {(api_versions, "after"): 1}
        writer.close()


async def test_redis_commands_are_seen_and_cut(valkey: Valkey) -> None:
    async with Proxy(valkey.port, "redis") as proxy:
        redis = Redis(port=proxy.port, retry=Retry(NoBackoff(), 0))
        try:
            proxy.on("INCRBY", "after")
            await redis.set("proxy", 1)
            with pytest.raises(redis_errors.ConnectionError):
                await redis.incr("proxy")
            assert await redis.get("proxy") == b"2"
            assert (proxy.seen["INCRBY"], proxy.fired) == (1, {("INCRBY", "after"): 1})
        finally:
            await redis.aclose()


def test_as_a_process_it_obeys_lines(postgres: Postgres) -> None:
    process = subprocess.Popen(
        [sys.executable, "tests/support/proxy.py", str(postgres.port), "--protocol", "postgres"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    commands = ["latency 0.1", "slice 3", "black-hole up", "heal", "on commit after 0 2", "refuse", "accept", "what"]
    out, _ = process.communicate("\n".join([*commands, "counts"]) + "\n", timeout=30)
    answers = [json.loads(line) for line in out.splitlines()]
    assert answers[0]["port"] > 0
    assert [*map(list, answers[1:-2])] == [["ok"]] * 7
    assert "error" in answers[-2]
    assert answers[-1] == {"seen": {}, "fired": {"black hole up": 1, "refuse": 1}, "connections": 0}
    assert process.returncode == 0
