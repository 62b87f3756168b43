"""The cost of each scheme against repetition, and of a hot row.

The cost is in µs an operation; the hot row has an optimistic lock. Real PostgreSQL (fsync on) and Valkey, started here;
one client, which waits for each answer. Contestants take turns, many times in a round; the result is the median of the
rounds. PostgreSQL's operations run in one open transaction, as in a batch: what they add to it. A wrong number of rows,
or a lost update, ends the run.

    python benchmarks/schemes.py
    python benchmarks/schemes.py --rounds 3 --operations 200
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
from contest import machine
from redis.asyncio import Redis

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

from harness import migrated, settings_for  # noqa: E402

from consumer import App, Retry, Tx  # noqa: E402
from consumer.core.delivery import Delivery  # noqa: E402
from consumer.core.identity import fingerprint  # noqa: E402
from consumer.core.message import LogRecord  # noqa: E402
from consumer.local_servers import Postgres, Valkey  # noqa: E402
from consumer.postgres.session import Session  # noqa: E402
from consumer.schemes.lock import Lock, check_fence  # noqa: E402
from consumer.schemes.states import StateMachine  # noqa: E402
from consumer.schemes.tokens import Fresh, Tokens, Used  # noqa: E402
from consumer.schemes.unique import insert_once  # noqa: E402
from consumer.schemes.versioned import Stale, update_versioned  # noqa: E402

ROWS = 10_000
BATCH = 500
SLICES = 20  # of a round: contestants take turns this often, so that what else this machine does meets all of them
HOT_TASKS = (1, 4, 16)
HOT_UPDATES = 320  # in all, whatever the number of tasks
TABLES = f"""
create table payments (id uuid primary key, account int not null, amount bigint not null);
create table accounts (id int primary key, balance bigint not null default 0, version bigint not null default 0);
insert into accounts select n from generate_series(1, {ROWS}) n;
create table orders (id int primary key, status text not null check (status in ('new', 'paid', 'shipped')));
insert into orders select n, 'new' from generate_series(1, {ROWS}) n;
create table fences (name text primary key, number bigint not null);
"""
ORDERS = StateMachine("orders", "status", {"new": ["paid"], "paid": ["shipped"], "shipped": ()})
INSERT = "insert into payments values ($1, $2, $3)"
UPDATE = "update accounts set balance = $2 where id = $1"
TOPIC = "payments"


class Bench:
    """The services, and one method for each contestant.

    It does `operations` of one kind and returns the seconds.
    """

    def __init__(self, dsn: str, session: Session, redis: Redis, operations: int) -> None:
        self.dsn = dsn
        self.session = session
        self.connection: Any = session.connection
        self.redis = redis
        self.tokens = Tokens(redis)
        self.operations = operations
        self.numbers = itertools.count(1)

    def ids(self) -> Iterator[uuid.UUID]:
        return (uuid.uuid4() for _ in range(self.operations))

    def rows(self) -> Iterator[int]:
        return (1 + next(self.numbers) % ROWS for _ in range(self.operations))

    async def in_transaction(self, work: Callable[[], Awaitable[None]]) -> float:
        """The seconds of some statements, which are then rolled back.

        So each round meets the same tables.
        """
        await self.connection.execute("begin")
        try:
            return await timed(work)
        finally:
            await self.connection.execute("rollback")

    # -- what it stands beside ----------------------------------------------------------------------------------------

    async def round_trip(self) -> float:
        async def work() -> None:
            for _ in range(self.operations):
                await self.connection.fetchval("select 1")

        return await self.in_transaction(work)

    async def insert(self) -> float:
        async def work() -> None:
            for id in self.ids():
                await self.connection.execute(INSERT, id, 1, 5)

        return await self.in_transaction(work)

    async def update(self) -> float:
        async def work() -> None:
            for id in self.rows():
                await self.connection.execute(UPDATE, id, 5)

        return await self.in_transaction(work)

    async def commit(self) -> float:
        async def work() -> None:
            for id in self.rows():
                await self.connection.execute("begin")
                await self.connection.execute(UPDATE, id, 5)
                await self.connection.execute("commit")

        return await timed(work)

    async def redis_round_trip(self) -> float:
        async def work() -> None:
            for _ in range(self.operations):
                await self.redis.get("nothing")

        return await timed(work)

    # -- the ledger ---------------------------------------------------------------------------------------------------

    async def _claims(self, size: int) -> float:
        app = App("bench")

        @app.handler(TOPIC)
        async def settle(payment: dict[str, Any], tx: Tx) -> None: ...

        handlers, topics = await self.session.numbers("bench", ["settle"], [TOPIC])
        handler = app.handlers["settle"]
        handler.number = handlers["settle"]
        batches = []
        for _ in range(max(1, self.operations // size)):
            batch = []
            for offset in range(size):
                delivery = Delivery(handler, LogRecord(TOPIC, 0, offset, 0, b"1", b"{}", (), ""))
                delivery.id, delivery.fingerprint = uuid.uuid4().bytes, fingerprint(b"{}")
                batch.append(delivery)
            batches.append(batch)

        async def work() -> None:
            for batch in batches:
                if await self.session.claim(batch, topics):
                    raise SystemExit("a claim of a new id was lost")

        seconds = await self.in_transaction(work)
        return seconds * self.operations / (len(batches) * size)

    async def claim_alone(self) -> float:
        return await self._claims(1)

    async def claim_in_batches(self) -> float:
        return await self._claims(BATCH)

    # -- the schemes --------------------------------------------------------------------------------------------------

    async def insert_once_new(self) -> float:
        async def work() -> None:
            for id in self.ids():
                if not await insert_once(self.connection, "payments", {"id": id, "account": 1, "amount": 5}, "id"):
                    raise SystemExit("a new row was not new")

        return await self.in_transaction(work)

    async def insert_once_again(self) -> float:
        row = {"id": uuid.uuid4(), "account": 1, "amount": 5}

        async def work() -> None:
            for n in range(self.operations):
                if await insert_once(self.connection, "payments", row, "id") != (n == 0):
                    raise SystemExit("one row was new twice")

        return await self.in_transaction(work)

    async def versioned(self) -> float:
        async def work() -> None:
            for id in self.rows():
                version = await self.connection.fetchval("select version from accounts where id = $1", id)
                await update_versioned(self.connection, "accounts", {"id": id}, expected=version, set={"balance": 5})

        return await self.in_transaction(work)

    async def versioned_stale(self) -> float:
        async def work() -> None:
            for id in self.rows():
                with suppress(Stale):
                    await update_versioned(self.connection, "accounts", {"id": id}, expected=9, set={"balance": 5})

        return await self.in_transaction(work)

    async def row_lock(self) -> float:
        async def work() -> None:
            for id in self.rows():
                await self.connection.fetchval("select balance from accounts where id = $1 for update", id)
                await self.connection.execute(UPDATE, id, 5)

        return await self.in_transaction(work)

    async def moved(self) -> float:
        async def work() -> None:
            for id in self.rows():
                if not await ORDERS.move(self.connection, id, "paid"):
                    raise SystemExit("a new order did not move")

        return await self.in_transaction(work)

    async def moved_before(self) -> float:
        async def work() -> None:
            await ORDERS.move(self.connection, 1, "paid")
            for _ in range(self.operations):
                if await ORDERS.move(self.connection, 1, "paid"):
                    raise SystemExit("an order was paid twice")

        return await self.in_transaction(work)

    async def issue(self) -> float:
        async def work() -> None:
            for _ in range(self.operations):
                await self.tokens.issue("alice", 60)

        return await timed(work)

    async def redeem(self) -> float:
        tokens = [await self.tokens.issue("alice", 60) for _ in range(self.operations)]

        async def work() -> None:
            for token in tokens:
                if not isinstance(await self.tokens.redeem(token, "alice"), Fresh):
                    raise SystemExit("a new token was not fresh")

        return await timed(work)

    async def redeem_again(self) -> float:
        token = await self.tokens.issue("alice", 600)
        await self.tokens.redeem(token, "alice")
        await self.tokens.store_result(token, "alice", "{}")

        async def work() -> None:
            for _ in range(self.operations):
                if not isinstance(await self.tokens.redeem(token, "alice"), Used):
                    raise SystemExit("a token was redeemed twice")

        return await timed(work)

    async def lock(self) -> float:
        async def work() -> None:
            for _ in range(self.operations):
                async with Lock(self.redis, "bench", 30):
                    pass

        return await timed(work)

    async def fence(self) -> float:
        async def work() -> None:
            for number in range(1, self.operations + 1):
                await check_fence(self.connection, "fences", "bench", number)

        return await self.in_transaction(work)


async def timed(work: Callable[[], Awaitable[None]]) -> float:
    begun = time.perf_counter()
    await work()
    return time.perf_counter() - begun


CONTESTANTS: dict[str, tuple[str, Callable[[Bench], Awaitable[float]]]] = {
    "a round trip: `select 1`": ("PostgreSQL", Bench.round_trip),
    "an insert": ("PostgreSQL", Bench.insert),
    "an update": ("PostgreSQL", Bench.update),
    "an update, with BEGIN and COMMIT": ("PostgreSQL", Bench.commit),
    "the ledger: a claim, of a batch of 500": ("PostgreSQL", Bench.claim_in_batches),
    "the ledger: a claim by itself": ("PostgreSQL", Bench.claim_alone),
    "`insert_once`: new": ("PostgreSQL", Bench.insert_once_new),
    "`insert_once`: there already": ("PostgreSQL", Bench.insert_once_again),
    "a read and `update_versioned`": ("PostgreSQL", Bench.versioned),
    "`update_versioned`: Stale": ("PostgreSQL", Bench.versioned_stale),
    "a row lock: `select … for update`, update": ("PostgreSQL", Bench.row_lock),
    "`StateMachine.move`: moved": ("PostgreSQL", Bench.moved),
    "`StateMachine.move`: repeated": ("PostgreSQL", Bench.moved_before),
    "`check_fence`": ("PostgreSQL", Bench.fence),
    "a round trip: `GET`": ("Redis", Bench.redis_round_trip),
    "`Tokens.issue`": ("Redis", Bench.issue),
    "`Tokens.redeem`: fresh": ("Redis", Bench.redeem),
    "`Tokens.redeem`: used before": ("Redis", Bench.redeem_again),
    "`Lock`: taken and given back": ("Redis", Bench.lock),
}


# -- a hot row ----------------------------------------------------------------------------------------------------------------


async def hot(dsn: str, tasks: int, one: Callable[[Any, Callable[[], None]], Awaitable[None]]) -> tuple[float, float]:
    """Updates of one row per second, and lost attempts per update.

    By several connections.
    """
    connections = [await asyncpg.connect(dsn) for _ in range(tasks)]
    await connections[0].execute("update accounts set balance = 0, version = 0 where id = 1")
    left, lost = HOT_UPDATES, 0

    def lose() -> None:
        nonlocal lost
        lost += 1

    async def work(connection: Any) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await one(connection, lose)

    begun = time.perf_counter()
    await asyncio.gather(*[work(connection) for connection in connections])
    seconds = time.perf_counter() - begun
    balance = await connections[0].fetchval("select balance from accounts where id = 1")
    for connection in connections:
        await connection.close()
    if balance != HOT_UPDATES:
        raise SystemExit(f"an update was lost: {balance} instead of {HOT_UPDATES}")
    return HOT_UPDATES / seconds, lost / HOT_UPDATES


async def optimistic(connection: Any, lose: Callable[[], None]) -> None:
    retry = Retry(attempts=10**6, base=0.002, cap=0.1)
    for failures in itertools.count(1):
        row = await connection.fetchrow("select balance, version from accounts where id = 1")
        try:
            await update_versioned(
                connection, "accounts", {"id": 1}, expected=row["version"], set={"balance": row["balance"] + 1}
            )
            return
        except Stale as error:
            lose()
            await asyncio.sleep(retry.delay_seconds(error, failures, random.random()) or 0)


async def locked(connection: Any, lose: Callable[[], None]) -> None:
    async with connection.transaction():
        balance = await connection.fetchval("select balance from accounts where id = 1 for update")
        await connection.execute(UPDATE, 1, balance + 1)


async def run(rounds: int, operations: int) -> tuple[dict[str, list[float]], dict[int, list[list[float]]]]:
    microseconds: dict[str, list[float]] = {contestant: [] for contestant in CONTESTANTS}
    contested: dict[int, list[list[float]]] = {tasks: [] for tasks in HOT_TASKS}
    with Postgres({"shared_buffers": "256MB", "max_wal_size": "4GB"}) as postgres, Valkey() as valkey:
        dsn = postgres.dsn()
        await migrated(dsn, TABLES)
        session = await Session.open(settings_for(dsn, "unused:9092"))
        async with Redis.from_url(valkey.url) as redis:
            bench = Bench(dsn, session, redis, max(1, operations // SLICES))
            for contestant in CONTESTANTS.values():
                await contestant[1](bench)  # plans and scripts are made, once
            for number in range(rounds):
                seconds = dict.fromkeys(CONTESTANTS, 0.0)
                for _, name in itertools.product(range(SLICES), CONTESTANTS):
                    seconds[name] += await CONTESTANTS[name][1](bench)
                for name in CONTESTANTS:
                    microseconds[name].append(seconds[name] / (bench.operations * SLICES) * 1e6)
                for tasks in HOT_TASKS:
                    speed, lost = await hot(dsn, tasks, optimistic)
                    contested[tasks].append([speed, lost, (await hot(dsn, tasks, locked))[0]])
                print(f"round {number + 1} of {rounds}", file=sys.stderr)
        await session.connection.close()
    return microseconds, contested


def tables(seconds: dict[str, list[float]], contested: dict[int, list[list[float]]], operations: int) -> str:
    lines = [
        f"{operations} operations, median of {len(next(iter(seconds.values())))} interleaved rounds, {machine()}, "
        "servers on the same machine.",
        "",
        "| operation | in | µs | lowest | highest | round trips' worth |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    trips = {
        place: next(name for name in seconds if CONTESTANTS[name][0] == place) for place in ("PostgreSQL", "Redis")
    }
    for name, costs in seconds.items():
        place = CONTESTANTS[name][0]
        worth = statistics.median(costs) / statistics.median(seconds[trips[place]])
        lines.append(
            f"| {name} | {place} | {statistics.median(costs):,.0f} | {min(costs):,.0f} | {max(costs):,.0f} | {worth:.1f} |"
        )
    lines += [
        "",
        f"One row, {HOT_UPDATES} updates, each with a COMMIT of its own:",
        "",
        "| writers at a time | `update_versioned`, updates/s | Stale for each update | row lock, updates/s | the row lock is |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for tasks, rounds in contested.items():
        optimist, lost, pessimist = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
        ratio = statistics.median(round[2] / round[0] for round in rounds)
        lines.append(f"| {tasks} | {optimist:,.0f} | {lost:.2f} | {pessimist:,.0f} | {ratio:.1f} times as fast |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--operations", type=int, default=1000)
    given = parser.parse_args()
    print(tables(*asyncio.run(run(given.rounds, given.operations)), given.operations))


if __name__ == "__main__":
    main()
