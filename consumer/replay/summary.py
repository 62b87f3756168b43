"""Ends a replay: checks again, compares the ledger, and concludes.

Imports kafka, postgres and handler_records.
"""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from consumer.core.handler import Handler
from consumer.core.message import Partition
from consumer.handler_records import coverage
from consumer.kafka.admin import is_compacted
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.log_reader import find_partitions
from consumer.postgres.connection import translated_errors
from consumer.postgres.dead_letter_queries import Ranges, Selection
from consumer.replay import edited_dead_letters, ledger_diff, resume, sealed_dead_letters, second_look
from consumer.replay.run import Run


async def conclude(run: Run, source: KafkaConsumer, *, resumed: bool) -> None:
    """Complete the findings after the last record is read."""
    await _check_again(run)
    await _compare_ledger(run, source)
    await _check_dead_letters(run)
    connection = (await run.check.open()).connection
    await resume.doubt_gone_rows(connection, run.findings, run.conditions)
    if resumed and run.applies:
        await resume.doubt_dead_letters(connection, run.dead_letters_before, run.handlers, run.findings)
    _add_notes(run)
    await _record_coverage(run)


async def doubt_short_log(run: Run, source: KafkaConsumer) -> None:
    """Add a doubt for a position beyond the end of the log.

    The topic was recreated then, or lost its tail.
    """
    positions = run.findings.positions
    ends = await source.log.ends(list(positions))
    short = [
        f"{partition.topic}:{partition.partition} ends at {ends[partition]}, and its position is {position}"
        for partition, position in sorted(positions.items())
        if position > ends[partition]
    ]
    if short:
        text = "the log ends below the position, so it is not the one that was consumed: " + ", ".join(short[:5])
        run.findings.doubts.append({"kind": "log_too_short", "count": len(short), "text": text})


def handlers_without_row_counts(run: Run) -> frozenset[str]:
    """Return the handlers whose rows are not compared with the log.

    Each of their messages is checked again instead.
    """
    return frozenset(
        handler.name
        for handler in run.handlers
        if run.narrowing_options() or handler.number < 0 or _may_have_other_ids(run, handler)
    )


def _may_have_other_ids(run: Run, handler: Handler) -> bool:
    """Return whether rows may have ids of an earlier rule."""
    floors = run.check.floors
    return any(floors.get((handler.name, span.partition), 0) > span.first for span in run.findings.spans)


async def _check_again(run: Run) -> None:
    numbers = {handler.name: handler.number for handler in run.handlers}
    await run.check.find_deleted(numbers)
    await second_look.look_again(run.check, numbers)


async def _compare_ledger(run: Run, source: KafkaConsumer) -> None:
    findings = run.findings
    if narrowed := run.narrowing_options():
        findings.notes.append(
            f"the ledger's rows were not compared with the log the other way, because of {narrowed[0]}"
        )
        return
    policies: dict[str, bool] = {}

    async def compacted(topic: str) -> bool:
        if topic not in policies:
            policies[topic] = await is_compacted(run.settings, topic)
        return policies[topic]

    async def read_ends() -> Mapping[Partition, int]:
        return await source.log.ends(await find_partitions(source, run.topics, None))

    is_whole = run.options.end == "latest" and not run.options.partitions
    run.progress.line("comparing the ledger's rows with the log")
    await ledger_diff.compare(
        (await run.check.open()).connection,
        source,
        findings,
        [handler for handler in run.handlers if handler.name not in run.check.uncounted],
        run.ids.topics,
        run.check.matched,
        run.check.missing,
        compacted,
        read_ends if is_whole else None,
        run.ids.logs,
    )
    if findings.gone:
        findings.notes.append(
            f"{findings.gone:,} ledger rows name records that a compacted log does not hold any more: whether something is missing of them is unknown"
        )


async def _check_dead_letters(run: Run) -> None:
    connection = (await run.check.open()).connection
    handlers = {handler.number: handler for handler in run.handlers if handler.number > 0}
    ids = None if run.message_ids is None else [UUID(bytes=id) for id in run.message_ids]
    selection = Selection(list(handlers), Ranges.of(run.findings.spans), run.key, ids)
    await sealed_dead_letters.check(connection, run.findings, handlers, selection)
    await edited_dead_letters.check(connection, run.findings, handlers, selection, run.settings)


def _add_notes(run: Run) -> None:
    findings, would = run.findings, run.check.would
    findings.doubts += run.id_rule_doubts
    dropped = [
        f"{span.partition.topic}:{span.partition.partition} begins at offset {span.first}"
        for span in findings.spans
        if span.first and run.options.start == "earliest"
    ]
    if dropped:
        findings.notes.append(
            f"the log has dropped its first records, so they were not checked: {', '.join(dropped[:8])}"
        )
    if would and not run.options.call_handlers and not run.applies:
        findings.notes.append(
            "no handler was called: whether the missing messages would be applied, fail or be rejected is not known "
            "(--call-handlers calls them and undoes what they write)"
        )
    elif would:
        effects = ", ".join(f"{count:,} would {effect}" for effect, count in sorted(would.items()))
        findings.notes.append(f"the handlers of missing messages were called and undone: {effects}")
    if run.lost_sequences:
        findings.notes.append(
            "a connection was lost, or the process was killed: sequences that had moved on it are not known"
        )
    for topic in sorted(run.offset_ids):
        findings.notes.append(
            f"messages of {topic} without an id are identified by their offset: a message that was produced twice is two messages"
        )
    if findings.precheck is not None and findings.precheck["unanswered"]:
        findings.notes.append(f"Redis did not answer for {findings.precheck['unanswered']:,} deliveries")


async def _record_coverage(run: Run) -> None:
    """Record what an apply has settled.

    `consumer status` no longer reports it as missed then.
    """
    findings = run.findings
    open_questions = findings.total("missing") or findings.total("unknown") or findings.unsettled
    if not run.applies or run.narrowing_options() or open_questions:
        return
    from_first = run.options.start in ("earliest", "beginning")  # records that the log has dropped cannot be filled
    spans = [(span.partition, 0 if from_first else span.first, span.end) for span in findings.spans]
    session = await run.check.open()
    with translated_errors(run.settings):
        for handler in run.handlers:
            stretches = [
                (partition, first, min(end, findings.positions.get(partition, 0)))
                for partition, first, end in spans
                if partition.topic in handler.topics
            ]
            await coverage.cover(session.connection, handler.number, stretches, "replayed")
