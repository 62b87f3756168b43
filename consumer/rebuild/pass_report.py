"""Reports the first pass of a rebuild: counts, doubts and notes."""

from __future__ import annotations

from collections.abc import Sequence

from consumer.handler_records import handler_code
from consumer.kafka.bounds import Span
from consumer.rebuild.compare import ComparisonResult, Excuse
from consumer.rebuild.first_rows import leave_out_older, older_than_handlers
from consumer.rebuild.first_rows_rules import uncertain_beginnings
from consumer.rebuild.ledger_history import RETRIES_MAX
from consumer.rebuild.result import RebuildResult
from consumer.rebuild.single_pass import SinglePass


async def report(current: SinglePass, result: RebuildResult, compared: ComparisonResult, spans: Sequence[Span]) -> None:
    """Write the counts, doubts and notes of a pass into the result."""
    counts = current.counts
    result.messages, result.tables = current.reader.messages, compared.tables
    result.applied, result.repeated = counts["applied"], counts["repeated"]
    result.dead_lettered, result.rejected = counts["dead_lettered"], counts["rejected"]
    result.failed, result.unreadable = counts["failed"], counts["unreadable"]
    if counts["failed"]:
        errors = ", ".join(f"{name} ({count})" for name, count in current.failures.most_common(3))
        text = f"{counts['failed']} messages failed in the rebuild, so their effects are not in it: {errors}"
        result.unknown.append({"kind": "failed", "count": counts["failed"], "text": text})
    if unreadable := await current.history.unreadable_but_applied():
        text = f"{unreadable} messages were applied, and today's code cannot read them: their effects are not in the rebuild"
        result.unknown.append({"kind": "unreadable_now", "count": unreadable, "text": text})
    for name, count in sorted(current.applied_by.items()):
        if name not in current.copies.guard.writers and current.state.outgoing is None:
            text = (
                f"handler {name} ran for {count} messages and wrote nothing here, so none of its effects was compared "
                "(a flag or a setting that is missing where the rebuild runs?)"
            )
            result.unknown.append({"kind": "nothing_compared", "count": count, "text": text})
    result.unknown += [*current.copies.unknown(), *await current.copies.rows_gone(compared)]
    tables, usage = current.copies.tables, current.state.usage
    current.state.uncertain_columns = uncertain_beginnings(
        tables, usage, compared.tables, current.copies.guard.upserted
    )
    counts["id_conflict"] += current.history.conflicts
    if counts["id_conflict"]:
        text = f"{counts['id_conflict']} messages have an id that another payload had before: the first one counts here"
        result.unknown.append({"kind": "id_conflict", "count": counts["id_conflict"], "text": text})
    result.notes = [*_notes_of_code(current), *current.state.notes, *_notes(current, spans)]
    if current.state.base is None and not current.history.unrecorded:
        # With messages that the ledger does not know, old rows may be theirs.
        await _report_older_rows(current, result, compared)


async def _report_older_rows(current: SinglePass, result: RebuildResult, compared: ComparisonResult) -> None:
    """Leave out rows that are older than the handlers, or doubt them.

    They are left out only where nothing else can explain a difference.
    """
    guard, usage, differing = current.copies.guard, current.state.usage, compared.differing()
    numbers = [handler.number for handler in current.state.handlers]
    uses = {name: use for name, use in sorted(usage.items()) if str(name) in differing}
    is_added_to = all(use.inserted and name.table not in guard.changed for name, use in uses.items())
    may_be_others = result.unknown or guard.unplanned or any(isinstance(note, Excuse) for note in result.notes)
    if uses and is_added_to and not may_be_others:
        older = await leave_out_older(current.connection, compared, numbers)
        if older:
            result.notes += older
            return
    varied = set(current.state.uncertain_columns)  # further rebuilds, with other values, show more about these
    names = [name for name, use in uses.items() if use.inserted and name not in varied]
    result.unknown += await older_than_handlers(current.connection, names, numbers, compared.tables)


def _notes_of_code(current: SinglePass) -> list[str]:
    """Return notes about effects that other code may have made."""
    notes: list[str] = []
    for handler in current.state.handlers:
        if count := current.history.with_other_code[handler.number]:
            since = handler_code.since_text(current.history.codes[handler.number])
            notes.append(
                Excuse(
                    f"handler {handler.name}: {count} messages were, or may have been, applied by other code than today's, {since}"
                )
            )
    if current.removed_handlers:
        names = ", ".join(current.removed_handlers)
        notes.append(Excuse(f"not in the App any more: {names}; what they wrote to the same tables is extra here"))
    return notes


def _notes(current: SinglePass, spans: Sequence[Span]) -> list[str]:
    """Return notes about the messages and the partitions."""
    notes: list[str] = []
    for handler in current.state.handlers:
        if handler.number < 0:
            notes.append(Excuse(f"handler {handler.name} is not known to the ledger: it has never run here"))
    for topic in sorted(current.reader.topics_without_ids):
        notes.append(
            f"messages of {topic} have no id: their offset is used, so one that was produced twice counts twice"
        )
    for span in spans:
        place = f"{span.partition.topic}:{span.partition.partition}"
        if span.first > 0 and current.state.base is not None:
            notes.append(f"{place} begins at offset {span.first}: --base is taken for the state before that record")
        if span.partition not in current.positions:
            what = "what the ledger has as applied was replayed" if span.length else "nothing of it is settled"
            notes.append(f"{place} has no position: {what}")
        if current.app_starts.get(span.partition, 0) > span.first:
            text = (
                f"{place} was begun at offset {current.app_starts[span.partition]}: earlier messages were settled elsewhere, or "
                "never, and were replayed all the same"
            )
            notes.append(Excuse(text))
    if current.history.too_many_retries:
        text = f"more than {RETRIES_MAX:,} dead letters were retried; their order inside a transaction was not followed"
        notes.append(Excuse(text))
    current.state.contradicted = current.reader.contradicted
    for name, count in sorted(current.reader.contradicted.items()):
        notes.append(
            f"handler {name}: the ledger has {count} messages as applied after later messages of their key (retried or repaired "
            "later, or PostgreSQL's clock stepped back), so rows that differ are rebuilt in the order of the records too"
        )
    if empty := sum(span.length for span in spans) - current.reader.messages:
        notes.append(
            f"{empty} offsets hold no record: markers of transactions, or a compacted topic, of which no state can be made"
        )
    if count := current.counts["unsettled"] - current.history.omitted.exempt:
        notes.append(f"{count} messages above the positions are not settled yet and were left out")
    notes += current.history.omitted.notes()
    if count := current.counts["rejected"]:
        notes.append(Excuse(f"{count} messages were rejected here that are no dead letters in the ledger"))
    if count := current.counts["unreadable"]:
        notes.append(f"{count} messages cannot be read")
    return [*notes, *current.copies.notes()]
