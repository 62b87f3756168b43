"""Copies of tables in pg_temp, in one transaction that its caller rolls back.

Once the copies exist, the transaction is read only: PostgreSQL refuses every write outside pg_temp, in functions too, and
every nextval() of a real sequence. Limitations: what handlers do outside PostgreSQL is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from consumer.core.errors import CannotTell, Misconfigured
from consumer.core.identifiers import ident
from consumer.postgres.connection import milliseconds
from consumer.postgres.errors import sqlstate_of
from consumer.rebuild import copy_sql, table_model, trace_sql
from consumer.rebuild.compare import Compared, Excuse
from consumer.rebuild.shadow_session import ShadowSession, Trail
from consumer.rebuild.statement_guard import LOCKS, StatementGuard
from consumer.rebuild.table_model import Column, Constraint, DefaultSequence, Name, Table, TableUsage
from consumer.settings import Settings

_COMPACT_AT = 2000  # updates of a copy, and twice its rows
_BUFFER = "64MB"  # of the server's memory for the copies; the rest of them is on its disk
_NO_SNAPSHOT = frozenset({"22023", "42704", "55000"})  # what importing one answers whose connection has ended
_SETTINGS = """
select set_config(name, value, true) from (values
    ('idle_in_transaction_session_timeout', '0'),  -- a slow handler, or a slow broker, leaves it idle
    ('statement_timeout', '0'), ('transaction_timeout', '0'),
    ('standard_conforming_strings', 'on'),
    -- Some paths name pg_temp, and name it last: then a name without a schema would mean the real table.
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
_TABLE = """
select c.oid, row_security_active(c.oid),
       array(select tgname::text from pg_trigger where tgrelid = c.oid and not tgisinternal and tgenabled <> 'D' order by 1),
       array(select rulename::text from pg_rewrite where ev_class = c.oid and ev_enabled <> 'D' order by 1)
from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = $1 and c.relname = $2
"""
_TABLE_COLUMNS = """
select a.attname::text, a.attnotnull or t.typnotnull, coalesce(pg_get_expr(d.adbin, d.adrelid), t.typdefault),
       a.attidentity <> '', a.attgenerated <> '', b.typname::text, b.typcategory::text,
       b.typnamespace = 'pg_catalog'::regnamespace,
       array(select s.oid::regclass::text || chr(10) || s.relname from pg_depend p
             join pg_class s on s.oid = p.refobjid and s.relkind = 'S'
             where p.classid = 'pg_attrdef'::regclass and p.objid = d.oid and p.refclassid = 'pg_class'::regclass)
from pg_attribute a join pg_type t on t.oid = a.atttypid
join pg_type b on b.oid = case when t.typtype = 'd' then t.typbasetype else t.oid end
left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped order by a.attnum
"""
_TABLE_KEYS = """
select array(select a.attname::text from unnest(i.indkey::int2[]) with ordinality as k(number, place)
             join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.number
             where k.place <= i.indnkeyatts order by k.place)
from pg_index i where i.indrelid = $1 and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
  and not exists (select from unnest(i.indkey::int2[]) with ordinality as k(number, place)
                  join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.number
                  where k.place <= i.indnkeyatts and not a.attnotnull)
order by i.indisprimary desc, i.indnkeyatts, i.indexrelid
"""
_CONSTRAINTS = """
select conname::text, pg_get_constraintdef(oid), condeferrable, condeferred from pg_constraint
where conrelid = $1 and contype in ('p', 'u', 'x') order by conname
"""
# Only those that change rows: what a foreign key refuses was refused before, and its message is a dead letter.
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
    """One transaction with copies in it, from `begin` to the rollback of its connection."""

    def __init__(
        self,
        connection: Any,
        settings: Settings,
        known: dict[Name, TableUsage],
        owners: Mapping[str, str],
        base: str | None,
    ) -> None:
        self.connection = connection
        self.known = known
        self.tables: list[Table] = []
        self.guard = StatementGuard(connection, known, owners)
        self.session = ShadowSession(self.guard)
        self.doubts: list[str] = []
        self.numbers_from = 1  # of sequences of the copies
        self.beginnings: Mapping[Name, frozenset[str]] = {}  # columns that begin with real values
        self._settings = settings
        self._base = base
        self._counters: list[dict[str, str]] = []
        self._fixed: set[int] = set()  # tables that are not written anew: their rows hang together
        self._compacted: list[int] = []  # updates of each copy when it was last written anew
        self._rows: list[int] = []  # of each copy then

    async def begin(self, snapshot: str) -> None:
        """Begin the transaction, which sees the real state as of an exported snapshot. Raises CannotTell if that is gone."""
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

    async def make(self, sought: Compared | None) -> None:
        """Make the copies and fill them, and make the transaction read only."""
        connection = self.connection
        self.tables = self.guard.tables = [await self._described(name) for name in sorted(self.known)]
        cascades = await connection.fetch(_CASCADES, [each.oid for each in self.tables])
        await self._make_copies(cascades)
        if self._base is None:
            await connection.execute(copy_sql.LEARN_FUNCTION)
            for number, table in enumerate(self.tables):
                await self._run(copy_sql.learning(number, table, self.known[table.name]))
        if sought is not None:
            await self._seek(sought)
        await self._watch()
        await self._read_only()
        if self._base is not None:
            await self._run_base(self._base)

    async def _more_buffers(self) -> None:
        """More memory for the copies. Too late on a connection of a pooler that has had temporary tables before."""
        await self.connection.execute("savepoint rebuild_buffers")
        try:
            await self.connection.execute(f"set local temp_buffers = '{_BUFFER}'")
        except Exception as error:
            if sqlstate_of(error) is None:
                raise
            await self.connection.execute("rollback to savepoint rebuild_buffers")
        await self.connection.execute("release savepoint rebuild_buffers")

    async def _described(self, name: Name) -> Table:
        connection = self.connection
        row = await connection.fetchrow(_TABLE, name.schema, name.table)
        if row is None:
            raise Misconfigured(
                f"{name} was dropped or renamed while the rebuild ran; nothing was changed, and it can be run again"
            )
        oid = row[0]
        columns = [
            Column(
                name=column,
                not_null=not_null,
                default=None if generated else default,
                identity=identity,
                generated=generated,
                type_name=type_name,
                category=category,
                built_in=built_in,
                sequences=tuple(DefaultSequence(*each.split("\n", 1)) for each in sequences),
            )
            for column, not_null, default, identity, generated, type_name, category, built_in, sequences in (
                await connection.fetch(_TABLE_COLUMNS, oid)
            )
        ]
        keys = tuple(tuple(each[0]) for each in await connection.fetch(_TABLE_KEYS, oid))
        constraints = tuple(Constraint(*each) for each in await connection.fetch(_CONSTRAINTS, oid))
        return Table(name, oid, tuple(columns), keys, constraints, tuple(row[2]), row[1], tuple(row[3]))

    async def _make_copies(self, cascades: Sequence[Any]) -> None:
        connection = self.connection
        copier = copy_sql.Copier(self.numbers_from)
        deferred: dict[str, bool] = {}
        for number, table in enumerate(self.tables):
            statements, counters = copier.copy(table)
            await self._run(statements)
            for column in table.columns:
                if column.identity:
                    counters[column.name] = await connection.fetchval(
                        "select pg_get_serial_sequence($1, $2)", table.name.copy, column.name
                    )
                    await connection.execute(
                        f"alter table {table.name.copy} alter column {ident(column.name)} restart with {self.numbers_from:d}"
                    )
            self._counters.append(counters)
            oid = await connection.fetchval("select $1::text::regclass::oid", table.name.copy)
            self.session.copies.append(oid)
            made = [Constraint(*each) for each in await connection.fetch(_CONSTRAINTS, oid)]
            await self._run(copy_sql.renamings(table, made))
            deferred |= {each.name: each.deferred for each in table.constraints if each.deferrable}
            self._fixed |= {number} if any(each.deferrable for each in table.constraints) else set()
            real = self.beginnings.get(table.name, frozenset())
            filling = copy_sql.first_rows(table, self.known[table.name], self._base is not None, real)
            if filling is not None:
                await self._fill(table, filling)
        by_oid = {each.oid: each for each in self.tables}
        for child, parent, name, definition, written, deferrable, is_deferred in cascades:
            target = f"REFERENCES {by_oid[parent].name.copy}("
            definition = definition.replace(f"REFERENCES {written}(", target).removesuffix(" NOT VALID")
            await connection.execute(
                f"alter table {by_oid[child].name.copy} add constraint {ident(name)} {definition} not valid"
            )
            deferred |= {name: is_deferred} if deferrable else {}
            self._fixed |= {self.tables.index(by_oid[each]) for each in (child, parent)}
        if deferred:
            again = [name for name, initially in deferred.items() if initially]
            names = ", ".join(f"pg_temp.{ident(each)}" for each in again)
            self.session.defer_again = f"set constraints {names} deferred" if again else ""
            await self.session.check_constraints()

    async def _fill(self, table: Table, filling: copy_sql.Filling) -> None:
        doubt = filling.doubt
        await self.connection.execute("savepoint rebuild_fill")
        try:
            # A trigger cannot be made on a table whose constraints are still to be checked.
            await self.connection.execute(f"{filling.sql}; set constraints all immediate")
        except Exception as error:
            if (sqlstate_of(error) or "")[:2] != "23":
                raise
            updated = ", ".join(sorted(self.known[table.name].updated))
            doubt = f"{table.name}: its rows cannot begin with the defaults of {updated}, which handlers update"
            await self.connection.execute(
                f"rollback to savepoint rebuild_fill; {filling.as_it_is}; set constraints all immediate"
            )
        await self.connection.execute(f"release savepoint rebuild_fill; analyze {table.name.copy}")
        if doubt is not None:
            self.doubts.append(doubt)

    def check_doubts(self) -> None:
        """Raise Misconfigured for tables of which nobody knows what they began with: no handler has inserted into them."""
        if self.doubts:
            raise Misconfigured(f"{self.doubts[0]}: give the first rows with --base FILE. Nothing was changed")

    async def _seek(self, sought: Compared) -> None:
        await self._run(trace_sql.SOUGHT)
        for place in sorted({each.place for each in sought.differences}):
            await self._run(trace_sql.tracing(place, sought.comparisons[place]))
        for each in sought.differences:
            self.session.trails[each.place, each.mark] = Trail(bool(each.deltas))
        await self.connection.executemany(
            "insert into pg_temp.consumer_sought values ($1, $2, $3) on conflict do nothing",
            [(each.place, each.mark, json.dumps(each.deltas)) for each in sought.differences],
        )

    async def _watch(self) -> None:
        """Note what shows the rows of a table that has a copy, and what this transaction has locked itself."""
        by_oid = {each.oid: each.name for each in self.tables}
        for oid, copy, schema, table, kind in await self.connection.fetch(_SHADOWS, list(by_oid)):
            self.guard.shadows[Name(schema, table)] = by_oid[copy]
            if kind in ("r", "p", "m"):
                self.session.real_tables.append((oid, by_oid[copy]))
        self.guard.held = {Name(row[0], row[1]) for row in await self.connection.fetch(LOCKS)}
        _, self.session.real_counts = await self.session.read_counts()
        self._compacted, self._rows = [0] * len(self.tables), [-1] * len(self.tables)

    async def _read_only(self) -> None:
        """From here on PostgreSQL refuses every write outside pg_temp, in functions too, and every nextval() there.

        The setting belongs to this savepoint: what is inside cannot take it back, and releasing it does.
        """
        await self.connection.execute("savepoint rebuild_copies; set transaction read only")

    async def _run_base(self, base: str) -> None:
        for statement in table_model.statements(base):
            try:
                await self.guard.execute(statement)
            except Exception as error:
                if sqlstate_of(error) is None or self.guard.verdict is not None:
                    raise self.guard.verdict or error from None
                raise Misconfigured(f"--base: {error} (in: {' '.join(statement.split())[:80]})") from None
        await self.session.check_constraints()
        await self._analyze()

    async def keep_fast(self, analyze: bool) -> None:
        """What a server does by itself between transactions: statistics for the planner, and no dead versions of rows."""
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
            await self._read_only()

    async def columns_used(self) -> list[set[str]]:
        """Of each table, the columns whose moving default gave a value."""
        return [
            {
                column
                for column, counter in counters.items()
                if await self.connection.fetchval(f"select is_called from {counter}")  # noqa: S608 - PostgreSQL's, or ours
            }
            for counters in self._counters
        ]

    def unknown(self) -> list[dict[str, Any]]:
        """What the copies lack, so that agreement proves nothing."""
        found: list[dict[str, Any]] = []
        for table in self.tables:
            if table.triggers:
                text = (
                    f"{table.name} has triggers that do not run in a rebuild ({', '.join(table.triggers)}): what they write "
                    "was not compared"
                )
                found.append({"kind": "triggers", "count": len(table.triggers), "text": text})
            if table.row_security:
                text = (
                    f"{table.name} hides rows from this role by row security: run the rebuild with a role that may see all "
                    "rows (BYPASSRLS)"
                )
                found.append({"kind": "row_security", "count": 1, "text": text})
            if table.rules:
                text = f"{table.name} has rules, which a rebuild does not follow: {', '.join(table.rules)}"
                found.append({"kind": "rules", "count": len(table.rules), "text": text})
        return found

    async def rows_gone(self, compared: Compared) -> list[dict[str, Any]]:
        """Why tables that no handler inserts into may lack rows."""
        if self._base is not None:
            return []
        return await self.guard.absent.reasons(self.tables, [each["rows"] for each in compared.tables])

    def notes(self) -> list[str]:
        """What a person should know about the copies."""
        notes = []
        for table in self.tables:
            use = self.known[table.name]
            if self._base is None and not use.inserted:
                began = f"with the default as {', '.join(sorted(use.updated))}" if use.updated else "as they are"
                notes.append(f"no handler inserts into {table.name}: it began with its real rows, {began}")
        if self.guard.reads:
            names = ", ".join(str(each) for each in sorted(self.guard.reads))
            notes.append(Excuse(f"only read, as they are now: {names}"))
        return notes

    async def check_writes(self) -> None:
        """Make sure once more that nothing real was written: PostgreSQL's own count of this transaction."""
        written = await self.connection.fetch(_WRITTEN)
        if written:
            raise AssertionError(f"the rebuild has written to {written[0][0]}")

    async def _analyze(self) -> None:
        await self._run([f"analyze {each.name.copy}" for each in self.tables])

    async def _run(self, statements: Sequence[str]) -> None:
        for statement in statements:
            await self.connection.execute(statement)
