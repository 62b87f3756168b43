"""Records which offsets each handler has settled, and renames handlers. Knows the ledger's tables; handler_records/settled_ranges.py decides.

A position names the handlers that settle from it on, and moves only for a worker that has exactly these. A worker with
others ends and begins stretches at the position when it opens the partition: per assignment, never per batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.core.message import Partition
from consumer.handler_records.settled_ranges import (
    Assessment,
    At,
    Changes,
    Gap,
    Known,
    Stretch,
    as_numbers,
    assess,
    changes,
)

_LOCK = """
select p.topic, p.partition, p.first_offset, p.next_offset, p.handlers
from consumer.positions p join unnest($2::text[], $3::int4[]) as w(topic, partition) using (topic, partition)
where p.app = $1 order by p.topic, p.partition for update of p
"""
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
_REGISTER = """
update consumer.handlers h set topics = w.topics
from (select n, string_to_array(t, chr(10)) from unnest($2::text[], $3::text[]) as u(n, t)) as w(name, topics)
where h.app = $1 and h.name = w.name and h.topics is distinct from w.topics
"""


class Picture(NamedTuple):
    """What the ledger records of an application's handlers."""

    known: Mapping[str, Known]
    positions: Mapping[Partition, At]
    stretches: Mapping[tuple[int, Partition], list[Stretch]]
    declared: Mapping[tuple[int, Partition], list[Stretch]]  # that a handler need not settle
    began_with_group: Mapping[Partition, int]  # where the application began at another client's commit

    def assess(self, app: App) -> Assessment:
        """What the App's handlers have missed."""
        return assess(topics_of(app), self.known, self.positions, self.stretches)


def topics_of(app: App) -> dict[str, tuple[str, ...]]:
    """The topics of the handlers that keep ledger rows."""
    return {each.name: tuple(each.topics) for each in app.handlers.values() if each.idempotent}


async def register(connection: Any, app: App) -> None:
    """Record the topics of the App's handlers, by which a renamed one is recognised."""
    found = sorted(topics_of(app).items())
    await connection.execute(_REGISTER, app.name, [name for name, _ in found], ["\n".join(each) for _, each in found])


async def switch(connection: Any, app: str, wanted: Mapping[Partition, str]) -> Changes:
    """Let positions name other handlers, and end and begin the stretches of those that come or go."""
    partitions = sorted(wanted)
    async with connection.transaction():
        rows = await connection.fetch(_LOCK, app, [each.topic for each in partitions], [each[1] for each in partitions])
        handlers = await connection.fetch("select handler, name, legacy from consumer.handlers where app = $1", app)
        found = {Partition(row[0], row[1]): At(row[2], row[3], as_numbers(row[4])) for row in rows}
        numbers = {each: as_numbers(text) or frozenset() for each, text in wanted.items()}
        done = changes(found, numbers, {row[0] for row in handlers if row[2]})
        await connection.executemany(_END, [(*each.partition, each.handler, each.offset) for each in done.ended])
        await connection.executemany(_BEGIN, [(*each.partition, each.handler, each.offset) for each in done.begun])
        await connection.executemany(
            "update consumer.positions set handlers = $4 where (app, topic, partition) = ($1, $2, $3)",
            [(app, *each, wanted[each]) for each in found],
        )
    return done._replace(names={row[0]: row[1] for row in handlers})


async def cover(connection: Any, handler: int, stretches: Iterable[tuple[Partition, int, int]], why: str) -> None:
    """Record stretches that a replay has settled ("replayed"), or that the handler need not settle ("declared")."""
    await connection.executemany(
        _COVER, [(*partition, handler, first, past, why) for partition, first, past in stretches if first < past]
    )


async def move_back(connection: Any, app: str, partition: Partition, offset: int) -> None:
    """Let the handlers that settle a partition now begin at `offset`, to which its position was moved back."""
    await connection.execute(
        """with settling as (
               select c.handler, c.topic, c.partition, c.first_offset from consumer.coverage c
               join consumer.handlers h using (handler)
               where h.app = $1 and (c.topic, c.partition) = ($2, $3) and c.past_offset is null and c.first_offset > $4
           ), gone as (
               delete from consumer.coverage c using settling s
               where (c.handler, c.topic, c.partition) = (s.handler, s.topic, s.partition) and c.first_offset > $4
           )
           insert into consumer.coverage (handler, topic, partition, first_offset)
           select handler, topic, partition, $4 from settling
           on conflict (handler, topic, partition, first_offset) do update set past_offset = null, why = 'settled'""",
        app, *partition, offset,
    )  # fmt: skip


