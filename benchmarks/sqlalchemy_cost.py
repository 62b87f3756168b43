"""What SQLAlchemy costs in a handler, beside tx.execute and tx.defer.

Without Kafka and without the ledger: begin, one call for each message, COMMIT. Contestants take turns; ratios of medians.
Limitations: PostgreSQL is on this machine, where a round trip is short. The longer it is, the less a session costs.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

from harness import migrated, settings_for  # noqa: E402
from sqlalchemy import insert  # noqa: E402
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column  # noqa: E402

from consumer import Tx  # noqa: E402
from consumer.ext.sqlalchemy import session  # noqa: E402
from consumer.local_servers import Postgres  # noqa: E402
from consumer.postgres.session import Session  # noqa: E402
from consumer.transaction.scope import Scope  # noqa: E402

MESSAGES, ROUNDS = 2000, 7
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


async def seconds(connection: Session, handler: Callable[[Tx, int], Awaitable[None]]) -> tuple[float, float]:
    """Wall and CPU seconds of one batch, which is rolled back."""
    began, cpu = time.monotonic(), time.process_time()
    await connection.begin()
    scope = Scope(connection.handler_connection, connection.bulk_writer, connection.connection, connection.preparer)
    for n in range(MESSAGES):
        tx = Tx(scope, None, asyncio.current_task())
        await handler(tx, n)
        assert tx.close()
    await scope.flush()
    count = await connection.connection.fetchval("select count(*) from entries")
    assert count == MESSAGES, count
    taken = time.monotonic() - began, time.process_time() - cpu
    await connection.rollback()
    return taken


async def main() -> None:
    with Postgres({"fsync": "off"}) as server:
        await migrated(server.dsn(), TABLE)
        connection = await Session.open(settings_for(server.dsn(), "127.0.0.1:1", None))
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
        for number in range(ROUNDS + 1):
            for name, handler in CONTESTANTS.items():
                measured = await seconds(connection, handler)
                if number:  # the first round compiles and prepares
                    taken[name].append(measured)
        connection.close()
    first = statistics.median(wall for wall, _ in taken["tx.execute(text)"])
    print(f"{MESSAGES} messages with one statement, median of {ROUNDS}; time as a multiple of tx.execute")
    for name, runs in taken.items():
        wall = statistics.median(wall for wall, _ in runs)
        cpu = statistics.median(cpu for _, cpu in runs)
        print(f"  {name:28} {wall / first:5.2f}   {cpu / MESSAGES * 1e6:6.0f} µs of this process's CPU a message")


if __name__ == "__main__":
    asyncio.run(main())
