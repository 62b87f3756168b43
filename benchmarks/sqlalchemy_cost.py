"""What SQLAlchemy costs in a handler, beside tx.execute and tx.defer.

Without Kafka and without the ledger: begin, one call for each message, COMMIT. Contestants take turns; ratios of medians.
"SQLAlchemy alone" is its own session on its own connection, for what of the cost is not this project's.
Limitations: PostgreSQL is on this machine, where a round trip is short; --delay-ms puts a proxy between them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

from harness import migrated, settings_for  # noqa: E402
from sqlalchemy import insert  # noqa: E402
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine  # noqa: E402
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column  # noqa: E402

from consumer import Tx  # noqa: E402
from consumer.ext.sqlalchemy import session  # noqa: E402
from consumer.local_servers import Postgres  # noqa: E402
from consumer.postgres.session import Session  # noqa: E402
from consumer.transaction.scope import Scope  # noqa: E402

ROUNDS = 5
PROXY = ROOT / "tests/support/proxy.py"
TABLE = "create table entries (id int not null, account int not null, amount int not null)"
TEXT = "insert into entries values ($1, $2, $3)"


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "entries"
    id: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[int]
    amount: Mapped[int]


async def execute(tx: Tx, n: int) -> None:
    await tx.execute(TEXT, n, 1, 1)


async def core(tx: Tx, n: int) -> None:
    async with session(tx) as s:
        await s.execute(insert(Entry).values(id=n, account=1, amount=1))


async def orm(tx: Tx, n: int) -> None:
    async with session(tx) as s:
        s.add(Entry(id=n, account=1, amount=1))


async def defer_text(tx: Tx, n: int) -> None:
    tx.defer(TEXT, n, 1, 1)


async def defer_statement(tx: Tx, n: int) -> None:
    tx.defer(insert(Entry).values(id=n, account=1, amount=1))


CONTESTANTS: dict[str, Callable[[Tx, int], Awaitable[None]]] = {
    "tx.execute(text)": execute,
    "session: execute(insert())": core,
    "session: add()": orm,
    "tx.defer(text)": defer_text,
    "tx.defer(insert())": defer_statement,
}


async def alone_core(connection: AsyncConnection, n: int) -> None:
    async with AsyncSession(connection, expire_on_commit=False) as s:
        await s.execute(insert(Entry).values(id=n, account=1, amount=1))


async def alone_orm(connection: AsyncConnection, n: int) -> None:
    async with AsyncSession(connection, expire_on_commit=False) as s:
        s.add(Entry(id=n, account=1, amount=1))
        await s.flush()


ALONE: dict[str, Callable[[AsyncConnection, int], Awaitable[None]]] = {
    "SQLAlchemy alone: execute()": alone_core,
    "SQLAlchemy alone: add()": alone_orm,
}


async def in_handlers(connection: Session, handler: Callable[[Tx, int], Awaitable[None]], messages: int) -> None:
    """Run a batch, which is rolled back."""
    await connection.begin()
    scope = Scope(connection.handler_connection, connection.bulk_writer, connection.connection, connection.preparer)
    for n in range(messages):
        tx = Tx(scope, None, asyncio.current_task())
        await handler(tx, n)
        assert tx.close()
    await scope.flush()
    assert await connection.connection.fetchval("select count(*) from entries") == messages
    await connection.rollback()


async def without_handlers(
    connection: AsyncConnection, work: Callable[[AsyncConnection, int], Awaitable[None]], messages: int
) -> None:
    await connection.begin()
    for n in range(messages):
        await work(connection, n)
    await connection.rollback()


async def timed(run: Awaitable[None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    began, cpu = time.monotonic(), time.process_time()
    await run
    return time.monotonic() - began, time.process_time() - cpu


@asynccontextmanager
async def delayed(dsn: str, port: int, delay_ms: float) -> AsyncIterator[str]:
    """A DSN whose round trips take so much longer."""
    if not delay_ms:
        yield dsn
        return
    pipe = asyncio.subprocess.PIPE
    proxy = await asyncio.create_subprocess_exec(sys.executable, str(PROXY), str(port), stdin=pipe, stdout=pipe)
    assert proxy.stdin and proxy.stdout
    listening = json.loads(await proxy.stdout.readline())["port"]
    proxy.stdin.write(f"latency {delay_ms / 2000}\n".encode())  # each way
    await proxy.stdout.readline()
    yield dsn.replace(f":{port}/", f":{listening}/")
    proxy.stdin.close()
    await proxy.wait()


async def main(messages: int, delay_ms: float) -> None:
    with Postgres({"fsync": "off"}) as server:
        await migrated(server.dsn(), TABLE)
        async with delayed(server.dsn(), server.port, delay_ms) as dsn:
            connection = await Session.open(settings_for(dsn, "127.0.0.1:1", None))
            engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://"))
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in [*CONTESTANTS, *ALONE]}
            async with engine.connect() as own:
                for _ in range(ROUNDS + 1):
                    for name, handler in CONTESTANTS.items():
                        taken[name].append(await timed(in_handlers(connection, handler, messages)))
                    for name, work in ALONE.items():
                        taken[name].append(await timed(without_handlers(own, work, messages)))
            await engine.dispose()
            connection.close()
    measured = {name: runs[1:] for name, runs in taken.items()}  # the first round compiles and prepares
    first = statistics.median(wall for wall, _ in measured["tx.execute(text)"])
    print(f"{messages} messages with one statement, median of {ROUNDS}; time as a multiple of tx.execute")
    for name, runs in measured.items():
        wall = statistics.median(wall for wall, _ in runs)
        cpu = statistics.median(cpu for _, cpu in runs)
        print(f"  {name:28} {wall / first:5.2f}   {cpu / messages * 1e6:6.0f} µs of this process's CPU a message")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=2000, help="in a batch")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="what a round trip takes longer")
    given = parser.parse_args()
    asyncio.run(main(given.messages, given.delay_ms))
