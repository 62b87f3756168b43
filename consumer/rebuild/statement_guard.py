"""Looks at every SQL text of handlers before it runs beside the copies for the first time.

What it learns of the tables ends the pass, and the next one begins with the copies that were missing. Limitations: what a
function does inside is not seen; what was written is looked up after each batch.
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
from consumer.postgres.errors import sqlstate_of
from consumer.postgres.sql_tokens import first_words
from consumer.rebuild import copy_sql, statement_rules
from consumer.rebuild.absent_rows import AbsentRows, statements
from consumer.rebuild.statement_rules import Decision, TableAccess
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
calling: ContextVar[str] = ContextVar("consumer_rebuild_handler", default="")


class RestartPass(Exception):
    """Something was learned of the tables: begin again from the start."""


class SplitBatch(Exception):
    """The batch touched a row whose messages are sought: settle it in smaller parts, down to one message."""


class StatementGuard:
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
        self.verdict: Misconfigured | RestartPass | None = None
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
                self._stop(RestartPass(f"{self._who(sql)} {self._how(name)}"))
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

    def _stop(self, verdict: Misconfigured | RestartPass) -> NoReturn:
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
            self._stop(RestartPass(f"{self._who(sql)} writes to {names}, which has no copy yet"))

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
