"""What the ledger and the log can tell: counts, positions, one message, dead letters. Reads; changes positions on request.

Knows queries; knows no terminal (cli/ draws). Numbers come from PostgreSQL, the ends of the log from Kafka.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from consumer.app import App
from consumer.core.dead_letter_seal import altered
from consumer.core.identity import event_id, ids_of_text, reads_like_offset
from consumer.core.log_identity import (
    CommittedOffset,
    HaltReason,
    ObservedLog,
    PartitionHalt,
    Position,
    check_log,
    decide_start,
)
from consumer.core.message import Partition
from consumer.core.outcome import Cause
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import KafkaError
from consumer.kafka.log_inspection import OpenTransaction
from consumer.kafka.protocol import Identity
from consumer.postgres import dead_letter_queries, handler_history, ledger_queries, positions, waiting_messages
from consumer.postgres import dead_letters as dead_letters_table
from consumer.postgres.dead_letter_queries import Matching
from consumer.postgres.positions import read_positions
from consumer.postgres.protocol import Connection
from consumer.postgres.server import installed_at
from consumer.postgres.stopped_partitions import read as read_stops
from consumer.postgres.stopped_partitions import refused_stop

_LETTER_STATES = {"waiting": "waiting", "discarded": "discarded"}


async def handler_counts(connection: Connection, app: App) -> dict[str, dict[str, Any]]:
    """Per handler: applied, duplicates by cause, dead letters, skipped. Reads counters, and no row of the ledger."""
    found: dict[str, dict[str, Any]] = {
        name: {"applied": 0, "duplicates": {cause.value: 0 for cause in Cause}, "dead_lettered": 0, "skipped": 0}
        for name in app.handlers
    }
    empty: dict[str, Any] = {"applied": 0, "duplicates": {}, "dead_lettered": 0, "skipped": 0}
    for name, outcome, count in await positions.counts(connection, app.name):
        # A handler that is no longer in the code still has a history.
        entry = found.setdefault(name, {**empty, "duplicates": {}})
        kind, _, cause = outcome.partition(":")
        if kind == "duplicate":
            entry["duplicates"][cause] = count
        elif kind in ("applied", "kept"):  # of generations of the ledger that were dropped, and of those that are there
            entry["applied"] += count
        else:
            entry[kind] = count  # dead_lettered, skipped
    return found


async def miscounts(connection: Connection, app: App) -> dict[str, dict[str, int]]:
    """Handlers whose counter of applied rows differs from the ledger's rows. Counts every row: slow on a large ledger."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        rows = await ledger_queries.rows_by_handler(connection, app.name)
        counters = {
            name: count for name, outcome, count in await positions.counts(connection, app.name) if outcome == "kept"
        }
    return {
        name: {"rows": rows.get(name, 0), "counter": counters.get(name, 0)}
        for name in sorted({*rows, *counters})
        if rows.get(name, 0) != counters.get(name, 0)
    }


async def partition_lags(
    connection: Connection, source: KafkaConsumer, app: App
) -> tuple[list[dict[str, Any]], list[str]]:
    """Per partition: position, end of the log, lag, what waits and what is unread; and the topics that do not exist.

    `waiting` messages hold the position back, so that `lag` counts everything behind them too; `unread` is what lies
    beyond what the worker has read. A partition without a position counts from the beginning of the log. `end` is the
    last stable offset: an open transaction of a producer holds it back. `end`, `lag` and `unread` are None where no
    leader tells.
    """
    by_topic = await source.log.partitions(app.topics)
    partitions = [each for found in by_topic.values() for each in found]
    offsets = await positions.next_offsets(connection, app.name)
    _, waits = await waiting_messages.read(connection, app.name)
    ends = await source.log.ends(partitions, partial=True) if partitions else {}
    absent = [topic for topic, found in by_topic.items() if not found]
    refused = (await source.log.identity(absent)).refused if absent else frozenset()
    unknown = [each for each in partitions if each not in offsets]
    for topic in sorted(refused):  # what is known of them without Kafka: all topics have a partition 0
        partitions += sorted(each for each in offsets if each.topic == topic) or [Partition(topic, 0)]
    begins = await source.log.beginnings(unknown, partial=True) if unknown else {}
    lags = []
    for each in partitions:
        position, end = offsets.get(each), ends.get(each)
        done = position if position is not None else begins.get(each)
        count, read_up_to = waits.get(each, (0, 0))
        lags.append(
            {
                "topic": each.topic,
                "partition": each.partition,
                "position": position,
                "end": end,
                "lag": max(0, end - done) if end is not None and done is not None else None,
                "waiting": count,
                "unread": max(0, end - max(done, read_up_to)) if end is not None and done is not None else None,
            }
        )
    return lags, [topic for topic in absent if topic not in refused]


class Health(NamedTuple):
    """What keeps a partition from going on: a person must act on a stop, a producer must end its transaction."""

    topic_id: UUID | None
    stop: PartitionHalt | None
    open_transaction: OpenTransaction | None


