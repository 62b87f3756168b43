"""Reports a worker's metrics to its supervisor.

Counters soon after each batch, so that little is lost if the process is killed; gauges at every beat. Limitations: nothing is
known of what the supervisor has read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import suppress

from consumer.core.handler import Handler
from consumer.deferred_writes.writer import ungrouped
from consumer.kafka.errors import KafkaError
from consumer.logs import describe, event
from consumer.metrics.catalog import DUPLICATE_AGE, LOOP_BLOCKED, OUTBOX_PUBLISHED, REBALANCES, UNGROUPED
from consumer.metrics.recorder import Recorder
from consumer.postgres import figures
from consumer.postgres.session import Session
from consumer.worker.assignment import Report
from consumer.worker.batch_metrics import BatchMetrics, SampledDuplicate
from consumer.worker.partition_table import State
from consumer.worker.shard import Shard
from consumer.worker.worker_gauges import WorkerState

_BEAT_SECONDS = 1.0
_SOON_SECONDS = (
    0.02  # between two reports of counters, at least: at a thousand batches a second they would cost too much
)
_BLOCKED_SECONDS = 0.05  # a beat that is late by less is not the event loop's fault
_AGES_SECONDS = 2.0
_ENDS_SECONDS = 10.0
_ANSWER_SECONDS = 5.0


class MetricsReport:
    """Sends what a worker's recorder has counted.

    batches: counts the batches of the worker's lanes.
    """

    def __init__(self, recorder: Recorder, handlers: Iterable[Handler], worker: WorkerState, report: Report) -> None:
        self._recorder = recorder
        self._worker = worker
        self._report = report
        self._soon: asyncio.TimerHandle | None = None
        self._sent_at = 0.0
        self._asked_at = {"ages": 0.0, "ends": 0.0}
        self._is_logged = False
        self.batches = BatchMetrics(recorder, handlers, self._send_soon)

    async def run(self) -> None:
        """Report at every beat until cancelled. No failure ends it."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            late = time.monotonic() - before - _BEAT_SECONDS
            try:
                if late > _BLOCKED_SECONDS:
                    self._recorder.add(LOOP_BLOCKED, (), late)
                self._send_beat()
                await self._ask()
            except Exception as error:
                if not self._is_logged:
                    self._is_logged = True
                    event(logging.ERROR, "metrics cannot be reported", error=describe(error))
            before = time.monotonic()

    def last(self) -> None:
        """Report once more, before the process ends."""
        if self._soon is not None:
            self._soon.cancel()
        with suppress(Exception):
            self._send_beat()

    # -- sending ------------------------------------------------------------------------------------------------------

    def _send_soon(self) -> None:
        """Report counters, a little later if they were reported just now."""
        if self._soon is not None:
            return
        pause = self._sent_at + _SOON_SECONDS - time.monotonic()
        if pause > 0:
            self._soon = asyncio.get_running_loop().call_later(pause, self._send_changes)
        else:
            self._send_changes()

    def _send_changes(self) -> None:
        self._soon = None
        self._sent_at = time.monotonic()
        if self._report({"metrics": self._recorder.beat()}) is not False:
            self._recorder.sent()

    def _send_beat(self) -> None:
        worker, recorder = self._worker, self._recorder
        recorder.raise_to(REBALANCES, (), worker.partitions.table.assignments)
        for reason, executions in ungrouped.items():
            recorder.raise_to(UNGROUPED, (reason.value,), executions)
        for relay in worker.relays.values():
            for topic, rows in relay.published.items():
                recorder.raise_to(OUTBOX_PUBLISHED, (topic,), rows)
        if self._report({"metrics": recorder.beat(worker.gauges())}) is not False:
            recorder.sent()

    # -- asking -------------------------------------------------------------------------------------------------------

    async def _ask(self) -> None:
        """Ask what the worker's memory does not tell, from time to time."""
        if self._is_due("ages", _AGES_SECONDS):
            duplicates, self.batches.duplicates = self.batches.duplicates, []
            for shard in self._worker.shards:
                await self._ask_ages(shard, [one for one in duplicates if one.shard == shard.name])
        if self._is_due("ends", _ENDS_SECONDS):
            await self._ask_ends()

    def _is_due(self, question: str, seconds: float) -> bool:
        now = time.monotonic()
        if now - self._asked_at[question] < seconds:
            return False
        self._asked_at[question] = now
        return True

    async def _ask_ages(self, shard: Shard, duplicates: list[SampledDuplicate]) -> None:
        """Ask how long ago the first deliveries of duplicates were applied."""
        if not duplicates:
            return

        async def ask(session: Session) -> list[tuple[int, float]]:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await figures.duplicate_ages(
                    session.connection, [one.handler for one in duplicates], [one.id for one in duplicates]
                )

        ages = await self._worker.connections.try_with_control(shard, ask, "the ages of duplicates cannot be read now")
        names = {one.handler: one.name for one in duplicates}
        for handler, seconds in ages or ():
            self._recorder.observe(DUPLICATE_AGE, (names[handler],), seconds)

    async def _ask_ends(self) -> None:
        """Ask for the ends of logs that are not fetched.

        The client does not see them grow.
        """
        worker = self._worker
        stopped = [*worker.partitions.table.in_state(State.HALTED), *worker.partitions.table.in_state(State.REFUSED)]
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                worker.ends = dict(await worker.source.log.ends(stopped, partial=True)) if stopped else {}
        except (KafkaError, OSError):  # TimeoutError is an OSError: asked again later
            worker.ends = {}
