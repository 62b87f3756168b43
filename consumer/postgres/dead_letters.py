"""Rows of dead letters, held chains and attempts.

For a batch's transaction and, when a partition is opened, outside of one.

**Why asking is enough.** Only the owner of a partition adds holds in it (a zombie is fenced by the positions, in the
same transaction that would add one). So it knows which chains may be held: those in the table when it opened the
partition, and those that it has added since. It asks about these in each transaction (`key_holds`) and about no others,
so a worker without dead letters asks nothing. It may remember too much, which costs a query, but never too little: a
hold whose COMMIT got no answer is detected when the batch runs again, since the claim of its dead letter is lost to a
dead row.

**race: a release.** A transaction that settles dead letters of a chain locks its row FOR UPDATE, settles the first one,
and deletes the row with the last one (dead_letters/retry.py). A worker that has a message of that chain locks the row
FOR SHARE:

- it gets the lock: no dead letter of the chain is settled until the worker's COMMIT. Then its message is one of them, and
  the row stays until that one is settled too;
- the row exists and is locked by a release: BUSY; the message waits for a moment, and others continue;
- no row: the effects of the last dead letter are committed, so the message runs after them: FREE.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from consumer.core.dead_letter_seal import seal
from consumer.core.dead_letters import DeadLetterState, KeyHold, blocks_key, group_of
from consumer.core.delivery import Delivery, SavedAttempts
from consumer.core.message import Partition
from consumer.core.outcome import Dead, Reason
from consumer.postgres.protocol import Connection

# Whether a dead letter d settles its message. One that was retried is applied in the ledger, under its record and, unless it
# was edited, with its payload: a row of this record with other contents was changed.
SETTLES = """(d.state <> 'applied' or not exists (
        select from consumer.ledger l join consumer.topics t on t.topic = l.topic
        where (l.handler, l.id, t.name, l.partition, l."offset") = (d.handler, d.id, d.topic, d.partition, d."offset")
          and (l.applied_at is null or (l.fingerprint <> d.fingerprint and not exists (
              select from consumer.audit a
              where a.dead_letter = d.dead_letter and a.action = 'dlq edit' and a.result = 'applied')))))"""
_LETTER = """
insert into consumer.dead_letters as d (handler, id, fingerprint, topic, partition, "offset", "timestamp", key, value,
       header_keys, header_values, reason, error, attempts, state, chain, kind, error_group, trace, seal)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)
on conflict (handler, id, fingerprint) do update
set state = excluded.state, chain = excluded.chain, reason = excluded.reason, error = excluded.error,
    attempts = excluded.attempts, kind = excluded.kind, error_group = excluded.error_group, trace = excluded.trace,
    died_at = now()
-- Discarded, but its claim was free: its ledger row was dropped with an old generation. So it is open again.
where d.state = 'discarded' and excluded.reason not in ('id_conflict', 'too_old')
"""
_HOLD = """
insert into consumer.held (handler, chain, topic, partition)
select distinct d.handler, d.chain, d.topic, d.partition from unnest($1::int2[], $2::uuid[]) as o(handler, chain)
join consumer.dead_letters d on d.handler = o.handler and d.chain = o.chain
on conflict do nothing
"""
_ASK = """
with asked as materialized (
    select distinct handler, chain from unnest($1::int2[], $2::uuid[]) as o(handler, chain)
), locked as materialized (
    select h.handler, h.chain from consumer.held h
    where (h.handler, h.chain) in (select handler, chain from asked) for share skip locked
)
select a.handler, a.chain,
       exists (select from locked l where (l.handler, l.chain) = (a.handler, a.chain)),
       exists (select from consumer.held h where (h.handler, h.chain) = (a.handler, a.chain))
