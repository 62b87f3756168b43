"""PostgreSQL is cut, silent, full or crowded: nothing is lost or doubled.

Effects are written to a table without a unique key, so that doubles would show. Each fault is seen to have happened.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from harness import (
    Sent,
    consume_all,
    drained,
    migrated,
    new_topic,
    produce,
    query,
    settings_for,
    until,
    value,
    working,
)
from numbered_messages import all_applied_once, messages, numbered_app
from pair import Standby, caught_up, power_cut, through
from pooler import Pooler, needs_pgbouncer
from proxy import Cut, Proxy
from services import Kafka
from worker_log import fields_of, is_logged

from consumer import App, Retry, Tx
from consumer.local_servers import Postgres
from consumer.postgres.connection import connect
from consumer.replay.options import Options, Progress
from consumer.replay.verify import replay

ONCE = Retry(attempts=1)  # a single failure that is counted makes a dead letter


@pytest.fixture(scope="module")
def own() -> Iterator[Postgres]:
    """A server whose limits are low."""
    with Postgres({"fsync": "off", "deadlock_timeout": "50ms", "max_connections": "20"}) as server:
        yield server


@pytest.fixture
async def there(own: Postgres) -> str:
    """A database of its own on it."""
    name = f"faults_{uuid.uuid4().hex[:12]}"
    await query(own.dsn(), f"create database {name}")
    await migrated(own.dsn(name))
    return own.dsn(name)


@asynccontextmanager
async def meanwhile(what: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(what)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def dead_letters(dsn: str) -> int:
    return int(await value(dsn, "select count(*) from consumer.dead_letters"))


# -- the connection -------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
async def test_commit_cut_before_during_or_after_the_server_doubles_nothing(
    own: Postgres, there: str, kafka: Kafka, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "consumer")
    topic = await new_topic(kafka.bootstrap_servers, 4)
    app = numbered_app(topic)
    async with Proxy(own.port, "postgres") as proxy:
        settings = settings_for(through(there, proxy, own), kafka.bootstrap_servers, redis_url, batch_messages_max=40)
        opened: list[int] = []
        async with working(app, settings, report=lambda report: opened.append(report.get("opened") or 0)):

            async def is_open() -> bool:
                return sum(opened) >= 4

            await until("the partitions to be opened", is_open, 120)  # so that every COMMIT to come is a batch's
            cuts: tuple[Cut, ...] = ("before", "after", "during")
            for part, cut in enumerate(cuts):
                proxy.on("commit", cut, times=6, every=3)
                await produce(kafka.bootstrap_servers, topic, messages(range(part * 1000, part * 1000 + 1000)))
                await drained(app, settings, 120)
                assert proxy.fired["commit", cut] == 6
    await all_applied_once(there, range(3000))
    unknown = [fields for fields in map(fields_of, caplog.records) if fields.get("why") == "postgresql lost"]
    assert sum(fields["count"] for fields in unknown) >= 18
    # Those that had happened were found out: by the positions, which had moved with them.
    assert sum("positions have moved" in record.getMessage() for record in caplog.records) >= 10


@pytest.mark.parametrize("way", ["down", "both"])
async def test_a_connection_that_falls_silent_is_ended(
    own: Postgres, there: str, kafka: Kafka, redis_url: str, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    """The peer's kernel answers, the peer does not.

    With "down" the COMMIT arrives, and its answer does not.
    """
    caplog.set_level(logging.INFO, "consumer")
    topic = await new_topic(kafka.bootstrap_servers, 4)
    app = numbered_app(topic)
    async with Proxy(own.port, "postgres") as proxy:
        settings = settings_for(
            through(there, proxy, own),
            kafka.bootstrap_servers,
            redis_url,
            batch_messages_max=20,
            postgres_answer_timeout_seconds=1,
            postgres_lock_timeout_seconds=0.9,
        )
        async with working(app, settings):
            await produce(kafka.bootstrap_servers, topic, messages(range(400)))

            async def begun() -> bool:
                return proxy.seen["commit"] >= 2

            await until("the first batches", begun)
            proxy.black_hole(way)  # type: ignore[arg-type]
            await produce(kafka.bootstrap_servers, topic, messages(range(400, 600)))

            async def noticed() -> bool:
                return is_logged(caplog, "postgresql does not answer")

            await until("the silence to be noticed", noticed)
            proxy.heal()
            await drained(app, settings)
    await all_applied_once(there, range(600))


# -- what the server refuses or undoes ------------------------------------------------------------------------------


async def test_conflicts_of_all_kinds_count_no_attempt(own: Postgres, there: str, kafka: Kafka) -> None:
    """Deadlocks, locks, cancelled statements, ended connections: one attempt.

    Also serialization failures, and statements that take too long.
    """
    topic = await new_topic(kafka.bootstrap_servers, 2)
    app = App(f"conflicts-{uuid.uuid4().hex[:8]}")
    runs = 0
    slow = {"s": 2}

    @app.handler(topic, retry=ONCE, concurrency=4)
    async def settle(body: dict[str, int], tx: Tx) -> None:
        nonlocal runs
        runs += 1
        n = body["n"]
        first, second = (1, 2) if n % 2 else (2, 1)  # the other lane's the other way round
        await tx.execute("update accounts set balance = balance + $1 where id = $2", n, first)
        await asyncio.sleep(0)
        await tx.execute("update accounts set balance = balance + $1 where id = $2", n, second)
        await tx.execute("insert into effects values ($1, 1, $2)", str(n), n)
        if n % 50 == 0 and slow["s"]:
            slow["s"] -= 1
            await tx.execute("select pg_sleep(5)")  # statement_timeout
        if n % 60 == 7:
            await tx.execute("select sometimes_serial($1)", n)

    await query(there, "create sequence tries")
    await query(
        there,
        """create function sometimes_serial(n int) returns void language plpgsql as $$
           begin if nextval('tries') % 2 = 1 then raise 'x' using errcode = '40001'; end if; end $$""",
    )
    database = there.rsplit("/", 1)[1]
    await query(there, f"alter database {database} set statement_timeout = '1s'")
    numbers = range(1, 301)
    sent = [Sent({"n": n}, id=f"m{n}", key=str(n), partition=n % 2) for n in numbers]
    await produce(kafka.bootstrap_servers, topic, sent)
    settings = settings_for(there, kafka.bootstrap_servers, batch_messages_max=10, postgres_lock_timeout_seconds=0.3)
    done = {"cancel": 0, "terminate": 0}

    async def trouble() -> None:
        connection = await asyncpg.connect(own.dsn())
        try:
            while True:
                for kind, at_most in (("cancel", 15), ("terminate", 6)):
                    if done[kind] < at_most:
                        done[kind] += await connection.fetchval(
                            f"""select count(pg_{kind}_backend(pid)) from (select pid from pg_stat_activity
                                where datname = $1 and application_name = 'idempotent-consumer' and state <> 'idle'
                                order by random() limit 1)""",
                            database,
                        )
                await asyncio.sleep(0.05)
        finally:
            connection.terminate()

    async def holds() -> None:
        """A lock that is held for longer than the workers wait."""
        connection = await asyncpg.connect(there)
        try:
            for _ in range(2):
                await connection.execute("begin")
                with suppress(asyncpg.PostgresError):
                    await connection.execute("update accounts set balance = balance where id = 1")
                    await asyncio.sleep(0.8)
                await connection.execute("rollback")
                await asyncio.sleep(0.2)
        finally:
            connection.terminate()

    async def crosses() -> None:
        """Lock both rows in alternating order, so that workers deadlock."""
        connection = await asyncpg.connect(there)
        try:
            while True:
                for rows in ((1, 2), (2, 1)):
                    with suppress(asyncpg.PostgresError):
                        async with connection.transaction():
                            for row in rows:
                                await connection.execute("update accounts set balance = balance where id = $1", row)
                                await asyncio.sleep(0.1)
        finally:
            connection.terminate()

    before = await value(own.dsn(), "select deadlocks from pg_stat_database where datname = $1", database)
    async with meanwhile(trouble()), meanwhile(holds()), meanwhile(crosses()):
        await consume_all(app, settings, 60)
    rows = await query(there, "select id, count(*) from effects group by id")
    assert sorted(rows) == sorted((str(n), 1) for n in numbers)
    assert await value(there, "select balance from accounts where id = 2") == sum(numbers)
    assert await dead_letters(there) == 0
    assert runs > 300
    assert done["cancel"] and done["terminate"]

    async def counted() -> bool:
        now = await value(own.dsn(), "select deadlocks from pg_stat_database where datname = $1", database)
        return bool(now > before)

    await until("PostgreSQL to have counted a deadlock", counted)


async def test_index_rebuilt_under_load_loses_and_doubles_nothing(
    own: Postgres, there: str, kafka: Kafka, redis_url: str
) -> None:
    topic = await new_topic(kafka.bootstrap_servers, 4)
    app = numbered_app(topic)
    settings = settings_for(there, kafka.bootstrap_servers, redis_url, batch_messages_max=50)
    times = 0

    async def reindex() -> None:
        nonlocal times
        connection = await asyncpg.connect(there)
        try:
            while True:
                await connection.execute("reindex table concurrently consumer.ledger")
                times += 1
        finally:
            connection.terminate()

    sent = messages(range(1500))
    async with meanwhile(reindex()), working(app, settings):
        for part in range(3):
            await produce(kafka.bootstrap_servers, topic, sent[part * 500 : part * 500 + 500] + sent[:100])
            await drained(app, settings)

        async def some() -> bool:
            return times >= 2

        await until("the index to be rebuilt", some)
    await all_applied_once(there, range(1500))


async def test_a_server_that_is_full_of_connections_is_waited_for(
    own: Postgres, there: str, kafka: Kafka, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "consumer")
    topic = await new_topic(kafka.bootstrap_servers, 4)
    app = numbered_app(topic)
    settings = settings_for(there, kafka.bootstrap_servers, redis_url, batch_messages_max=50)
    crowd: list[asyncpg.Connection[Any]] = []
    async with working(app, settings):
        await produce(kafka.bootstrap_servers, topic, messages(range(200)))
        await drained(app, settings)
        await query(
            there,
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'idempotent-consumer'",
        )
        try:
            with pytest.raises(asyncpg.TooManyConnectionsError):
                while True:
                    crowd.append(await asyncpg.connect(own.dsn()))
            caplog.clear()
            await produce(kafka.bootstrap_servers, topic, messages(range(200, 400)))

            async def waits() -> bool:
                return is_logged(caplog, "TooManyConnectionsError")

            await until("the worker to be refused", waits)
        finally:
            for connection in crowd:
                await connection.close()
        await drained(app, settings)
    await all_applied_once(there, range(400))


# -- the disk ---------------------------------------------------------------------------------------------------------


class SmallDisk(Postgres):
    """Its data on a disk of 200 MB."""

    name = "smalldisk"

    def __init__(self, disk: Path) -> None:
        super().__init__({"fsync": "off", "max_wal_size": "32MB", "min_wal_size": "32MB"})
        self._disk = disk

    def place(self) -> str:
        return str(self._disk)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    disk = Path(tempfile.mkdtemp(prefix="consumer-disk-", dir="/tmp"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200m,mode=755", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        disk.rmdir()
        pytest.skip("a disk of a test's own can be mounted by root only")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
        disk.rmdir()


async def test_full_disk_is_waited_for(
    small_disk: Path, kafka: Kafka, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL refuses rows, or stops when its WAL has no room.

    Then the test starts it again.
    """
    caplog.set_level(logging.INFO, "consumer")
    with SmallDisk(small_disk) as server:
        await migrated(server.dsn())
        topic = await new_topic(kafka.bootstrap_servers, 4)
        app = numbered_app(topic)
        settings = settings_for(server.dsn(), kafka.bootstrap_servers, redis_url, batch_messages_max=50)
        async with working(app, settings):
            await produce(kafka.bootstrap_servers, topic, messages(range(300)))
            await drained(app, settings)
            ballast = small_disk / "ballast"
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            sending, sent = 300, 300

            def full() -> bool:
                return is_logged(caplog, "DiskFull") or server.process is None or server.process.poll() is not None

            while not full() and sent < 20_000:
                await produce(kafka.bootstrap_servers, topic, messages(range(sent, sent + 500)))
                sent += 500
                await asyncio.sleep(0.2)

            async def met() -> bool:
                return full()

            await until("PostgreSQL to meet the end of the disk", met)
            ballast.unlink()
            if server.process is not None and server.process.poll() is not None:
                await asyncio.to_thread(server.run)
                await asyncio.to_thread(server.wait)
            await drained(app, settings, 60)
            assert sending < sent
        await all_applied_once(server.dsn(), range(sent))


