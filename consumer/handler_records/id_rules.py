"""Remembers how each handler identifies its messages, so that a changed rule does not apply old ones again.

Ids of one rule say nothing of messages that were applied under another. The ledger keeps the rule as a text, and, after
an accepted change, the offsets below which messages may have ids of an earlier rule. Limitation: a function is known by
its name, so a change of what it returns is not noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.core.identity import rule_text
from consumer.core.message import Partition

_RECORD = """
update consumer.handlers h set id_rule = w.rule from unnest($2::text[], $3::text[]) as w(name, rule)
where h.app = $1 and h.name = w.name and h.id_rule is null
"""
_SETTLED_UP_TO = """
select t.name, l.partition, max(l."offset") + 1 from consumer.ledger l join consumer.topics t using (topic)
where l.handler = $1 group by 1, 2
"""
_CHANGED_BELOW = """
insert into consumer.id_rule_changes as c (handler, topic, partition, below)
select $1::int2, topic, partition, max(below) from (
    select * from unnest($2::text[], $3::int4[], $4::int8[]) as settled(topic, partition, below)
    union all
    select p.topic, p.partition, p.next_offset from consumer.positions p where p.app = $5 and p.topic = any($6::text[])
) as each group by 1, 2, 3
on conflict (handler, topic, partition) do update set below = greatest(c.below, excluded.below)
"""
_FLOORS = """
select h.name, c.topic, c.partition, c.below from consumer.id_rule_changes c join consumer.handlers h using (handler)
where h.app = $1
"""


class Change(NamedTuple):
    """A handler whose rule in the App differs from the recorded one."""

    handler: str
    recorded: str
    declared: str

    @property
    def text(self) -> str:
        """What differs and what it means, in one sentence."""
        return (
            f"handler {self.handler!r}: its messages were identified by {self.recorded}, and in this code by {self.declared}: "
            "what was applied before is not recognised, and would be applied again where it is read again"
        )


class IdRules(NamedTuple):
    """What the ledger records, compared with the App. floors: by handler and partition, after accepted changes."""

    changes: Mapping[str, Change]
    floors: Mapping[tuple[str, Partition], int]


def accepting(path: str, handler: str) -> str:
    """What to do about a changed rule."""
    return (
        "write message_id= as it was; if the change is meant, stop the workers with the old code, then "
        f"consumer positions {path} --handler {handler} --accept-id-rule"
    )


def declared(app: App) -> dict[str, str]:
    """The rules of the handlers that keep ledger rows."""
    return {each.name: rule_text(each.rule) for each in app.handlers.values() if each.idempotent}


async def record(connection: Any, app: App) -> None:
    """Record the rules of handlers that have none yet."""
    rules = sorted(declared(app).items())
    await connection.execute(_RECORD, app.name, [name for name, _ in rules], [rule for _, rule in rules])


async def look(connection: Any, app: App) -> IdRules:
    """Compare the recorded rules with the App's."""
    recorded = dict(await connection.fetch("select name, id_rule from consumer.handlers where app = $1", app.name))
    rows = await connection.fetch(_FLOORS, app.name)
    changes = {
        name: Change(name, recorded[name], rule)
        for name, rule in declared(app).items()
        if recorded.get(name) not in (None, rule)
    }
    return IdRules(changes, {(row[0], Partition(row[1], row[2])): row[3] for row in rows})


async def accept(connection: Any, app: App, handler: str) -> Change | None:
    """Record the App's rule of a handler, and below which offsets messages may have ids of the earlier one.

    Returns None where nothing differs. The workers with the old rule must have stopped.
    """
    change = (await look(connection, app)).changes.get(handler)
    if change is None:
        return None
    number = await connection.fetchval(
        "select handler from consumer.handlers where (app, name) = ($1, $2)", app.name, handler
    )
    settled = await connection.fetch(_SETTLED_UP_TO, number)  # reads all rows of the handler, so without locks
    async with connection.transaction():
        await connection.execute("select from consumer.positions where app = $1 for update", app.name)
        columns = [[row[n] for row in settled] for n in range(3)]
        topics = list(app.handlers[handler].topics)
        await connection.execute(_CHANGED_BELOW, number, *columns, app.name, topics)
        await connection.execute(
            "update consumer.handlers set id_rule = $2 where handler = $1", number, change.declared
        )
    return change


async def refuse_going_back(
    connection: Any, app: App, positions: Mapping[Partition, int], wanted: Mapping[Partition, int]
) -> None:
    """Raise Misconfigured for positions that would be moved back to messages with ids of another rule."""
    rules = await look(connection, app)
    for partition, offset in sorted(wanted.items()):
        for handler in app.by_topic().get(partition.topic, ()):
            change = rules.changes.get(handler.name)
            if change is not None and offset < positions.get(partition, 0):
                raise Misconfigured(
                    f"{change.text}; {accepting('APP', handler.name)}, or --apply-again moves and applies them again "
                    "(nothing was changed)"
                )
            below = rules.floors.get((handler.name, partition), 0)
            if offset < below:
                raise Misconfigured(
                    f"{partition.topic}:{partition.partition}: message_id= of handler {handler.name!r} has changed, and what it "
                    f"applied below offset {below} would be applied again; move to {below} or beyond, or --apply-again moves "
                    "and applies them again (nothing was changed)"
                )
