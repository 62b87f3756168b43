"""Measures the outbox.

Consume and publish against a loop by hand, latency from COMMIT to acknowledgement, and a backlog.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

import asyncpg
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from application import INSERT, UPDATE, Payment, decode
from bench import NAIVE_MESSAGES, SETTLED, Bench, Produced, Workload, body
from contest import Options, Row, ScenarioResult, rows_of, turns
from harness import new_topic

from consumer import App, Message, Tx
from consumer.outbox.record import StoredStream
from consumer.outbox.send_queues import SendQueues
from consumer.worker.outbox_relay import OutboxRelay

_PUBLISHED = "select coalesce(sum(next_seq), 0)::int8 from consumer.outbox_published"
_RATE = 1000
_WARM_SECONDS = 20  # a broker that has just started is slow for its first requests
_PARTS = 6  # of a long run
_PARTITIONS = 8
BY_HAND = "by hand: transaction, send, offset commit"


def _app(topic: str, out: str, *, with_update: bool = True) -> App:
    app = App(f"bench-{uuid.uuid4().hex[:8]}", publishes=[out])

    @app.handler(topic)
    async def settle(message: Message[Payment], tx: Tx) -> None:
        payment = message.value
        tx.defer(INSERT, payment.id, payment.account, payment.amount)
        if with_update:
            tx.defer(UPDATE, payment.account, payment.amount)
        tx.publish(out, {"account": payment.account, "amount": payment.amount}, key=message.key)

    return app


async def _reached(connection: asyncpg.Connection, sql: str, count: int) -> None:
    while await connection.fetchval(sql) < count:
        await asyncio.sleep(0.02)


class _Contest:
    """The contestants.

    Each uses a database and an output topic of its own.
    """

    def __init__(self, bench: Bench, produced: Produced) -> None:
        self.bench, self.produced = bench, produced
        self.distinct = len(set(produced.entries))

    async def by_hand(self) -> float:
        """Drain as people write it.

        A transaction with the claim and the effects, then the send, then the offset.
        """
        dsn = await self.bench.database()
        out = await new_topic(self.bench.kafka.bootstrap_servers, _PARTITIONS)
        connection = await asyncpg.connect(dsn)
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.bench.kafka.bootstrap_servers, group_id=f"hand-{uuid.uuid4().hex}",
            enable_auto_commit=False, auto_offset_reset="earliest",
        )  # fmt: skip
        producer = AIOKafkaProducer(
            bootstrap_servers=self.bench.kafka.bootstrap_servers, acks="all", enable_idempotence=True
        )
        await consumer.start()
        await producer.start()
        consumer.assign([TopicPartition(self.produced.topic, number) for number in range(_PARTITIONS)])
        done, begun = 0, time.perf_counter()
        async for record in consumer:
            payment = decode(record.value)
            async with connection.transaction():
                claim = "insert into seen values ($1) on conflict do nothing returning true"
                if is_new := await connection.fetchval(claim, payment.id):
                    await connection.execute(INSERT, payment.id, payment.account, payment.amount)
                    await connection.execute(UPDATE, payment.account, payment.amount)
            if is_new:
                entry = b'{"account":%d,"amount":%d}' % (payment.account, payment.amount)
                await producer.send_and_wait(
                    out, entry, key=record.key, headers=[("message-id", str(payment.id).encode())]
                )
            await consumer.commit({TopicPartition(record.topic, record.partition): record.offset + 1})
            done += 1
            if done == min(NAIVE_MESSAGES, len(self.produced.entries)):
                break
        seconds = time.perf_counter() - begun
        await producer.stop()
        await consumer.stop()
        await connection.close()
        await self.bench.drop(dsn)
        return done / seconds

    async def ours(self) -> float:
        """Until the last record is acknowledged."""
        speed, dsn, _ = await self._drained()
        await self.bench.drop(dsn)
        return speed

    async def _drained(self) -> tuple[float, str, str]:
        dsn = await self.bench.database()
        out = await new_topic(self.bench.kafka.bootstrap_servers, _PARTITIONS)
        watcher = await asyncpg.connect(dsn)
        async with self.bench.working(_app(self.produced.topic, out), self.bench.settings(dsn)):
            while not (before := await watcher.fetchval(SETTLED)):
                await asyncio.sleep(0.002)
            begun = time.perf_counter()
            await _reached(watcher, SETTLED, len(self.produced.entries))
            await _reached(watcher, _PUBLISHED, self.distinct)
            seconds = time.perf_counter() - begun
        await watcher.close()
        await self.bench.check(dsn, self.produced.entries)
        return float(len(self.produced.entries) - before) / seconds, dsn, out

    async def backlog(self) -> float:
        """Send rows that are all in the table.

        Measured from the first acknowledged row to the last.
        """
        dsn = await self.bench.database()
        out = await new_topic(self.bench.kafka.bootstrap_servers, _PARTITIONS)
        app = _app(self.produced.topic, out)
        watcher = await asyncpg.connect(dsn)
        async with self.bench.working(app, self.bench.settings(dsn, outbox_relay="off")):
            await _reached(watcher, SETTLED, len(self.produced.entries))
        begun = time.perf_counter()
        async with self.bench.working(app, self.bench.settings(dsn)):
            while not (before := await watcher.fetchval(_PUBLISHED)):
                begun = time.perf_counter()
                await asyncio.sleep(0.002)
            await _reached(watcher, _PUBLISHED, self.distinct)
            seconds = time.perf_counter() - begun
        await watcher.close()
        await self.bench.drop(dsn)
        return float((self.distinct - before) / seconds)

    async def producer_alone(self) -> float:
        """The limit: aiokafka's idempotent producer, from memory."""
        out = await new_topic(self.bench.kafka.bootstrap_servers, _PARTITIONS)
        producer = AIOKafkaProducer(
            bootstrap_servers=self.bench.kafka.bootstrap_servers, acks="all", enable_idempotence=True, linger_ms=5,
            max_batch_size=1 << 18,
        )  # fmt: skip
        await producer.start()
        begun, sent = time.perf_counter(), []
        for number, (id, account, amount) in enumerate(self.produced.entries, 1):
            entry = b'{"account":%d,"amount":%d}' % (account, amount)
            headers = [("message-id", str(id).encode())]
            sent.append(await producer.send(out, entry, key=str(account).encode(), headers=headers))
            if number % 20_000 == 0:
                await asyncio.gather(*sent)
                sent.clear()
        await asyncio.gather(*sent)
        seconds = time.perf_counter() - begun
        await producer.stop()
        return len(self.produced.entries) / seconds


