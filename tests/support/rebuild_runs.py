"""Runs rebuilds without the command line, with Apps and messages for them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from harness import Place, Sent, query
from payments_app import QUICK, payment

from consumer import App, Settings, Tx
from consumer.kafka.consumer import KafkaConsumer
from consumer.rebuild.rebuild import rebuild
from consumer.rebuild.result import RebuildResult

Handle = Callable[[Any, Tx], Awaitable[None]]


def message_id(name: str) -> str:
    """The UUID that belongs to a name.

    A rebuild prints UUIDs, and digests of all other ids.
    """
    return str(uuid.uuid5(uuid.NAMESPACE_OID, name))


def uuid_payment(name: str, account: int = 1, amount: int = 10, **more: Any) -> Sent:
    """A payment whose message id is message_id(name)."""
    return payment(name, account, amount, id=message_id(name), **more)


def numbered(count: int = 1, **fields: Any) -> list[Sent]:
    """Messages of one key: dictionaries with `n` from 1 on.

    Their ids are message_id("m1"), message_id("m2") and so on.
    """
    return [Sent({"n": n, **fields}, id=message_id(f"m{n}"), key="k") for n in range(1, count + 1)]


def new_app() -> App:
    """An App without handlers, with a name that no other test has."""
    return App(f"app-{uuid.uuid4().hex[:8]}")


def app_with_handler(topic: str, handle: Handle, **options: Any) -> App:
    """An App with one handler named `handle`, which takes dictionaries."""
    app = new_app()

    @app.handler(topic, **{"name": "handle", "retry": QUICK, **options})
    async def handler(body: dict[str, Any], tx: Tx) -> None:
        await handle(body, tx)

    return app


@asynccontextmanager
async def reader(settings: Settings) -> AsyncIterator[KafkaConsumer]:
    """A Kafka client that reads without a group."""
    source = KafkaConsumer(settings, None)
    await source.start(10)
    try:
        yield source
    finally:
        await source.stop(5)


async def rebuilt(place: Place, app: App, *topics: str, **options: Any) -> RebuildResult:
    """Rebuild from all partitions of the topics, by default of the App."""
    settings = options.pop("settings", None) or place.settings()
    async with reader(settings) as source, app.running():
        partitions = await source.log.partitions(topics or app.topics)
        chosen = [partition for those in partitions.values() for partition in those]
        return await rebuild(app, settings, source, chosen, **options)


async def mark_settled(place: Place, app: App) -> None:
    """Write positions behind everything produced so far, without running a handler."""
    async with reader(place.settings()) as source:
        partitions = await source.log.partitions(app.topics)
        ends = await source.log.ends([partition for those in partitions.values() for partition in those])
    for partition, end in ends.items():
        await query(
            place.dsn,
            "insert into consumer.positions (app, topic, partition, next_offset) values ($1, $2, $3, $4)",
            app.name,
            *partition,
            end,
        )


def differences(result: RebuildResult) -> list[tuple[Any, ...]]:
    """What differs, in short: table, kind, key, and values of columns."""
    return sorted(
        (
            difference["table"].removeprefix("public."),
            difference["kind"],
            tuple(difference["key"].values()),
            tuple((name, both["real"], both["rebuilt"]) for name, both in difference["columns"].items()),
        )
        for difference in result.differences
    )


def unknown_kinds(result: RebuildResult) -> list[str]:
    """The kinds of its reasons for doubt."""
    return [unknown["kind"] for unknown in result.unknown]
