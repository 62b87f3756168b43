"""Three relays that are broken on purpose, and the real one.

Each is in the situation that shows the mistake. tests/chaos/ has those that a crash shows, tests/chaos/outbox_model.py all that the theorem needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import asyncpg
import pytest
from asyncpg.pgproto.pgproto import UUID
from harness import Place, Sent, as_worker, drained, migrated, query, until, value, working
from outgoing import all_published, configure, ids, name, records_of, resume, sizes_app, stopped_reason, values
from publishing_worker import app_of
from replacing import replace, undone_at_the_end

from consumer.core.message import Partition
from consumer.kafka.batch_producer import Refused
from consumer.outbox import send_queues
from consumer.outbox.record import Outgoing, OutgoingRecord, StoredStream
from consumer.outbox.send_queues import Row
from consumer.outbox.streams import Stream
from consumer.postgres import outbox
from consumer.postgres.server import identify
from consumer.worker.outbox_relay import OutboxRelay
from consumer.worker.outbox_sender import OutboxSender

_WAITS = """
select exists (select from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database())
"""


@contextmanager
def broken(patch: Callable[[], None]) -> Iterator[None]:
    """A mutant inside the block."""
    with undone_at_the_end() as changes:
        patch()
        assert changes
        yield


# -- numbers without the lock: F75 -------------------------------------------------------------------------------------


def _numbers_without_the_lock(dsn: str) -> None:
    """Number rows as a sequence would.

    A number is taken at once, its row is seen at COMMIT, and the relay asks for what is above its last one.
    """

    async def storing(connection: Any, app: str, outgoing: Sequence[Outgoing]) -> list[StoredStream]:
        [(stream, first)] = await query(
            dsn,
            "update consumer.outbox_streams set next_seq = next_seq + $2 where app = $1 returning stream, next_seq - $2",
            app,
            len(outgoing),
        )
        await connection.executemany(
            "insert into consumer.outbox (generation, stream, seq, id, topic, key, value) values (1, $1, $2, $3, $4, $5, $6)",
            [
                (stream, seq, UUID(record.id), record.topic, record.key, record.value)
                for seq, (record, *_) in enumerate(outgoing, first)
            ],
        )
        return []

    def load(self: Stream, seqs: Sequence[int]) -> None:
        for passed in range(self.loaded, seqs[0]):
            self.acknowledge(passed)
        self.loaded = seqs[-1] + 1

    replace(outbox, "store", storing)
    replace(Stream, "load", load)
    replace(OutboxRelay, "_stop_stream", lambda self, stream, reason: None)


@pytest.mark.parametrize("is_broken", [True, False])
async def test_two_writers_whose_commits_come_in_the_other_order(place: Place, is_broken: bool) -> None:
    topic, out = await place.topic(), await place.topic()
    app = app_of(topic, out, name())
    settings = place.settings()

    def record(n: int) -> Outgoing:
        return Outgoing(OutgoingRecord(out, n.to_bytes(16), b"k", b"{}"), Partition(topic, 0), 1, n)

    first, second = await asyncpg.connect(place.worker_dsn), await asyncpg.connect(place.worker_dsn)

    async def write_second() -> None:
        async with second.transaction():
            await outbox.store(second, app.name, [record(2)])

    async def is_over_or_waits() -> bool:
        waiting = await value(place.dsn, _WAITS)
        return writing.done() or bool(waiting)

    async with working(app, settings):
        await place.send(topic, Sent({"n": 0}, id="0", key="k"))
        await drained(app, settings)
        await all_published(place)
        with broken(lambda: _numbers_without_the_lock(place.dsn)) if is_broken else nullcontext():
            transaction = first.transaction()
            await transaction.start()
            await outbox.store(first, app.name, [record(1)])
            writing = asyncio.create_task(write_second())
            await until("the second writer to be over, or to wait", is_over_or_waits)
            assert writing.done() == is_broken
            if is_broken:

                async def is_published() -> bool:
                    return len(await records_of(place.kafka, out)) == 2

                await until("its row to be published", is_published)
            await transaction.commit()
            await writing
            await all_published(place)
    for connection in (first, second):
        await connection.close()
    published = ids(await records_of(place.kafka, out))[1:]
    expected = [str(UUID(n.to_bytes(16))) for n in (1, 2)]
    assert published == (expected[1:] if is_broken else expected)


# -- two batches in flight ---------------------------------------------------------------------------------------------


def _two_batches_in_flight() -> None:
    """Send the next record batch before the last one is answered."""

    async def send_one(self: OutboxSender, partition: Partition, row: Row) -> None:
        while row.stream.is_open:
            producer = self._producer
            try:
                if producer is not None:
                    await producer.send(partition, [row])
                    row.stream.acknowledge(row.seq)
                    return
            except Refused as refused:
                self._on_stopped(row.stream, str(refused))
            except Exception:
                if producer is not None:
                    self._replace(producer)
            self._open_producer() if self._producer is None else None
            await asyncio.sleep(0.05)

    async def send_all(self: OutboxSender, partition: Partition) -> None:
        waiting = self._queues._queues[partition].waiting
        try:
            # What is on its way when a stream stops stays on its way.
            await asyncio.gather(*[send_one(self, partition, waiting.popleft()) for _ in range(len(waiting))])
        finally:
            del self._sending[partition]
            self._wake.set()

    replace(OutboxSender, "_send_all", send_all)


@pytest.mark.parametrize("is_broken", [True, False])
async def test_a_record_is_refused_while_the_next_one_is_on_its_way(place: Place, is_broken: bool) -> None:
    topic, out = await place.topic(), await place.topic()
    app = sizes_app(topic, out)
    settings = place.settings()
    sizes = {3: 3000}
    with undone_at_the_end():
        replace(send_queues, "ROWS_MAX", 1)
        with broken(_two_batches_in_flight) if is_broken else nullcontext():
            async with working(app, settings):
                await place.send(topic, *[Sent({"n": n}, id=str(n), key="k") for n in (0,)])
                await drained(app, settings)
                await all_published(place)
                await configure(place.kafka, out, **{"max.message.bytes": "2000"})
                await place.send(
                    topic, *[Sent({"n": n, "pad": sizes.get(n, 0)}, id=str(n), key="k") for n in (3, 6, 9, 12)]
                )
                await stopped_reason(place, out)
                await configure(place.kafka, out, **{"max.message.bytes": "100000"})
                [(stream,)] = await query(place.dsn, "select stream from consumer.outbox_streams")
                await resume(place, app, stream, "the limit was raised")
                await all_published(place)
    first = list(dict.fromkeys(entry["n"] for entry in values(await records_of(place.kafka, out))))
    assert sorted(first) == [0, 3, 6, 9, 12]
    assert (first == sorted(first)) is not is_broken, first


# -- a generation dropped under a transaction that writes it -----------------------------------------------------------

_SECOND_LOOK = """    execute format(has_unpublished, oldest) into is_open;
    if is_open then
        return 'unpublished';
    end if;
    execute format('drop"""


@pytest.mark.parametrize("is_broken", [True, False])
async def test_a_generation_is_dropped_while_a_transaction_writes_it(database: str, is_broken: bool) -> None:
    """Here the drop waits as long as necessary."""
    await migrated(database)
    function = await value(
        database, "select pg_get_functiondef('consumer.drop_outbox(double precision)'::regprocedure)"
    )
    assert _SECOND_LOOK in function
    if is_broken:
        function = function.replace(_SECOND_LOOK, "    execute format('drop")
    owner = await asyncpg.connect(database)
    await owner.execute(function.replace("'50ms'", "'60s'"))
    writer, dropper = await asyncpg.connect(as_worker(database)), await asyncpg.connect(as_worker(database))
    try:

        def record(n: int) -> list[Outgoing]:
            return [Outgoing(OutgoingRecord("out", n.to_bytes(16), b"k", b"v"), Partition("in", 0), 1, n)]

        async with writer.transaction():
            [part] = await outbox.store(writer, "shop", record(0))
        transaction = writer.transaction()
        await transaction.start()
        await outbox.store(writer, "shop", record(1))
        assert await outbox.turn(dropper, 0, 1) == "turned"
        await outbox.save_watermarks(dropper, await identify(dropper), {part.stream: 1})
        dropping = asyncio.create_task(outbox.drop(dropper, 0))

        async def waits() -> bool:
            return bool(await value(database, _WAITS))

        await until("the drop to wait", waits)
        await transaction.commit()
        assert await dropping == ("dropped" if is_broken else "unpublished")
        left = [row.seq for row in await outbox.rows(writer, part.stream, 1, 2)]
        assert left == ([] if is_broken else [1]), "the row is lost only if the function does not look again"
    finally:
        for connection in (owner, writer, dropper):
            await connection.close()
