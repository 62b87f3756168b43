"""Send the deferred writes of a connection as arrays or sums.

Only where that leaves what one execution for each message would leave.

deferred_writes/grammar.py reads a statement, deferred_writes/catalog.py judges it by the table behind it; this asks
PostgreSQL, once a connection and minute, and prepares the text for many rows. Limitations: a change of the schema by
another session (a trigger, a rule, a child table) may be passed over for up to a minute; one by a handler's own
statement is seen at once.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from consumer.core.identifiers import ident
from consumer.deferred_writes.catalog import FACTS, NotBatchedReason, Plan, barrier, judge, question
from consumer.deferred_writes.grammar import shape_of
from consumer.deferred_writes.rounds import ROWS_MIN, split_by_key_use, sum_by_key
from consumer.logs import event, log

_LOOKED_SECONDS = 60.0
_TEXTS_MAX = 500  # statements remembered on a connection
_ENCODED_BY_APPLICATION = ""  # a schema of no type that is known
PLAIN = "\n"  # ends a text whose arguments are encoded already: no codec of the application is for it
_TOGETHER_MAX = 64  # different statements of one flush that are looked at

# Constraints that are checked at COMMIT, of the schemas that this role may name.
_DEFERRED = """
select distinct n.nspname, c.conname from pg_constraint c join pg_namespace n on n.oid = c.connamespace
where c.condeferred and has_schema_privilege(n.oid, 'usage') and not pg_is_other_temp_schema(n.oid) order by 1, 2
"""

ungrouped: Counter[NotBatchedReason] = (
    Counter()
)  # executions of deferred writes that were not grouped or sent as arrays, by the reason
logged: set[tuple[str, NotBatchedReason]] = set()


class _JudgedStatement(NamedTuple):
    """A statement's plan or why it is a barrier, and its text."""

    plan: Plan | None
    why: NotBatchedReason | None
    text: str = ""


