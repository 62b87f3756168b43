"""The intake moves rows once, in an order that keeps sequences.

No transaction waits for another.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from harness import as_worker, migrated, query, value

from consumer import App, Misconfigured
from consumer.core.message import Partition
from consumer.outbox.record import Outgoing, OutgoingRecord
from consumer.outbox.streams import INTAKE
from consumer.postgres import grants, outbox, outbox_intake

APP = App("shop", publishes=["out", "other"])


@pytest.fixture
async def dsn(database: str) -> str:
    await migrated(database)
    return database


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(as_worker(dsn))
    yield connection
    await connection.close()


async def publish(connection: Any, *numbers: int, topic: str = "out") -> None:
    """Publish in the open transaction."""
    async with APP.publishing(connection) as out:
        for number in numbers:
            out.publish(topic, str(number), key="k")


async def committed(connection: Any, *numbers: int, topic: str = "out") -> None:
    async with connection.transaction():
        await publish(connection, *numbers, topic=topic)


async def move(connection: Any) -> list[int]:
    """Move rows, as a worker does; return values in stream order."""
    async with connection.transaction():
        records = await outbox_intake.take(connection, APP.name)
        if records:
            await outbox.store(connection, APP.name, [Outgoing(record, INTAKE, None, None) for record in records])
    return [int(record.value or b"") for record in records]


async def test_a_transaction_that_stays_open_delays_only_its_own_rows(
    dsn: str, connection: asyncpg.Connection[Any]
) -> None:
    """Its row has a lower place than moved ones, and survives."""
    slow = await asyncpg.connect(as_worker(dsn))
    try:
        transaction = slow.transaction()
        await transaction.start()
        await publish(slow, 1)
        await committed(connection, 2, 3)
        assert await move(connection) == [2, 3]
        await committed(connection, 4)
        assert await move(connection) == [4]
        await transaction.commit()
        assert await move(connection) == [1]
        assert await move(connection) == []
    finally:
        await slow.close()


async def test_a_rollback_publishes_nothing(connection: asyncpg.Connection[Any]) -> None:
    await committed(connection, 1)
    with pytest.raises(ZeroDivisionError):
        async with connection.transaction():
            await publish(connection, 2)
            raise ZeroDivisionError
    async with connection.transaction():
        with pytest.raises(ZeroDivisionError):
            async with connection.transaction():  # a savepoint
                await publish(connection, 3)
                raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError):
            async with APP.publishing(connection) as out:
                out.publish("out", "4")
                raise ZeroDivisionError
        await publish(connection, 5)
    assert await move(connection) == [1, 5]


async def test_interleaved_writers_and_workers_lose_and_reorder_nothing(dsn: str) -> None:
    """Writers commit in any order, and two workers move.

    What one transaction published stays in order.
    """
    writers = [await asyncpg.connect(as_worker(dsn)) for _ in range(6)]
    movers = [await asyncpg.connect(as_worker(dsn)) for _ in range(2)]
    draw = random.Random(7)
    done = asyncio.Event()

    async def write(writer: int) -> None:
        for turn in range(12):
            async with writers[writer].transaction():
                for part in range(3):
                    number = writer * 10_000 + turn * 100 + part * 10
                    await publish(writers[writer], number, number + 1)
                    await asyncio.sleep(draw.random() * 0.01)
            # What follows its COMMIT must be sent after it, from whichever connection.

    async def keep_moving(connection: Any) -> list[int]:
        moved: list[int] = []
        while not done.is_set() or await outbox_intake.is_waiting(connection, APP.name):
            moved += await move(connection)
        return moved

    try:
        moving = [asyncio.create_task(keep_moving(mover)) for mover in movers]
        await asyncio.gather(*[write(number) for number in range(len(writers))])
        done.set()
        moved = sorted([number for part in await asyncio.gather(*moving) for number in part])
        expected = [
            writer * 10_000 + turn * 100 + part * 10 + one
            for writer in range(6)
            for turn in range(12)
            for part in range(3)
            for one in (0, 1)
        ]
        assert moved == expected
        [stream] = await outbox.streams(movers[0], APP.name, [INTAKE])
        rows: list[outbox.StoredRow] = []
        while len(rows) < stream.end:
            rows += await outbox.rows(movers[0], stream.stream, len(rows), stream.end)
        numbers = [int(row.record.value or b"") for row in rows]
        assert sorted(numbers) == expected
        for writer in range(6):  # in the order of its transactions, and within each
            own = [number for number in numbers if number // 10_000 == writer]
            assert own == sorted(own)
    finally:
        for connection in [*writers, *movers]:
            await connection.close()


async def test_rows_are_moved_as_they_were_published_in_parts_of_bounded_size(
    connection: asyncpg.Connection[Any],
) -> None:
    odd = OutgoingRecord("out", bytes(range(16)), None, None, (("a", None), ("b", b"\xff"), ("ce_type", b"x")))
    async with connection.transaction():
        await outbox_intake.put(connection, APP.name, [odd])
        await outbox_intake.put(connection, "another", [odd._replace(topic="theirs")])
    async with connection.transaction():
        assert await outbox_intake.take(connection, APP.name) == [odd]
    assert not await outbox_intake.is_waiting(connection, APP.name)
    assert (await outbox_intake.waiting(connection, "another"))[0] == 1
    await committed(connection, *range(1200))
    assert [len(await move(connection)) for _ in range(4)] == [500, 500, 200, 0]
    large = [odd._replace(value=b"v" * (3 << 20))] * 3 + [odd._replace(value=b"v" * (9 << 20)), odd]
    async with connection.transaction():
        await outbox_intake.put(connection, APP.name, large)
    sizes = []
    for _ in range(4):
        async with connection.transaction():
            sizes.append(len(await outbox_intake.take(connection, APP.name)))
    assert sizes == [2, 1, 1, 1]


async def test_a_stream_of_each_topic_begins_with_the_first_row(connection: asyncpg.Connection[Any]) -> None:
    await committed(connection, 1, 2)
    await committed(connection, 3, topic="other")
    assert await move(connection) == [1, 2, 3]
    streams = await outbox.streams(connection, APP.name, [INTAKE, Partition("in", 0)])
    assert {(stream.source, stream.topic, stream.end) for stream in streams} == {
        (INTAKE, "out", 2),
        (INTAKE, "other", 1),
    }


async def test_the_role_of_a_web_application_may_only_publish(dsn: str) -> None:
    await query(
        dsn, "do $$ begin create role web login password 'web'; exception when duplicate_object then null; end $$"
    )
    owner = await asyncpg.connect(dsn)
    web = await asyncpg.connect(f"postgresql://web:web@{dsn.rsplit('@', 1)[1]}")
    try:
        with pytest.raises(Misconfigured, match="consumer migrate --grants ROLE --publish-only"):
            await committed(web, 1)
        await owner.execute(grants.as_sql("web", grants.For.PUBLISHER))
        await committed(web, 1)
        for sql in (
            "select 1 from consumer.outbox_intake",
            "delete from consumer.outbox_intake",
            "select 1 from consumer.outbox",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await web.execute(sql)
        assert await value(dsn, "select count(*) from consumer.outbox_intake") == 1
    finally:
        await web.close()
        await owner.execute("drop owned by web; drop role web")
        await owner.close()


async def test_a_database_without_the_schema_says_what_to_run(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        with pytest.raises(
            Misconfigured, match="publishing: the outbox is not in this database; run `consumer migrate`"
        ):
            await committed(connection, 1)
    finally:
        await connection.close()
