"""Scenarios about cost: a full ledger, WAL, CPU time, memory."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
import uuid
from pathlib import Path

import asyncpg
from application import Payment, write_unnest
from bench import SETTLED, Bench, Cpu, Workload
from contest import Options, Row, ScenarioResult, rows_of, turns
from harness import value
from ledgers import Ledger

from consumer import App
from consumer.core.retention import Drop, Forget


async def ledger(bench: Bench, given: Options) -> ScenarioResult:
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
    return ScenarioResult(
        "Random ids (UUIDv4), the worst case for the index; a handler that defers. While the full one is worked on, a generation of "
        "a million rows is forgotten and dropped, and the ledger turns: its claims look into the full generation and two to four more.",
        rows_of(seconds, base),
    )


async def cost(bench: Bench, given: Options) -> ScenarioResult:
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
    return ScenarioResult(
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


async def memory(bench: Bench, given: Options) -> ScenarioResult:
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
    return ScenarioResult(
        f"{given.messages:,} messages of backlog ({given.messages * 300 / 1e9:.1f} GB in the log), one worker, resident memory.",
        [
            {
                "highest, MB": f"{max(sizes):.0f}",
                "median of the first tenth": f"{statistics.median(sizes[:tenth]):.0f}",
                "median of the last tenth": f"{statistics.median(sizes[-tenth:]):.0f}",
            }
        ],
    )
