"""Retries of dead letters without Kafka: inserted by SQL, for an App."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

from harness import as_worker, migrated, query, settings_for

from consumer import App, Message, Reject, RunAgain, Tx
from consumer.core.dead_letters import ordering_key_hash
from consumer.core.identity import fingerprint, message_id
from consumer.core.message import LogRecord
from consumer.dead_letters.edits import Edit
from consumer.dead_letters.retry import DeadLetterRetrier, RetryResult

TOPIC = "orders"
TABLES = """
create table done (n serial, id text not null);   -- no key: doubles must show
create table forbidden (id text);
create table late (id text);
create function clash() returns void language plpgsql as $$ begin raise exception 'met' using errcode = '40001'; end $$;
"""


class Desk:
    """A database with one App, to insert and settle dead letters in."""

    def __init__(self, dsn: str, name: str | None = None) -> None:
        self.dsn = dsn
        self.name = name or f"desk-{uuid4().hex[:8]}"
        self.settings = settings_for(as_worker(dsn), "127.0.0.1:1", None)
        self.faults: dict[str, str] = {}  # id in the payload -> what its handler does
        self.app = self.make()
        self.offset = 0

    def make(self) -> App:
        app = App(self.name)

        @app.handler(TOPIC, name="settle")
        async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
            await self.effect(message.value["id"], tx)

        @app.handler(TOPIC, name="field", message_id="field:id")
        async def field(message: Message[dict[str, Any]], tx: Tx) -> None:
            await self.effect(message.value["id"], tx)

        @app.handler(TOPIC, name="many", batch=10)
        async def many(messages: list[dict[str, Any]], tx: Tx) -> None:
            for message in messages:
                await self.effect(message["id"], tx)

        @app.handler(TOPIC, name="watch", idempotent=False)
        async def watch(message: Message[dict[str, Any]]) -> None:
            if message.value["id"] in self.faults:
                raise ValueError("no screen")

        for handler in app.handlers.values():
            handler.bind({})
        return app

    async def effect(self, id: str, tx: Tx) -> None:
        fault = self.faults.get(id, "")
        if fault.startswith("clean "):  # before any statement of this message
            await self.fail(fault[6:], tx)
        if pause := os.environ.get("TEST_DESK_PAUSE"):
            await asyncio.sleep(float(pause))
        await tx.execute("insert into done (id) values ($1)", id)
        await self.fail(fault, tx)

    async def fail(self, fault: str, tx: Tx) -> None:
        match fault:
            case "again":
                raise RunAgain("not yet")
            case "fails":
                raise ValueError("no account")
            case "rejected":
                raise Reject("not wanted")
            case "right":
                await tx.execute("insert into forbidden values ('x')")
            case "missing":
                await tx.execute("insert into nowhere values ('x')")
            case "conflict":
                await tx.execute("select clash()")
            case "lost":
                await tx.execute("select pg_terminate_backend(pg_backend_pid())")

    async def open(self) -> None:
        await migrated(self.dsn, TABLES)
        await query(self.dsn, 'revoke all on forbidden from "test-worker"')
        retrier = await self.retrier()
        await retrier.session.numbers(self.name, self.app.handlers, [TOPIC])
        retrier.close()

    async def retrier(self, operator: str = "test") -> DeadLetterRetrier:
        return await DeadLetterRetrier.open(self.app, self.settings, operator)

    async def letter(
        self,
        id: str,
        *,
        key: str | None = None,
        handler: str = "settle",
        reason: str = "failed",
        state: str = "dead",
        stored_id: bytes | None = None,
        value: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] | None = None,
        timestamp: int | None = None,
        in_ledger: bool = True,
    ) -> int:
        """Insert a dead letter and its claim, as a worker leaves them."""
        offset, self.offset = self.offset, self.offset + 1
        headers = [("message-id", id.encode())] if headers is None else headers
        body = json.dumps({"id": id}).encode() if value is None else value
        raw_key = None if key is None else key.encode()
        record = LogRecord(TOPIC, 0, offset, 0, raw_key, body, (), "")
        chain = ordering_key_hash("key", record) if reason in ("failed", "behind") else None
        stored = message_id(id.encode()) if stored_id is None else stored_id
        print_ = fingerprint(body)
        number = (
            await query(
                self.dsn,
                """insert into consumer.dead_letters (handler, id, fingerprint, topic, partition, "offset", "timestamp", key, value,
                       header_keys, header_values, reason, error, attempts, state, chain, kind, error_group)
                   select handler, $3, $4, $5, 0, $6, $7, $8, $9, $10, $11, $12, 'it failed', 1, $13, $14, 'ValueError', 'abcdef0123'
                   from consumer.handlers where app = $1 and name = $2 returning dead_letter""",
                self.name, handler, UUID(bytes=stored), print_, TOPIC, offset,
                int(time.time() * 1000) if timestamp is None else timestamp, raw_key, body,
                [name.encode() for name, _ in headers], [text for _, text in headers], reason, state,
                None if chain is None else UUID(bytes=chain),
            )
        )[0][0]  # fmt: skip
        if in_ledger:
            await query(
                self.dsn,
                """insert into consumer.ledger (fingerprint, "offset", applied_at, partition, handler, topic, id)
                   select $3, $4, null, 0, h.handler, t.topic, $5 from consumer.handlers h, consumer.topics t
                   where h.app = $1 and h.name = $2 and t.name = $6 on conflict do nothing""",
                self.name, handler, print_, offset, UUID(bytes=stored), TOPIC,
            )  # fmt: skip
        if chain is not None:
            await query(
                self.dsn,
                """insert into consumer.held select handler, $3, $4, 0 from consumer.handlers where app = $1 and name = $2
                   on conflict do nothing""",
                self.name, handler, UUID(bytes=chain), TOPIC,
            )  # fmt: skip
        return int(number)

    async def many(self, count: int, key: str | None = None, size: int = 0) -> None:
        """Insert dead letters of `settle` with the ids m0, m1, ….

        With a key, the first is failed and the others wait behind it.
        """
        first = await self.letter("m0", key=key)
        await query(
            self.dsn,
            """with made as (
                   insert into consumer.dead_letters (handler, id, fingerprint, topic, partition, "offset", "timestamp", key, value,
                       header_keys, header_values, reason, error, attempts, state, chain, kind, error_group)
                   select handler, gen_random_uuid(), n, topic, partition, "offset" + n, "timestamp", key,
                          convert_to('{"id": "m' || n || '", "pad": "' || repeat('x', $3) || '"}', 'utf8'),
                          '{}', '{}', case when $4 then 'behind' else reason end, error, attempts,
                          case when $4 then 'waiting' else state end, chain, kind, error_group
                   from consumer.dead_letters, generate_series(1, $2::int - 1) n where dead_letter = $1
                   returning handler, id, fingerprint, "offset"
               ) insert into consumer.ledger (fingerprint, "offset", applied_at, partition, handler, topic, id)
               select fingerprint, "offset", null, 0, handler, (select topic from consumer.topics limit 1), id from made""",
            first, count, size, key is not None,
        )  # fmt: skip
        self.offset += count

    async def retry(self, *numbers: int, edit: Edit | None = None, unsure: bool = False) -> list[RetryResult]:
        retrier = await self.retrier()
        try:
            if unsure:
                retrier.allow_unsure()
            return [done async for done in retrier.retry(list(numbers), edit)]
        finally:
            retrier.close()

    async def outcomes(self, *numbers: int, **more: Any) -> list[str]:
        results = await self.retry(*numbers, **more)
        return [result.outcome for result in results]

    async def done(self) -> list[str]:
        return [row[0] for row in await query(self.dsn, "select id from done order by n")]

    async def rows(self) -> list[Any]:
        """Everything that a retry may change, but for the record of actions."""
        return [
            await query(self.dsn, sql)
            for sql in (
                'select handler, id, fingerprint, "offset", applied_at is null from consumer.ledger order by 1, 2',
                "select dead_letter, state, chain, reason, error, attempts, kind, error_group from consumer.dead_letters order by 1",
                "select handler, chain from consumer.held order by 1, 2",
                "select handler, topic, partition, outcome, count from consumer.outcomes where count <> 0 order by 1, 2, 3, 4",
            )
        ]


if "TEST_DESK" in os.environ:  # in the process of a command
    app = Desk("postgresql://nobody@127.0.0.1:1/none", os.environ["TEST_DESK"]).app
