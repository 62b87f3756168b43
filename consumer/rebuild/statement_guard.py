"""Inspects every SQL text of handlers before its first run.

What the guard learns about the tables ends the pass, and the next one starts with the copies that were missing.
Limitation: what a function does is not seen; ShadowSession checks after each batch what was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn
from uuid import uuid4

from consumer.core.errors import Misconfigured
from consumer.core.identifiers import ident
from consumer.deferred_writes.writer import PLAIN
from consumer.postgres.application_codecs import application_connection
from consumer.postgres.errors import sqlstate_of
from consumer.postgres.sql_tokens import first_words
from consumer.rebuild import copy_sql, statement_rules
from consumer.rebuild.absent_rows import AbsentRows, sent_statements
from consumer.rebuild.statement_rules import StatementDecision, TableAccess
from consumer.rebuild.table_model import Name, Table, TableUsage

TEXTS_MAX = 4096
_READ_ONLY = "25006"
_PLANNED = frozenset({"select", "insert", "update", "delete", "merge", "with", "values", "table"})
_WRITING = _PLANNED - {"select", "values", "table"}
_SAVEPOINT = re.compile(r"(savepoint|release savepoint|rollback to savepoint) consumer_[0-9]+")
LOCKS = """
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
current_handler: ContextVar[str] = ContextVar("consumer_rebuild_handler", default="")


class RestartPass(Exception):
    """Something was learned about the tables: start over."""


class SplitBatch(Exception):
    """Several messages of a batch touched a traced row: settle smaller parts."""


class GuardedStatement:
    """A prepared statement of a guard."""

    def __init__(self, guard: StatementGuard, sql: str, prepared: Any) -> None:
        self._guard = guard
        self._sql = sql
        self._prepared = prepared
        self.get_attributes = prepared.get_attributes
        self.get_statusmsg = prepared.get_statusmsg

    async def fetch(self, *args: Any, timeout: float | None = None) -> Any:
        return await self._guard.run_prepared(self._sql, self._prepared.fetch, *args, timeout=timeout)

    async def executemany(self, args: Any, *, timeout: float | None = None) -> Any:
        return await self._guard.run_prepared(self._sql, self._prepared.executemany, args, timeout=timeout)


