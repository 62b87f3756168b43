"""Which statements of handlers may run beside the copies.

Pure. Limitation: what a function does is not known here. PostgreSQL refuses its writes (the transaction is read only), and
ShadowSession checks after each batch which real tables were touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from consumer.rebuild.table_model import OURS, Name

UPSERT = "Upsert"  # among the operations of a plan


class TableAccess(NamedTuple):
    """A real relation that a statement touches.

    kind: pg_class.relkind. part: whether it belongs to a partitioned or inherited table. written: written to, or rows locked.
    """

    name: Name
    kind: str
    part: bool
    written: bool
    inserted: bool


class StatementDecision(NamedTuple):
    """Refuse a statement, start over with more copies, or run it.

    refusal: why it is refused. copies: tables that need a copy, and whether the statement inserts into them.
    """

    refusal: str | None
    copies: dict[Name, bool]


def operations(plan: Any) -> dict[Name, set[str]]:
    """Return the relations of a plan, with what is done to each.

    plan: of `explain (verbose, format json)`. The operations are PostgreSQL's (Insert, Update, …), UPSERT, and "read".
    """
    by_relation: dict[Name, set[str]] = {}
    pending = [plan]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        elif isinstance(node, dict):
            if "Relation Name" in node and "Schema" in node:
                name = Name(node["Schema"], node["Relation Name"])
                by_relation.setdefault(name, set()).add(node.get("Operation", "read"))
                if "Conflict Resolution" in node:
                    by_relation[name].add(UPSERT)
            pending += [value for value in node.values() if isinstance(value, dict | list)]
    return by_relation


def decide_statement(accesses: Sequence[TableAccess], shadows: Mapping[Name, Name]) -> StatementDecision:
    """Decide whether a statement stays within the copies.

    accesses: the real relations that it touches. shadows: real relations that show rows of a table with a copy: the table
    itself, its partitions, views of it. A table without a copy that is only read is read where it is: no handler changes it.
    """
    for access in accesses:
        if access.name.schema == OURS:
            return StatementDecision(f"accesses {access.name}, which is the framework's own", {})
    views = [access for access in accesses if access.kind in "vm"]
    for access in [*views, *accesses]:
        table = shadows.get(access.name)
        if table is None:
            continue
        if access.kind in "vm":
            return StatementDecision(
                f"reads {table} through the view {access.name}, which shows the real table only", {}
            )
        if table == access.name:
            return StatementDecision(
                f"names {table} with its schema, and so means the real table: leave the schema out", {}
            )
        return StatementDecision(f"names {access.name}, a part of {table}: name {table.table} itself", {})
    copies: dict[Name, bool] = {}
    for access in accesses:
        if not access.written:
            continue
        if access.kind in "vm":
            return StatementDecision(f"writes or locks through the view {access.name}: name its table", {})
        if access.kind == "f":
            return StatementDecision(f"writes to {access.name}, a foreign table: its rows are in another place", {})
        if access.part:
            return StatementDecision(
                f"writes to {access.name}, a part of another table or one with parts: that has no copy", {}
            )
        copies[access.name] = copies.get(access.name, False) or access.inserted
    return StatementDecision(None, copies)