async def publishing(bench: Bench, given: Options) -> ScenarioResult:
    """Consume, write and publish one record for each message."""
    produced = await bench.produced(Workload(given.messages, partitions=_PARTITIONS))
    contest = _Contest(bench, produced)
    contestants: dict[str, Callable[[], Awaitable[float]]] = {
        BY_HAND: contest.by_hand,
        "ours: consume": lambda: bench.ours(produced, "defer"),
        "ours: consume and publish": contest.ours,
        "ours: a backlog of rows": contest.backlog,
        "limit: aiokafka's producer alone": contest.producer_alone,
    }
    speeds = await turns(contestants, given.rounds)
    return ScenarioResult(
        f"{given.messages:,} messages, 10 % of them duplicates, each with two writes and one published record; until Kafka has "
        "acknowledged the last one. The loop by hand is not safe: a crash between COMMIT and send loses the record.",
        rows_of(speeds, BY_HAND),
    )


@contextmanager
def _timed() -> Iterator[list[tuple[float, float]]]:
    """Note when rows are committed and acknowledged.

    Of each row the time of its COMMIT, and the seconds from there to the acknowledgement.
    """
    committed_at: dict[tuple[int, int], float] = {}
    waits: list[tuple[float, float]] = []
    committed, acknowledged = OutboxRelay.committed, SendQueues.acknowledged

    def noting(self: OutboxRelay, epoch: str, stored: list[StoredStream]) -> None:
        now = time.perf_counter()
        for part in stored:
            for seq in range(part.first, part.first + len(part.records)):
                committed_at[part.stream, seq] = now
        committed(self, epoch, stored)

    def answered(self: SendQueues, partition: object) -> None:
        now = time.perf_counter()
        for row in self._queues[partition].in_flight:  # type: ignore[index]
            if (at := committed_at.pop((row.stream.number, row.seq), None)) is not None:
                waits.append((at, now - at))
        acknowledged(self, partition)  # type: ignore[arg-type]

    OutboxRelay.committed, SendQueues.acknowledged = noting, answered  # type: ignore[method-assign, assignment]
    try:
        yield waits
    finally:
        OutboxRelay.committed, SendQueues.acknowledged = committed, acknowledged  # type: ignore[method-assign]


