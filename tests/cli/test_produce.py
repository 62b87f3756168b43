"""What `consumer produce` sends is applied once; an interrupted file is counted."""

from __future__ import annotations

import asyncio
import json
import shlex
import uuid
from pathlib import Path
from typing import Any

import documents
import msgspec
import pytest
from aiokafka import AIOKafkaConsumer
from documents import ROOT
from harness import Place, consume_all, consumer, is_one_line, query
from schema_registry import SchemaRegistry

from consumer import App
from consumer.admin.produce import Acknowledged, Line, Producing, Request
from consumer.app_loader import load_app
from consumer.core.errors import CannotTell
from consumer.decoders import Avro

PAGE = ROOT / "docs" / "how-to" / "produce-and-tail.md"
SCHEMA = {"type": "record", "name": "User", "fields": [{"name": "name", "type": "string"}]}


class User(msgspec.Struct):
    name: str


def silently(*_: Any) -> None: ...


async def test_the_page_sends_messages_that_are_applied_once(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic, module = await place.topic(), f"shop_{uuid.uuid4().hex[:8]}"
    blocks = list(documents.blocks(PAGE))
    [code] = [block.code for block in blocks if block.file]
    [lines] = [block.code for block in blocks if block.language == "text" and block.code.startswith("{")]
    (tmp_path / f"{module}.py").write_text(code.replace('"payments"', f'"{topic}"').replace('"shop"', f'"{module}"'))
    (tmp_path / "payments.jsonl").write_text(f"\ufeff{lines}\r\n\n{lines}")

    def run(*arguments: str) -> Any:
        services = {
            "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": place.kafka,
            "CONSUMER_POSTGRES_DSN": place.worker_dsn,
        }
        return consumer(tmp_path, *arguments, **services)

    sent = ""
    for block in (block for block in blocks if block.language == "sh"):
        for line in documents.commands(block):
            names = {"shop:app": f"{module}:app", "payments": topic}
            result = run(*[names.get(word, word) for word in shlex.split(line)[1:]])
            assert result.returncode == 0, (line, result.stderr)
            sent += result.stdout
    assert f"{topic}:0:1 order-2\n4 messages are valid for settle; nothing was sent\n{topic}:0:2 3\n" in sent
    (tmp_path / "bad.jsonl").write_text('{"id": 9, "account": 7, "amount": 1}\n{"id": 10}\n')
    is_one_line(
        run("produce", f"{module}:app", topic, "--file", "bad.jsonl"), "line 2", "missing required field `account`"
    )
    is_one_line(run("produce", f"{module}:app", topic[:-1], "{}"), f"did you mean {topic}?")

    monkeypatch.syspath_prepend(str(tmp_path))
    await consume_all(load_app(f"{module}:app"), place.settings())
    assert await query(place.dsn, "select * from accounts where balance > 0 order by id") == [(7, 26), (8, 2)]
    assert await query(place.dsn, "select * from consumer.dead_letters") == []


async def test_json_becomes_avro_with_the_newest_schema_of_the_topic(place: Place) -> None:
    topic = await place.topic(2)
    app = App("avro", decode=Avro())

    @app.handler(topic)
    async def greet(user: User) -> None: ...

    with SchemaRegistry() as registry:
        registry.add(f"{topic}-value", json.dumps(SCHEMA))
        settings = place.settings(schema_registry_url=registry.url, allow_insecure="registry")
        sent: list[Acknowledged] = []
        for partition, value in ((1, '{"name": "Zoë"}'.encode()), (0, b'{"name": "Al"}')):
            request = Request(topic=topic, lines=[Line(None, value)], partition=partition)
            producing = Producing(app, list(app.handlers.values()), request, settings)
            messages = await producing.prepare(silently)
            await producing.send(messages, sent.append, silently)
    assert [(one.partition, one.offset) for one in sent] == [(1, 0), (0, 0)]
    values = sorted(record.value for record in await records(place.kafka, topic))
    assert [(value[:1], value[5:]) for value in values] == [(b"\0", b"\x04Al"), (b"\0", b"\x08Zo\xc3\xab")]


async def test_an_interrupted_file_says_how_many_were_acknowledged(place: Place) -> None:
    topic = await place.topic()
    app = App("interrupted")

    @app.handler(topic)
    async def settle(payment: dict[str, int]) -> None: ...

    lines = [Line(number, msgspec.json.encode({"id": number})) for number in range(1, 2001)]
    handlers = list(app.handlers.values())
    producing = Producing(app, handlers, Request(topic=topic, lines=lines), place.settings())
    messages = await producing.prepare(silently)

    async def send() -> None:
        task = asyncio.current_task()
        assert task is not None

        def acknowledged(sent: Acknowledged) -> None:
            if sent.offset == 499:
                task.cancel()  # as Ctrl-C does

        await producing.send(messages, acknowledged, silently)

    with pytest.raises(CannotTell, match=r"of 2,000 messages were acknowledged") as ended:
        await asyncio.create_task(send())
    known = int(str(ended.value).split()[0].replace(",", ""))
    unsure = int(str(ended.value).split(", and ")[1].split()[0]) if ", and " in str(ended.value) else 0
    assert known >= 500
    there = await records(place.kafka, topic)
    assert known <= len(there) <= known + unsure < 2000
    assert [json.loads(record.value)["id"] for record in there] == list(range(1, len(there) + 1))


async def records(kafka: str, topic: str) -> list[Any]:
    """All records of a topic."""
    reader = AIOKafkaConsumer(topic, bootstrap_servers=kafka, auto_offset_reset="earliest")
    await reader.start()
    try:
        ends = await reader.end_offsets(reader.assignment())
        read: list[Any] = []
        while len(read) < sum(ends.values()):
            for part in (await reader.getmany(timeout_ms=500)).values():
                read += part
        return read
    finally:
        await reader.stop()
