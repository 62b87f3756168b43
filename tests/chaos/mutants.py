"""Consumers that are broken on purpose: the harness must catch each.

Each replaces one step of the real consumer. M1 to M13 are known mistakes of other projects; M14 to M23 are mistakes
that this project made, or nearly made; M24 to M26 are of the outbox (tests/outbox/test_mutants.py has
three more); M27 and M28 are of what makes the worker fast. A mutant is installed where the application is loaded, when CHAOS_MUTANT names
it. Nothing here knows how it is caught.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import asyncpg
from aiokafka import AIOKafkaConsumer
from asyncpg.pgproto.pgproto import UUID
from replacing import replace

from consumer.core import claim_history, cloudevents
from consumer.core.delivery import Delivery
from consumer.core.identity import message_id, offset_id
from consumer.core.log_identity import Position
from consumer.core.message import Partition
from consumer.core.ordering import Scheduler
from consumer.dead_letters.session import DeadLetterSession
from consumer.handler_records.settled_ranges import HandlerChanges
from consumer.kafka import consumer as kafka
from consumer.kafka.consumer import KafkaConsumer
from consumer.outbox.send_queues import Row
from consumer.postgres import claim_sql
from consumer.postgres.claims import REDELIVERED, ExistingClaim
from consumer.postgres.session import Session
from consumer.precheck.client import Precheck
from consumer.replay.session import ReplaySession
from consumer.transaction import apply, handler_runner, identify, invoke, publishing, scope
from consumer.worker import start_positions
from consumer.worker.lane import LaneRunner
from consumer.worker.outbox_sender import OutboxSender
from consumer.worker.worker import Worker


def _kafka_keeps_the_positions(where_none: str = "beginning") -> None:
    """Begin where the group has committed, as most consumers do.

    PostgreSQL's positions are written and not read.
    """

    async def positions(
        source: KafkaConsumer, session: Session, app: str, wanted: list[Partition], label: Any, *_: Any
    ) -> tuple[dict[Partition, tuple[Position, None]], HandlerChanges]:
        committed = {partition: await source.committed(partition) for partition in wanted}
        others = await (source.log.beginnings if where_none == "beginning" else source.log.ends)(wanted)
        starts = {partition: others[partition] if offset is None else offset for partition, offset in committed.items()}
        await session.begin_positions(app, {partition: Position(at) for partition, at in starts.items()})
        return {partition: (Position(at), None) for partition, at in starts.items()}, HandlerChanges()

    write_positions = Session.write_positions

    async def closing(self: Session, app: str, moves: Sequence[Any], *more: Any, **options: Any) -> None:
        await self.connection.executemany(
            """insert into consumer.positions (app, topic, partition, next_offset) values ($1, $2, $3, $4)
               on conflict (app, topic, partition) do update set next_offset = excluded.next_offset""",
            [(app, *move.partition, move.next) for move in moves],
        )
        await write_positions(self, app, (), *more, **options)

    replace(start_positions, "read_positions", positions)
    replace(Session, "write_positions", closing)


def _workers() -> list[Worker]:
    """The workers of this process, as they are created."""
    workers: list[Worker] = []
    init = Worker.__init__

    def creating(self: Worker, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        workers.append(self)

    replace(Worker, "__init__", creating)
    return workers


def m1_auto_commit() -> None:
    """The client commits whatever it has handed out, processed or not."""
    _kafka_keeps_the_positions()
    real = AIOKafkaConsumer

    def auto_committing(**options: Any) -> Any:
        return real(**{**options, "enable_auto_commit": True, "auto_commit_interval_ms": 50})

    replace(kafka, "AIOKafkaConsumer", auto_committing)


def m2_commit_first() -> None:
    """Offsets first, then the work."""
    _kafka_keeps_the_positions()
    workers = _workers()
    settle = LaneRunner.settle_batch

    async def settling(self: LaneRunner, batch: Any) -> None:
        [worker] = workers
        await worker.source.commit({partition: (end, "") for partition, end in batch.ends.items()})
        await settle(self, batch)

    replace(LaneRunner, "settle_batch", settling)


def m3_redis_first() -> None:
    """The mark is set before the COMMIT."""
    workers = _workers()
    apply_batch = apply.apply_batch

    async def applying(session: Session, names: Any, lane: Any, batch: Any, **options: Any) -> Any:
        [worker] = workers
        precheck = worker.shards[0].precheck
        assert precheck is not None
        fresh = [delivery for delivery in batch.deliveries if delivery.outcome is None]
        precheck.mark(fresh, session.epoch, time.time())
        await asyncio.gather(*precheck._marking)
        return await apply_batch(session, names, lane, batch, **options)

    replace(apply, "apply_batch", applying)


def m4_select_then_insert() -> None:
    """Select the id, and insert it if missing; two may select first."""

    async def claim(
        self: Session, deliveries: Sequence[Delivery], topics: Mapping[str, int]
    ) -> dict[Delivery, ExistingClaim]:
        keys = [(delivery.handler.number, UUID(delivery.id)) for delivery in deliveries]
        rows = await self.connection.fetch(
            """select l.handler, l.id from consumer.ledger l
               join unnest($1::int2[], $2::uuid[]) o(handler, id) using (handler, id)""",
            [key[0] for key in keys],
            [key[1] for key in keys],
        )
        there = {(row[0], row[1]) for row in rows}
        await self.connection.executemany(
            """insert into consumer.ledger (handler, id, fingerprint, topic, partition, "offset", applied_at)
               values ($1, $2, $3, $4, $5, $6, now()) on conflict do nothing""",
            [
                (
                    *key,
                    delivery.fingerprint,
                    topics[delivery.record.topic],
                    delivery.record.partition,
                    delivery.record.offset,
                )
                for key, delivery in sorted(zip(keys, deliveries, strict=True), key=lambda pair: str(pair[0]))
                if key not in there
            ],
        )
        return {delivery: REDELIVERED for key, delivery in zip(keys, deliveries, strict=True) if key in there}

    replace(Session, "claim", claim)


def m5_separate_transactions() -> None:
    """The claim in one transaction, the effects in the next one."""
    claim = Session.claim

    async def claiming(self: Session, *arguments: Any, **options: Any) -> Any:
        standing = await claim(self, *arguments, **options)
        await self.commit()
        await self.begin()
        return standing

    replace(Session, "claim", claiming)


def m6_swallow_and_commit() -> None:
    """Ignore a failed statement, and the ROLLBACK that answers the COMMIT."""
    await_call, write_positions = invoke.await_call, Session.write_positions

    async def awaiting(call: Any, tx: Any) -> None:
        try:
            await await_call(call, tx)
        except asyncpg.InFailedSQLTransactionError:
            pass
        if tx is not None:
            tx.error = None

    async def closing(self: Session, *arguments: Any, **options: Any) -> None:
        try:
            await write_positions(self, *arguments, **options)
        except asyncpg.InFailedSQLTransactionError:
            pass

    async def commit(self: Session) -> None:
        await self.connection.execute("commit")

    replace(invoke, "await_call", awaiting)
    replace(Session, "write_positions", closing)
    replace(Session, "commit", commit)


def m7_trust_redis() -> None:
    """A mark is believed whatever database it is of."""

    def key(self: Precheck, handler: Any, bucket: int, epoch: str | None = None) -> bytes:
        return f"consumer:{self._app}:{handler.name}:{bucket}".encode()

    replace(Precheck, "_key", key)


def m8_offset_as_id() -> None:
    """What was produced twice has two offsets, and so two ids."""
    replace(identify, "from_headers", lambda record, _: offset_id(record))
    replace(identify, "_id_of", lambda delivery, *_: (offset_id(delivery.record), False))


def m9_commit_past_a_failure() -> None:
    """The position passes a failed message that is to be tried again."""
    moves = Scheduler.position_updates

    def moving(self: Scheduler, batch: Any, parked: Any, *more: Any) -> Any:
        kept = [(queue, queue.unsettled) for queue in self._queues.values()]
        for queue, _ in kept:
            queue.unsettled = {}
        try:
            return moves(self, batch, {}, *more)
        finally:
            for queue, unsettled in kept:
                queue.unsettled = unsettled

    replace(Scheduler, "position_updates", moving)


def m10_early_purge() -> None:
    """Ids are forgotten that the log can still deliver."""
    begin = Session.begin

    async def beginning(self: Session) -> None:
        await self.connection.execute("delete from consumer.ledger where applied_at < now() - interval '200 ms'")
        await begin(self)

    replace(Session, "begin", beginning)


def m11_no_scope() -> None:
    """One id, one claim, for all handlers together."""
    numbers = Session.numbers

    async def same(self: Session, *arguments: Any) -> Any:
        handlers, topics = await numbers(self, *arguments)
        return dict.fromkeys(handlers, min(handlers.values())), topics

    replace(Session, "numbers", same)


def m12_cancelled_commit() -> None:
    """A COMMIT that takes long is cancelled, and taken for done."""

    async def commit(self: Session) -> None:
        try:
            await asyncio.wait_for(self.connection.execute("commit"), 0.2)
        except TimeoutError:
            pass

    replace(Session, "commit", commit)


def m13_reset_to_latest() -> None:
    """A partition without a committed offset is begun at its end."""
    _kafka_keeps_the_positions(where_none="end")


def m14_grouping_without_proof() -> None:
    """Regroup statements of several messages even where that changes their effect."""
    replace(scope, "commute", lambda plans: True)


def m15_epoch_read_once() -> None:
    """The epoch is that of the connection's start, whatever a transaction sees."""
    replace(Session, "_check_stamp", lambda self, stamp: None)


