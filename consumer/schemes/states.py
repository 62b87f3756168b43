"""Moves a row's state forward only, by one conditional UPDATE.

Knows a table, its state column and the moves that are allowed; has one error for each way in which a move fails.
Limitations: does not know why an event comes early or late, nor what else belongs to a move; that is the handler's, and
depends on the answer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any, Literal, assert_never

from consumer.core.errors import Reject, RunAgain
from consumer.core.identifiers import ident, table_ident
from consumer.schemes.database import SUPPRESSED, Database, Misfit, NotFound, checked
from consumer.schemes.moves import Moves, MoveStanding

_LOOKS = 3  # attempts to read a row that moves meanwhile
_SHOWN_MAX = 40  # characters of a foreign state
_FOREIGN_MAX = 10
_LITERAL = re.compile(r"'((?:[^']|'')*)'")
_NO_STATE = "no state: asked by consumer"

_COLUMN = """
select a.attrelid::int8 as table, a.attnum as number, t.oid::int8 as type, t.typtype = 'e' as enum,
       format_type(case when t.typtype = 'd' then t.typbasetype else t.oid end, -1) as plain,
       array(select enumlabel::text from pg_enum where enumtypid = t.oid order by enumsortorder) as labels
from pg_attribute a join pg_type t on t.oid = a.atttypid
where a.attrelid = to_regclass($1) and a.attname = $2 and not a.attisdropped
"""
# Those of this column alone, and of its domain. What PostgreSQL 18 knows as NOT ENFORCED does not count.
_CONSTRAINTS = """
select conname::text as name, pg_get_expr(conbin, conrelid) as expression, contypid <> 0 as of_domain
from pg_constraint c
where contype = 'c' and ((conrelid = $1::int8::oid and conkey = array[$2::int2]) or contypid = $3::int8::oid)
  and coalesce((to_jsonb(c) ->> 'conenforced')::bool, true)
order by conname
"""


class Moved(Enum):
    """What `StateMachine.move` did.

    True if the row has moved now: write ``if await machine.move(…):`` before what depends on it.
    """

    NOW = "now"
    REPEATED = "repeated"  # it was in that state already: nothing to do

    def __bool__(self) -> bool:
        return self is Moved.NOW


class NotMoved(Reject):
    """The row cannot take this event, now or later.

    In a handler, a dead letter at once. Nothing was changed. `current` is the state that the row is in, `to` the one
    that was asked for.
    """

    def __init__(self, text: str, current: str | None, to: str) -> None:
        super().__init__(text)
        self.current = current
        self.to = to


class IllegalMove(NotMoved):
    """No sequence of moves leads from the row's state to that one."""


class TooLate(NotMoved):
    """The row is past that state, and is never moved backwards.

    Catch this if a late event does not matter.
    """


class TooEarly(NotMoved):
    """The row may reach a state that allows the move later.

    Raised with ``early="reject"``, instead of waiting.
    """


class Held(RunAgain):
    """The row may allow the move later, so the message waits.

    Raised with ``early="hold"``; the wait is not counted as an attempt. `current` is the state that the row is in, `to`
    the one that was asked for.
    """

    def __init__(self, text: str, current: str, to: str) -> None:
        super().__init__(text)
        self.current = current
        self.to = to


