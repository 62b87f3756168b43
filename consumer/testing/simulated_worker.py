"""Simulates a worker from its start to its end or its crash.

It settles batches of given records as `worker.Worker` does.

Knows a Scheduler, a Session and handlers. Knows no Kafka, no Redis and no clock: a retry's time comes when nothing else is
left.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

from consumer.app import App
from consumer.core.delivery import Batch, Delivery
from consumer.core.errors import Reject, Unreadable
from consumer.core.handler import Handler
from consumer.core.log_identity import Position
from consumer.core.message import Partition, Record
from consumer.core.ordering import Scheduler
from consumer.core.outcome import APPLIED, Applied, Cause, Dead, Duplicate, Outcome, RetryLater, Skipped
from consumer.decoders.preparation import fetch_schemas
from consumer.effects.stage import EffectStage
from consumer.postgres.session import Session
from consumer.replay.effects import Rows, rows_written, sequences_moved
from consumer.settings import Settings
from consumer.testing.messages import Delivered, Sent, place_of
from consumer.testing.outside_statements import Watch
from consumer.testing.server import BE_COUNTED, close
from consumer.transaction.apply import apply_batch
from consumer.transaction.errors import error_text, is_uncounted
from consumer.transaction.identify import identify
from consumer.transaction.isolate import PUT_ASIDE, Part, TransactionPoisoned
from consumer.transaction.observe import observe
from consumer.transaction.result import BatchResult, LedgerIds, complete
from consumer.transaction.settle import next_parts, settle

_AGAIN_MAX = 20  # times in a row without anything else, before a message is left waiting
_EVERYTHING = 1 << 60  # messages, or bytes: a batch is as large as the test says
_log = logging.getLogger("consumer.testing")

_Place: TypeAlias = tuple[str, str, int, int]  # handler, topic, partition, offset
Key: TypeAlias = tuple[str, bytes]  # handler, message id


@dataclass(slots=True)
class Written:
    """One committed transaction: its rows, and the messages applied in it.

    is_known: False where a crash hid which messages were applied.
    """

    rows: Mapping[str, Rows]
    first: list[str]
    again: list[str]
    is_known: bool = True


@dataclass(slots=True)
class Round:
    """One delivery: outcomes, stored rows and moved sequences."""

    what: str
    delivered: list[Delivered] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    sequences: list[str] = field(default_factory=list)


class SimulatedCrash(BaseException):
    """Raised at a step, to simulate a crash.

    Not an Exception, so that only the code that drops the connection handles it.
    """


class _Counting(Session):
    """A Session that counts what a transaction wrote, before its COMMIT."""

    rows: Mapping[str, Rows] = {}
    watch: Watch
    _before: Mapping[str, Rows] = {}

    async def begin(self) -> None:
        await super().begin()
        self.rows = {}
        self._before = await rows_written(self.connection)

    async def commit(self) -> None:
        await self.check_constraints()  # a COMMIT does that first, and deferred triggers may write
        rows = await rows_written(self.connection, self._before)
        await self.watch.committing(self.connection, rows)
        self.rows = rows
        await super().commit()
        self.watch.committed()


class SimulatedWorker:
    """Simulates one worker. `run` it once.

    applied: what was ever applied, by this worker or those before it; it is added to.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        round_: Round,
        records: Sequence[tuple[Sent, Record]],
        crash_at: str | None,
        applied: set[Key],
        watch: Watch,
    ) -> None:
        self._app = app
        self._settings = settings
        self._round = round_
        self._records = records
        self._crash_at = crash_at
        self._applied = applied
        self._watch = watch
        self._lane = Scheduler(app.by_topic(), _EVERYTHING)
        self._ends: dict[_Place, tuple[Outcome | str, int, BaseException | None]] = {}
        self._errors: dict[Delivery, BaseException] = {}
        self._again = 0  # times in a row that a handler asked to be run again, which counts as no attempt
        self._unsettled: set[Delivery] = set()  # of the batch that is settled now
        self._is_stuck = False  # something met an outage or a conflict again and again: it is not tried for ever
        self._session: _Counting
        self._names: LedgerIds

    async def run(self, batch: int, retry: bool) -> None:
        """Deliver the records, `batch` messages at a time.

        retry: try failed messages again.

        Raises what Session.open raises, and what no message is to blame for.
        """
        await self._open()
        try:
            await self._start()
            with suppress(SimulatedCrash):
                await self._settle_all(batch, retry)
                if self._session.is_usable:
                    self._round.sequences = await sequences_moved(self._session.connection)
            await self._watch.end()
        finally:
            await close(self._session.connection)
        self._report()

    async def _open(self) -> None:
        session = await _Counting.open(self._settings, init=self._app.connection_init)
        assert isinstance(session, _Counting)
        self._session = session
        session.watch = self._watch
        await self._session.connection.execute(BE_COUNTED)
        self._watch.own(self._session.handler_connection)

    async def _start(self) -> None:
        name = self._app.name
        numbers, topics = await self._session.numbers(name, self._app.handlers, self._app.topics)
        self._names = LedgerIds(name, topics)
        partitions = sorted({Partition(record.topic, record.partition) for _, record in self._records})
        await self._session.begin_positions(name, dict.fromkeys(partitions, Position(0)))
        for partition, position in (await self._session.positions(name, partitions)).items():
            self._lane.assign(partition, position.offset)
        for handler in self._app.handlers.values():
            handler.number = numbers[handler.name]
            handler.call = self._watch.around(handler)
        await self._watch.start()

    async def _settle_all(self, size: int, retry: bool) -> None:
        chunks = iter([self._records[n : n + size] for n in range(0, len(self._records), size)])
        now = 0.0
        while True:
            batch = self._lane.take(now, _EVERYTHING, _EVERYTHING)
            if batch is not None:
                await self._settle(batch, now)
            elif chunk := next(chunks, None):
                self._feed([record for _, record in chunk])
            else:
                due = self._lane.next_due()
                if due is None or not retry or self._is_stuck:
                    return
                now = due

    def _feed(self, records: Sequence[Record]) -> None:
        by_partition: dict[Partition, list[Record]] = {}
        for record in records:
            by_partition.setdefault(Partition(record.topic, record.partition), []).append(record)
        for partition, its_records in by_partition.items():
            self._lane.add(partition, its_records)

    async def _settle(self, batch: Batch, now: float) -> None:
        await fetch_schemas(batch.deliveries, self._settings)
        identify(batch.deliveries)
        for delivery, error in await observe(batch.deliveries, _draw):
            self._failed(delivery, error)
        self._unsettled = set(batch.deliveries)
        await self._call_other_systems(batch)
        async for part, result in settle([batch], self._prepare, self._attempt, self._after_failure):
            self._unsettled.difference_update(part.batch.deliveries)
            self._settled(part.batch, result, now)

    async def _call_other_systems(self, batch: Batch) -> None:
        """Make the calls of effects, by the stand-ins that the test gives."""
        if not any(delivery.handler.effect is not None for delivery in batch.deliveries):
            return
        if not self._session.is_usable:
            await self._open()
        stage = EffectStage(self._names, self._lane, _draw, self._step)
        try:
            await stage.run(self._session, batch.deliveries)
        except SimulatedCrash:
            self._crashed(batch)
            raise
        for delivery, error in stage.failures:
            self._failed(delivery, error)

    async def _prepare(self, part: Part) -> bool:
        if not self._session.is_usable:
            await self._open()
        return True

    async def _attempt(self, part: Part) -> BatchResult:
        try:
            return await apply_batch(
                self._session,
                self._names,
                self._lane,
                part.batch,
                use_savepoints=part.use_savepoints,
                random=_draw,
                on_step=self._step,
            )
        except SimulatedCrash:
            self._crashed(part.batch)
            raise

    async def _after_failure(self, part: Part, error: Exception) -> Sequence[Part]:
        parts = next_parts(part, error, _draw)
        if isinstance(error, TransactionPoisoned):
            if len(part.batch.deliveries) == 1 and error.__cause__ is not None:
                self._failed(part.batch.deliveries[0], error.__cause__)
            return parts
        for delivery in part.batch.deliveries:
            if isinstance(delivery.outcome, RetryLater) and delivery.outcome.error == PUT_ASIDE:
                self._failed(delivery, error.__cause__ or error)
                self._is_stuck = True
        return parts

    def _step(self, step: str) -> None:
        if step == self._crash_at:
            raise SimulatedCrash

    def _settled(self, part: Batch, done: BatchResult, now: float) -> None:
        complete(self._lane, part, done, now)
        for delivery, failure in done.failures.items():
            self._failed(delivery, failure.error)
        # Where all that ran has failed, savepoints undid what it wrote, and PostgreSQL's counts do not tell.
        is_undone = done.failures and not done.applied
        written = Written({} if is_undone else self._session.rows, [], [])
        if done.applied:
            self._again = 0
        for delivery in done.applied:
            self._end(delivery, APPLIED)
            (written.again if _key(delivery) in self._applied else written.first).append(_label(delivery))
            self._applied.add(_key(delivery))
        for delivery, outcome in done.outcomes.items():
            self._end(delivery, outcome)
            if outcome == Duplicate(Cause.LEDGER):  # applied before, by a transaction that a crash hid perhaps
                self._applied.add(_key(delivery))
        if written.rows or written.again:
            self._round.written.append(written)

    def _crashed(self, part: Batch) -> None:
        for delivery in self._unsettled:
            self._end(delivery, "crashed")
        if self._session.rows:  # it was committed, and the crash hides for whom, unless all were applied before
            again = [_label(delivery) for delivery in part.deliveries if _key(delivery) in self._applied]
            is_known = len(again) == len(part.deliveries)
            self._round.written.append(Written(self._session.rows, [], again if is_known else [], is_known=False))

    def _failed(self, delivery: Delivery, error: BaseException) -> None:
        self._errors[delivery] = error
        if is_uncounted(error):
            self._again += 1
            self._is_stuck = self._is_stuck or self._again > _AGAIN_MAX
        # pytest shows it, with its traceback, where the test fails.
        traceback = None if isinstance(error, Reject | Unreadable) else error
        _log.warning("%s failed: %s", _label(delivery), _text(error), exc_info=traceback)

    def _end(self, delivery: Delivery, outcome: Outcome | str) -> None:
        end = (outcome, delivery.attempts, self._errors.get(delivery))
        self._ends[_place(delivery.handler, delivery.record)] = end

    def _report(self) -> None:
        handlers = self._app.by_topic()
        for message, record in self._records:
            for handler in handlers[record.topic]:
                outcome, attempts, error = self._ends.get(_place(handler, record), ("not delivered", 0, None))
                word, cause, text = _words(outcome, error)
                self._round.delivered.append(
                    Delivered(handler.name, message, record.offset, word, cause, text, attempts, error)
                )


def _draw() -> float:
    return 0.5  # chance has no place in a test


def _key(delivery: Delivery) -> Key:
    return delivery.handler.name, delivery.id


def _place(handler: Handler, record: Record) -> _Place:
    return handler.name, record.topic, record.partition, record.offset


def _label(delivery: Delivery) -> str:
    return f"{delivery.handler.name} on {place_of(delivery.record)}"


def _text(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error_text(error)}" if error is not None else "unknown"


def _words(outcome: Outcome | str, error: BaseException | None) -> tuple[str, str, str]:
    """Outcome, cause and error, as a Delivered has them."""
    match outcome:
        case str():
            return outcome, "", ""
        case Applied():
            return "applied", "", ""
        case Duplicate(cause):
            return "duplicate", cause.value, ""
        case Dead(reason, text):
            return "dead-lettered", reason.value, text
        case Skipped():
            return "skipped", "", ""
        case RetryLater(_, text):
            return "waiting", "", f"{text} ({_text(error)})" if text == PUT_ASIDE else text
