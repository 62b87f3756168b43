"""What the first pass of a rebuild says: counts, reasons for doubt, and notes."""

from __future__ import annotations

from collections.abc import Sequence

from consumer.handler_records import handler_code
from consumer.kafka.bounds import Span
from consumer.rebuild.applied import RETRIES_MAX
from consumer.rebuild.beginnings import other_beginnings
from consumer.rebuild.compare import Compared, Excuse
from consumer.rebuild.first_rows import leave_out_older, older_than_handlers
from consumer.rebuild.result import Rebuilt
from consumer.rebuild.single_pass import SinglePass


async def report(current: SinglePass, found: Rebuilt, compared: Compared, spans: Sequence[Span]) -> None:
    """Put what was counted into the answer."""
    counts = current.counts
    found.messages, found.tables = current.messages, compared.tables
    found.applied, found.repeated = counts["applied"], counts["repeated"]
    found.dead_lettered, found.rejected = counts["dead_lettered"], counts["rejected"]
    found.failed, found.unreadable = counts["failed"], counts["unreadable"]
    if counts["failed"]:
        errors = ", ".join(f"{name} ({count})" for name, count in current.failures.most_common(3))
        text = f"{counts['failed']} messages failed in the rebuild, so their effects are not in it: {errors}"
        found.unknown.append({"kind": "failed", "count": counts["failed"], "text": text})
    if unreadable := await current.applied.unreadable_but_applied():
        text = f"{unreadable} messages were applied, and today's code cannot read them: their effects are not in the rebuild"
        found.unknown.append({"kind": "unreadable_now", "count": unreadable, "text": text})
    for name, count in sorted(current.applied_by.items()):
        if name not in current.copies.guard.writers:
            text = (
                f"handler {name} ran for {count} messages and wrote nothing here, so none of its effects was compared "
                "(a flag or a setting that is missing where the rebuild runs?)"
            )
            found.unknown.append({"kind": "nothing_compared", "count": count, "text": text})
    found.unknown += [*current.copies.unknown(), *await current.copies.rows_gone(compared)]
    tables, known = current.copies.tables, current.state.known
    current.state.beginnings = other_beginnings(tables, known, compared.tables, current.copies.guard.upserted)
    counts["id_conflict"] += current.applied.conflicts
    if counts["id_conflict"]:
        text = f"{counts['id_conflict']} messages have an id that another payload had before: the first one counts here"
        found.unknown.append({"kind": "id_conflict", "count": counts["id_conflict"], "text": text})
    found.notes = [*_notes_of_code(current), *current.state.notes, *_notes(current, spans)]
    if current.state.base is None and not current.applied.unrecorded:
        # With messages that the ledger does not know, old rows may be theirs.
        await _judge_older(current, found, compared)


async def _judge_older(current: SinglePass, found: Rebuilt, compared: Compared) -> None:
    """Leave out rows from before the handlers, where nothing else can explain a difference; else doubt their tables."""
    guard, known, differing = current.copies.guard, current.state.known, compared.differing()
    numbers = [each.number for each in current.state.handlers]
    uses = {name: use for name, use in sorted(known.items()) if str(name) in differing}
    is_added_to = all(use.inserted and name.table not in guard.changed for name, use in uses.items())
    may_be_others = found.unknown or guard.unplanned or any(isinstance(each, Excuse) for each in found.notes)
    if uses and is_added_to and not may_be_others:
        older = await leave_out_older(current.connection, compared, numbers)
        if older:
            found.notes += older
            return
    settled = set(current.state.beginnings)  # further rebuilds tell
    names = [name for name, use in uses.items() if use.inserted and name not in settled]
    found.unknown += await older_than_handlers(current.connection, names, numbers, compared.tables)


def _notes_of_code(current: SinglePass) -> list[str]:
    """Effects that may be of another code than the one that ran here."""
    notes: list[str] = []
    for handler in current.state.handlers:
        if count := current.applied.with_other_code[handler.number]:
            since = handler_code.since_text(current.applied.codes[handler.number])
            notes.append(
                Excuse(
                    f"handler {handler.name}: {count} messages were, or may have been, applied by other code than today's, {since}"
                )
            )
    if current.gone:
        names = ", ".join(current.gone)
        notes.append(Excuse(f"not in the App any more: {names}; what they wrote to the same tables is extra here"))
    return notes


def _notes(current: SinglePass, spans: Sequence[Span]) -> list[str]:
    """What a person should know about this answer."""
    notes: list[str] = []
    for handler in current.state.handlers:
        if handler.number < 0:
            notes.append(Excuse(f"handler {handler.name} is not known to the ledger: it has never run here"))
    for topic in sorted(current.weak_topics):
        notes.append(
            f"messages of {topic} have no id: their offset is used, so one that was produced twice counts twice"
        )
    for each in spans:
        place = f"{each.partition.topic}:{each.partition.partition}"
        if each.first > 0 and current.state.base is not None:
            notes.append(f"{place} begins at offset {each.first}: --base is taken for the state before that record")
        if each.partition not in current.positions:
            what = "what the ledger has as applied was replayed" if each.length else "nothing of it is settled"
            notes.append(f"{place} has no position: {what}")
        if current.begun.get(each.partition, 0) > each.first:
            text = (
                f"{place} was begun at offset {current.begun[each.partition]}: what stands before was settled elsewhere, or "
                "never, and was replayed all the same"
            )
            notes.append(Excuse(text))
    if current.applied.too_many_retries:
        text = f"more than {RETRIES_MAX:,} dead letters were retried; their order inside a transaction was not followed"
        notes.append(Excuse(text))
    current.state.contradicted = current.contradicted
    for name, count in sorted(current.contradicted.items()):
        notes.append(
            f"handler {name}: the ledger has {count} messages as applied after later messages of their key (retried or repaired "
            "later, or PostgreSQL's clock stepped back), so rows that differ are rebuilt in the order of the records too"
        )
    if empty := sum(each.length for each in spans) - current.messages:
        notes.append(
            f"{empty} offsets hold no record: markers of transactions, or a compacted topic, of which no state can be made"
        )
    if count := current.counts["unsettled"] - current.applied.left_out.exempt:
        notes.append(f"{count} messages above the positions are not settled yet and were left out")
    notes += current.applied.left_out.notes()
    if count := current.counts["rejected"]:
        notes.append(Excuse(f"{count} messages were rejected here that are no dead letters in the ledger"))
    if count := current.counts["unreadable"]:
        notes.append(f"{count} messages cannot be read")
    return [*notes, *current.copies.notes()]
