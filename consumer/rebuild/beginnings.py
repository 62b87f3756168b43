"""What is not known of the first rows of a table, and which rows a statement looks for.

Knows tables and SQL texts; knows no connection. Limitations: rows that a function updates inside are not seen here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from consumer.deferred_writes.grammar import shape_of
from consumer.rebuild.table_model import Name, Table, TableUsage

_RETURNING = re.compile(r"\sreturning\s.*\Z", re.IGNORECASE | re.DOTALL)
_CAST = re.compile(r"(\$[0-9]+)::[a-z0-9_]+", re.IGNORECASE)


class Sought(NamedTuple):
    """The rows that an UPDATE looks for: columns of a table, each with the place of its argument."""

    table: str
    columns: tuple[tuple[str, int], ...]


def sought_by(sql: str) -> Sought | None:
    """What an UPDATE looks for; None for one whose rows do not follow from columns that equal its arguments."""
    shape = shape_of(_CAST.sub(r"\1", _RETURNING.sub("", sql)))
    if shape is None or shape.kind != "update" or "." in shape.table:
        return None
    name = shape.table
    plain = name[1:-1].replace('""', '"') if name.startswith('"') else name
    return Sought(plain, shape.keys)


def other_beginnings(
    tables: Sequence[Table],
    known: Mapping[Name, TableUsage],
    counts: Sequence[Mapping[str, Any]],
    upserted: Collection[str],
) -> dict[Name, frozenset[str]]:
    """The columns that may have begun otherwise than a rebuild takes for granted, of each table in which rows differ.

    counts: of each table, what its comparison found. upserted: names of tables that handlers insert into on conflict.
    Where most rows agree, a table has begun as it was taken to: empty, or with its columns' defaults.
    """
    found: dict[Name, frozenset[str]] = {}
    for table, count in zip(tables, counts, strict=True):
        use = known[table.name]
        differing = count["extra"] + count["different"]
        is_unlikely = differing > count["rows"] - differing
        writable = [each for each in table.columns if not each.generated]
        if is_unlikely and (not use.inserted or table.name.table in upserted):
            found[table.name] = frozenset(each.name for each in writable if use.inserted or each.name in use.updated)
    return found


def beginning_doubt(name: Name, older: int, counts: Mapping[str, Any], *, knows: bool) -> dict[str, Any] | None:
    """Why a table that handlers insert into may not have begun empty; None where nothing says so.

    older: rows that were written before its handlers first ran. counts: what its comparison found. knows: whether the
    transactions that wrote its rows are those that the ledger knows. Otherwise rows that are too many may be first rows;
    where rows are missing too, first rows alone explain nothing.
    """
    if not knows and counts["extra"] and not counts["missing"]:
        text = (
            f"{name}: {counts['extra']} rows are too many, and its rows or those of the ledger were written again since (a "
            "restored dump), so whether it began empty is not known: give the first rows of all tables with --base FILE"
        )
        return {"kind": "beginning_not_kept", "count": counts["extra"], "text": text}
    if knows and older:
        text = (
            f"{name}: {older} rows were there before its handlers first ran, and they insert into it, so it did not "
            "begin empty: give the first rows of all tables with --base FILE"
        )
        return {"kind": "began_with_rows", "count": older, "text": text}
    return None
