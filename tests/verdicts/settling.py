"""Settles a case by real code.

Real topics, workers in this process, the retry of the command line.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import asyncpg
from harness import working

from consumer import Settings
from consumer.dead_letters.edits import Edit
from consumer.dead_letters.retry import DeadLetterRetrier, Filters
from verdicts.case import Case, Heal, Operate, Send, Settle
from verdicts.drawing import EFFECTS
from verdicts.handlers import Call, Life, Place, app_of
from verdicts.servers import Servers

APP = "verdicts"
_SETTLE_SECONDS = 60.0
_IDLE_SECONDS = 0.4  # without a call: what is open waits for a later phase
# As if a minute had gone by between two transactions.
_APPLIED_AT = "select distinct applied_at from consumer.ledger where applied_at is not null order by applied_at"
_SPREAD = """
with old as (select l.handler, l.id, l.xmin::text as xid from consumer.ledger l where l.applied_at = $1),
moved as (update consumer.ledger l set applied_at = l.applied_at + $2 * interval '1 minute' where l.applied_at = $1)
select distinct xid from old
"""
# A column of each of the handlers' tables that can be set to itself.
_TABLES = """
select format('%I.%I', n.nspname, c.relname), (
    select quote_ident(a.attname) from pg_attribute a
    where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = '' and a.attidentity <> 'a' limit 1)
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.relkind = 'r' and n.nspname not in ('consumer', 'pg_catalog', 'information_schema')
"""
_TIMES = """
select h.name, t.name, l.partition, l."offset", extract(epoch from l.applied_at)::float8 from consumer.ledger l
join consumer.handlers h using (handler) join consumer.topics t on t.topic = l.topic where l.applied_at is not null
"""


class Unsettled(Exception):
    """The case did not come to its end: nothing can be judged."""


def message_id(seed: int, number: int) -> str:
    """The id of a message, as text."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{seed}.{number}"))


@dataclass
class Settled:
    """A settled case.

    applied: the calls that count, in the order of their effects.
    """

    case: Case
    dsn: str
    topics: list[str]
    life: Life
    ends: dict[tuple[str, int], int] = field(default_factory=dict)
    applied: list[tuple[Place, Call]] = field(default_factory=list)
    by_ledger: list[tuple[Place, Call]] = field(default_factory=list)  # in the order that the ledger tells
    times: dict[Place, float] = field(default_factory=dict)  # of their transactions, by the ledger


async def settle(servers: Servers, case: Case, dsn: str, topics: list[str], connection: asyncpg.Connection) -> Settled:
    """Carry out the history of a case. Raises Unsettled."""
    fault = case.fault if case.fault.kind in EFFECTS else None
    life = Life(case, fault) if fault is not None else Life(case)
    done = Settled(case, dsn, topics, life)
    for table in case.tables:
        for statement in (*table.ddl, *table.seeds):
            await connection.execute(statement)
    settings = servers.settings(dsn, lanes_max=case.lanes, batch_messages_max=case.batch)
    began = int(time.time() * 1000) - 600_000
    events = list(case.history)
    while events:
        async with AsyncExitStack() as stack:
            for _ in range(case.workers):
                await stack.enter_async_context(working(app_of(life, APP, topics), settings))
            while events:
                event = events.pop(0)
                if isinstance(event, Send):
                    batch = [event]
                    while events and isinstance(events[0], Send):
                        batch.append(events.pop(0))  # type: ignore[arg-type]
                    await _send(servers, done, batch, began)
                elif isinstance(event, Settle):
                    last = not any(isinstance(event, Send) for event in events)
                    await _wait(connection, done, last)
                    if event.restart and events:
                        break
                elif isinstance(event, Heal):
                    life.healed = True
                else:
                    await _operate(event, done, settings)
    await _read_order(done, connection)
    life.fault = type(life.fault)()
    return done


