"""Creates copies of tables in pg_temp, in one transaction.

Its caller rolls it back. Once the copies exist, the transaction is read only: PostgreSQL refuses every write outside pg_temp, in functions too, and
every nextval() of a real sequence. Limitation: what handlers do outside PostgreSQL is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from consumer.core.errors import CannotTell, Misconfigured
from consumer.core.identifiers import ident
from consumer.postgres.connection import milliseconds
from consumer.postgres.errors import sqlstate_of
from consumer.rebuild import copy_sql, table_catalog, table_model, trace_sql
from consumer.rebuild.compare import ComparisonResult, Excuse
from consumer.rebuild.shadow_session import ShadowSession, Trail
from consumer.rebuild.statement_guard import LOCKS, StatementGuard
from consumer.rebuild.table_model import Name, Table, TableUsage
from consumer.settings import Settings

_COMPACT_AT = 2000  # updates of a copy, if they are also twice its rows
_BUFFER = "64MB"  # of the server's memory, for the copies; the rest is on its disk
_NO_SNAPSHOT = frozenset({"22023", "42704", "55000"})  # of an import whose exporting connection has ended
_SETTINGS = """
select set_config(name, value, true) from (values
    ('idle_in_transaction_session_timeout', '0'),  -- a slow handler or broker leaves the connection idle
    ('statement_timeout', '0'), ('transaction_timeout', '0'),
    ('standard_conforming_strings', 'on'),
    -- A path may name pg_temp last: then a name without a schema would mean the real table.
    ('search_path', case when current_setting('search_path') ilike '%pg_temp%' then 'pg_temp, ' else '' end
                    || current_setting('search_path'))
) as s(name, value) where exists (select from pg_settings p where p.name = s.name)
"""
_CLAIMS = """
create temp table consumer_claims (
    handler int4 not null, id uuid not null, fingerprint int8 not null, primary key (handler, id)
);
create temp table consumer_dead (
    handler int4 not null, id uuid not null, fingerprint int8 not null, primary key (handler, id, fingerprint)
)
"""
# Only those that change rows: what another foreign key refuses is a dead letter already.
_CASCADES = """
select conrelid, confrelid, conname::text, pg_get_constraintdef(oid), confrelid::regclass::text, condeferrable, condeferred
from pg_constraint where contype = 'f' and conparentid = 0 and conrelid = any($1) and confrelid = any($1)
  and (confdeltype in ('c', 'n', 'd') or confupdtype in ('c', 'n', 'd')) order by conname
"""
_SHADOWS = """
with recursive shadow(oid, copy) as (
    select o, o from unnest($1::oid[]) as o
    union
    select n.oid, s.copy from shadow s, lateral (
        select inhrelid as oid from pg_inherits where inhparent = s.oid
        union all
        select r.ev_class from pg_depend d join pg_rewrite r on r.oid = d.objid
        where d.classid = 'pg_rewrite'::regclass and d.refclassid = 'pg_class'::regclass and d.refobjid = s.oid
          and r.ev_class <> s.oid
    ) as n
)
select s.oid, s.copy, n.nspname::text, c.relname::text, c.relkind::text from shadow s
join pg_class c on c.oid = s.oid join pg_namespace n on n.oid = c.relnamespace
"""
_WRITTEN = """
select n.nspname || '.' || c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'm') and c.relpersistence <> 't' and n.nspname not in ('pg_catalog', 'pg_toast', 'information_schema')
  and pg_stat_get_xact_tuples_inserted(c.oid) + pg_stat_get_xact_tuples_updated(c.oid)
      + pg_stat_get_xact_tuples_deleted(c.oid) > 0