class StatementGuard:
    """Takes the place of the connection, and inspects each new SQL text.

    usage: how handlers use the tables; added to. stopped_by: what ends the pass, a refusal or something learned; kept here
    because a handler may swallow the exception. own: the connection for statements of ours. shadows: real relations that show rows of a table with a copy. locked_here:
    relations that the rebuild itself has locked, so that a lock proves nothing. reads: real relations without a copy.
    writers: handlers that sent a statement that writes. upserted: names of copies that are inserted into on conflict.
    changed: names of copies that are updated or deleted from. unplanned: a statement ran whose plan is not known, so these
    sets may be incomplete.
    """

    def __init__(self, own: Any, usage: dict[Name, TableUsage], owners: Mapping[str, str]) -> None:
        self.own = own
        self.connection = connection = application_connection(own)
        self.usage = usage
        self.tables: list[Table] = []
        self.shadows: dict[Name, Name] = {}
        self.locked_here: set[Name] = set()
        self.reads: set[Name] = set()
        self.stopped_by: Misconfigured | RestartPass | None = None
        self.writers: set[str] = set()
        self.absent = AbsentRows(connection, own, usage)
        self.upserted: set[str] = set()
        self.changed: set[str] = set()
        self.unplanned = False
        self._sql_owners = owners
        self._seen: set[str] = set()
        self._writing: set[str | None] = {None}  # texts that write; None stands for COPY

    async def execute(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        if sql not in self._seen:
            await self._inspect(sql)
        return await self._run(sql, self._for(sql).execute, sql, *args, timeout=timeout)

    async def executemany(self, sql: str, args: Any, *, timeout: float | None = None) -> Any:
        if sql not in self._seen:
            await self._inspect(sql)
        if sent_statements.get() is not None:  # a call of a handler runs; args may be an iterator
            for arguments in (args := list(args)):
                self._note(sql, arguments)
        return await self._run(sql, self._for(sql).executemany, sql, args, timeout=timeout)

    async def fetch(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        if sql not in self._seen:
            await self._inspect(sql)
        return await self._run(sql, self.connection.fetch, sql, *args, timeout=timeout)

    async def fetchrow(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        if sql not in self._seen:
            await self._inspect(sql)
        return await self._run(sql, self.connection.fetchrow, sql, *args, timeout=timeout)

    async def fetchval(self, sql: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        if sql not in self._seen:
            await self._inspect(sql)
        return await self._run(sql, self.connection.fetchval, sql, *args, column=column, timeout=timeout)

    async def copy_records_to_table(self, table_name: str, *, schema_name: str | None = None, **options: Any) -> Any:
        if schema_name is not None:
            self._refuse(
                None, f"names {table_name} with its schema, and so means the real table; leave schema_name out"
            )
        # PostgreSQL plans no COPY. An INSERT into the same table is inspected instead.
        text = f"insert into {ident(table_name)} select"
        if text not in self._seen:
            await self._inspect(f"insert into {ident(table_name)} default values", text)
        return await self._run(None, self.connection.copy_records_to_table, table_name, **options)

    async def prepare(self, sql: str) -> GuardedStatement:
        """Prepare a statement without the application's codecs."""
        if sql not in self._seen:
            await self._inspect(sql)
        return GuardedStatement(self, sql, await self._run(None, self.own.prepare, sql))

    def is_in_transaction(self) -> bool:
        return bool(self.connection.is_in_transaction())

    def is_closed(self) -> bool:
        return bool(self.connection.is_closed())

    def terminate(self) -> None:
        self.connection.terminate()

    async def run_prepared(self, sql: str, method: Any, *args: Any, **options: Any) -> Any:
        """Run a prepared statement, inspected again if it was forgotten."""
        if sql not in self._seen:
            await self._inspect(sql)
        return await self._run(sql, lambda _, *given, **also: method(*given, **also), sql, *args, **options)

    def _for(self, sql: str) -> Any:
        return self.own if sql.endswith(PLAIN) else self.connection

    def _note(self, sql: str, arguments: Sequence[Any]) -> None:
        if sql in self._writing and (noted := sent_statements.get()) is not None:
            noted.append((sql, arguments))

    async def _run(self, sql: str | None, method: Any, *args: Any, **options: Any) -> Any:
        if sql in self._writing and (handler := current_handler.get()):
            self.writers.add(handler)
            if sql is not None:
                self._note(sql, args[1:])
        try:
            return await method(*args, **options)
        except Exception as error:
            state = sqlstate_of(error)
            if state == copy_sql.LEARNED:
                name = copy_sql.learned(str(getattr(error, "detail", "")), self.tables, self.usage)
                self._stop(RestartPass(f"{self._sender(sql)} {self._usage_text(name)}"))
            if state == _READ_ONLY:
                self._refuse(
                    sql,
                    f"writes outside the copies, perhaps in a function ({error}); leave its handler out with --handler",
                )
            raise

    def _usage_text(self, name: Name) -> str:
        use = self.usage[name]
        if use.deleted and not use.inserted:
            return f"deletes from {name}"
        return f"inserts into {name}" if use.inserted else f"updates {name} ({', '.join(sorted(use.updated))})"

    def _sender(self, sql: str | None) -> str:
        owner = self._sql_owners.get(sql or "") or current_handler.get()
        return f"handler {owner!r}" if owner else "--base"

    def _stop(self, reason: Misconfigured | RestartPass) -> NoReturn:
        self.stopped_by = self.stopped_by or reason
        raise self.stopped_by

    def _refuse(self, sql: str | None, what: str) -> NoReturn:
        self.refuse(f"{self._sender(sql)}: it {what}")

    def refuse(self, what: str) -> NoReturn:
        """End the rebuild. Raises Misconfigured."""
        self._stop(Misconfigured(f"{what} (nothing was changed)"))

    async def _inspect(self, sql: str, seen_as: str | None = None) -> None:
        """Inspect a text. Returns if it may run.

        A text that cannot be parsed may run: PostgreSQL refuses it. seen_as: the text to remember as inspected, if another.
        """
        if self.stopped_by is not None:
            raise self.stopped_by
        words = first_words(sql)
        if not words or _SAVEPOINT.fullmatch(sql):  # of the framework: Tx refuses those of a handler
            return
        if len(words) > 1:
            self._refuse(sql, "sends several statements in one text, which cannot be inspected; send them one by one")
        if words[0][0] not in _PLANNED and words[0] != ("set", "constraints") and words[0][0] != "show":
            self._refuse(
                sql,
                f"runs {words[0][0].upper()}, whose effects a rebuild cannot foresee; leave its handler out with --handler",
            )
        if re.search(r"\bpg_(try_)?advisory", sql, re.IGNORECASE):
            self._refuse(
                sql,
                "takes advisory locks, which would block workers until the rebuild ends; leave its handler out with --handler",
            )
        if words[0][0] in _PLANNED:
            accesses = await self._accesses(sql)
            if accesses is None:
                return
            self._follow(sql, statement_rules.decide_statement(accesses, self.shadows))
            self.reads |= {access.name for access in accesses}
        if words[0][0] in _WRITING:
            self._writing.add(sql)
        if len(self._seen) >= TEXTS_MAX:  # SQL with literals of each message: forget rather than grow
            self._seen.clear()
        self._seen.add(seen_as or sql)

    def _follow(self, sql: str, decision: StatementDecision) -> None:
        if decision.refusal is not None:
            self._refuse(sql, decision.refusal)
        if decision.copies:
            for name, inserted in decision.copies.items():
                self.usage.setdefault(name, TableUsage()).inserted |= inserted
            names = ", ".join(str(name) for name in sorted(decision.copies))
            self._stop(RestartPass(f"{self._sender(sql)} writes to {names}, which has no copy yet"))

    async def _accesses(self, sql: str) -> list[TableAccess] | None:
        """Return the real relations that a statement touches.

        None for a statement that PostgreSQL cannot parse. The modes of its locks tell reading from writing. The plan tells what
        is read of relations that are locked already, and what is inserted into.
        """
        planned = await self._plan(sql)
        if planned is None:
            return None
        locks, plan = planned
        self.unplanned |= plan is None
        operations = statement_rules.operations(plan)
        self._note_operations(sql, operations)
        accesses = [
            TableAccess(Name(schema, table), kind, part, written, "Insert" in operations.get(Name(schema, table), ()))
            for schema, table, kind, part, written in locks
            if written or Name(schema, table) in operations or Name(schema, table) not in self.locked_here
        ]
        locked = {access.name for access in accesses}
        only_planned = [
            relation
            for relation in operations
            if relation not in locked and relation.schema not in ("pg_temp", "pg_catalog", "information_schema")
        ]
        return accesses + [TableAccess(relation, "r", False, False, False) for relation in only_planned]

    async def _plan(self, sql: str) -> tuple[list[Any], Any] | None:
        """Return the locks and the plan of a statement.

        None if PostgreSQL cannot parse it; no plan if it cannot plan it. PREPARE locks what the statement names. The plan must be
        the generic one: with values, `where id = null` would be planned as nothing at all.
        """
        name = f"consumer_{uuid4().hex}"
        connection = self.own
        await connection.execute("savepoint rebuild_look")
        prepared, locks, plan = False, [], None
        try:
            await connection.fetch(f"prepare {name} as {sql}")
            prepared = True
            locks = await connection.fetch(LOCKS)
            count = await connection.fetchval(
                "select cardinality(parameter_types) from pg_prepared_statements where name = $1", name
            )
            await connection.execute("set local plan_cache_mode = force_generic_plan")
            nulls = f"({', '.join(['null'] * count)})" if count else ""
            plan = json.loads(await connection.fetchval(f"explain (verbose, format json) execute {name}{nulls}"))
        except Exception as error:
            if sqlstate_of(error) is None:
                raise
            # Not parsed: it fails when it runs. Not planned (null for a domain that is not null): only the locks are known.
        finally:
            if not connection.is_closed():
                await connection.execute("rollback to savepoint rebuild_look; release savepoint rebuild_look")
                if prepared:
                    await connection.execute(f"deallocate {name}")
        return (locks, plan) if prepared else None

    def _note_operations(self, sql: str, operations: Mapping[Name, set[str]]) -> None:
        """Note what a statement does to copies."""
        for relation, acts in operations.items():
            if relation.schema == "pg_temp":
                self.upserted |= {relation.table} if statement_rules.UPSERT in acts else set()
                self.changed |= set() if acts.isdisjoint(("Update", "Merge", "Delete")) else {relation.table}
                if not acts.isdisjoint(("Update", "Merge")):
                    self.absent.updating.setdefault(relation.table, set()).add(sql)
