"""Handlers' settled offsets, id rules and code, as rows.

Tables: coverage, id_rule_changes, handler_code, and the columns topics, id_rule and legacy of handlers. Limitations:
the rules are in the package handler_records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from consumer.core.message import Partition
from consumer.postgres.protocol import Connection

_END = """
update consumer.coverage set past_offset = greatest(first_offset, $4)
where (topic, partition, handler) = ($1, $2, $3) and past_offset is null
"""
_BEGIN = """
with resumed as (
    update consumer.coverage set past_offset = null
    where (topic, partition, handler, past_offset) = ($1, $2, $3, $4) and why = 'settled' returning 1
)
insert into consumer.coverage (topic, partition, handler, first_offset)
select $1, $2, $3, $4 where not exists (select from resumed)
on conflict (handler, topic, partition, first_offset) do update set past_offset = null, why = 'settled'
"""
_COVER = """
insert into consumer.coverage as c (topic, partition, handler, first_offset, past_offset, why) values ($1, $2, $3, $4, $5, $6)
on conflict (handler, topic, partition, first_offset) do update
set past_offset = case when c.past_offset is not null then greatest(c.past_offset, excluded.past_offset) end
"""
_MOVE_BACK = """
with settling as (
    select c.handler, c.topic, c.partition, c.first_offset from consumer.coverage c
    join consumer.handlers h using (handler)
    where h.app = $1 and (c.topic, c.partition) = ($2, $3) and c.past_offset is null and c.first_offset > $4
), gone as (
    delete from consumer.coverage c using settling s
    where (c.handler, c.topic, c.partition) = (s.handler, s.topic, s.partition) and c.first_offset > $4
)
insert into consumer.coverage (handler, topic, partition, first_offset)
select handler, topic, partition, $4 from settling
on conflict (handler, topic, partition, first_offset) do update set past_offset = null, why = 'settled'
"""
_FORGET_COVERAGE = """
delete from consumer.coverage c using consumer.handlers h
where c.handler = h.handler and h.app = $1 and (c.topic, c.partition) = ($2, $3)
"""
_FORGET_ID_RULES = """
delete from consumer.id_rule_changes c using consumer.handlers h
where c.handler = h.handler and h.app = $1 and (c.topic, c.partition) = ($2, $3)
"""
_COVERAGE = """
select c.handler, c.topic, c.partition, c.first_offset, c.past_offset, c.why
from consumer.coverage c join consumer.handlers h using (handler) where h.app = $1
"""
_RECORD_TOPICS = """
update consumer.handlers h set topics = w.topics
from (select n, string_to_array(t, chr(10)) from unnest($2::text[], $3::text[]) as u(n, t)) as w(name, topics)
where h.app = $1 and h.name = w.name and h.topics is distinct from w.topics
"""
_RECORD_ID_RULES = """
update consumer.handlers h set id_rule = w.rule from unnest($2::text[], $3::text[]) as w(name, rule)
where h.app = $1 and h.name = w.name and h.id_rule is null
"""
_CHANGED_BELOW = """
insert into consumer.id_rule_changes as c (handler, topic, partition, below)
select $1::int2, topic, partition, max(below)
from unnest($2::text[], $3::int4[], $4::int8[]) as settled(topic, partition, below) group by 1, 2, 3
on conflict (handler, topic, partition) do update set below = greatest(c.below, excluded.below)
"""
_ID_RULE_FLOORS = """
select h.name, c.topic, c.partition, c.below from consumer.id_rule_changes c join consumer.handlers h using (handler)
where h.app = $1
"""
_RECORD_CODE = """
insert into consumer.handler_code as c (handler, code, id_code)
select h.handler, w.code, w.id_code from unnest($2::text[], $3::text[], $4::text[]) as w(name, code, id_code)
join consumer.handlers h on h.app = $1 and h.name = w.name
order by h.handler
on conflict (handler, code, id_code) do update set last_seen = greatest(c.last_seen, now())
"""
_CODE = """
select h.name, c.code, c.id_code, (extract(epoch from c.first_seen) * 1000000)::int8,
       (extract(epoch from c.last_seen) * 1000000)::int8
