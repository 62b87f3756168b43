"""Questions about dead letters, for commands.

Reads only; dead_letters.py and dead_letter_actions.py write.

Tables: dead_letters, audit, letter_results.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from consumer.core.message import Partition
from consumer.postgres.dead_letters import SETTLES
from consumer.postgres.protocol import Connection

_MATCHES = """
from consumer.dead_letters d join consumer.handlers h using (handler)
where ($1::text is null or h.app = $1) and ($2::text is null or h.name = $2)
  and ($3::text is null or d.topic = $3) and ($4::text is null or d.reason = $4)
  and ($6::text is null or d.error_group = $6) and ($7::text[] is null or d.state = any($7))
  and ($8::float8 is null or d.died_at < now() - make_interval(secs => $8))
  and ($9::float8 is null or d.died_at > now() - make_interval(secs => $9))
"""
_LIST = (
    """
select d.dead_letter as letter, h.app, h.name as handler, d.id, d.topic, d.partition, d."offset", d.state, d.reason, d.kind,
       d.error_group as group, d.error, d.attempts, d.died_at, octet_length(d.value) as value_bytes
"""
    + _MATCHES
    + """ order by d.dead_letter desc limit $5
"""
)
_GROUPS = (
    """
with groups as (
    select d.error_group, h.app, h.name, d.reason, count(*) as count, min(d.dead_letter) as letter
    """
    + _MATCHES
    + """ group by d.error_group, h.app, h.name, d.reason order by count(*) desc, letter limit $5
)
select g.error_group as group, g.app, g.name as handler, g.reason, d.kind, g.count, g.letter, d.error
from groups g join consumer.dead_letters d on d.dead_letter = g.letter order by g.count desc, g.letter
"""
)
_ACTION = """
select a.entry as action, a.dead_letter as letter, a.at, a.operator, split_part(a.action, ' ', 2) as what, a.result as outcome,
       coalesce(nullif(r.note, ''), a.why) as note, r.new_id, r.new_value
from consumer.audit a left join consumer.letter_results r using (entry)
"""
_ACTIONS_OF = _ACTION + " where a.dead_letter in (select d.dead_letter " + _MATCHES + ") order by a.entry desc limit $5"
_LETTER = """
select d.*, h.app, h.name as handler_name,
       (select count(*) from consumer.dead_letters e where (e.handler, e.chain) = (d.handler, d.chain) and e."offset" > d."offset") as behind,
       (select e.dead_letter from consumer.dead_letters e where (e.handler, e.chain) = (d.handler, d.chain)
        and e."offset" < d."offset" order by e."offset" limit 1) as first
from consumer.dead_letters d join consumer.handlers h using (handler) where d.dead_letter = $1
"""
_BEHIND = """
select e.dead_letter as letter, e."offset", e.state, e.died_at
from consumer.dead_letters d join consumer.dead_letters e on (e.handler, e.chain) = (d.handler, d.chain)
where d.dead_letter = $1 and e."offset" > d."offset" order by e."offset", e.dead_letter limit $2
"""
_ACTIONS = _ACTION + " where a.dead_letter = $1 order by a.entry desc limit $2"
_OPEN = """
select h.name, d.state, count(*) from consumer.dead_letters d join consumer.handlers h using (handler)
where h.app = $1 and d.state in ('dead', 'waiting') group by 1, 2
"""
_ERROR_GROUPS = """
select distinct d.error_group from consumer.dead_letters d join consumer.handlers h using (handler)
where d.error_group is not null and ($1::text is null or h.app = $1) and ($2::text is null or d.error_group = $2)
"""
_ERASABLE = (
    """
select d.dead_letter, d.state in ('dead', 'waiting')
"""
    + _MATCHES
    + """ and ($10::bytea is null or d.key = $10) and d.seal is distinct from '' order by d.dead_letter limit $5
"""
)
_SETTLED_BEFORE = """
select d.dead_letter from consumer.dead_letters d join consumer.handlers h using (handler)
where h.app = $1 and d.state in ('applied', 'discarded') and d.seal is distinct from ''
  and coalesce((select max(a.at) from consumer.audit a where a.dead_letter = d.dead_letter), d.died_at)
      < now() - make_interval(secs => $2)
