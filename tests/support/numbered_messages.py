"""Numbered messages, from whose numbers all effects and balances can be computed."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from harness import Sent, query, value

from consumer import App, Tx

PARTITIONS = 4


def numbered_app(topic: str) -> App:
    """An App that stores each number and adds it to an account.

    There are 100 accounts.
    """
    app = App(f"numbered-{uuid.uuid4().hex[:8]}")

    @app.handler(topic)
    async def settle(body: dict[str, int], tx: Tx) -> None:
        tx.defer("insert into effects values ($1, $2, $3)", str(body["n"]), body["n"] % 100, body["n"])
        tx.defer("update accounts set balance = balance + $2 where id = $1", body["n"] % 100, body["n"])

    return app


def messages(numbers: Sequence[int]) -> list[Sent]:
    return [Sent({"n": n}, id=f"m{n}", key=str(n % 100), partition=n % PARTITIONS) for n in numbers]


async def applied(dsn: str) -> list[int]:
    """The numbers that were applied, in order."""
    return sorted(int(row[0]) for row in await query(dsn, "select id from effects"))


async def all_applied_once(dsn: str, numbers: Sequence[int]) -> None:
    """Check effects, balances and claims: each once, and no other."""
    assert await applied(dsn) == sorted(numbers)
    balances = dict(await query(dsn, "select id, balance from accounts where balance <> 0"))
    sums: dict[int, int] = {}
    for n in numbers:
        sums[n % 100] = sums.get(n % 100, 0) + n
    assert balances == {account: total for account, total in sums.items() if total}
    assert await value(dsn, "select count(*) from consumer.ledger where applied_at is not null") == len(numbers)
    assert await value(dsn, "select count(*) from consumer.dead_letters") == 0
