"""Batches that lock the same rows in different orders: every message is applied, and soon."""

from __future__ import annotations

from typing import Any

from harness import Place, Sent, consume_all, value

from consumer import App, Tx


async def test_rows_locked_in_opposite_orders_by_many_lanes_do_not_starve(place: Place) -> None:
    """With whole batches again and again, each deadlock costs a second and hardly any transaction goes through."""
    topic = await place.topic(4)
    app = App("contended")

    @app.handler(topic, name="move")
    async def move(body: dict[str, Any], tx: Tx) -> None:
        first, second = (1, 2) if body["n"] % 2 else (2, 1)
        await tx.execute("update accounts set balance = balance - 1 where id = $1", first)
        await tx.execute("update accounts set balance = balance + 1 where id = $1", second)

    await place.send(topic, *[Sent({"n": n}, id=f"m{n}", partition=n % 4) for n in range(1200)])
    await consume_all(app, place.settings(lanes=4, batch_messages_max=200), seconds=120)
    assert await value(place.dsn, "select sum(balance) from accounts") == 0
    assert await value(place.dsn, "select count(*) from consumer.ledger where applied_at is not null") == 1200