"""


class ShadowTables:
    """One transaction with copies of tables, from `begin` to its rollback.

    doubts: why a copy does not begin as its table did. sequence_start: the first value of the copies' sequences.
    real_columns: columns that begin with real values, by table.
    """

    def __init__(
        self,
        connection: Any,
        settings: Settings,
        usage: dict[Name, TableUsage],
        owners: Mapping[str, str],
        base: str | None,
    ) -> None:
        self.connection = connection
        self.usage = usage
        self.tables: list[Table] = []
        self.guard = StatementGuard(connection, usage, owners)
        self.session = ShadowSession(self.guard)
        self.doubts: list[str] = []
        self.sequence_start = 1
        self.real_columns: Mapping[Name, frozenset[str]] = {}
        self._settings = settings
        self._base = base
        self._counters: list[dict[str, str]] = []  # of each copy: column -> sequence that counts uses of its default
        self._fixed: set[int] = set()  # copies that are not compacted: constraints connect their rows
        self._compacted: list[int] = []  # of each copy: its updates when it was last compacted
        self._rows: list[int] = []  # of each copy: its rows then, -1 for unknown

    async def begin(self, snapshot: str) -> None:
        """Begin the transaction, with an exported snapshot.

        Raises CannotTell if the snapshot is gone.
        """
        try:
            await self.connection.execute(
                f"begin isolation level repeatable read read write; set transaction snapshot {table_model.literal(snapshot)}"
            )
        except Exception as error:
            if sqlstate_of(error) in _NO_SNAPSHOT:
                text = "the connection that keeps the rebuild's snapshot has ended; nothing was changed, and it can be run again"
                raise CannotTell(text) from error
            raise
        await self.connection.execute(_SETTINGS)
        await self._more_buffers()
        await self.connection.execute(
            f"set local lock_timeout = {milliseconds(self._settings.postgres_lock_timeout_seconds):d}; {_CLAIMS}"
        )

    async def create(self, traced: ComparisonResult | None) -> None:
        """Create and fill the copies; make the transaction read only.

        traced: the differences whose messages are to be found, if any.
        """
        connection = self.connection
        self.tables = self.guard.tables = [
            await table_catalog.describe(connection, name) for name in sorted(self.usage)
        ]
        cascades = await connection.fetch(_CASCADES, [table.oid for table in self.tables])
        await self._create_copies(cascades)
        if self._base is None:
            await connection.execute(copy_sql.LEARN_FUNCTION)
            for number, table in enumerate(self.tables):
                await self._run(copy_sql.learning(number, table, self.usage[table.name]))
        if traced is not None:
            await self._trace(traced)
        await self._note_real_tables()
        await self._set_read_only()
        if self._base is not None:
            await self._run_base(self._base)

    async def _more_buffers(self) -> None:
        """Reserve more memory for the copies.

        PostgreSQL refuses it after a first temporary table, as on a connection of a pooler.
        """
        await self.connection.execute("savepoint rebuild_buffers")
        try:
            await self.connection.execute(f"set local temp_buffers = '{_BUFFER}'")
        except Exception as error:
            if sqlstate_of(error) is None:
                raise
            await self.connection.execute("rollback to savepoint rebuild_buffers")
        await self.connection.execute("release savepoint rebuild_buffers")

    async def _create_copies(self, cascades: Sequence[Any]) -> None:
        copier = copy_sql.Copier(self.sequence_start)
        deferrable: dict[str, bool] = {}  # constraints of the copies, and whether they are deferred at first
        for number, table in enumerate(self.tables):
            await self._create_copy(copier, table)
            constraints = {
                constraint.name: constraint.deferred for constraint in table.constraints if constraint.deferrable
            }
            self._fixed |= {number} if constraints else set()
            deferrable |= constraints
        deferrable |= await self._add_cascades(cascades)
        if deferrable:
            deferred = [name for name, is_deferred in deferrable.items() if is_deferred]
            names = ", ".join(f"pg_temp.{ident(name)}" for name in deferred)
            self.session.defer_again = f"set constraints {names} deferred" if deferred else ""
            await self.session.check_constraints()

    async def _create_copy(self, copier: copy_sql.Copier, table: Table) -> None:
        connection, copy = self.connection, table.name.copy
        statements, counters = copier.copy(table)
        await self._run(statements)
        for column in table.columns:
            if column.identity:
                counters[column.name] = await connection.fetchval(
                    "select pg_get_serial_sequence($1, $2)", copy, column.name
                )
                await connection.execute(
                    f"alter table {copy} alter column {ident(column.name)} restart with {self.sequence_start:d}"
                )
        self._counters.append(counters)
        oid = await connection.fetchval("select $1::text::regclass::oid", copy)
        self.session.copies.append(oid)
        await self._run(copy_sql.renamings(table, await table_catalog.constraints(connection, oid)))
        real = self.real_columns.get(table.name, frozenset())
        filling = copy_sql.first_rows(table, self.usage[table.name], self._base is not None, real)
        if filling is not None:
            await self._fill(table, filling)

    async def _add_cascades(self, cascades: Sequence[Any]) -> dict[str, bool]:
        """Give the copies the foreign keys that change rows.

        Returns those that are deferrable, and whether they are deferred at first.
        """
        deferrable: dict[str, bool] = {}
        by_oid = {table.oid: table for table in self.tables}
        for child, parent, name, definition, written, is_deferrable, is_deferred in cascades:
            target = f"REFERENCES {by_oid[parent].name.copy}("
            definition = definition.replace(f"REFERENCES {written}(", target).removesuffix(" NOT VALID")
            await self.connection.execute(
                f"alter table {by_oid[child].name.copy} add constraint {ident(name)} {definition} not valid"
            )
            deferrable |= {name: is_deferred} if is_deferrable else {}
            self._fixed |= {self.tables.index(by_oid[oid]) for oid in (child, parent)}
        return deferrable

    async def _fill(self, table: Table, filling: copy_sql.Filling) -> None:
        doubt = filling.doubt
        await self.connection.execute("savepoint rebuild_fill")
        try:
            # A trigger cannot be created on a table with pending constraint checks.
            await self.connection.execute(f"{filling.sql}; set constraints all immediate")
        except Exception as error:
            if (sqlstate_of(error) or "")[:2] != "23":
                raise
            updated = ", ".join(sorted(self.usage[table.name].updated))
            doubt = f"{table.name}: its rows cannot begin with the defaults of {updated}, which handlers update"
            await self.connection.execute(
                f"rollback to savepoint rebuild_fill; {filling.as_it_is}; set constraints all immediate"
            )
        await self.connection.execute(f"release savepoint rebuild_fill; analyze {table.name.copy}")
        if doubt is not None:
            self.doubts.append(doubt)

    def check_doubts(self) -> None:
        """Raise Misconfigured for tables whose first rows are unknown.

        No handler has inserted into them.
        """
        if self.doubts:
            raise Misconfigured(f"{self.doubts[0]}; give the first rows with --base FILE (nothing was changed)")

    async def _trace(self, traced: ComparisonResult) -> None:
        await self._run(trace_sql.SOUGHT)
        for place in sorted({difference.place for difference in traced.differences}):
            await self._run(trace_sql.tracing(place, traced.comparisons[place]))
        for difference in traced.differences:
            self.session.trails[difference.place, difference.mark] = Trail(bool(difference.deltas))
        await self.connection.executemany(
            "insert into pg_temp.consumer_sought values ($1, $2, $3) on conflict do nothing",
            [(difference.place, difference.mark, json.dumps(difference.deltas)) for difference in traced.differences],
        )

    async def _note_real_tables(self) -> None:
        """Note the relations that show rows of a table with a copy."""
        by_oid = {table.oid: table.name for table in self.tables}
        for oid, copy, schema, table, kind in await self.connection.fetch(_SHADOWS, list(by_oid)):
            self.guard.shadows[Name(schema, table)] = by_oid[copy]
            if kind in ("r", "p", "m"):
                self.session.real_tables.append((oid, by_oid[copy]))
        self.guard.locked_here = {Name(row[0], row[1]) for row in await self.connection.fetch(LOCKS)}
        _, self.session.real_counts = await self.session.read_counts()
        self._compacted, self._rows = [0] * len(self.tables), [-1] * len(self.tables)

    async def _set_read_only(self) -> None:
        """Let PostgreSQL refuse every write outside pg_temp.

        invariant: the setting belongs to this savepoint. Nothing inside it can undo it; releasing the savepoint does.
        """
        await self.connection.execute("savepoint rebuild_copies; set transaction read only")

    async def _run_base(self, base: str) -> None:
        for statement in table_model.split_statements(base):
            try:
                await self.guard.execute(statement)
            except Exception as error:
                if sqlstate_of(error) is None or self.guard.stopped_by is not None:
                    raise self.guard.stopped_by or error from None
                raise Misconfigured(f"--base: {error}; correct {' '.join(statement.split())[:80]}") from None
        await self.session.check_constraints()
        await self._analyze()

    async def keep_fast(self, analyze: bool) -> None:
        """Do what the server does between transactions: analyze, and vacuum.

        analyze: whether it is time for new statistics.
        """
        if analyze:
            await self._analyze()
        await self.guard.absent.shrink(self.tables)
        for number, updates in enumerate(self.session.update_counts):
            rows = self._rows[number] if self._rows[number] >= 0 else self.session.row_counts[number]
            if number in self._fixed or updates - self._compacted[number] < max(_COMPACT_AT, 2 * rows):
                continue
            self._compacted[number] = updates
            await self.connection.execute("release savepoint rebuild_copies")
            for statement in copy_sql.compaction(self.tables[number]):
                tag = await self.connection.execute(statement)
                if tag.startswith("INSERT"):
                    self._rows[number] = int(tag.split()[-1])
            await self._set_read_only()

    async def columns_used(self) -> list[set[str]]:
        """Return, of each table, the columns whose default gave a value."""
        return [
            {
                column
                for column, counter in counters.items()
                if await self.connection.fetchval(f"select is_called from {counter}")  # noqa: S608 - PostgreSQL's, or ours
            }
            for counters in self._counters
        ]

    def unknown(self) -> list[dict[str, Any]]:
        """Return what the copies lack, so that agreement proves nothing."""
        reasons: list[dict[str, Any]] = []
        for table in self.tables:
            if table.triggers:
                text = (
                    f"{table.name} has triggers that do not run in a rebuild ({', '.join(table.triggers)}): what they write "
                    "was not compared"
                )
                reasons.append({"kind": "triggers", "count": len(table.triggers), "text": text})
            if table.row_security:
                text = (
                    f"{table.name} hides rows from this role by row security: run the rebuild with a role that may see all "
                    "rows (BYPASSRLS)"
                )
                reasons.append({"kind": "row_security", "count": 1, "text": text})
            if table.rules:
                text = f"{table.name} has rules, which a rebuild does not follow: {', '.join(table.rules)}"
                reasons.append({"kind": "rules", "count": len(table.rules), "text": text})
        return reasons

    async def rows_gone(self, compared: ComparisonResult) -> list[dict[str, Any]]:
        """Return why tables that no handler inserts into may lack rows."""
        if self._base is not None:
            return []
        return await self.guard.absent.reasons(self.tables, [table["rows"] for table in compared.tables])

    def notes(self) -> list[str]:
        """Return the notes of the answer about the copies."""
        notes = []
        for table in self.tables:
            use = self.usage[table.name]
            if self._base is None and not use.inserted:
                began = f"with the default as {', '.join(sorted(use.updated))}" if use.updated else "as they are"
                notes.append(f"no handler inserts into {table.name}: it began with its real rows, {began}")
        if self.guard.reads:
            names = ", ".join(str(name) for name in sorted(self.guard.reads))
            notes.append(Excuse(f"only read, as they are now: {names}"))
        return notes

    async def check_writes(self) -> None:
        """Check by PostgreSQL's counts that no real table was written to."""
        written = await self.connection.fetch(_WRITTEN)
        if written:
            raise AssertionError(f"the rebuild has written to {written[0][0]}")

    async def _analyze(self) -> None:
        await self._run([f"analyze {table.name.copy}" for table in self.tables])

    async def _run(self, statements: Sequence[str]) -> None:
        for statement in statements:
            await self.connection.execute(statement)
