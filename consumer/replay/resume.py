"""What a replay keeps so that it can go on after an interruption, and what must be as it was for that.

Reads the ledger and asks the log for its ends; replay/resume_rules.py compares. A replay that goes on must end as one
uninterrupted run would. So the ledger's rows that were seen before are looked at again at the end (replay/ledger_diff.py by number,
`ReplayCheck.find_deleted` one by one), and everything else that the answer depends on must not have changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.core.handler import Handler
from consumer.core.identity import rule_text
from consumer.core.message import Partition
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

_AGAIN = "run it without --resume"


def refuse_another_database(before: object, epoch: str) -> None:
    """Raise Misconfigured for a state of another or restored PostgreSQL."""
    if lineage(str(before)) != lineage(epoch):
        raise Misconfigured("--resume: PostgreSQL is another one since, or went back in time; run it without --resume")


def refuse_changed(before: object, now: Conditions) -> None:
    """Raise Misconfigured where something is not as it was when the replay began."""
    if not isinstance(before, Mapping):
        raise Misconfigured(f"--resume: the state that was kept cannot be read; {_AGAIN}")
    if (changed := what_changed(before, now)) is not None:
        raise Misconfigured(f"--resume: {changed} since the replay began; {_AGAIN}")


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
    how = [handler.topics, rule_text(handler.rule), handler.idempotent, handler.timeout, handler.retry]
    return _text([*codes, handler.order, handler.concurrency, handler.batch, handler.allow_nan, *how])


def conditions_of_logs(identity: Identity, topics: Sequence[str], partitions: Sequence[Partition]) -> Conditions:
    """Return which logs are read."""
    return {
        "cluster": {"Kafka": identity.cluster_id},
        "topic": {topic: _known(identity.topics.get(topic)) for topic in topics},
        "partition": {f"{p.topic}:{p.partition}": "" for p in partitions},
    }


async def conditions_of_ledger(
    connection: Connection, partitions: Sequence[Partition], check: ReplayCheck
) -> Conditions:
    """Return from where on the ledger knows, and its exemptions."""
    return {
        "retention": {"ledger": await horizon(connection)},
        "beginning of the ledger in": {f"{p.topic}:{p.partition}": str(check.horizons.get(p)) for p in partitions},
        "--begin-here of": {f"{name} {p.topic}:{p.partition}": _text(s) for (name, p), s in check.exempt.items()},
        "message_id= of": {f"{name} {p.topic}:{p.partition}": str(at) for (name, p), at in check.floors.items()},
    }


def _known(topic_id: object) -> str | None:
    return None if topic_id is None else str(topic_id)


async def refuse_shorter_logs(source: KafkaConsumer, spans: Sequence[Span], reached: Mapping[Partition, int]) -> None:
    """Raise Misconfigured where records that are still to be read are gone."""
    todo = [each for each in spans if reached.get(each.partition, each.first) < each.end]
    begins = await source.log.beginnings([each.partition for each in todo])
    ends = await source.log.ends([each.partition for each in todo])
    for each in todo:
        place, at = f"{each.partition.topic}:{each.partition.partition}", reached.get(each.partition, each.first)
        if begins[each.partition] > at:
            raise Misconfigured(
                f"--resume: {place} begins at offset {begins[each.partition]} now, and {at} is the next to be read; {_AGAIN}"
            )
        if ends[each.partition] < each.end:
            raise Misconfigured(
                f"--resume: {place} ends at offset {ends[each.partition]} now, and it ended at {each.end}; {_AGAIN}"
            )


async def horizon(connection: Connection) -> str:
    """Up to when the ledger has dropped its rows."""
    return await generations.horizon_text(connection)


async def letters_before(connection: Connection) -> int:
    """The number of the last dead letter."""
    return await dead_letter_queries.last_number(connection)


async def doubt_letters(connection: Connection, before: int, handlers: Sequence[Handler], findings: Findings) -> None:
    """Dead letters since the number `before` that the part before an interruption may have made, and does not know of."""
    spans = findings.spans
    ranges = dead_letter_queries.Ranges.of(spans)
    numbers = [handler.number for handler in handlers]
    made = await dead_letter_queries.count_since(connection, before, numbers, ranges)
    if (unknown := made - findings.total("dead_lettered_now")) > 0:
        names = ", ".join(each.name for each in handlers)
        text = (
            f"{unknown:,} dead letters of {names} were made since the replay began, by workers or by the part of it that was "
            "interrupted: see `consumer dlq list APP`"
        )
        findings.doubts.append({"kind": "dead_letters_meanwhile", "count": unknown, "text": text})


async def weigh_rows_gone(connection: Connection, findings: Findings, then: Conditions) -> None:
    """Rows that the ledger has dropped as too old while this ran are no fault; nothing tells them from deleted ones."""
    if findings.rows_gone and await horizon(connection) != then["retention"]["ledger"]:
        text = (
            f"{findings.rows_gone:,} ledger rows are gone since their messages were read, and the ledger has dropped old rows "
            "meanwhile: they may be among these"
        )
        findings.doubts.append({"kind": "rows_dropped", "count": findings.rows_gone, "text": text})
        findings.rows_gone = 0
