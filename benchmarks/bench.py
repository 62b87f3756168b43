"""The services, the workload and the contestants of the benchmarks.

Every drain is checked: a wrong effect ends the run. Limitations: other work on this machine distorts the times. So
contestants take turns, and the median is reported.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import asyncpg
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

from application import INSERT, UPDATE, Payment, decode, register, write_unnest  # noqa: E402
from harness import migrated, new_topic, running_program, settings_for  # noqa: E402
from services import Kafka  # noqa: E402

from consumer import App, Settings  # noqa: E402
from consumer.local_servers import LocalServer, Postgres, Valkey  # noqa: E402
from consumer.replay.options import Mode, Options, Progress  # noqa: E402
from consumer.replay.rebuild_run import RebuildOptions, run_rebuild  # noqa: E402
from consumer.replay.verify import replay  # noqa: E402
from consumer.worker.report_pipe import ReportPipe  # noqa: E402
from consumer.worker.worker import Worker  # noqa: E402

NAIVE_MESSAGES = 4000  # of the slowest contestant, whose speed does not depend on how many there are
CLAIM = "insert into seen select unnest($1::uuid[]) order by 1 on conflict do nothing returning id"
SETTLED = "select coalesce(sum(next_offset), 0) from consumer.positions"
_TICKS = os.sysconf("SC_CLK_TCK")

Entry = tuple[uuid.UUID, int, int]


@dataclass(frozen=True)
class Workload:
    """What is produced. The default is the workload of reference.

    duplicates: share of messages that repeat an earlier one. hot: whether all messages have one key.
    """

    messages: int
    partitions: int = 8
    keys: int = 1000
    duplicates: float = 0.10
    hot: bool = False

    def entries(self) -> list[Entry]:
        chance = random.Random(1)
        entries: list[Entry] = []
        for n in range(self.messages):
            if n and chance.random() < self.duplicates:
                entries.append(entries[chance.randrange(n)])
            else:
                entries.append(
                    (uuid.UUID(int=chance.getrandbits(128)), 0 if self.hot else chance.randrange(self.keys), n % 1000)
                )
        return entries


@dataclass
class Produced:
    workload: Workload
    topic: str
    entries: list[Entry]
    applied: dict[bool, tuple[App, Settings]] = field(default_factory=dict)  # with Redis or without


def body(id: uuid.UUID, account: int, amount: int) -> bytes:
    """About 200 bytes of JSON."""
    return json.dumps({"id": str(id), "account": account, "amount": amount, "note": "x" * 110}).encode()


@dataclass
class Cpu:
    """CPU seconds of this process, its ended children, and the servers."""

    bench: Bench
    before: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Cpu:
        self.before = self._now()
        return self

    def __exit__(self, *_: object) -> None: ...

    def seconds(self) -> dict[str, float]:
        return {name: now - self.before[name] for name, now in self._now().items()}

    def _now(self) -> dict[str, float]:
        times = os.times()
        seconds = {"worker": times.user + times.system}
        for server in (self.bench.kafka, self.bench.postgres, self.bench.valkey):
            seconds[server.name] = _tree_seconds(server.pid)
        return seconds


def _tree_seconds(root: int) -> float:
    """CPU seconds of a process and its descendants, also ended ones."""
    children: dict[int, list[int]] = {}
    own: dict[int, float] = {}
    for place in Path("/proc").iterdir():
        if (name := place.name).isdigit():
            try:
                parts = (place / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(parts[1]), []).append(int(name))
            own[int(name)] = sum(map(int, parts[11:15])) / _TICKS
    seconds, todo = 0.0, [root]
    while todo:
        pid = todo.pop()
        seconds += own.get(pid, 0.0)
        todo += children.get(pid, [])
    return seconds


class Bench:
    """The services, the workload, and one method for each contestant.

    A method returns messages a second.
    """

    def __init__(self, kafka: Kafka, postgres: Postgres, valkey: Valkey) -> None:
        self.kafka = kafka
        self.postgres = postgres
        self.valkey = valkey
        self._produced: dict[Workload, Produced] = {}

    # -- what is consumed, and where to ---------------------------------------------------------------------------------

    async def produced(self, workload: Workload) -> Produced:
        """The topic that holds a workload, produced once."""
        if workload not in self._produced:
            topic = await new_topic(self.kafka.bootstrap_servers, workload.partitions)
            produced = Produced(workload, topic, workload.entries())
            await self.send(topic, workload.partitions, produced.entries)
            self._produced[workload] = produced
        return self._produced[workload]

    async def send(self, topic: str, partitions: int, entries: Sequence[Entry]) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=self.kafka.bootstrap_servers, linger_ms=5, max_batch_size=1 << 17)
        await producer.start()
        try:
            sent = []
            for number, (id, account, amount) in enumerate(entries, 1):
                headers = [("message-id", str(id).encode())]
                key = str(account).encode()
                sent.append(
                    await producer.send(
                        topic, body(id, account, amount), key=key, partition=account % partitions, headers=headers
                    )
                )
                if number % 20_000 == 0:
                    await asyncio.gather(*sent)
                    sent.clear()
            await asyncio.gather(*sent)
        finally:
            await producer.stop()

    async def database(self, accounts: int = 1000) -> str:
        """An empty database with the tables of the effects, and the ledger's."""
        name = f"bench_{uuid.uuid4().hex[:8]}"
        connection = await asyncpg.connect(self.postgres.dsn())
        await connection.execute(f"create database {name}")
        await connection.execute("checkpoint")
        await connection.close()
        dsn = self.postgres.dsn(name)
        await migrated(
            dsn,
            f"""create table effects (id uuid not null, account int not null, amount bigint not null);
            create table accounts (id int primary key, balance bigint not null default 0);
            insert into accounts select generate_series(0, {accounts - 1});
            create table seen (id uuid primary key);""",
        )
        return dsn

    async def drop(self, dsn: str) -> None:
        """Remove a database.

        Many full ones would be written to disk for the rest of the run.
        """
        connection = await asyncpg.connect(self.postgres.dsn())
        await connection.execute(f"drop database {dsn.rpartition('/')[2]} with (force)")
        await connection.close()

    async def check(self, dsn: str, entries: Sequence[Entry]) -> None:
        """Raise unless each distinct id has its effects once."""
        distinct = set(entries)
        connection = await asyncpg.connect(dsn)
        [(count, ids)] = await connection.fetch("select count(*), count(distinct id) from effects")
        balance = await connection.fetchval("select sum(balance) from accounts")
        await connection.close()
        wanted = (len(distinct), len(distinct), sum(payment[2] for payment in distinct))
        if (count, ids, balance) != wanted:
            raise SystemExit(f"wrong effects: {(count, ids, balance)} instead of {wanted}")

    async def reader(self, produced: Produced) -> AIOKafkaConsumer:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.kafka.bootstrap_servers, enable_auto_commit=False, auto_offset_reset="earliest"
        )
        await consumer.start()
        consumer.assign([TopicPartition(produced.topic, number) for number in range(produced.workload.partitions)])
        return consumer

    # -- contestants ----------------------------------------------------------------------------------------------------

    async def naive(self, produced: Produced) -> float:
        """The loop that people write: one transaction a message."""
        dsn = await self.database()
        connection = await asyncpg.connect(dsn)
        consumer = await self.reader(produced)
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
            if len(taken) == min(NAIVE_MESSAGES, len(produced.entries)):
                break
        seconds = time.perf_counter() - begun
        await consumer.stop()
        await connection.close()
        await self.check(dsn, taken)
        await self.drop(dsn)
        return len(taken) / seconds

    async def _by_hand(self, produced: Produced, write: Callable[[Any, list[Payment]], Awaitable[None]]) -> float:
        """Write one batch while the next is read, on two connections."""
        dsn = await self.database()
        connections = [await asyncpg.connect(dsn), await asyncpg.connect(dsn)]
        consumer = await self.reader(produced)
        left = len(produced.entries)
        busy: list[asyncio.Task[None]] = []

        async def settle(connection: Any, payments: list[Payment]) -> None:
            first = {payment.id: payment for payment in payments}
            async with connection.transaction():
                fresh = [first[row[0]] for row in await connection.fetch(CLAIM, list(first))]
                await write(connection, fresh)

        begun = time.perf_counter()
        number = 0
        while left:
            batches = await consumer.getmany(timeout_ms=500, max_records=2000)
            payments = [decode(record.value) for records in batches.values() for record in records]
            if not payments:
                continue
            left -= len(payments)
            if len(busy) == 2:
                await busy.pop(0)
            # Batches of one balance must not lock it crosswise: the second waits for the first's transaction anyway.
            busy.append(asyncio.create_task(settle(connections[number % 2], payments)))
            number += 1
        for task in busy:
            await task
        seconds = time.perf_counter() - begun
        await consumer.stop()
        for connection in connections:
            await connection.close()
        await self.check(dsn, produced.entries)
        await self.drop(dsn)
        return len(produced.entries) / seconds

    async def by_hand_executemany(self, produced: Produced) -> float:
        """The best loop by hand for any statements.

        One transaction for each batch, `executemany`.
        """

        async def write(connection: Any, fresh: list[Payment]) -> None:
            ordered = sorted(fresh, key=lambda payment: payment.account)  # two connections lock balances in one order
            await connection.executemany(INSERT, [(payment.id, payment.account, payment.amount) for payment in ordered])
            await connection.executemany(UPDATE, [(payment.account, payment.amount) for payment in ordered])

        return await self._by_hand(produced, write)

    async def by_hand_unnest(self, produced: Produced) -> float:
        """The best loop by hand for this workload.

        `unnest`, and balances summed before.
        """
        return await self._by_hand(produced, write_unnest)

    async def ours(
        self,
        produced: Produced,
        kind: str,
        *,
        redis: bool = False,
        workers: int = 1,
        dsn: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
        **more: Any,
    ) -> float:
        """A worker in this process, or several as `consumer run` starts them.

        kind: a handler of application.py. clock: time.process_time for messages a second of the worker's CPU.
        """
        own = dsn is None
        dsn = dsn or await self.database(max(1000, produced.workload.keys))
        app = App(f"bench-{uuid.uuid4().hex[:8]}")
        register(app, produced.topic, kind)
        settings = self.settings(dsn, redis=redis, **more)
        watcher = await asyncpg.connect(dsn)
        running_ = (
            self.working(app, settings) if workers == 1 else self.processes(app, produced, kind, settings, workers)
        )
        async with running_ as task:
            while not (before := await watcher.fetchval(SETTLED)):  # from the first commit on: joining is not measured
                await asyncio.sleep(0.002)
            begun = clock()
            while await watcher.fetchval(SETTLED) < len(produced.entries):
                await asyncio.sleep(0.02)
                if isinstance(task, asyncio.Task) and task.done():
                    raise SystemExit(f"the worker has ended: {task.exception()}")
            seconds = clock() - begun
        await watcher.close()
        await self.check(dsn, produced.entries)
        if own:
            await self.drop(dsn)
        return float((len(produced.entries) - int(before)) / seconds)

    def settings(self, dsn: str, *, redis: bool = False, **more: Any) -> Settings:
        given = {"log_level": "error", "kafka_commit_interval_seconds": 1, "kafka_heartbeat_seconds": 0.5, **more}
        settings: Settings = settings_for(
            dsn, self.kafka.bootstrap_servers, self.valkey.url if redis else None, **given
        )
        return settings

    @asynccontextmanager
    async def working(self, app: App, settings: Settings) -> AsyncIterator[Any]:
        """Run a worker in this process.

        With metrics, another process reads its reports.
        """
        with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as reader:  # noqa: ASYNC220
            assert reader.stdin is not None
            worker = Worker(app, settings, report=ReportPipe(reader.stdin.fileno()).send)
            task = asyncio.create_task(worker.run())
            try:
                yield task
            finally:
                worker.stop()
                await task
                reader.stdin.close()

    @asynccontextmanager
    async def processes(
        self, app: App, produced: Produced, kind: str, settings: Settings, workers: int
    ) -> AsyncIterator[Any]:
        with TemporaryDirectory() as directory:
            arguments = ["run", "application:app", "--workers", str(workers)]
            async with running_program(
                arguments,
                settings,
                Path(directory),
                PYTHONPATH=os.pathsep.join(map(str, [ROOT, ROOT / "benchmarks"])),
                BENCH_APP=app.name,
                BENCH_TOPIC=produced.topic,
                BENCH_KIND=kind,
            ) as command:
                yield command
                command.process.terminate()
                await command.wait()

    async def applied(self, produced: Produced, *, redis: bool) -> tuple[App, Settings]:
        """A database in which everything is applied, made once."""
        if redis not in produced.applied:
            app = App(f"bench-{uuid.uuid4().hex[:8]}")
            register(app, produced.topic, "defer")
            settings = self.settings(await self.database(), redis=redis)
            watcher = await asyncpg.connect(settings.dsn)
            async with self.working(app, settings):
                while await watcher.fetchval(SETTLED) < len(produced.entries):
                    await asyncio.sleep(0.05)
            await watcher.execute("vacuum analyze")
            await watcher.close()
            produced.applied[redis] = app, settings
        return produced.applied[redis]

    async def again(self, produced: Produced, *, redis: bool) -> float:
        """A worker that gets everything once more, from the first positions."""
        app, settings = await self.applied(produced, redis=redis)
        watcher = await asyncpg.connect(settings.dsn)
        await watcher.execute("update consumer.positions set next_offset = 0")
        async with self.working(app, settings):
            while not (before := await watcher.fetchval(SETTLED)):
                await asyncio.sleep(0.002)
            begun = time.perf_counter()
            while await watcher.fetchval(SETTLED) < len(produced.entries):
                await asyncio.sleep(0.02)
            seconds = time.perf_counter() - begun
        await watcher.close()
        await self.check(settings.dsn, produced.entries)
        return float((len(produced.entries) - int(before)) / seconds)

    async def replay(self, produced: Produced, mode: Mode | Literal["rebuild"], *, redis: bool = False) -> float:
        app, settings = await self.applied(produced, redis=redis)
        if mode == "rebuild":
            findings = await run_rebuild(app, settings, [produced.topic], RebuildOptions(), Progress())
        else:
            findings = await replay(app, settings, [produced.topic], Options(mode=mode), Progress())
        if not findings.ok:
            raise SystemExit(f"the replay found problems: {findings.answer()}")
        return len(produced.entries) / findings.seconds

    async def aiokafka_alone(self, produced: Produced) -> float:
        """The limit on one side: reading, and nothing else."""
        consumer = await self.reader(produced)
        left = len(produced.entries)
        begun = time.perf_counter()
        while left > 0:
            left -= sum(map(len, (await consumer.getmany(timeout_ms=500, max_records=2000)).values()))
        seconds = time.perf_counter() - begun
        await consumer.stop()
        return len(produced.entries) / seconds

    async def postgresql_alone(self, produced: Produced) -> float:
        """The limit on the other side: the `unnest` loop, fed from memory."""
        dsn = await self.database()
        connection = await asyncpg.connect(dsn)
        payments = [Payment(id, account, amount, "") for id, account, amount in produced.entries]
        begun = time.perf_counter()
        for start in range(0, len(payments), 2000):
            first = {payment.id: payment for payment in payments[start : start + 2000]}
            async with connection.transaction():
                fresh = [first[row[0]] for row in await connection.fetch(CLAIM, list(first))]
                await write_unnest(connection, fresh)
        seconds = time.perf_counter() - begun
        await connection.close()
        await self.check(dsn, produced.entries)
        await self.drop(dsn)
        return len(produced.entries) / seconds


def servers(**postgres: str) -> tuple[LocalServer, ...]:
    """Kafka, PostgreSQL with fsync on, and Valkey; to be entered."""
    tuned = {"shared_buffers": "256MB", "max_wal_size": "4GB", "track_commit_timestamp": "on", **postgres}
    return Kafka(), Postgres(tuned), Valkey()
