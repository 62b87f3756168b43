"""How fast, as ratios in one run: against the loop that people write, the best loop by hand, and the limits.

Real Kafka, PostgreSQL (fsync on) and Valkey, started here. 8 partitions, about 200 bytes of JSON, 10 % duplicates, 1,000 keys; the
effect of a message is one INSERT and one UPDATE. Contestants take turns, round after round; what is told is the median, with
the lowest and the highest. After every drain the effects are compared with what was produced: a wrong sum ends the run.

    make bench                     all contestants, three rounds
    make bench ARGS="--messages 50000 --only 'ours: defer'"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from harness import migrated, new_topic, settings_for  # noqa: E402
from services import Kafka  # noqa: E402

from consumer import App, Settings, Tx, logs  # noqa: E402
from consumer.embedded import Postgres, Valkey  # noqa: E402
from consumer.process import run as run_loop  # noqa: E402
from consumer.replay import Mode, Options, Told, replay  # noqa: E402
from consumer.worker import Worker  # noqa: E402

PARTITIONS = 8
KEYS = 1000
DUPLICATES = 0.10
NAIVE_MESSAGES = 4000  # of the slowest contestant, whose speed does not depend on how many there are
TABLES = """
create table effects (id uuid not null, account int not null, amount bigint not null);
create table accounts (id int primary key, balance bigint not null default 0);
insert into accounts select generate_series(0, 999);
create table seen (id uuid primary key);
"""
INSERT = "insert into effects values ($1, $2, $3)"
UPDATE = "update accounts set balance = balance + $2 where id = $1"
CLAIM = "insert into seen select unnest($1::uuid[]) order by 1 on conflict do nothing returning id"
INSERT_ALL = "insert into effects select * from unnest($1::uuid[], $2::int[], $3::bigint[])"
UPDATE_ALL = """update accounts a set balance = a.balance + u.amount
                from unnest($1::int[], $2::bigint[]) as u(id, amount) where a.id = u.id"""


class Payment(msgspec.Struct):
    id: uuid.UUID
    account: int
    amount: int
    note: str


Entry = tuple[uuid.UUID, int, int]
decode = msgspec.json.Decoder(Payment).decode


class Bench:
    """The services, what was produced, and one method for each contestant: messages a second."""

    def __init__(self, kafka: Kafka, postgres: Postgres, valkey: Valkey, messages: int) -> None:
        self.kafka = kafka
        self.postgres = postgres
        self.valkey = valkey
        self.messages = messages
        self.topic = ""
        self.produced: list[Entry] = []
        self.applied: dict[bool, tuple[App, Settings]] = {}  # with Redis or without

    async def produce(self) -> None:
        chance = random.Random(1)
        self.topic = await new_topic(self.kafka.bootstrap_servers, PARTITIONS)
        for n in range(self.messages):
            if n and chance.random() < DUPLICATES:
                self.produced.append(self.produced[chance.randrange(n)])
            else:
                self.produced.append((uuid.UUID(int=chance.getrandbits(128)), chance.randrange(KEYS), n % 1000))
        producer = AIOKafkaProducer(bootstrap_servers=self.kafka.bootstrap_servers, linger_ms=5, max_batch_size=1 << 17)
        await producer.start()
        sent = []
        for id, account, amount in self.produced:
            body = json.dumps({"id": str(id), "account": account, "amount": amount, "note": "x" * 110}).encode()
            headers = [("message-id", str(id).encode())]
            key = str(account).encode()
            sent.append(await producer.send(self.topic, body, key=key, partition=account % PARTITIONS, headers=headers))
        await asyncio.gather(*sent)
        await producer.stop()

    async def database(self) -> str:
        name = f"bench_{uuid.uuid4().hex[:8]}"
        connection = await asyncpg.connect(self.postgres.dsn())
        await connection.execute(f"create database {name}")
        await connection.execute("checkpoint")
        await connection.close()
        dsn = self.postgres.dsn(name)
        await migrated(dsn, TABLES)
        return dsn

    async def check(self, dsn: str, messages: Sequence[Entry]) -> None:
        """Raise unless each distinct id has its effects once."""
        distinct = set(messages)
        connection = await asyncpg.connect(dsn)
        count, ids = await connection.fetchrow("select count(*), count(distinct id) from effects")
        balance = await connection.fetchval("select sum(balance) from accounts")
        await connection.close()
        wanted = (len(distinct), len(distinct), sum(each[2] for each in distinct))
        if (count, ids, balance) != wanted:
            raise SystemExit(f"wrong effects: {(count, ids, balance)} instead of {wanted}")

    async def reader(self) -> AIOKafkaConsumer:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.kafka.bootstrap_servers, enable_auto_commit=False, auto_offset_reset="earliest"
        )
        await consumer.start()
        consumer.assign([TopicPartition(self.topic, each) for each in range(PARTITIONS)])
        return consumer

    # -- contestants --------------------------------------------------------------------------------------------------

    async def naive(self) -> float:
        """The loop that people write: one transaction a message."""
        dsn = await self.database()
        connection = await asyncpg.connect(dsn)
        consumer = await self.reader()
        taken: list[Entry] = []
        begun = time.perf_counter()
        async for message in consumer:
            payment = decode(message.value)
            async with connection.transaction():
                claim = "insert into seen values ($1) on conflict do nothing returning true"
                if await connection.fetchval(claim, payment.id):
                    await connection.execute(INSERT, payment.id, payment.account, payment.amount)
                    await connection.execute(UPDATE, payment.account, payment.amount)
            taken.append((payment.id, payment.account, payment.amount))
            if len(taken) == min(NAIVE_MESSAGES, self.messages):
                break
        seconds = time.perf_counter() - begun
        await consumer.stop()
        await connection.close()
        await self.check(dsn, taken)
        return len(taken) / seconds

    async def _by_hand(self, write: Callable[[Any, list[Payment]], Awaitable[None]]) -> float:
        dsn = await self.database()
        connection = await asyncpg.connect(dsn)
        consumer = await self.reader()
        left = self.messages
        begun = time.perf_counter()
        while left:
            found = await consumer.getmany(timeout_ms=500, max_records=2000)
            payments = [decode(record.value) for records in found.values() for record in records]
            if not payments:
                continue
            left -= len(payments)
            first = {each.id: each for each in payments}
            async with connection.transaction():
                fresh = [first[row[0]] for row in await connection.fetch(CLAIM, list(first))]
                await write(connection, fresh)
        seconds = time.perf_counter() - begun
        await consumer.stop()
        await connection.close()
        await self.check(dsn, self.produced)
        return self.messages / seconds

    async def by_hand_executemany(self) -> float:
        """The best loop by hand for any statements: a batch a transaction, `executemany`."""

        async def write(connection: Any, fresh: list[Payment]) -> None:
            await connection.executemany(INSERT, [(each.id, each.account, each.amount) for each in fresh])
            await connection.executemany(UPDATE, [(each.account, each.amount) for each in fresh])

        return await self._by_hand(write)

    async def by_hand_unnest(self) -> float:
        """The best loop by hand for this very workload: `unnest`, balances summed before."""
        return await self._by_hand(self._write_unnest)

    @staticmethod
    async def _write_unnest(connection: Any, fresh: list[Payment]) -> None:
        columns = [[each.id for each in fresh], [each.account for each in fresh], [each.amount for each in fresh]]
        await connection.execute(INSERT_ALL, *columns)
        sums: dict[int, int] = {}
        for each in fresh:
            sums[each.account] = sums.get(each.account, 0) + each.amount
        await connection.execute(UPDATE_ALL, sorted(sums), [sums[each] for each in sorted(sums)])

    async def _ours(self, register: Callable[[App], None], *, redis: bool) -> float:
        dsn = await self.database()
        app = App(f"bench-{uuid.uuid4().hex[:8]}")
        register(app)
        settings: Settings = settings_for(
            dsn,
            self.kafka.bootstrap_servers,
            self.valkey.url if redis else None,
            log_level="error",
            kafka_commit_interval_seconds=1,
        )
        worker = Worker(app, settings)
        task = asyncio.create_task(worker.run())
        watcher = await asyncpg.connect(dsn)
        settled = "select coalesce(sum(next_offset), 0) from consumer.positions"
        while not worker._settled:  # from the first commit on: joining the group is not what is measured
            await asyncio.sleep(0.005)
        begun, before = time.perf_counter(), await watcher.fetchval(settled)
        while await watcher.fetchval(settled) < self.messages:
            await asyncio.sleep(0.02)
        seconds = time.perf_counter() - begun
        worker.stop()
        await task
        await watcher.close()
        await self.check(dsn, self.produced)
        return (self.messages - int(before)) / seconds

    def _defer(self, app: App) -> None:
        @app.handler(self.topic)
        async def settle(payment: Payment, tx: Tx) -> None:
            tx.defer(INSERT, payment.id, payment.account, payment.amount)
            tx.defer(UPDATE, payment.account, payment.amount)

    def _await(self, app: App) -> None:
        @app.handler(self.topic)
        async def settle(payment: Payment, tx: Tx) -> None:
            await tx.execute(INSERT, payment.id, payment.account, payment.amount)
            await tx.execute(UPDATE, payment.account, payment.amount)

    def _batch(self, app: App) -> None:
        @app.handler(self.topic, batch=5000)
        async def settle(payments: list[Payment], tx: Tx) -> None:
            await self._write_unnest(tx, payments)

    async def ours_defer(self) -> float:
        return await self._ours(self._defer, redis=False)

    async def ours_defer_redis(self) -> float:
        return await self._ours(self._defer, redis=True)

    async def ours_await(self) -> float:
        return await self._ours(self._await, redis=False)

    async def ours_batch(self) -> float:
        return await self._ours(self._batch, redis=False)

    async def ours_batch_redis(self) -> float:
        return await self._ours(self._batch, redis=True)

    async def _applied(self, *, redis: bool) -> tuple[App, Settings]:
        """A database in which everything is applied, made once."""
        if redis not in self.applied:
            app = App(f"bench-{uuid.uuid4().hex[:8]}")
            self._defer(app)
            settings: Settings = settings_for(
                await self.database(),
                self.kafka.bootstrap_servers,
                self.valkey.url if redis else None,
                log_level="error",
            )
            worker = Worker(app, settings)
            task = asyncio.create_task(worker.run())
            watcher = await asyncpg.connect(settings.dsn)
            settled = "select coalesce(sum(next_offset), 0) from consumer.positions"
            while await watcher.fetchval(settled) < self.messages:
                await asyncio.sleep(0.05)
            worker.stop()
            await task
            await watcher.execute("vacuum analyze consumer.ledger")
            await watcher.close()
            self.applied[redis] = app, settings
        return self.applied[redis]

    async def _replay(self, mode: Mode, *, redis: bool) -> float:
        app, settings = await self._applied(redis=redis)
        found = await replay(app, settings, [self.topic], Options(mode=mode), Told())
        if not found.ok:
            raise SystemExit(f"the replay found problems: {found.answer()}")
        return self.messages / found.seconds

    async def replay_check(self) -> float:
        return await self._replay("check", redis=False)

    async def replay_check_redis(self) -> float:
        return await self._replay("check", redis=True)

    async def replay_apply(self) -> float:
        return await self._replay("apply", redis=False)

    async def replay_rebuild(self) -> float:
        return await self._replay("rebuild", redis=False)

    async def aiokafka_alone(self) -> float:
        """The limit on one side: reading, and nothing else."""
        consumer = await self.reader()
        left = self.messages
        begun = time.perf_counter()
        while left > 0:
            left -= sum(map(len, (await consumer.getmany(timeout_ms=500, max_records=2000)).values()))
        seconds = time.perf_counter() - begun
        await consumer.stop()
        return self.messages / seconds

    async def postgresql_alone(self) -> float:
        """The limit on the other side: the `unnest` loop, fed from memory."""
        dsn = await self.database()
        connection = await asyncpg.connect(dsn)
        payments = [Payment(id, account, amount, "") for id, account, amount in self.produced]
        begun = time.perf_counter()
        for start in range(0, len(payments), 2000):
            first = {each.id: each for each in payments[start : start + 2000]}
            async with connection.transaction():
                fresh = [first[row[0]] for row in await connection.fetch(CLAIM, list(first))]
                await self._write_unnest(connection, fresh)
        seconds = time.perf_counter() - begun
        await connection.close()
        await self.check(dsn, self.produced)
        return self.messages / seconds


CONTESTANTS: dict[str, Callable[[Bench], Awaitable[float]]] = {
    "the loop people write": Bench.naive,
    "by hand: executemany": Bench.by_hand_executemany,
    "by hand: unnest": Bench.by_hand_unnest,
    "ours: defer": Bench.ours_defer,
    "ours: defer, with Redis": Bench.ours_defer_redis,
    "ours: two awaited statements": Bench.ours_await,
    "ours: batch handler": Bench.ours_batch,
    "ours: batch handler, with Redis": Bench.ours_batch_redis,
    "replay: check, all applied": Bench.replay_check,
    "replay: check, with Redis": Bench.replay_check_redis,
    "replay: apply, nothing missing": Bench.replay_apply,
    "replay: rebuild": Bench.replay_rebuild,
    "limit: aiokafka alone": Bench.aiokafka_alone,
    "limit: PostgreSQL alone": Bench.postgresql_alone,
}


async def run(messages: int, rounds: int, only: str | None) -> dict[str, list[float]]:
    names = [
        each
        for each in CONTESTANTS
        if only is None or any(part in each for part in only.split(",")) or each == next(iter(CONTESTANTS))
    ]
    found: dict[str, list[float]] = {each: [] for each in names}
    with Kafka() as kafka, Postgres({"shared_buffers": "256MB", "max_wal_size": "4GB"}) as postgres, Valkey() as valkey:
        bench = Bench(kafka, postgres, valkey, messages)
        await bench.produce()
        for number in range(rounds):
            for name in names:
                found[name].append(await CONTESTANTS[name](bench))
                print(f"round {number + 1}  {name:34} {found[name][-1]:10,.0f} msg/s", file=sys.stderr)
    return found


def table(found: dict[str, list[float]], messages: int) -> str:
    base = statistics.median(found[next(iter(found))])
    limit = statistics.median(found.get("limit: aiokafka alone", [0]))
    lines = [
        f"{messages:,} messages, median of {len(next(iter(found.values())))} interleaved rounds, {os.cpu_count()} cores "
        f"({platform.machine()}), Python {platform.python_version()}, broker and database on the same machine.",
        "",
        "| contestant | msg/s | lowest | highest | times the loop people write | of aiokafka alone |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, speeds in found.items():
        middle = statistics.median(speeds)
        share = f"{middle / limit:.0%}" if limit else "-"
        lines.append(
            f"| {name} | {middle:,.0f} | {min(speeds):,.0f} | {max(speeds):,.0f} | {middle / base:.1f} | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", help="contestants whose name holds this (several: a,b), beside the loop that all are compared with"
    )
    given = parser.parse_args()
    logs.configure("error", "json")
    print(table(run_loop(run(given.messages, given.rounds, given.only)), given.messages))


if __name__ == "__main__":
    main()