async def partition_health(
    connection: Connection,
    source: KafkaConsumer,
    app: App,
    partitions: Sequence[Partition],
    commits: Mapping[Partition, CommittedOffset] = {},
) -> dict[Partition, Health]:
    """Per partition, judged now as a worker would, whether one runs or not. Raises KafkaError.

    Of a partition whose leader does not answer, only what the ids tell. What a running worker has read and not settled
    yet may be gone from the log: that is shown as removed until it is settled. commits: of the group; with shards, only a
    worker can tell whether they are of another database.
    """
    own = await installed_at(connection)
    positions = await read_positions(connection, app.name, partitions)
    unreadable = await read_stops(connection, app.name)
    identity = await source.log.identity(app.topics)
    seen = [each for each in partitions if each.topic not in identity.refused]
    firsts = await source.log.beginnings(seen, partial=True) if seen else {}
    stable = await source.log.ends(seen, partial=True) if seen else {}
    highs = await source.log.ends(seen, partial=True, uncommitted=True) if seen else {}

    async def look(partition: Partition) -> Health:
        """Asks the leader only where what is known of all partitions leaves something open."""
        at, end = positions.get(partition), highs.get(partition)
        if partition.topic in identity.refused:
            return Health(
                None, _stored(unreadable, partition, at) or refused_stop(partition, at.offset if at else 0), None
            )
        log = ObservedLog(identity.cluster_id, identity.topics.get(partition.topic), firsts.get(partition), end)
        log = log._replace(out_of_range=at is not None and end is not None and at.offset > end)
        stop = check_log(partition, at, log) if at is not None else None
        if at is None and not app.shards:
            start = decide_start(partition, commits.get(partition), firsts.get(partition, 0), own)
            stop = start if isinstance(start, PartitionHalt) else None
        found = None
        if end is None:  # no leader at the moment
            return Health(log.topic_id, stop or _stored(unreadable, partition, at), None)
        try:
            if at is not None and at.seen is not None and stop is None:
                log = log._replace(at_print=await source.log.fingerprint_at(partition, at.seen.offset))
                stop = check_log(partition, at, log)
            if stable.get(partition, end) < end:
                found = await source.log.open_transaction(partition)
        except (KafkaError, TimeoutError):
            pass  # no leader at the moment, which `end` and `lag` could not tell either
        if stop is None or stop.reason is HaltReason.OTHER_RECORD:  # damage can look like another record
            stop = _stored(unreadable, partition, at) or stop
        return Health(log.topic_id, stop, found)

    return dict(zip(partitions, await asyncio.gather(*map(look, partitions)), strict=True))


def _stored(
    unreadable: Mapping[Partition, tuple[PartitionHalt, int]], partition: Partition, at: Position | None
) -> PartitionHalt | None:
    """Why a worker could not read a partition, unless its position has gone on since."""
    stop, first = unreadable.get(partition, (None, 0))
    return stop if at is None or at.offset <= first else None


async def _asked(source: KafkaConsumer, partition: Partition, at: Position, log: ObservedLog) -> ObservedLog:
    """With what only the partition's leader can tell. Raises KafkaError."""
    peek = await source.log.peek(partition, at.offset)
    log = log._replace(end=peek.end if peek.end >= 0 else None, out_of_range=peek.out_of_range)
    if at.seen is not None:
        log = log._replace(at_print=await source.log.fingerprint_at(partition, at.seen.offset))
    return log


async def find_message(
    connection: Connection, app: str, text: str | bytes, source: str | None = None
) -> dict[str, Any]:
    """Return what each handler of an App did with a message id.

    source: the source of the CloudEvent of that id.
    """
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    if source is not None:
        keys: tuple[bytes, ...] = (event_id(source.encode("utf-8", "surrogateescape"), raw),)
    elif reads_like_offset(raw):
        topic, partition, _ = raw.decode("ascii", "replace").split(":", 2)
        keys = ids_of_text(raw, await positions.salts(connection, topic, partition))
    else:
        keys = ids_of_text(raw)
    rows = [row for row in await ledger_queries.show(connection, keys) if row["app"] == app]
    return {
        "key": (rows[0]["id"].bytes if rows else keys[0]).hex(),
        "handlers": [
            {
                "app": row["app"],
                "handler": row["handler"],
                "state": "applied"
                if row["applied_at"] is not None
                else _LETTER_STATES.get(row["letter"], "dead-lettered"),
                "at": (row["applied_at"] or row["died_at"]).isoformat()
                if row["applied_at"] or row["died_at"]
                else None,
                "topic": row["topic"],
                "partition": row["partition"],
                "offset": row["offset"],
                "letter": row["dead_letter"],
                "reason": row["reason"],
            }
            for row in rows
        ],
    }


async def dead_letters(connection: Connection, *only: Any, **more: Any) -> list[dict[str, Any]]:
    """The newest dead letters, without their bytes. The filters are those of `Matching`."""
    rows = await dead_letter_queries.newest(connection, Matching(*only, **more))
    return [{**dict(row), "id": row["id"].hex, "died_at": row["died_at"].isoformat()} for row in rows]


