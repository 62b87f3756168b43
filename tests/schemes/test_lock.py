"""A lost lock is reported, and PostgreSQL refuses late writers.

Real processes, Valkey and PostgreSQL.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from harness import ROOT, until
from lossy_redis import LossyRedis
from redis.asyncio import Redis
from scheme_database import Connect

from consumer import ConsumerError, TransactionMisuse
from consumer.core.errors import RunAgain
from consumer.local_servers import Valkey
from consumer.schemes.database import Misfit
from consumer.schemes.lock import LateWriter, Lock, LockBusy, LockLost, check_fence
from consumer.schemes.redis_call import RedisAway

LONG, SHORT = 30.0, 0.3  # seconds of ttl: never over in a test, and soon over

TABLES = """
create table fences (name text primary key, number bigint not null);
create table writes (who text, number bigint)
"""


@pytest.fixture
def name() -> str:
    return f"test {uuid4().hex}"


def key_of(name: str) -> str:
    return f"consumer:lock:{{{name}}}"


async def for_ever() -> None:
    await asyncio.Event().wait()


# -- holding it -----------------------------------------------------------------------------------------------------------


async def test_inside_it_is_held_and_outside_it_is_not(redis: Redis, name: str) -> None:
    lock = Lock(redis, name, LONG)
    with pytest.raises(RuntimeError, match="inside its block"):
        _ = lock.number
    async with lock as entered:
        assert entered is lock
        assert lock.number > 0
        assert not lock.lost.is_set()
        assert 0 < await redis.pttl(key_of(name)) <= LONG * 1000
        with pytest.raises(LockBusy):
            await Lock(redis, name, LONG).__aenter__()
    assert await redis.exists(key_of(name)) == 0
    with pytest.raises(RuntimeError, match="inside its block"):
        _ = lock.number
    async with lock:  # again
        pass


async def test_one_at_a_time_and_everybody_gets_it(redis: Redis, name: str) -> None:
    inside, most, numbers = 0, 0, []

    async def work() -> None:
        nonlocal inside, most
        async with Lock(redis, name, LONG, wait_seconds=60) as lock:
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.002)
            numbers.append(lock.number)
            inside -= 1

    await asyncio.gather(*[work() for _ in range(20)])
    assert most == 1
    assert numbers == sorted(set(numbers))  # in the order in which they had it, each higher than the last
    assert len(numbers) == 20


async def test_waiting_is_bounded(redis: Redis, name: str) -> None:
    async with Lock(redis, name, LONG):
        begun = time.monotonic()
        with pytest.raises(LockBusy, match=r"for 0\.2 s"):
            async with Lock(redis, name, LONG, wait_seconds=0.2):
                pass
        assert 0.2 <= time.monotonic() - begun < 10


async def test_lock_is_renewed_while_the_block_runs(redis: Redis, name: str) -> None:
    async with Lock(redis, name, 1.0) as lock:  # not shorter: a busy machine must not look like a dead owner
        until_seconds = time.monotonic() + 2.5
        while time.monotonic() < until_seconds:
            assert await redis.exists(key_of(name))
            await asyncio.sleep(0.02)
        assert not lock.lost.is_set()


async def test_an_owner_that_dies_holds_it_no_longer_than_its_ttl(redis: Redis, name: str) -> None:
    dead = Lock(redis, name, SHORT)
    await dead.__aenter__()
    assert dead._watchdog is not None
    dead._watchdog.cancel()  # it is not renewed any more
    async with Lock(redis, name, LONG, wait_seconds=20) as lock:
        assert lock.number > 0


async def test_numbers_rise_even_when_redis_has_lost_them(own_redis: Redis, name: str) -> None:
    numbers: list[int] = []
    for harm in ("nothing", "flush", "flush", "a clock that goes back"):
        if harm == "flush":
            await own_redis.flushall()
        if harm == "a clock that goes back":  # as if it had been ahead
            await own_redis.set(f"{key_of(name)}:number", numbers[-1] + 10**12)
            numbers.append(numbers[-1] + 10**12)
        async with Lock(own_redis, name, LONG) as lock:
            numbers.append(lock.number)
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == numbers[-2] + 1


async def test_another_owners_lock_is_not_given_back(redis: Redis, name: str) -> None:
    with pytest.raises(LockLost, match="lost before"):
        async with Lock(redis, name, LONG) as lock:
            await redis.set(key_of(name), "another")
    assert lock.lost.is_set()
    assert await redis.get(key_of(name)) in (b"another", "another")


async def test_lost_answer_that_the_library_retries_is_no_second_owner(valkey: Valkey, name: str) -> None:
    cut = False

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal cut
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", valkey.port)

        async def up() -> None:
            while data := await reader.read(65536):
                upstream_writer.write(data)
            upstream_writer.close()

        task = asyncio.create_task(up())
        while data := await upstream_reader.read(65536):
            if data.startswith(b"*2\r\n:1\r\n") and not cut:  # taken: the answer is lost on its way
                cut = True
                break
            writer.write(data)
        writer.close()
        upstream_writer.close()
        await task

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with (
        server,
        Redis(port=server.sockets[0].getsockname()[1], protocol=2) as client,
        Lock(client, name, LONG) as lock,
    ):
        assert cut
        assert lock.number > 0


# -- losing it ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["flushed", "restarted", "frozen", "stopped", "taken"])
async def test_work_is_cancelled_with_lock_lost_when_redis_loses_the_lock(
    own_valkey: Valkey, name: str, harm: str
) -> None:
    async with Redis.from_url(own_valkey.url) as client:
        lock = Lock(client, name, 1.0)
        cancelled = False
        with pytest.raises(LockLost) as raised:
            async with asyncio.timeout(60):
                async with lock:
                    match harm:
                        case "flushed":
                            await client.flushall()
                        case "restarted":
                            own_valkey.kill()
                            own_valkey.run()
                            await asyncio.to_thread(own_valkey.wait)
                        case "frozen":
                            os.kill(own_valkey.pid, signal.SIGSTOP)
                        case "stopped":
                            own_valkey.kill()
                        case "taken":
                            await client.set(key_of(name), "another")
                    try:
                        await for_ever()
                    except asyncio.CancelledError:
                        cancelled = True
                        raise
        assert cancelled
        assert lock.lost.is_set()
        expected = "was not renewed" if harm in ("frozen", "stopped") else "another's, or Redis has lost it"
        assert expected in str(raised.value)
        task = asyncio.current_task()
        assert task is not None and task.cancelling() == 0  # this task may go on as if nothing had been


async def test_a_short_outage_of_redis_is_survived(own_redis: Redis, name: str) -> None:
    async with Lock(own_redis, name, 6.0) as lock:

        async def left_seconds(least: float, most: float) -> bool:
            return least < await own_redis.pttl(key_of(name)) / 1000 < most

        await own_redis.execute_command("REPLICAOF", "127.0.0.1", "1")  # it answers, and takes no writes
        await until("a renewal to have failed", lambda: left_seconds(0, 3.5))  # the first one is due at 4 s
        await own_redis.execute_command("REPLICAOF", "NO", "ONE")
        await until("a renewal", lambda: left_seconds(4.5, 6.1))
        assert not lock.lost.is_set()


async def test_work_that_does_not_wait_ends_with_lock_lost(redis: Redis, name: str) -> None:
    lock = Lock(redis, name, SHORT)
    with pytest.raises(LockLost):
        async with lock:
            time.sleep(SHORT * 2)  # noqa: ASYNC251 - a computation: nothing can interrupt it
    assert lock.lost.is_set()


@pytest.mark.parametrize("harm", ["flushed", "stopped"])
async def test_work_that_swallows_the_cancellation_ends_with_lock_lost(
    own_valkey: Valkey, own_redis: Redis, name: str, harm: str
) -> None:
    with pytest.raises(LockLost):
        async with Lock(own_redis, name, SHORT):
            await (own_redis.flushall() if harm == "flushed" else asyncio.to_thread(own_valkey.kill))
            try:
                await for_ever()
            except asyncio.CancelledError:
                pass
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0


async def test_an_exception_of_the_work_goes_out_as_it_is(own_redis: Redis, name: str) -> None:
    with pytest.raises(ZeroDivisionError):
        async with Lock(own_redis, name, LONG):
            _ = 1 / 0
    assert await own_redis.exists(key_of(name)) == 0
    lock = Lock(own_redis, name, SHORT)
    with pytest.raises(ZeroDivisionError):
        async with lock:
            await own_redis.flushall()
            try:
                await for_ever()
            finally:
                _ = 1 / 0
    assert lock.lost.is_set()
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0


async def test_a_cancellation_from_outside_stays_one_and_gives_the_lock_back(redis: Redis, name: str) -> None:
    entered = asyncio.Event()

    async def work() -> None:
        async with Lock(redis, name, LONG):
            entered.set()
            await for_ever()

    task = asyncio.create_task(work())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await redis.exists(key_of(name)) == 0


async def test_a_cancellation_from_outside_wins_over_a_loss(own_redis: Redis, name: str) -> None:
    lock = Lock(own_redis, name, SHORT)

    async def work() -> None:
        async with lock:
            await own_redis.flushall()
            try:
                await for_ever()
            except asyncio.CancelledError:
                cleaning.set()
                await for_ever()  # cleaning up takes its time, and then it is stopped from outside, too

    cleaning = asyncio.Event()
    task = asyncio.create_task(work())
    await cleaning.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert lock.lost.is_set()


async def test_a_timeout_around_it_is_a_timeout(redis: Redis, name: str) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            async with Lock(redis, name, LONG):
                await for_ever()
    assert await redis.exists(key_of(name)) == 0


async def test_one_that_stops_waiting_for_it_leaves_nothing_behind(redis: Redis, name: str) -> None:
    client = LossyRedis(redis)
    client.losses, client.hangs = 1, True
    task = asyncio.create_task(Lock(client, name, LONG).__aenter__())
    await client.executed.wait()
    assert await redis.exists(key_of(name))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await redis.exists(key_of(name)) == 0


async def test_redis_away_is_an_error_on_entering(own_valkey: Valkey, name: str) -> None:
    async with Redis.from_url(own_valkey.url) as client:
        own_valkey.kill()
        with pytest.raises(RedisAway):
            async with Lock(client, name, SHORT):
                pytest.fail("the block must not run while it is unknown whether the lock is held")


async def test_a_lock_is_entered_once_at_a_time(redis: Redis, name: str) -> None:
    lock = Lock(redis, name, LONG)
    async with lock:
        with pytest.raises(RuntimeError, match="held already"):
            await lock.__aenter__()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": ""}, "name"),
        ({"ttl_seconds": 0.01}, "ttl_seconds"),
        ({"ttl_seconds": True}, "ttl_seconds"),
        ({"ttl_seconds": float("nan")}, "ttl_seconds"),
        ({"wait_seconds": -1}, "wait_seconds"),
        ({"wait_seconds": float("inf")}, "wait_seconds"),
    ],
)
async def test_a_lock_that_cannot_be_meant_is_refused(redis: Redis, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Lock(redis, **{"name": "x", "ttl_seconds": 1, **wrong})


def test_none_of_it_is_a_messages_fault() -> None:
    for error in (LockBusy, LockLost, LateWriter, RedisAway):
        assert issubclass(error, RunAgain) and issubclass(error, ConsumerError)


# -- the fence --------------------------------------------------------------------------------------------------------------


async def passes(connection: asyncpg.Connection, number: int) -> bool:
    try:
        async with connection.transaction():
            await check_fence(connection, "fences", "x", number)
    except LateWriter:
        return False
    return True


async def test_the_fence_only_moves_forward(connection: asyncpg.Connection) -> None:
    await connection.execute(TABLES)
    passed = [await passes(connection, number) for number in (5, 5, 7, 6, 5, 7, 8)]
    assert passed == [True, True, True, False, False, True, True]
    assert await connection.fetchval("select number from fences") == 8


async def test_rolled_back_write_does_not_move_the_fence(connection: asyncpg.Connection) -> None:
    await connection.execute(TABLES)
    transaction = connection.transaction()
    await transaction.start()
    await check_fence(connection, "fences", "x", 9)
    await transaction.rollback()
    assert await passes(connection, 3)


@pytest.mark.parametrize("ends", ["commit", "rollback"])
async def test_earlier_owner_waits_for_the_later_transaction_and_is_refused(connect: Connect, ends: str) -> None:
    late, early, watcher = await connect(), await connect(), await connect()
    await watcher.execute(TABLES)
    assert await passes(watcher, 1)
    transaction = late.transaction()
    await transaction.start()
    await check_fence(late, "fences", "x", 3)
    waiting = asyncio.create_task(passes(early, 2))

    async def blocked() -> bool:
        return bool(await watcher.fetchval("select exists (select from pg_locks where not granted)"))

    await until("the earlier owner to wait", blocked)
    await (transaction.commit() if ends == "commit" else transaction.rollback())
    assert await waiting is (ends == "rollback")


async def test_limit_fence_is_open_until_the_new_owner_reaches_it(connect: Connect) -> None:
    later, earlier = await connect(), await connect()
    await later.execute(TABLES)
    async with later.transaction():
        before = await later.fetchval("select count(*) from writes")  # number 3 reads first: wrong
        assert await passes(earlier, 2)
        await earlier.execute("insert into writes values ('earlier', 2)")
        await check_fence(later, "fences", "x", 3)
        assert (
            await later.fetchval("select count(*) from writes") == before + 1
        )  # so what it had read is not so any more
    async with later.transaction():
        await check_fence(later, "fences", "x", 3)
        before = await later.fetchval("select count(*) from writes")  # number 3 reads behind the fence: right
        waiting = asyncio.create_task(passes(earlier, 2))
        await until(
            "the earlier owner to wait",
            lambda: later.fetchval("select exists (select from pg_locks where not granted)"),
        )
        assert await later.fetchval("select count(*) from writes") == before
    assert not await waiting


async def test_a_fence_outside_a_transaction_is_refused(connection: asyncpg.Connection, database: str) -> None:
    await connection.execute(TABLES)
    with pytest.raises(TransactionMisuse, match="protects nothing"):
        await check_fence(connection, "fences", "x", 1)
    async with asyncpg.create_pool(database, min_size=1, max_size=1) as pool, pool.acquire() as pooled:
        with pytest.raises(TransactionMisuse):
            await check_fence(pooled, "fences", "x", 1)
        async with pooled.transaction():
            await check_fence(pooled, "fences", "x", 1)


async def test_a_fence_on_a_table_of_other_names(connection: asyncpg.Connection) -> None:
    await connection.execute('create schema s; create table s.f ("Job" text primary key, fence bigint)')
    async with connection.transaction():
        await check_fence(connection, "s.f", "x", 1, key_column="Job", number_column="fence")
    assert await connection.fetchval("select fence from s.f") == 1


@pytest.mark.parametrize(
    ("number", "error"), [("1", TypeError), (1.0, TypeError), (True, TypeError), (0, ValueError), (2**63, ValueError)]
)
async def test_a_number_that_is_none_is_refused(connection: asyncpg.Connection, number: Any, error: Any) -> None:
    with pytest.raises(error, match="check_fence"):
        await check_fence(connection, "fences", "x", number)


async def test_fence_table_that_does_not_fit_is_an_error(connection: asyncpg.Connection) -> None:
    await connection.execute("create table nokey (name text, number bigint)")
    for table, says in (("nowhere", "no such table"), ("nokey", "no unique index")):
        with pytest.raises(Misfit, match=says):
            async with connection.transaction():
                await check_fence(connection, table, "x", 1)


# -- a paused owner ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see that a process is stopped")
@pytest.mark.parametrize("fenced", ["fenced", "unfenced"])
async def test_a_paused_owner_writes_late_and_only_the_fence_stops_it(
    own_valkey: Valkey, own_redis: Redis, connection: asyncpg.Connection, database: str, name: str, fenced: str
) -> None:
    await connection.execute(TABLES)
    owner = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).parent / "lock_owner.py"),
        *(own_valkey.url, database, name, "1.0", fenced),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert owner.stdin is not None and owner.stdout is not None
    try:
        said = (await owner.stdout.readline()).split()
        assert said[0] == b"holding"
        os.kill(owner.pid, signal.SIGSTOP)

        async def stopped() -> bool:
            return Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

        await until("the owner to be stopped", stopped)
        async with Lock(own_redis, name, LONG, wait_seconds=30) as lock:  # its ttl runs out
            assert lock.number > int(said[1])
            async with connection.transaction():
                await check_fence(connection, "fences", name, lock.number)
                await connection.execute("insert into writes values ('second owner', $1)", lock.number)
            owner.stdin.write(b"write\n")
            await owner.stdin.drain()
            os.kill(owner.pid, signal.SIGCONT)
            heard = {(await owner.stdout.readline()).strip(), (await owner.stdout.readline()).strip()}
        assert await owner.wait() == 0
    finally:
        if owner.returncode is None:
            owner.kill()
            await owner.wait()
    writers = [row["who"] for row in await connection.fetch("select who from writes")]
    if fenced == "fenced":
        assert heard == {b"refused", b"lost True"}
        assert writers == ["second owner"]
    else:  # the limit: `lost` comes too late for what was on its way
        assert heard == {b"written", b"lost True"}
        assert writers == ["second owner", "paused owner"]
