"""The code of docs/how-to/decoders.md applies messages as its text says."""

from __future__ import annotations

import gzip
import io
import json
import sys
import types
import uuid
from decimal import Decimal
from typing import Any

import documents
import fastavro
import pytest
from documents import ROOT
from schema_registry import SchemaRegistry

from consumer.testing import ExactlyOnce, Sent

PAGE = ROOT / "docs/how-to/decoders.md"
ID = uuid.UUID(int=5)
SCHEMA = """create table payments (payment_id uuid primary key, amount numeric); create table entries (id text, amount int);
create table orders (id int primary key, total numeric, note text);"""


def app_of(text: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The App of the code with this text."""
    [code] = [block.code for block in documents.blocks(PAGE) if block.language == "python" and text in block.code]
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # where annotations are looked up
    exec(compile(code, str(PAGE), "exec"), page.__dict__)
    return page.app


async def rows(exactly_once: ExactlyOnce, app: Any, sql: str, *messages: Sent) -> list[tuple[Any, ...]]:
    trial = await exactly_once(app, schema=SCHEMA)
    await trial.deliver(*messages)
    return [tuple(row) for row in await trial.fetch(sql)]


async def test_cloudevents_of_the_page(exactly_once: ExactlyOnce, monkeypatch: pytest.MonkeyPatch) -> None:
    event = {"specversion": "1.0", "id": "1", "source": "/s", "type": "com.example.paid"}
    data = {"payment_id": str(ID), "amount": 3}
    sent = Sent("payments", {**event, "data": data}, headers={"content-type": "application/cloudevents+json"})
    assert await rows(exactly_once, app_of("CloudEvents()", monkeypatch), "select * from payments", sent) == [(ID, 3)]


async def test_debezium_of_the_page(exactly_once: ExactlyOnce, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(op: str, lsn: int, before: Any, after: Any) -> Sent:
        source = {"connector": "postgresql", "db": "shop", "table": "orders", "lsn": lsn}
        return Sent(
            "shop.public.orders", {"op": op, "before": before, "after": after, "source": source}, key=str(lsn // 10)
        )

    first, second = {"id": 1, "total": "1.50", "note": "a"}, {"id": 1, "total": "2.50", "note": None}
    messages = [
        change("c", 11, None, first), change("u", 12, first, second), change("c", 21, None, {**first, "id": 2}),
        change("d", 22, {"id": 2, "total": "1.50"}, None), Sent("shop.public.orders", None, key="2"),
    ]  # fmt: skip
    assert await rows(exactly_once, app_of("Debezium()", monkeypatch), "select * from orders", *messages) == [
        (1, Decimal("2.50"), None)
    ]


async def test_a_format_of_its_own_on_the_page(exactly_once: ExactlyOnce, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent("entries", gzip.compress(json.dumps({"id": "a", "amount": 3}).encode()))
    assert await rows(exactly_once, app_of("gzip", monkeypatch), "select * from entries", sent) == [("a", 3)]


async def test_avro_of_the_page(exactly_once: ExactlyOnce, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [
        {"name": "payment_id", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "amount", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
    ]
    schema = {"type": "record", "name": "Payment", "fields": fields}
    with SchemaRegistry() as registry:
        monkeypatch.setenv("CONSUMER_SCHEMA_REGISTRY_URL", registry.url)
        id = registry.add("payments-value", json.dumps(schema))
        registry.add("receipts-value", json.dumps({"type": "record", "name": "Receipt", "fields": fields[:1]}))
        stream = io.BytesIO()
        fastavro.schemaless_writer(stream, fastavro.parse_schema(schema), {"payment_id": ID, "amount": Decimal("3.50")})
        sent = Sent("payments", b"\0" + id.to_bytes(4, "big") + stream.getvalue())
        assert await rows(exactly_once, app_of("Avro()", monkeypatch), "select * from payments", sent) == [
            (ID, Decimal("3.50"))
        ]
