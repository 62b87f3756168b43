"""One function for each scenario, which returns its rows.

What a goal is compared with is measured in the same run.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import statistics
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
from aiokafka import AIOKafkaProducer
from application import Payment, register, write_unnest
from bench import SETTLED, Bench, Cpu, Entry, Produced, Workload, body
from harness import Command, new_topic, value
from ledgers import Ledger

from consumer import App
from consumer.core.retention import Drop, Forget
from consumer.transaction.handler_runner import HandlerRunner
from consumer.transaction.limits import CallTracker
from consumer.worker.batch_metrics import BatchMetrics
from consumer.worker.metrics_report import MetricsReport

Row = dict[str, str]

# What a worker does for metrics alone.
METRICS = (
    (BatchMetrics, "settled"),
    (CallTracker, "_record_step"),
    (HandlerRunner, "_record_times"),
    (MetricsReport, "_send_changes"),
    (MetricsReport, "_send_beat"),
)


@dataclass
class Options:
    messages: int
    rounds: int
    only: str | None = None
    ledger_rows: int = 5_000_000
    seconds: float = 15.0


@dataclass
class Found:
    """The result of a scenario.

    A sentence about it, its rows, and bars for the plot.
    """

    about: str
    rows: list[Row]
    bars: dict[str, float] = field(default_factory=dict)


Contestant = Callable[[], Awaitable[float]]


async def turns(contestants: dict[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Let contestants take turns, round after round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(1, rounds + 1):
        for name, contestant in contestants.items():
            seconds[name].append(await contestant())
            print(f"round {number}  {name:42} {seconds[name][-1]:12,.0f} msg/s", file=sys.stderr, flush=True)
    return seconds


def rows_of(seconds: dict[str, list[float]], base: str) -> list[Row]:
    middle = statistics.median(seconds[base])
    return [
        {
            "contestant": name,
            "msg/s": f"{statistics.median(speeds):,.0f}",
            "lowest": f"{min(speeds):,.0f}",
            "highest": f"{max(speeds):,.0f}",
            f"times {base}": f"{statistics.median(speeds) / middle:.2f}"
            if statistics.median(speeds) < 10 * middle
            else f"{statistics.median(speeds) / middle:.1f}",
        }
        for name, speeds in seconds.items()
    ]


async def reference(bench: Bench, given: Options) -> Found:
    """All contestants on the workload of reference."""
    produced = await bench.produced(Workload(given.messages))
    contestants: dict[str, Contestant] = {
        "the loop people write": lambda: bench.naive(produced),
        "by hand: executemany, two connections": lambda: bench.by_hand_executemany(produced),
        "by hand: unnest, two connections": lambda: bench.by_hand_unnest(produced),
        "ours: defer": lambda: bench.ours(produced, "defer"),
        "ours: defer, with Redis": lambda: bench.ours(produced, "defer", redis=True),
        "ours: defer, two workers": lambda: bench.ours(produced, "defer", workers=2),
        "ours: two awaited statements": lambda: bench.ours(produced, "await"),
        "ours: batch handler": lambda: bench.ours(produced, "batch"),
        "ours: batch handler, with Redis": lambda: bench.ours(produced, "batch", redis=True),
        "ours: batch handler, two workers": lambda: bench.ours(produced, "batch", workers=2),
        "limit: aiokafka alone": lambda: bench.aiokafka_alone(produced),
        "limit: PostgreSQL alone": lambda: bench.postgresql_alone(produced),
    }
    first = next(iter(contestants))
    if given.only:
        wanted = [
            first,
            *(contestant for contestant in contestants if any(part in contestant for part in given.only.split(","))),
        ]
        contestants = {name: contestants[name] for name in dict.fromkeys(wanted)}
    seconds = await turns(contestants, given.rounds)
    return Found(
        f"{given.messages:,} messages in 8 partitions, about 200 bytes of JSON, 10 % duplicates, 1,000 keys; the effect of a "
        "message is one INSERT and one UPDATE.",
        rows_of(seconds, first),
        {name: statistics.median(speeds) for name, speeds in seconds.items()},
    )


async def replays(bench: Bench, given: Options) -> Found:
    """Read applied messages again, by a worker and by `consumer replay`.

    Compared with reading alone.
    """
    produced = await bench.produced(Workload(given.messages))
    base = "limit: aiokafka alone"
    contestants: dict[str, Contestant] = {
        base: lambda: bench.aiokafka_alone(produced),
        "a worker again, with Redis": lambda: bench.again(produced, redis=True),
        "a worker again": lambda: bench.again(produced, redis=False),
        "replay: check": lambda: bench.replay(produced, "check"),
        "replay: check, with Redis": lambda: bench.replay(produced, "check", redis=True),
        "replay: apply, nothing missing": lambda: bench.replay(produced, "apply"),
        "replay: rebuild": lambda: bench.replay(produced, "rebuild"),
    }
    return Found("All messages are applied: 100 % duplicates.", rows_of(await turns(contestants, given.rounds), base))


async def duplicates(bench: Bench, given: Options) -> Found:
    """What the pre-check costs and saves, by the share of duplicates."""
    rows: list[Row] = []
    for share in (0.0, 0.1, 0.2, 0.5, 0.8):
        produced = await bench.produced(Workload(given.messages, duplicates=share))
        seconds = await turns(
            {
                f"{share:.0%} duplicates, without Redis": lambda produced=produced: bench.ours(produced, "defer"),  # type: ignore[misc]
                f"{share:.0%} duplicates, with Redis": lambda produced=produced: bench.ours(
                    produced, "defer", redis=True
                ),  # type: ignore[misc]
            },
            given.rounds,
        )
        off, on = (statistics.median(speeds) for speeds in seconds.values())
        rows.append(
            {
                "duplicates": f"{share:.0%}",
                "Redis off, msg/s": f"{off:,.0f}",
                "Redis on, msg/s": f"{on:,.0f}",
                "on / off": f"{on / off:.2f}",
            }
        )
    return Found("A handler that defers; the duplicates repeat earlier messages of the same drain.", rows)


async def shapes(bench: Bench, given: Options) -> Found:
    """Keys and partitions otherwise than in the workload of reference."""
    base = "reference: 8 partitions, 1,000 keys"
    workloads = {
        base: Workload(given.messages),
        "one hot key": Workload(given.messages, hot=True),
        "1,000,000 keys": Workload(given.messages, keys=1_000_000),
        "1 partition": Workload(given.messages, partitions=1),
        "64 partitions": Workload(given.messages, partitions=64),
    }
    produced_of = {name: await bench.produced(workload) for name, workload in workloads.items()}
    seconds = await turns(
        {name: lambda produced=produced: bench.ours(produced, "defer") for name, produced in produced_of.items()},  # type: ignore[misc]
        given.rounds,
    )
    return Found("A handler that defers, one worker.", rows_of(seconds, base))


async def slow(bench: Bench, given: Options) -> Found:
    """Handlers that wait 10 ms each: concurrency=64, one partition, 1,000 keys."""
    messages = min(given.messages, 30_000)
    produced = await bench.produced(Workload(messages, partitions=1))
    seconds = await turns({"slow handlers": lambda: bench.ours(produced, "slow")}, given.rounds)
    speed = statistics.median(seconds["slow handlers"])
    return Found(
        "Each handler waits 10 ms for something elsewhere; 64 at a time make 6,400 msg/s at most.",
        [{"msg/s": f"{speed:,.0f}", "of 64 / 10 ms": f"{speed / 6400:.0%}"}],
    )


async def _timed(bench: Bench) -> str:
    dsn = await bench.database()
    connection = await asyncpg.connect(dsn)
    await connection.execute("create table timed (id uuid not null, due float8 not null, partition int not null)")
    await connection.execute('grant all on timed to "test-worker"')
    await connection.close()
    return dsn


async def _open_loop(
    bench: Bench, topic: str, partitions: int, rate: float, seconds: float, begun: asyncio.Event | None = None
) -> int:
    """Send at a fixed rate, whatever happens.

    The latency of a late message counts from when it was due.
    """
    producer = AIOKafkaProducer(bootstrap_servers=bench.kafka.bootstrap_servers, linger_ms=0)
    await producer.start()
    start, number, sent = time.time() + 0.1, 0, []
    total = int(rate * seconds)
    try:
        while number < total:
            now = time.time()
            while number < total and start + number / rate <= now:
                due = start + number / rate
                id = uuid.uuid4()
                value_ = body(id, number % 1000, 1).replace(b"x" * 110, f"{due!r:<110}".encode())
                headers = [("message-id", str(id).encode())]
                sent.append(
                    await producer.send(
                        topic, value_, key=str(number % 1000).encode(), partition=number % partitions, headers=headers
                    )
                )
                number += 1
            if begun is not None and number > total * 0.2:
                begun.set()
            await asyncio.sleep(0.001)
        await asyncio.gather(*sent)
    finally:
        await producer.stop()
    return total


async def latency(bench: Bench, given: Options) -> Found:
    """Latency from produce to COMMIT at a fixed rate.

    Each message counts from when it was due (no coordinated omission).
    """
    rows: list[Row] = []
    # A broker that has just started is slow for its first ten thousands of requests: they are not what is measured.
    await _latency_at(bench, "not counted", 1000.0, 20.0)
    most = await _most_with_a_producer(bench, given)
    for name, rate in (
        ("100 msg/s", 100.0),
        ("1,000 msg/s", 1000.0),
        ("half of what goes through", most * 0.5),
        ("80 % of what goes through", most * 0.8),
    ):
        rows.append(await _latency_at(bench, name, rate, given.seconds))
    return Found(
        "From the moment a message was due to the COMMIT of its effect, by PostgreSQL's commit timestamps. The producer, in Python, "
        f"runs on the same two cores: {most:,.0f} msg/s go through when it sends as fast as it can.",
        rows,
    )


async def _most_with_a_producer(bench: Bench, given: Options) -> float:
    """Messages a second that one producer process sends while another consumes."""
    topic = await new_topic(bench.kafka.bootstrap_servers, 8)
    dsn = await _timed(bench)
    app = App(f"bench-{uuid.uuid4().hex[:8]}")
    register(app, topic, "timed")
    async with bench.processes(app, Produced(Workload(0), topic, []), "timed", bench.settings(dsn), 1):
        while not await value(dsn, "select count(*) = 8 from consumer.positions"):
            await asyncio.sleep(0.05)
        begun = time.perf_counter()
        total = await _open_loop(bench, topic, 8, 1e6, given.messages / 1e6)
        while await value(dsn, SETTLED) < total:
            await asyncio.sleep(0.02)
        seconds = time.perf_counter() - begun
    await bench.drop(dsn)
    return total / seconds


async def _latency_at(bench: Bench, name: str, rate: float, seconds: float) -> Row:
    topic = await new_topic(bench.kafka.bootstrap_servers, 8)
    dsn = await _timed(bench)
    app = App(f"bench-{uuid.uuid4().hex[:8]}")
    register(app, topic, "timed")
    produced = Produced(Workload(0), topic, [])
    async with bench.processes(app, produced, "timed", bench.settings(dsn), 1):
        while not await value(dsn, "select count(*) = 8 from consumer.positions"):
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)  # the first connections and statements are not what is measured
        total = await _open_loop(bench, topic, 8, rate, seconds)
        while await value(dsn, SETTLED) < total:
            await asyncio.sleep(0.05)
    connection = await asyncpg.connect(dsn)
    [(count, latencies)] = await connection.fetch(
        """select count(*), percentile_disc(array[0.5, 0.99, 0.999, 1.0]) within group (order by late) from (
           select 1000 * (extract(epoch from pg_xact_commit_timestamp(xmin)) - due) as late from timed) as t"""
    )
    await connection.close()
    if count != total:
        raise SystemExit(f"wrong effects: {count} instead of {total}")
    await bench.drop(dsn)
    row = {"rate": name, "msg/s": f"{rate:,.0f}"}
    row |= {f"{q}, ms": f"{late:.1f}" for q, late in zip(("p50", "p99", "p99.9", "max"), latencies, strict=True)}
    print(f"latency  {row}", file=sys.stderr, flush=True)
    return row


def _last_opened(command: Command) -> list[int]:
    """With how many partitions each of the last two began."""
    return [event["count"] for event in command.events() if event["event"] == "partitions opened"][-2:]


async def killed(bench: Bench, given: Options) -> Found:
    """How long partitions stall after SIGKILL of one of two workers.

    Under 1,000 messages a second.
    """
    gaps = []
    for _ in range(given.rounds):
        topic = await new_topic(bench.kafka.bootstrap_servers, 8)
        dsn = await _timed(bench)
        app = App(f"bench-{uuid.uuid4().hex[:8]}")
        produced = Produced(Workload(0), topic, [])
        settings = bench.settings(dsn, log_level="info", kafka_session_timeout_seconds=30)
        async with bench.processes(app, produced, "timed", settings, 2) as command:
            while _last_opened(command) != [4, 4]:
                await asyncio.sleep(0.1)
            running_ = asyncio.Event()
            sending = asyncio.create_task(_open_loop(bench, topic, 8, 1000, given.seconds, running_))
            await running_.wait()
            victim = command.worker_pids()[1]
            at = time.time()
            os.kill(victim, 9)
            total = await sending
            while await value(dsn, SETTLED) < total:
                await asyncio.sleep(0.05)
        connection = await asyncpg.connect(dsn)
        [(count, gap)] = await connection.fetch(
            """select (select count(distinct id) from timed), max(gap) from (
               select extract(epoch from at - lag(at) over (partition by partition order by at)) as gap, at from (
                   select distinct partition, pg_xact_commit_timestamp(xmin) as at from timed) t) g
               where at > to_timestamp($1)""",
            at,
        )
        rows = await connection.fetchval("select count(*) from timed")
        await connection.close()
        if (count, rows) != (total, total):
            raise SystemExit(f"wrong effects: {(count, rows)} instead of {total}")
        gaps.append(float(gap))
        print(f"killed: longest standstill of a partition {gap:.2f} s", file=sys.stderr, flush=True)
        await bench.drop(dsn)
    return Found(
        "Longest time between two commits of one partition after the kill; effects were there once.",
        [{"median, s": f"{statistics.median(gaps):.2f}", "lowest": f"{min(gaps):.2f}", "highest": f"{max(gaps):.2f}"}],
    )


async def ledger(bench: Bench, given: Options) -> Found:
    """A full ledger, also while it is purged, against an empty one."""
    produced = await bench.produced(Workload(given.messages))
    dsn = await bench.database()
    begun = time.perf_counter()
    connection = await asyncpg.connect(dsn)
    tables = Ledger(connection)
    for _ in range(given.rounds):  # a generation to be dropped in each round
        await tables.fill(1_000_000)
        await tables.turn()
    await tables.fill(given.ledger_rows)
    await tables.turn()
    print(f"filled the ledger in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    oldest = iter(range(1, given.rounds + 1))

    async def purge() -> None:
        await asyncio.sleep(0.5)
        number = next(oldest)
        # As old as what is forgotten is: messages of that time, which are too old to judge, are in no log any more.
        await connection.execute(
            "update consumer.generations set closed_at = closed_at - interval '30 days' where number = $1", number
        )
        await tables.step(Forget(number, 0))
        await tables.step(Drop(number))
        await tables.turn()

    async def full() -> float:
        await connection.execute("truncate effects")
        await connection.execute("update accounts set balance = 0")
        await connection.execute("delete from consumer.positions")
        await connection.execute("vacuum accounts")
        purging = asyncio.create_task(purge())
        speed = await bench.ours(produced, "defer", dsn=dsn)
        await purging
        return speed

    base = "empty ledger"
    name = f"ledger of {given.ledger_rows:,} rows, purged meanwhile"
    seconds = await turns({base: lambda: bench.ours(produced, "defer"), name: full}, given.rounds)
    await connection.close()
    await bench.drop(dsn)
    return Found(
        "Random ids (UUIDv4), the worst case for the index; a handler that defers. While the full one is worked on, a generation of "
        "a million rows is forgotten and dropped, and the ledger turns: its claims look into the full generation and two to four more.",
        rows_of(seconds, base),
    )


async def cost(bench: Bench, given: Options) -> Found:
    """Bytes and CPU seconds of a message, by the servers' own counts."""
    produced = await bench.produced(Workload(given.messages, duplicates=0.0))
    rows: list[Row] = []
    lean: Row = {}

    async def wal(dsn: str) -> int:
        return int(await value(dsn, "select pg_current_wal_lsn() - '0/0'::pg_lsn"))

    for name, kind, redis in (
        ("ours: defer", "defer", False),
        ("ours: defer, with Redis", "defer", True),
        ("ours: batch handler", "batch", False),
    ):
        dsn = await bench.database()
        before = await wal(dsn)
        with Cpu(bench) as cpu:
            await bench.ours(produced, kind, redis=redis, dsn=dsn)
            seconds = cpu.seconds()
        written = await wal(dsn) - before
        size = await value(
            dsn,
            """select sum(pg_total_relation_size(c.oid)) from pg_class c join pg_namespace n on n.oid = c.relnamespace
               where n.nspname = 'consumer' and c.relkind = 'r' and c.relname like 'ledger%'""",
        )
        n = len(produced.entries)
        if kind == "batch":
            lean = await _without_provenance(dsn, n)
        await bench.drop(dsn)
        per_million = {
            server: f"{seconds[server] / n * 1e6:.1f}" for server in ("worker", "postgresql", "valkey", "kafka")
        }
        rows.append(
            {
                "contestant": name,
                "ledger, bytes a message": f"{float(size) / n:.0f}",
                "WAL, bytes a message": f"{written / n:.0f}",
                **{f"{server}, CPU s a million": text for server, text in per_million.items()},
            }
        )
    # The same effects by the same statements, without a ledger: what is left is the ledger's own.
    dsn = await bench.database()
    connection = await asyncpg.connect(dsn)
    before = await wal(dsn)
    for start in range(0, len(produced.entries), 2000):
        async with connection.transaction():
            await write_unnest(connection, [Payment(*entry, "") for entry in produced.entries[start : start + 2000]])
    rows.append(
        {
            "contestant": "the effects alone (batch handler's statements)",
            "WAL, bytes a message": f"{(await wal(dsn) - before) / len(produced.entries):.0f}",
        }
    )
    rows.append(lean)
    await connection.close()
    await bench.drop(dsn)
    return Found(
        "No duplicates. Ledger: heap and index. CPU: user and system time; the worker's includes starting it.", rows
    )


