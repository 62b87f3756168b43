"""What the ledger and the log can tell: counts, positions, one message, dead letters. Reads; changes positions on request.

Knows queries; knows no terminal (cli.py draws). Numbers come from PostgreSQL, the ends of the log from Kafka.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from consumer.app import App
from consumer.core.identity import message_id
from consumer.core.message import Partition
from consumer.core.outcome import Cause
from consumer.kafka import Source

_APPLIED = """
select h.name, count(l.id) from consumer.handlers h
left join consumer.ledger l on l.handler = h.handler and l.applied_at is not null
where h.app = $1 group by h.name
"""
_OUTCOMES = """
select h.name, o.outcome, sum(o.count)::int8 from consumer.outcomes o join consumer.handlers h using (handler)
where h.app = $1 group by h.name, o.outcome
"""
_SHOW = """
select h.app, h.name as handler, t.name as topic, l.partition, l."offset", l.applied_at,
       d.dead_letter, d.reason, d.died_at
from consumer.ledger l
join consumer.handlers h using (handler) join consumer.topics t using (topic)
left join consumer.dead_letters d on d.handler = l.handler and d.id = l.id and d.fingerprint = l.fingerprint
where l.id = $1 order by h.app, h.name
"""
_LETTERS = """
select d.dead_letter, h.app, h.name as handler, d.id, d.topic, d.partition, d."offset", d.reason, d.error, d.attempts,
       d.died_at, octet_length(d.value) as value_bytes
from consumer.dead_letters d join consumer.handlers h using (handler)
where ($1::text is null or h.app = $1) and ($2::text is null or h.name = $2)
  and ($3::text is null or d.topic = $3) and ($4::text is null or d.reason = $4)
order by d.dead_letter desc limit $5
"""
_LETTER = """
select d.*, h.app, h.name as handler_name from consumer.dead_letters d join consumer.handlers h using (handler)
where d.dead_letter = $1
"""


async def handler_counts(connection: Any, app: App) -> dict[str, dict[str, Any]]:
    """Per handler: applied (counted in the ledger), duplicates by cause, dead letters, skipped."""
    found: dict[str, dict[str, Any]] = {
        name: {"applied": 0, "duplicates": {cause.value: 0 for cause in Cause}, "dead_lettered": 0, "skipped": 0}
        for name in app.handlers
    }
    empty: dict[str, Any] = {"applied": 0, "duplicates": {}, "dead_lettered": 0, "skipped": 0}
    for name, count in await connection.fetch(_APPLIED, app.name):
        # A handler that is no longer in the code still has a history.
        if count or name in found:
            found.setdefault(name, {**empty, "duplicates": {}})["applied"] = count
    for name, outcome, count in await connection.fetch(_OUTCOMES, app.name):
        entry = found.setdefault(name, {**empty, "duplicates": {}})
        kind, _, cause = outcome.partition(":")
        if kind == "duplicate":
            entry["duplicates"][cause] = count
        else:
            entry[kind] = count  # dead_lettered, skipped
    return found


async def partition_lags(connection: Any, source: Source, app: App) -> tuple[list[dict[str, Any]], list[str]]:
    """Per partition: position, end of the log, lag; and the topics that do not exist.

    A partition without a position counts from the beginning of the log. `end` is the last stable offset: an open
    transaction of a producer holds it back.
    """
    by_topic = await source.partitions(app.topics)
    partitions = [each for found in by_topic.values() for each in found]
    rows = await connection.fetch(
        "select topic, partition, next_offset from consumer.positions where app = $1", app.name
    )
    positions = {Partition(row[0], row[1]): row[2] for row in rows}
    ends = await source.ends(partitions) if partitions else {}
    begins = await source.beginnings([each for each in partitions if each not in positions]) if partitions else {}
    lags = []
    for each in partitions:
        position, end = positions.get(each), ends[each]
        done = position if position is not None else begins[each]
        lags.append(
            {
                "topic": each.topic,
                "partition": each.partition,
                "position": position,
                "end": end,
                "lag": max(0, end - done),
            }
        )
    return lags, [topic for topic, found in by_topic.items() if not found]


async def find_message(connection: Any, text: str | bytes) -> dict[str, Any]:
    """What is known of a message id: under which key it is kept, and what each handler did with it."""
    key = message_id(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)
    rows = await connection.fetch(_SHOW, UUID(bytes=key))
    return {
        "key": key.hex(),
        "handlers": [
            {
                "app": row["app"],
                "handler": row["handler"],
                "state": "applied" if row["applied_at"] is not None else "dead-lettered",
                "at": (row["applied_at"] or row["died_at"]).isoformat()
                if row["applied_at"] or row["died_at"]
                else None,
                "topic": row["topic"],
                "partition": row["partition"],
                "offset": row["offset"],
                "dead_letter": row["dead_letter"],
                "reason": row["reason"],
            }
            for row in rows
        ],
    }


async def dead_letters(
    connection: Any, app: str | None, handler: str | None, topic: str | None, reason: str | None, limit: int
) -> list[dict[str, Any]]:
    """The newest dead letters, without their bytes."""
    rows = await connection.fetch(_LETTERS, app, handler, topic, reason, limit)
    return [{**dict(row), "id": row["id"].hex, "died_at": row["died_at"].isoformat()} for row in rows]


async def dead_letter(connection: Any, number: int) -> dict[str, Any] | None:
    """One dead letter, whole. Bytes are text where they are UTF-8, else {"base64": …}."""
    row = await connection.fetchrow(_LETTER, number)
    if row is None:
        return None
    return {
        "dead_letter": row["dead_letter"],
        "app": row["app"],
        "handler": row["handler_name"],
        "id": row["id"].hex,
        "topic": row["topic"],
        "partition": row["partition"],
        "offset": row["offset"],
        "timestamp": row["timestamp"],
        "reason": row["reason"],
        "error": row["error"],
        "attempts": row["attempts"],
        "died_at": row["died_at"].isoformat(),
        "key": _shown(row["key"]),
        "headers": [
            [_shown(name), _shown(value)] for name, value in zip(row["header_keys"], row["header_values"], strict=True)
        ],
        "value": _shown(row["value"]),
    }


def _shown(raw: bytes | None) -> str | dict[str, str] | None:
    if raw is None:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


async def move_position(connection: Any, app: str, partition: Partition, offset: int) -> int | None:
    """Set the position of a partition; returns the one before. Running workers notice, and go on from there.

    Ids stay in the ledger: going back applies nothing twice. Going forward skips what lies between, for good.
    """
    async with connection.transaction():
        before: int | None = await connection.fetchval(
            "select next_offset from consumer.positions where (app, topic, partition) = ($1, $2, $3) for update",
            app,
            partition.topic,
            partition.partition,
        )
        await connection.execute(
            """insert into consumer.positions as p (app, topic, partition, next_offset, first_offset) values ($1, $2, $3, $4, $4)
               on conflict (app, topic, partition) do update set next_offset = excluded.next_offset, updated_at = now(),
               first_offset = case when p.first_offset > excluded.first_offset then excluded.first_offset else p.first_offset end""",
            app,
            partition.topic,
            partition.partition,
            offset,
        )
    return before


async def totals(connection: Any, app: App) -> Mapping[str, int]:
    """Applied, duplicates by cause and dead letters of all handlers together: what a progress line shows."""
    counts: Sequence[dict[str, Any]] = list((await handler_counts(connection, app)).values())
    found: dict[str, int] = {"applied": sum(each["applied"] for each in counts)}
    for cause in Cause:
        found[cause.value] = sum(each["duplicates"].get(cause.value, 0) for each in counts)
    return found
