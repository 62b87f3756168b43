"""An App with all its options, and programs that use one."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, assert_type

from consumer import App, Findings, Settings, verify
from consumer.decoders import CloudEvents
from consumer.testing import Sent


async def codecs(connection: Any) -> None: ...


def by_first_byte(key: bytes | None) -> str:
    return "west" if key and key[0] > 127 else "east"


@asynccontextmanager
async def one_resource(app: App) -> AsyncGenerator[object]:
    yield object()


class Upper:
    def encode(self, topic: str, value: Any) -> bytes:
        return str(value).upper().encode()


app = App(
    "billing",
    lifespan=one_resource,
    shards={"east": "env:EAST", "west": "env:WEST"},
    route=by_first_byte,
    publishes={"receipts"},
    connection_init=codecs,
    decode=CloudEvents(mode="binary"),
    encode=Upper(),
)
plain = App("plain", decode=lambda record: record.value, encode=lambda topic, value: (b"", {"kind": "x"}))


async def inside_a_web_application() -> str:
    async with app.worker(Settings(workers=1)) as worker:
        return worker.health.state


async def in_a_web_request(connection: Any) -> None:
    async with app.publishing(connection) as out:
        out.publish("receipts", {"id": 1}, key="1")


async def checked() -> None:
    assert_type(await verify(app, "payments"), Findings)


async def test_a_payment(exactly_once: Any) -> None:
    shop = await exactly_once(app, resources={})
    await shop.deliver(Sent("payments", {"amount": 5}, id=1, key=7))
