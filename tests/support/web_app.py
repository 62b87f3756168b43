"""A web application with a worker inside, for tests with uvicorn."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from fastapi import FastAPI, Response

from consumer import App, Message, Tx

consumer = App(os.environ["TEST_APP"])


@consumer.handler(os.environ["TEST_TOPIC"])
async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
    await tx.execute("insert into effects values ($1, 1, 1)", message.value["id"])
    if message.value["id"] == "slow":  # the test has a lock on this row until it has sent SIGTERM
        other = await asyncpg.connect(os.environ["CONSUMER_POSTGRES_DSN"])
        try:
            await other.execute("insert into effects values ('started', 1, 1)")
        finally:
            await other.close()
        await asyncio.sleep(1)


@asynccontextmanager
async def lifespan(web: FastAPI) -> AsyncIterator[None]:
    async with consumer.worker() as worker:
        web.state.worker = worker
        yield


web = FastAPI(lifespan=lifespan)


@web.get("/ready")
def ready(response: Response) -> dict[str, Any]:
    health = web.state.worker.health
    response.status_code = 200 if health.ready else 503
    return {"worker": health.state, "batches": health.batches}
