"""The tables of the outbox: numbers, reading, dropping.

Numbered without gaps in the order of commits, read as stored, dropped only when published.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from harness import as_worker, migrated, query, value

from consumer.core.audit import ActedBy
from consumer.core.message import Partition
from consumer.outbox.record import Outgoing, OutgoingRecord, StoredStream
from consumer.postgres import outbox
from consumer.postgres.server import identify

APP = "shop"
P, Q = Partition("orders", 0), Partition("orders", 1)


@pytest.fixture
async def dsn(database: str) -> str:
    await migrated(database)
    return database


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(as_worker(dsn))
    yield connection
    await connection.close()


def record(number: int, topic: str = "out", size: int = 1) -> OutgoingRecord:
    return OutgoingRecord(topic, number.to_bytes(16), b"k%d" % number, b"v" * size)


def outgoing(*numbers: int, source: Partition = P, topic: str = "out", size: int = 1) -> list[Outgoing]:
    return [Outgoing(record(number, topic, size), source, 1, 100 + number) for number in numbers]


async def stored(connection: asyncpg.Connection, items: list[Outgoing]) -> list[StoredStream]:
    async with connection.transaction():
        return await outbox.store(connection, APP, items)


async def published(
    connection: asyncpg.Connection, *sources: Partition
) -> dict[tuple[Partition, str], tuple[int, int]]:
    return {
        (state.source, state.topic): (state.watermark, state.end)
        for state in await outbox.streams(connection, APP, sources or [P, Q])
    }


async def test_each_source_and_topic_is_a_stream_numbered_without_gaps(connection: asyncpg.Connection) -> None:
    items = [
        *outgoing(1, 2),
        *outgoing(3, source=Q),
        *outgoing(4, topic="other"),
        *outgoing(5),
    ]
    first = await stored(connection, items)
    assert [(part.source, part.topic, part.first, [r.id[-1] for r in part.records]) for part in first] == [
        (P, "out", 0, [1, 2, 5]),
        (Q, "out", 0, [3]),
        (P, "other", 0, [4]),
    ]
    again = await stored(connection, [*outgoing(6, 7, topic="other"), *outgoing(8)])
    assert [(part.topic, part.first) for part in again] == [("other", 1), ("out", 3)]
    assert await published(connection) == {(P, "out"): (0, 4), (Q, "out"): (0, 1), (P, "other"): (0, 3)}
    assert await published(connection, Q) == {(Q, "out"): (0, 1)}
    assert await outbox.streams(connection, "another", [P]) == []


async def test_a_row_is_read_as_it_was_stored(connection: asyncpg.Connection) -> None:
    odd = OutgoingRecord(
        "out",
        bytes(range(16)),
        None,
        None,
        (("a", None), ("b", b"\xff"), ("ce_type", "gé".encode()), ("z", b"\0")),
        "tp",
        "ts",
    )
    [part] = await stored(connection, [Outgoing(odd, P, 3, None), *outgoing(1)])
    rows = await outbox.rows(connection, part.stream, 0, 2)
    assert [row.record for row in rows] == part.records
    assert [row.seq for row in rows] == [0, 1]
    assert {row.created_ms for row in rows} == {part.created_ms}
    row = await connection.fetchrow(
        "select type, handler, source_offset, traceparent from consumer.outbox where seq = 0"
    )
    assert tuple(row or ()) == ("gé", 3, None, "tp")
    assert await outbox.rows(connection, part.stream, 1, 2) == rows[1:]
    assert await outbox.rows(connection, part.stream, 0, 1) == rows[:1]


async def test_many_rows_are_read_in_parts_of_bounded_size(connection: asyncpg.Connection) -> None:
    [part] = await stored(connection, outgoing(*range(1200)))
    assert [row.seq for row in await outbox.rows(connection, part.stream, 100, 1200)] == list(range(100, 600))
    [large] = await stored(connection, outgoing(*range(5), topic="large", size=3 << 20))
    assert [row.seq for row in await outbox.rows(connection, large.stream, 0, 5)] == [0, 1]
    [huge] = await stored(connection, outgoing(1, 2, topic="huge", size=9 << 20))
    assert [row.seq for row in await outbox.rows(connection, huge.stream, 0, 2)] == [0]


async def test_concurrent_transactions_are_numbered_in_commit_order(dsn: str, connection: asyncpg.Connection) -> None:
    """A second one waits for the first.

    No number is seen before a lower one, and a rollback leaves no gap.
    """
    await stored(connection, outgoing(0))
    other = await asyncpg.connect(as_worker(dsn))
    try:
        for ends, expected in (("commit", 3), ("rollback", 3)):
            await connection.execute("begin")
            [mine] = await outbox.store(connection, APP, outgoing(1, 2))
            waiting = asyncio.create_task(stored(other, outgoing(3)))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            await connection.execute(ends)
            [theirs] = await waiting
            assert theirs.first == mine.first + (2 if ends == "commit" else 0)
            expected = theirs.first + 1
            assert await published(connection) == {(P, "out"): (0, expected)}
        [stream] = await outbox.streams(connection, APP, [P])
        assert [row.seq for row in await outbox.rows(connection, stream.stream, 0, 99)] == list(range(stream.end))
    finally:
        await other.close()


async def test_many_writers_leave_no_gap(dsn: str) -> None:
    connections = [await asyncpg.connect(as_worker(dsn)) for _ in range(6)]
    try:

        async def write(connection: asyncpg.Connection, number: int) -> None:
            for turn in range(15):
                topics = ["a", "b", "c"][: 1 + (turn + number) % 3]
                if number % 2:
                    topics.reverse()
                async with connection.transaction():
                    await outbox.store(
                        connection, APP, [item for topic in topics for item in outgoing(turn, topic=topic)]
                    )

        await asyncio.gather(*[write(connection, number) for number, connection in enumerate(connections)])
        for stream in await outbox.streams(connections[0], APP, [P]):
            rows = await outbox.rows(connections[0], stream.stream, 0, stream.end)
            assert [row.seq for row in rows] == list(range(stream.end)) and rows
        assert await value(
            dsn, "select sum(next_seq)::int8 = (select count(*) from consumer.outbox) from consumer.outbox_streams"
        )
    finally:
        for connection in connections:
            await connection.close()


async def test_a_watermark_only_grows(connection: asyncpg.Connection) -> None:
    [part] = await stored(connection, outgoing(*range(9)))
    for seq, expected in ((5, 5), (3, 5), (7, 7)):
        await save(connection, {part.stream: seq})
        assert await published(connection) == {(P, "out"): (expected, 9)}


async def test_a_relay_of_another_epoch_writes_nothing(dsn: str, connection: asyncpg.Connection) -> None:
    """Behind a pooler its connection outlives a failover."""
    [part] = await stored(connection, outgoing(*range(9)))
    before = await identify(connection)
    await query(dsn, "update consumer.installation set nonce = gen_random_uuid() returning 1")
    await outbox.save_watermarks(connection, before, {part.stream: 5})
    await outbox.stop(connection, before, part.stream, "rows are missing")
    [state] = await outbox.streams(connection, APP, [P])
    assert (state.watermark, state.stopped) == (0, None)
    await save(connection, {part.stream: 5})
    assert await published(connection) == {(P, "out"): (5, 9)}


async def test_a_stopped_stream_is_resumed_or_passes_its_rows_on_record(connection: asyncpg.Connection) -> None:
    [part] = await stored(connection, outgoing(*range(9)))
    stream = part.stream
    await save(connection, {stream: 4})
    assert await outbox.resume(connection, APP, stream, 0, ActedBy("me", "why not")) is None
    await stop(connection, stream, "too large")
    await stop(connection, stream, "the first reason stays")
    [seen] = await outbox.overview(connection, APP)
    assert seen.state == (stream, P, "out", 4, 9, "too large") and seen.unpublished == 5
    assert seen.oldest is not None and seen.stopped_at is not None
    assert await outbox.resume(connection, "another", stream, 0, ActedBy("me", "not mine")) is None
    assert await outbox.resume(connection, APP, stream, 0, ActedBy("me", "fixed")) == (4, 4)
    await stop(connection, stream, "again")
    assert await outbox.resume(connection, APP, stream, 1, ActedBy("me", "worthless")) == (4, 5)
    await stop(connection, stream, "again")
    assert await outbox.resume(connection, APP, stream, 1000, ActedBy("me", "all of it")) == (5, 9)
    [seen] = await outbox.overview(connection, APP)
    assert (seen.unpublished, seen.oldest, seen.state.stopped) == (0, None, None)
    assert [
        (done.what, done.from_seq, done.to_seq, done.why) for done in await outbox.actions(connection, stream, 9)
    ] == [
        ("discard", 5, 9, "all of it"),
        ("discard", 4, 5, "worthless"),
        ("resume", 4, 4, "fixed"),
    ]
    details = await outbox.details(connection, stream, 7, 9)
    assert [(row.seq, row.source_offset, row.key_bytes, row.value_bytes) for row in details] == [
        (7, 107, 2, 1),
        (8, 108, 2, 1),
    ]


async def save(connection: asyncpg.Connection, watermarks: dict[int, int]) -> None:
    await outbox.save_watermarks(connection, await identify(connection), watermarks)


async def stop(connection: asyncpg.Connection, stream: int, reason: str) -> None:
    await outbox.stop(connection, await identify(connection), stream, reason)


async def generations(dsn: str) -> list[tuple[int, bool]]:
    return await query(dsn, "select generation, closed_at is null from consumer.outbox_generations order by 1")


async def test_a_generation_is_dropped_once_all_of_it_is_published(dsn: str, connection: asyncpg.Connection) -> None:
    assert await outbox.turn(connection, 0, 1) == "empty"
    [part] = await stored(connection, outgoing(*range(5)))
    assert await outbox.turn(connection, 900, 1 << 30) == "young"
    assert await outbox.turn(connection, 900, 1) == "turned"  # by its size
    await stored(connection, outgoing(5, 6))
    assert await outbox.turn(connection, 0, 1 << 30) == "turned"  # by its age
    assert await generations(dsn) == [(1, False), (2, False), (3, True)]
    await stored(connection, outgoing(7))
    assert [row.seq for row in await outbox.rows(connection, part.stream, 0, 99)] == list(range(8))
    assert await outbox.drop(connection, 0) == "unpublished"
    await save(connection, {part.stream: 4})
    assert await outbox.drop(connection, 0) == "unpublished"
    await save(connection, {part.stream: 6})
    assert await outbox.drop(connection, 3600) == "nothing"  # it is kept for an hour
    assert await outbox.drop(connection, 0) == "dropped"
    assert await outbox.drop(connection, 0) == "unpublished"
    assert await generations(dsn) == [(2, False), (3, True)]
    assert [row.seq for row in await outbox.rows(connection, part.stream, 0, 99)] == [5, 6, 7]


async def test_generation_is_not_dropped_under_a_transaction_that_writes_it(
    dsn: str, connection: asyncpg.Connection
) -> None:
    """The generation is closed after the rows are stored, before the commit."""
    await stored(connection, outgoing(0))
    writer = await asyncpg.connect(as_worker(dsn))
    try:
        transaction = writer.transaction()
        await transaction.start()
        [late] = await outbox.store(writer, APP, outgoing(1))
        assert await outbox.turn(connection, 0, 1) == "turned"
        await save(connection, {late.stream: 1})
        assert await outbox.drop(connection, 0) == "busy"
        await transaction.commit()
        assert await outbox.drop(connection, 0) == "unpublished"
        assert [row.seq for row in await outbox.rows(connection, late.stream, 0, 9)] == [0, 1]
        await save(connection, {late.stream: 2})
        assert await outbox.drop(connection, 0) == "dropped"
    finally:
        await writer.close()


async def test_an_old_transaction_elsewhere_holds_up_no_drop(dsn: str, connection: asyncpg.Connection) -> None:
    old = await asyncpg.connect(dsn)
    try:
        await old.execute("begin isolation level repeatable read")
        await old.execute("select * from effects; create table mine (a int)")
        [part] = await stored(connection, outgoing(0))
        await save(connection, {part.stream: 1})
        assert await outbox.turn(connection, 0, 1) == "turned"
        assert await outbox.drop(connection, 0) == "dropped"
    finally:
        await old.close()


async def test_a_role_of_a_worker_neither_changes_nor_deletes_rows(connection: asyncpg.Connection) -> None:
    for sql in (
        "delete from consumer.outbox",
        "update consumer.outbox set value = null",
        "drop table consumer.outbox_1",
        "delete from consumer.audit",
        "update consumer.outbox_generations set closed_at = now()",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(sql)