def m16_claim_kept_after_a_postponed_retry() -> None:
    """A retry of a dead letter that is postponed leaves its claim."""

    async def release_claims(self: DeadLetterSession, deliveries: Any) -> None:
        for delivery in deliveries:
            self._dead_letters[delivery].is_postponed = True

    replace(DeadLetterSession, "release_claims", release_claims)


def m17_hold_forgotten_by_apply() -> None:
    """`replay --apply` does not ask whether a dead letter holds the key."""

    async def key_holds(self: ReplaySession, deliveries: Any) -> dict[Any, Any]:
        return {}

    replace(ReplaySession, "key_holds", key_holds)


def m18_waiting_bounded_for_all_partitions() -> None:
    """Stop taking from all partitions while too many messages wait in one."""
    take = Scheduler._take_fresh

    def taking(self: Scheduler, *arguments: Any) -> Any:
        if sum(queue.delayed for queue in self._queues.values()) >= self._delayed_max:
            return None
        return take(self, *arguments)

    replace(Scheduler, "_take_fresh", taking)


def m19_id_without_its_source() -> None:
    """A CloudEvent's id alone is its identity."""
    replace(cloudevents, "event_id", lambda source, id: message_id(id))


def m20_claim_kept_of_what_waits() -> None:
    """A failed message keeps its claim, although it is tried again."""

    async def release_claims(self: Session, deliveries: Any) -> None: ...

    replace(Session, "release_claims", release_claims)


