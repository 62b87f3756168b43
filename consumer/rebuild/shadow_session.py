"""Stores a rebuild's claims, and traces the messages behind differences.

ShadowSession takes the place of a worker's Session (transaction/batch_store.py). Nothing of it outlasts the transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from consumer.core.dead_letters import KeyHold
from consumer.core.delivery import Batch, Delivery, PositionUpdate
from consumer.core.outcome import Dead
from consumer.deferred_writes.writer import BulkWriter
from consumer.outbox.record import Outgoing, StoredStream
from consumer.postgres.application_codecs import Preparer
from consumer.postgres.claims import ExistingClaim
from consumer.rebuild.ledger_history import offers
from consumer.rebuild.state import OutgoingSink
from consumer.rebuild.statement_guard import SplitBatch, StatementGuard
from consumer.rebuild.table_model import Name

_IDS_MAX = 3  # messages in the answer, of one difference
_CLAIM = """
with offered as materialized (
    select * from unnest($1::int4[], $2::uuid[], $3::int8[]) with ordinality as o(handler, id, fingerprint, place)
), claimed as (
    insert into pg_temp.consumer_claims select handler, id, fingerprint from offered on conflict do nothing
)
select o.place, c.fingerprint <> o.fingerprint from offered o join pg_temp.consumer_claims c using (handler, id)
"""
_RELEASE = """
delete from pg_temp.consumer_claims c using unnest($1::int4[], $2::uuid[]) as o(handler, id)
where (c.handler, c.id) = (o.handler, o.id)
"""
# Counts of this transaction. Of real tables: scans and writes. Of copies: updates; inserted minus deleted rows.
_COUNTERS = """
select current_setting('transaction_read_only') = 'on',
       exists (select from pg_locks where pid = pg_backend_pid() and locktype = 'advisory'),
       array(select pg_stat_get_xact_numscans(o) + pg_stat_get_xact_tuples_inserted(o)
                    + pg_stat_get_xact_tuples_updated(o) + pg_stat_get_xact_tuples_deleted(o)
                    + coalesce((select sum(pg_stat_get_xact_numscans(indexrelid)) from pg_index where indrelid = o), 0)::int8
             from unnest($1::oid[]) with ordinality as t(o, place) order by place),
       array(select pg_stat_get_xact_tuples_updated(o) from unnest($2::oid[]) with ordinality as t(o, place) order by place),
       array(select pg_stat_get_xact_tuples_inserted(o) - pg_stat_get_xact_tuples_deleted(o)
             from unnest($2::oid[]) with ordinality as t(o, place) order by place)
