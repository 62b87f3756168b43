"""Runs the handlers of missing messages: stored, or rolled back.

Imports transaction and precheck.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial

from consumer.core.delivery import Batch, Delivery
from consumer.core.errors import CannotTell
from consumer.core.outcome import Applied, Dead, Duplicate, Outcome, RetryLater, Skipped
from consumer.effects.stage import leave_uncalled, take_results
from consumer.handler_records import handler_code
from consumer.postgres.connection import translated_errors
from consumer.postgres.errors import Conflict, Outage
from consumer.postgres.session import Session
from consumer.replay.run import ReplayLane, Run
from consumer.replay.samples import UNCALLED, delivery_place
from consumer.replay.session import ReplaySession
from consumer.transaction.apply import apply_batch
from consumer.transaction.dry_run import DryRunObserver, OnlyResult, dry_run
from consumer.transaction.identify import decode_failure
from consumer.transaction.isolate import Part
from consumer.transaction.result import BatchResult, complete
from consumer.transaction.settle import next_parts, pause_seconds, settle


class MissingMessages:
    """Settles the missing messages of all lanes of a replay."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._code_recorded_at = float("-inf")
        self._fruitless = 0  # attempts since a message was settled
        self._settled_at = time.monotonic()
        self._has_effects = any(handler.effect is not None for handler in run.app.handlers.values())

    async def would_become(self, lane: ReplayLane, missing: list[Delivery]) -> dict[Delivery, Outcome | None]:
        """Return what each missing message would become; None means applied.

        With call_handlers their handlers run and are rolled back.
        """
        if not self._run.options.call_handlers:
            return {delivery: decode_failure(delivery) or UNCALLED for delivery in missing}
        would: dict[Delivery, Outcome | None] = {}
        size = self._run.settings.batch_messages_max
        for start in range(0, len(missing), size):
            batch = Batch(missing[start : start + size], {}, {})
            async for part, result in self._settled(lane, batch, OnlyResult()):
                would |= {delivery: result.outcomes.get(delivery) for delivery in part.batch.deliveries}
        return would

    async def store(self, lane: ReplayLane, batch: Batch) -> None:
        """Apply missing messages, and retry failed ones by their policy.

        A failed message blocks its key meanwhile.
        """
        if not batch.deliveries:
            lane.scheduler.settle(batch, {}, lane.scheduler.position_updates(batch, ()))
            return
        async for part, result in self._settled(lane, batch, None):
            complete(lane.scheduler, part.batch, result, time.monotonic())
            if self._run.precheck is not None and lane.applying is not None:
                self._run.precheck.mark(result.applied, lane.applying.epoch, time.time())
            for delivery in part.batch.deliveries:
                self._count(delivery, result)

    async def store_due(self, lane: ReplayLane) -> None:
        """Retry delayed messages that are due, until the lane has room."""
        settings = self._run.settings
        while (retries := self._take(lane)) is not None or lane.scheduler.delayed >= settings.parked_messages_max:
            await self._retry(lane, retries)

    async def store_delayed(self, lane: ReplayLane) -> None:
        """Wait for the next delayed messages and retry them.

        Raises CannotTell when only retries have followed each other for too long.
        """
        limits = self._run.limits
        if (
            self._fruitless > limits.fruitless_attempts
            and time.monotonic() > self._settled_at + limits.fruitless_seconds
        ):
            raise CannotTell(
                f"{lane.scheduler.delayed:,} messages: their handlers ask to run again every time; correct the handlers "
                f"({self._run.how_far()})"
            )
        await self._retry(lane, self._take(lane))

    def _take(self, lane: ReplayLane) -> Batch | None:
        return lane.scheduler.take(time.monotonic(), self._run.settings.batch_messages_max, 1 << 62)

    async def _retry(self, lane: ReplayLane, batch: Batch | None) -> None:
        if batch is not None:
            await self.store(lane, batch)
            return
        due = lane.scheduler.next_due()
        await asyncio.sleep(max(0.0, due - time.monotonic()) if due is not None else 0.05)

    def _count(self, delivery: Delivery, result: BatchResult) -> None:
        findings, check = self._run.findings, self._run.check
        match result.outcomes.get(delivery):
            case None:
                outcome = "applied_now"
                check.count_applied(delivery)
            case Dead(reason):
                outcome = "dead_lettered_now"
                findings.sample(
                    outcome, **delivery_place(delivery), detail=f"{reason.value}: see `consumer dlq list APP`"
                )
            case RetryLater():
                self._fruitless += 1
                return
            case Applied() | Duplicate() | Skipped():
                outcome = "applied"  # by a worker, meanwhile
        self._fruitless, self._settled_at = 0, time.monotonic()
        check.missing.pop((delivery.handler.name, delivery.id), None)
        findings.count(delivery.handler.name, delivery.partition, outcome)
        findings.times.add([delivery.record.timestamp], outcome)

    def _settled(
        self, lane: ReplayLane, batch: Batch, observer: DryRunObserver | None
    ) -> AsyncIterator[tuple[Part, BatchResult]]:
        """Settle a batch as a worker does; yields its committed parts."""
        run = self._run

        async def prepare(part: Part) -> bool:
            if lane.applying is None or not lane.applying.is_usable:
                lane.applying = await run.primary.open(ReplaySession)
            if observer is None:
                await self._record_code(lane.applying)
            return True

        async def attempt(part: Part) -> BatchResult:
            assert lane.applying is not None
            if self._has_effects:
                with translated_errors(run.settings):
                    leave_uncalled(await take_results(lane.applying.connection, part.batch.deliveries))
            transaction = apply_batch if observer is None else partial(dry_run, observer=observer)
            return await transaction(
                lane.applying,
                run.ids,
                lane.scheduler,
                part.batch,
                use_savepoints=part.use_savepoints,
                random=random.random,
            )

        async def after_failure(part: Part, error: Exception) -> Sequence[Part]:
            parts = next_parts(part, error, random.random)
            if isinstance(error, Conflict | Outage):
                await asyncio.sleep(pause_seconds(part.failures))
            return parts

        return settle([batch], prepare, attempt, after_failure, rerun_late=observer is not None)

    async def _record_code(self, session: Session) -> None:
        """Record regularly that this code applies messages."""
        now = time.monotonic()
        if now - self._code_recorded_at > handler_code.RENEW_SECONDS:
            with translated_errors(self._run.settings):
                await handler_code.record(session.connection, self._run.app)
            self._code_recorded_at = now
