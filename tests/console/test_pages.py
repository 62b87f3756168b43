"""The pages on a real database, and without one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from console_client import Operator, text_of
from harness import execute, query, until
from retry_desk import Desk

from consumer.postgres import grants

ATTACK = "<script>ran=1</script>\u202e\x1b[31m"


@pytest.fixture
async def desk(database: str) -> Desk:
    desk = Desk(database)
    await desk.open()
    return desk


def operator(desk: Desk) -> Operator:
    return Operator.of(desk.app, desk.settings)


async def audit(desk: Desk) -> list[tuple[object, ...]]:
    return await query(
        desk.dsn,
        "select action, dead_letter, operator, result from consumer.audit where app = $1 order by entry",
        desk.name,
    )


@asynccontextmanager
async def watching(client: Operator) -> AsyncIterator[None]:
    """Run the watch, from its first answer of PostgreSQL on."""
    async with client.console.watching():

        async def is_known() -> bool:
            return client.console.places[""].watch.known.status is not None

        await until("the first status", is_known)
        yield


async def test_message_is_shown_on_request_and_that_is_recorded(desk: Desk) -> None:
    first = await desk.letter("m1", key="secret-key", value=b'{"id": "m1", "card": "4111-<b>"}')
    second = await desk.letter("m2", key="secret-key", reason="behind", state="waiting")
    binary = await desk.letter("m3", value=b"\xff\x00", headers=[("trace", ATTACK.encode())])
    client = operator(desk)
    groups = await client.get("/dead-letters")
    assert groups.status == 200 and "abcdef0123" in text_of(groups)
    for page in (
        groups,
        await client.get(f"/dead-letters/{first}"),
        await client.get("/dead-letters?group=abcdef0123"),
    ):
        assert "4111" not in page.body.decode() and "secret-key" not in page.body.decode()
    one = await client.get(f"/dead-letters/{first}")
    assert "1 wait for it" in text_of(one) and f'href="/dead-letters/{second}"' in one.body.decode()
    assert f"waits behind dead letter {first}" in text_of(await client.get(f"/dead-letters/{second}"))
    assert await audit(desk) == []

    shown = await client.post(f"/dead-letters/{first}/message")
    assert (
        "secret-key" in text_of(shown) and "4111-&lt;b&gt;" in shown.body.decode() and "<b>" not in shown.body.decode()
    )
    by = (await audit(desk))[0][2]
    assert await audit(desk) == [("dlq view", first, by, "shown")]
    shown = await client.post(f"/dead-letters/{binary}/message")
    assert "/wA=" in text_of(shown) and "it is not text" in text_of(shown)
    assert "<script>ran" not in shown.body.decode() and not set(shown.body.decode()) & {"\u202e", "\x1b"}
    assert "view shown" in text_of(await client.get(f"/dead-letters/{first}"))
    record = await client.get("/audit?action=dlq+view")
    assert text_of(record).count("dlq view") == 2 + 1 and f'href="/dead-letters/{first}"' in record.body.decode()


async def test_letters_of_another_app_are_not_shown(desk: Desk) -> None:
    other = Desk(desk.dsn)
    session = await other.retrier()
    await session.session.numbers(other.name, other.app.handlers, ["orders"])
    session.close()
    foreign = await other.letter("m1", value=b"of-another-app")
    client = operator(desk)
    for address in (
        f"/dead-letters/{foreign}",
        "/dead-letters/987654321",
        "/dead-letters/9" + "9" * 30,
        "/dead-letters/-1",
    ):
        answer = await client.get(address)
        assert answer.status in (400, 404) and b"of-another-app" not in answer.body
        assert (await client.post(f"{address}/message")).status in (400, 404)
    assert await audit(desk) == [] and await audit(other) == []
    for address in (
        "/audit?action=nothing",
        "/dead-letters?state=nothing",
        "/?shard=nothing",
        "/dead-letters/1/message/more",
    ):
        assert (await client.get(address)).status in (400, 404)


async def test_every_page_answers_while_kafka_is_away(desk: Desk) -> None:
    await desk.letter("m1")
    await execute(
        desk.dsn,
        f"insert into consumer.positions (app, topic, partition, next_offset) values ('{desk.name}', 'orders', 0, 41)",
    )
    client = operator(desk)
    async with watching(client):
        page = await client.get("/")
        assert page.status == 200
        text = text_of(page)
        assert "Kafka does not answer" in text and "Ends and lags are not known yet" in text
        assert "orders 0" in text and "41" in text and "1 to decide on" in text
        for address in ("/handlers", "/dead-letters", "/audit"):
            assert (await client.get(address)).status == 200, address
        assert "Outcomes since the first message" in text_of(await client.get("/handlers"))


async def test_pages_say_what_is_away_without_postgresql(desk: Desk) -> None:
    client = operator(desk)
    settings = client.console.places[""].settings
    async with watching(client):
        watch = client.console.places[""].watch
        gone = settings.at("postgresql://none@127.0.0.1:1/none")
        watch._settings = client.console.places[""].settings = gone

        async def is_noted() -> bool:
            return "PostgreSQL" in watch.known.away

        await until("the loss to be noted", is_noted)
        page = await client.get("/")
        assert page.status == 200 and "PostgreSQL does not answer" in text_of(page)
        assert "What is shown is of" in text_of(page)
        for address in ("/dead-letters", "/dead-letters/1", "/audit"):
            answer = await client.get(address)
            assert answer.status == 503 and "Traceback" not in text_of(answer), address
        watch._settings = client.console.places[""].settings = settings

        async def is_back() -> bool:
            return "PostgreSQL" not in watch.known.away

        await until("it to be back", is_back)
        assert (await client.get("/audit")).status == 200


async def test_reader_sees_figures_and_no_message(desk: Desk) -> None:
    letter = await desk.letter("m1", value=b"4111")
    await execute(
        desk.dsn,
        "do $$ begin create role console_reader login password 'r'; exception when duplicate_object then null; end $$",
    )
    await execute(desk.dsn, grants.as_sql("console_reader", grants.For.READER))
    client = Operator.of(desk.app, desk.settings.at(f"postgresql://console_reader:r@{desk.dsn.rsplit('@', 1)[1]}"))
    async with watching(client):
        assert "1 to decide on" in text_of(await client.get("/"))
        for answer in (
            await client.get(f"/dead-letters/{letter}"),
            await client.post(f"/dead-letters/{letter}/message"),
        ):
            assert answer.status == 409 and "check the role&#x27;s rights" in text_of(answer), text_of(answer)
            assert b"4111" not in answer.body
        assert (await client.get("/audit")).status == 200
