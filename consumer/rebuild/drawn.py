"""Looks at the values of two rebuilds in one order, for columns that are drawn (core/drawn.py).

Knows SQL through a connection that is handed in, in the transaction of a rebuild.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from consumer.rebuild.compare import Compared
from consumer.rebuild.drawn_values import Place, Values, asks, drawn, may_be_drawn, shares, values
from consumer.rebuild.table_model import Name


async def values_of(
    connection: Any, compared: Compared, updates: Sequence[int], put_back: Collection[Place]
) -> dict[Place, Values]:
    """The values of columns that may be drawn, of tables in which rows differ.

    updates: of each copy. put_back: columns that are compared whatever they hold.
    """
    found: dict[Place, Values] = {}
    differing = compared.differing()
    for comparison, updated in zip(compared.comparisons, updates, strict=True):
        table = comparison.table
        if updated or str(table.name) not in differing:
            continue
        taken = {*comparison.key, *(each.name for each in comparison.columns)} - comparison.clocked
        for column in table.columns:
            place = table.name, column.name
            if column.name not in taken or place in put_back or not may_be_drawn(column):
                continue
            if await connection.fetchval(shares(table, column)):
                continue
            answer = await connection.fetchrow(asks(table, column))
            if (given := values(column, *answer)) is not None:
                found[place] = given
    return found


def drawn_in(
    first: Compared, again: Compared, before: Mapping[Place, Values], now: Mapping[Place, Values]
) -> frozenset[Place]:
    """The columns that are drawn, by two rebuilds in one order and their values."""
    rows = {each["table"]: each["rebuilt"] for each in first.tables}
    varying: dict[Name, set[str]] = {}
    for comparison, told in zip(again.comparisons, again.tables, strict=True):
        name = str(comparison.table.name)
        if rows.get(name) == told["rebuilt"] and name in first.sums and name in again.sums:
            varying[comparison.table.name] = set(first.varying(again, name)) - comparison.clocked
    return drawn(before, now, varying)


def notes(places: frozenset[Place]) -> list[str]:
    """What to say about columns that are drawn."""
    return [
        f"{name}.{column} is drawn by chance or by the clock (two rebuilds in one order give no value twice): of it only null or "
        "not null was compared, and rows are matched by their other columns"
        for name, column in sorted(places)
    ]