async def letter_groups(connection: Connection, *only: Any, **more: Any) -> list[dict[str, Any]]:
    """Dead letters counted by kind of error, the most frequent first, with the first letter of each."""
    return [dict(row) for row in await dead_letter_queries.groups(connection, Matching(*only, **more))]


async def actions_of(connection: Connection, *only: Any, **more: Any) -> list[dict[str, Any]]:
    """What people did to dead letters, the newest first."""
    return [_action(row) for row in await dead_letter_queries.actions_on(connection, Matching(*only, **more))]


async def dead_letter(connection: Connection, number: int) -> dict[str, Any] | None:
    """One dead letter, whole, and what was done to it. Bytes are text where they are UTF-8, else {"base64": …}."""
    row = await dead_letter_queries.one(connection, number)
    if row is None:
        return None
    return {
        "letter": row["dead_letter"],
        "app": row["app"],
        "handler": row["handler_name"],
        "id": row["id"].hex,
        "topic": row["topic"],
        "partition": row["partition"],
        "offset": row["offset"],
        "timestamp": row["timestamp"],
        "state": row["state"],
        "reason": row["reason"],
        "kind": row["kind"],
        "group": row["error_group"],
        "error": row["error"],
        "trace": row["trace"].splitlines(),
        "attempts": row["attempts"],
        "died_at": row["died_at"].isoformat(),
        "waits_behind": row["first"],
        "waiting_behind_it": row["behind"],
        "key": _shown(row["key"]),
        "headers": [
            [_shown(name), _shown(value)] for name, value in zip(row["header_keys"], row["header_values"], strict=True)
        ],
        "value": _shown(row["value"]),
        "altered": altered(row),
        "actions": await actions(connection, number, 1000),
    }


async def actions(connection: Connection, number: int | None, limit: int) -> list[dict[str, Any]]:
    """What people did to one letter, or to all of them; the newest first."""
    return [_action(row) for row in await dead_letter_queries.actions(connection, number, limit)]


def _action(row: Any) -> dict[str, Any]:
    return {
        **dict(row),
        "at": row["at"].isoformat(),
        "new_id": row["new_id"].hex if row["new_id"] is not None else None,
        "new_value": _shown(row["new_value"]),
    }


async def open_letters(connection: Connection, app: App) -> dict[str, dict[str, int]]:
    """Handler -> state -> letters that somebody must decide on, or that wait behind one."""
    found: dict[str, dict[str, int]] = {}
    for name, state, count in await dead_letter_queries.open_counts(connection, app.name):
        found.setdefault(name, {})[state] = count
    return found


def _shown(raw: bytes | None) -> str | dict[str, str] | None:
    if raw is None:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


async def move_position(connection: Connection, app: str, partition: Partition, offset: int) -> int | None:
    """Set the position of a partition in the log that it is of; returns the one before. Running workers notice.

    Ids stay in the ledger: going back applies nothing twice. Going forward skips what lies between, for good.
    """
    async with connection.transaction():
        before = await positions.lock(connection, app, partition)
        await positions.move(connection, app, partition, offset)
        await handler_history.move_coverage_back(connection, app, partition, offset)
    return before


async def adopt(
    connection: Connection, source: KafkaConsumer, app: App, partition: Partition, identity: Identity, first: int
) -> PartitionHalt | None:
    """Begin another log at its beginning, where a position is of one that is gone. Returns what had been wrong with the
    position, None for one that is of this log: then nothing is changed.

    Ids stay in the ledger, so a message that was applied is not applied again, unless its id was made of its offset:
    those ids begin anew, because the same offset is another message now. identity, first: of the log as it is now; where
    its beginning moves on meanwhile, the partition stops for that. Raises KafkaError.
    """
    topic_id = identity.topics.get(partition.topic)
    async with connection.transaction():
        await positions.lock(connection, app.name, partition)
        at = (await read_positions(connection, app.name, [partition])).get(partition)
        if at is None:
            return None
        log = ObservedLog(identity.cluster_id, topic_id, first)
        stop = check_log(partition, at, log) or check_log(partition, at, await _asked(source, partition, at, log))
        if stop is None or not stop.do.endswith("--adopt"):
            return None
        salt = topic_id.bytes if topic_id is not None else secrets.token_bytes(16)
        await positions.restart(connection, app.name, partition, first, identity.cluster_id, topic_id, salt)
        await handler_history.forget_partition(connection, app.name, partition)
        await dead_letters_table.forget_attempts_in(connection, app.name, partition)
    return stop


async def totals(connection: Connection, app: App) -> Mapping[str, int]:
    """Applied, duplicates by cause and dead letters of all handlers together: what a progress line shows."""
    counts: Sequence[dict[str, Any]] = list((await handler_counts(connection, app)).values())
    found: dict[str, int] = {"applied": sum(each["applied"] for each in counts)}
    for cause in Cause:
        found[cause.value] = sum(each["duplicates"].get(cause.value, 0) for each in counts)
    return found
