"""Reads the range in lanes, and checks it chunk by chunk.

A chunk is checked in a transaction that is rolled back. Imports kafka and transaction.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence

from consumer.core.delivery import Batch, Delivery
from consumer.core.errors import CannotTell
from consumer.core.message import Partition, Record
from consumer.core.ordering import Scheduler
from consumer.decoders.preparation import fetch_schemas
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.log_reader import Chunk, read
from consumer.postgres.connection import dsn_label
from consumer.postgres.errors import Conflict, Outage
from consumer.replay.apply_missing import MissingMessages
from consumer.replay.chunk_check import ChunkCheck
from consumer.replay.chunk_counts import ChunkCounts
from consumer.replay.run import ReplayLane, Run
from consumer.replay.session import AskingScheduler
from consumer.transaction.dry_run import dry_run
from consumer.transaction.identify import identify
from consumer.transaction.isolate import FAILURES_MAX, TransactionPoisoned

_NO_DELAYS = Scheduler({}, 1)  # the check looks at every message, whatever it waits for


class Reader:
    """Reads all spans, checks every chunk, and settles missing messages."""

    def __init__(self, run: Run, save: Callable[[], None]) -> None:
        self._run = run
        self._save = save
        self._missing = MissingMessages(run)
        self._redis_timeouts = 0  # consecutive ones
        self._skipping = {
            topic: [handler.name for handler in handlers if not handler.idempotent and not run.options.handlers]
            for topic, handlers in run.app.by_topic().items()
        }

    async def read(self, source: KafkaConsumer) -> None:
        """Read all spans to their ends."""
        run = self._run
        spans = [span for span in run.findings.spans if span.length]
        by_topic = run.app.by_topic()
        run.lanes = [
            ReplayLane(AskingScheduler(by_topic, run.settings.parked_messages_max), asyncio.Queue(2))
            for _ in range(max(1, min(run.settings.lanes_max, len(spans))))
        ]
        sessions = await asyncio.gather(*[run.primary.open() for _ in run.lanes])
        for lane, session in zip(run.lanes, sessions, strict=True):
            lane.checking = session
        lane_of: dict[Partition, ReplayLane] = {}
        for n, span in enumerate(spans):
            lane = lane_of[span.partition] = run.lanes[n % len(run.lanes)]
            lane.scheduler.assign(span.partition, run.resumed_at.get(span.partition, span.first))
        todo = [span._replace(first=lane_of[span.partition].scheduler.position(span.partition)) for span in spans]
        try:
            async with asyncio.TaskGroup() as tasks:
                for lane in run.lanes:
                    tasks.create_task(self._run_lane(lane))
                async for chunk in read(source, todo):
                    for records, end in self._cut(chunk):
                        await lane_of[chunk.partition].chunks.put((chunk.partition, records, end))
                for lane in run.lanes:
                    await lane.chunks.put(None)
        except BaseExceptionGroup as group:
            raise _first_error(group) from None

    def _cut(self, chunk: Chunk) -> list[tuple[Sequence[Record], int]]:
        """Cut a chunk to the size of transactions.

        invariant: no piece holds both records that were counted before an interruption and others.
        """
        counted = self._run.counted.before.get(chunk.partition, 0)
        if chunk.records and chunk.records[0].offset < counted <= chunk.records[-1].offset:
            before = [record for record in chunk.records if record.offset < counted]
            after = Chunk(chunk.partition, chunk.records[len(before) :], chunk.next)
            return self._cut(Chunk(chunk.partition, before, counted)) + self._cut(after)
        handlers = max(1, len(self._run.handlers_of(chunk.partition.topic)))
        size = max(1, self._run.limits.chunk_deliveries // handlers)
        if len(chunk.records) <= size:
            return [(chunk.records, chunk.next)]
        pieces = [chunk.records[n : n + size] for n in range(0, len(chunk.records), size)]
        return [(piece, piece[-1].offset + 1) for piece in pieces[:-1]] + [(pieces[-1], chunk.next)]

    async def _run_lane(self, lane: ReplayLane) -> None:
        while (piece := await lane.chunks.get()) is not None:
            await self._check(lane, *piece)
            await self._missing.store_due(lane)
            self._run.report_progress()
            self._save()
        while lane.scheduler.delayed:
            await self._missing.store_delayed(lane)
            self._run.report_progress()
            self._save()

    async def _check(self, lane: ReplayLane, partition: Partition, records: Sequence[Record], end: int) -> None:
        """Check records of one partition, and settle what is missing."""
        run = self._run
        if run.key is not None:
            records = [record for record in records if record.key == run.key]
        handlers = run.handlers_of(partition.topic)
        deliveries = [Delivery(handler, record) for record in records for handler in handlers]
        await fetch_schemas(deliveries, run.settings)
        run.offset_ids |= identify(deliveries, run.ids.logs)
        if run.message_ids is not None:
            deliveries = [delivery for delivery in deliveries if delivery.id in run.message_ids]
        chunk = ChunkCheck(run.check, partition, deliveries)
        if deliveries:
            await self._claim_all(lane, Batch(deliveries, {}, {}), chunk)
            await chunk.sort()
        counts = ChunkCounts(chunk)
        if run.applies:
            self._count(chunk, counts, records, end)
            await self._missing.store(lane, lane.scheduler.batch_up_to(partition, chunk.missing, end))
            return
        would = await self._missing.would_become(lane, chunk.missing)
        # invariant: from here on without waiting. The counts and the position must never disagree, or an interrupted
        # replay could not resume.
        self._count(chunk, counts, records, end)
        counts.count_missing(would)
        batch = lane.scheduler.batch_up_to(partition, (), end)
        lane.scheduler.settle(batch, {}, lane.scheduler.position_updates(batch, ()))

    def _count(self, chunk: ChunkCheck, counts: ChunkCounts, records: Sequence[Record], end: int) -> None:
        run, partition = self._run, chunk.partition
        counts.count_effects()
        if records and records[-1].offset < run.counted.before.get(partition, 0):
            return
        run.counted.now[partition] = end
        run.findings.read[partition] = run.findings.read.get(partition, 0) + len(records)
        if records and run.message_ids is None:
            for name in self._skipping.get(partition.topic, ()):
                run.findings.count(name, partition, "skipped", len(records))
        counts.count_settled()

    async def _claim_all(self, lane: ReplayLane, batch: Batch, chunk: ChunkCheck) -> None:
        """Claim all messages, run wrongly won ones, count writes, roll back."""
        run = self._run
        failures = 0
        while True:
            if lane.checking is None or not lane.checking.is_usable:
                run.lost_sequences = True
                lane.checking = await run.primary.open()
            chunk.begin()
            await self._ask_precheck(batch, chunk)
            try:
                await dry_run(
                    lane.checking, run.ids, _NO_DELAYS, batch, chunk, use_savepoints=False, random=random.random
                )
            except TransactionPoisoned:
                pass  # a handler that ran although its message is applied, and failed: the chunk has seen the claim
            except (Conflict, Outage) as error:
                failures += 1
                if failures > FAILURES_MAX:
                    raise CannotTell(
                        f"{dsn_label(run.settings.dsn)}: {error or type(error).__name__}, {failures} times in a row "
                        f"({run.how_far()})"
                    ) from None
                await asyncio.sleep(0.05 * 2.0**failures)
                continue
            return

    async def _ask_precheck(self, batch: Batch, chunk: ChunkCheck) -> None:
        run = self._run
        if run.precheck is None or run.findings.precheck is None:
            return
        chunk.precheck_hits = None
        if self._redis_timeouts < run.limits.redis_timeouts:
            asked = [delivery for delivery in batch.deliveries if delivery.outcome is None]
            chunk.precheck_hits = await run.precheck.known(asked, time.time())
            self._redis_timeouts = 0 if chunk.precheck_hits is not None else self._redis_timeouts + 1


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the failure that cancelled the other tasks."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
