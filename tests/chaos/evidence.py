"""Reads the log, PostgreSQL, Redis, the group's offsets and workers' logs.

It judges nothing, and goes past the proxies where it can. Kafka's clients cannot: the broker names the proxy's port to
them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from chaos.invariants import Effect, Evidence, Forms, Letter, LogEntry, Row
from chaos.second_stage import Published, Received, SecondStage
from chaos.workload import fingerprint
from consumer.core.identity import event_id
from consumer.local_servers import Valkey


def entry(record: Any) -> LogEntry:
    """A record as the judge takes it."""
    headers = dict(record.headers)
    id = headers.get("message-id", b"").decode()
    if "ce_id" in headers:
        id = str(UUID(bytes=event_id(headers["ce_source"], headers["ce_id"])))
    key = (record.key or b"").decode()
    amount: int | None = 0
    may_fail = False
    if record.value is not None:
        try:
            value = json.loads(record.value)
            never = value.get("raises") or value.get("swallows") or value.get("late")
            amount = None if never else value["amount"]
            may_fail = bool(value.get("fails"))
        except ValueError:
            amount = None
    return LogEntry(record.topic, record.partition, record.offset, id, fingerprint(record.value), key, amount, may_fail)


async def read_log(servers: str, topics: Sequence[str], partitions: int) -> tuple[list[LogEntry], list[Any]]:
    """Everything that is committed in the log, and the records themselves.

    Raises KafkaError or TimeoutError.
    """
    consumer = AIOKafkaConsumer(
        bootstrap_servers=servers, isolation_level="read_committed", auto_offset_reset="earliest", group_id=None
    )
    async with asyncio.timeout(60):
        await consumer.start()
        try:
            wanted = [TopicPartition(topic, n) for topic in topics for n in range(partitions)]
            consumer.assign(wanted)
            ends = await consumer.end_offsets(wanted)
            records: list[Any] = []
            left = {partition for partition in wanted if ends[partition] > 0}
            while left:
                for fetched in (await consumer.getmany(timeout_ms=200)).values():
                    records += fetched
                left = {partition for partition in left if await consumer.position(partition) < ends[partition]}
        finally:
            await consumer.stop()
    return [entry(record) for record in records], records


async def no_open_transaction(servers: str, topic: str, partitions: int) -> None:
    """Wait until no transaction is open in the log.

    A broker that was killed ends open transactions some time after its start.
    """
    wanted = [TopicPartition(topic, n) for n in range(partitions)]
    decided = AIOKafkaConsumer(bootstrap_servers=servers, isolation_level="read_committed", group_id=None)
    written = AIOKafkaConsumer(bootstrap_servers=servers, isolation_level="read_uncommitted", group_id=None)
    async with asyncio.timeout(60):
        try:
            await decided.start()
            await written.start()
            while await decided.end_offsets(wanted) != await written.end_offsets(wanted):
                await asyncio.sleep(0.1)
        finally:
            await decided.stop()
            await written.stop()


class Tail:
    """What is in the log so far, read while it grows."""

    def __init__(self, servers: str, topic: str, partitions: int) -> None:
        self._servers = servers
        self._partitions = [TopicPartition(topic, n) for n in range(partitions)]
        self.entries: dict[int, list[LogEntry]] = {n: [] for n in range(partitions)}

    async def run(self) -> None:
        """For ever, through all faults."""
        while True:
            consumer = AIOKafkaConsumer(
                bootstrap_servers=self._servers, isolation_level="read_committed", auto_offset_reset="earliest", group_id=None
            )  # fmt: skip
            try:
                await asyncio.wait_for(consumer.start(), 5)
                consumer.assign(self._partitions)
                for partition in self._partitions:
                    known = self.entries[partition.partition]
                    consumer.seek(partition, known[-1].offset + 1 if known else 0)
                while True:
                    for partition, records in (await consumer.getmany(timeout_ms=300)).items():
                        self.entries[partition.partition] += [entry(record) for record in records]
            except Exception:
                await asyncio.sleep(0.2)
            finally:
                with suppress(Exception):
                    await asyncio.wait_for(consumer.stop(), 3)


async def committed(servers: str, group: str, topic: str) -> dict[int, int] | None:
    """The group's offsets by partition; None when Kafka does not answer now."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers, request_timeout_ms=2000)
    try:
        async with asyncio.timeout(3):
            await admin.start()
            offsets = await admin.list_consumer_group_offsets(group)
        return {
            partition.partition: at.offset
            for partition, at in offsets.items()
            if partition.topic == topic and at.offset >= 0
        }
    except Exception:
        return None
    finally:
        with suppress(Exception):
            await asyncio.wait_for(admin.close(), 2)


_LEDGER = """
select h.name, l.id::text, l.fingerprint, l.applied_at is not null, l.xmin::text::bigint, t.name, l.partition, l."offset"
from consumer.ledger l join consumer.handlers h using (handler) join consumer.topics t using (topic) where h.app = $1
"""
_LETTERS = """
select h.name, d.id::text, d.fingerprint, d.topic, d.partition, d."offset", d.reason, d.state
from consumer.dead_letters d join consumer.handlers h using (handler) where h.app = $1
"""


