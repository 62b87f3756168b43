"""The result of a batch's transaction: one outcome for every message.

Pure. What else the caller needs is derived from the outcomes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from consumer.core.delivery import Batch, Delivery, PositionUpdate
from consumer.core.handler import Handler
from consumer.core.log_identity import Position
from consumer.core.message import Partition
from consumer.core.ordering import Scheduler
from consumer.core.outcome import Applied, Dead, Duplicate, Outcome, Reason, RetryLater, Skipped
from consumer.outbox.record import StoredStream

TOO_OLD = Dead(
    Reason.TOO_OLD,
    "older than the ledger remembers; cannot tell whether it was applied",
)
CONFLICT = Dead(Reason.ID_CONFLICT, "this message id was used before with another payload")
BEHIND_RETRY = RetryLater(0.0, "waits behind a failed message of its key")
BUSY = RetryLater(0.1, "dead letters before it are being settled")
BEHIND_DEAD_LETTER = Dead(Reason.BEHIND, "waits behind a dead letter of its key")
NEXT_BATCH = RetryLater(0.0, "batch time limit reached; it runs in the next batch")


@dataclass(slots=True)
class LedgerIds:
    """The application's name, its topics' numbers, and the logs of its positions."""

    app: str
    topics: Mapping[str, int]
    logs: dict[Partition, Position] = field(default_factory=dict)  # as the positions were read


OutcomeKey = tuple[Handler, str, int, str]  # handler, topic, partition, and the outcome's name in counts


class FailedAttempt(NamedTuple):
    """An error, and the attempts so far, with this one if counted."""

    attempts: int
    error: BaseException


@dataclass(slots=True)
class BatchResult:
    """What a transaction did with the messages of a batch.

    Valid once it is committed. A message without an outcome was claimed, and its handler's effects are stored.
    """

    outcomes: dict[Delivery, Outcome] = field(default_factory=dict)
    failures: dict[Delivery, FailedAttempt] = field(default_factory=dict)  # of the handlers that were called
    # Derived by `conclude`:
    applied: list[Delivery] = field(default_factory=list)
    dead: dict[Delivery, Dead] = field(default_factory=dict)
    delayed: dict[Delivery, float] = field(default_factory=dict)  # seconds until the next attempt; 0 behind another
    position_updates: list[PositionUpdate] = field(default_factory=list)
    counts: Mapping[OutcomeKey, int] = field(default_factory=dict)
    published: Sequence[StoredStream] = ()  # stored in the outbox

    def conclude(self, won: list[Delivery]) -> None:
        """Derive the lists. won: the messages whose claim was won."""
        outcomes = self.outcomes
        if not outcomes:
            self.applied = won
            return
        self.applied = [delivery for delivery in won if delivery not in outcomes]
        for delivery, outcome in outcomes.items():
            kind = type(outcome)
            if kind is RetryLater:
                self.delayed[delivery] = outcome.delay_seconds  # type: ignore[union-attr]
            elif kind is Dead:
                self.dead[delivery] = outcome  # type: ignore[assignment]

    def attempts_of(self, delivery: Delivery) -> int:
        """Return how often a message was tried."""
        failure = self.failures.get(delivery)
        return delivery.attempts if failure is None else failure.attempts


def complete(scheduler: Scheduler, batch: Batch, result: BatchResult, now: float) -> None:
    """Record a committed result with its messages and their scheduler."""
    for delivery, failure in result.failures.items():
        delivery.attempts = failure.attempts
    for delivery in result.delayed:
        delivery.outcome = None
    due = {delivery: now + delay for delivery, delay in result.delayed.items()}
    scheduler.settle(batch, due, result.position_updates)


def ended_by_handler(
    applied: Sequence[Delivery], outcomes: Mapping[Delivery, Outcome]
) -> dict[str, tuple[int, list[str]]]:
    """Return how many messages ended, and why some died, by handler.

    Messages that wait do not count. Duplicates do: read again from the beginning, a topic is nothing but these and its
    old conflicts.
    """
    counts: dict[str, int] = {}
    reasons: dict[str, list[str]] = {}
    for handler, count in Counter([delivery.handler for delivery in applied]).items():
        counts[handler.name] = count
    duplicates = [delivery.handler for delivery, outcome in outcomes.items() if type(outcome) is Duplicate]
    for handler, count in Counter(duplicates).items():
        counts[handler.name] = counts.get(handler.name, 0) + count
    for delivery, outcome in outcomes.items():
        if type(outcome) is Dead and outcome.reason is not Reason.BEHIND:
            counts[delivery.handler.name] = counts.get(delivery.handler.name, 0) + 1
            reasons.setdefault(delivery.handler.name, []).append(_reason(outcome))
    return {name: (count, reasons.get(name, [])) for name, count in counts.items()}


def _reason(dead: Dead) -> str:
    """Return the reason and its place or field, without values."""
    if dead.trace:
        return f"{dead.reason.value}: {dead.trace.partition(chr(10))[0]}"
    return f"{dead.reason.value}: {dead.error}" if dead.reason is Reason.UNREADABLE else dead.reason.value


def outcome_counts(result: BatchResult) -> dict[OutcomeKey, int]:
    """Count messages by handler, topic, partition and outcome."""
    counts: dict[OutcomeKey, int] = {}
    _count_applied(counts, result.applied)
    for delivery, outcome in result.outcomes.items():
        match outcome:
            case Duplicate():
                label = outcome.label
            case Dead():
                label = "dead_lettered"
            case Skipped():
                label = "skipped"
            case Applied() | RetryLater():
                continue
        key = (delivery.handler, delivery.record.topic, delivery.record.partition, label)
        counts[key] = counts.get(key, 0) + 1
    return counts


def numbered(counts: Mapping[OutcomeKey, int], ids: LedgerIds) -> dict[tuple[int, int, int, str], int]:
    """Return counts by the numbers of the ledger.

    Only the owner of a partition updates these rows.
    """
    return {
        (handler.number, ids.topics[topic], partition, label): count
        for (handler, topic, partition, label), count in counts.items()
    }


def _count_applied(counts: dict[OutcomeKey, int], applied: Sequence[Delivery]) -> None:
    # fast path: a batch holds long runs of one handler and partition, and a run costs one entry.
    start, size = 0, len(applied)
    while start < size:
        first = applied[start]
        handler, topic, partition = first.handler, first.record.topic, first.record.partition
        end = start + 1
        while (
            end < size
            and (delivery := applied[end]).handler is handler
            and (record := delivery.record).partition == partition
            and record.topic == topic
        ):
            end += 1
        if handler.idempotent:
            key = (handler, topic, partition, "kept")
            counts[key] = counts.get(key, 0) + end - start
        start = end
