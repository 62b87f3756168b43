"""Reports waiting messages to the database.

Learns there what other workers have applied. Reads lanes; writes rows of postgres/waiting_messages.py. A worker without
waiting messages sends no query.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from uuid import uuid4

from consumer.core.delivery import Delivery
from consumer.core.evidence import Evidence, FailureCause
from consumer.core.message import Partition
from consumer.core.ordering import Scheduler
from consumer.postgres import positions, waiting_messages
from consumer.postgres.waiting_messages import WaitingRow
from consumer.transaction.dead_letter_rate import TooManyDeadLetters
from consumer.worker.message_log import MessageLog

SECONDS = 2.0
_ANSWER_SECONDS = 2.0
_ROWS_MAX = 200  # of one worker and database; further errors are not reported


class Reporter:
    """Reports what waits in the scheduler of one database."""

    def __init__(self, evidence: Evidence, message_log: MessageLog, scheduler: Scheduler) -> None:
        self._evidence = evidence
        self._message_log = message_log
        self._scheduler = scheduler
        self._worker = uuid4()
        self._written: list[WaitingRow] = []
        self._written_at = 0.0
        self._is_unsure = False  # a write began, and its answer is not known
        self._owned: set[Partition] = set()
        self._taking_over: dict[Partition, float] = {}  # until when rows of an earlier owner are searched
        self._handlers: set[int] = set()
        self._applied: dict[int, int] = {}
        self._full: set[Partition] = set()  # already logged

    def log_full(self, partition: Partition) -> None:
        """Log once that a partition is paused because it is full."""
        if partition in self._full:
            return
        self._full.add(partition)
        self._message_log.log_rarely(
            logging.WARNING,
            "partition not read on: too many of its messages wait (CONSUMER_PARKED_MESSAGES_MAX)",
            (partition,),
            {"topic": partition.topic, "partition": partition.partition},
        )

    def rows(self) -> tuple[list[WaitingRow], dict[int, str]]:
        """Return the waiting messages, and the names of their handlers by number."""
        by_error: dict[tuple[int, Partition, str], WaitingRow] = {}
        names: dict[int, str] = {}
        for head, count, read_up_to in self._scheduler.waiting():
            if head.failure_cause is None:
                continue
            names[head.handler.number] = head.handler.name
            key = (head.handler.number, head.partition, head.failure_cause.error)
            if (known := by_error.get(key)) is not None:
                why = head.failure_cause
                why = why._replace(since=min(why.since, known.why.since), systemic=why.systemic or known.why.systemic)
                by_error[key] = WaitingRow(key[0], key[1], known.messages + count, why, read_up_to)
            elif len(by_error) < _ROWS_MAX:
                by_error[key] = WaitingRow(key[0], key[1], count, head.failure_cause, read_up_to)
        return sorted(by_error.values(), key=lambda row: (row.handler, row.partition, row.why.error)), names

    async def report(self, connection: Any) -> None:
        """Write changed rows, renew the rest, and note other workers' successes."""
        now = time.monotonic()
        rows, names = self.rows()
        self._full = {partition for partition in self._full if self._scheduler.is_full(partition)}
        owned = set(self._scheduler.partitions)
        for partition in owned - self._owned:
            self._taking_over[partition] = now + 3 * waiting_messages.RENEW_SECONDS
        self._owned = owned
        self._handlers |= set(names)
        if (rows or self._written or self._is_unsure) and (
            self._is_unsure
            or _steady(rows) != _steady(self._written)
            or now - self._written_at > waiting_messages.RENEW_SECONDS
        ):
            self._is_unsure = True
            await waiting_messages.write(connection, self._worker, sorted(self._handlers), rows)
            self._written, self._written_at, self._is_unsure = rows, now, False
        if self._taking_over:
            numbers = sorted({handler.number for handler in self._scheduler.handlers()})
            await waiting_messages.take_over(
                connection,
                self._worker,
                numbers,
                [partition for partition in self._taking_over if partition in owned],
            )
            self._taking_over = {partition: until for partition, until in self._taking_over.items() if until > now}
        if names:
            applied = await positions.applied_by_all(connection, sorted(names))
            for number, name in names.items():
                if number in self._applied and applied.get(number, 0) > self._applied[number]:
                    self._evidence.succeeded(name)
            self._applied = applied
        else:
            self._applied = {}

    async def finish(self, connection: Any, *, stays: bool) -> None:
        """Delete the rows before partitions are given up.

        stays: the worker stops; the rows are brought up to date instead, for `consumer status`.
        """
        if not self._written and not self._is_unsure:
            return
        rows = self.rows()[0] if stays else []
        self._written, self._is_unsure = [], False
        with suppress(Exception):
            async with asyncio.timeout(_ANSWER_SECONDS):
                await waiting_messages.write(connection, self._worker, sorted(self._handlers), rows)

    async def record_halt(self, connection: Any, deliveries: Sequence[Delivery], error: TooManyDeadLetters) -> None:
        """Record why the worker ends for good, for `consumer status`."""
        delivery = next((delivery for delivery in deliveries if delivery.handler.name == error.handler), None)
        if delivery is None:
            return
        why = FailureCause(f"stopped by the dead-letter limit; most: {error.reason}", time.time(), systemic=True)
        with suppress(Exception):  # the log says the same
            async with asyncio.timeout(_ANSWER_SECONDS):
                row = WaitingRow(delivery.handler.number, delivery.partition, error.count, why, 0)
                await waiting_messages.halt(connection, self._worker, row)


def _steady(rows: Sequence[WaitingRow]) -> list[tuple[object, ...]]:
    """Return what makes rows worth writing: all but the moving frontier."""
    return [(row.handler, row.partition, row.messages, row.why) for row in rows]
