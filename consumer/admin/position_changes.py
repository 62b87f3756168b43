"""What `consumer positions` changes: positions, logs, where handlers begin.

Everything is checked before anything is changed, and what is moved together is changed in one transaction. Each function
opens its own connections and raises KafkaError, Misconfigured and ServiceUnavailable; then nothing was changed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from consumer.admin.ledger_access import with_ledger
from consumer.admin.positions import adopt_log, move_position
from consumer.app import App
from consumer.core.audit import ActedBy, Entry
from consumer.core.errors import Misconfigured
from consumer.core.log_identity import ObservedLog, Position, check_log
from consumer.core.message import Partition
from consumer.core.suggestions import UnknownName, suggestion
from consumer.handler_records import coverage, id_rules
from consumer.handler_records.settled_ranges import Gap
from consumer.kafka import group
from consumer.kafka.bounds import AtPosition, Bound, Earliest, Latest, Offset, Time
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.log_reader import find_partitions, parse
from consumer.kafka.protocol import Identity
from consumer.postgres import audit
from consumer.postgres.positions import read_positions
from consumer.postgres.protocol import Connection
from consumer.settings import Settings

_COMMITTED = "committed"
_PLACES_MAX = 5


class LogEnds(NamedTuple):
    """The offsets that a log holds: `first` to `end` - 1."""

    first: int
    end: int


class Move(NamedTuple):
    """A position that was moved, or would be.

    before: None if the partition had none."""

    partition: Partition
    before: int | None
    position: int


class Adopted(NamedTuple):
    """A partition that begins another log, and why it had stopped."""

    partition: Partition
    why: str


async def move(
    app: App,
    topic: str,
    partition: int | None,
    to: str,
    settings: Settings,
    *,
    dry_run: bool,
    apply_again: bool,
    by: ActedBy,
) -> list[Move]:
    """Move the position of one partition, or of a topic.

    to: as --move-to has it. apply_again: also back to messages that were applied under ids of another rule.
    """
    source = KafkaConsumer(settings, None)
    await source.start(settings.wait_seconds)
    try:
        partitions = await find_partitions(source, [topic], None if partition is None else [partition])
        firsts, ends = await source.log.beginnings(partitions), await source.log.ends(partitions)
        bounds = {partition: LogEnds(firsts[partition], ends[partition]) for partition in partitions}
        targets = await _targets(app, source, bounds, to, settings)
        identity = await source.log.identity([topic])
    finally:
        await source.stop(5)

    async def change(connection: Connection) -> list[Move]:
        known = await read_positions(connection, app.name, partitions)
        _refuse_other_logs(known, identity, topic)
        now = {partition: position.offset for partition, position in known.items()}
        if not apply_again:
            await id_rules.refuse_going_back(connection, app, now, targets)
        if dry_run:
            return [Move(partition, now.get(partition), targets[partition]) for partition in sorted(partitions)]
        async with connection.transaction():
            moves = [
                Move(
                    partition,
                    await move_position(connection, app.name, partition, targets[partition]),
                    targets[partition],
                )
                for partition in sorted(partitions)
            ]
            await audit.record(connection, *(_moved(app, by, move) for move in moves))
            return moves

    return await with_ledger(settings, change)


def _moved(app: App, by: ActedBy, move: Move) -> Entry:
    numbers = {"before": move.before, "position": move.position}
    return Entry("positions move", by, "moved", app.name, *move.partition, numbers=numbers)


async def _targets(
    app: App, source: KafkaConsumer, bounds: Mapping[Partition, LogEnds], to: str, settings: Settings
) -> dict[Partition, int]:
    """Choose the new positions.

    Raises Misconfigured for an offset that a log does not hold."""
    if to.strip().lower() == _COMMITTED:
        commits = (await group.describe_group(settings, app.name)).commits
        if missing := [partition for partition in bounds if partition not in commits]:
            raise Misconfigured(
                f"--move-to committed: the group {app.name!r} has committed nothing of {_places(missing)}; "
                "write an offset, a time, earliest or latest"
            )
        targets = {partition: commits[partition].offset for partition in bounds}
    else:
        bound = parse(to, "--move-to", int(time.time() * 1000), f"earliest, latest, {_COMMITTED}")
        at_time = await source.log.offsets_at(list(bounds), bound.milliseconds) if isinstance(bound, Time) else {}
        targets = {partition: _target(bound, ends, at_time.get(partition)) for partition, ends in bounds.items()}
    if outside := [partition for partition, ends in bounds.items() if not ends.first <= targets[partition] <= ends.end]:
        held = ", ".join(
            f"{_places([partition])} {bounds[partition].first} to {bounds[partition].end}"
            for partition in outside[:_PLACES_MAX]
        )
        raise Misconfigured(f"--move-to {to}: the log does not hold that offset; it holds {held} (nothing was changed)")
    return targets


def _target(bound: Bound, ends: LogEnds, at_time: int | None) -> int:
    match bound:
        case Earliest():
            return ends.first
        case Latest():
            return ends.end
        case Offset(number):
            return number
        case Time():
            return ends.end if at_time is None else at_time
        case AtPosition():
            raise Misconfigured(
                "--move-to position: it is there already; write an offset, a time, earliest, latest or committed"
            )


def _refuse_other_logs(known: Mapping[Partition, Position], identity: Identity, topic: str) -> None:
    log = ObservedLog(identity.cluster_id, identity.topics.get(topic))
    for partition, at in sorted(known.items()):
        if (stop := check_log(partition, at, log)) is not None:
            raise Misconfigured(f"--move-to: {stop.text}; begin with it by --topic {topic} --adopt")


async def adopt(app: App, topic: str, partition: int | None, settings: Settings, by: ActedBy) -> list[Adopted]:
    """Begin another log, for one partition or all that stopped for this.

    Returns an empty list if no position is of another log; then nothing was changed.
    """
    source = KafkaConsumer(settings, None)
    await source.start(settings.wait_seconds)
    try:
        partitions = await find_partitions(source, [topic], None if partition is None else [partition])
        identity, firsts = await source.log.identity([topic]), await source.log.beginnings(partitions)

        async def change(connection: Connection) -> list[Adopted]:
            adopted = []
            for partition in partitions:
                async with connection.transaction():
                    stop = await adopt_log(connection, source, app, partition, identity, firsts[partition])
                    if stop is not None:
                        numbers = {"position": firsts[partition]}
                        entry = Entry("positions adopt", by, "adopted", app.name, *partition, numbers=numbers)
                        await audit.record(connection, entry)
                        adopted.append(Adopted(partition, stop.text))
            return adopted

        return await with_ledger(settings, change)
    finally:
        await source.stop(5)


async def begin_here(app: App, handler: str, topic: str | None, settings: Settings, by: ActedBy) -> list[Gap]:
    """Record that a handler need not settle what it has missed.

    Returns what it had missed; nothing was changed if that is empty.
    """

    async def change(connection: Connection) -> list[Gap]:
        async with connection.transaction():
            gaps = await coverage.begin_here(connection, app, handler, topic)
            entries = [
                Entry(
                    "positions begin-here",
                    by,
                    f"handler {handler} begins here",
                    app.name,
                    *gap.partition,
                    numbers={"first": gap.first, "past": gap.past},
                )
                for gap in gaps
            ]
            await audit.record(connection, *entries)
        return gaps

    return await with_ledger(settings, change)


async def accept_id_rule(app: App, handler: str, settings: Settings, by: ActedBy) -> id_rules.RuleChange | None:
    """Record that a handler now identifies messages by another rule.

    Returns None if the rule is the recorded one; then nothing was changed.
    """

    async def change(connection: Connection) -> id_rules.RuleChange | None:
        async with connection.transaction():
            changed = await id_rules.accept(connection, app, handler)
            if changed is not None:
                result = f"handler {handler} identifies by {changed.declared}"
                await audit.record(connection, Entry("positions accept-id-rule", by, result, app.name))
        return changed

    return await with_ledger(settings, change)


def check_handler(app: App, path: str, handler: str) -> None:
    """Raise Misconfigured unless a handler of the App keeps ledger rows."""
    if handler not in app.handlers:
        raise UnknownName(f"--handler: {path} has no handler {handler!r}; {suggestion(handler, app.handlers)}")
    if handler not in coverage.topics_of(app):
        raise Misconfigured(
            f"--handler: handler {handler!r} keeps no ledger row (idempotent=False), so nothing records what it misses; "
            "name another one"
        )


def _places(partitions: Sequence[Partition]) -> str:
    return ", ".join(f"{topic}:{number}" for topic, number in partitions[:_PLACES_MAX])
