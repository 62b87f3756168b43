"""Too few PostgreSQL connections: workers and lanes take turns, and everything proceeds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack
from uuid import uuid4

import asyncpg
import pytest
from harness import Sent, as_worker, fetched, migrated, new_topic, produce, settings_for, until, working
from services import Kafka

from consumer import App, Tx
from consumer.local_servers import Postgres


@pytest.fixture
def small() -> Iterator[Postgres]:
    """A server with seven connections for workers and one for the test.

    PostgreSQL reserves three more.
    """
    with Postgres({"fsync": "off", "max_connections": "11"}) as server:
        yield server


@pytest.mark.timeout(300)
async def test_too_few_connections_are_shared_and_every_partition_proceeds(
    small: Postgres, kafka: Kafka, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "consumer")
    await migrated(small.dsn())
    topic = await new_topic(kafka.bootstrap_servers, 12)
    app_name = f"crowded-{uuid4().hex[:8]}"

    def refusals() -> list[logging.LogRecord]:
        return [record for record in caplog.records if "too few connections" in record.getMessage()]

    async def is_refused() -> bool:
        return bool(refusals())

    def app() -> App:
        app = App(app_name)

        @app.handler(topic)
        async def settle(body: dict[str, str], tx: Tx) -> None:
            # Every lane keeps its connection until one more is refused: twelve lanes want one, and there are seven.
            await until("a refused connection", is_refused, 100)
            tx.defer("insert into effects values ($1, 1, 1)", body["id"])

        return app

    async def send(begin: int) -> None:
        await produce(
            kafka.bootstrap_servers,
            topic,
            [Sent({"id": f"m{n}"}, id=f"m{n}", partition=n % 12) for n in range(begin, begin + 600)],
        )

    # Opened before the workers': those that are refused take even the reserved places for a moment.
    looking = await asyncpg.connect(small.dsn())

    async def all_of(number: int) -> bool:
        return bool(await looking.fetchval("select count(*) from effects") == number)

    settings = settings_for(as_worker(small.dsn()), kafka.bootstrap_servers, None, lanes_max=4, batch_messages_max=20)
    async with AsyncExitStack() as workers:
        running = [await workers.enter_async_context(working(app(), settings)) for _ in range(3)]

        async def is_shared_out() -> bool:
            return all(fetched(worker) == 4 for worker in running)

        await until("four partitions for each worker", is_shared_out, 60)
        await send(0)
        await until("all partitions to proceed", lambda: all_of(600), 120)
        await send(600)
        await until("all of them again", lambda: all_of(1200), 120)
    assert await looking.fetchval("select count(distinct id) from effects") == 1200
    await looking.close()
    assert 1 <= len(refusals()) <= 30  # by each worker when it begins, not by each lane and batch
