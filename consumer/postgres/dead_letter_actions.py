"""Locks, settles and records dead letters.

For an operator's transaction. Tables: dead_letters, held, audit, letter_results.
dead_letters.py explains the locks of chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from consumer.core.audit import ActedBy
from consumer.postgres.dead_letters import storable
from consumer.postgres.protocol import Connection

_LOCK_CHAINS = """
select true from consumer.held h where (h.handler, h.chain) in
       (select d.handler, d.chain from consumer.dead_letters d where d.dead_letter = any($1))
order by h.handler, h.chain for update of h
"""
_LOCK = """
select d.dead_letter, d.state, d.chain, d.handler, d.id, d.fingerprint, d.topic, d.partition, d."offset", d.reason, d.error,
       d.attempts, d.kind, d.error_group, h.name as handler_name
from consumer.dead_letters d join consumer.handlers h using (handler)
where d.dead_letter = any($1) order by d.dead_letter for no key update of d skip locked
"""
# Of each chain, the first dead letter that is not in this transaction: those after it must wait.
_OTHERS = """
with part as materialized (select unnest($1::int8[]) as dead_letter),
chains as (select distinct d.handler, d.chain from consumer.dead_letters d join part using (dead_letter) where d.chain is not null)
select c.handler, c.chain, f."offset", f.dead_letter from chains c cross join lateral (
    select e."offset", e.dead_letter from consumer.dead_letters e where e.handler = c.handler and e.chain = c.chain
       and e.dead_letter not in (select p.dead_letter from part p)   -- hashed once, where NOT EXISTS scans part for each
    order by e."offset", e.dead_letter limit 1) f
"""
_UPDATE = """
update consumer.dead_letters d set state = n.state, chain = case when n.stays then d.chain end, reason = n.reason,
       error = n.error, attempts = n.attempts, kind = n.kind, error_group = n.error_group
from unnest($1::int8[], $2::text[], $3::bool[], $4::text[], $5::text[], $6::int4[], $7::text[], $8::text[])
     as n(dead_letter, state, stays, reason, error, attempts, kind, error_group)
where d.dead_letter = n.dead_letter
"""
_RELEASE = """
delete from consumer.held h using unnest($1::int2[], $2::uuid[]) as o(handler, chain)
where (h.handler, h.chain) = (o.handler, o.chain)
  and not exists (select from consumer.dead_letters d where (d.handler, d.chain) = (h.handler, h.chain))
returning h.handler, h.chain
"""
# In their order: a rebuild relies on the numbers of the entries.
_RECORD = """
with actions as materialized (
    select * from unnest($1::int8[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::uuid[], $8::bytea[])
         with ordinality as o(dead_letter, operator, action, result, why, note, new_id, new_value, place)
), recorded as (
    insert into consumer.audit (app, operator, action, why, result, topic, partition, dead_letter)
    select h.app, o.operator, o.action, o.why, o.result, d.topic, d.partition, o.dead_letter
    from actions o join consumer.dead_letters d using (dead_letter) join consumer.handlers h using (handler) order by o.place
    returning entry, dead_letter
)
insert into consumer.letter_results (entry, note, new_id, new_value)
select r.entry, o.note, o.new_id, o.new_value from recorded r join actions o using (dead_letter)
where o.note <> '' or o.new_id is not null or o.new_value is not null
"""

Chain = tuple[int, UUID]  # handler and chain


class Settled(NamedTuple):
    """The new state of a dead letter.

    stays: in its chain, which it blocks or waits in.
    """

    number: int
    state: str
    stays: bool
    reason: str
    error: str
    attempts: int
    kind: str
    error_group: str | None


class Action(NamedTuple):
    """What an operator did to a dead letter.

    action: of ACTIONS in core/audit.py. note: the error of an attempt. new_id, new_value: of an edit.
    """

    number: int
    operator: str
    action: str
    result: str
    why: str
    note: str
    new_id: UUID | None
    new_value: bytes | None


async def lock(connection: Connection, numbers: Sequence[int]) -> dict[int, Any]:
    """Lock the chains of dead letters, then the dead letters; return rows.

    Those that another operator has locked are absent.
    """
    await connection.fetch(_LOCK_CHAINS, numbers)
    return {row["dead_letter"]: row for row in await connection.fetch(_LOCK, numbers)}


async def first_others(connection: Connection, numbers: Sequence[int]) -> dict[Chain, tuple[int, int]]:
    """Return the first other dead letter of each chain.

    As offset and number, by chain.
    """
    return {(row[0], row[1]): (row[2], row[3]) for row in await connection.fetch(_OTHERS, numbers)}


async def settle(connection: Connection, settled: Sequence[Settled]) -> None:
    """Write the new states of dead letters."""
    await connection.execute(_UPDATE, *map(list, zip(*settled, strict=True)))


async def release(connection: Connection, chains: Sequence[Chain]) -> list[Chain]:
    """Unblock the chains that have no dead letter left; return them."""
    rows = await connection.fetch(_RELEASE, [handler for handler, _ in chains], [chain for _, chain in chains])
    return [(row[0], row[1]) for row in rows]


async def record(connection: Connection, actions: Sequence[Action]) -> None:
    """Record what was done to dead letters, one action on each."""
    await connection.execute(_RECORD, *map(list, zip(*actions, strict=True)))


async def erase(connection: Connection, numbers: Sequence[int], by: ActedBy) -> int:
    """Erase the messages of dead letters, and record it.

    Returns how many were not erased before.
    """
    async with connection.transaction():
        erased = [row[0] for row in await connection.fetch("select * from consumer.erase_letters($1)", numbers)]
        actions = [
            Action(number, storable(by.operator), "dlq erase", "erased", storable(by.why), "", None, None)
            for number in sorted(erased)
        ]
        if actions:
            await record(connection, actions)
    return len(erased)
