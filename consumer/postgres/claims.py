"""Claims: rows of the ledger, one per handler and message id.

claim_sql.py writes the statements; migrations/0001_schema.sql explains the generations of the ledger.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import asyncpg
from asyncpg.pgproto.pgproto import UUID

from consumer.core.claim_history import ClaimHistory
from consumer.core.delivery import Delivery
from consumer.core.retention import is_time, may_be_forgotten
from consumer.postgres import generations
from consumer.postgres.claim_sql import FIRST, READ, STANDING, Generations, Statements, statements
from consumer.postgres.errors import Conflict
from consumer.postgres.protocol import Connection

_VERSIONS_MAX = 10  # of the ledger that may pass during one claim


# Of all generations: an operator's transaction does not know where a claim is.
_REVIVE = """
update consumer.ledger l set applied_at = now() from unnest($1::int2[], $2::uuid[], $3::int8[]) as o(handler, id, fingerprint)
where l.handler = o.handler and l.id = o.id and l.fingerprint = o.fingerprint and l.applied_at is null
returning l.handler, l.id
"""
_MARK_DEAD = """
update consumer.ledger l set applied_at = null from unnest($1::int2[], $2::uuid[]) as o(handler, id)
where l.handler = o.handler and l.id = o.id
"""
_DROP_DEAD = """
delete from consumer.ledger l using unnest($1::int2[], $2::uuid[]) as o(handler, id)
where l.handler = o.handler and l.id = o.id and l.applied_at is null
"""


class ExistingClaim(NamedTuple):
    """The ledger's row of an id that was claimed before.

    clashes: it has another payload. same_record: this record claimed it, so this is a redelivery; otherwise the message
    was produced again.
    """

    dead: bool
    clashes: bool
    same_record: bool


REDELIVERED = ExistingClaim(dead=False, clashes=False, same_record=True)  # nearly all claims of a replay
_EXISTING = {
    (dead, clashes, same_record): ExistingClaim(dead, clashes, same_record)
    for dead in (False, True)
    for clashes in (False, True)
    for same_record in (False, True)
} | {tuple(REDELIVERED): REDELIVERED}


class Claims:
    """Claims ids on one connection, in the live generations.

    begin: starts the connection's transaction again, after a claim found that the ledger has turned, or that an id is not
    new. is_first: whether a claim is the first statement of its transaction, so that nothing but the claim is undone.
    """

    def __init__(
        self,
        connection: Connection,
        begin: Callable[[], Awaitable[None]],
        clock_skew_hours: float,
        *,
        is_first: bool = True,
    ) -> None:
        self._connection = connection
        self._begin = begin
        self._skew_ms = round(clock_skew_hours * 3_600_000)
        self._is_first = is_first
        self.history = ClaimHistory()
        self.generations = FIRST  # as of the latest read; a claim notices when they have changed

    async def read_generations(self) -> None:
        """Read which generations are live now."""
        version, target, turning, live, horizon_ms = await self._connection.fetchrow(READ)
        self.generations = Generations(version, target, turning, tuple(live), horizon_ms)

    @property
    def has_forgotten(self) -> bool:
        """Whether rows are gone, so that a message can be too old."""
        return self.generations.horizon_ms is not None

    async def claim(self, deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> dict[Delivery, ExistingClaim]:
        """Claim every id in one statement; return those that were claimed before.

        Waits for a claim that another transaction holds, until that one commits or rolls back. The ids must be distinct
        for each handler. The statement sorts by key, so that two batches cannot wait for each other here.
        """
        known: dict[Delivery, ExistingClaim] = {}
        unknown = deliveries
        if self.history.expects_known:
            known, unknown = _existing(deliveries, await self.ask(deliveries, topics, to_claim=False))
        existing = known
        if unknown:
            existing, unseen = _existing(unknown, await self.ask(unknown, topics, to_claim=True))
            if unseen:
                # A second statement, because it sees what a concurrent transaction has committed while the first one waited.
                existing |= await self.claims_of(unseen, topics)
            existing |= known
        self.history.claimed(len(deliveries), len(existing))
        return existing

    async def claims_of(
        self, deliveries: Sequence[Delivery], topics: Mapping[str, int]
    ) -> dict[Delivery, ExistingClaim]:
        """Read the claims of ids that this transaction has claimed or lost.

        Raises Conflict when one has vanished.
        """
        lost = await self._connection.fetchrow(self._statements.standing, *_offers(deliveries, topics))
        existing, vanished = _existing(deliveries, lost)
        if vanished:
            raise Conflict("a claim vanished between two statements")
        return existing

    async def existing(
        self, deliveries: Sequence[Delivery], topics: Mapping[str, int]
    ) -> tuple[dict[Delivery, ExistingClaim], list[Delivery]]:
        """Read the claims of ids, and list the ids without one.

        Claims nothing and waits for no other transaction.
        """
        return _existing(deliveries, await self._connection.fetchrow(STANDING, *_offers(deliveries, topics)))

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Delete claims of this transaction."""
        await self._connection.execute(self._statements.release_claims, *_keys(deliveries))

    async def mark_dead(self, deliveries: Sequence[Delivery]) -> None:
        """Mark claims of this transaction as those of dead letters."""
        await self._connection.execute(self._statements.mark_claims_dead, *_keys(deliveries))

    async def too_old(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Return messages whose row may be gone.

        That their claim was won proves nothing. The horizon is that of the version of this transaction's claim. The
        clocks of producers and of PostgreSQL may differ by `ledger_clock_skew_hours`. Records without a usable
        timestamp are judged by their offsets (core/retention.py). Limitation: a producer that sends an id again with a
        new timestamp, later than rows are kept.
        """
        horizon_ms = self.generations.horizon_ms
        if horizon_ms is None:
            return []
        below: dict[tuple[int, str, int], int] = {}
        if any(not is_time(delivery.record.timestamp) for delivery in deliveries):
            handlers = sorted({delivery.handler.number for delivery in deliveries})
            below = await generations.forgotten_below(self._connection, handlers)
        return [
            delivery
            for delivery in deliveries
            if may_be_forgotten(
                (record := delivery.record).timestamp,
                record.offset,
                horizon_ms + self._skew_ms,
                below.get((delivery.handler.number, record.topic, record.partition)),
            )
        ]

    @property
    def _statements(self) -> Statements:
        return statements(self.generations.target, self.generations.turning, self.generations.live)

    async def ask(self, deliveries: Sequence[Delivery], topics: Mapping[str, int], *, to_claim: bool) -> Any:
        """Claim or look.

        In a new transaction if the ledger has turned, or if an id is known although all were expected to be new.
        """
        alike = _offers_alike(deliveries, topics)
        offers = alike if alike is not None else _offers(deliveries, topics)
        expects_new = to_claim and self._is_first and self.history.expects_new
        for _ in range(_VERSIONS_MAX):
            error = None
            statement = self._statement(to_claim, expects_new, alike is not None)
            try:
                lost = await self._connection.fetchrow(statement, *offers)
                if lost[5] == self.generations.version:
                    return lost
            except asyncpg.UndefinedTableError as gone:  # a generation that was dropped, maybe
                error = gone
            except asyncpg.UniqueViolationError:
                if not expects_new:
                    raise
                expects_new = False
                self.history.surprised()
            # So far, the transaction contains only this claim and reads, so it can be undone.
            await self._connection.execute("rollback")
            before = self.generations
            await self.read_generations()
            if error is not None and self.generations == before:
                raise error
            await self._begin()
        raise Conflict("the ledger turned again and again")

    def _statement(self, to_claim: bool, expects_new: bool, is_alike: bool) -> str:
        """Return the statement that claims or looks."""
        texts = self._statements
        new = texts.claim_new_alike if is_alike else texts.claim_new
        if expects_new and new is not None:
            return new
        if to_claim:
            return texts.claim_alike if is_alike else texts.claim
        return texts.standing_alike if is_alike else texts.standing


async def claimed_ids(connection: Connection, ids: Sequence[tuple[int, bytes]]) -> set[tuple[int, bytes]]:
    """Return which (handler number, id) the ledger has."""
    rows = await connection.fetch(
        """select l.handler, l.id from unnest($1::int2[], $2::uuid[]) as o(handler, id)
           join consumer.ledger l using (handler, id)""",
        [handler for handler, _ in ids],
        [UUID(id) for _, id in ids],
    )
    return {(row[0], row[1].bytes) for row in rows}


async def revive(
    connection: Connection, keys: Sequence[tuple[int, UUID]], fingerprints: Sequence[int]
) -> list[tuple[int, UUID]]:
    """Turn claims of dead letters into claims of applied messages.

    Returns the (handler, id) of those that were dead.
    """
    rows = await connection.fetch(_REVIVE, *_columns(keys), fingerprints)
    return [(row[0], row[1]) for row in rows]


async def mark_dead_again(connection: Connection, keys: Sequence[tuple[int, UUID]]) -> None:
    """Undo `revive`."""
    await connection.execute(_MARK_DEAD, *_columns(keys))


async def drop_dead(connection: Connection, keys: Sequence[tuple[int, UUID]]) -> None:
    """Delete claims of dead letters."""
    await connection.execute(_DROP_DEAD, *_columns(keys))


async def exist(connection: Connection, handler: int) -> bool:
    """Return whether the ledger has any row of a handler."""
    return bool(await connection.fetchval("select exists (select from consumer.ledger where handler = $1)", handler))


def uuids(ids: Iterable[bytes]) -> list[UUID]:
    """Return ids as the driver's UUIDs, which are faster than Python's."""
    return [UUID(id) for id in ids]


def _columns(keys: Sequence[tuple[int, UUID]]) -> tuple[list[int], list[UUID]]:
    return [handler for handler, _ in keys], [id for _, id in keys]


def _offers(deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> tuple[list[Any], ...]:
    return (
        [delivery.handler.number for delivery in deliveries],
        [UUID(delivery.id) for delivery in deliveries],
        [delivery.fingerprint for delivery in deliveries],
        [topics[delivery.record.topic] for delivery in deliveries],
        [delivery.record.partition for delivery in deliveries],
        [delivery.record.offset for delivery in deliveries],
        [delivery.outcome is None for delivery in deliveries],
    )


def _offers_alike(deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> tuple[Any, ...] | None:
    """Return the offers of messages of one handler and partition.

    None if there are others, or a dead letter among them.
    """
    handler, record = deliveries[0].handler, deliveries[0].record
    topic, partition = record.topic, record.partition
    ids, fingerprints, offsets = [], [], []
    for delivery in deliveries:
        record = delivery.record
        if (
            delivery.handler is not handler
            or record.partition != partition
            or record.topic != topic
            or delivery.outcome is not None
        ):
            return None
        ids.append(UUID(delivery.id))
        fingerprints.append(delivery.fingerprint)
        offsets.append(record.offset)
    return handler.number, ids, fingerprints, topics[topic], partition, offsets, True


def _existing(deliveries: Sequence[Delivery], lost: Any) -> tuple[dict[Delivery, ExistingClaim], list[Delivery]]:
    """Return the existing claims, and the messages whose claim is not visible.

    A statement does not see what was committed while it waited.
    """
    everything, elsewhere, dead, clashes, unseen = (
        [deliveries[place - 1] for place in places or ()] for places in lost[:5]
    )
    existing = dict.fromkeys(everything, REDELIVERED)
    if elsewhere or dead or clashes:
        away, died, clashing = set(elsewhere), set(dead), set(clashes)
        for delivery in away | died | clashing:
            existing[delivery] = _EXISTING[delivery in died, delivery in clashing, delivery not in away]
    for delivery in unseen:
        del existing[delivery]
    return existing, unseen


def _keys(deliveries: Sequence[Delivery]) -> tuple[list[int], list[UUID]]:
    return [delivery.handler.number for delivery in deliveries], [UUID(delivery.id) for delivery in deliveries]
