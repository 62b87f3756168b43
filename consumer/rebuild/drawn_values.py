"""Finds columns with drawn values, which no rebuild can produce again.

A drawn value comes from chance or from the clock, not from the message. Two rebuilds in one order give such a column no
value twice, and the real table holds none of either. Then only null or not null is compared, and what else can be compared:
the lengths of texts, and that no time is later than the rebuild.

Everything else stays compared: columns with one value that two rebuilds share; copies with updated rows, where a value may
sum up several messages; numbers, unless a function gives them by default; values that another column holds too, since it
refers to the row; tables whose two rebuilds in one order differ in anything else.

Pure.
"""

# ruff: noqa: S608 - every name in the SQL of this file is quoted by `ident`

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

from consumer.core.identifiers import ident
from consumer.rebuild.table_model import Column, ColumnName, Name, Table

DRAWN = "drawn: two rebuilds give no value twice"
VALUES_MAX = 100_000  # of a column

_SKEW = "5 seconds"  # between the clock of handlers and that of PostgreSQL
_CALL = re.compile(r"\w\s*\(")


class ColumnValues(NamedTuple):
    """The values of a column in one rebuild.

    hashes: of the values. length: of the texts, if all have the same.
    """

    hashes: frozenset[int]
    length: int | None


def may_be_drawn(column: Column) -> bool:
    """Return whether the type of a column allows drawn values.

    That is an id, a text, bytes, a time, or a number that a function gives by default.
    """
    if not column.built_in or column.generated or column.identity:
        return False
    if column.numeric:
        return column.default is not None and _CALL.search(column.default) is not None
    return column.category == "S" or column.type_name in ("uuid", "bytea") or column.timestamp


def shared_values_sql(table: Table, column: Column) -> str:
    """Return SQL: whether the real table holds any value of the copy."""
    name = ident(column.name)
    return (
        f"select exists (select from {table.name.real} r join {table.name.copy} b on r.{name}::text = b.{name}::text)"
    )


def values_sql(table: Table, column: Column) -> str:
    """Return SQL for the arguments of `column_values` after the column.

    Those are hashes of the copy's values, the one length of its texts, and whether the real values may be drawn ones.
    """
    name = ident(column.name)
    lengths = f"min(length({name}::text)) as least, max(length({name}::text)) as most"
    fits = "true"
    if column.timestamp:  # of this rebuild: no message has added anything to them
        own = f"between now() - interval '{_SKEW}' and clock_timestamp() + interval '{_SKEW}'"
        also = f" or {name} at time zone 'UTC' {own}" if column.type_name == "timestamp" else ""
        fits = (
            f"(select bool_and({name}::timestamptz {own}{also}) "
            f"and coalesce((select max({name}) from {table.name.real}) <= max({name}), true) from {table.name.copy})"
        )
    elif not column.numeric:
        fits = (
            "(c.least < c.most or (r.least, r.most) is not distinct from (c.least, c.most)) "
            f"and (select count(distinct {name}::text) = count({name}) from {table.name.real})"
        )
    return (
        f"select array(select hashtextextended({name}::text, 0) from {table.name.copy} where {name} is not null "
        f"limit {VALUES_MAX + 1}), case when c.least = c.most then c.least end, {fits} "
        f"from (select {lengths} from {table.name.copy}) c, (select {lengths} from {table.name.real}) r"
    )


def column_values(column: Column, hashes: Collection[int], length: int | None, fits: bool) -> ColumnValues | None:
    """Return the values of a column; None if they are not drawn.

    hashes, length, fits: what `values_sql` answered.
    """
    distinct = frozenset(hashes)
    is_distinct = column.timestamp or len(distinct) == len(hashes)
    if not fits or not hashes or len(hashes) > VALUES_MAX or not is_distinct:
        return None
    return ColumnValues(distinct, None if column.timestamp or column.numeric else length)


def find_drawn(
    first: Mapping[ColumnName, ColumnValues],
    again: Mapping[ColumnName, ColumnValues],
    varying: Mapping[Name, Collection[str]],
) -> frozenset[ColumnName]:
    """Return the columns that two rebuilds in one order show as drawn.

    first, again: values of columns that may be drawn. varying: all columns in which the two rebuilds differ, for each table
    that has the same number of rows in both.
    """
    places = {
        place
        for place, mine in first.items()
        if (other := again.get(place)) is not None
        and mine.hashes.isdisjoint(other.hashes)
        and mine.length == other.length
    }
    times = Counter(value for place in places for value in first[place].hashes)
    places = {place for place in places if all(times[value] == 1 for value in first[place].hashes)}
    by_table: dict[Name, set[str]] = {}
    for name, column in places:
        by_table.setdefault(name, set()).add(column)
    return frozenset(place for place in places if by_table[place[0]].issuperset(varying.get(place[0], [""])))
