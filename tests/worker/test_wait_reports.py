"""The rows of waiting messages, when a worker gives its partitions up."""

from __future__ import annotations

import asyncio

from harness import Place, drained, query, until
from payments_app import Payment, payment

from consumer import App, Tx
from consumer.worker.worker import Worker


async def test_report_that_runs_at_the_stop_leaves_no_row_of_what_is_settled(place: Place) -> None:
    """The stop waits for the connection that a report uses."""
    topic = await place.topic()
    app = App(f"late-report-{topic}")
    fails = True

    @app.handler(topic)
    async def settle(payment: Payment, tx: Tx) -> None:
        if fails:
            await tx.execute("select * from nowhere")

    await place.send(topic, *[payment(f"p{n}") for n in range(10)])
    worker = Worker(app, place.settings())
    running = asyncio.create_task(worker.run())

    async def reported() -> bool:
        return bool(await query(place.dsn, "select 1 from consumer.waiting"))

    async def given_up() -> bool:
        return not worker.partitions.table.has_assignment

    await until("a row", reported, 60)
    [shard] = worker.shards
    async with shard.control_lock:  # as a report that waits for its answer
        fails = False
        await drained(app, place.settings(), 60)
        assert await reported()
        worker.stop()
        await until("the drain", given_up, 30)
    await asyncio.wait_for(running, 40)
    assert not await reported()