class BulkWriter:
    """What one connection knows about statements that it was given.

    looks: the connection to ask with, if not the one to send with. arrays: whether many executions may become one. coded:
    oids of types that the application encodes by itself: their values are sent one by one, and are no keys.
    altered: whether a statement on this connection may have changed the schema since the transaction began.
    """

    def __init__(
        self,
        connection: Any,
        *,
        looks: Any = None,
        arrays: bool = True,
        coded: frozenset[int] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._looks = connection if looks is None else looks
        self._arrays = arrays
        self._coded = coded
        self._known: dict[str, _JudgedStatement] = {}
        self._clock = clock
        self._looked = clock()
        self._deferred: Sequence[str] | None = None
        self.altered = False

    def forget(self) -> None:
        """Look at every table again: the schema may have changed."""
        self._known.clear()
        self._deferred = None

    async def plans(self, statements: Mapping[str, Sequence[object]]) -> dict[str, Plan | None]:
        """Return each statement's plan; None for a barrier.

        statements: with their executions.
        """
        if len(statements) > _TOGETHER_MAX:
            ungrouped[NotBatchedReason.MANY] += sum(map(len, statements.values()))
            return dict.fromkeys(statements)
        plans: dict[str, Plan | None] = {}
        for sql, executions in statements.items():
            known = await self._look(sql)
            plans[sql] = known.plan
            if known.plan is None:
                self._count(sql, known.why, len(executions), barrier=True)
        return plans

    async def deferred_constraints(self) -> Sequence[str]:
        """Return the constraints that are checked at COMMIT, as SQL names."""
        self._expire()
        if self._deferred is None:
            rows = await self._looks.fetch(_DEFERRED)
            self._deferred = [f"{ident(schema)}.{ident(name)}" for schema, name in rows]
        return self._deferred

    async def send(self, sql: str, arguments: Sequence[Sequence[Any]]) -> None:
        """Run a statement for all arguments, in as few executions as possible.

        Raises the database's errors.
        """
        if len(arguments) == 1:
            await self.connection_for(sql).execute(sql, *arguments[0])
            return
        if len(arguments) >= ROWS_MIN:
            known = await self._look(sql)
            plan = known.plan
            if plan is not None and plan.sums and (sums := sum_by_key(arguments, plan.shape, plan.types)) is not None:
                summed, arguments = sums
                if summed:
                    await self._run(known, summed)
                if not arguments:
                    return
            if plan is not None and plan.rows:
                parts = split_by_key_use(arguments, plan.shape, plan.types)
                # Many uses of few keys make many rounds of few rows, which are no cheaper than the rows.
                if parts is not None and len(parts) * 2 <= len(arguments):
                    for rows in parts:
                        await self._run(known, rows)
                    return
            if plan is not None:
                self._count(sql, plan.why, len(arguments), barrier=False)
        if not any(arguments):  # no parameters: it may be several commands, which cannot be prepared
            for _ in arguments:
                await self._connection.execute(sql)
            return
        await self.connection_for(sql).executemany(sql, arguments)

    def connection_for(self, sql: str) -> Any:
        """Return the connection that a statement is sent with."""
        return self._looks if self._coded and sql.endswith(PLAIN) else self._connection

    async def _run(self, known: _JudgedStatement, rows: Sequence[Sequence[Any]]) -> None:
        # No codec is for its types, or for none of its text: both connections encode them alike.
        await (self._looks if self._coded else self._connection).execute(known.text, *zip(*rows, strict=True))

    def _count(self, sql: str, why: NotBatchedReason | None, executions: int, *, barrier: bool) -> None:
        """Count what was not batched; log each statement once."""
        if why is None or not self._arrays:
            return
        ungrouped[why] += executions
        if log.isEnabledFor(logging.DEBUG) and len(logged) < _TEXTS_MAX:
            text = without_literals(sql)
            if (text, why) not in logged:
                logged.add((text, why))
                how = "in message order" if barrier else "grouped, not as arrays"
                event(logging.DEBUG, "deferred statement not batched", statement=text, sent=how, reason=why.value)

    def _expire(self) -> None:
        if self._clock() - self._looked > _LOOKED_SECONDS or len(self._known) >= _TEXTS_MAX:
            self.forget()
            self._looked = self._clock()

    async def _look(self, sql: str) -> _JudgedStatement:
        self._expire()
        known = self._known.get(sql)
        if known is None:
            known = self._known[sql] = await self._judged(sql)
        return known

    async def _judged(self, sql: str) -> _JudgedStatement:
        """Judge a statement by its table and the types of its parameters."""
        shape = shape_of(sql)
        if shape is None:
            return _JudgedStatement(None, NotBatchedReason.GRAMMAR)
        # It may fail where an earlier statement would have made it work, or where it is never sent: then it is a barrier.
        known = _JudgedStatement(None, NotBatchedReason.PREPARE)
        await self._looks.execute("savepoint consumer_columns")
        try:
            facts = await self._looks.fetchrow(FACTS, *question(shape))
            if (why := barrier(facts, shape)) is not None:
                known = _JudgedStatement(None, why)
            else:
                prepared = await self._looks.prepare(sql, name="")
                coded = () if sql.endswith(PLAIN) else self._coded
                plan = judge(
                    facts,
                    shape,
                    [
                        (_ENCODED_BY_APPLICATION if parameter.oid in coded else parameter.schema, parameter.name)
                        for parameter in prepared.get_parameters()
                    ],
                )
                known = _JudgedStatement(
                    replace(plan, rows=False, sums=False, why=plan.why or NotBatchedReason.ROWS), None
                )
                if plan.rows and self._arrays:
                    text = shape.text(plan.types)
                    await self._looks.prepare(text, name="")
                    known = _JudgedStatement(plan, None, text)
        except Exception:
            if self._looks.is_closed():
                raise
        # Also after a success: the locks of the look would stay, and a rebuild judges statements by their locks.
        await self._looks.execute("rollback to savepoint consumer_columns; release savepoint consumer_columns")
        return known


_LITERAL = re.compile(r"'(?:[^']|'')*'|\$(\w*)\$.*?\$\1\$|(?<![\w$])[0-9][0-9.]*", re.DOTALL)


def without_literals(sql: str) -> str:
    """Return a statement in one line, without its literal values."""
    return " ".join(_LITERAL.sub("…", sql).split())[:200]
