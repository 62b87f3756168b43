"""The epoch is known in every transaction.

With a pooler, through a proxy, after a snapshot, and on servers that hide it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Place, Sent, drained, migrated, new_topic, produce, query, settings_for, until, working
from numbered_messages import PARTITIONS, all_applied_once, applied, messages, numbered_app
from pair import Standby, caught_up, power_cut
from pooler import Pooler, needs_pgbouncer
from proxy import Proxy
from redis.asyncio import Redis
from services import Kafka
from worker_log import is_logged

from consumer import App, RunAgain, Tx
from consumer.local_servers import Postgres
from consumer.postgres.errors import OtherEpoch
from consumer.postgres.session import Session

PATIENT_MS = 30_000  # a mark that Redis does not take in time is never written


@pytest.fixture
def primary() -> Iterator[Postgres]:
    with Postgres({"fsync": "off", "wal_keep_size": "1GB"}) as server:
        yield server


async def marks(redis_url: str, app: App) -> int:
    redis = Redis.from_url(redis_url)
    try:
        return sum([await redis.scard(key) async for key in redis.scan_iter(match=f"consumer:*:{app.name}:*")])
    finally:
        await redis.aclose()


@needs_pgbouncer
async def test_pooler_fails_over_to_standby_without_tail_nothing_lost_or_doubled(
    primary: Postgres, kafka: Kafka, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients stay connected while Redis holds marks of the lost timeline."""
    caplog.set_level(logging.INFO, "consumer")
    await migrated(primary.dsn())
    topic = await new_topic(kafka.bootstrap_servers, PARTITIONS)
    app = numbered_app(topic)
    async with Proxy(primary.port) as link:
        standby = await asyncio.to_thread(Standby(primary, link.port, {"fsync": "off"}).__enter__)
        try:
            with Pooler(primary) as pooler:
                direct = settings_for(standby.dsn(), kafka.bootstrap_servers, redis_url)
                settings = settings_for(
                    pooler.dsn(primary.dsn()),
                    kafka.bootstrap_servers,
                    redis_url,
                    postgres_pooler=True,
                    lanes_max=4,
                    precheck_budget_ms=PATIENT_MS,
                )
                async with working(app, settings):
                    await produce(kafka.bootstrap_servers, topic, messages(range(400)))
                    await drained(app, settings)
                    await caught_up(primary, standby)
                    link.black_hole()
                    await produce(kafka.bootstrap_servers, topic, messages(range(400, 800)))
                    await drained(app, settings)

                    async def all_marked() -> bool:
                        return await marks(redis_url, app) == 800

                    await until("every message to be marked", all_marked)
                    await pooler.tell("PAUSE")
                    await asyncio.to_thread(power_cut, primary)
                    await query(standby.dsn(), "select pg_promote()")
                    assert await applied(standby.dsn()) == list(range(400))
                    await pooler.lead_to(standby)
                    await pooler.tell("RESUME")
                    # What is lost, sent again by its producer, and new messages: no connection of the worker was cut.
                    await produce(kafka.bootstrap_servers, topic, messages(range(800)) + messages(range(800, 900)))
                    await drained(app, direct, 60)
                    await all_applied_once(standby.dsn(), range(900))
        finally:
            standby.stop()
    assert is_logged(caplog, "another epoch of postgresql")


async def test_transaction_sees_another_epoch_and_is_undone(place: Place) -> None:
    """As behind a pooler: the connection stays, what it leads to changes."""
    session = await Session.open(place.settings())
    try:
        await session.check_epoch()
        await query(place.dsn, "update consumer.installation set nonce = gen_random_uuid()")
        await session.begin()
        await session.connection.execute("insert into effects values ('lost', 1, 1)")
        with pytest.raises(OtherEpoch):
            await session.write_positions("app", [], {})
        assert not session.is_usable
        with pytest.raises(OtherEpoch):
            again = await Session.open(place.settings())
            await query(place.dsn, "update consumer.installation set nonce = gen_random_uuid()")
            await again.check_epoch()
    finally:
        session.close()
    assert await place.effects() == []


