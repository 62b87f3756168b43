"""One worker process: fetch, settle, mark, commit; rebalance, retry, drain. The thin shell around the decisions in core/.

Knows Kafka, PostgreSQL and Redis by their files; decides nothing about a message's fate itself. A worker waits for any
service that is away, for as long as it takes: an outage is not counted against a message. What it does not know: whether
it still owns its partitions. It need not, because the claims and the positions in PostgreSQL answer that.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
import os
import random
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from consumer import tls
from consumer.app import App
from consumer.core.errors import ConsumerError, Misconfigured
from consumer.core.evidence import Evidence
from consumer.core.handler import Handler
from consumer.core.log_identity import Log, Position, Reason, Stop, judge, note
from consumer.core.message import Partition, Record
from consumer.core.ordering import Batch, Delivery, Scheduler
from consumer.core.outcome import RetryLater
from consumer.core.partition_faults import Failure
from consumer.core.shard_route import Router
from consumer.dead_letters.publisher import relay
from consumer.handler_records import coverage, handler_code, id_rules
from consumer.kafka import group
from consumer.kafka.source import Identity, KafkaError, LogTruncated, Source
from consumer.logs import describe, event
from consumer.postgres import connection_shortage
from consumer.postgres.connection import translated_errors
from consumer.postgres.epoch import is_left_behind
from consumer.postgres.errors import Conflict, Fenced, NotPrimary, Outage, lock_timed_out, sqlstate_of
from consumer.postgres.session import Session
from consumer.postgres.stopped_partitions import Stops
from consumer.retention.task import Keeper, Timestamps
from consumer.settings import Settings
from consumer.sharding import shards
from consumer.transaction import apply, id_conflicts
from consumer.transaction.dead_letter_rate import DeadShare, TooManyDeadLetters
from consumer.transaction.errors import facts_of
from consumer.transaction.handler_runner import observe
from consumer.transaction.identify import identify
from consumer.transaction.isolate import FAILURES_MAX, Part, TransactionPoisoned, run_smaller
from consumer.transaction.limits import CallTracker, HandlerTimeout, HandlerUncancellable, LoopWatch, limits, memory_mb
from consumer.transaction.result import CONFLICT, BatchResult, LedgerIds, complete, ended_by_handler
from consumer.transaction.settle import next_parts, pause_seconds, settle
from consumer.worker import message_log, start_positions, wait_reports
from consumer.worker.conflict_turns import Turns
from consumer.worker.kafka_reports import KafkaState
from consumer.worker.wait_reports import Reporter
from consumer.worker.watchdog import OpenTransactions, Watchdog

if TYPE_CHECKING:
    from consumer.precheck.client import Precheck

POLL_SECONDS = 0.5
_POLL_PAUSED_SECONDS = 0.02  # while a lane is full, and may have room again soon
DRAIN_SECONDS_MAX = 20.0  # of a rebalance; below the time that the group waits for its members
_BACKOFF_SECONDS = (0.1, 5.0)
_BEAT_SECONDS = 1.0
_LOOP_LAG_SECONDS = 2.0
_LOOK_SECONDS = 5.0  # between looks at what the logs are; a fetch that is refused is looked into at once
_LOOK_AGAIN_SECONDS = 0.5
_LIMITS_SECONDS = 0.1  # how exactly the limits of handlers are kept
_LAST_WORD_SECONDS = 5.0
_TOO_MANY_CONNECTIONS = "53300"
_CROWDED_SECONDS = 0.5
_CANCELLED_SECONDS = 3.0  # what does not end when it is cancelled is left behind

OFFSET_IDS = (
    "messages without an id: their offset is used, which does not recognise a message that was produced twice, "
    "copied to another topic or restored; set a message-id header, or message_id= of the handler"
)

Report = Callable[[dict[str, Any]], None]


class Stalled(ConsumerError):
    """Alive but not consuming: the process ends, and its supervisor starts another."""


@dataclass(slots=True, eq=False)
class _Shard:
    """One database, as this worker knows it. An App without shards has one, whose name is empty."""

    name: str
    settings: Settings  # the worker's, with the address of this database
    names: LedgerIds
    by_topic: dict[str, list[Handler]] = field(default_factory=dict)  # the handlers, with their numbers in its ledger
    precheck: Precheck | None = None  # its marks name the epoch of this database
    control: Session | None = None
    control_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    epoch: str = ""
    registered: str = ""  # the epoch that the numbers of handlers and topics are of
    code_recorded_at: float = 0.0
    installation: str = ""
    generation: int = 0  # of what is open; what was taken in an earlier one is not settled any more
    lane_of: dict[Partition, _Lane] = field(default_factory=dict)
    unopened: set[Partition] = field(default_factory=set)  # whose position in it is not known yet
    stopped: dict[Partition, tuple[Stop, Position]] = field(default_factory=dict)  # until the position is moved
    to_open: asyncio.Event = field(default_factory=asyncio.Event)
    crowded_until: float = 0.0  # monotonic: connections are given back, for other workers and lanes

    @property
    def label(self) -> dict[str, str]:
        """For logs."""
        return {"shard": self.name} if self.name else {}


@dataclass(slots=True, eq=False)
class _Lane:
    """A lane, its connection and what it is doing. It serves one shard; each partition has a lane in every one."""

    number: int
    shard: _Shard
    state: Scheduler
    calls: CallTracker
    turns: Turns
    session: Session | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    part: Batch | None = None  # what it settles now
    has_room: bool = True  # else it has its share of the buffer
    opened_at: float = 0.0  # of its session, monotonic
    asks_below: dict[Partition, int] = field(default_factory=dict)  # offsets that other shards may have seen


class Worker:
    """A member of the App's consumer group. `run` returns when `stop` was called and everything in flight is settled.

    report: called with small dictionaries about the worker's health, for its supervisor. step: called with the name of
    each step of the flow as it is passed, for tests that end the process there. path: how commands name the App.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        *,
        report: Report = lambda _: None,
        step: Callable[[str], None] = lambda _: None,
        draw: Callable[[], float] = random.random,
        path: str = "APP",
    ) -> None:
        self._app = app
        self._path = path
        self._settings = settings
        self._report = report
        self._step = step
        self._draw = draw
        self._source = Source(settings, app.name, os.environ.get("CONSUMER_WORKER", "0"))
        self._source.on_refused = self._suspect
        self._source.on_failed = self._unreadable
        self._source.on_nothing_new = self._readable
        self._kafka = KafkaState()
        self._router = Router(tuple(app.shards) or ("",), app.route)
        self._shards = [
            _Shard(name, own, LedgerIds(app.name, {})) for name, own in shards.settings_of(app, settings).items()
        ]
        self._stops = Stops([each.name for each in self._shards])
        # Where a lane only learns how far the log was read, a transaction for each poll would be too many.
        bare_seconds = settings.kafka_commit_interval_seconds if len(self._shards) > 1 else 0.0
        seconds_max = limits(app.handlers.values(), settings)
        self._lanes = [
            _Lane(
                n,
                shard,
                Scheduler(
                    shard.by_topic,
                    settings.parked_messages_max,
                    settings.buffer_bytes_max // settings.lanes,
                    idle_batch_interval=bare_seconds,
                ),
                CallTracker(seconds_max),
                Turns(),
            )
            for n, shard in enumerate(each for each in self._shards for _ in range(settings.lanes))
        ]
        self._turn = zlib.crc32(app.name.encode()) - (1 << 31)  # one for all workers of the application
        self._reading: dict[Partition, int] = {}  # the offset to fetch next, of partitions that are read
        self._suspects: dict[Partition, bool] = {}  # whose fetch was refused; whether for its offset
        self._look = asyncio.Event()
        self._group_changed = True  # since its members were looked at
        self._strangers: tuple[str, ...] = ()
        self._paused: set[Partition] = set()  # no lane that has room wants to read on
        self._room = asyncio.Event()
        self._holding = True  # no batch is taken while partitions come and go
        self._stopping = asyncio.Event()
        self._dirty: set[Partition] = set()  # moved on since the last commit to Kafka
        self._settled = 0
        self._waiting_for_postgres = 0
        self._died = asyncio.Event()  # dead letters were kept: they may be published
        self._share = DeadShare(settings.dead_letter_limit)
        self._evidence = Evidence()
        self._teller = message_log.Teller()
        self._reporters = {
            shard.name: Reporter(self._evidence, self._teller, [each for each in self._lanes if each.shard is shard])
            for shard in self._shards
        }
        self._told_of_offset_ids: set[str] = set()
        self._timestamps = Timestamps(settings)
        self.outgrown = False  # it stopped because of the memory that it used

    # -- life -------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Drain: settle what is in flight, copy positions to Kafka, leave the group. May be called again, or early."""
        self._stopping.set()
        for lane in self._lanes:
            lane.wake.set()
        self._room.set()

    async def run(self) -> None:
        """Work until `stop` is called. Raises Misconfigured, Stalled, HandlerUncancellable, or whatever ended a part of the worker.

        After HandlerUncancellable, a handler's task still runs: nothing but the end of the process ends it.
        """
        async with self._app.running():
            watch = LoopWatch(lane.calls for lane in self._lanes)
            watch.start()
            try:
                if await self._start():
                    await self._work()
            finally:
                await self._end()
                watch.stop()

    async def _start(self) -> bool:
        """Connect to everything; False when the order to stop came first."""
        while not await self._databases_agree():
            if self._stopping.is_set():
                return False
            await self._pause(_BACKOFF_SECONDS[0])
        if (redis_url := tls.redis_url(settings := self._settings)) is not None:
            from consumer.precheck.client import (
                Precheck,  # here: its library takes a quarter of a second, and may not be needed
            )

            for shard in self._shards:
                if shard.control is not None and not shard.control.server.tells_history:
                    event(logging.WARNING, "pre-check off: postgresql does not tell its start time", **shard.label)
                    continue
                shard.precheck = Precheck(
                    redis_url,
                    self._app.name,
                    settings.precheck_budget_ms / 1000,
                    settings.precheck_window_hours * 3600,
                    self._step,
                )
                await shard.precheck.start(shard.epoch)
        starting = asyncio.create_task(self._source.start(float("inf")))
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            return False
        starting.result()
        self._source.subscribe(self._app.topics, self._on_revoked, self._on_assigned)
        event(
            logging.INFO,
            "worker started",
            app=self._app.name,
            topics=",".join(self._app.topics),
            lanes=len(self._lanes),
        )
        return True

    async def _databases_agree(self) -> bool:
        """Connect to every shard and learn its numbers; False when that is to be tried again. Raises Misconfigured."""
        try:
            for place, shard in enumerate(self._shards):
                shard.control = await self._session(shard)
                if shard.control is None:
                    return False
                shard.epoch = shard.control.epoch
                mine = {name: each if place == 0 else copy.copy(each) for name, each in self._app.handlers.items()}
                for topic, handlers in self._app.by_topic().items():
                    shard.by_topic[topic] = [mine[each.name] for each in handlers]
                await self._register(shard, shard.control)
            await shards.check(
                self._app, self._router, [(each.settings, each.control) for each in self._shards if each.control]
            )
        except Outage as error:
            event(logging.WARNING, "waiting for postgresql", error=describe(error.__cause__ or error))
            for shard in self._shards:
                if shard.control is not None:
                    shard.control.close()
            return False
        return True

    async def _register(self, shard: _Shard, control: Session) -> None:
        """Learn the numbers of handlers and topics: a database that went back in time may give others."""
        numbers, topics = await control.numbers(self._app.name, self._app.handlers, self._app.topics)
        with translated_errors(shard.settings):
            await coverage.register(control.connection, self._app)
            await id_rules.record(control.connection, self._app)
            await handler_code.record(control.connection, self._app)
            shard.code_recorded_at = time.monotonic()
        shard.names.topics = topics
        shard.installation = control.installation
        for handler in {each for found in shard.by_topic.values() for each in found}:
            handler.number = numbers[handler.name]
        shard.registered = control.epoch

    async def _work(self) -> None:
        parts = [self._feed(), self._commit_now_and_then(), self._look_at_logs()]
        parts += [self._watch(), self._beat(), self._look_at_lanes(), *map(self._report_waiting, self._shards)]
        parts += [*map(self._open_partitions, self._shards), *map(self._run_lane, self._lanes)]
        keepers = [Keeper(each.settings, self._app.name, self._source, self._draw) for each in self._shards]
        parts += [each.run() for each in keepers]
        if (target := self._settings.dead_letter_topic) is not None:
            parts += [
                relay(self._app.name, target, shard.settings, functools.partial(self._session, shard), self._died)
                for shard in self._shards
            ]
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(each) for each in parts]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()  # a part that ended on its own has failed: raise why
            await self._drain(self._settings.grace_seconds * 0.8)
        finally:
            stopping.cancel()
            for task in tasks:
                task.cancel()
            # Not gather: a handler that swallows its cancellation would keep the worker for ever.
            ended, _ = await asyncio.wait([stopping, *tasks], timeout=_CANCELLED_SECONDS)
            await asyncio.gather(*ended, return_exceptions=True)

    async def _end(self) -> None:
        await self._source.stop(5)
        for session in [*(shard.control for shard in self._shards), *(lane.session for lane in self._lanes)]:
            if session is not None:
                session.close()
        for shard in self._shards:
            if shard.precheck is not None:
                await shard.precheck.stop()
        self._teller.flush(is_last=True)
        event(logging.INFO, "worker stopped", batches=self._settled)

    async def _session(self, shard: _Shard) -> Session | None:
        """A connection to the primary, waited for; None when the worker stops first."""
        pause, told = _BACKOFF_SECONDS[0], ""
        self._waiting_for_postgres += 1
        try:
            while not self._stopping.is_set():
                try:
                    session = await Session.open(shard.settings)
                    if shard.epoch and is_left_behind(session.epoch, shard.epoch):
                        session.close()
                        raise NotPrimary(
                            "an old primary, left behind on its timeline when another server was promoted: stop it, and let the "
                            "address lead to the new one (if it is to be the one again: restart the workers)"
                        )
                except Outage as error:
                    why = str(error) if isinstance(error, NotPrimary) else describe(error.__cause__ or error)
                    if sqlstate_of(error.__cause__ or error) == _TOO_MANY_CONNECTIONS:
                        self._share_connections(shard)
                        pause = min(pause, _CROWDED_SECONDS)
                    if why != told:
                        event(logging.WARNING, "waiting for postgresql", error=why, **shard.label)
                    told = why
                    await self._pause(pause * (0.5 + self._draw() / 2))
                    pause = min(_BACKOFF_SECONDS[1], pause * 2)
                else:
                    if told:
                        event(logging.INFO, "postgresql is back", **shard.label)
                    return session
        finally:
            self._waiting_for_postgres -= 1
        return None

    def _share_connections(self, shard: _Shard) -> None:
        """Give connections back for a while: others wait for one."""
        self._teller.say(
            logging.WARNING,
            "postgresql has too few connections: lanes and workers take turns",
            (shard.name,),
            {"do": "raise max_connections, or lower CONSUMER_LANES or --workers", **shard.label},
        )
        shard.crowded_until = time.monotonic() + connection_shortage.SECONDS

    async def _give_back(self, lane: _Lane, *, is_idle: bool) -> None:
        """Close a lane's connection while others wait for one."""
        now = time.monotonic()
        if lane.session is None or (not is_idle and now - lane.opened_at < connection_shortage.HELD_SECONDS_MAX):
            return
        lane.session.close()
        lane.session = None
        if not is_idle:
            lane.idle.set()
            await self._pause(_CROWDED_SECONDS * (0.5 + self._draw() / 2))

    async def _look_at_connections(self, shard: _Shard) -> None:
        """Notice that connections run out, and do without the one beside the lanes while they do."""
        if shard.control is not None and shard.control.is_usable:
            if not self._settings.postgres_pooler and await connection_shortage.is_crowded(shard.control.connection):
                self._share_connections(shard)
            if shard.crowded_until > time.monotonic() and not shard.unopened:
                shard.control.close()
        elif shard.crowded_until < time.monotonic() - _CROWDED_SECONDS and shard.crowded_until:
            try:
                shard.control = await Session.open(shard.settings)
            except Outage:
                shard.crowded_until = time.monotonic() + connection_shortage.SECONDS

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond the order to stop."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    # -- records come in --------------------------------------------------------------------------------------------

    async def _feed(self) -> None:
        pause = _BACKOFF_SECONDS[0]
        while not self._stopping.is_set():
            if self._nothing_has_room():
                self._room.clear()
                await self._room.wait()
                continue
            try:
                found = await self._source.poll(
                    _POLL_PAUSED_SECONDS if self._paused else POLL_SECONDS, self._reading.get
                )
            except LogTruncated as error:
                self._suspect(error.partition, out_of_range=True)
                continue
            except KafkaError as error:
                self._kafka.away(error)
                await self._pause(pause)
                pause = min(_BACKOFF_SECONDS[1], pause * 2)
                continue
            pause = _BACKOFF_SECONDS[0]
            for partition, records in found.items():
                self._queue(partition, records)
            if found:
                self._step("fetched")

    def _queue(self, partition: Partition, records: Sequence[Record]) -> None:
        """Give each record to the lane of its shard. The other lanes learn that there was nothing for them."""
        start = self._reading.get(partition)
        if start is None or not records:
            return  # not open yet: it will be sought to its position
        end = self._reading[partition] = max(start, records[-1].offset + 1)
        if self._stops:
            self._went_on(partition, end)
        for lane, mine in zip(self._lanes_of(partition), self._router.split(records), strict=True):
            # What a lane has no room for is read again, from where that lane stands.
            wanted = lane.has_room and not lane.state.is_full(partition)
            kept, _ = lane.state.add(partition, mine, start, end) if wanted else (0, 0)
            if kept:
                event(
                    logging.DEBUG,
                    "fetched",
                    topic=partition.topic,
                    partition=partition.partition,
                    first=mine[0].offset,
                    last=mine[-1].offset,
                    count=kept,
                )
                lane.wake.set()

    def _lanes_of(self, partition: Partition) -> list[_Lane]:
        """Those of a partition that this worker owns: one in each shard."""
        return [shard.lane_of[partition] for shard in self._shards if partition in shard.lane_of]

    def _nothing_has_room(self) -> bool:
        """Fetch nothing more for lanes that have their share of the buffer; returns whether all of them do."""
        messages_max = self._settings.buffer_messages_max / len(self._lanes)
        bytes_max = self._settings.buffer_bytes_max / len(self._lanes)
        serving = [lane for lane in self._lanes if lane.state.partitions]
        for lane in serving:
            messages, size = lane.state.fetched
            # One that others have gone ahead of needs room for more than a little: each time, the log is read again.
            share = 0.5 if len(self._shards) > 1 and not lane.has_room else 1.0
            lane.has_room = messages < messages_max * share and size < bytes_max * share
        for partition in self._shards[0].lane_of:
            self._read_on(partition)
        self._source.expect_more(soon=bool(self._paused))
        return bool(serving) and not any(lane.has_room for lane in serving)

    def _read_on(self, partition: Partition) -> None:
        """Read a partition from where the first of its lanes that has room goes on; not at all while none has.

        With one shard that is where the client stands, but after a lane was opened. With several, a shard that is away
        or slow fills its share of the buffer and is left behind, and the log is read again from there when it has room:
        the lanes that are ahead drop what they have had.
        """
        opened = [lane for lane in self._lanes_of(partition) if partition in lane.state.partitions]
        if not opened or partition in self._suspects or self._is_stopped(partition):
            return
        for lane in opened:
            if lane.state.is_full(partition):
                self._reporters[lane.shard.name].full(partition)
                lane.state.drop_fetched(partition)  # else it would take the room of the others
        wanted = [
            lane.state.received(partition) or 0
            for lane in opened
            if lane.has_room and not lane.state.is_full(partition)
        ]
        if not wanted:
            if partition not in self._paused:
                self._source.pause(partition)
                self._paused.add(partition)
        elif (offset := min(wanted)) != self._reading.get(partition):
            self._reading[partition] = offset
            self._source.go_on(partition, offset, opened[0].shard.names.logs[partition].topic_id)
            self._paused.discard(partition)
        elif partition in self._paused:
            self._source.resume(partition)
            self._paused.discard(partition)

    # -- batches go through -----------------------------------------------------------------------------------------

    async def _run_lane(self, lane: _Lane) -> None:
        settings = self._settings
        while True:
            batch = None
            if not self._holding and not self._stopping.is_set():
                batch = lane.state.take(time.monotonic(), settings.batch_messages_max, settings.batch_bytes_max)
            if batch is None:
                if lane.shard.crowded_until > time.monotonic():
                    await self._give_back(lane, is_idle=True)
                lane.idle.set()
                lane.wake.clear()
                due = lane.state.next_due()
                with suppress(TimeoutError):
                    timeout = max(0.001, due - time.monotonic()) if due is not None and not self._holding else None
                    await asyncio.wait_for(lane.wake.wait(), timeout)
                continue
            lane.idle.clear()
            self._room.set()
            await self._settle(lane, batch)
            if lane.shard.crowded_until > time.monotonic():
                await self._give_back(lane, is_idle=False)

    async def _settle(self, lane: _Lane, batch: Batch) -> None:
        """Settle a batch whatever happens, unless its partitions go away first: then its next owner does."""
        shard, generation = lane.shard, lane.shard.generation
        self._timestamps.look(batch.deliveries)
        for topic in identify(batch.deliveries, shard.names.logs) - self._told_of_offset_ids:
            self._told_of_offset_ids.add(topic)
            event(logging.WARNING, OFFSET_IDS, topic=topic)
        if shard.precheck is not None:
            await shard.precheck.check(batch.deliveries, time.time())
            self._step("prechecked")
        if lane.asks_below and not await self._is_nowhere_else(lane, batch):
            return
        for delivery, error in await observe(batch.deliveries, self._draw, lane.calls):
            self._teller.failure(delivery, error, delivery.outcome)
        async for part, result in settle(
            [batch],
            lambda part: self._prepare(lane, part, generation),
            lambda part: self._attempt(lane, part),
            lambda part, error: self._after_failure(lane, part, error, generation),
        ):
            self._settled_part(lane, part.batch, result)
            if lane.session is not None and any([outcome is CONFLICT for outcome in result.outcomes.values()]):
                await id_conflicts.explain(lane.session.connection, self._source, result.outcomes)

    async def _prepare(self, lane: _Lane, part: Part, generation: int) -> bool:
        """Open the connection of a lane where it has none. False: the partitions are not this worker's any more."""
        shard = lane.shard
        lane.part = part.batch
        if lane.session is None or not lane.session.is_usable:
            lane.idle.set()  # nothing is in flight: a rebalance need not wait until the database is back
            lane.session = await self._session(shard)
            lane.opened_at = time.monotonic()
            if lane.session is None or generation != shard.generation:
                return False
            lane.idle.clear()
            if lane.session.epoch != shard.epoch:
                await self._new_epoch(shard, lane.session.epoch)
                return False
        return True

    async def _attempt(self, lane: _Lane, part: Part) -> BatchResult:
        """Run a part of a batch in one transaction."""
        assert lane.session is not None
        lane.session.turn = self._turn if lane.turns.are_taken else None
        with lane.calls.transaction():
            result = await apply.apply_batch(
                lane.session,
                lane.shard.names,
                lane.state,
                part.batch,
                use_savepoints=part.use_savepoints,
                random=self._draw,
                on_step=lane.calls.wrap_step(self._step),
                calls=lane.calls,
                limit=self._share,
                evidence=self._evidence,
            )
        if lane.session.turn is None and lane.turns.are_taken:
            lane.turns.did_not_come()
        lane.turns.settled()
        return result

    async def _after_failure(self, lane: _Lane, part: Part, error: Exception, generation: int) -> Sequence[Part] | None:
        """Report a failed transaction, wait, and decide what runs next. None: nothing, the positions are not ours."""
        shard = lane.shard
        deliveries = part.batch.deliveries
        cause = error.__cause__ or error
        match error:
            case TransactionPoisoned():
                if isinstance(cause, HandlerTimeout) and cause.in_statement:
                    lane.turns.met()
                parts = next_parts(part, error, self._draw, self._evidence)
                if len(deliveries) == 1 and isinstance(deliveries[0].outcome, RetryLater):
                    self._teller.failure(deliveries[0], error.__cause__, deliveries[0].outcome)
                return parts
            case Conflict() | Outage():
                if generation != shard.generation:
                    return None
                self._report_failure(shard, error, cause, part.failures)
                # Such a lock may be held by anybody. To wait for it in turn would only hold up the other lanes.
                if isinstance(error, Conflict) and not lock_timed_out(cause):
                    lane.turns.met()
                parts = next_parts(part, error, self._draw, self._evidence)
                # The first conflict is run again almost at once; what keeps failing is left ever more time.
                await self._pause(pause_seconds(part.failures) * (0.5 + self._draw() / 2))
                return parts
            case TooManyDeadLetters():
                assert lane.session is not None
                await self._reporters[shard.name].halt(lane.session.connection, deliveries, error)
                raise error
            case Fenced():
                event(logging.WARNING, "positions have moved: reading them again", lane=lane.number, **shard.label)
                self._reopen(lane)
                return None
            case _:
                raise error

    def _report_failure(self, shard: _Shard, error: Exception, cause: BaseException, failures: int) -> None:
        """Log an outage, or a conflict that keeps coming back."""
        if not isinstance(error, Outage) and failures < FAILURES_MAX:
            return
        text = "the batch runs again: " + ("postgresql lost" if isinstance(error, Outage) else "conflict")
        fields = {"error": describe(cause), "sqlstate": sqlstate_of(cause), "times": failures + 1, **shard.label}
        self._teller.say(logging.WARNING, text, (shard.name, describe(cause)), fields)

    def _settled_part(self, lane: _Lane, part: Batch, done: BatchResult) -> None:
        complete(lane.state, part, done, time.monotonic())
        for name, (messages, reasons) in ended_by_handler(done.applied, done.outcomes).items():
            self._share.settled(name, messages, reasons)
            if reasons:
                self._died.set()
        if self._evidence.is_needed:
            for name in {each.handler.name for each in done.applied}:
                self._evidence.succeeded(name)
        self._teller.failures(done)
        message_log.duplicates(done)
        if lane.shard.name:
            self._router.applied(lane.shard.name, (each.record for each in done.applied))
        self._settled += 1
        for move in done.position_updates:
            self._dirty.add(move.partition)
            if move.next >= lane.asks_below.get(move.partition, move.next + 1):
                del lane.asks_below[move.partition]
        if lane.shard.precheck is not None and lane.session is not None:
            lane.shard.precheck.mark(done.applied, lane.session.epoch, time.time())

    # -- partitions come and go -------------------------------------------------------------------------------------

    async def _on_assigned(self, assigned: set[Partition]) -> None:
        """Only notes what to open: the client sends no heartbeat while this runs, and PostgreSQL may be away."""
        for shard in self._shards:
            lanes = [lane for lane in self._lanes if lane.shard is shard]
            shard.generation += 1
            shard.lane_of = {each: lanes[n % len(lanes)] for n, each in enumerate(sorted(assigned))}
            shard.unopened = set(assigned)
            shard.to_open.set()
        for partition in assigned:
            self._source.hold(partition)
        self._holding = False
        self._group_changed = True
        self._report({"member": self._source.member_id})  # at once: killed before the next beat, it is still taken out

    async def _on_revoked(self, revoked: set[Partition]) -> None:
        """Finish what is in flight; forget the rest, which the next owner reads again."""
        if revoked:
            event(logging.INFO, "partitions revoked", count=len(revoked))
            self._step("revoked")
        with suppress(Exception):
            await self._drain(min(DRAIN_SECONDS_MAX, self._settings.grace_seconds))

    async def _drain(self, seconds: float) -> None:
        """No new batch, wait for those in flight, copy positions to Kafka, and forget the partitions."""
        self._holding = True
        for shard in self._shards:
            shard.generation += 1
            shard.unopened.clear()
            shard.stopped.clear()
        self._suspects.clear()
        self._stops.forget()
        for lane in self._lanes:
            lane.wake.set()
        waits = [asyncio.create_task(lane.idle.wait()) for lane in self._lanes]
        _, late = await asyncio.wait(waits, timeout=seconds)
        if late:
            event(logging.WARNING, "drain took too long: open transactions are undone", seconds=round(seconds, 1))
            for lane in self._lanes:
                if not lane.idle.is_set() and lane.session is not None:
                    lane.session.close()
            await asyncio.wait(late, timeout=2)
        for task in waits:
            task.cancel()
        await self._commit()
        for shard in self._shards:
            if shard.control is not None and shard.control.is_usable and not shard.control_lock.locked():
                await self._reporters[shard.name].last(shard.control.connection, stays=self._stopping.is_set())
        for lane in self._lanes:
            for partition in lane.state.partitions:
                lane.state.revoke(partition)
            lane.asks_below.clear()
        for shard in self._shards:
            shard.lane_of.clear()
        self._reading.clear()
        self._paused.clear()
        self._room.set()

    def _reopen(self, lane: _Lane) -> None:
        """Forget what was read of a lane's partitions, and begin again at the positions that PostgreSQL has."""
        for partition in lane.state.partitions:
            self._reopen_partition(lane, partition)
        self._room.set()

    def _reopen_partition(self, lane: _Lane, partition: Partition) -> None:
        lane.state.revoke(partition)
        lane.shard.unopened.add(partition)
        lane.shard.stopped.pop(partition, None)
        self._suspects.pop(partition, None)
        if not any(partition in each.state.partitions for each in self._lanes_of(partition)):
            self._source.hold(partition)
            self._reading.pop(partition, None)
            self._paused.discard(partition)
        lane.shard.to_open.set()

    async def _new_epoch(self, shard: _Shard, epoch: str) -> None:
        """The database is another one, or went back in time: what is in flight means nothing there."""
        event(logging.WARNING, "another epoch of postgresql: positions are read again", epoch=epoch, **shard.label)
        shard.epoch = epoch
        shard.generation += 1
        if shard.precheck is not None:
            shard.precheck.new_epoch(epoch)
        for lane in self._lanes:
            if lane.shard is shard:
                if lane.session is not None and lane.session.epoch != epoch:
                    lane.session.close()
                self._reopen(lane)

    async def _open_partitions(self, shard: _Shard) -> None:
        """Give every assigned partition its position from a shard. Waits for services for as long as it takes."""
        pause = _BACKOFF_SECONDS[0]
        while True:
            await shard.to_open.wait()
            if self._stopping.is_set():
                return  # nothing is opened any more; asking on, with nothing to wait for, would let nobody else run
            shard.to_open.clear()
            wanted, generation = sorted(shard.unopened), shard.generation
            if not wanted:
                continue
            try:
                async with shard.control_lock:
                    control = await self._control(shard)
                    if control is None:
                        shard.to_open.set()
                        continue
                    if shard.registered != shard.epoch:
                        await self._register(shard, control)
                    positions, changes = await start_positions.positions(
                        self._source,
                        control,
                        self._app.name,
                        wanted,
                        shard.label,
                        {
                            topic: [each.number for each in found if each.idempotent]
                            for topic, found in shard.by_topic.items()
                        },
                        {each.installation for each in self._shards if each is not shard},
                    )
                    message_log.changes(changes, self._app.name, self._path, shard.label)
                    numbers = {each.number for found in shard.by_topic.values() for each in found}
                    chains, tried = await start_positions.recall(control, numbers, positions)
                    await start_positions.recall_stops(control, self._stops, self._app.name, positions)
                    await control.check_epoch()  # last, so that all that was read is of the epoch that is known
                # With shards: what the log holds now may have been applied before, in another one if the route has changed.
                ends = await self._source.ends(wanted) if len(self._shards) > 1 else {}
            except (Outage, KafkaError, TimeoutError, OSError) as error:
                event(logging.WARNING, "positions cannot be read yet", error=describe(error), **shard.label)
                await self._pause(pause)
                pause = min(_BACKOFF_SECONDS[1], pause * 2)
                shard.to_open.set()
                continue
            if generation != shard.generation:
                shard.to_open.set()
                continue
            for partition, (position, stop) in positions.items():
                shard.unopened.discard(partition)
                if stop is not None:
                    self._stop_partition(shard, partition, stop, position)
                    continue
                lane = shard.lane_of[partition]
                shard.names.logs[partition] = position
                lane.state.assign(partition, position.offset)
                now = time.monotonic()
                lane.state.restore(
                    partition,
                    chains.get(partition, ()),
                    {each: found._replace(due=now + found.due) for each, found in tried.get(partition, {}).items()},
                )
                lane.asks_below.pop(partition, None)
                if ends.get(partition, 0) > position.offset:
                    lane.asks_below[partition] = ends[partition]
                self._reading.pop(partition, None)  # it is sought to, and goes on, even if that is where it stands
                self._read_on(partition)
                self._went_on(partition, position.offset)
            event(logging.INFO, "partitions opened", count=len(positions), **shard.label)
            self._report({"opened": len(positions)})
            if left := len(shard.unopened & set(wanted)):
                event(logging.WARNING, "partitions wait for their topic or their leader", count=left)
                await self._pause(pause)
                pause = min(_BACKOFF_SECONDS[1], pause * 2)
                shard.to_open.set()
            else:
                pause = _BACKOFF_SECONDS[0]

    # -- what the logs are ------------------------------------------------------------------------------------------

    def _suspect(self, partition: Partition, *, out_of_range: bool = False) -> None:
        """A fetch was refused: look into it. The partition is paused."""
        if not self._is_stopped(partition):
            self._suspects[partition] = out_of_range
            self._look.set()

    def _is_stopped(self, partition: Partition) -> bool:
        return any(partition in shard.stopped for shard in self._shards)

    def _stop_partition(
        self, shard: _Shard, partition: Partition, stop: Stop, at: Position, *, is_told: bool = True
    ) -> None:
        """Fetch no more of it until somebody moves its position; what was read of it before is still settled."""
        self._source.pause(partition)
        self._suspects.pop(partition, None)
        shard.stopped[partition] = (stop, at)
        if is_told:
            event(
                logging.ERROR,
                f"partition stopped: {stop.text}",
                topic=partition.topic,
                partition=partition.partition,
                reason=stop.reason.value,
                do=stop.command(self._path, f" --shard {shard.name}" if shard.name else ""),
                **shard.label,
            )

    def _unreadable(self, partition: Partition, failure: Failure) -> None:
        """Stop one partition that cannot be read; it is tried again now and then."""
        opened = [lane for lane in self._lanes_of(partition) if partition in lane.state.partitions]
        if not opened or self._is_stopped(partition):
            return
        stop, is_told = self._stops.failed(partition, failure, time.monotonic())
        for lane in opened:
            received = lane.state.received(partition) or 0
            at = lane.shard.names.logs[partition]._replace(offset=received, seen=None)
            self._stop_partition(lane.shard, partition, stop, at, is_told=is_told)

    def _try_unreadable_again(self) -> None:
        """Read partitions that could not be read again, from where they stand."""
        stopped = {each for shard in self._shards for each in shard.stopped}
        for partition in self._stops.due(time.monotonic(), stopped):
            for shard in self._shards:
                shard.stopped.pop(partition, None)
            self._reading.pop(partition, None)
            self._read_on(partition)

    def _readable(self, partition: Partition) -> None:
        if self._stops and (position := self._reading.get(partition)) is not None:
            self._went_on(partition, position, is_read=True)

    def _went_on(self, partition: Partition, position: int, *, is_read: bool = False) -> None:
        if self._stops.went_on(partition, position, is_read=is_read):
            event(logging.INFO, "the partition is read again", topic=partition.topic, partition=partition.partition)

    async def _look_at_logs(self) -> None:
        """Find out that a log is not what it was, or that a producer holds it back. Waits for Kafka as long as it takes."""
        open_transactions = OpenTransactions()
        patience = self._settings.kafka_transaction_warning_seconds
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), min(_LOOK_SECONDS, patience / 2))
            self._look.clear()
            try:
                identity = await self._source.identity(self._app.topics)
                self._kafka.back()
                self._kafka.topics(self._app.topics, identity)
                self._stops.refused(identity.refused)
            except (KafkaError, TimeoutError, OSError) as error:
                self._kafka.away(error)
                continue
            if self._holding:
                continue
            try:
                self._try_unreadable_again()
                self._look_for_leaders()
                await self._look_at_identities(identity)
                if self._group_changed:
                    await self._look_at_group()
                held = {
                    each: at
                    for lane in self._lanes
                    for each in lane.state.partitions
                    if not self._is_stopped(each) and (at := self._source.held_back_at(each)) is not None
                }
                late, freed = open_transactions.news(time.monotonic(), held, patience)
                for partition in late:
                    await self._tell_open_transaction(partition)
                for partition in freed:
                    event(logging.INFO, "the open transaction has ended", topic=partition.topic, partition=partition[1])
            except (KafkaError, TimeoutError, OSError) as error:
                event(logging.DEBUG, "the logs cannot be looked at now", error=describe(error))
            if self._suspects:
                await self._pause(_LOOK_AGAIN_SECONDS)
                self._look.set()

    async def _look_at_group(self) -> None:
        """Log members of the group that are no workers of this App: what they are assigned is not applied."""
        found = await group.look(self._settings, self._app.name)
        self._group_changed = not found.settled
        if found.strangers and found.strangers != self._strangers:
            event(
                logging.WARNING,
                "another client is a member of this App's group: the messages of its partitions are not applied",
                group=self._app.name,
                clients=", ".join(found.strangers),
                do="give it another group id",
            )
        if found.settled:
            self._strangers = found.strangers

    async def _look_at_identities(self, identity: Identity) -> None:
        generations = [shard.generation for shard in self._shards]
        suspects = dict(self._suspects)
        firsts = await self._source.beginnings(list(suspects), partial=True) if suspects else {}
        ends = await self._source.ends(list(suspects), partial=True) if suspects else {}
        if generations != [shard.generation for shard in self._shards]:
            return
        for lane in self._lanes:
            for partition in lane.state.partitions:
                received = lane.state.received(partition)
                if partition in lane.shard.stopped or received is None:
                    continue
                at = lane.shard.names.logs[partition]._replace(offset=received, seen=None)
                log = Log(identity.cluster_id, identity.topics.get(partition.topic))
                if partition in suspects:
                    log = log._replace(
                        first=firsts.get(partition), end=ends.get(partition), out_of_range=suspects[partition]
                    )
                stop = judge(partition, at, log)
                if stop is not None:
                    self._stop_partition(lane.shard, partition, stop, at)
                elif partition in suspects and partition.topic in identity.refused:
                    self._unreadable(partition, Failure(Reason.NOT_ALLOWED, "its user may not see it", received))
                elif partition in suspects and (log.topic_id is not None or at.topic_id is None):
                    self._suspects.pop(partition, None)  # a broker that knew less, or a leader that has just changed
                    self._reading.pop(partition, None)
                    self._read_on(partition)

    def _look_for_leaders(self) -> None:
        """Stop partitions that have had no leader for long; the client says nothing of them."""
        leaderless = {each for each in self._reading if not self._is_stopped(each) and self._source.is_leaderless(each)}
        for partition in self._kafka.long_leaderless(leaderless, time.monotonic()):
            self._unreadable(
                partition, Failure(Reason.BROKER_ERROR, "the partition has no leader", self._reading[partition])
            )

    async def _tell_open_transaction(self, partition: Partition) -> None:
        found = await self._source.open_transaction(partition)
        if found is not None:
            event(
                logging.WARNING,
                "a producer's open transaction holds the partition back",
                topic=partition.topic,
                partition=partition.partition,
                offset=found.offset,
                since=datetime.fromtimestamp(found.since_ms / 1000, UTC).isoformat(timespec="seconds"),
                do="end the producer, or abort its transaction with Kafka's `kafka-transactions.sh abort`",
            )

    async def _control(self, shard: _Shard) -> Session | None:
        """The connection beside the lanes; None when the worker stops, or the shard's positions are to be read again."""
        if shard.control is not None and is_left_behind(shard.control.epoch, shard.epoch):
            shard.control.close()
        if shard.control is None or not shard.control.is_usable:
            shard.control = await self._session(shard)
        if shard.control is not None and shard.control.epoch != shard.epoch:
            await self._new_epoch(shard, shard.control.epoch)
            return None
        return shard.control

    async def _is_nowhere_else(self, lane: _Lane, batch: Batch) -> bool:
        """Ask the other shards about messages that may have been applied before, since the log held them when their
        partition was opened: one that stands in another shard is there because the route has changed, and is not applied
        again. Waits for a shard that is away. False when the partitions went away. Raises RouteFault, which ends the worker.
        """
        old = [
            each
            for each in batch.deliveries
            if each.outcome is None
            and each.handler.idempotent
            and each.record.offset < lane.asks_below.get(each.partition, 0)
        ]
        for other in self._shards if old else ():
            if other is lane.shard:
                continue
            there = await self._standing_in(other, old, lane)
            here = await self._standing_in(lane.shard, there, lane) if there else there
            if here is None or there is None:
                return False
            if strays := [each for each in there if each not in here]:
                raise shards.stray(self._app.name, strays[0], other.name, lane.shard.name)
        return True

    async def _standing_in(self, shard: _Shard, deliveries: list[Delivery], lane: _Lane) -> list[Delivery] | None:
        """Those that a shard holds, as made by the very same records; None when the lane's partitions went away."""
        generation = lane.shard.generation
        handlers = {each.name: each for found in shard.by_topic.values() for each in found}
        asked: dict[Delivery, Delivery] = {}
        for each in deliveries:
            twin = Delivery(handlers[each.handler.name], each.record)  # with its number there
            twin.id, twin.fingerprint = each.id, each.fingerprint
            asked[twin] = each
        lane.idle.set()  # nothing is in flight
        while generation == lane.shard.generation and not self._stopping.is_set():
            try:
                async with shard.control_lock:
                    control = await self._control(shard)
                    if control is None:
                        continue
                    standing, _ = await control.existing_claims(list(asked), shard.names.topics)
            except Exception as error:
                event(logging.WARNING, "waiting for another shard's answer", error=describe(error), **shard.label)
                if shard.control is not None:
                    shard.control.close()
                await self._pause(_BACKOFF_SECONDS[0])
                continue
            if generation != lane.shard.generation:
                break
            lane.idle.clear()
            return [asked[twin] for twin, found in standing.items() if found.same_record]
        return None

    # -- beside the flow --------------------------------------------------------------------------------------------

    async def _commit(self) -> None:
        dirty, self._dirty = self._dirty, set()
        positions: dict[Partition, int] = {}
        for partition in dirty:
            lanes = self._lanes_of(partition)
            # Of a partition that stopped, Kafka's offsets may be another log's.
            if lanes and all(
                partition in lane.state.partitions and partition not in lane.shard.stopped for lane in lanes
            ):
                positions[partition] = min(lane.state.position(partition) for lane in lanes)
        if not positions:
            return
        self._step("before_offset_commit")
        copies = {
            each: (at, note((shard.installation, shard.names.logs.get(each)) for shard in self._shards))
            for each, at in positions.items()
        }
        if await self._source.commit(copies):
            self._step("after_offset_commit")
        else:
            self._dirty |= dirty

    async def _commit_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(self._settings.kafka_commit_interval_seconds)
            if self._holding:
                continue
            for partition in list(self._reading):
                # Markers and aborted records are handed to nobody: without this, the position would stop below them.
                position = await self._source.position(partition)
                reading = self._reading.get(partition)
                if position is None or reading is None or position <= reading or partition in self._paused:
                    continue
                for lane in self._lanes_of(partition):
                    if lane.has_room:
                        lane.state.add(partition, (), reading, position)
                self._reading[partition] = position
            for lane in self._lanes:
                lane.wake.set()
            if not self._holding:
                await self._commit()
                for shard in self._shards:
                    await self._look_for_moved_positions(shard)
                    await self._record_keys(shard)
                    await self._save_stops(shard)

    async def _report_waiting(self, shard: _Shard) -> None:
        """Keep what waits in the shard's database, so that `status` can show it from anywhere."""
        reporter = self._reporters[shard.name]
        while True:
            await asyncio.sleep(wait_reports.SECONDS)
            self._teller.flush()
            if self._holding or shard.control_lock.locked():
                continue
            control = shard.control
            try:
                async with shard.control_lock:
                    if control is not None and control.is_usable:
                        await reporter.report(control.connection)
                        if time.monotonic() - shard.code_recorded_at > handler_code.RENEW_SECONDS:
                            await handler_code.record(control.connection, self._app)
                            shard.code_recorded_at = time.monotonic()
                    await self._look_at_connections(shard)
            except Exception as error:  # it is tried again; nothing depends on it but what people see
                event(logging.DEBUG, "what waits cannot be reported now", error=describe(error), **shard.label)
                if control is not None:
                    control.close()

    async def _record_keys(self, shard: _Shard) -> None:
        """Let the shard remember where new keys were sent, so that another route is refused at the next start."""
        control = shard.control
        if not shard.name or control is None or not control.is_usable or shard.control_lock.locked():
            return
        try:
            async with shard.control_lock:
                await shards.record(self._app, shard.name, self._router, control)
        except Misconfigured:
            raise
        except Exception as error:  # these keys are not remembered, which the worker can do without
            event(logging.DEBUG, "keys cannot be recorded now", error=describe(error), **shard.label)
            control.close()

    async def _save_stops(self, shard: _Shard) -> None:
        """Let `consumer status` know, in whatever process, which partitions cannot be read."""
        control = shard.control
        if not self._stops.has_unsaved(shard.name) or control is None or not control.is_usable:
            return
        if shard.control_lock.locked():
            return
        try:
            async with shard.control_lock:
                await self._stops.save(shard.name, control.connection, self._app.name)
        except Exception as error:
            event(logging.DEBUG, "stopped partitions cannot be written now", error=describe(error), **shard.label)
            control.close()

    async def _look_for_moved_positions(self, shard: _Shard) -> None:
        """A lane that settles something finds out by itself that a position was moved; one that is idle does not."""
        idle = {
            partition
            for partition, lane in shard.lane_of.items()
            if lane.idle.is_set() and not lane.state.delayed and lane.state.fetched == (0, 0)
            if partition in lane.state.partitions
        }
        known = {each: at for each in {*idle, *shard.stopped} if (at := self._settled_at(shard, each)) is not None}
        control = shard.control
        if not known or control is None or not control.is_usable or shard.control_lock.locked():
            return
        generation = shard.generation
        try:
            async with shard.control_lock:
                stored = await control.positions(self._app.name, list(known))
        except Exception as error:
            event(logging.DEBUG, "positions cannot be read now", error=describe(error), **shard.label)
            control.close()
            return
        if generation != shard.generation:
            return
        for partition, at in known.items():
            if self._settled_at(shard, partition) != at:
                continue  # it has moved on itself meanwhile
            found = stored.get(partition, at)
            if (found.offset, found.topic_id) != (at.offset, at.topic_id):
                event(logging.WARNING, "positions have moved: reading them again", topic=partition.topic, **shard.label)
                self._reopen_partition(shard.lane_of[partition], partition)

    def _settled_at(self, shard: _Shard, partition: Partition) -> Position | None:
        """The position of a partition of which nothing is in hand, as it was last written or read; else None."""
        lane = shard.lane_of[partition].state
        received = lane.received(partition)
        if received is None:  # stopped before it was opened
            return shard.stopped[partition][1] if partition in shard.stopped else None
        if lane.position(partition) != received:
            return None
        return shard.names.logs[partition]._replace(offset=received)

    async def _look_at_lanes(self) -> None:
        """End handlers that take too long, and connections that do not answer. Raises HandlerUncancellable.

        A connection is ended, its statement never cancelled: if it was a COMMIT that was not answered, PostgreSQL decides
        for itself what becomes of it, and the claims of the next run wait until it has.
        """
        silence = self._settings.postgres_answer_timeout_seconds
        control_free_at = {shard.name: time.monotonic() for shard in self._shards}
        while True:
            await asyncio.sleep(_LIMITS_SECONDS)
            now = time.monotonic()
            for shard in self._shards:
                if not shard.control_lock.locked():
                    control_free_at[shard.name] = now
                elif now - control_free_at[shard.name] > silence and shard.control is not None:
                    control_free_at[shard.name] = now
                    shard.control.close()
            for lane in self._lanes:
                try:
                    lane.calls.enforce_limits(now)
                except HandlerUncancellable as stuck:
                    await self._count(lane, stuck)
                    raise
                if lane.calls.waiting_seconds(now) > silence and lane.session is not None:
                    event(
                        logging.WARNING,
                        "postgresql does not answer: the connection is ended",
                        seconds=round(silence),
                        **lane.shard.label,
                    )
                    lane.calls.step()
                    lane.session.close()

    async def _count(self, lane: _Lane, stuck: HandlerUncancellable) -> None:
        """Settle the message of a handler that cannot be stopped, on another connection, before the process ends.

        Else it would be as new for the next process, which it would stop in the same way, for ever. Of the many messages
        of a batch handler's call, nobody knows which it was.
        """
        deliveries = stuck.cause.deliveries
        if len(deliveries) > 1 or not deliveries[0].handler.idempotent or lane.part is None:
            return
        alone = Batch(list(deliveries), {}, lane.part.assignment_epochs)
        facts = facts_of(stuck.cause, deliveries[0].handler.place)
        [part] = run_smaller(Part(alone, use_savepoints=True), facts, self._draw)
        try:
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                session = await Session.open(lane.shard.settings)
                try:
                    if session.epoch != lane.shard.epoch:
                        return  # what is known of the message is of another history
                    await apply.apply_batch(
                        session,
                        lane.shard.names,
                        lane.state,
                        part.batch,
                        use_savepoints=True,
                        random=self._draw,
                        on_step=self._step,
                    )
                finally:
                    session.close()
        except (ConsumerError, TimeoutError) as error:
            event(logging.WARNING, "the attempt could not be counted", error=describe(error.__cause__ or error))

    async def _watch(self) -> None:
        """Find out that nothing is fetched although there is something, which the client does not tell."""
        watchdog = Watchdog()
        interval = min(10.0, self._settings.watchdog_seconds / 4)
        while True:
            await asyncio.sleep(interval)
            received: dict[Partition, int] = {}
            if not self._holding:
                stopped = {*self._suspects, *self._paused, *(each for shard in self._shards for each in shard.stopped)}
                received = {each: offset for each, offset in self._reading.items() if each not in stopped}
            try:
                ends = await self._source.ends(list(received), partial=True) if received else {}
            except (KafkaError, TimeoutError, OSError) as error:
                self._kafka.away(error)
                watchdog = Watchdog()  # an outage of Kafka is waited for
                continue
            received = {each: offset for each, offset in received.items() if each in ends}
            now = time.monotonic()
            if watchdog.fetching_stalled_seconds(now, received, ends) > self._settings.watchdog_seconds:
                raise Stalled(
                    f"nothing was fetched for {self._settings.watchdog_seconds:g} s although there is something"
                )
            busy = any(not lane.idle.is_set() for lane in self._lanes) and not self._waiting_for_postgres
            stalled = watchdog.settling_stalled_seconds(now, self._settled, has_work=busy)
            if stalled > self._settings.watchdog_seconds:
                event(logging.WARNING, "a batch takes long: does a handler hang?", seconds=round(stalled))

    def _look_at_memory(self) -> None:
        """Drain when the process has grown too large; its supervisor starts another."""
        most, used = self._settings.worker_memory_max_mb, memory_mb()
        if most is None or used is None or used <= most or self._stopping.is_set():
            return
        event(logging.WARNING, "the worker uses too much memory: it drains and is replaced", mb=used, mb_max=most)
        self.outgrown = True
        self.stop()

    async def _beat(self) -> None:
        """Tell the supervisor that the event loop turns, and who we are in the group."""
        while True:
            before = time.monotonic()
            self._look_at_memory()
            self._report({"member": self._source.member_id, "batches": self._settled})
            # Not in the group yet: tell the member id as soon as there is one, or nobody could take us out.
            pause = _BEAT_SECONDS if self._source.member_id else _BEAT_SECONDS / 10
            await asyncio.sleep(pause)
            lag = time.monotonic() - before - pause
            if lag > _LOOP_LAG_SECONDS:
                event(logging.WARNING, "the event loop was blocked: a handler does not await", seconds=round(lag, 1))