order by d.dead_letter limit $3
"""
_OPEN_MATCHES = """
from consumer.dead_letters d join consumer.handlers h using (handler)
where h.app = $1 and d.state in ('dead', 'waiting')
  and ($2::int8[] is null or d.dead_letter = any($2)) and ($3::text is null or h.name = $3)
  and ($4::text is null or d.topic = $4) and ($5::text is null or d.reason = $5) and ($6::text is null or d.error_group = $6)
  and ($7::float8 is null or d.died_at < now() - make_interval(secs => $7))
  and ($8::float8 is null or d.died_at > now() - make_interval(secs => $8))
"""
# Of a chain, only those without a dead one before them: the others follow by themselves.
_SELECT = (
    """
select d.dead_letter """
    + _OPEN_MATCHES
    + """
  and ($9 or d.chain is null or not exists (
       select from consumer.dead_letters e where e.handler = d.handler and e.chain = d.chain
          and e."offset" < d."offset" and e.state = 'dead'))
  and ($10 or d.reason <> 'too_old')
order by d.topic, d.partition, d."offset", d.dead_letter
"""
)
_UNSURE = "select count(*) " + _OPEN_MATCHES + " and d.reason = 'too_old'"
_STATES = """
select d.dead_letter, d.state, h.app, h.name,
       (select e.dead_letter from consumer.dead_letters e where e.handler = d.handler and e.chain = d.chain
           and (e."offset", e.dead_letter) < (d."offset", d.dead_letter) and e.state = 'dead'
        order by e."offset", e.dead_letter limit 1), d.reason
from consumer.dead_letters d join consumer.handlers h using (handler) where d.dead_letter = any($1)
"""
# With those that wait before them in their chains: they were added by a replay, and come first.
_SIZES = """
with asked as materialized (select * from unnest($1::int8[]) with ordinality as o(dead_letter, place)),
wanted as (
    select dead_letter, place, false as before from asked
    union all
    select e.dead_letter, min(a.place), true from asked a join consumer.dead_letters d using (dead_letter)
    join consumer.dead_letters e on e.handler = d.handler and e.chain = d.chain and e.state = 'waiting'
        and (e."offset", e.dead_letter) < (d."offset", d.dead_letter)
    where not exists (select from asked b where b.dead_letter = e.dead_letter) group by e.dead_letter
)
select w.dead_letter, w.before, coalesce(octet_length(d.value), 0) + coalesce(octet_length(d.key), 0)
from wanted w left join consumer.dead_letters d using (dead_letter)
order by w.place, not w.before, d."offset", w.dead_letter
"""
_LETTERS = """
select d.*, h.name as handler_name from consumer.dead_letters d join consumer.handlers h using (handler) where d.dead_letter = any($1)
"""
# Of each chain, its first dead letters, in order.
_NEXT = """
select o.place, d.dead_letter, d.state = 'waiting'
from unnest($1::int2[], $2::uuid[]) with ordinality as o(handler, chain, place) cross join lateral (
    select e.dead_letter, e.state, e."offset" from consumer.dead_letters e where e.handler = o.handler and e.chain = o.chain
    order by e."offset", e.dead_letter limit $3) d
order by o.place, d."offset", d.dead_letter
"""
_APPLIED_EDITS = """
select distinct on (d.dead_letter) d.*, r.new_id, r.new_value,
       (select (extract(epoch from l.applied_at) * 1000000)::int8 from consumer.ledger l
        where l.handler = d.handler and l.id = coalesce(r.new_id, d.id) and l.applied_at is not null) as applied_at,
       (extract(epoch from a.at) * 1000000)::int8 as acted_at, a.entry as action
