"""Check what must not change between an interrupted replay and its resumption.

Reads the ledger and asks the log for its ends; replay/resume_rules.py compares. A resumed replay must end as one
uninterrupted run would. So the ledger's rows that were seen before are checked again at the end (replay/ledger_diff.py
by number, `ReplayCheck.find_deleted` one by one), and everything else that the answer depends on must not have changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.core.handler import Handler
from consumer.core.identity import rule_text
from consumer.core.message import Partition
from consumer.core.topic_names import text_of
from consumer.handler_records import handler_code
from consumer.kafka.bounds import Span
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.protocol import Identity
from consumer.postgres import dead_letter_queries, generations
from consumer.postgres.epoch import lineage
from consumer.postgres.protocol import Connection
from consumer.replay.check import ReplayCheck
from consumer.replay.findings import Findings
from consumer.replay.resume_rules import Conditions, what_changed
from consumer.replay.wording import problem

_AGAIN = "run it without --resume"


def refuse_another_database(before: object, epoch: str) -> None:
    """Raise Misconfigured for a state of another or restored PostgreSQL."""
    if lineage(str(before)) != lineage(epoch):
        raise Misconfigured(f"--resume: PostgreSQL is another one since, or in an earlier state; {_AGAIN}")


def refuse_changed(before: object, now: Conditions) -> None:
    """Raise Misconfigured where a condition has changed since the beginning."""
    if not isinstance(before, Mapping):
        raise Misconfigured(f"--resume: the saved state cannot be read; {_AGAIN}")
    if (changed := what_changed(before, now)) is not None:
        raise Misconfigured(f"--resume: {changed} since the replay began; {_AGAIN}")


def restore(state: Mapping[str, Any], now: Conditions, restore_state: Callable[[Any], None]) -> None:
    """Continue from a saved state. Raises Misconfigured where that is not possible."""
    refuse_changed(state["conditions"], now)
    try:
        restore_state(state)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Misconfigured(f"--resume: the saved state cannot be read; {_AGAIN}") from None


def conditions_of_code(app: App, handlers: Sequence[Handler], options: Any) -> Conditions:
    """Return the options, and the code of the handlers that take part."""
    return {
        "the App's": {"name": app.name},
        "option": {field.name: _text(getattr(options, field.name)) for field in fields(options)},
        "handler": {handler.name: _handler_text(handler) for handler in handlers},
    }


def _text(value: object) -> str:
    return json.dumps(value, default=repr)


def _handler_text(handler: Handler) -> str:
    codes = handler_code.codes_at_start(handler)
    names = [*handler.named_topics, *([text_of(handler.pattern)] if handler.pattern is not None else [])]
    options = [names, rule_text(handler.rule), handler.idempotent, handler.timeout, handler.retry]
    return _text([*codes, handler.order, handler.concurrency, handler.batch, handler.allow_nan, *options])


def conditions_of_logs(identity: Identity, topics: Sequence[str], partitions: Sequence[Partition]) -> Conditions:
    """Return which logs are read."""
    return {
        "cluster": {"Kafka": identity.cluster_id},
        "topic": {topic: _known(identity.topics.get(topic)) for topic in topics},
        "partition": {_place(partition): "" for partition in partitions},
    }


async def conditions_of_ledger(
    connection: Connection, partitions: Sequence[Partition], check: ReplayCheck
) -> Conditions:
    """Return where the ledger begins, and its exemptions."""
    return {
        "retention": {"ledger": await horizon(connection)},
        "beginning of the ledger in": {
            _place(partition): str(check.horizons.get(partition)) for partition in partitions
        },
        "--begin-here of": {
            f"{name} {_place(partition)}": _text(ranges) for (name, partition), ranges in check.exempt.items()
        },
        "message_id= of": {
            f"{name} {_place(partition)}": str(floor) for (name, partition), floor in check.floors.items()
        },
    }


def _place(partition: Partition) -> str:
    return f"{partition.topic}:{partition.partition}"


def _known(topic_id: object) -> str | None:
    return None if topic_id is None else str(topic_id)


async def refuse_shorter_logs(source: KafkaConsumer, spans: Sequence[Span], reached: Mapping[Partition, int]) -> None:
    """Raise Misconfigured where records that are still to be read are gone."""
    remaining = [(span, reached.get(span.partition, span.first)) for span in spans]
    remaining = [(span, next_offset) for span, next_offset in remaining if next_offset < span.end]
    begins = await source.log.beginnings([span.partition for span, _ in remaining])
    ends = await source.log.ends([span.partition for span, _ in remaining])
    for span, next_offset in remaining:
        name, begin, end = _place(span.partition), begins[span.partition], ends[span.partition]
        if begin > next_offset:
            raise Misconfigured(
                f"--resume: {name} begins at offset {begin} now, and {next_offset} is the next to be read; {_AGAIN}"
            )
        if end < span.end:
            raise Misconfigured(f"--resume: {name} ends at offset {end} now, and it ended at {span.end}; {_AGAIN}")


async def horizon(connection: Connection) -> str:
    """Return the time up to which the ledger has dropped its rows."""
    return await generations.horizon_text(connection)


async def last_dead_letter(connection: Connection) -> int:
    """Return the number of the newest dead letter."""
    return await dead_letter_queries.last_number(connection)


async def doubt_dead_letters(
    connection: Connection, before: int, handlers: Sequence[Handler], findings: Findings
) -> None:
    """Doubt dead letters that the interrupted part may have stored.

    before: the number of the newest dead letter when the replay began.
    """
    ranges = dead_letter_queries.Ranges.of(findings.spans)
    numbers = [handler.number for handler in handlers]
    stored = await dead_letter_queries.count_since(connection, before, numbers, ranges)
    if (unknown := stored - findings.total("dead_lettered_now")) > 0:
        names = ", ".join(handler.name for handler in handlers)
        text = (
            f"{unknown:,} dead letters of {names} were stored since the replay began, by workers or by the part of it that was "
            "interrupted: see `consumer dlq list APP`"
        )
        findings.doubts.append(problem("dead_letters_meanwhile", unknown, text))


async def doubt_gone_rows(connection: Connection, findings: Findings, before: Conditions) -> None:
    """Doubt deleted rows where the ledger has dropped old rows.

    Nothing distinguishes rows that it dropped as too old from deleted ones.
    """
    if findings.rows_gone and await horizon(connection) != before["retention"]["ledger"]:
        text = (
            f"{findings.rows_gone:,} ledger rows are gone since their messages were read, and the ledger has dropped old rows "
            "meanwhile: they may be among these"
        )
        findings.doubts.append(problem("rows_dropped", findings.rows_gone, text))
        findings.rows_gone = 0