"""
_TOUCHED = """
with taken as (delete from pg_temp.consumer_touched returning place, mark, explains)
select place, mark, bool_or(explains) from taken group by place, mark
"""


@dataclass(slots=True)
class Trail:
    """The messages that touched a differing row.

    deltas: whether numbers of the row differ. touching: the first messages that touched the row. explaining: the first that
    changed a number by exactly the difference.
    """

    deltas: bool
    touching: list[str] = field(default_factory=list)
    explaining: list[str] = field(default_factory=list)

    def wants(self, explains: bool) -> bool:
        """Whether another message has room here."""
        return len(self.touching) < _IDS_MAX or (explains and len(self.explaining) < _IDS_MAX)

    @property
    def complete(self) -> bool:
        return len(self.touching) >= _IDS_MAX and (not self.deltas or len(self.explaining) >= _IDS_MAX)

    def note(self, message: str, explains: bool) -> None:
        for messages in [self.touching, *([self.explaining] if explains else [])]:
            if message not in messages and len(messages) < _IDS_MAX:
                messages.append(message)

    def result(self) -> tuple[list[str], bool]:
        """Return the messages, and whether each explains the difference."""
        return (self.explaining, True) if self.explaining else (self.touching, False)


class ShadowSession:
    """A BatchStore whose transaction is a savepoint, with claims of its own.

    Dead letters, attempts and positions are not stored. `write_positions` checks instead that the batch touched no real
    table.
    """

    has_forgotten = False  # messages that the ledger may have forgotten are left out before

    def __init__(self, guard: StatementGuard) -> None:
        self.guard = self.handler_connection = guard
        self.connection = self._raw = guard.own
        self.preparer = Preparer(guard.prepare)
        # The guard inspects every text, and each row is traced to its messages: so no executions are joined.
        self.bulk_writer = BulkWriter(guard, looks=guard.own, arrays=False)
        self.batch_seconds_max = float("inf")  # a slow batch delays no worker, and the idle timeout is off
        self.batch: Batch | None = None  # that is settled now
        self.defer_again: str | None = None  # SQL that defers again what a check at commit made immediate
        self.real_tables: list[tuple[int, Name]] = []  # oids of real relations, and the table that each belongs to
        self.real_counts: list[int] = []  # of each real relation, before the first message
        self.copies: list[int] = []  # oids
        self.update_counts: list[int] = []  # of each copy
        self.row_counts: list[int] = []  # of each copy: inserted minus deleted
        self.trails: dict[tuple[int, str], Trail] = {}
        self.outgoing: OutgoingSink | None = None
        self._published: Sequence[Outgoing] = ()  # by the open batch
        self._noted: list[tuple[tuple[int, str], bool]] = []
        self._open = False

    @property
    def is_usable(self) -> bool:
        return not self.connection.is_closed()

    async def begin(self) -> None:
        await self._raw.execute("savepoint rebuild_batch")
        self._open, self._noted, self._published = True, [], ()

    async def rollback(self) -> None:
        try:
            if self._open:
                self._open = False
                await self._raw.execute("rollback to savepoint rebuild_batch; release savepoint rebuild_batch")
        except Exception:
            self._raw.terminate()

    async def commit(self) -> None:
        if self.guard.stopped_by is not None:
            raise self.guard.stopped_by  # a handler has swallowed it
        await self.check_constraints()
        await self._raw.execute("release savepoint rebuild_batch")
        self._open = False
        await self._note()
        if self._published and self.outgoing is not None:
            await self.outgoing.add(self._published)

    async def check_constraints(self) -> None:
        """Check deferred constraints as a COMMIT would, and defer them again.

        The next batch is another transaction to its handlers.
        """
        if self.defer_again is not None:
            await self._raw.execute(f"set constraints all immediate; {self.defer_again}")

    def close(self) -> None:
        self._raw.terminate()

    async def claim(self, deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> dict[Delivery, ExistingClaim]:
        lost = await self._raw.fetch(_CLAIM, *offers(deliveries))
        return {
            deliveries[place - 1]: ExistingClaim(dead=False, clashes=clashes, same_record=False)
            for place, clashes in lost
        }

    async def claims_of(
        self, deliveries: Sequence[Delivery], topics: Mapping[str, int]
    ) -> dict[Delivery, ExistingClaim]:
        """Claim again ids that are claimed: every one is lost."""
        return await self.claim(deliveries, topics)

    async def too_old(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        return []

    async def release_claims(self, deliveries: Sequence[Delivery]) -> None:
        await self._raw.execute(_RELEASE, *offers(deliveries)[:2])

    async def store_dead_letters(
        self, dead: Mapping[Delivery, Dead], attempts: Mapping[Delivery, int], claimed: Sequence[Delivery]
    ) -> None:
        """Store nothing: the messages keep their claims."""

    async def dead_letter_copies(self) -> Sequence[Outgoing]:
        return ()

    async def save_attempts(self, tried: Mapping[Delivery, tuple[int, float]], settled: Sequence[Delivery]) -> None:
        """Store nothing: SinglePass counts the rounds."""

    async def key_holds(self, deliveries: Sequence[Delivery]) -> dict[Delivery, KeyHold]:
        """Hold nothing back: what waits behind a dead letter was left out."""
        return dict.fromkeys(deliveries, KeyHold.FREE)

    async def store_outgoing(self, app: str, outgoing: Sequence[Outgoing]) -> Sequence[StoredStream]:
        """Publish nothing; keep it to be compared."""
        self._published = outgoing
        return ()

    async def write_positions(
        self, app: str, moves: Sequence[PositionUpdate], counts: Mapping[tuple[int, int, int, str], int]
    ) -> None:
        """Write nothing; check that the batch touched no real table.

        Raises Misconfigured if it did, and SplitBatch if several messages touched a row that is traced.
        """
        assert self.batch is not None
        advisory, real_counts = await self.read_counts()
        names = ", ".join(sorted({delivery.handler.name for delivery in self.batch.deliveries}))
        if advisory:
            self.guard.refuse(
                f"handlers {names}: one of them takes advisory locks, perhaps in a function, which would block workers until "
                "the rebuild ends; leave it out with --handler"
            )
        for (_, name), before, now in zip(self.real_tables, self.real_counts, real_counts, strict=True):
            if now > before:
                self.guard.refuse(
                    f"handlers {names}: one of them reads the real {name} and not its copy, perhaps in a function that names "
                    "the schema or is bound to the table; leave it out with --handler"
                )
        if self.trails:
            touched = [((place, mark), explains) for place, mark, explains in await self._raw.fetch(_TOUCHED)]
            self._noted = [(row, explains) for row, explains in touched if self.trails[row].wants(explains)]
            if self._noted and len(self.batch.deliveries) > 1:
                raise SplitBatch

    async def read_counts(self) -> tuple[bool, list[int]]:
        """Read this transaction's counts from PostgreSQL.

        Returns whether it holds an advisory lock, and of each real relation its scans and writes. Those of the copies go into
        `update_counts` and `row_counts`.
        """
        read_only, advisory, real_counts, self.update_counts, self.row_counts = await self._raw.fetchrow(
            _COUNTERS, [oid for oid, _ in self.real_tables], self.copies
        )
        if self._open and not read_only:
            raise AssertionError("the rebuild's transaction is not read only any more")
        return advisory, real_counts

    async def _note(self) -> None:
        """Note the message of a batch at the rows that it touched."""
        if self._noted and self.batch is not None:
            [delivery] = self.batch.deliveries
            for row, explains in self._noted:
                self.trails[row].note(str(UUID(bytes=delivery.id)), explains)
                if self.trails[row].complete:
                    await self._raw.execute("delete from pg_temp.consumer_sought where place = $1 and mark = $2", *row)
        self._noted = []

    @property
    def is_traced(self) -> bool:
        """Whether every traced row has its messages."""
        return bool(self.trails) and all(trail.complete for trail in self.trails.values())
