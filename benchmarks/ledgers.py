"""A large ledger, and the steps of its retention, for benchmarks."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from consumer.core.retention import Drop, Forget, RotateGeneration
from consumer.postgres import generations
from consumer.retention import task


class Ledger:
    """The tables behind one connection, as the owner of the schema."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    async def fill(self, rows: int) -> None:
        """Insert rows into the current generation of the ledger.

        They belong to no handler. The primary key is built after them, which is faster.
        """
        connection = self.connection
        target = await connection.fetchval("select target from consumer.ledger_state")
        table = "consumer.ledger" if target == 1 else f"consumer.ledger_{int(target)}"
        key = f"{table.removeprefix('consumer.')}_claim"
        await connection.execute(
            "insert into consumer.handlers (app, name) values ('filler', 'filler') on conflict do nothing"
        )
        await connection.execute("insert into consumer.topics (name) values ('filler') on conflict do nothing")
        handler = await connection.fetchval("select handler from consumer.handlers where app = 'filler'")
        topic = await connection.fetchval("select topic from consumer.topics where name = 'filler'")
        await connection.execute(f"alter table {table} drop constraint {key}")
        for start in range(0, rows, 1_000_000):
            await connection.execute(
                f"""insert into {table} (fingerprint, "offset", applied_at, partition, handler, topic, id)
                    select 1, n, now(), 0, {handler}, {topic}, gen_random_uuid()
                    from generate_series({start}::bigint, {min(rows, start + 1_000_000) - 1}) n""",
                timeout=600,
            )
            if rows > 1_000_000:
                print(f"  {min(rows, start + 1_000_000):,} rows", end="\r", file=sys.stderr, flush=True)
        await connection.execute(f"alter table {table} add constraint {key} primary key (handler, id)", timeout=1800)
        await connection.execute(f"vacuum (analyze) {table}", timeout=1800)
        await connection.execute("checkpoint", timeout=600)

    async def turn(self) -> None:
        while await self.step(RotateGeneration()) != "turned":
            pass

    async def step(self, step: RotateGeneration | Forget | Drop) -> str:
        """Try a step until it is done; return its seconds.

        The seconds of the call that did it.
        """
        while True:
            state = await generations.read_state(self.connection)
            began = time.perf_counter()
            done = await task.act(self.connection, state, step)
            if done not in ("waiting", "busy"):
                print(f"  {done:<10} {(time.perf_counter() - began) * 1000:8.1f} ms", file=sys.stderr, flush=True)
                return done
            await asyncio.sleep(0.05)