async def test_new_epoch_under_running_worker_ends_marks_and_memory(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows went back in time, and no position shows it.

    One message waits, so the position has not moved.
    """
    caplog.set_level(logging.INFO, "consumer")
    topic = await place.topic()
    gate = asyncio.Event()
    app = App(f"epochs-{topic}")

    @app.handler(topic)
    async def settle(body: dict[str, int], tx: Tx) -> None:
        if body["n"] == 0 and not gate.is_set():
            raise RunAgain
        await tx.execute("insert into effects values ($1, 1, $2)", str(body["n"]), body["n"])

    async with working(app, place.settings(precheck_budget_ms=PATIENT_MS)):
        await place.send(topic, *[Sent({"n": n}, id=f"m{n}", key=f"k{n}") for n in range(20)])

        async def later_ones() -> bool:
            return len(await place.effects()) == 19 and await marks(place.redis_url, app) == 19

        await until("all but the first", later_ones)
        # Back to the time before: effects and claims are gone, the position was never moved.
        await query(place.dsn, "delete from effects")
        await query(place.dsn, "delete from consumer.ledger")
        await query(place.dsn, "update consumer.installation set nonce = gen_random_uuid()")
        gate.set()
        await drained(app, place.settings())
    assert sorted(int(row[0]) for row in await place.effects()) == list(range(20))
    assert is_logged(caplog, "another epoch of postgresql")


async def test_lost_handler_number_is_replaced_after_failover(place: Place) -> None:
    """The lost tail held the handler's number; another application has it now."""
    topic = await place.topic()
    app = App(f"epochs-{topic}")

    @app.handler(topic)
    async def settle(body: dict[str, int], tx: Tx) -> None:
        await tx.execute("insert into effects values ($1, 1, $2)", str(body["n"]), body["n"])

    async with working(app, place.settings()):
        await place.send(topic, *[Sent({"n": n}, id=f"m{n}") for n in range(5)])
        await drained(app, place.settings())
        await query(place.dsn, "update consumer.handlers set app = 'another', name = 'other' where app = $1", app.name)
        await query(place.dsn, "update consumer.installation set nonce = gen_random_uuid()")
        await place.send(topic, *[Sent({"n": n}, id=f"m{n}") for n in range(5, 10)])
        await drained(app, place.settings())
    rows = await query(
        place.dsn,
        "select h.app, count(*) from consumer.ledger join consumer.handlers h using (handler) group by 1 order by 1",
    )
    assert dict(rows) == {"another": 5, app.name: 5}


async def test_snapshot_of_the_same_timeline_is_another_epoch(
    primary: Postgres, kafka: Kafka, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy of the disk starts behind the same address.

    System identifier, timeline and nonce are the same.
    """
    caplog.set_level(logging.INFO, "consumer")
    await migrated(primary.dsn())
    topic = await new_topic(kafka.bootstrap_servers, PARTITIONS)
    app = numbered_app(topic)
    settings = settings_for(primary.dsn(), kafka.bootstrap_servers, redis_url)
    data, snapshot = primary.directory / "data", primary.directory / "snapshot"

    async def start(*copy: Path) -> None:
        """Start the server after a power cut, with files copied first.

        They are copied with `cp -a`.
        """
        await asyncio.to_thread(power_cut, primary)
        if copy:
            await asyncio.to_thread(shutil.rmtree, copy[1], True)
            await asyncio.to_thread(lambda: subprocess.run(["cp", "-a", *copy], check=True))
        await asyncio.to_thread(primary.run)
        await asyncio.to_thread(primary.wait)

    async with working(app, settings):
        await produce(kafka.bootstrap_servers, topic, messages(range(200)))
        await drained(app, settings)
        await start(data, snapshot)
        await produce(kafka.bootstrap_servers, topic, messages(range(200, 400)))
        await drained(app, settings)

        async def all_marked() -> bool:
            return await marks(redis_url, app) >= 400

        await until("every message to be marked", all_marked)
        await start(snapshot, data)
        assert await applied(primary.dsn()) == list(range(200))
        await produce(kafka.bootstrap_servers, topic, messages(range(0, 400, 10)))
        await drained(app, settings)
        await all_applied_once(primary.dsn(), range(400))


async def _shorn(place: Place, *functions: str) -> None:
    """Revoke functions from all but superusers, as managed services do."""
    for function in functions:
        await query(place.dsn, f"revoke execute on function pg_catalog.{function} from public")


async def test_server_without_wal_functions_works_with_pre_check(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Amazon Aurora hides the WAL position: the start time makes the epoch."""
    caplog.set_level(logging.INFO, "consumer")
    await _shorn(place, "pg_current_wal_lsn()", "pg_control_system()")
    topic = await place.topic()
    app = numbered_app(topic)
    async with working(app, place.settings()):
        await place.send(topic, *[Sent({"n": n}, id=f"m{n}") for n in range(10)] * 2)
        await drained(app, place.settings())

        async def all_marked() -> bool:
            return await marks(place.redis_url, app) == 10

        await until("marks", all_marked)
    assert len(await place.effects()) == 10
    session = await Session.open(place.settings())
    session.close()
    assert session.server.refused == ("system", "timeline") and session.server.tells_history
    assert session.epoch.startswith("0-0-")


async def test_server_that_hides_its_start_time_works_without_pre_check(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "consumer")
    await _shorn(place, "pg_postmaster_start_time()")
    topic = await place.topic()
    app = numbered_app(topic)
    async with working(app, place.settings()):
        await place.send(topic, *[Sent({"n": n}, id=f"m{n}") for n in range(10)] * 2)
        await drained(app, place.settings())
    assert len(await place.effects()) == 10
    assert await marks(place.redis_url, app) == 0
    assert is_logged(caplog, "pre-check off: postgresql does not tell its start time")
