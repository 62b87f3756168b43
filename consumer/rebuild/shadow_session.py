"""The session of a rebuild: claims in a temporary table, and a trace of the messages behind differences.

It stands where the session of a worker would. Nothing of it outlasts the transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from consumer.core.dead_letters import KeyHold
from consumer.core.delivery import Batch, Delivery, PositionUpdate
from consumer.core.outcome import Dead
from consumer.deferred_writes.writer import BulkWriter
from consumer.postgres.claims import ExistingClaim
from consumer.postgres.server import NOWHERE
from consumer.postgres.session import Session
from consumer.rebuild.applied import offers
from consumer.rebuild.statement_guard import SplitBatch, StatementGuard
from consumer.rebuild.table_model import Name
from consumer.settings import Settings

_IDS_MAX = 3  # messages told of one difference
_CLAIM = """
with offered as materialized (
    select * from unnest($1::int4[], $2::uuid[], $3::int8[]) with ordinality as o(handler, id, fingerprint, place)
), claimed as (
    insert into pg_temp.consumer_claims select handler, id, fingerprint from offered on conflict do nothing
)
select o.place, c.fingerprint <> o.fingerprint from offered o join pg_temp.consumer_claims c using (handler, id)
"""
_UNCLAIM = """
delete from pg_temp.consumer_claims c using unnest($1::int4[], $2::uuid[]) as o(handler, id)
where (c.handler, c.id) = (o.handler, o.id)
"""
# Of real tables: scans and writes of this transaction. Of copies: updates, and rows as far as that is known.
_WATCH = """
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
    """The messages found behind a row: those that changed it by exactly the difference, and the first that touched it."""

    deltas: bool
    touching: list[str] = field(default_factory=list)
    explaining: list[str] = field(default_factory=list)

    def wants(self, explains: bool) -> bool:
        return len(self.touching) < _IDS_MAX or (explains and len(self.explaining) < _IDS_MAX)

    @property
    def complete(self) -> bool:
        return len(self.touching) >= _IDS_MAX and (not self.deltas or len(self.explaining) >= _IDS_MAX)

    def note(self, message: str, explains: bool) -> None:
        for found in [self.touching, *([self.explaining] if explains else [])]:
            if message not in found and len(found) < _IDS_MAX:
                found.append(message)

    def told(self) -> tuple[list[str], bool]:
        return (self.explaining, True) if self.explaining else (self.touching, False)


