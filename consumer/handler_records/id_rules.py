"""Remembers how each handler identifies its messages.

A changed rule must not apply old messages again: ids of one rule say nothing of messages that were applied under
another. The ledger keeps the rule as a text, and, after an accepted change, the offsets below which messages may have
ids of an earlier rule. Limitations: a function is known by its name, so a change of what it returns is not noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.core.identity import rule_text
from consumer.core.message import Partition
from consumer.postgres import handler_history, handlers, ledger_queries, positions
from consumer.postgres.protocol import Connection


class RuleChange(NamedTuple):
    """A handler whose rule in the App differs from the recorded one."""

    handler: str
    recorded: str
    declared: str

    @property
    def text(self) -> str:
        """The difference and its consequence, in one sentence."""
        return (
            f"handler {self.handler!r}: its messages were identified by {self.recorded}, and in this code by {self.declared}: "
            "what was applied before is not recognized, and would be applied again where it is read again"
        )


class IdRules(NamedTuple):
    """The recorded rules, compared with the App.

    floors: the lowest offsets of the current rule after accepted changes, by handler and partition.
    """

    changes: Mapping[str, RuleChange]
    floors: Mapping[tuple[str, Partition], int]


def accepting(path: str, handler: str) -> str:
    """Return what to do about a changed rule."""
    return (
        "write message_id= as it was; if the change is meant, stop the workers with the old code, then "
        f"consumer positions {path} --handler {handler} --accept-id-rule"
    )


def declared(app: App) -> dict[str, str]:
    """Return the rules of the handlers that keep ledger rows."""
    return {handler.name: rule_text(handler.rule) for handler in app.handlers.values() if handler.idempotent}


async def record(connection: Connection, app: App) -> None:
    """Record the rules of handlers that have none yet."""
    await handler_history.record_id_rules(connection, app.name, declared(app))


async def read_id_rules(connection: Connection, app: App) -> IdRules:
    """Compare the recorded rules with the App's."""
    recorded = await handler_history.id_rules(connection, app.name)
    changes = {
        name: RuleChange(name, before, rule)
        for name, rule in declared(app).items()
        if (before := recorded.get(name)) is not None and before != rule
    }
    return IdRules(changes, await handler_history.id_rule_floors(connection, app.name))


async def accept(connection: Connection, app: App, handler: str) -> RuleChange | None:
    """Record the App's rule of a handler, and where it begins.

    Messages below the recorded offsets may have ids of the earlier rule. Returns None if nothing differs. The workers
    with the old rule must have stopped.
    """
    change = (await read_id_rules(connection, app)).changes.get(handler)
    if change is None:
        return None
    number = (await handlers.numbers(connection, app.name))[handler]
    settled = await ledger_queries.settled_below(
        connection, number
    )  # not under the locks below: reads all rows of the handler
    async with connection.transaction():
        await positions.lock_app(connection, app.name)
        app.discover(partition.topic for partition in await positions.next_offsets(connection, app.name))
        at = await positions.of_topics(connection, app.name, list(app.handlers[handler].topics))
        await handler_history.change_id_rule(connection, number, change.declared, [*settled.items(), *at.items()])
    return change


async def refuse_going_back(
    connection: Connection, app: App, positions: Mapping[Partition, int], wanted: Mapping[Partition, int]
) -> None:
    """Raise Misconfigured for positions moved back before a rule change.

    Messages there have ids of another rule.
    """
    rules = await read_id_rules(connection, app)
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