from consumer.handler_code c join consumer.handlers h using (handler) where h.app = $1 order by c.first_seen
"""


class Covered(NamedTuple):
    """A range of offsets that a handler has settled.

    past: None: up to the position.
    """

    handler: int
    partition: Partition
    first: int
    past: int | None
    why: str


class Registered(NamedTuple):
    """A handler as it was registered last."""

    number: int
    topics: Sequence[str]
    legacy: bool


class SeenCode(NamedTuple):
    """Code that a handler ran. first_seen, last_seen: microseconds since 1970."""

    handler: str
    code: str
    id_code: str
    first_seen: int
    last_seen: int


async def end_coverage(connection: Connection, ends: Iterable[tuple[Partition, int, int]]) -> None:
    """End ranges. ends: partition, handler and offset of each."""
    await connection.executemany(_END, [(*partition, handler, offset) for partition, handler, offset in ends])


async def begin_coverage(connection: Connection, begins: Iterable[tuple[Partition, int, int]]) -> None:
    """Begin or resume ranges. begins: partition, handler and offset of each."""
    await connection.executemany(_BEGIN, [(*partition, handler, offset) for partition, handler, offset in begins])


async def cover(connection: Connection, handler: int, ranges: Iterable[tuple[Partition, int, int]], why: str) -> None:
    """Record ranges of a handler.

    ranges: partition, first offset and past offset of each.
    """
    await connection.executemany(_COVER, [(*partition, handler, first, past, why) for partition, first, past in ranges])


async def move_coverage_back(connection: Connection, app: str, partition: Partition, offset: int) -> None:
    """Let the handlers of a partition begin at an earlier offset."""
    await connection.execute(_MOVE_BACK, app, *partition, offset)


async def forget_partition(connection: Connection, app: str, partition: Partition) -> None:
    """Delete what is recorded by the offsets of a partition."""
    await connection.execute(_FORGET_COVERAGE, app, *partition)
    await connection.execute(_FORGET_ID_RULES, app, *partition)


async def coverage(connection: Connection, app: str) -> list[Covered]:
    """Return the ranges of an application's handlers."""
    rows = await connection.fetch(_COVERAGE, app)
    return [
        Covered(handler, Partition(topic, partition), first, past, why)
        for handler, topic, partition, first, past, why in map(tuple, rows)
    ]


async def registered(connection: Connection, app: str) -> dict[str, Registered]:
    """Return an application's handlers by name."""
    rows = await connection.fetch("select name, handler, topics, legacy from consumer.handlers where app = $1", app)
    return {row[0]: Registered(row[1], row[2], row[3]) for row in rows}


async def record_topics(connection: Connection, app: str, topics: Mapping[str, Sequence[str]]) -> None:
    """Record the topics of handlers, by name."""
    names = sorted(topics)
    await connection.execute(_RECORD_TOPICS, app, names, ["\n".join(topics[name]) for name in names])


async def record_id_rules(connection: Connection, app: str, rules: Mapping[str, str]) -> None:
    """Record the id rules of handlers that have none yet, by name."""
    names = sorted(rules)
    await connection.execute(_RECORD_ID_RULES, app, names, [rules[name] for name in names])


async def id_rules(connection: Connection, app: str) -> dict[str, str | None]:
    """Return the id rules of handlers, by name; None: not recorded yet."""
    return dict(await connection.fetch("select name, id_rule from consumer.handlers where app = $1", app))


async def change_id_rule(
    connection: Connection, handler: int, rule: str, below: Sequence[tuple[Partition, int]]
) -> None:
    """Record another id rule.

    below: up to which offsets messages may have ids of an earlier one; the greatest counts.
    """
    columns = (
        [partition.topic for partition, _ in below],
        [partition.partition for partition, _ in below],
        [offset for _, offset in below],
    )
    await connection.execute(_CHANGED_BELOW, handler, *columns)
    await connection.execute("update consumer.handlers set id_rule = $2 where handler = $1", handler, rule)


async def id_rule_floors(connection: Connection, app: str) -> dict[tuple[str, Partition], int]:
    """Return below which offset messages may have ids of an earlier rule.

    By handler and partition.
    """
    rows = await connection.fetch(_ID_RULE_FLOORS, app)
    return {(row[0], Partition(row[1], row[2])): row[3] for row in rows}


async def record_code(connection: Connection, app: str, codes: Sequence[tuple[str, str, str]]) -> None:
    """Record that code runs now.

    codes: name of the handler, code and id code of each.
    """
    columns = zip(*codes, strict=True) if codes else ((), (), ())
    await connection.execute(_RECORD_CODE, app, *map(list, columns))


async def code(connection: Connection, app: str) -> list[SeenCode]:
    """Return the code that an application's handlers ran, the earliest first."""
    return [SeenCode(*row) for row in await connection.fetch(_CODE, app)]


async def forget_handler(connection: Connection, number: int) -> None:
    """Delete the ranges of a handler."""
    await connection.execute("delete from consumer.coverage where handler = $1", number)