class ShadowSession(Session):
    """A Session whose transaction is a savepoint, and whose ledger is a table of its own."""

    def __init__(self, guard: StatementGuard, settings: Settings) -> None:
        proxy: Any = guard
        super().__init__(proxy, settings, NOWHERE)  # it closes its batches itself
        # Every text is looked at, and each row is traced to its messages.
        self.columns = BulkWriter(proxy, looks=guard.connection, arrays=False)
        self.batch_seconds_max = float("inf")  # nobody waits for it, and the idle timeout is off
        self.guard = guard
        self.raw = guard.connection
        self.part: Batch | None = None
        self.deferred: str | None = None  # SQL that defers again what a check at commit made immediate
        self.watched: list[tuple[int, Name]] = []  # real relations
        self.baseline: list[int] = []
        self.copies: list[int] = []
        self.updates: list[int] = []  # of each copy
        self.rows: list[int] = []
        self.trails: dict[tuple[int, str], Trail] = {}
        self._noted: list[tuple[tuple[int, str], bool]] = []
        self._open = False

    async def begin(self) -> None:
        await self.raw.execute("savepoint rebuild_batch")
        self._open, self._noted = True, []

    async def rollback(self) -> None:
        try:
            if self._open:
                self._open = False
                await self.raw.execute("rollback to savepoint rebuild_batch; release savepoint rebuild_batch")
        except Exception:
            self.raw.terminate()

    async def commit(self) -> None:
        if self.guard.verdict is not None:
            raise self.guard.verdict  # a handler has swallowed it
        await self.check_constraints()
        await self.raw.execute("release savepoint rebuild_batch")
        self._open = False
        await self._note()

    async def check_constraints(self) -> None:
        """What a COMMIT would check, and then as before: the next batch is another transaction to its handlers."""
        if self.deferred is not None:
            await self.raw.execute(f"set constraints all immediate; {self.deferred}")

    def close(self) -> None:
        self.raw.terminate()

    async def claim(self, deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> dict[Delivery, ExistingClaim]:
        lost = await self.raw.fetch(_CLAIM, *offers(deliveries))
        return {
            deliveries[place - 1]: ExistingClaim(dead=False, clashes=clashes, same_record=False)
            for place, clashes in lost
        }

    async def claimed(self, deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> dict[Delivery, ExistingClaim]:
        """Of ids that are claimed: offered again, they lose."""
        return await self.claim(deliveries, topics)

    async def release_claims(self, deliveries: Sequence[Delivery]) -> None:
        await self.raw.execute(_UNCLAIM, *offers(deliveries)[:2])

    async def store_dead_letters(
        self, dead: Mapping[Delivery, Dead], attempts: Mapping[Delivery, int], claimed: Sequence[Delivery]
    ) -> None:
        """Nothing is kept of them: they keep their claim."""

    async def save_attempts(self, tried: Mapping[Delivery, tuple[int, float]], settled: Sequence[Delivery]) -> None:
        """Nothing is kept of them either."""

    async def holds(self, deliveries: Sequence[Delivery]) -> dict[Delivery, KeyHold]:
        """Nothing holds back: what waits behind a dead letter was left out."""
        return dict.fromkeys(deliveries, KeyHold.FREE)

    async def write_positions(
        self, app: str, moves: Sequence[PositionUpdate], counts: Mapping[tuple[int, int, int, str], int]
    ) -> None:
        """Make sure that nothing real was touched, and look whether a sought row was."""
        assert self.part is not None
        advisory, real = await self.watch()
        names = ", ".join(sorted({each.handler.name for each in self.part.deliveries}))
        if advisory:
            self.guard.refuse(
                f"one of the handlers {names} takes advisory locks, in a function perhaps: a rebuild would keep them to its "
                "end, and hold up the workers"
            )
        for (_, name), before, now in zip(self.watched, self.baseline, real, strict=True):
            if now > before:
                self.guard.refuse(
                    f"one of the handlers {names} reads the real {name} and not its copy, in a function perhaps that names "
                    "the schema or is bound to the table"
                )
        if self.trails:
            touched = [((place, mark), explains) for place, mark, explains in await self.raw.fetch(_TOUCHED)]
            self._noted = [(at, explains) for at, explains in touched if self.trails[at].wants(explains)]
            if self._noted and len(self.part.deliveries) > 1:
                raise SplitBatch

    async def watch(self) -> tuple[bool, list[int]]:
        """Whether an advisory lock is held, and how often each real table was scanned or written to."""
        read_only, advisory, real, self.updates, self.rows = await self.raw.fetchrow(
            _WATCH, [oid for oid, _ in self.watched], self.copies
        )
        if self._open and not read_only:
            raise AssertionError("the rebuild's transaction is not read only any more")
        return advisory, real

    async def _note(self) -> None:
        """The batch stands: its one message is behind the rows that it has touched."""
        if self._noted and self.part is not None:
            [delivery] = self.part.deliveries
            for at, explains in self._noted:
                self.trails[at].note(str(UUID(bytes=delivery.id)), explains)
                if self.trails[at].complete:
                    await self.raw.execute("delete from pg_temp.consumer_sought where place = $1 and mark = $2", *at)
        self._noted = []

    @property
    def is_traced(self) -> bool:
        """Whether nothing is sought any more."""
        return bool(self.trails) and all(each.complete for each in self.trails.values())
