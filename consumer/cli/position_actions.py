"""What `consumer positions` changes: move, adopt another log, record where a handler begins.

Everything is checked before anything is changed, and changed in one transaction.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from consumer.admin import report
from consumer.app import App
from consumer.cli.framework import Refused
from consumer.cli.ledger_access import with_ledger
from consumer.cli.output import print_json
from consumer.core.errors import Misconfigured
from consumer.core.log_identity import ObservedLog, Position, check_log
from consumer.core.message import Partition
from consumer.core.suggestions import UnknownName, suggestion
from consumer.handler_records import coverage, id_rules, notices
from consumer.kafka import group
from consumer.kafka.bounds import AtPosition as AtPosition
from consumer.kafka.bounds import Bound, Earliest, Latest, Offset, Time
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.log_reader import find_partitions, parse
from consumer.kafka.protocol import Identity
from consumer.postgres.positions import read_positions
from consumer.settings import Settings

_COMMITTED = "committed"


class Ends(NamedTuple):
    """What the log of a partition holds."""

    first: int
    end: int


async def move(
    app: App,
    topic: str,
    partition: int | None,
    to: str,
    settings: Settings,
    *,
    dry_run: bool,
    apply_again: bool,
    as_json: bool,
) -> int:
    """Move the position of one partition, or of all of a topic.

    apply_again: also back to messages that were applied under ids of another rule.
    """
    source = KafkaConsumer(settings, None)
    await source.start(settings.wait_seconds)
    try:
        wanted = await find_partitions(source, [topic], None if partition is None else [partition])
        firsts, ends = await source.log.beginnings(wanted), await source.log.ends(wanted)
        held = {each: Ends(firsts[each], ends[each]) for each in wanted}
        offsets = await _offsets(app, source, held, to, settings)
        identity = await source.log.identity([topic])
    finally:
        await source.stop(5)

    async def carry_out(connection: Any) -> dict[Partition, int | None]:
        known = await read_positions(connection, app.name, wanted)
        _refuse_other_logs(known, identity, topic)
        if not apply_again:
            now = {each: position.offset for each, position in known.items()}
            await id_rules.refuse_going_back(connection, app, now, offsets)
        if dry_run:
            return {each: at.offset if (at := known.get(each)) else None for each in wanted}
        async with connection.transaction():
            return {
                each: await report.move_position(connection, app.name, each, offsets[each]) for each in sorted(wanted)
            }

    before = await with_ledger(settings, carry_out)
    _print_moved(before, offsets, partition is not None, dry_run, as_json)
    return 0


async def _offsets(
    app: App, source: KafkaConsumer, held: Mapping[Partition, Ends], to: str, settings: Settings
) -> dict[Partition, int]:
    """Where each partition is to be moved. Raises Misconfigured for an offset that a log does not hold."""
    if to.strip().lower() == _COMMITTED:
        commits = (await group.look(settings, app.name)).commits
        if missing := [each for each in held if each not in commits]:
            raise Misconfigured(
                f"--move-to committed: the group {app.name!r} has committed nothing of {_places(missing)}"
            )
        found = {each: commits[each].offset for each in held}
    else:
        bound = parse(to, "--move-to", int(time.time() * 1000), f"earliest, latest, {_COMMITTED}")
        times = await source.log.offsets_at(list(held), bound.milliseconds) if isinstance(bound, Time) else {}
        found = {each: _offset(bound, ends, times.get(each)) for each, ends in held.items()}
    if wrong := [each for each, ends in held.items() if not ends.first <= found[each] <= ends.end]:
        spans = ", ".join(f"{_places([each])} {held[each].first} to {held[each].end}" for each in wrong[:5])
        raise Misconfigured(
            f"--move-to {to}: the log does not hold that offset (it holds: {spans}); nothing was changed"
        )
    return found


def _offset(bound: Bound, ends: Ends, at_time: int | None) -> int:
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
            raise Misconfigured(f"{stop.text}: begin with it by --topic {topic} --adopt")


def _print_moved(
    before: Mapping[Partition, int | None], offsets: Mapping[Partition, int], is_one: bool, dry_run: bool, as_json: bool
) -> None:
    found = [
        {"topic": each.topic, "partition": each.partition, "before": before[each], "position": offsets[each]}
        for each in sorted(before)
    ]
    if as_json:
        extra = {"dry_run": True} if dry_run else {}
        rows = [each | extra for each in found]
        print_json(rows[0] if is_one else rows)
        return
    verb = "would move" if dry_run else "moved"
    for each in found:
        old = "-" if each["before"] is None else each["before"]
        print(f"{each['topic']}:{each['partition']} {verb} from {old} to {each['position']}")


async def adopt(app: App, topic: str, partition: int | None, settings: Settings, as_json: bool) -> int:
    """Begin another log at its beginning, for one partition or for all of a topic that stopped for this."""
    source = KafkaConsumer(settings, None)
    await source.start(settings.wait_seconds)
    try:
        wanted = await find_partitions(source, [topic], None if partition is None else [partition])
        identity, firsts = await source.log.identity([topic]), await source.log.beginnings(wanted)

        async def ask(connection: Any) -> list[tuple[Partition, Any]]:
            return [
                (each, stop)
                for each in wanted
                if (stop := await report.adopt(connection, source, app, each, identity, firsts[each])) is not None
            ]

        adopted = await with_ledger(settings, ask)
    finally:
        await source.stop(5)
    if as_json:
        print_json([{"topic": topic, "partition": each.partition, "why": stop.text} for each, stop in adopted])
    elif adopted:
        for each, stop in adopted:
            print(f"{topic}:{each.partition} begins at the beginning of this log ({stop.text})")
    if not adopted:
        raise Refused(
            f"nothing to adopt: the positions of {topic} are of the topic that is there (nothing was changed)"
        )
    return 0


async def begin_here(app: App, handler: str, topic: str | None, settings: Settings, as_json: bool) -> int:
    """Record that a handler need not settle what it has missed."""
    topics = coverage.topics_of(app)[handler] if topic is None else [topic]

    async def ask(connection: Any) -> Any:
        return await coverage.begin_here(connection, app, handler, topics)

    gaps = await with_ledger(settings, ask)
    if as_json:
        print_json([{"handler": handler, "topic": p.topic, "partition": p.partition, "first": first, "past": past} for _, p, first, past in gaps])  # fmt: skip
    elif gaps:
        print(
            f"{handler} begins where it is now: {notices.gap_text(gaps)} are left to the handlers that were there before"
        )
    if not gaps:
        raise Refused(f"handler {handler!r} has missed nothing that the ledger knows of (nothing was changed)")
    return 0


async def accept_id_rule(app: App, handler: str, settings: Settings, as_json: bool) -> int:
    """Record that a handler identifies its messages by another rule from now on."""

    async def ask(connection: Any) -> id_rules.RuleChange | None:
        return await id_rules.accept(connection, app, handler)

    change = await with_ledger(settings, ask)
    if as_json:
        print_json(None if change is None else change._asdict())
    elif change is not None:
        print(
            f"{handler} identifies its messages by {change.declared} now; of those that are settled, the ledger has other ids, so "
            "that replay cannot tell of them, and positions do not go back to them"
        )
    if change is None:
        raise Refused(f"handler {handler!r} identifies its messages as the ledger has it (nothing was changed)")
    return 0


def check_handler(app: App, path: str, handler: str) -> None:
    """Raise Misconfigured for a handler that the App does not have, or that keeps no ledger row."""
    if handler not in app.handlers:
        raise UnknownName(f"{path} has no handler {handler!r}; {suggestion(handler, app.handlers)}")
    if handler not in coverage.topics_of(app):
        raise Misconfigured(
            f"handler {handler!r} keeps no ledger row (idempotent=False): nothing records what it misses"
        )


def _places(partitions: Sequence[Partition]) -> str:
    return ", ".join(f"{each.topic}:{each.partition}" for each in partitions[:5])
