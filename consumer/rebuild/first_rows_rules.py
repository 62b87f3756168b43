"""Which tables may have begun with other rows than a rebuild assumes.

Pure. first_rows.py asks PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from consumer.rebuild.table_model import Name, Table, TableUsage


def uncertain_beginnings(
    tables: Sequence[Table],
    usage: Mapping[Name, TableUsage],
    counts: Sequence[Mapping[str, Any]],
    upserted: Collection[str],
) -> dict[Name, frozenset[str]]:
    """Return the columns that may have begun otherwise, by differing table.

    A rebuild assumes that a table began empty, or with its columns' defaults. Where most rows agree, that is right. counts:
    of each table, as the comparison counted. upserted: names of tables that handlers insert into on conflict.
    """
    uncertain: dict[Name, frozenset[str]] = {}
    for table, count in zip(tables, counts, strict=True):
        use = usage[table.name]
        differing = count["extra"] + count["different"]
        is_unlikely = differing > count["rows"] - differing
        writable = [column for column in table.columns if not column.generated]
        if is_unlikely and (not use.inserted or table.name.table in upserted):
            uncertain[table.name] = frozenset(
                column.name for column in writable if use.inserted or column.name in use.updated
            )
    return uncertain


def beginning_doubt(name: Name, older: int, counts: Mapping[str, Any], *, knows: bool) -> dict[str, Any] | None:
    """Return why a table may not have begun empty, or None.

    older: rows that were written before its handlers first ran. counts: as the comparison counted. knows: whether the
    ledger knows the transactions that wrote the rows. Otherwise extra rows may be first rows, but not where rows are missing
    too: first rows alone do not explain those.
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