# -- what counts as durable -------------------------------------------------------------------------------------------


async def test_acknowledged_messages_survive_a_power_cut_despite_settings(kafka: Kafka) -> None:
    """synchronous_commit = off by role, database and handler's function.

    The WAL writer sleeps meanwhile.
    """
    with Postgres(
        {"fsync": "on", "wal_writer_delay": "10s", "wal_writer_flush_after": "0", "autovacuum": "off"}
    ) as server:
        await migrated(server.dsn())
        await query(server.dsn(), "alter role demo set synchronous_commit = off")
        await query(server.dsn(), "alter database postgres set synchronous_commit = off")
        await query(
            server.dsn(),
            """create function hurry() returns text language sql as
               $$ select set_config('synchronous_commit', 'off', false) $$""",
        )
        topic = await new_topic(kafka.bootstrap_servers)
        app = App(f"durable-{uuid.uuid4().hex[:8]}")
        acknowledged = asyncio.Event()

        @app.handler(topic)
        async def settle(body: dict[str, int], tx: Tx) -> None:
            await tx.fetchval("select hurry()")
            await tx.execute("insert into effects values ($1, 1, 1)", str(body["n"]))

        commits = 0

        def step(name: str) -> None:
            nonlocal commits
            commits += name == "committed"
            if commits >= 2 and name == "committed":
                os.killpg(server.pid, 9)  # the very moment after the answer
                acknowledged.set()

        async with working(
            app, settings_for(server.dsn(), kafka.bootstrap_servers, batch_messages_max=5), on_step=step
        ):
            await produce(kafka.bootstrap_servers, topic, [Sent({"n": n}, id=f"m{n}", key="k") for n in range(10)])
            await asyncio.wait_for(acknowledged.wait(), 30)
            server.kill()
            commits = -1_000_000
        await asyncio.to_thread(server.run)
        await asyncio.to_thread(server.wait)
        settled = await value(server.dsn(), "select next_offset from consumer.positions")
        assert settled == 10 == await value(server.dsn(), "select count(*) from effects")