async def _send(servers: Servers, done: Settled, events: list[Send], began: int) -> None:
    records = []
    for event in events:
        topic = done.topics[event.topic]
        done.ends[topic, event.partition] = done.ends.get((topic, event.partition), 0) + 1
        headers = [("message-id", message_id(done.case.seed, event.id).encode())]
        key = None if event.key is None else event.key.encode()
        value = json.dumps({"m": event.payload}).encode()
        records.append((topic, {"value": value, "key": key, "partition": event.partition, "headers": headers, "timestamp_ms": began + event.at}))  # fmt: skip
    await servers.send(records)


async def _wait(connection: asyncpg.Connection, done: Settled, last: bool) -> None:
    """Wait until the positions reach the ends.

    Before the last message, also until nothing moves any more.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    moved, seen = time.monotonic(), (0, 0)
    while True:
        rows = await connection.fetch("select topic, partition, next_offset from consumer.positions")
        positions = {(row[0], row[1]): row[2] for row in rows}
        if all(positions.get(place, 0) >= end for place, end in done.ends.items()):
            return
        now = time.monotonic()
        now_seen = sum(positions.values()), len(done.life.calls)  # what waits is called again and again
        if now_seen != seen:
            seen, moved = now_seen, now
        if not last and seen[1] and now > moved + _IDLE_SECONDS:
            return
        if now > deadline:
            raise Unsettled(f"not settled within {_SETTLE_SECONDS:g} s: {positions} of {done.ends}")
        await asyncio.sleep(0.01)


async def _operate(event: Operate, done: Settled, settings: Settings) -> None:
    """What an operator does with `consumer dlq`."""
    app = app_of(done.life, APP, done.topics)
    async with app.running():
        retrier = await DeadLetterRetrier.open(app, settings, "operator")
        try:
            letters = list(await retrier.select(Filters(), waiting=event.what == "discard"))[: event.most]
            if event.what == "discard" and letters:
                _, chains = await retrier.discard(letters, "of no use")
                _ = [_result async for _result in retrier.release(chains)]
            elif event.what == "retry":
                _ = [_result async for _result in retrier.retry(letters)]
            elif letters:
                name = f"{done.case.seed}.new{event.payload}"
                new = uuid.uuid5(uuid.NAMESPACE_OID, name).bytes if event.what == "replace" else None
                edit = Edit(json.dumps({"m": event.payload}).encode(), new)
                _ = [_result async for _result in retrier.retry(letters[:1], edit)]
        finally:
            retrier.close()


async def _read_order(done: Settled, connection: asyncpg.Connection) -> None:
    """The calls that count, by the ledger.

    A message that an operator gave a new id has no place in the log.
    """
    if done.case.spread:
        await _spread(connection)
    done.times = times = {Place(*row[:4]): row[4] for row in await connection.fetch(_TIMES)}
    calls = {key: done.life.calls[key] for key in times if key in done.life.calls}
    done.applied = sorted(calls.items(), key=lambda call: call[1].turn)
    turns = {handler.name: n for n, handler in enumerate(done.case.handlers)}
    done.by_ledger = sorted(
        calls.items(), key=lambda call: (times.get(call[0], 0.0), *call[0][1:], turns[call[0].handler])
    )


async def _spread(connection: asyncpg.Connection) -> None:
    """Move the ledger's transactions apart.

    Rows of handlers stay with the ledger rows of their transaction (xmin).
    """
    tables = [tuple(row) for row in await connection.fetch(_TABLES)]
    moments = [row[0] for row in await connection.fetch(_APPLIED_AT)]
    for place, at in reversed(list(enumerate(moments, 1))):
        async with connection.transaction():
            await connection.execute("set local session_replication_role = replica")  # no triggers, no rules
            xids = [row[0] for row in await connection.fetch(_SPREAD, at, place)]
            for table, column in tables:
                if column is not None:
                    await connection.execute(f"update {table} set {column} = {column} where xmin::text = any($1)", xids)