from consumer.audit a join consumer.letter_results r using (entry) join consumer.dead_letters d using (dead_letter)
where d.handler = any($1) and a.action = 'dlq edit' and a.result = 'applied' and d.topic = any($2)
order by d.dead_letter, a.entry desc limit $3
"""
# In one statement, so that an edit which is committed meanwhile has its row.
# A transaction of retries settles the dead letters of a key one after the other, whatever their offsets.
_APPLIED_RETRIES = """
select d.handler, d.topic, d.partition, d."offset", a.entry
from consumer.audit a join consumer.dead_letters d using (dead_letter)
where d.handler = any($1) and a.action = 'dlq retry' and a.result = 'applied' and d.topic = any($2) limit $3
"""
_SEALED_SIZES = """
select d.dead_letter, coalesce(octet_length(d.value), 0)::int8
from consumer.dead_letters d join unnest($2::text[], $3::int4[], $4::int8[], $5::int8[]) as s(topic, partition, first, past)
  on d.topic = s.topic and d.partition = s.partition and d."offset" >= s.first and d."offset" < s.past
where d.handler = any($1) and ($6::bytea is null or d.key = $6) and ($7::uuid[] is null or d.id = any($7))
order by d.dead_letter
"""
_SEALED = """
select dead_letter, handler, id, fingerprint, topic, partition, "offset", "timestamp", key, value, header_keys, header_values, seal
from consumer.dead_letters where dead_letter = any($1) order by dead_letter
"""
_EDITS_UNDER_NEW_IDS = """
select a.entry as action, a.dead_letter, r.new_id, r.new_value, d.handler, d.topic, d.partition, d."offset", d."timestamp", d.key,
       d.header_keys, d.header_values, l.fingerprint, l.applied_at is not null as applied
from consumer.audit a join consumer.letter_results r using (entry) join consumer.dead_letters d using (dead_letter)
join unnest($2::text[], $3::int4[], $4::int8[], $5::int8[]) as s(topic, partition, first, past)
  on d.topic = s.topic and d.partition = s.partition and d."offset" >= s.first and d."offset" < s.past
left join consumer.ledger l on l.handler = d.handler and l.id = r.new_id
where a.result = 'applied' and r.new_id is not null and d.handler = any($1) and a.entry > $8
  and ($6::bytea is null or d.key = $6) and ($7::uuid[] is null or d.id = any($7))
order by a.entry limit $9
"""
# Messages that were claimed although the ledger may have forgotten their row. They may have been applied before.
_TOO_OLD = """
select h.name, d.topic, d.partition, d."offset" from consumer.dead_letters d join consumer.handlers h using (handler)
where d.handler = any($1) and d.topic = any($2) and d.reason = 'too_old' and d.state <> 'applied'
order by 2, 3, 4
"""
_COUNT_SINCE = """
select count(*) from consumer.dead_letters d
join unnest($3::text[], $4::int4[], $5::int8[], $6::int8[]) as s(topic, partition, first, past)
  on d.topic = s.topic and d.partition = s.partition and d."offset" >= s.first and d."offset" < s.past
where d.dead_letter > $1 and d.handler = any($2)
"""
# Settled since: kept as a dead letter, or applied after all (an operator has retried its dead letter).
_SETTLED = f"""
select distinct o.place from unnest($1::int2[], $2::uuid[], $3::int8[], $4::int8[]) as o(handler, id, fingerprint, place)
where exists (select from consumer.dead_letters d
              where (d.handler, d.id, d.fingerprint) = (o.handler, o.id, o.fingerprint) and {SETTLES})
   or exists (select from consumer.ledger l
              where (l.handler, l.id, l.fingerprint) = (o.handler, o.id, o.fingerprint) and l.applied_at is not null)