def m21_dead_letters_hold_nothing() -> None:
    """Apply messages of a key behind its dead letter.

    The dead letter is applied later, out of order.
    """
    for module in (apply, handler_runner):
        replace(module, "blocks_key", lambda dead: False)


def m22_failures_leave_their_writes() -> None:
    """What a failed message has written is not taken back."""
    execute = asyncpg.Connection.execute

    async def deaf(self: asyncpg.Connection, query: str, *args: Any, **options: Any) -> str:
        if query.startswith("rollback to savepoint consumer_"):
            query = query.replace("rollback to savepoint", "release savepoint")
            query += "; " + query.replace("release savepoint", "savepoint")
        return await execute(self, query, *args, **options)

    replace(asyncpg.Connection, "execute", deaf)


def m23_a_letter_that_counts_as_applied() -> None:
    """The claim of a dead letter says that the message was applied."""
    store_dead_letters = Session.store_dead_letters

    async def burying(self: Session, dead: Any, attempts: Any, claimed: Any) -> None:
        await store_dead_letters(self, dead, attempts, ())

    replace(Session, "store_dead_letters", burying)


def m24_watermark_before_acknowledgement() -> None:
    """Rows count as published when they are about to be sent."""
    send_batch = OutboxSender._send_batch

    async def sending(self: OutboxSender, producer: Any, partition: Partition, rows: list[Row]) -> None:
        for row in rows:
            row.stream.acknowledge(row.seq)
        while any(row.stream.saved < row.stream.watermark for row in rows):
            await asyncio.sleep(0.02)  # the relay saves it within a second
        await send_batch(self, producer, partition, rows)

    replace(OutboxSender, "_send_batch", sending)


def m25_rows_removed_before_they_are_sent() -> None:
    """The table is a queue: rows are deleted when they are taken."""
    send_batch = OutboxSender._send_batch

    async def sending(self: OutboxSender, producer: Any, partition: Partition, rows: list[Row]) -> None:
        connection = await asyncpg.connect(self._settings.dsn)
        try:
            await connection.executemany(
                "select remove_from_outbox($1, $2)", [(row.stream.number, row.seq) for row in rows]
            )
        finally:
            await connection.close()
        await send_batch(self, producer, partition, rows)

    replace(OutboxSender, "_send_batch", sending)


def m26_random_ids() -> None:
    """An input that is applied again publishes under other ids."""
    replace(publishing, "derived_id", lambda *_: uuid4().bytes)


def m27_new_ids_that_may_be_known() -> None:
    """A claim that expects only new ids passes over known ones."""
    replace(claim_history, "_CLEAN_MIN", 0)
    replace(
        claim_sql, "_NEW", claim_sql._NEW.replace("order by handler, id", "order by handler, id on conflict do nothing")
    )


def m28_lanes_that_share_a_partition() -> None:
    """A lane takes from a partition that another has in flight."""
    replace(Scheduler, "begin", lambda self, batch: None)


MUTANTS: dict[str, Callable[[], None]] = {
    name.split("_", 1)[0].upper(): patch
    for name, patch in dict(globals()).items()
    if name.startswith("m") and name[1].isdigit()
}


def install(name: str) -> None:
    """Break the consumer of this process in this way.

    "" leaves it alone.
    """
    if name:
        MUTANTS[name]()
