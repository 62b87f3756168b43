"""Publishing from web transactions: a worker sends exactly what was committed."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from harness import Place, until, value, working
from outgoing import all_published, check_published, ids, records_of, values
from proxy import Proxy
from publishing_worker import app_of, started

from consumer import App, TransactionMisuse


def name() -> str:
    return f"web-{uuid.uuid4().hex[:8]}"


@asynccontextmanager
async def web(place: Place, count: int = 1) -> AsyncIterator[list[asyncpg.Connection[Any]]]:
    """Connections of a web application."""
    connections = [await asyncpg.connect(place.worker_dsn) for _ in range(count)]
    try:
        yield connections
    finally:
        for connection in connections:
            await connection.close()


async def published(place: Place) -> None:
    """Wait until Kafka has everything that was committed."""

    async def moved() -> bool:
        return bool(await value(place.dsn, "select not exists (select from consumer.outbox_intake)"))

    await until("a worker to move the rows", moved, 60)
    await all_published(place)


async def order(app: App, connection: asyncpg.Connection[Any], out_topic: str, *numbers: int) -> None:
    """Write, and publish in the same transaction."""
    async with connection.transaction(), app.publishing(connection) as out:
        for number in numbers:
            await connection.execute("insert into effects values ($1, 1, 1)", str(number))
            out.publish(out_topic, {"n": number}, key=str(number % 7))


class Fake:
    """A connection whose transaction may be closed."""

    is_open = False

    def is_in_transaction(self) -> bool:
        return self.is_open


@pytest.mark.unit
async def test_invalid_publish_is_refused_at_once() -> None:
    app, fake = App("web", publishes=["out"]), Fake()
    with pytest.raises(TransactionMisuse, match=r"publishing: no transaction is open.*connection\.transaction"):
        async with app.publishing(fake):
            pass
    with pytest.raises(TransactionMisuse, match="a str is no connection of asyncpg"):
        async with app.publishing("postgresql://db"):
            pass
    fake.is_open = True
    async with app.publishing(fake) as out:
        for says, arguments in (
            ("publish: undeclared is not declared", {"topic": "undeclared", "value": b""}),
            ("is too large for out", {"topic": "out", "value": b"x" * 2_000_000}),
            ("reserved", {"topic": "out", "value": b"", "headers": {"message-id": "x"}}),
            ("cannot become JSON", {"topic": "out", "value": object()}),
        ):
            with pytest.raises(TransactionMisuse, match=says):
                out.publish(**arguments)
    with pytest.raises(TransactionMisuse, match="has ended; publish inside of it"):
        out.publish("out", b"")
    with pytest.raises(TransactionMisuse, match="no transaction is open"):
        async with app.publishing(fake) as out:
            out.publish("out", b"")
            fake.is_open = False  # committed inside of the block


async def test_commits_are_published_in_order_while_kafka_comes_and_goes(place: Place, kafka: Any) -> None:
    """Many connections publish, some roll back.

    One worker follows another, and Kafka is silent in between.
    """
    topic, out = await place.topic(partitions=2), await place.topic(partitions=3)
    app = app_of(topic, out, name())

    async with Proxy(kafka.proxied, "kafka", kafka.proxy) as proxy, web(place, 4) as connections:
        settings = place.settings(kafka_bootstrap_servers=f"127.0.0.1:{kafka.proxy}")

        async def orders(connection: asyncpg.Connection[Any], start: int) -> None:
            for number in range(start, start + 60, 3):
                if number % 2:
                    try:
                        await order(app, connection, out, number + 10_000)
                        async with connection.transaction():
                            await order(app, connection, out, number + 20_000)
                            raise ZeroDivisionError
                    except ZeroDivisionError:
                        pass
                await order(app, connection, out, number, number + 1, number + 2)

        async def some(start: int) -> None:
            await asyncio.gather(*[orders(one, start + n * 100) for n, one in enumerate(connections)])

        async with working(app, settings):
            await some(0)
            await published(place)
            proxy.black_hole()
            await some(1000)  # does not wait for Kafka
            proxy.heal()
            await published(place)
        await some(2000)  # with no worker
        async with working(app, settings):
            await published(place)
    first = await check_published(place, out)
    numbers = [record["n"] for record in values(first)]
    effects = sorted(int(row[0]) for row in await place.effects())
    assert sorted(numbers) == effects and len(effects) == 3 * 4 * (60 + 10)
    assert not any(number >= 20_000 for number in numbers)
    for start in range(0, 3000, 1000):  # what one connection committed one after the other, of one key
        for connection in range(4):
            for key in range(7):
                own = [
                    number
                    for number in numbers
                    if start + connection * 100 <= number < start + connection * 100 + 100 and number % 7 == key
                ]
                assert own == sorted(own)


@pytest.mark.parametrize("step", ["commit_sent", "outbox_sent"])
async def test_a_worker_that_dies_is_replaced_by_another(place: Place, tmp_path: Path, step: str) -> None:
    """A worker is killed while it moves or sends rows.

    Its successor repeats what is in doubt, under the same ids.
    """
    topic, out = await place.topic(), await place.topic()
    app = app_of(topic, out, name())
    async with web(place) as [connection]:
        await order(app, connection, out, *range(20))
        process = started(place.settings(), topic, out, app.name, step, 1, tmp_path / "log")
        try:

            async def gone() -> bool:
                return process.poll() is not None

            await until("the worker to die", gone, 60)
        finally:
            process.kill()
            process.wait()
        await order(app, connection, out, *range(20, 40))
        async with working(app, place.settings()):
            await published(place)
    assert [record["n"] for record in values(await check_published(place, out)) if record["n"] % 7 == 3] == list(
        range(3, 40, 7)
    )
    records = await records_of(place.kafka, out)
    assert len(set(ids(records))) == 40 and (step != "outbox_sent" or len(records) > 40)


async def test_rows_are_moved_also_where_another_program_sends_them(place: Place) -> None:
    topic, out = await place.topic(), await place.topic()
    app = app_of(topic, out, name())
    async with web(place) as [connection], working(app, place.settings(outbox_relay="off")):
        await order(app, connection, out, 1, 2)

        async def moved() -> bool:
            return bool(await value(place.dsn, "select count(*) = 2 from consumer.outbox"))

        await until("the rows to be in their stream", moved)
    assert await records_of(place.kafka, out) == []


async def test_a_given_id_is_the_message_id(place: Place) -> None:
    topic, out = await place.topic(), await place.topic()
    app, one = app_of(topic, out, name()), uuid.uuid4()
    async with web(place) as [connection], working(app, place.settings()):
        for _ in range(2):  # a request that came twice
            async with connection.transaction(), app.publishing(connection) as publishing:
                publishing.publish(out, b"x", headers={"h": "v"}, id=one)
                publishing.publish(out, b"y")
        await published(place)
    records = await records_of(place.kafka, out)
    assert [record.value for record in records] == [b"x", b"y"] * 2
    assert ids(records)[0] == ids(records)[2] == str(one) and len(set(ids(records))) == 3
    assert records[0].headers[1:] == (("h", b"v"),)
