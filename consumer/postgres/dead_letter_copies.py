"""Reads the dead letters of the open transaction, for the dead-letter topic.

Table: letters_to_publish, where workers of the version before put dead letters on their way. They publish them, too; what the
last of them leaves is taken from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from consumer.outbox.dead_letter_copy import StoredDeadLetter, copy_of
from consumer.outbox.record import Outgoing
from consumer.postgres.protocol import Connection

_COLUMNS = """
select d.dead_letter, h.app, d.handler, h.name, d.id, d.fingerprint, d.topic, d.partition, d."offset", d."timestamp", d.reason,
       d.kind, d.attempts, d.key, d.value, d.header_keys, d.header_values
"""
_NEW = f"""
{_COLUMNS}
from unnest($1::int2[], $2::uuid[], $3::int8[]) with ordinality as o(handler, id, fingerprint, place)
join consumer.dead_letters d using (handler, id, fingerprint) join consumer.handlers h using (handler)
where d.state = 'dead' and d.died_at = now() order by o.place   -- of this transaction
"""
_NUMBERED = f"""
{_COLUMNS}
from consumer.dead_letters d join consumer.handlers h using (handler)
where d.dead_letter = any($1) order by d.topic, d.partition, d."offset", d.dead_letter
"""
_IS_LEFT = """
select exists (select from consumer.letters_to_publish join consumer.dead_letters d using (dead_letter)
               join consumer.handlers h using (handler) where h.app = $1)
"""
_LEFT = f"""
with taken as materialized (
    select p.dead_letter from consumer.letters_to_publish p join consumer.dead_letters d using (dead_letter)
    join consumer.handlers h using (handler)
    where h.app = $1 order by p.dead_letter limit $2 for update of p skip locked
), removed as (
    delete from consumer.letters_to_publish p using taken t where p.dead_letter = t.dead_letter
)
{_COLUMNS}
from taken join consumer.dead_letters d using (dead_letter) join consumer.handlers h using (handler) order by d.dead_letter
"""  # noqa: S608 - a constant of this file
_LEFT_MAX = 20  # a dead letter may have a megabyte


async def of_new(connection: Connection, keys: Sequence[tuple[int, bytes, int]], topic: str) -> list[Outgoing]:
    """Return the copies of dead letters that this transaction has stored.

    keys: (handler number, id, fingerprint). Those that only wait behind another one have none.
    """
    columns = (
        [handler for handler, _, _ in keys],
        [UUID(bytes=id) for _, id, _ in keys],
        [digest for _, _, digest in keys],
    )
    return _copies(await connection.fetch(_NEW, *columns), topic)


async def of_numbers(connection: Connection, numbers: Sequence[int], topic: str) -> list[Outgoing]:
    """Return the copies of dead letters, in the order of their logs."""
    return _copies(await connection.fetch(_NUMBERED, numbers), topic)


async def is_left(connection: Connection, app: str) -> bool:
    """Whether `take_left` may return copies."""
    return bool(await connection.fetchval(_IS_LEFT, app))


async def take_left(connection: Connection, app: str, topic: str) -> list[Outgoing]:
    """Take dead letters that the version before left unpublished.

    The oldest first, at most 20. Those that a worker of that version is publishing are left out.
    """
    return _copies(await connection.fetch(_LEFT, app, _LEFT_MAX), topic)


def _copies(rows: Sequence[Any], topic: str) -> list[Outgoing]:
    return [copy_of(StoredDeadLetter(*tuple(row))._replace(id=row["id"].bytes), topic) for row in rows]
