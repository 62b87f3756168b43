"""Reads what the ledger knows before a replay.

Numbers, positions, horizons, exemptions and id rules. Imports handler_records and postgres.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.core.handler import Handler
from consumer.core.identity import CallableId
from consumer.core.message import Partition
from consumer.handler_records import coverage, handler_code, id_rules
from consumer.handler_records.settled_ranges import SettledRange
from consumer.kafka.admin import group_offsets
from consumer.postgres.connection import translated_errors
from consumer.postgres.session import Session
from consumer.settings import Settings
from consumer.transaction.result import LedgerIds

_EVERY_OFFSET = 1 << 63  # greater than any offset


@dataclass(frozen=True, slots=True)
class LedgerView:
    """The positions of an App in its partitions, by the ledger.

    horizons: where the ledger begins; None where that was not recorded.
    """

    ids: LedgerIds
    positions: dict[Partition, int]
    horizons: dict[Partition, int | None]


async def read_view(
    session: Session,
    settings: Settings,
    app: App,
    handlers: Sequence[Handler],
    topics: Sequence[str],
    partitions: Sequence[Partition],
    *,
    register: bool,
) -> LedgerView:
    """Read numbers, positions and horizons, and give the handlers their numbers.

    register: give new handlers and topics a number, and record the id rules.
    """
    number = session.numbers if register else session.known_numbers
    numbers, topic_numbers = await number(app.name, [handler.name for handler in handlers], topics)
    if register:
        with translated_errors(settings):
            await id_rules.record(session.connection, app)
    for handler in handlers:
        handler.number = numbers[handler.name]
    ids = LedgerIds(app.name, topic_numbers, await session.positions(app.name, partitions))
    rows = await session.horizons(app.name, partitions)
    horizons: dict[Partition, int | None] = {partition: row[1] for partition, row in rows.items()}
    if any(partition not in rows for partition in partitions):
        # A worker without a position begins at Kafka's commit, and knows nothing of earlier offsets.
        committed = await group_offsets(settings, app.name)
        horizons |= {partition: committed.get(partition, 0) for partition in partitions if partition not in rows}
    return LedgerView(ids, {partition: row[0] for partition, row in rows.items()}, horizons)


async def read_coverage(
    session: Session,
    settings: Settings,
    app: App,
    handlers: Sequence[Handler],
    partitions: Sequence[Partition],
    *,
    applies: bool = False,
    named: Collection[str] = (),
) -> tuple[dict[tuple[str, Partition], Sequence[SettledRange]], list[str]]:
    """Return exempted ranges, and notes on handlers that look renamed.

    Call it before new handlers are registered. Raises Misconfigured for a probable rename that would be applied without
    being named.
    """
    with translated_errors(settings):
        recorded = await coverage.read_coverage(session.connection, app.name)
    chosen = {handler.name for handler in handlers}
    exempt: dict[tuple[str, Partition], Sequence[SettledRange]] = {
        (name, partition): recorded.declared[known.number, partition]
        for name, known in recorded.known.items()
        if name in chosen
        for partition in partitions
        if (known.number, partition) in recorded.declared
    }
    notes = []
    for rename in recorded.assess(app).renames:
        if rename.new not in chosen:
            continue
        text = (
            f"handler {rename.new!r} is probably {rename.old!r}, renamed: the ledger holds {rename.old!r} for the same topic "
            f"{rename.topic}, and the App no longer has it; `consumer migrate {app.name} --rename-handler {rename.old} {rename.new}` "
            "keeps what was settled"
        )
        if applies and rename.new not in named:
            raise Misconfigured(
                f"{text}; if it is a new handler, name it with --handler {rename.new} (nothing was changed)"
            )
        notes.append(text)
    return exempt, notes


@dataclass(slots=True)
class IdRuleView:
    """Where messages may have been applied under ids of another rule.

    floors: below, ids of a handler may be of another rule. recoded: handlers whose message_id= function had other code,
    and why.
    """

    floors: dict[tuple[str, Partition], int]
    doubts: list[dict[str, Any]] = field(default_factory=list)
    recoded: dict[str, str] = field(default_factory=dict)


async def read_id_rules(
    session: Session,
    settings: Settings,
    app: App,
    handlers: Sequence[Handler],
    partitions: Sequence[Partition],
    *,
    applies: bool,
    named: Collection[str],
) -> IdRuleView:
    """Return where absence from the ledger proves nothing.

    Ids may have been different there.

    Raises Misconfigured for a changed rule of a handler whose messages would be applied without naming it.
    """
    with translated_errors(settings):
        rules = await id_rules.read_id_rules(session.connection, app)
        codes = (await handler_code.read_code(session.connection, app)).id_code
    view = IdRuleView(dict(rules.floors))
    for handler in handlers:
        if codes[handler.name].others and isinstance(handler.rule, CallableId):
            text = (
                f"handler {handler.name!r}: its message_id= function has been another one than today's, "
                f"{handler_code.since_text(codes[handler.name])}: what was applied before may have other ids"
            )
            if applies and handler.name not in named:
                raise Misconfigured(
                    f"{text}; if its ids are the same, name it with --handler {handler.name} (nothing was changed)"
                )
            view.recoded[handler.name] = text
    for handler in handlers:
        if (change := rules.changes.get(handler.name)) is None:
            continue
        if not applies:
            view.floors |= {(handler.name, partition): _EVERY_OFFSET for partition in partitions}
            view.doubts.append({"kind": "id_rule_changed", "count": 1, "text": change.text})
        elif handler.name not in named:
            raise Misconfigured(
                f"{change.text}; {id_rules.accepting('APP', handler.name)}, or name it with --handler {handler.name} to apply them "
                "again (nothing was changed)"
            )
    return view
