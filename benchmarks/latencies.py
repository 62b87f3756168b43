"""Scenarios about time: open-loop latency, a killed worker, the start."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import time
import uuid

import asyncpg
from application import register
from bench import ROOT, SETTLED, Bench, Entry, Produced, Workload
from contest import Options, Row, ScenarioResult
from harness import Command, new_topic, value

from consumer import App

_WARM_SECONDS = 5.0  # of a loop, not counted: connections, first statements, the broker's first requests for a topic


async def _timed(bench: Bench) -> str:
    dsn = await bench.database()
    connection = await asyncpg.connect(dsn)
    await connection.execute("create table timed (id uuid not null, due float8 not null, partition int not null)")
    await connection.execute('grant all on timed to "test-worker"')
    await connection.close()
    return dsn


async def _open_loop(
    bench: Bench, topic: str, partitions: int, rate: float, seconds: float, begun: asyncio.Event | None = None
) -> tuple[int, float]:
    """Send at a fixed rate, from another process.

    begun: is set once a fifth is sent. Returns the number of messages, and when the first was due (Unix seconds).
    """
    total = int(rate * seconds)
    arguments = [bench.kafka.bootstrap_servers, topic, str(partitions), str(rate), str(total)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "benchmarks" / "open_loop.py"), *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    line = await process.stdout.readline()
    if begun is not None:
        begun.set()
    if await process.wait():
        raise SystemExit("the producer failed")
    return total, float(line)


async def latency(bench: Bench, given: Options) -> ScenarioResult:
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
    return ScenarioResult(
        "From the moment a message was due to the COMMIT of its effect, by PostgreSQL's commit timestamps. The producer, librdkafka in "
        f"a process of its own, runs on the same two cores: {most:,.0f} msg/s go through when it sends as fast as it can.",
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
        total, begun = await _open_loop(bench, topic, 8, 1e6, given.messages / 1e6)
        while await value(dsn, SETTLED) < total:
            await asyncio.sleep(0.02)
        seconds = time.time() - begun
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
        total, begun = await _open_loop(bench, topic, 8, rate, _WARM_SECONDS + seconds)
        while await value(dsn, SETTLED) < total:
            await asyncio.sleep(0.05)
    connection = await asyncpg.connect(dsn)
    [(count, latencies)] = await connection.fetch(
        """select count(*), percentile_disc(array[0.5, 0.99, 0.999, 1.0]) within group (order by late)
           filter (where due >= $1) from (
           select due, 1000 * (extract(epoch from pg_xact_commit_timestamp(xmin)) - due) as late from timed) as t""",
        begun + _WARM_SECONDS,
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


async def killed(bench: Bench, given: Options) -> ScenarioResult:
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
            total, _ = await sending
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
    return ScenarioResult(
        "Longest time between two commits of one partition after the kill; effects were there once.",
        [{"median, s": f"{statistics.median(gaps):.2f}", "lowest": f"{min(gaps):.2f}", "highest": f"{max(gaps):.2f}"}],
    )


async def start(bench: Bench, given: Options) -> ScenarioResult:
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
    return ScenarioResult(
        "From the start of the process to the COMMIT of the first effect.",
        [
            {
                "median, s": f"{statistics.median(times):.2f}",
                "lowest": f"{min(times):.2f}",
                "highest": f"{max(times):.2f}",
            }
        ],
    )
