"""When and where messages were applied, for a rebuild.

Reads only, apart from a temporary table. The transaction of the caller gives one snapshot for all questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from consumer.core.message import Partition
from consumer.postgres.protocol import Connection

# Messages that were never applied, and those whose id another payload had. The dead letter of a message that was applied
# later stays.
_DEAD = """
insert into consumer_dead
select handler, id, fingerprint from consumer.ledger where handler = any($1) and applied_at is null
union
select d.handler, d.id, d.fingerprint from consumer.dead_letters d
left join consumer.ledger l on l.handler = d.handler and l.id = d.id
where d.handler = any($1) and (l.handler is null or l.fingerprint <> d.fingerprint)
"""
_ARE_DEAD = """
select place from unnest($1::int4[], $2::uuid[], $3::int8[]) with ordinality as o(handler, id, fingerprint, place)
join pg_temp.consumer_dead using (handler, id, fingerprint)
"""
_ARE_APPLIED = """
select place from unnest($1::int4[], $2::uuid[], $3::int8[]) with ordinality as o(handler, id, fingerprint, place)
join consumer.ledger l on l.handler = o.handler and l.id = o.id
where l.applied_at is not null and l.fingerprint = o.fingerprint
"""
_FACTS = """
select o.place, round(date_part('epoch', l.applied_at) * 1000000)::int8, t.name, l.partition, l."offset",
       l.fingerprint = o.fingerprint as alike
from unnest($1::int4[], $2::uuid[], $3::int8[]) with ordinality as o(handler, id, fingerprint, place)
join consumer.ledger l on l.handler = o.handler and l.id = o.id
join consumer.topics t on t.topic = l.topic
where l.applied_at is not null
"""
# The same, with the times of messages that were applied under their own record apart: nearly always, there are no others.
_TIMES = """
with found as (
    select o.place, round(date_part('epoch', l.applied_at) * 1000000)::int8 as at, t.name, l.partition, l."offset" as number,
           l.fingerprint = o.fingerprint as alike,
           l.fingerprint = o.fingerprint and l."offset" = o.number and l.partition = $5 and t.name = $6 as same
    from unnest($1::int4[], $2::uuid[], $3::int8[], $4::int8[]) with ordinality as o(handler, id, fingerprint, number, place)
    join consumer.ledger l on l.handler = o.handler and l.id = o.id
    join consumer.topics t on t.topic = l.topic
    where l.applied_at is not null
)
select array_agg(place) filter (where same), array_agg(at) filter (where same), array_agg(place) filter (where not same),
       array_agg(at) filter (where not same), array_agg(name) filter (where not same),
       array_agg(partition) filter (where not same), array_agg(number) filter (where not same),
       array_agg(alike) filter (where not same)
from found
"""
_APPLIED_AT_PLACES = """
select count(*) from unnest($1::int4[], $2::text[], $3::int4[], $4::int8[]) as o(handler, topic, partition, "offset")
join consumer.topics t on t.name = o.topic
join consumer.ledger l on l.handler = o.handler and l.topic = t.topic and l.partition = o.partition
                      and l."offset" = o."offset" and l.applied_at is not null
"""
# Positions stop below a message that waits for a retry; messages settled above them count too.
_AHEAD = """
select p.topic, p.partition, max(l."offset") + 1 from consumer.ledger l
join consumer.topics t on t.topic = l.topic
join unnest($1::text[], $2::int4[], $3::int8[]) as p(topic, partition, next_offset)
    on p.topic = t.name and p.partition = l.partition and l."offset" >= p.next_offset
where l.handler = any($4) and l.applied_at is not null group by p.topic, p.partition
"""
# The rows of handlers are updated (a new name, more topics), so alone they are not enough.
_AGE = """
select greatest(max(age(x)), (select max(age(xmin)) from consumer.handlers where handler = any($1))),
       coalesce(bool_or(first <> last), false)
from (select xmin as x, min(applied_at) as first, max(applied_at) as last
      from consumer.ledger where handler = any($1) group by xmin) l