async def forget(connection: Any, app: str, partition: Partition) -> None:
    """Drop what is recorded by the offsets of a partition whose log is another one now."""
    await connection.execute(
        """delete from consumer.coverage c using consumer.handlers h
           where c.handler = h.handler and h.app = $1 and (c.topic, c.partition) = ($2, $3)""",
        app, *partition,
    )  # fmt: skip
    await connection.execute(
        """delete from consumer.id_rule_changes c using consumer.handlers h
           where c.handler = h.handler and h.app = $1 and (c.topic, c.partition) = ($2, $3)""",
        app, *partition,
    )  # fmt: skip


async def look(connection: Any, app: str) -> Picture:
    """Read what is recorded."""
    handlers = await connection.fetch("select name, handler, topics, legacy from consumer.handlers where app = $1", app)
    positions = await connection.fetch(
        "select topic, partition, first_offset, next_offset, handlers, began_with from consumer.positions where app = $1",
        app,
    )
    rows = await connection.fetch(
        """select c.handler, c.topic, c.partition, c.first_offset, c.past_offset, c.why
           from consumer.coverage c join consumer.handlers h using (handler) where h.app = $1""",
        app,
    )
    stretches: dict[tuple[int, Partition], list[Stretch]] = {}
    declared: dict[tuple[int, Partition], list[Stretch]] = {}
    for handler, topic, partition, first, past, why in rows:
        stretches.setdefault((handler, Partition(topic, partition)), []).append(Stretch(first, past))
        if why == "declared":
            declared.setdefault((handler, Partition(topic, partition)), []).append(Stretch(first, past))
    return Picture(
        {row[0]: Known(row[1], frozenset(row[2]), row[3]) for row in handlers},
        {Partition(row[0], row[1]): At(row[2], row[3], as_numbers(row[4])) for row in positions},
        stretches,
        declared,
        {Partition(row[0], row[1]): row[2] for row in positions if row[5] == "group" and row[2] is not None},
    )


async def begin_here(connection: Any, app: App, handler: str, topics: Collection[str]) -> list[Gap]:
    """Record that a handler need not settle what it has missed. Returns the gaps that end so.

    Raises Misconfigured where the ledger does not know the handler.
    """
    async with connection.transaction():
        await connection.execute("select from consumer.positions where app = $1 for update", app.name)
        picture = await look(connection, app.name)
        if handler not in picture.known:
            raise Misconfigured(f"handler {handler!r}: no worker has run with it yet; start one, then run this again")
        gaps = [each for each in picture.assess(app).gaps if each.handler == handler and each.partition.topic in topics]
        number = picture.known[handler].number
        await cover(connection, number, [(each.partition, each.first, each.past) for each in gaps], "declared")
    return gaps


async def rename(connection: Any, app: str, old: str, new: str, operator: str) -> None:
    """Give a handler another name and keep its rows. Waits for the batches in hand; running workers reconnect.

    Raises Misconfigured, and then changes nothing.
    """
    async with connection.transaction():
        # No turn of the ledger goes on meanwhile; then no claim runs, and those that begin later see the new epoch.
        version = await connection.fetchval("select version from consumer.ledger_state for update")
        await connection.execute("select pg_advisory_xact_lock(1189079, $1)", version)
        numbers = dict(
            await connection.fetch("select name, handler from consumer.handlers where app = $1 for update", app)
        )
        if old not in numbers:
            known = ", ".join(sorted(numbers)) or "none"
            raise Misconfigured(f"--rename-handler: App {app!r} has no handler {old!r} in the ledger (it has: {known})")
        if new in numbers:
            await _forget_empty(connection, app, new, numbers[new])
        await connection.execute("update consumer.handlers set name = $2 where handler = $1", numbers[old], new)
        await connection.execute(
            "insert into consumer.handler_renames (app, old_name, new_name, operator) values ($1, $2, $3, $4)",
            app, old, new, operator,
        )  # fmt: skip
        await connection.execute("update consumer.installation set nonce = gen_random_uuid()")


async def _forget_empty(connection: Any, app: str, name: str, number: int) -> None:
    """Remove a handler that has settled nothing. Raises Misconfigured where it has."""
    settled = await connection.fetchval(
        """select exists (select from consumer.ledger where handler = $1)
               or exists (select from consumer.dead_letters where handler = $1)""",
        number,
    )
    if settled:
        raise Misconfigured(
            f"--rename-handler: handler {name!r} of App {app!r} has rows of its own already, so both are kept as they are; "
            f"record where it begins with `consumer positions APP --handler {name} --begin-here`"
        )
    await connection.execute("delete from consumer.coverage where handler = $1", number)
    await connection.execute("delete from consumer.outcomes where handler = $1", number)
    await connection.execute("delete from consumer.attempts where handler = $1", number)
    await connection.execute("delete from consumer.handlers where handler = $1", number)
