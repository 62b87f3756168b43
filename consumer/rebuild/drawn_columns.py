"""Reads the values of two rebuilds, to find drawn columns (drawn_values.py).

Uses the connection and the transaction of the rebuild.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from consumer.rebuild.compare import ComparisonResult
from consumer.rebuild.drawn_values import (
    ColumnValues,
    column_values,
    find_drawn,
    may_be_drawn,
    shared_values_sql,
    values_sql,
)
from consumer.rebuild.table_model import ColumnName, Name


async def read_values(
    connection: Any, compared: ComparisonResult, updates: Sequence[int], put_back: Collection[ColumnName]
) -> dict[ColumnName, ColumnValues]:
    """Return the values of columns that may be drawn, in differing tables.

    updates: number of updates of each copy. put_back: columns that are compared in any case.
    """
    values_by_place: dict[ColumnName, ColumnValues] = {}
    differing = compared.differing()
    for comparison, updated in zip(compared.comparisons, updates, strict=True):
        table = comparison.table
        if updated or str(table.name) not in differing:
            continue
        taken = {*comparison.key, *(column.name for column in comparison.columns)} - comparison.clocked
        for column in table.columns:
            place = table.name, column.name
            if column.name not in taken or place in put_back or not may_be_drawn(column):
                continue
            if await connection.fetchval(shared_values_sql(table, column)):
                continue
            answer = await connection.fetchrow(values_sql(table, column))
            if (given := column_values(column, *answer)) is not None:
                values_by_place[place] = given
    return values_by_place


def compare_values(
    first: ComparisonResult,
    again: ComparisonResult,
    before: Mapping[ColumnName, ColumnValues],
    now: Mapping[ColumnName, ColumnValues],
) -> frozenset[ColumnName]:
    """Return the columns that two rebuilds in one order show as drawn.

    before, now: what `read_values` returned in each.
    """
    rows = {table["table"]: table["rebuilt"] for table in first.tables}
    varying: dict[Name, set[str]] = {}
    for comparison, table in zip(again.comparisons, again.tables, strict=True):
        name = str(comparison.table.name)
        if rows.get(name) == table["rebuilt"] and name in first.sums and name in again.sums:
            varying[comparison.table.name] = set(first.varying(again, name)) - comparison.clocked
    return find_drawn(before, now, varying)


def notes(places: frozenset[ColumnName]) -> list[str]:
    """Return the notes of the answer about drawn columns."""
    return [
        f"{name}.{column} is drawn by chance or by the clock (two rebuilds in one order give no value twice): only null or "
        "not null was compared of it, and rows are matched by their other columns"
        for name, column in sorted(places)
    ]
