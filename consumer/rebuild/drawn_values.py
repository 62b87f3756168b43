"""Columns whose values are drawn by chance or by the clock, so that no rebuild gives them again.

Two rebuilds in one order give such a column no value twice, and the real table holds none of either. Then only null or
not null is compared of it, and what else can be told: the lengths of texts, that times are not after the rebuild's.

Everything else stays compared: columns with one value that two rebuilds share; copies with updated rows, where a value
may sum up several messages; numbers, unless a function gives them by default; values of which another column holds one
too, since it refers to the row; tables of which two rebuilds in one order differ in anything else.

Decides and writes SQL; knows no connection.
"""

# ruff: noqa: S608 - every name in the SQL of this file is quoted by `ident`

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

from consumer.core.identifiers import ident
from consumer.rebuild.table_model import Column, Name, Table

DRAWN = "drawn: two rebuilds give no value twice"
VALUES_MAX = 100_000  # of a column

_SKEW = "5 seconds"  # between the clock of handlers and that of PostgreSQL
_CALL = re.compile(r"\w\s*\(")

Place = tuple[Name, str]  # a table and one of its columns


class Values(NamedTuple):
    """The values of a column that a rebuild gives: hashes of them, and the one length that all texts have, if it is one."""

    hashes: frozenset[int]
    length: int | None


def may_be_drawn(column: Column) -> bool:
    """Whether a column is of a kind that is drawn: an id, a text, a time, or a number that a function gives by default."""
    if not column.built_in or column.generated or column.identity:
        return False
    if column.numeric:
        return column.default is not None and _CALL.search(column.default) is not None
    return column.category == "S" or column.type_name in ("uuid", "bytea") or column.timestamp


def shares(table: Table, column: Column) -> str:
    """Whether the real table holds any value of the copy."""
    name = ident(column.name)
    return (
        f"select exists (select from {table.name.real} r join {table.name.copy} b on r.{name}::text = b.{name}::text)"
    )


def asks(table: Table, column: Column) -> str:
    """Hashes of the copy's values, the length of its texts, and whether the real values are such as are drawn."""
    name = ident(column.name)
    lengths = f"min(length({name}::text)) as least, max(length({name}::text)) as most"
    fits = "true"
    if column.timestamp:  # times of this rebuild, to which no message has added anything
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


def values(column: Column, hashes: Collection[int], length: int | None, fits: bool) -> Values | None:
    """What `asks` has answered, None where the column is not drawn."""
    every = frozenset(hashes)
    is_distinct = column.timestamp or len(every) == len(hashes)
    if not fits or not hashes or len(hashes) > VALUES_MAX or not is_distinct:
        return None
    return Values(every, None if column.timestamp or column.numeric else length)


def drawn(
    first: Mapping[Place, Values], again: Mapping[Place, Values], varying: Mapping[Name, Collection[str]]
) -> frozenset[Place]:
    """The columns that are drawn: of those that may be by one rebuild, and by another one in the same order.

    varying: all columns in which the two differ, of each table that has as many rows in both.
    """
    found = {
        place
        for place, mine in first.items()
        if (other := again.get(place)) is not None
        and mine.hashes.isdisjoint(other.hashes)
        and mine.length == other.length
    }
    times = Counter(each for place in found for each in first[place].hashes)
    found = {place for place in found if all(times[each] == 1 for each in first[place].hashes)}
    by_table: dict[Name, set[str]] = {}
    for name, column in found:
        by_table.setdefault(name, set()).add(column)
    return frozenset(place for place in found if by_table[place[0]].issuperset(varying.get(place[0], [""])))