from asked a
"""
_TRIED = """
insert into consumer.attempts as a (handler, topic, partition, "offset", attempts, due_at)
values ($1, $2, $3, $4, $5, now() + make_interval(secs => $6))
on conflict (handler, topic, partition, "offset") do update set attempts = excluded.attempts, due_at = excluded.due_at
"""
_FORGET = """
delete from consumer.attempts where handler = $1 and topic = $2 and partition = $3 and "offset" = $4
"""
_REPLACE_ERROR = """
update consumer.dead_letters set error = $4 where handler = $1 and id = $2 and fingerprint = $3 and error = $5
"""
_FORGET_ATTEMPTS_IN = """
delete from consumer.attempts where topic = $2 and partition = $3
and handler in (select handler from consumer.handlers where app = $1)
"""
_CHAINS = "select handler, chain, topic, partition from consumer.held where handler = any($1) and topic = any($2)"
_ATTEMPTS = """
select handler, topic, partition, "offset", attempts, greatest(0, extract(epoch from due_at - now()))::float8
from consumer.attempts where handler = any($1) and topic = any($2)
"""
_WITH_DEAD_LETTER = f"""
select o.place from unnest($1::int2[], $2::uuid[], $3::int8[]) with ordinality as o(handler, id, fingerprint, place)
where exists (select from consumer.dead_letters d
              where (d.handler, d.id, d.fingerprint) = (o.handler, o.id, o.fingerprint) and {SETTLES})
"""  # noqa: S608 - a constant of this file
_WITHOUT_DEAD_LETTER = """
select o.place from unnest($1::int2[], $2::uuid[], $3::int8[]) with ordinality as o(handler, id, fingerprint, place)
where not exists (select from consumer.dead_letters d
                  where (d.handler, d.id, d.fingerprint) = (o.handler, o.id, o.fingerprint))
  and not exists (select from consumer.ledger l where (l.handler, l.id, l.fingerprint) =
                  (o.handler, o.id, o.fingerprint) and l.applied_at is not null)