class StateMachine:
    """The states of a table's rows; create it once, as a constant.

    table: ``table`` or ``schema.table``. column: the state's, of any text type or an enum. moves: state -> the states
    that may follow; a terminal state has none. key: the column that names a row. start: the states in which rows are
    created, by default the first one of `moves`. Raises ValueError or TypeError for inconsistent moves (see `Moves`).

    ::

        orders = StateMachine("orders", "status", {"new": {"paid", "void"}, "paid": {"shipped"}, "shipped": (), "void": ()})
    """

    def __init__(
        self,
        table: str,
        column: str,
        moves: Mapping[str, Collection[str]],
        *,
        key: str = "id",
        start: Collection[str] | None = None,
    ) -> None:
        self.moves = Moves(moves, start)
        self.name = f"{table}.{column}"
        self._column = column
        self._table_sql = table_ident(table)
        state, named = ident(column), ident(key)
        self._move_sql = (
            f"update {self._table_sql} set {state} = $2 "  # noqa: S608 - by ident
            f"where {named} = $1 and {state}::text = any($3::text[]) returning {state}::text"
        )
        self._look_sql = f"select {state}::text from {self._table_sql} where {named} = $1"  # noqa: S608 - by ident
        self._lock_sql = f"{self._look_sql} for update"
        self._foreign_sql = (
            f"select {state}::text, count(*) from {self._table_sql} "  # noqa: S608 - by ident
            f"where ({state}::text = any($1::text[])) is not true group by 1 order by 2 desc, 1 limit {_FOREIGN_MAX}"
        )

    async def move(
        self,
        tx: Database,
        id: Any,
        to: str,
        *,
        expected_from: str | Collection[str] | None = None,
        early: Literal["hold", "reject"] = "hold",
    ) -> Moved:
        """Move one row to the state `to`, if its state allows it.

        Sends one UPDATE, and one SELECT if that changes no row.

        tx: a `Tx` or an asyncpg connection. expected_from: fewer states than the moves allow. early: what happens to an
        event whose time may still come: "hold" raises Held (its message is tried again, uncounted), "reject" TooEarly.

        Returns Moved.NOW, or Moved.REPEATED if the row is in that state already. Raises Held or TooEarly, TooLate,
        IllegalMove (also for a row in a state that the moves do not name), NotFound, ValueError for an unknown state or
        a move that the machine does not have, Misfit for a missing table or column.

        Limitations:

        - Do not ignore the answer: what else belongs to the move (an amount, another row) is done only if it is true, in the
          same transaction, or a repetition does it again.
        - A repetition and a second round through a cycle are not distinguished, nor in a cycle late from early (it is late
          then). For cycles, use a version (`update_versioned`) or rely on the ledger's message ids.
        - Amounts do not add up: a state says that something happened, not how often.
        - A held message holds up later ones of its unit of order. If the event it waits for is one of them it waits for ever:
          take both through handlers of their own, or use ``order="none"``.
        - A hold has no end. Give it one by the message's age: ``early="hold" if young(message) else "reject"``.
        """
        if early not in ("hold", "reject"):
            raise ValueError(f"early={early!r}: 'hold' or 'reject'")
        sources = self.moves.sources(to, expected_from)
        call = f"{self.name} to {to!r}"
        for _ in range(_LOOKS):
            if await self._moves(tx, id, to, sources, call):
                return Moved.NOW
            seen = await checked(tx.fetch(self._look_sql, id), call)
            if not seen:
                raise NotFound(f"{call}: there is no such row")
            if len(seen) > 1:
                raise Misfit(f"{call}: the key names {len(seen)} rows")
            current: str | None = seen[0][0]
            if current is None:
                raise IllegalMove(f"{call}: the row's state is NULL", None, to)
            standing = self.moves.standing(current, to, sources)
            if standing is MoveStanding.THERE:
                return Moved.REPEATED
            if (
                standing is not MoveStanding.READY
            ):  # else race: another writer moved it there between the two statements
                raise _refusal(standing, current, to, call, early)
        return await self._move_locked(tx, id, to, sources, call, current or "")

    async def _move_locked(
        self, tx: Database, id: Any, to: str, sources: Collection[str], call: str, current: str
    ) -> Moved:
        """Move a row under its lock. Raises Held or Misfit."""
        # Either other writers keep moving the row, or the update does nothing. A lock distinguishes them.
        if not await checked(tx.fetch(self._lock_sql, id), call):
            raise Misfit(f"{call}: the row can be seen and not locked: {SUPPRESSED}")
        if await self._moves(tx, id, to, sources, call):
            return Moved.NOW
        seen = await checked(tx.fetch(self._look_sql, id), call)
        if seen and seen[0][0] in sources:
            raise Misfit(f"{call}: the row is in {seen[0][0]!r}, and the update changes nothing: {SUPPRESSED}")
        raise Held(f"{call}: the row moves as fast as it is looked at", current, to)

    async def _moves(self, tx: Database, id: Any, to: str, sources: Collection[str], call: str) -> bool:
        """Run the UPDATE; return whether it moved the row to `to`."""
        moved = await checked(tx.fetch(self._move_sql, id, to, sorted(sources)), call)
        if len(moved) > 1:
            raise Misfit(f"{call}: the key names {len(moved)} rows, which have all moved now: roll back")
        if moved and moved[0][0] != to:
            raise Misfit(f"{call}: the row is not in that state after the update, so a trigger undoes it: roll back")
        return bool(moved)

    async def check(self, connection: Database) -> list[str]:
        """Compare the moves with the table, and return the differences.

        Compares its enum type or CHECK constraints, and the states of its rows. connection: an asyncpg connection or a
        Tx. Each difference is one line of text; an empty list means that all fits. Reads the whole table once: for a
        deployment's check or a test, not for every start. Raises Misfit if the table or the column does not exist.

        Limitations: ignores constraints over several columns, triggers, domains over domains, and lengths.
        """
        columns = await checked(connection.fetch(_COLUMN, self._table_sql, self._column), self.name)
        if not columns:
            raise Misfit(f"{self.name}: there is no such table or column")
        column = columns[0]
        states = list(self.moves.moves)
        differences: list[str] = []
        constraints = await connection.fetch(_CONSTRAINTS, column["table"], column["number"], column["type"])
        named: dict[str, None] = dict.fromkeys(column["labels"])  # in their order, each once
        refused: dict[str, str] = {}  # state -> who refuses it
        if column["enum"]:
            refused = {state: "its enum type" for state in states if state not in column["labels"]}
        for row in constraints:
            named |= dict.fromkeys(literal.replace("''", "'") for literal in _LITERAL.findall(row["expression"]))
        if not column["enum"] and not constraints:
            differences.append("neither an enum type nor a CHECK constraint keeps other states out of the column")
        asked = [
            state
            for state in dict.fromkeys([*states, *named, _NO_STATE])
            if not column["enum"] or state in column["labels"]
        ]
        for row in constraints:
            for state in await self._refused_by(connection, row, column["plain"], asked):
                refused.setdefault(state, f"constraint {row['name']}")
        for state in states:
            if state in refused:
                differences.append(f"{state!r} is a state of the moves, and {refused[state]} refuses it")
        if constraints and _NO_STATE in asked and _NO_STATE not in refused:
            differences.append("the CHECK constraints let states through that nothing names")
        for state in named:
            if state not in self.moves.moves and state not in refused:
                differences.append(f"{state!r} is allowed by the table, and no state of the moves")
        for state, count in await connection.fetch(self._foreign_sql, states):
            shown = "NULL" if state is None else repr(state[:_SHOWN_MAX])
            differences.append(f"{count} rows are in the state {shown}, which the moves do not name")
        return differences

    async def _refused_by(self, connection: Database, constraint: Any, plain: str, asked: list[str]) -> list[str]:
        """Return the states that a constraint refuses.

        PostgreSQL evaluates the constraint, so its form does not matter.
        """
        column = "value" if constraint["of_domain"] else ident(self._column)  # a domain's says VALUE
        # The expression sees only the column that it names.
        rows = await connection.fetch(
            f"select c.{column}::text from (select s::{plain} as {column} "  # noqa: S608 - by ident, and the catalog's
            f"from unnest($1::text[]) as s) as c where ({constraint['expression']}) is false",
            asked,
        )
        return [row[0] for row in rows]

    def mermaid(self) -> str:
        """The machine as a Mermaid ``stateDiagram-v2``, for a page of documentation."""
        return self.moves.mermaid()


def _refusal(
    standing: MoveStanding, current: str, to: str, call: str, early: Literal["hold", "reject"]
) -> Held | TooEarly | TooLate | IllegalMove:
    """Return the error for a row whose state forbids the move."""
    match standing:
        case MoveStanding.LATE:
            return TooLate(f"{call}: too late, it is {current!r} by now", current, to)
        case MoveStanding.EARLY if early == "reject":
            return TooEarly(f"{call}: too early, it is only {current!r}", current, to)
        case MoveStanding.EARLY:
            return Held(f"{call}: held, it is only {current!r}", current, to)
        case MoveStanding.NEVER:
            return IllegalMove(f"{call}: no way leads there from {current!r}", current, to)
        case MoveStanding.UNKNOWN:
            return IllegalMove(f"{call}: it is in a state that the moves do not name", current, to)
        case MoveStanding.READY | MoveStanding.THERE:
            raise AssertionError(standing)
        case _:
            assert_never(standing)
