"""Whether rotating and dropping generations delays batches.

A ledger of 10 million rows, closed, and two connections that claim 2,000 ids at a time, commit and begin again, as lanes do.
First nothing else happens; then the ledger turns, forgets the 10 million and drops their table, again and again. The result is the
median and the longest time from BEGIN to COMMIT of each. PostgreSQL with fsync on, started here.

    .venv/bin/python benchmarks/purge.py                    10 million rows (about 3 minutes)
    .venv/bin/python benchmarks/purge.py --rows 1000000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import asyncpg

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

from harness import settings_for  # noqa: E402
from ledgers import Ledger  # noqa: E402

from consumer import App, Tx  # noqa: E402
from consumer.core.delivery import Delivery  # noqa: E402
from consumer.core.message import LogRecord  # noqa: E402
from consumer.core.retention import Drop, Forget  # noqa: E402
from consumer.local_servers import Postgres  # noqa: E402
from consumer.postgres import migrate  # noqa: E402
from consumer.postgres.session import Session  # noqa: E402

TOPIC = "t"
BATCH = 2000
LIVE_MAX = 4  # generations, in the measurement of what each one costs


class Bench:
    def __init__(self, dsn: str) -> None:
        self.settings = settings_for(dsn, "127.0.0.1:1")
        app = App("bench")

        @app.handler(TOPIC)
        async def settle(message: dict[str, Any], tx: Tx) -> None: ...

        self.handler = app.handlers["settle"]
        self.topics: dict[str, int] = {}
        self.connection: asyncpg.Connection[Any]
        self.ledger: Ledger

    async def open(self) -> None:
        self.connection = await asyncpg.connect(self.settings.dsn)
        await migrate.migrate(self.connection)
        self.ledger = Ledger(self.connection)
        session = await Session.open(self.settings)
        numbers, self.topics = await session.numbers("bench", ["settle"], [TOPIC])
        self.handler.number = numbers["settle"]
        session.close()

    def batch(self) -> list[Delivery]:
        claims = []
        for offset in range(BATCH):
            delivery = Delivery(self.handler, LogRecord(TOPIC, 0, offset, 0, None, b"{}", (), ""))
            delivery.id, delivery.fingerprint = uuid.uuid4().bytes, 1
            claims.append(delivery)
        return claims

    async def claims(self, stop: asyncio.Event, seconds: list[float]) -> None:
        session = await Session.open(self.settings)
        while not stop.is_set():
            batch = self.batch()
            began = time.perf_counter()
            await session.begin()
            if await session.claim(batch, self.topics):
                raise SystemExit("a claim of a new id was lost")
            await session.commit()
            seconds.append(time.perf_counter() - began)
        session.close()


async def under(bench: Bench, what: Any) -> list[float]:
    """Batches of two connections while something happens."""
    stop, seconds = asyncio.Event(), list[float]()
    tasks = [asyncio.create_task(bench.claims(stop, seconds)) for _ in range(2)]
    try:
        await what
    finally:
        stop.set()
        await asyncio.gather(*tasks)
    return seconds


def timed(name: str, seconds: list[float]) -> dict[str, float]:
    measured = {
        "batches": len(seconds),
        "median_ms": round(statistics.median(seconds) * 1000, 1),
        "p99_ms": round(statistics.quantiles(seconds, n=100)[98] * 1000, 1),
        "longest_ms": round(max(seconds) * 1000, 1),
    }
    print(
        f"{name:<28} {measured['batches']:>6} batches   median {measured['median_ms']:>7} ms   99 % {measured['p99_ms']:>7} ms   longest {measured['longest_ms']:>7} ms"
    )
    return measured


async def run(dsn: str, rows: int, idle_seconds: float) -> dict[str, Any]:
    bench = Bench(dsn)
    await bench.open()
    print("filling the ledger")
    await bench.ledger.fill(rows)
    measured: dict[str, Any] = {"rows": rows}
    measured["one_generation"] = timed("one generation", await under(bench, asyncio.sleep(idle_seconds)))

    async def turning() -> None:
        await asyncio.sleep(1)
        await bench.ledger.turn()
        await asyncio.sleep(1)

    measured["turning"] = timed("while it turns", await under(bench, turning()))
    measured["before"] = timed("two generations, idle", await under(bench, asyncio.sleep(idle_seconds)))

    async def dropping() -> None:
        await asyncio.sleep(1)
        await bench.ledger.step(Forget(1, 0))
        await bench.ledger.step(Drop(1))
        await asyncio.sleep(2)

    measured["dropping"] = timed("while the rows are dropped", await under(bench, dropping()))
    measured["after"] = timed("one generation, small", await under(bench, asyncio.sleep(idle_seconds)))
    for live in range(2, LIVE_MAX + 1):
        await bench.ledger.fill(min(rows, 500_000))
        await bench.ledger.turn()
        seconds = await under(bench, asyncio.sleep(idle_seconds / 2))
        measured[f"live_{live}"] = timed(f"{live} generations", seconds)
    await bench.connection.close()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement in which nothing else happens")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    given = parser.parse_args()
    with Postgres({"shared_buffers": "512MB", "max_wal_size": "8GB", "maintenance_work_mem": "512MB"}) as server:
        measured = asyncio.run(run(server.dsn(), given.rows, given.seconds))
    if given.json:
        given.json.write_text(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