order by o.place
"""


async def store(connection: Connection, dead: Mapping[Delivery, Dead], attempts: Mapping[Delivery, int]) -> None:
    """Store dead letters, and hold the chains of those that failed."""
    letters = [
        _letter(delivery, verdict, attempts.get(delivery, delivery.attempts)) for delivery, verdict in dead.items()
    ]
    await connection.executemany(_LETTER, letters)
    held = [row for row in letters if row[15] is not None]
    if held:
        await connection.execute(_HOLD, [row[0] for row in held], [row[15] for row in held])


async def key_holds(connection: Connection, deliveries: Sequence[Delivery]) -> dict[Delivery, KeyHold]:
    """Return whether dead letters hold the keys of these messages.

    Held keys stay held until the transaction ends.
    """
    chains = [delivery.ordering_key_hash() for delivery in deliveries]
    rows = await connection.fetch(
        _ASK,
        [delivery.handler.number for delivery in deliveries],
        [UUID(bytes=chain) if chain is not None else None for chain in chains],
    )
    holds = {
        (row[0], row[1].bytes): KeyHold.HELD if row[2] else KeyHold.BUSY if row[3] else KeyHold.FREE
        for row in rows
        if row[1] is not None
    }
    return {
        delivery: holds.get((delivery.handler.number, chain), KeyHold.FREE) if chain is not None else KeyHold.FREE
        for delivery, chain in zip(deliveries, chains, strict=True)
    }


async def save_attempts(
    connection: Connection, tried: Mapping[Delivery, tuple[int, float]], settled: Iterable[Delivery]
) -> None:
    """Save the attempts of delayed messages; delete those of settled ones.

    tried: attempts, and seconds until the next.
    """
    if tried:
        await connection.executemany(_TRIED, [(*_place(message), *attempt) for message, attempt in tried.items()])
    if places := [_place(message) for message in settled]:
        await connection.executemany(_FORGET, places)


async def restore(
    connection: Connection, handlers: Sequence[int], positions: Mapping[Partition, int]
) -> tuple[dict[Partition, set[tuple[int, bytes]]], dict[Partition, dict[tuple[int, int], SavedAttempts]]]:
    """Return what a worker needs to open partitions.

    That is the chains that may be held, and the saved attempts by handler number and offset.
    """
    topics = sorted({partition.topic for partition in positions})
    chains: dict[Partition, set[tuple[int, bytes]]] = {}
    tried: dict[Partition, dict[tuple[int, int], SavedAttempts]] = {}
    for handler, chain, topic, partition in await connection.fetch(_CHAINS, handlers, topics):
        chains.setdefault(Partition(topic, partition), set()).add((handler, chain.bytes))
    for handler, topic, number, offset, attempts, seconds in await connection.fetch(_ATTEMPTS, handlers, topics):
        partition = Partition(topic, number)
        if offset >= positions.get(partition, 0):
            tried.setdefault(partition, {})[handler, offset] = SavedAttempts(attempts, seconds)
    return chains, tried


async def with_dead_letter(connection: Connection, deliveries: Sequence[Delivery]) -> list[Delivery]:
    """Return the messages whose id and payload have a dead letter."""
    rows = await connection.fetch(
        _WITH_DEAD_LETTER,
        [delivery.handler.number for delivery in deliveries],
        [UUID(bytes=delivery.id) for delivery in deliveries],
        [delivery.fingerprint for delivery in deliveries],
    )
    return [deliveries[row[0] - 1] for row in rows]


async def without_dead_letter(connection: Connection, keys: Sequence[tuple[int, bytes, int]]) -> list[int]:
    """Return the indexes of keys whose dead letter is missing.

    keys: (handler number, id, fingerprint). A key that was applied later needs none.
    """
    rows = await connection.fetch(
        _WITHOUT_DEAD_LETTER,
        [handler for handler, _, _ in keys],
        [UUID(bytes=id) for _, id, _ in keys],
        [fingerprint for _, _, fingerprint in keys],
    )
    return [row[0] - 1 for row in rows]


async def replace_error(
    connection: Connection, handler: int, id: UUID, fingerprint: int, *, before: str, error: str
) -> None:
    """Replace the error of a dead letter, unless it has changed."""
    await connection.execute(_REPLACE_ERROR, handler, id, fingerprint, error, before)


async def exist(connection: Connection, handler: int) -> bool:
    """Return whether a handler has any dead letter."""
    is_any = await connection.fetchval("select exists (select from consumer.dead_letters where handler = $1)", handler)
    return bool(is_any)


async def forget_attempts_of(connection: Connection, handler: int) -> None:
    """Delete the attempts of a handler's messages."""
    await connection.execute("delete from consumer.attempts where handler = $1", handler)


async def forget_attempts_in(connection: Connection, app: str, partition: Partition) -> None:
    """Delete the attempts of a partition's messages, when its log is another."""
    await connection.execute(_FORGET_ATTEMPTS_IN, app, *partition)


def _place(delivery: Delivery) -> tuple[int, str, int, int]:
    record = delivery.record
    return delivery.handler.number, record.topic, record.partition, record.offset


def storable(text: str) -> str:
    """Replace what PostgreSQL's text cannot hold: NUL and lone surrogates."""
    return text.replace("\x00", "\\0").encode("utf-8", "replace").decode()


def _letter(delivery: Delivery, verdict: Dead, attempts: int) -> tuple[Any, ...]:
    record = delivery.record
    chain = delivery.ordering_key_hash() if blocks_key(verdict) and delivery.handler.idempotent else None
    return (
        delivery.handler.number,
        UUID(bytes=delivery.id),
        delivery.fingerprint,
        record.topic,
        record.partition,
        record.offset,
        record.timestamp,
        record.key,
        record.value,
        [key.encode("utf-8", "surrogateescape") for key, _ in record.headers],
        [value for _, value in record.headers],
        verdict.reason.value,
        storable(verdict.error),
        attempts,
        DeadLetterState.WAITING if verdict.reason is Reason.BEHIND else DeadLetterState.DEAD,
        UUID(bytes=chain) if chain is not None else None,
        storable(verdict.kind),
        group_of(delivery.handler.name, verdict.reason.value, verdict.kind, verdict.error),
        storable(verdict.trace),
        seal(record),
    )
