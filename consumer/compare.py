"""Tables beside their copies: how many rows are missing, extra or different, and a few of them.

Knows PostgreSQL through a connection that is handed in, in a transaction where both sides stand still; knows no message.
Everything is counted there: no more rows than the sample come here, whatever the tables hold. What it does not know: which
side is right. A column that depends on when things ran says nothing, so it is left out, and that is told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from consumer.core.scratch import SHOWN_MAX, Comparison, Name, Table, Use, key_of, left_out


@dataclass(slots=True)
class Difference:
    """A row that is missing, extra or different, or several rows of a table without a key that are alike.

    place: which of the tables. mark: by what the row is known again. deltas: by how much its numbers differ.
    explained: each of the messages changed the row by exactly the difference.
    """

    place: int
    table: Name
    kind: str
    key: dict[str, str | None]
    columns: dict[str, dict[str, str | None]]
    count: int
    mark: str
    deltas: dict[str, str]
    messages: list[str] = field(default_factory=list)
    explained: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "table": str(self.table),
            "kind": self.kind,
            "key": self.key,
            "columns": self.columns,
            "count": self.count,
            "messages": self.messages,
            "explained": self.explained,
        }


@dataclass(slots=True)
class Compared:
    """What a comparison has found: a dictionary for each table, and the sample."""

    tables: list[dict[str, Any]] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)


async def compare(
    connection: Any,
    tables: Sequence[tuple[Table, Use, Collection[str]]],
    ignore: set[tuple[Name, str]],
    put_back: set[tuple[Name, str]],
    sample_max: int,
    progress: Callable[[int], None],
) -> Compared:
    """Compare each table with its copy. tables: each with its use, and the columns whose moving default gave a value."""
    found = Compared()
    for place, (table, use, used) in enumerate(tables):
        progress(place)
        row = await connection.fetchrow(sql) if (sql := Comparison(table, (), ()).nows()) else None
        nows = {name for name, holds in row.items() if holds} if row else set()
        ignored = left_out(table, use, ignore, put_back, set(used), nows)
        key = key_of(table, ignored)
        columns = tuple(each for each in table.columns if each.name not in ignored and each.name not in key)
        comparison = Comparison(table, key, columns)
        rows, rebuilt, missing, extra, different = await connection.fetchrow(comparison.counts())
        found.comparisons.append(comparison)
        found.tables.append(
            {
                "table": str(table.name),
                "rows": rows,
                "rebuilt": rebuilt,
                "missing": missing,
                "extra": extra,
                "different": different,
                "matched_by": list(key),
                "ignored": ignored,
            }
        )
        if missing or extra or different:
            samples = await connection.fetch(comparison.samples(), sample_max)
            found.differences += [_difference(place, comparison, each) for each in samples]
    progress(len(tables))
    return found


def _difference(place: int, comparison: Comparison, row: Any) -> Difference:
    kind, count, key, real, rebuilt, differs, deltas, mark = row
    columns: dict[str, dict[str, str | None]] = {}
    for n, column in enumerate(comparison.columns):
        if kind != "different" or differs[n]:
            columns[column.name] = {
                "real": None if kind == "missing" else _shown(real[n]),
                "rebuilt": None if kind == "extra" else _shown(rebuilt[n]),
            }
    return Difference(
        place=place,
        table=comparison.table.name,
        kind=kind,
        key={name: _shown(value) for name, value in zip(comparison.key, key, strict=True)},
        columns=columns,
        count=count,
        mark=mark,
        deltas={name: text for name, text in zip(comparison.numeric, deltas, strict=False) if text and name in columns}
        if kind == "different"
        else {},
    )


def _shown(text: str | None) -> str | None:
    return text if text is None or len(text) <= SHOWN_MAX else text[: SHOWN_MAX - 1] + "…"