"""


class Offers(NamedTuple):
    """Handlers, ids and fingerprints of messages, as columns."""

    handlers: Sequence[int]
    ids: Sequence[UUID]
    fingerprints: Sequence[int]


class Fact(NamedTuple):
    """A row of the ledger: when and where it was applied.

    is_alike: whether with this payload.
    """

    at: int
    topic: str
    partition: int
    offset: int
    is_alike: bool


class Times(NamedTuple):
    """Places of messages that were applied.

    same: under their own record, with the time. others: under another record or payload, with the row.
    """

    same: list[tuple[int, int]]
    others: list[tuple[int, Fact]]


async def collect_dead(connection: Connection, handlers: Sequence[int]) -> int:
    """Fill the temporary table consumer_dead with messages never applied.

    Returns how many.
    """
    tag = await connection.execute(_DEAD, handlers)
    return int(tag.split()[-1])


async def dead_places(connection: Connection, offers: Offers) -> list[int]:
    """Return the places of messages in consumer_dead."""
    return [row[0] for row in await connection.fetch(_ARE_DEAD, *offers)]


async def applied_places(connection: Connection, offers: Offers) -> list[int]:
    """Return the places of messages that were applied with this payload."""
    return [row[0] for row in await connection.fetch(_ARE_APPLIED, *offers)]


async def facts(connection: Connection, offers: Offers) -> list[tuple[int, Fact]]:
    """Return the places of messages whose id was applied, and how."""
    return [(row[0], Fact(*tuple(row)[1:])) for row in await connection.fetch(_FACTS, *offers)]


async def times(connection: Connection, offers: Offers, offsets: Sequence[int], partition: Partition) -> Times:
    """Return when messages of one partition were applied."""
    places, applied, others, *columns = await connection.fetchrow(
        _TIMES, *offers, offsets, partition.partition, partition.topic
    )
    rows = zip(others or (), *(column or () for column in columns), strict=True)
    return Times(list(zip(places or (), applied or (), strict=True)), [(place, Fact(*fact)) for place, *fact in rows])


async def count_applied_at(connection: Connection, places: Sequence[tuple[int, Partition, int]]) -> int:
    """Count which of these handlers, partitions and offsets were applied."""
    count: int = await connection.fetchval(
        _APPLIED_AT_PLACES,
        [handler for handler, _, _ in places],
        [partition.topic for _, partition, _ in places],
        [partition.partition for _, partition, _ in places],
        [offset for _, _, offset in places],
    )
    return count


async def applied_beyond(
    connection: Connection, positions: Sequence[tuple[Partition, int]], handlers: Sequence[int]
) -> dict[Partition, int]:
    """Return up to where messages beyond these positions were applied."""
    rows = await connection.fetch(
        _AHEAD,
        [partition.topic for partition, _ in positions],
        [partition.partition for partition, _ in positions],
        [offset for _, offset in positions],
        handlers,
    )
    return {Partition(row[0], row[1]): row[2] for row in rows}


async def oldest_age(connection: Connection, handlers: Sequence[int]) -> tuple[int | None, bool]:
    """Return the age of the handlers' first transaction, in transactions.

    Also returns whether a restore has hidden it.
    """
    age, is_restored = await connection.fetchrow(_AGE, handlers)
    return age, is_restored


async def rows_and_ledger(
    connection: Connection, table: str, handlers: Sequence[int], age: int | None
) -> tuple[int, bool]:
    """Count a table's rows that are older than `age`.

    Also returns whether any row was written with a row of the ledger. table: a quoted name.
    """
    older, is_linked = await connection.fetchrow(
        f"select count(*) filter (where age(t.xmin) > $2), "  # noqa: S608 - `table` is quoted
        f"coalesce(bool_or(t.xmin in (select l.xmin from consumer.ledger l where l.handler = any($1))), false) from {table} t",
        handlers,
        age,
    )
    return older, is_linked
