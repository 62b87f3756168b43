"""The copies of a rebuild: tables in pg_temp, what handlers run their statements on, and what keeps them there.

Everything lives in one transaction that its caller undoes. Once the copies are made it is read only: PostgreSQL itself
then refuses every write outside pg_temp, in functions too, and every nextval() of a real sequence. `Guard` stands where
the connection would and looks at each SQL text before it runs for the first time; what it learns of the tables ends the
transaction, and the next one begins with the copies that were missing.

Knows SQL through a connection that is handed in; knows no Kafka. What it does not know: what handlers do outside
PostgreSQL, and what a function does inside; whether that has touched a real table is looked up after each batch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn
from uuid import UUID, uuid4

from consumer.core.dead_letters import KeyHold
from consumer.core.delivery import Batch, Delivery, PositionUpdate
from consumer.core.errors import CannotTell, Misconfigured
from consumer.core.identifiers import ident
from consumer.core.outcome import Dead
from consumer.deferred_writes.writer import BulkWriter
from consumer.postgres.claims import ExistingClaim
from consumer.postgres.connection import milliseconds
from consumer.postgres.errors import sqlstate_of
from consumer.postgres.server import NOWHERE
from consumer.postgres.session import Session
from consumer.postgres.sql_tokens import first_words
from consumer.rebuild import copy_sql, statement_rules, table_model, trace_sql
from consumer.rebuild.absent_rows import AbsentRows, statements
from consumer.rebuild.applied import offers
from consumer.rebuild.compare import Compared, Excuse
from consumer.rebuild.statement_rules import Decision, TableAccess
from consumer.rebuild.table_model import Column, Constraint, DefaultSequence, Name, Table, TableUsage
from consumer.settings import Settings

TEXTS_MAX = 4096
_IDS_MAX = 3  # messages told of one difference
_COMPACT_AT = 2000  # updates of a copy, and twice its rows
_BUFFER = "64MB"  # of the server's memory for the copies; the rest of them is on its disk
_READ_ONLY = "25006"
_NO_SNAPSHOT = frozenset({"22023", "42704", "55000"})  # what importing one answers whose connection has ended
_PLANNED = frozenset({"select", "insert", "update", "delete", "merge", "with", "values", "table"})
_WRITING = _PLANNED - {"select", "values", "table"}
_SAVEPOINT = re.compile(r"(savepoint|release savepoint|rollback to savepoint) consumer_[0-9]+")

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
_LOCKS = """
select n.nspname::text, c.relname::text, c.relkind::text,
       c.relispartition or exists (select from pg_inherits i where i.inhrelid = c.oid
                                   or (i.inhparent = c.oid and c.relkind = 'r')),
       bool_or(l.mode in ('RowShareLock', 'RowExclusiveLock'))
from pg_locks l join pg_class c on c.oid = l.relation join pg_namespace n on n.oid = c.relnamespace
where l.locktype = 'relation' and l.pid = pg_backend_pid() and c.relpersistence <> 't'
  and l.database = (select oid from pg_database where datname = current_database())
  and c.relkind in ('r', 'p', 'v', 'm', 'f') and n.nspname not in ('pg_catalog', 'pg_toast', 'information_schema')
group by 1, 2, 3, 4
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
_WRITTEN = """
select n.nspname || '.' || c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'm') and c.relpersistence <> 't' and n.nspname not in ('pg_catalog', 'pg_toast', 'information_schema')
  and pg_stat_get_xact_tuples_inserted(c.oid) + pg_stat_get_xact_tuples_updated(c.oid)
      + pg_stat_get_xact_tuples_deleted(c.oid) > 0
"""
_TOUCHED = """
with taken as (delete from pg_temp.consumer_touched returning place, mark, explains)
select place, mark, bool_or(explains) from taken group by place, mark
"""

calling: ContextVar[str] = ContextVar("consumer_rebuild_handler", default="")


class Again(Exception):
    """Something was learned of the tables: begin again from the start."""


class Halve(Exception):
    """The batch touched a row whose messages are sought: settle it in smaller parts, down to one message."""


