"""Debezium in the place of the relay.

Its files fit the tables, and logical decoding gives every row, also of later generations.
"""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Iterator

import asyncpg
import pytest
from harness import ROOT, as_worker, migrated, query, value

from consumer.core.message import Partition
from consumer.local_servers import Postgres
from consumer.outbox.record import Outgoing, OutgoingRecord
from consumer.postgres import outbox

FILES = ROOT / "deploy" / "debezium"
ROUTER = "transforms.outbox."
APP = "shop"
P = Partition("orders", 0)
# Debezium's types of columns, as its event router reads them. It takes a timestamp as INT64, which it makes of a timestamp
# without time zone; created_at has one, is text to Debezium, and would end the connector.
FITS = {
    "table.field.event.id": {"uuid"},
    "table.field.event.key": {"bytea"},
    "table.field.event.payload": {"bytea"},
    "table.field.event.timestamp": {"timestamp without time zone"},
    "route.by.field": {"text"},
}


@pytest.fixture(scope="module")
def logical_server() -> Iterator[Postgres]:
    with Postgres({"fsync": "off", "wal_level": "logical"}) as server:
        yield server


@pytest.fixture
async def dsn(logical_server: Postgres) -> str:
    name = f"outbox_{uuid.uuid4().hex[:8]}"
    await run(logical_server.dsn(), f"create database {name}")
    await migrated(logical_server.dsn(name))
    return logical_server.dsn(name)


def config() -> dict[str, str]:
    return dict(json.loads((FILES / "outbox.json").read_text("utf-8"))["config"])


async def run(dsn: str, sql: str, **settings: str) -> None:
    connection = await asyncpg.connect(dsn, server_settings=settings)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


async def store(dsn: str, *numbers: int) -> None:
    connection = await asyncpg.connect(as_worker(dsn))
    try:
        async with connection.transaction():
            records = [OutgoingRecord("out", n.to_bytes(16), b"k", None if n % 2 else b"v") for n in numbers]
            await outbox.store(connection, APP, [Outgoing(record, P, None, None) for record in records])
    finally:
        await connection.close()


async def test_columns_of_the_connector_exist_with_types_that_its_router_reads(dsn: str) -> None:
    columns = dict(
        await query(
            dsn,
            """select column_name::text, data_type::text from information_schema.columns
               where table_schema = 'consumer' and table_name = 'outbox'""",
        )
    )
    given = config()
    for option, types in FITS.items():
        column = given.get(ROUTER + option)
        assert column is None or columns.get(column) in types, f"{option}: {column} is {columns.get(str(column))}"
    assert given[ROUTER + "route.by.field"] == "topic" and given[ROUTER + "table.field.event.key"] == "key"
    placed = {}
    for placement in given[ROUTER + "table.fields.additional.placement"].split(","):
        column, where, *alias = placement.split(":")
        assert where == "header" and columns[column] in ("text", "uuid"), placement
        placed[(alias or [column])[0]] = column
    # Its id is the message id; what else is sent as a header by the relay and has a column is sent, too.
    assert placed == {"message-id": "id", "traceparent": "traceparent", "tracestate": "tracestate", "ce_type": "type"}
    sql = (FILES / "outbox.sql").read_text("utf-8") + (FILES / "clean.sql").read_text("utf-8")
    for name in (given["publication.name"], given["slot.name"], given["database.user"], given["table.include.list"]):
        assert name in sql
    assert (
        given["predicates.isOutbox.pattern"].replace("\\", "")
        == f"{given['topic.prefix']}.{given['table.include.list']}"
    )


async def test_every_row_is_decoded_once_and_read_generations_are_dropped(dsn: str) -> None:
    await store(dsn, 0)
    await run(dsn, (FILES / "outbox.sql").read_text("utf-8"))
    await query(dsn, "select pg_create_logical_replication_slot('consumer_outbox', 'pgoutput')")
    await store(dsn, 1, 2)
    await query(dsn, "select consumer.turn_outbox(0, 1)")
    await store(dsn, 3)
    await query(dsn, "update accounts set balance = 1 returning 1")  # another table
    decoded = await query(
        dsn,
        """select data from pg_logical_slot_peek_binary_changes('consumer_outbox', null, null, 'proto_version', '1',
                  'publication_names', 'consumer_outbox')""",
    )
    messages = [bytes(row[0]) for row in decoded]
    columns = next(relation(message) for message in messages if message[:1] == b"R" and b"outbox\0" in message)
    names = {message[1:5]: relation(message)[0] for message in messages if message[:1] == b"R"}
    assert {names[message[1:5]] for message in messages if message[:1] == b"I"} == {
        "consumer.outbox"
    }  # not a partition
    assert not any(message[:1] in b"UDT" for message in messages)
    rows = [dict(zip(columns[1:], inserted(message), strict=True)) for message in messages if message[:1] == b"I"]
    assert [uuid.UUID(str(row["id"])).int for row in rows] == [1, 2, 3]
    assert [row["generation"] for row in rows] == ["1", "1", "2"] and [row["seq"] for row in rows] == ["1", "2", "3"]
    assert [(row["topic"], row["value"]) for row in rows] == [("out", None), ("out", "\\x76"), ("out", None)]
    # The first row was there before the slot: the connector's first snapshot reads it, under its own role.
    await run(dsn, "set role debezium; select count(*) from consumer.outbox")

    generations = "select array_agg(generation order by generation) from consumer.outbox_generations"
    clean = (FILES / "clean.sql").read_text("utf-8")
    await query(
        dsn,
        "update consumer.outbox_generations set closed_at = now() - interval '1 h' where generation = 1 returning 1",
    )
    await run(dsn, clean, **{"outbox.wait_seconds": "0"})
    assert await value(dsn, generations) == [1, 2]  # Debezium has not read it
    # The script confirms nothing itself: whatever is written after the connector has confirmed makes it wait again.
    for _ in range(20):
        await query(dsn, "select pg_replication_slot_advance('consumer_outbox', pg_current_wal_insert_lsn())")
        await run(dsn, clean, **{"outbox.wait_seconds": "0"})
        if await value(dsn, generations) == [2]:
            break
    assert await value(dsn, generations) == [2]
    assert await value(dsn, "select count(*) from consumer.outbox") == 1


def relation(message: bytes) -> list[str]:
    """The names of a relation and of its columns.

    The format of the messages: PostgreSQL's documentation, 53.9.
    """
    end = message.index(b"\0", 5)
    after = message.index(b"\0", end + 1)
    names = [f"{message[5:end].decode()}.{message[end + 1 : after].decode()}"]
    at = after + 4  # the replica identity, and how many columns
    for _ in range(struct.unpack(">h", message[after + 2 : after + 4])[0]):
        end = message.index(b"\0", at + 1)
        names.append(message[at + 1 : end].decode())
        at = end + 9
    return names


def inserted(message: bytes) -> list[str | None]:
    """The values of an insert message, as text."""
    values: list[str | None] = []
    at = 8
    for _ in range(struct.unpack(">h", message[6:8])[0]):
        kind = message[at : at + 1]
        at += 1
        if kind == b"n":
            values.append(None)
            continue
        size = struct.unpack(">i", message[at : at + 4])[0]
        values.append(message[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return values
