"""Counts what a worker's batches have settled.

Once for each batch, where its result is published: nothing is measured for each message. A failure here is logged once, and
costs a count, not the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from consumer.core.delivery import Batch, Delivery
from consumer.core.handler import Handler
from consumer.core.outcome import Cause, Duplicate, Reason
from consumer.core.retention import is_time
from consumer.logs import describe, event
from consumer.metrics.catalog import BATCH_MESSAGES, BATCHES, DELAY, FAILED_ATTEMPTS, MESSAGES
from consumer.metrics.recorder import Recorder
from consumer.postgres.errors import Conflict, Fenced, Outage, sqlstate_of
from consumer.transaction.isolate import TransactionPoisoned
from consumer.transaction.result import BatchResult

DUPLICATES_MAX = 20  # whose age is asked for at a time
_DELAYS_MAX = 16  # messages of a batch whose delay is recorded, each for its share of the batch
_IN_LEDGER = (Cause.LEDGER, Cause.PRECHECK)


class SampledDuplicate(NamedTuple):
    """A duplicate whose first delivery has a row in the ledger."""

    shard: str
    handler: int
    name: str
    id: bytes


class BatchMetrics:
    """Counts into a worker's recorder.

    on_settled: called after each batch. duplicates: some whose age is not known yet.
    """

    def __init__(self, recorder: Recorder, handlers: Iterable[Handler], on_settled: Callable[[], None]) -> None:
        self._recorder = recorder
        self._on_settled = on_settled
        self.duplicates: list[SampledDuplicate] = []
        self._is_broken = False
        self._handlers = handlers
        self.begin()

    def begin(self) -> None:
        """Set counters to 0: one that begins so shows its first increase.

        Again after handlers have got more topics.
        """
        for handler in self._handlers:
            for topic in handler.topics:
                ends = [("dead_lettered", reason.value) for reason in Reason]
                ends += [("duplicate", cause.value) for cause in Cause]
                ends += [("applied", "")]
                for end in ends if handler.idempotent else [("skipped", "")]:
                    self._recorder.add(MESSAGES, (handler.name, topic, *end), 0)
        for result in ("committed", "isolated", "conflict", "outage", "fenced"):
            self._recorder.add(BATCHES, (result,), 0)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._is_broken:
                self._is_broken = True
                event(logging.ERROR, "some metrics are wrong: a batch could not be counted", error=describe(error))

    def settled(self, shard: str, batch: Batch, result: BatchResult, now: float) -> None:
        """Count a committed batch, or a part of one. now: Unix seconds."""
        with self._guarded():
            self._count(batch, result)
            self._observe_delays(result, now * 1000)
            if result.outcomes and len(self.duplicates) < DUPLICATES_MAX:
                self._sample_duplicates(shard, result)
            self._on_settled()

    def _count(self, batch: Batch, result: BatchResult) -> None:
        recorder = self._recorder
        recorder.add(BATCHES, ("committed",))
        recorder.observe(BATCH_MESSAGES, (), len(batch.deliveries))
        for (handler, topic, _, label), count in result.counts.items():
            outcome, _, cause = label.partition(":")
            if outcome != "dead_lettered":  # counted below, with their reasons
                outcome = "applied" if outcome == "kept" else outcome
                recorder.add(MESSAGES, (handler.name, topic, outcome, cause), count)
        for delivery, dead in result.dead.items():
            recorder.add(MESSAGES, (delivery.handler.name, delivery.record.topic, "dead_lettered", dead.reason.value))
        for delivery, failure in result.failures.items():
            self._attempt_failed(delivery, failure.error)

    def _observe_delays(self, result: BatchResult, now_ms: float) -> None:
        for labels, applied in _by_handler_and_topic(result):
            step = -(-len(applied) // _DELAYS_MAX) or 1
            for first in range(0, len(applied), step):
                timestamp = applied[first].record.timestamp
                if is_time(timestamp):
                    share = min(step, len(applied) - first)
                    self._recorder.observe(DELAY, labels, (now_ms - timestamp) / 1000, share)

    def _sample_duplicates(self, shard: str, result: BatchResult) -> None:
        for delivery, outcome in result.outcomes.items():
            if type(outcome) is Duplicate and outcome.cause in _IN_LEDGER:
                handler = delivery.handler
                self.duplicates.append(SampledDuplicate(shard, handler.number, handler.name, delivery.id))
                if len(self.duplicates) >= DUPLICATES_MAX:
                    return

    def transaction_failed(self, error: Exception) -> None:
        """Count a transaction that was undone."""
        match error:
            case TransactionPoisoned():
                self._recorder.add(BATCHES, ("isolated",))
            case Conflict():
                self._recorder.add(BATCHES, ("conflict",))
            case Outage() | OSError():
                self._recorder.add(BATCHES, ("outage",))
            case Fenced():
                self._recorder.add(BATCHES, ("fenced",))
            case _:
                pass

    def attempts_failed(self, deliveries: Iterable[Delivery], error: BaseException) -> None:
        """Count failed attempts that are in no result."""
        with self._guarded():
            for delivery in deliveries:
                self._attempt_failed(delivery, error)

    def _attempt_failed(self, delivery: Delivery, error: BaseException) -> None:
        kind = sqlstate_of(error) or type(error).__name__
        self._recorder.add(FAILED_ATTEMPTS, (delivery.handler.name, delivery.record.topic, kind))


def _by_handler_and_topic(result: BatchResult) -> Iterable[tuple[tuple[str, str], Sequence[Delivery]]]:
    """Return the applied messages of each handler and topic."""
    kinds = {(handler.name, topic) for handler, topic, _, label in result.counts if label == "kept"}
    if len(kinds) == 1:  # fast path: most batches are of one handler
        return [(kinds.pop(), result.applied)]
    groups: dict[tuple[str, str], list[Delivery]] = {}
    for delivery in result.applied:
        groups.setdefault((delivery.handler.name, delivery.record.topic), []).append(delivery)
    return groups.items()
