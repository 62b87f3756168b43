"""The record of operators' actions.

Table: audit. dead_letter_actions.py writes the entries of dead letters, with what belongs to them.
"""

from __future__ import annotations

import json
from typing import Any

from consumer.core.audit import Entry
from consumer.postgres.dead_letters import storable
from consumer.postgres.protocol import Connection

_RECORD = """
insert into consumer.audit (app, operator, action, why, result, topic, partition, stream, numbers)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9::text::jsonb)
"""
_ENTRIES = """
select entry, at, app, operator, db_user, action, why, result, topic, partition, dead_letter, stream, numbers::text as numbers
from consumer.audit
where (app = $1 or app is null) and ($2::text is null or action = $2 or starts_with(action, $2 || ' '))
  and ($3::float8 is null or at >= to_timestamp($3))
order by entry desc limit $4
"""


async def record(connection: Connection, *entries: Entry) -> None:
    """Record actions, in the transaction that does them where there is one."""
    await connection.executemany(
        _RECORD,
        [
            (
                entry.app,
                storable(entry.by.operator),
                entry.action,
                storable(entry.by.why),
                entry.result,
                entry.topic,
                entry.partition,
                entry.stream,
                json.dumps(entry.numbers),
            )
            for entry in entries
        ],
    )


async def entries(connection: Connection, app: str, action: str | None, since: float | None, limit: int) -> list[Any]:
    """Return the newest entries of an application, and those of all.

    action: one of `known_actions`; since: Unix seconds; None: all.
    """
    return await connection.fetch(_ENTRIES, app, action, since, limit)
