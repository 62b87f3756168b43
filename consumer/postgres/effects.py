"""Intents and results of calls of other systems: the table effects.

An intent is committed before its call. Its row is kept as long as the ledger keeps the message: without it, a later run
would call again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from consumer.postgres.protocol import Connection

# A row that another transaction has committed meanwhile is not visible to this statement: its message waits.
_BEGIN = """
with offered as (
    select * from unnest($1::int2[], $2::uuid[], $3::text[], $4::int8[]) as o(handler, id, key, payload)
), inserted as (
    insert into consumer.effects (handler, id, key, payload) select * from offered order by handler, id
    on conflict do nothing returning handler, id
)
select o.handler, o.id, i.id is not null, coalesce(e.key, o.key),
       coalesce(extract(epoch from clock_timestamp() - e.first_at), 0)::float8, coalesce(e.attempts, 1),
       coalesce(e.payload, o.payload), e.result
from offered o left join inserted i using (handler, id) left join consumer.effects e using (handler, id)
where i.id is not null or e.id is not null
"""
_AGAIN = """
update consumer.effects e set attempts = attempts + 1
from (select e.handler, e.id from consumer.effects e join unnest($1::int2[], $2::uuid[]) as o(handler, id) using (handler, id)
      order by e.handler, e.id for update of e) o
where (e.handler, e.id) = (o.handler, o.id)
"""
_STORE = """
update consumer.effects e set result = o.result, result_at = now()
from unnest($1::int2[], $2::uuid[], $3::bytea[]) as o(handler, id, result)
where (e.handler, e.id) = (o.handler, o.id) and e.result is null
"""
_WITHDRAW = """
delete from consumer.effects e using unnest($1::int2[], $2::uuid[], $3::int4[]) as o(handler, id, attempts)
where (e.handler, e.id, e.attempts) = (o.handler, o.id, o.attempts) and e.result is null
"""
_RESULTS = """
select e.handler, e.id, e.result from unnest($1::int2[], $2::uuid[]) as o(handler, id)
join consumer.effects e using (handler, id) where e.result is not null
"""
_CALLS = """
select h.name as handler, e.id, e.key, e.attempts, e.first_at, e.result_at
from consumer.effects e join consumer.handlers h using (handler) where e.id = any($1::uuid[]) and h.app = $2 order by h.name, e.id
"""
# Results of messages that the ledger does not know any more: a later delivery is too old. Dead letters keep their row of
# the ledger, and calls without a result may still be asked about.
_FORGET = """
delete from consumer.effects where ctid = any(array(
    select e.ctid from consumer.effects e
    where e.first_at <= (select horizon from consumer.ledger_state) and e.result is not null
      and not exists (select from consumer.ledger l where (l.handler, l.id) = (e.handler, e.id))
    limit $1))
"""
_FORGOTTEN_AT_A_TIME = 5000

Key = tuple[int, bytes]  # handler number, message id


async def begin(
    connection: Connection, offers: Sequence[tuple[int, bytes, str, int]]
) -> dict[Key, tuple[bool, str, float, int, int, bytes | None]]:
    """Store intents that are missing; return all that are visible.

    offers: handler number, id, key, fingerprint of the payload. Returns the fields of `effects.steps.Intent`. The caller
    commits before it calls.
    """
    columns = list(zip(*offers, strict=True))
    ids = [UUID(bytes=id) for id in columns[1]]
    rows = await connection.fetch(_BEGIN, columns[0], ids, columns[2], columns[3])
    return {(row[0], row[1].bytes): tuple(row)[2:] for row in rows}


async def count_again(connection: Connection, keys: Sequence[Key]) -> None:
    """Count another call of intents that exist.

    The caller commits before it calls.
    """
    await connection.execute(_AGAIN, *_columns(keys))


async def finish(
    connection: Connection, results: Sequence[tuple[int, bytes, bytes]], withdrawn: Sequence[tuple[int, bytes, int]]
) -> None:
    """Store results, and delete intents whose calls have done nothing.

    results: handler number, id, result. withdrawn: handler number, id, attempts; an intent with more has begun another
    call, and stays.
    """
    if results:
        keys = [(handler, id) for handler, id, _ in results]
        await connection.execute(_STORE, *_columns(keys), [result for *_, result in results])
    if withdrawn:
        keys = [(handler, id) for handler, id, _ in withdrawn]
        await connection.execute(_WITHDRAW, *_columns(keys), [attempts for *_, attempts in withdrawn])


async def results_of(connection: Connection, keys: Sequence[Key]) -> dict[Key, bytes]:
    """Return the results that are known."""
    return {(row[0], row[1].bytes): row[2] for row in await connection.fetch(_RESULTS, *_columns(keys))}


async def calls(connection: Connection, app: str, ids: Sequence[bytes]) -> list[Any]:
    """Return the calls of an application's handlers for message ids.

    Of each: handler, id, key, attempts, first_at and result_at, which is None while the result is not known.
    """
    return await connection.fetch(_CALLS, [UUID(bytes=id) for id in ids], app)


async def forget(connection: Connection) -> None:
    """Delete the results of messages that the ledger has forgotten."""
    while await connection.execute(_FORGET, _FORGOTTEN_AT_A_TIME) == f"DELETE {_FORGOTTEN_AT_A_TIME}":
        pass


def _columns(keys: Sequence[Key]) -> tuple[list[int], list[UUID]]:
    return [handler for handler, _ in keys], [UUID(bytes=id) for _, id in keys]
