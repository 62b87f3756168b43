"""PostgreSQL goes back in time; what was lost is applied again.

Kafka's offsets and Redis's marks do not go back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest
from harness import Place, drained, migrated, new_topic, produce, query, settings_for, until, working
from numbered_messages import PARTITIONS, all_applied_once, applied, messages, numbered_app
from pair import Backup, Standby, caught_up, power_cut, through
from proxy import Proxy
from redis.asyncio import Redis
from services import Kafka
from worker_log import is_logged

from consumer import App, Settings
from consumer.core.message import Partition
from consumer.kafka.consumer import KafkaConsumer
from consumer.local_servers import Postgres, free_port


async def kafkas_offsets(app: App, settings: Settings, topic: str) -> int:
    source = KafkaConsumer(settings, app.name)
    await source.start(10)
    try:
        return sum([await source.committed(Partition(topic, n)) or 0 for n in range(PARTITIONS)])
    finally:
        await source.stop(5)


@pytest.fixture
def primary() -> Iterator[Postgres]:
    with Postgres({"fsync": "off", "wal_keep_size": "1GB"}) as server:
        yield server


async def test_failover_to_a_standby_without_the_tail_loses_nothing(
    primary: Postgres, kafka: Kafka, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One worker runs throughout, behind one address.

    The address leads to a standby, the primary, the new primary, the old primary after its return, and the new primary again.
    """
    caplog.set_level(logging.INFO, "consumer")
    await migrated(primary.dsn())
    topic = await new_topic(kafka.bootstrap_servers, PARTITIONS)
    app = numbered_app(topic)
    async with Proxy(primary.port) as front, Proxy(primary.port) as link:
        standby = await asyncio.to_thread(Standby(primary, link.port, {"fsync": "off"}).__enter__)
        try:
            front.point(standby.port)
            settings = settings_for(through(primary.dsn(), front, primary), kafka.bootstrap_servers, redis_url)
            async with working(app, settings):

                async def waits() -> bool:
                    return is_logged(caplog, "a standby")

                await until("the worker to wait for a primary", waits)
                front.point(primary.port)
                await produce(kafka.bootstrap_servers, topic, messages(range(600)))
                await drained(app, settings)
                await caught_up(primary, standby)

                link.black_hole()  # what comes now, only the primary has
                await produce(kafka.bootstrap_servers, topic, messages(range(600, 1200)))
                await drained(app, settings)
                await all_applied_once(primary.dsn(), range(1200))

                async def ahead() -> bool:
                    return await kafkas_offsets(app, settings, topic) == 1200

                await until("Kafka's offsets to be ahead", ahead)
                redis = Redis.from_url(redis_url)
                marked = len(await redis.keys("*"))
                assert marked
                await redis.aclose()

                await asyncio.to_thread(power_cut, primary)
                await query(standby.dsn(), "select pg_promote()")
                assert await applied(standby.dsn()) == list(range(600))  # the tail is lost
                front.point(standby.port)
                front.reset()
                # Sent again as well, and new ones: the marks of the lost ones are still in Redis.
                again = messages(range(0, 1200, 10))
                await produce(kafka.bootstrap_servers, topic, again + messages(range(1200, 1300)))
                await drained(app, settings)
                await all_applied_once(standby.dsn(), range(1300))

                # The old primary is there again, alive and writable, behind the same address.
                await asyncio.to_thread(primary.run)
                await asyncio.to_thread(primary.wait)
                front.point(primary.port)
                front.reset()
                await produce(kafka.bootstrap_servers, topic, messages(range(1300, 1400)))

                async def refused() -> bool:
                    return is_logged(caplog, "an old primary")

                await until("the worker to see what that is", refused)
                assert await applied(primary.dsn()) == list(range(1200))  # as it was when it died
                front.point(standby.port)
                front.reset()
                await drained(app, settings)
                assert await applied(primary.dsn()) == list(range(1200))
                await all_applied_once(standby.dsn(), range(1400))
        finally:
            standby.stop()
    assert is_logged(caplog, "another epoch of postgresql")


async def test_restore_to_a_point_in_time_gets_lost_effects_again(
    primary: Postgres, kafka: Kafka, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The system identifier is the same, the timeline new.

    The DSN names both places, and the worker runs on.
    """
    caplog.set_level(logging.INFO, "consumer")
    await migrated(primary.dsn())
    place = Place(kafka.bootstrap_servers, primary.dsn(), redis_url)
    topic = await place.topic(PARTITIONS)
    app = numbered_app(topic)
    backup, port = Backup(primary), free_port()
    both = primary.dsn().replace(f":{primary.port}/", f":{primary.port},127.0.0.1:{port}/")
    settings = settings_for(f"{both}?target_session_attrs=read-write", kafka.bootstrap_servers, redis_url)
    await asyncio.to_thread(backup.take)
    try:
        async with working(app, settings):
            here = settings_for(primary.dsn(), kafka.bootstrap_servers, redis_url)
            await place.send(topic, *messages(range(400)))
            await drained(app, here)
            await query(primary.dsn(), "select pg_create_restore_point('before the mistake')")
            await place.send(topic, *messages(range(400, 800)))
            await drained(app, here)

            async def ahead() -> bool:
                return await kafkas_offsets(app, here, topic) == 800

            await until("Kafka's offsets to be ahead", ahead)
            await asyncio.to_thread(power_cut, primary)
            await asyncio.to_thread(backup.restore, "before the mistake", port)
            there = settings_for(backup.dsn(), kafka.bootstrap_servers, redis_url)
            await place.send(topic, *messages(range(0, 800, 10)))
            await drained(app, there, 60)
            await all_applied_once(backup.dsn(), range(800))
    finally:
        backup.stop()
    assert is_logged(caplog, "another epoch of postgresql")