async def test_commit_whose_wait_for_the_standby_was_cancelled_is_repeated(
    kafka: Kafka, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL answers COMMIT with a warning, on one machine only.

    The position is lost together with the effect.
    """
    caplog.set_level(logging.INFO, "consumer")
    with Postgres({"fsync": "off", "synchronous_commit": "on"}) as primary:
        await migrated(primary.dsn())
        topic = await new_topic(kafka.bootstrap_servers, 4)
        app = numbered_app(topic)
        async with Proxy(primary.port) as front, Proxy(primary.port) as link:
            standby = await asyncio.to_thread(Standby(primary, link.port, {"fsync": "off"}).__enter__)
            try:
                await query(primary.dsn(), "alter system set synchronous_standby_names = '*'")
                await query(primary.dsn(), "select pg_reload_conf()")
                settings = settings_for(through(primary.dsn(), front, primary), kafka.bootstrap_servers, redis_url)
                async with working(app, settings):
                    await produce(kafka.bootstrap_servers, topic, messages(range(200)))
                    await drained(app, settings)
                    await caught_up(primary, standby)
                    link.black_hole()
                    await produce(kafka.bootstrap_servers, topic, messages(range(200, 300)))
                    cancelled = 0

                    async def all_settled() -> bool:
                        nonlocal cancelled
                        cancelled += await value(
                            primary.dsn(),
                            "select count(pg_cancel_backend(pid)) from pg_stat_activity where wait_event = 'SyncRep'",
                        )
                        settled = await value(primary.dsn(), "select sum(next_offset) from consumer.positions")
                        return bool(settled == 300)

                    await until("the COMMITs to be cancelled", all_settled)
                    assert cancelled
                    await asyncio.to_thread(power_cut, primary)
                    await query(standby.dsn(), "select pg_promote()")
                    assert await value(standby.dsn(), "select count(*) from effects") == 200
                    front.point(standby.port)
                    front.reset()
                    await produce(kafka.bootstrap_servers, topic, messages(range(200, 300)))
                    await drained(app, settings)
                await all_applied_once(standby.dsn(), range(300))
            finally:
                standby.stop()


# -- PgBouncer --------------------------------------------------------------------------------------------------------


@needs_pgbouncer
async def test_pgbouncer_in_transaction_mode_loses_and_doubles_nothing(
    own: Postgres, there: str, kafka: Kafka, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "consumer")
    topic = await new_topic(kafka.bootstrap_servers, 4)
    app = numbered_app(topic)
    with Pooler(own, 2) as bouncer:
        settings = settings_for(
            bouncer.dsn(there),
            kafka.bootstrap_servers,
            redis_url,
            postgres_pooler=True,
            lanes_max=4,
            batch_messages_max=40,
        )
        async with working(app, settings):
            await produce(kafka.bootstrap_servers, topic, messages(range(800)))
            for _ in range(5):
                await query(
                    own.dsn(),
                    "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1 and state <> 'idle'",
                    there.rsplit("/", 1)[1],
                )
                await asyncio.sleep(0.05)
            bouncer.kill()
            await produce(kafka.bootstrap_servers, topic, messages(range(800, 1200)))
            await asyncio.to_thread(bouncer.run)
            await asyncio.to_thread(bouncer.wait)
            await drained(app, settings)
            settings_of_sessions = await query(
                there, "select distinct usename from pg_stat_activity where application_name = 'idempotent-consumer'"
            )
            assert settings_of_sessions == []  # nothing of ours stays in the pooler's sessions
    await all_applied_once(there, range(1200))


@needs_pgbouncer
async def test_check_behind_pgbouncer_counts_no_rows_of_other_clients(
    own: Postgres, there: str, kafka: Kafka, redis_url: str
) -> None:
    """A pooler's sessions count the written rows of all its clients."""
    topic = await new_topic(kafka.bootstrap_servers, 4)
    app = numbered_app(topic)
    await produce(kafka.bootstrap_servers, topic, messages(range(200)))
    with Pooler(own, 1) as bouncer:
        settings = settings_for(bouncer.dsn(there), kafka.bootstrap_servers, redis_url, postgres_pooler=True)
        await consume_all(app, settings)
        other = await asyncpg.connect(bouncer.dsn(there), statement_cache_size=0)

        async def write() -> None:
            while True:
                await other.execute("update accounts set balance = balance where id = 1")

        writing = asyncio.create_task(write())
        try:
            for _ in range(3):
                findings = await replay(app, settings, [topic], Options(), Progress())
                assert findings.ok and findings.effects is not None and findings.effects.total == 0, findings.answer()
        finally:
            writing.cancel()
            await asyncio.wait([writing])
            other.terminate()


@needs_pgbouncer
async def test_statements_outside_transactions_work_behind_pgbouncer(own: Postgres, there: str, kafka: Kafka) -> None:
    """Twelve clients share three sessions.

    So each statement may use another session than the one before it.
    """
    with Pooler(own, 3) as bouncer:
        settings = settings_for(bouncer.dsn(there), kafka.bootstrap_servers, None, postgres_pooler=True)

        async def work(number: int) -> None:
            connection = await connect(settings)
            try:
                for n in range(100):
                    assert await connection.fetchval("select $1::int + $2::int", number, n) == number + n
                    assert await connection.fetchrow("select $1::text", str(n)) == (str(n),)
                    assert len(await connection.fetch("select generate_series(1, $1::int)", n)) == n
                    assert await connection.execute("update accounts set balance = balance where id = $1", n % 3)
            finally:
                await connection.close()

        await asyncio.gather(*map(work, range(12)))