def _row(name: str, waits: Sequence[float]) -> Row:
    ordered = sorted(waits)
    return {
        "at": name,
        "p50, ms": f"{ordered[len(ordered) // 2] * 1000:.1f}",
        "p99, ms": f"{ordered[len(ordered) * 99 // 100] * 1000:.1f}",
        "highest, ms": f"{ordered[-1] * 1000:.0f}",
    }


async def publishing_latency(bench: Bench, given: Options) -> ScenarioResult:
    """From the return of COMMIT to Kafka's acknowledgement, at a steady rate."""
    with _timed() as waits:
        await _at_a_steady_rate(bench, _WARM_SECONDS + given.seconds)
    begun = waits[0][0] + _WARM_SECONDS
    row = _row(f"{_RATE:,} msg/s", [wait for at, wait in waits if at >= begun])
    return ScenarioResult(
        "From the return of COMMIT to Kafka's acknowledgement; producer, worker and servers on one machine.", [row]
    )


async def publishing_steady(bench: Bench, given: Options) -> ScenarioResult:
    """The same for long, beside an old transaction.

    While it is open, no row version can be removed.
    """
    with _timed() as waits:
        await _at_a_steady_rate(bench, given.seconds, is_old_open=True)
    begun, rows = waits[0][0], []
    for part in range(_PARTS):
        first, end = (begun + given.seconds * n / _PARTS for n in (part, part + 1))
        of_part = [wait for at, wait in waits if first <= at < end]
        if not of_part:
            rows.append({"at": f"part {part + 1} of {_PARTS}: nothing"})
            continue
        minutes = f"minute {given.seconds * part / _PARTS / 60:.0f} to {given.seconds * (part + 1) / _PARTS / 60:.0f}"
        rows.append({**_row(minutes, of_part), "msg/s": f"{len(of_part) * _PARTS / given.seconds:,.0f}"})
    return ScenarioResult(
        f"{_RATE:,} messages a second, each published once; a transaction that has read and written is open all the time.",
        rows,
    )


async def _at_a_steady_rate(bench: Bench, seconds: float, *, is_old_open: bool = False) -> None:
    dsn = await bench.database()
    topic = await new_topic(bench.kafka.bootstrap_servers, _PARTITIONS)
    out = await new_topic(bench.kafka.bootstrap_servers, _PARTITIONS)
    watcher, old = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    if is_old_open:
        await old.execute("begin isolation level repeatable read; select txid_current()")
    # Rows that the application updates would become slow by themselves beside an old transaction.
    async with bench.working(_app(topic, out, with_update=not is_old_open), bench.settings(dsn)):
        await _steady(bench, topic, seconds)
        await _reached(watcher, _PUBLISHED, int(_RATE * seconds))
    for connection in (watcher, old):
        await connection.close()
    await bench.drop(dsn)


async def _steady(bench: Bench, topic: str, seconds: float) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bench.kafka.bootstrap_servers, linger_ms=1)
    await producer.start()
    begun = time.perf_counter()
    for number in range(int(_RATE * seconds)):
        account = number % 1000
        payload = body(uuid.uuid4(), account, 1)
        await producer.send(
            topic, payload, key=str(account).encode(), partition=account % _PARTITIONS,
            headers=[("message-id", str(uuid.uuid4()).encode())],
        )  # fmt: skip
        if number % 10 == 0:
            await asyncio.sleep(max(0.0, begun + number / _RATE - time.perf_counter()))
    await producer.stop()
