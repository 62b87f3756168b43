"""Settles batches on one connection, in one line of steps.

The steps: identify, pre-check, check the other shards, observe, call other systems, settle, publish the result. A batch
is settled whatever happens, unless its partitions go away first: then their next owner reads it again. Limitations: does
not know whether the worker still owns its partitions. The claims and the positions in PostgreSQL do.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from consumer.core.delivery import Batch, Delivery
from consumer.core.errors import ConsumerError
from consumer.core.evidence import Evidence
from consumer.core.outcome import RetryLater
from consumer.decoders.preparation import set_aside
from consumer.effects.stage import EffectStage
from consumer.logs import describe, event
from consumer.postgres.errors import Conflict, Fenced, Outage, lock_timed_out, sqlstate_of
from consumer.postgres.session import Session
from consumer.retention.task import Timestamps
from consumer.settings import Settings
from consumer.transaction import apply
from consumer.transaction.dead_letter_rate import DeadLetterRateLimit, TooManyDeadLetters
from consumer.transaction.errors import facts_of
from consumer.transaction.identify import identify
from consumer.transaction.isolate import FAILURES_MAX, Part, TransactionPoisoned, run_smaller
from consumer.transaction.limits import HandlerTimeout, HandlerUncancellable
from consumer.transaction.observe import observe
from consumer.transaction.result import BatchResult
from consumer.transaction.settle import next_parts, pause_seconds, settle
from consumer.worker.batch_results import BatchResults
from consumer.worker.connections import Connections
from consumer.worker.lifetime import Lifetime
from consumer.worker.message_log import MessageLog
from consumer.worker.partitions import Partitions
from consumer.worker.shard import LaneState
from consumer.worker.shard_check import ShardCheck
from consumer.worker.wait_reports import Reporter

SPARE_CONNECTION_SECONDS = 60.0  # the first lane of a database keeps its connection for ever
_LAST_WORD_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class LaneServices:
    """What the lanes of one worker share.

    turn: the number under which its transactions take turns after conflicts. has_effects: whether any handler calls
    another system before its transaction. has_schemas: whether any decoder has a schema registry.
    """

    settings: Settings
    partitions: Partitions
    connections: Connections
    shard_check: ShardCheck
    results: BatchResults
    reporters: Mapping[str, Reporter]
    message_log: MessageLog
    evidence: Evidence
    dead_letter_rate: DeadLetterRateLimit
    timestamps: Timestamps
    lifetime: Lifetime
    turn: int
    random: Callable[[], float]
    on_step: Callable[[str], None]
    has_effects: bool
    has_schemas: bool


class LaneRunner:
    """The loop of one lane."""

    def __init__(self, lane: LaneState, services: LaneServices) -> None:
        self.lane = lane
        self.services = services
        self._table = services.partitions.table

    async def run(self) -> None:
        """Settle one batch after the other. Raises what must end the worker."""
        lane, services = self.lane, self.services
        while True:
            batch = self._take()
            if batch is None:
                await self._wait()
                continue
            lane.idle.clear()
            services.partitions.room.set()
            try:
                await self.settle_batch(batch)
            finally:
                lane.worked_at = time.monotonic()
                lane.shard.scheduler.finish(batch)
                lane.shard.starts.ended(lane.number)
                services.partitions.room.set()  # an idle lane is a reason to read on
            if lane.shard.crowded_until > time.monotonic():
                await services.connections.give_back(lane, is_idle=False)

    def _take(self) -> Batch | None:
        settings, shard = self.services.settings, self.lane.shard
        if not self._table.has_assignment or self.services.lifetime.is_stopping or not shard.starts.may_begin:
            return None
        scheduler = shard.scheduler
        batch = scheduler.take(
            time.monotonic(),
            settings.batch_messages_max,
            settings.batch_bytes_max,
            shard.starts.partitions_max(len(scheduler.partitions)),
        )
        if batch is not None:
            scheduler.begin(batch)
            shard.starts.began(self.lane.number, leaves_more=scheduler.has_more)
        return batch

    async def _wait(self) -> None:
        """Wait until there may be a batch."""
        lane = self.lane
        if lane.shard.crowded_until > time.monotonic():
            await self.services.connections.give_back(lane, is_idle=True)
        lane.idle.set()
        lane.wake.clear()
        due = lane.shard.scheduler.next_due() if self._table.has_assignment else None
        spare_at = self._close_spare_connection()
        until = min((moment for moment in (due, spare_at) if moment is not None), default=None)
        with suppress(TimeoutError):
            timeout = None if until is None else max(0.001, until - time.monotonic())
            await asyncio.wait_for(lane.wake.wait(), timeout)

    def _close_spare_connection(self) -> float | None:
        """Close the connection of a further lane that was idle for long.

        Returns when it is to be closed, in monotonic seconds; None if never.
        """
        lane = self.lane
        if lane.number == 0 or lane.session is None:
            return None
        spare_at = lane.worked_at + SPARE_CONNECTION_SECONDS
        if spare_at > time.monotonic():
            return spare_at
        lane.session.close()
        lane.session = None
        return None

    # -- the way of a batch -----------------------------------------------------------------------------------------

    async def settle_batch(self, batch: Batch) -> None:
        """Take a batch through all steps."""
        epoch = self._table.assignment_epoch(self.lane.shard.name)
        if self.services.has_schemas:
            await self._identify_with_schemas(batch)
        else:
            self._identify(batch.deliveries)
        await self._pre_check(batch)
        if await self.services.shard_check.is_in_no_other_shard(self.lane, batch):
            await self._observe(batch)
            if not self.services.has_effects or await self._call_other_systems(batch, epoch):
                await self._settle(batch, epoch)

    async def _identify_with_schemas(self, batch: Batch) -> None:
        """Identify the messages whose schema is known; the others wait."""
        self._identify(await set_aside(batch.deliveries))

    def _identify(self, deliveries: Sequence[Delivery]) -> None:
        self.services.timestamps.look(deliveries)
        by_offset = identify(deliveries, self.lane.shard.ids.logs)
        if by_offset:
            self.services.results.warn_of_offset_ids(by_offset)

    async def _pre_check(self, batch: Batch) -> None:
        if (precheck := self.lane.shard.precheck) is not None:
            await precheck.check(batch.deliveries, time.time())
            self.services.on_step("prechecked")

    async def _observe(self, batch: Batch) -> None:
        """Run the handlers that opted out of the guarantee."""
        for delivery, error in await observe(batch.deliveries, self.services.random, self.lane.calls):
            self.services.message_log.log_failure(delivery, error, delivery.outcome)
            self.services.results.attempts_failed([delivery], error)

    async def _call_other_systems(self, batch: Batch, epoch: int) -> bool:
        """Make the calls of effects.

        Waits until PostgreSQL has their intents, and their results. Returns False if the partitions are not this
        worker's any more.
        """
        lane, services = self.lane, self.services
        stage = EffectStage(
            lane.shard.ids, lane.shard.scheduler, services.random, services.on_step, lane.calls, services.evidence
        )
        part = Part(batch)
        while await self._prepare(part, epoch):
            try:
                with lane.calls.transaction():
                    await stage.run(self._session, batch.deliveries)
            except (Conflict, Outage, OSError) as error:
                await self._pause_after(part, error)
                part = replace(part, failures=part.failures + 1)
                continue
            for delivery, failure in stage.failures:
                services.message_log.log_failure(delivery, failure, delivery.outcome)
                services.results.attempts_failed([delivery], failure)
            return True
        return False

    async def _settle(self, batch: Batch, epoch: int) -> None:
        """Settle a batch in one or more transactions; publish each result."""
        async for part, result in settle(
            [batch],
            lambda part: self._prepare(part, epoch),
            self._attempt,
            lambda part, error: self._after_failure(part, error, epoch),
        ):
            await self.services.results.publish(self.lane, self._session, part.batch, result)

    @property
    def _session(self) -> Session:
        assert self.lane.session is not None, "_prepare comes first"
        return self.lane.session

    async def _prepare(self, part: Part, epoch: int) -> bool:
        """Open the lane's connection if it has none.

        Returns False if the partitions are not this worker's any more.
        """
        lane, services = self.lane, self.services
        lane.part = part.batch
        if lane.session is None or not lane.session.is_usable:
            lane.idle.set()  # nothing is in flight: a rebalance need not wait until the database is back
            lane.session = await services.connections.open(lane.shard)
            lane.opened_at = time.monotonic()
            if lane.session is None or epoch != self._table.assignment_epoch(lane.shard.name):
                return False
            lane.idle.clear()
            if lane.session.epoch != lane.shard.epoch:
                services.partitions.new_epoch(lane.shard, lane.session.epoch)
                return False
        return True

    async def _attempt(self, part: Part) -> BatchResult:
        """Run a part of a batch in one transaction."""
        lane, services, session = self.lane, self.services, self._session
        session.turn = services.turn if lane.turns.is_needed else None
        with lane.calls.transaction():
            result = await apply.apply_batch(
                session,
                lane.shard.ids,
                lane.shard.scheduler,
                part.batch,
                use_savepoints=part.use_savepoints,
                random=services.random,
                on_step=lane.calls.wrap_step(services.on_step),
                calls=lane.calls,
                limit=services.dead_letter_rate,
                evidence=services.evidence,
            )
        if session.turn is None and lane.turns.is_needed:
            lane.turns.timed_out()
        lane.turns.committed()
        return result

    async def _after_failure(self, part: Part, error: Exception, epoch: int) -> Sequence[Part] | None:
        """Report a failed transaction, wait, and return what runs next.

        None: the partitions are read again.
        """
        lane, services = self.lane, self.services
        services.results.transaction_failed(error)
        match error:
            case TransactionPoisoned():
                return self._cut(part, error)
            case Conflict() | Outage():
                if epoch != self._table.assignment_epoch(lane.shard.name):
                    return None
                return await self._run_again(part, error)
            case TooManyDeadLetters():
                reporter = services.reporters[lane.shard.name]
                await reporter.record_halt(self._session.connection, part.batch.deliveries, error)
                raise error
            case Fenced():
                event(logging.WARNING, "positions have moved: reading them again", lane=lane.number, **lane.shard.label)
                services.partitions.reopen(lane.shard, part.batch.partition_epochs)
                return None
            case _:
                raise error

    def _cut(self, part: Part, error: TransactionPoisoned) -> Sequence[Part]:
        """Return what runs after a message spoiled the transaction."""
        services, deliveries = self.services, part.batch.deliveries
        if isinstance(error.__cause__, HandlerTimeout) and error.__cause__.in_statement:
            self.lane.turns.conflicted()
        parts = self._next_parts(part, error)
        if len(deliveries) == 1 and isinstance(deliveries[0].outcome, RetryLater):
            services.message_log.log_failure(deliveries[0], error.__cause__, deliveries[0].outcome)
        return parts

    async def _run_again(self, part: Part, error: Conflict | Outage) -> Sequence[Part]:
        """Pause after a conflict or an outage; return what runs next."""
        cause = error.__cause__ or error
        # A lock timeout may have any cause: taking turns would only hold up the other lanes.
        if isinstance(error, Conflict) and not lock_timed_out(cause):
            self.lane.turns.conflicted()
        parts = self._next_parts(part, error)
        await self._pause_after(part, error)
        return parts

    async def _pause_after(self, part: Part, error: Exception) -> None:
        """Report a conflict or an outage that goes on, and pause."""
        services, shard = self.services, self.lane.shard
        cause = error.__cause__ or error
        if not isinstance(error, Conflict) or part.failures >= FAILURES_MAX:
            services.message_log.log_rarely(
                logging.WARNING,
                "the batch runs again",
                (shard.name, describe(cause)),
                {
                    "why": "conflict" if isinstance(error, Conflict) else "postgresql lost",
                    "error": describe(cause),
                    "sqlstate": sqlstate_of(cause),
                    "times": part.failures + 1,
                    **shard.label,
                },
            )
        # The first conflict runs again almost at once; repeated failures wait ever longer.
        await services.lifetime.pause(pause_seconds(part.failures) * (0.5 + services.random() / 2))

    def _next_parts(self, part: Part, error: Exception) -> Sequence[Part]:
        """Return what runs next, and count the messages at fault."""
        services = self.services
        undecided = [delivery for delivery in part.batch.deliveries if delivery.outcome is None]
        parts = next_parts(part, error, services.random, services.evidence)
        at_fault = [delivery for delivery in undecided if delivery.outcome is not None]
        services.results.attempts_failed(at_fault, error.__cause__ or error)
        return parts

    # -- before the process ends ------------------------------------------------------------------------------------

    async def record_stuck_attempt(self, stuck: HandlerUncancellable) -> None:
        """Count the attempt of a handler that cannot be stopped.

        Runs on another connection, before the process ends: otherwise the next process would find the message
        unattempted, and stop in the same way, for ever. Skips the call of a batch handler: which of its messages is at
        fault is unknown.
        """
        lane, services = self.lane, self.services
        deliveries = stuck.cause.deliveries
        if len(deliveries) > 1 or not deliveries[0].handler.idempotent or lane.part is None:
            return
        alone = Batch(list(deliveries), {}, lane.part.partition_epochs)
        facts = facts_of(stuck.cause, deliveries[0].handler.place)
        [part] = run_smaller(Part(alone, use_savepoints=True), facts, services.random)
        try:
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                session = await Session.open(lane.shard.settings)
                try:
                    if session.epoch != lane.shard.epoch:
                        return  # the database has another history: the attempt does not belong to it
                    await apply.apply_batch(
                        session,
                        lane.shard.ids,
                        lane.shard.scheduler,
                        part.batch,
                        use_savepoints=True,
                        random=services.random,
                        on_step=services.on_step,
                    )
                finally:
                    session.close()
        except (ConsumerError, TimeoutError) as error:
            event(logging.WARNING, "the attempt could not be counted", error=describe(error.__cause__ or error))