"""  # noqa: S608 - a constant of dead_letters.py


class Matching(NamedTuple):
    """Which dead letters of any state; None: all.

    The order is that of the statements' parameters.
    """

    app: str | None
    handler: str | None
    topic: str | None
    reason: str | None
    limit: int
    group: str | None = None
    states: Sequence[str] | None = None
    older_than_seconds: float | None = None
    newer_than_seconds: float | None = None


class OpenMatching(NamedTuple):
    """Which open dead letters of an application; None: all.

    The order is that of the statements' parameters.
    """

    app: str
    numbers: Sequence[int] | None
    handler: str | None
    topic: str | None
    reason: str | None
    group: str | None
    older_than_seconds: float | None
    newer_than_seconds: float | None


class Standing(NamedTuple):
    """A dead letter, and the first dead one before it."""

    state: str
    app: str
    handler: str
    first: int | None


class Size(NamedTuple):
    """A dead letter to settle.

    before: it was not asked for, and comes before one that was.
    """

    number: int
    before: bool
    length: int


class Next(NamedTuple):
    """A dead letter of the chain at a place.

    never_ran: it waits and was not tried.
    """

    place: int
    number: int
    never_ran: bool


async def newest(connection: Connection, matching: Matching) -> list[Any]:
    """Return the newest dead letters, without their bytes."""
    return await connection.fetch(_LIST, *matching)


async def groups(connection: Connection, matching: Matching) -> list[Any]:
    """Count dead letters by kind of error, the most frequent first."""
    return await connection.fetch(_GROUPS, *matching)


async def actions_on(connection: Connection, matching: Matching) -> list[Any]:
    """Return what operators did to matching dead letters, the newest first."""
    return await connection.fetch(_ACTIONS_OF, *matching)


async def actions(connection: Connection, number: int, limit: int) -> list[Any]:
    """Return the actions on one dead letter, the newest first."""
    return await connection.fetch(_ACTIONS, number, limit)


async def one(connection: Connection, number: int) -> Any | None:
    """Return a dead letter with its columns and place in its chain."""
    return await connection.fetchrow(_LETTER, number)


async def behind(connection: Connection, number: int, limit: int) -> list[Any]:
    """Return the dead letters that wait behind one, in their order."""
    return await connection.fetch(_BEHIND, number, limit)


async def open_counts(connection: Connection, app: str) -> list[tuple[str, str, int]]:
    """Count open dead letters: handler, state and number of each."""
    return [(row[0], row[1], row[2]) for row in await connection.fetch(_OPEN, app)]


async def error_groups(connection: Connection, app: str | None, group: str | None) -> list[str]:
    """Return the error groups of an application, or only this one.

    app: None for all applications.
    """
    return [row[0] for row in await connection.fetch(_ERROR_GROUPS, app, group)]


async def select(connection: Connection, matching: OpenMatching, *, waiting: bool, too_old: bool) -> array[int]:
    """Return open dead letters in the order of the log.

    waiting: also those behind a dead one of their chain. too_old: also those that may have been applied.
    """
    return array("q", (row[0] for row in await connection.fetch(_SELECT, *matching, waiting, too_old)))


async def count_unsure(connection: Connection, matching: OpenMatching) -> int:
    """Count open dead letters that may have been applied."""
    return int(await connection.fetchval(_UNSURE, *matching))


async def erasable(connection: Connection, matching: Matching, key: bytes | None) -> dict[int, bool]:
    """Return dead letters that are not erased, and whether each is open.

    key: only of messages with this key.
    """
    return dict(await connection.fetch(_ERASABLE, *matching, key))


async def settled_before(connection: Connection, app: str, seconds: float, limit: int) -> list[int]:
    """Return dead letters that were settled so long ago.

    Leaves out erased ones.
    """
    return [row[0] for row in await connection.fetch(_SETTLED_BEFORE, app, seconds, limit)]


async def standings(connection: Connection, numbers: Sequence[int]) -> dict[int, Standing]:
    """Return the states of dead letters, by number."""
    return {row[0]: Standing(*tuple(row)[1:5]) for row in await connection.fetch(_STATES, numbers)}


async def sizes(connection: Connection, numbers: Sequence[int]) -> list[Size]:
    """Return the sizes of dead letters, those before them included.

    Each comes after those that wait before it in its chain.
    """
    return [Size(*row) for row in await connection.fetch(_SIZES, numbers)]


async def whole(connection: Connection, numbers: Sequence[int]) -> dict[int, Any]:
    """Return dead letters with all their columns, by number, without locking them."""
    return {row["dead_letter"]: row for row in await connection.fetch(_LETTERS, numbers)}


async def first_of(connection: Connection, chains: Sequence[tuple[int, UUID]], limit: int) -> list[Next]:
    """Return the first dead letters of chains, at most `limit` of each."""
    handlers, keys = [handler for handler, _ in chains], [chain for _, chain in chains]
    return [Next(*row) for row in await connection.fetch(_NEXT, handlers, keys, limit)]


class Ranges(NamedTuple):
    """Ranges of offsets, as columns."""

    topics: Sequence[str]
    partitions: Sequence[int]
    firsts: Sequence[int]
    ends: Sequence[int]

    @classmethod
    def of(cls, ranges: Sequence[tuple[Partition, int, int]]) -> Ranges:
        """Convert ranges: partition, first offset, end."""
        return cls(
            [partition.topic for partition, _, _ in ranges],
            [partition.partition for partition, _, _ in ranges],
            [first for _, first, _ in ranges],
            [end for _, _, end in ranges],
        )


class Selection(NamedTuple):
    """Which dead letters are read.

    key, ids: only of these, None for all.
    """

    handlers: Sequence[int]
    ranges: Ranges
    key: bytes | None
    ids: Sequence[UUID] | None


async def applied_edits(
    connection: Connection, handlers: Sequence[int], topics: Sequence[str], limit: int
) -> list[Any]:
    """Return edited dead letters that were applied, and when."""
    return await connection.fetch(_APPLIED_EDITS, handlers, topics, limit)


async def applied_retries(
    connection: Connection, handlers: Sequence[int], topics: Sequence[str], limit: int
) -> list[tuple[tuple[int, Partition, int], int]]:
    """Return the places of retried dead letters, with the action.

    A place is a handler, partition and offset.
    """
    rows = await connection.fetch(_APPLIED_RETRIES, handlers, topics, limit)
    return [((row[0], Partition(row[1], row[2]), row[3]), row[4]) for row in rows]


async def sealed_sizes(connection: Connection, of: Selection) -> list[tuple[int, int]]:
    """Return the numbers of the selected dead letters, with their bytes."""
    rows = await connection.fetch(_SEALED_SIZES, of.handlers, *of.ranges, of.key, of.ids)
    return [(row[0], row[1]) for row in rows]


async def sealed(connection: Connection, numbers: Sequence[int]) -> list[Any]:
    """Return the records of dead letters, with their seals."""
    return await connection.fetch(_SEALED, numbers)


async def edits_under_new_ids(connection: Connection, of: Selection, *, after: int, limit: int) -> list[Any]:
    """Return applied edits under new ids, with their ledger rows.

    after: the number of the last action that was returned before.
    """
    return await connection.fetch(_EDITS_UNDER_NEW_IDS, of.handlers, *of.ranges, of.key, of.ids, after, limit)


async def too_old(
    connection: Connection, handlers: Sequence[int], topics: Sequence[str]
) -> list[tuple[str, str, int, int]]:
    """Return the places of dead letters that may have been applied.

    As handler, topic, partition and offset.
    """
    rows = await connection.fetch(_TOO_OLD, handlers, topics)
    return [(row[0], row[1], row[2], row[3]) for row in rows]


async def last_number(connection: Connection) -> int:
    """Return the number of the last dead letter; 0 for none."""
    number: int = await connection.fetchval("select coalesce(max(dead_letter), 0) from consumer.dead_letters")
    return number


async def count_since(connection: Connection, number: int, handlers: Sequence[int], ranges: Ranges) -> int:
    """Count the dead letters of ranges that are younger than this one."""
    count: int = await connection.fetchval(_COUNT_SINCE, number, handlers, *ranges)
    return count


async def settled_places(connection: Connection, keys: Sequence[tuple[int, UUID, int, int]]) -> set[int]:
    """Return the places of messages that are settled.

    keys: handler, id, fingerprint and place of each.
    """
    return {row[0] for row in await connection.fetch(_SETTLED, *map(list, zip(*keys, strict=True)))}
