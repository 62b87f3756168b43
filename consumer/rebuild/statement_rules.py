"""Which statements of handlers may run beside the copies.

Pure. Limitations: what a function does inside is not known here. PostgreSQL refuses its writes (the transaction is read
only), and the rebuild looks afterwards at what was touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from consumer.rebuild.table_model import OURS, Name

UPSERT = "Upsert"  # among the operations of a plan


class TableAccess(NamedTuple):
    """A real relation that a statement touches. kind: pg_class.relkind. part: of a partitioned or inherited table."""

    name: Name
    kind: str
    part: bool
    written: bool  # or its rows locked
    inserted: bool


class Decision(NamedTuple):
    """What to do about a statement: refuse it, or begin again with copies of these tables. Neither: run it."""

    refusal: str | None
    copies: dict[Name, bool]  # and whether it is known to insert into them


def operations(plan: Any) -> dict[Name, set[str]]:
    """The relations of an `explain (verbose, format json)`, with what is done to each (Insert, Update, …, or read)."""
    found: dict[Name, set[str]] = {}
    pending = [plan]
    while pending:
        each = pending.pop()
        if isinstance(each, list):
            pending += each
        elif isinstance(each, dict):
            if "Relation Name" in each and "Schema" in each:
                name = Name(each["Schema"], each["Relation Name"])
                found.setdefault(name, set()).add(each.get("Operation", "read"))
                if "Conflict Resolution" in each:
                    found[name].add(UPSERT)
            pending += [value for value in each.values() if isinstance(value, dict | list)]
    return found


def judge(touches: Sequence[TableAccess], shadows: Mapping[Name, Name]) -> Decision:
    """Whether a statement stays within the copies.

    touches: the real relations that it touches. shadows: real relations whose rows are those of a table that has a
    copy: itself, its partitions, views of it. What is only read and has no copy is the same here as there, so it is read
    where it is.
    """
    for each in touches:
        if each.name.schema == OURS:
            return Decision(f"touches {each.name}, which is the framework's own", {})
    views = [each for each in touches if each.kind in "vm"]
    for each in [*views, *touches]:
        table = shadows.get(each.name)
        if table is None:
            continue
        if each.kind in "vm":
            return Decision(f"reads {table} through the view {each.name}, which shows the real table only", {})
        if table == each.name:
            return Decision(f"names {table} with its schema, and so means the real table: leave the schema out", {})
        return Decision(f"names {each.name}, a part of {table}: name {table.table} itself", {})
    copies: dict[Name, bool] = {}
    for each in touches:
        if not each.written:
            continue
        if each.kind in "vm":
            return Decision(f"writes or locks through the view {each.name}: name its table", {})
        if each.kind == "f":
            return Decision(f"writes to {each.name}, a foreign table: its rows are in another place", {})
        if each.part:
            return Decision(f"writes to {each.name}, a part of another table or one with parts: that has no copy", {})
        copies[each.name] = copies.get(each.name, False) or each.inserted
    return Decision(None, copies)
