"""Mistakes in an App and around it that a type checker shows."""

from typing import Any

from consumer import App, verify
from consumer.testing import Sent


def connect(connection: Any) -> None: ...


async def lifespan(app: App) -> dict[str, int]:
    return {}


def route(key: bytes | None) -> int:
    return 1


App()  # refused
App("billing", publish=["receipts"])  # refused
App("billing", lifespans=None)  # refused
App("billing", lifespan=lifespan)  # refused
App("billing", connection_init=connect)  # refused
App("billing", decode="json")  # refused
App("billing", encode=3)  # refused
App("billing", shards={"east": "a", "west": "b"}, route=route)  # refused
App("billing", shards=["east", "west"], route=lambda key: "east")  # refused
App("billing", publishes=7)  # refused
Sent("payments", 1, header={})  # refused


async def programs(app: App) -> None:
    await verify(app, "payments", setting=None)  # refused
    async with app.worker({}) as worker:  # refused
        print(worker.healthy)  # refused
    async with app.publishing(None) as out:
        out.publish("receipts")  # refused