async def _without_provenance(dsn: str, count: int) -> Row:
    """The same ids in a ledger without provenance.

    Without where a message was, and when it was applied.
    """
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "create table lean (fingerprint int8 not null, handler int2 not null, id uuid not null, primary key (handler, id))"
    )
    ids = [row[0] for row in await connection.fetch("select id from consumer.ledger")]
    handler = await connection.fetchval("select max(handler) from consumer.handlers")
    before = await connection.fetchval("select pg_current_wal_lsn()")
    for start in range(0, len(ids), 2000):
        await connection.execute(
            "insert into lean select 1, $1, id from unnest($2::uuid[]) id order by id on conflict do nothing",
            handler,
            ids[start : start + 2000],
        )
    written = await connection.fetchval("select pg_current_wal_lsn() - $1::pg_lsn", before)
    size = await connection.fetchval("select pg_total_relation_size('lean')")
    await connection.close()
    return {
        "contestant": "a ledger without provenance, alone (it is not offered)",
        "ledger, bytes a message": f"{size / count:.0f}",
        "WAL, bytes a message": f"{written / count:.0f}",
    }


def _resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def memory(bench: Bench, given: Options) -> Found:
    """A worker's memory while it works off a backlog."""
    produced = await bench.produced(Workload(given.messages))
    dsn = await bench.database()
    app = App(f"bench-{uuid.uuid4().hex[:8]}")
    sizes: list[float] = []
    async with bench.processes(app, produced, "defer", bench.settings(dsn, log_level="info"), 1) as command:
        while not command.worker_pids():
            await asyncio.sleep(0.05)
        [pid] = command.worker_pids().values()
        while await value(dsn, SETTLED) < len(produced.entries):
            sizes.append(_resident_mb(pid))
            await asyncio.sleep(0.5)
    await bench.check(dsn, produced.entries)
    await bench.drop(dsn)
    tenth = max(1, len(sizes) // 10)
    return Found(
        f"{given.messages:,} messages of backlog ({given.messages * 300 / 1e9:.1f} GB in the log), one worker, resident memory.",
        [
            {
                "highest, MB": f"{max(sizes):.0f}",
                "median of the first tenth": f"{statistics.median(sizes[:tenth]):.0f}",
                "median of the last tenth": f"{statistics.median(sizes[-tenth:]):.0f}",
            }
        ],
    )


async def start(bench: Bench, given: Options) -> Found:
    """From `consumer run` to the first effect, on a running cluster."""
    entries: list[Entry] = [(uuid.UUID(int=random.getrandbits(128)), 1, 1) for _ in range(100)]
    times = []
    for _ in range(max(3, given.rounds)):
        topic = await new_topic(bench.kafka.bootstrap_servers, 8)
        await bench.send(topic, 8, entries)
        dsn = await bench.database()
        app = App(f"bench-{uuid.uuid4().hex[:8]}")
        produced = Produced(Workload(100), topic, entries)
        begun = time.time()
        async with bench.processes(app, produced, "defer", bench.settings(dsn), 1):
            while not await value(dsn, "select count(*) from effects"):
                await asyncio.sleep(0.02)
            first = await value(dsn, "select extract(epoch from min(pg_xact_commit_timestamp(xmin))) from effects")
        times.append(float(first) - begun)
        print(f"start: {times[-1]:.2f} s", file=sys.stderr, flush=True)
        await bench.drop(dsn)
    return Found(
        "From the start of the process to the COMMIT of the first effect.",
        [
            {
                "median, s": f"{statistics.median(times):.2f}",
                "lowest": f"{min(times):.2f}",
                "highest": f"{max(times):.2f}",
            }
        ],
    )


class Stopwatch:
    """CPU time of some methods while a block runs.

    The time of the functions that they call is included.
    """

    def __init__(self, *methods: tuple[type, str]) -> None:
        self.seconds = 0.0
        self._methods = methods
        self._is_running = False

    def __enter__(self) -> Stopwatch:
        self._originals = [getattr(owner, name) for owner, name in self._methods]
        for (owner, name), original in zip(self._methods, self._originals, strict=True):
            setattr(owner, name, self._timed(original))
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), original in zip(self._methods, self._originals, strict=True):
            setattr(owner, name, original)

    def _timed(self, method: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(method)
        def timed(*args: object, **options: object) -> object:
            if self._is_running:
                return method(*args, **options)
            self._is_running = True
            begun = time.thread_time()
            try:
                return method(*args, **options)
            finally:
                self.seconds += time.thread_time() - begun
                self._is_running = False

        return timed


async def metrics(bench: Bench, given: Options) -> Found:
    """The workload of reference without and with metrics.

    Where other processes disturb the times, the ratio of two runs says little; the share of one run does.
    """
    produced = await bench.produced(Workload(given.messages))
    shares: dict[str, list[float]] = {"defer": [], "batch": []}

    async def with_metrics(kind: str) -> float:
        with Stopwatch(*METRICS) as watch:
            speed = await bench.ours(produced, kind, clock=time.process_time, http="127.0.0.1:0")
        shares[kind].append(watch.seconds / (len(produced.entries) / speed))
        return speed

    contestants: dict[str, Contestant] = {}
    for kind in shares:
        contestants[f"{kind}, without"] = functools.partial(bench.ours, produced, kind, clock=time.process_time)
        contestants[f"{kind}, with metrics"] = functools.partial(with_metrics, kind)
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(given.rounds):
        order = contestants if number % 2 else dict(reversed(contestants.items()))  # who is second is slower, or faster
        for name, of_round in (await turns(order, 1)).items():
            speeds[name] += of_round
    rows: list[Row] = []
    for kind, of_kind in shares.items():
        pairs = zip(speeds[f"{kind}, without"], speeds[f"{kind}, with metrics"], strict=True)
        costs = sorted(before / after - 1 for before, after in pairs)
        rows.append(
            {
                "handler": kind,
                "share of CPU in metrics": f"{statistics.median(of_kind):.2%}",
                "highest share": f"{max(of_kind):.2%}",
                "CPU against a run without": f"{statistics.median(costs):+.1%}",
                "lowest": f"{costs[0]:+.1%}",
                "highest": f"{costs[-1]:+.1%}",
            }
        )
    return Found("CPU time of the worker's process that goes to metrics with `--http`, in alternating runs.", rows)


SCENARIOS: dict[str, tuple[str, Callable[[Bench, Options], Awaitable[Found]]]] = {
    "reference": ("Against the loop people write, the best by hand, and the limits", reference),
    "replay": ("Replay", replays),
    "duplicates": ("Duplicates and the pre-check", duplicates),
    "shapes": ("Keys and partitions", shapes),
    "slow": ("Slow handlers", slow),
    "latency": ("Latency, open loop", latency),
    "killed": ("A worker killed", killed),
    "ledger": ("A full ledger", ledger),
    "cost": ("Cost of a message", cost),
    "memory": ("Memory", memory),
    "start": ("Start", start),
    "metrics": ("Metrics", metrics),
}
UNUSUAL = frozenset({"memory"})  # only when named: it takes long, or says nothing when short


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join(row.get(name, '') for name in columns)} |" for row in rows]
    return "\n".join(lines)