async def look(connection: asyncpg.Connection, app: str, evidence: Evidence) -> None:
    """What PostgreSQL has, in one snapshot."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        evidence.positions = {
            (row[0], row[1]): row[2]
            for row in await connection.fetch(
                "select topic, partition, next_offset from consumer.positions where app = $1", app
            )
        }
        evidence.ledger = [Row(*row) for row in await connection.fetch(_LEDGER, app)]
        evidence.letters = [Letter(*row) for row in await connection.fetch(_LETTERS, app)]
        evidence.effects = [
            Effect(*row)
            for row in await connection.fetch(
                'select handler, id::text, key, amount, topic, partition, "offset", xid::text::bigint from effects order by seq'
            )
        ]
        evidence.balances = {(row[0], row[1]): row[2] for row in await connection.fetch("select * from balances")}
        evidence.orders = {
            (row[0], row[1], row[2], row[3]): list(row[4]) for row in await connection.fetch("select * from orders")
        }
        evidence.forms = Forms(
            [tuple(row) for row in await connection.fetch("select number, id::text from tickets")],
            [tuple(row) for row in await connection.fetch("select number, id::text from ticket_lines")],
            [tuple(row) for row in await connection.fetch("select key, quantity from stock")],
            [tuple(row) for row in await connection.fetch("select key, id::text from latest")],
            {UUID(str(row[0])): row[1] for row in await connection.fetch("select id, balance from accounts")},
        )
        evidence.outcomes = {
            (row[0], row[1], row[2]): row[3]
            for row in await connection.fetch(
                """select h.name, t.name, o.outcome, sum(o.count)::bigint from consumer.outcomes o
                   join consumer.handlers h using (handler) join consumer.topics t using (topic)
                   where h.app = $1 group by 1, 2, 3""",
                app,
            )
        }


async def published(servers: str, topic: str, partitions: int) -> list[Published]:
    """What is in the output topic."""
    _, records = await read_log(servers, [topic], partitions)
    outgoing = []
    for record in records:
        value = json.loads(record.value)
        body = (value["source"], value["n"], value["key"], value["amount"])
        outgoing.append(Published(record.partition, record.offset, dict(record.headers)["message-id"].decode(), body))
    return outgoing


_STREAMS = """
select p.stopped, s.next_seq = p.next_seq from consumer.outbox_streams s join consumer.outbox_published p using (stream)
where s.app = $1
"""
_RECEIPTS = 'select id::text, source::text, n, key, amount, partition, "offset" from receipts order by seq'
_NEXT_LETTERS = """
select d.id::text from consumer.dead_letters d join consumer.handlers h using (handler) where h.app = $1 || '-next'
"""


async def second_stage(
    connection: asyncpg.Connection, app: str, gathered: Evidence, records: list[Published], *, has_next: bool
) -> tuple[SecondStage, bool]:
    """Return the outbox, and whether all of it is published or stopped.

    Read Kafka before.
    """
    streams = await connection.fetch(_STREAMS, app)
    stage = SecondStage(app, gathered.log, gathered.effects, gathered.edits, records)
    stage.stopped = [row[0] for row in streams if row[0] is not None]
    if has_next:
        rows = await connection.fetch(_RECEIPTS)
        stage.received = [Received(row[0], (row[1], row[2], row[3], row[4]), row[5], row[6]) for row in rows]
        stage.balances = {row[0]: row[1] for row in await connection.fetch("select * from receipt_balances")}
        stage.letters = [row[0] for row in await connection.fetch(_NEXT_LETTERS, app)]
    return stage, all(row[1] or row[0] is not None for row in streams)


async def settled(connection: asyncpg.Connection, app: str, topic: str) -> tuple[dict[int, int], set[Any], set[Any]]:
    """Positions, and what is terminal, in one snapshot.

    Terminal: (handler, id) in the ledger, (handler, id, fingerprint) among the dead letters.
    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        rows = await connection.fetch(
            "select partition, next_offset from consumer.positions where app = $1 and topic = $2", app, topic
        )
        claims = await connection.fetch(
            "select h.name, l.id::text from consumer.ledger l join consumer.handlers h using (handler) where h.app = $1",
            app,
        )
        letters = await connection.fetch(_LETTERS, app)
    positions = {row[0]: row[1] for row in rows}
    return positions, {tuple(row) for row in claims}, {(row[0], row[1], row[2]) for row in letters}


async def marks(valkey: Valkey, epoch: str, app: str) -> set[tuple[str, str, int]]:
    """Handler, id and fingerprint of each mark of this database's epoch."""
    import redis.asyncio as client

    marks: set[tuple[str, str, int]] = set()
    async with client.Redis.from_url(valkey.url) as redis:
        async for key in redis.scan_iter(match=f"consumer:{epoch}:{app}:*"):
            handler = key.decode().split(":")[-2]
            for member in await redis.smembers(key):
                assert isinstance(member, bytes)
                id = member[:16].hex()
                text = f"{id[:8]}-{id[8:12]}-{id[12:16]}-{id[16:20]}-{id[20:]}"
                marks.add((handler, text, int.from_bytes(member[16:24], "big", signed=True)))
    return marks


def events(logs: Sequence[Path]) -> list[dict[str, Any]]:
    """The lines of the workers' logs that are JSON."""
    events = []
    for path in logs:
        for line in path.read_text("utf-8", "replace").splitlines():
            if line.startswith("{"):
                with suppress(ValueError):
                    events.append(json.loads(line))
    return events


def redelivered(lines: Sequence[dict[str, Any]], log: Sequence[LogEntry]) -> int:
    """How many records workers fetched again, by their own logs."""
    there = {(record.topic, record.partition, record.offset) for record in log}
    topics = {record.topic for record in log}
    fetched, distinct = 0, set[tuple[str, int, int]]()
    for line in lines:
        if line.get("event") == "fetched" and line["topic"] in topics:
            fetched += line["count"]
            distinct.update((line["topic"], line["partition"], at) for at in range(line["first"], line["last"] + 1))
    return max(0, fetched - len(distinct & there))  # in between may lie markers, and what was aborted