class Guard:
    """Stands where the connection would: looks at every new SQL text before it runs for the first time.

    `verdict` is what ends the pass, a refusal or something learned. It is kept here, because a handler may swallow the
    exception that tells it.
    """

    def __init__(self, connection: Any, known: dict[Name, TableUsage], owners: Mapping[str, str]) -> None:
        self.connection = connection
        self.known = known
        self.tables: list[Table] = []
        self.shadows: dict[Name, Name] = {}  # real relations that show the rows of a table that has a copy
        self.held: set[Name] = set()  # locked by ourselves, so a lock says nothing of them
        self.reads: set[Name] = set()  # real relations that have no copy
        self.verdict: Misconfigured | Again | None = None
        self.writers: set[str] = set()  # handlers that have sent a statement that writes
        self.absent = AbsentRows(connection, known)
        self.upserted: set[str] = set()  # names of copies that are inserted into on conflict
        self.changed: set[str] = set()  # names of copies that other statements than INSERT change
        self.unplanned = False  # a statement ran that could not be planned, so it may be missing there
        self._owners = owners
        self._seen: set[str] = set()
        self._writing: set[str | None] = {None}  # texts that write; None is a COPY

    async def execute(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        if sql not in self._seen:
            await self._look(sql)
        return await self._watched(sql, self.connection.execute, sql, *args, timeout=timeout)

    async def executemany(self, sql: str, args: Any, *, timeout: float | None = None) -> Any:
        if sql not in self._seen:
            await self._look(sql)
        if statements.get() is not None:  # of a handler's call, and perhaps an iterator
            for each in (args := list(args)):
                self._note(sql, each)
        return await self._watched(sql, self.connection.executemany, sql, args, timeout=timeout)

    async def fetch(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        if sql not in self._seen:
            await self._look(sql)
        return await self._watched(sql, self.connection.fetch, sql, *args, timeout=timeout)

    async def fetchrow(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        if sql not in self._seen:
            await self._look(sql)
        return await self._watched(sql, self.connection.fetchrow, sql, *args, timeout=timeout)

    async def fetchval(self, sql: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        if sql not in self._seen:
            await self._look(sql)
        return await self._watched(sql, self.connection.fetchval, sql, *args, column=column, timeout=timeout)

    async def copy_records_to_table(self, table_name: str, *, schema_name: str | None = None, **options: Any) -> Any:
        if schema_name is not None:
            self._refuse(
                None, f"names {table_name} with its schema, and so means the real table: leave schema_name out"
            )
        # COPY cannot be looked at. An INSERT goes to the same table; what else is wrong with it, COPY says itself.
        text = f"insert into {ident(table_name)} select"
        if text not in self._seen:
            await self._look(f"insert into {ident(table_name)} default values", text)
        return await self._watched(None, self.connection.copy_records_to_table, table_name, **options)

    def is_in_transaction(self) -> bool:
        return bool(self.connection.is_in_transaction())

    def is_closed(self) -> bool:
        return bool(self.connection.is_closed())

    def terminate(self) -> None:
        self.connection.terminate()

    def _note(self, sql: str, arguments: Sequence[Any]) -> None:
        if sql in self._writing and (noted := statements.get()) is not None:
            noted.append((sql, arguments))

    async def _watched(self, sql: str | None, method: Any, *args: Any, **options: Any) -> Any:
        if sql in self._writing and (handler := calling.get()):
            self.writers.add(handler)
            if sql is not None:
                self._note(sql, args[1:])
        try:
            return await method(*args, **options)
        except Exception as error:
            state = sqlstate_of(error)
            if state == copy_sql.LEARNED:
                name = copy_sql.learned(str(getattr(error, "detail", "")), self.tables, self.known)
                self._stop(Again(f"{self._who(sql)} {self._how(name)}"))
            if state == _READ_ONLY:
                self._refuse(
                    sql, f"writes outside the copies, in a function perhaps, and PostgreSQL refused it ({error})"
                )
            raise

    def _how(self, name: Name) -> str:
        use = self.known[name]
        if use.deleted and not use.inserted:
            return f"deletes from {name}"
        return f"inserts into {name}" if use.inserted else f"updates {name} ({', '.join(sorted(use.updated))})"

    def _who(self, sql: str | None) -> str:
        owner = self._owners.get(sql or "") or calling.get()
        return f"handler {owner!r}" if owner else "--base"

    def _stop(self, verdict: Misconfigured | Again) -> NoReturn:
        self.verdict = self.verdict or verdict
        raise self.verdict

    def _refuse(self, sql: str | None, what: str) -> NoReturn:
        self.refuse(f"{self._who(sql)} {what}")

    def refuse(self, what: str) -> NoReturn:
        """End the pass, and the rebuild with it."""
        self._stop(Misconfigured(f"{what}. Nothing was changed"))

    async def _look(self, sql: str, seen_as: str | None = None) -> None:
        """Find out what a text touches. Returns when it may run; what cannot be parsed may, and says so itself."""
        if self.verdict is not None:
            raise self.verdict
        words = first_words(sql)
        if not words or _SAVEPOINT.fullmatch(sql):  # the framework's own: a handler's were refused by its Tx
            return
        if len(words) > 1:
            self._refuse(sql, "sends several statements in one text, which cannot be looked at: send them one by one")
        if words[0][0] not in _PLANNED and words[0] != ("set", "constraints") and words[0][0] != "show":
            self._refuse(sql, f"runs {words[0][0].upper()}, and nobody can tell beforehand what that touches")
        if re.search(r"\bpg_(try_)?advisory", sql, re.IGNORECASE):
            self._refuse(sql, "takes advisory locks: a rebuild would keep them to its end, and hold up the workers")
        if words[0][0] in _PLANNED:
            touches = await self._touches(sql)
            if touches is None:
                return
            self._act(sql, statement_rules.judge(touches, self.shadows))
            self.reads |= {each.name for each in touches}
        if words[0][0] in _WRITING:
            self._writing.add(sql)
        if len(self._seen) >= TEXTS_MAX:  # SQL built anew for each message: forget rather than grow
            self._seen.clear()
        self._seen.add(seen_as or sql)

    def _act(self, sql: str, judgement: Decision) -> None:
        if judgement.refusal is not None:
            self._refuse(sql, judgement.refusal)
        if judgement.copies:
            for name, inserted in judgement.copies.items():
                self.known.setdefault(name, TableUsage()).inserted |= inserted
            names = ", ".join(str(each) for each in sorted(judgement.copies))
            self._stop(Again(f"{self._who(sql)} writes to {names}, which has no copy yet"))

    async def _touches(self, sql: str) -> list[TableAccess] | None:
        """The real relations that a statement touches, None for one that PostgreSQL cannot parse.

        PREPARE takes one statement and locks what it names, and the lock's mode says what for. The plan tells what is
        read of tables that are locked by us already, and what is inserted into. It must be the generic one: with
        values, `where id = null` would be planned as nothing at all.
        """
        name = f"consumer_{uuid4().hex}"
        connection = self.connection
        await connection.execute("savepoint rebuild_look")
        prepared, locks, plan = False, [], None
        try:
            await connection.fetch(f"prepare {name} as {sql}")
            prepared = True
            locks = await connection.fetch(_LOCKS)
            count = await connection.fetchval(
                "select cardinality(parameter_types) from pg_prepared_statements where name = $1", name
            )
            await connection.execute("set local plan_cache_mode = force_generic_plan")
            nulls = f"({', '.join(['null'] * count)})" if count else ""
            plan = json.loads(await connection.fetchval(f"explain (verbose, format json) execute {name}{nulls}"))
        except Exception as error:
            if sqlstate_of(error) is None:
                raise
            # Not even parsed: it will say so itself. Not planned (null for a domain that takes none): the locks must do.
        finally:
            if not connection.is_closed():
                await connection.execute("rollback to savepoint rebuild_look; release savepoint rebuild_look")
                if prepared:
                    await connection.execute(f"deallocate {name}")
        if not prepared:
            return None
        self.unplanned |= plan is None
        done = statement_rules.operations(plan)
        for each, acts in done.items():
            if each.schema == "pg_temp":
                self.upserted |= {each.table} if statement_rules.UPSERT in acts else set()
                self.changed |= set() if acts.isdisjoint(("Update", "Merge", "Delete")) else {each.table}
                if not acts.isdisjoint(("Update", "Merge")):
                    self.absent.updating.setdefault(each.table, set()).add(sql)
        touches = [
            TableAccess(Name(schema, table), kind, part, written, "Insert" in done.get(Name(schema, table), ()))
            for schema, table, kind, part, written in locks
            if written or Name(schema, table) in done or Name(schema, table) not in self.held
        ]
        told = {each.name for each in touches}
        hidden = [
            each
            for each in done
            if each not in told and each.schema not in ("pg_temp", "pg_catalog", "information_schema")
        ]
        return touches + [TableAccess(each, "r", False, False, False) for each in hidden]


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


class CopiesSession(Session):
    """A Session whose transaction is a savepoint, and whose ledger is a table of its own."""

    def __init__(self, guard: Guard, settings: Settings) -> None:
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
                raise Halve

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


# -- the transaction ----------------------------------------------------------------------------------------------------


class Copies:
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
        self.guard = Guard(connection, known, owners)
        self.session = CopiesSession(self.guard, settings)
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
            self.session.deferred = f"set constraints {names} deferred" if again else ""
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
                self.session.watched.append((oid, by_oid[copy]))
        self.guard.held = {Name(row[0], row[1]) for row in await self.connection.fetch(_LOCKS)}
        _, self.session.baseline = await self.session.watch()
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
        for number, updates in enumerate(self.session.updates):
            rows = self._rows[number] if self._rows[number] >= 0 else self.session.rows[number]
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
