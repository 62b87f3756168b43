"""Compares tables with their copies: counts of differing rows, and a sample.

PostgreSQL counts, in the transaction of the rebuild, where both sides stand still: no more rows than the sample are fetched,
whatever the size of the tables. Columns that depend on when things ran are left out, and the answer names them.
Limitation: which side is right is unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from consumer.rebuild.compare_sql import GENERATED, IGNORED, NOW, SHOWN_MAX, TableComparison, ignored_columns, match_key
from consumer.rebuild.drawn_values import DRAWN
from consumer.rebuild.table_model import ColumnName, Name, Table, TableUsage

KINDS = ("missing", "extra", "different")
MARKS_MAX = 100_000  # differing rows of a table, by which two rebuilds are compared


class Excuse(str):
    """A note that may explain a difference between two states."""

    __slots__ = ()


@dataclass(slots=True)
class Difference:
    """A row that is missing, extra or different.

    In a table without a key, it stands for `count` equal rows. place: index of the table. mark: identifies the row in
    another pass. deltas: by how much its numbers differ. explained: each of the messages changed the row by exactly the
    difference.
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


class MarkedRow(NamedTuple):
    """A differing row, as TableComparison.marks gives it.

    times: how often it differs. columns: hashes of the columns that differ, with their values. sampled: its mark in the
    sample.
    """

    times: int
    columns: frozenset[int]
    sampled: str


@dataclass(slots=True)
class ComparisonResult:
    """Counts and samples of one comparison.

    tables: one dictionary for each. marks: by table, then by kind and mark. sums: by table, a hash of each column of the
    copy.
    """

    tables: list[dict[str, Any]] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    comparisons: list[TableComparison] = field(default_factory=list)
    marks: dict[str, dict[tuple[str, str], MarkedRow]] = field(default_factory=dict)
    sums: dict[str, dict[str, str | None]] = field(default_factory=dict)

    def differing(self) -> set[str]:
        """Return the tables in which rows differ."""
        return {table["table"] for table in self.tables if any(table[kind] for kind in KINDS)}

    def varying(self, again: ComparisonResult, table: str) -> list[str]:
        """Return the columns that another rebuild fills with other values."""
        sums = again.sums.get(table, {})
        return [column for column, value in self.sums.get(table, {}).items() if sums.get(column) != value]

    def keep_stable(self, again: ComparisonResult) -> dict[str, int]:
        """Keep the differences that another rebuild has too.

        Returns how many rows of each table were dropped. Rows that two rebuilds make differently depend on the order of
        messages, or on when they run: they say nothing about the real rows.
        """
        dropped: dict[str, int] = {}
        for table in self.tables:
            name = table["table"]
            stable = _stable(self.marks.get(name, {}), again.marks.get(name, {}))
            kinds: Counter[str] = Counter()
            for (kind, _), marked in stable.items():
                kinds[kind] += marked.times
            before = {kind: table[kind] for kind in KINDS}
            for kind in KINDS:
                if table[kind] <= MARKS_MAX:
                    table[kind] = min(table[kind], kinds[kind])
            # An extra row may be the real form of a row that every rebuild makes differently.
            table["extra"] = max(0, table["extra"] - (before["missing"] - table["missing"]))
            dropped[name] = sum(before[kind] - table[kind] for kind in KINDS)
            if all(before[kind] <= MARKS_MAX for kind in KINDS):
                self.marks[name] = stable
                kept = {(kind, marked.sampled) for (kind, _), marked in stable.items()}
                self.differences = [
                    difference
                    for difference in self.differences
                    if str(difference.table) != name or (difference.kind, difference.mark) in kept
                ]
        return {name: count for name, count in dropped.items() if count}


def _stable(
    mine: Mapping[tuple[str, str], MarkedRow], others: Mapping[tuple[str, str], MarkedRow]
) -> dict[tuple[str, str], MarkedRow]:
    """Return the rows that differ in both rebuilds, in the same way.

    At least one column differs in both and has one value in the two rebuilds.
    """
    stable: dict[tuple[str, str], MarkedRow] = {}
    for place, marked in mine.items():
        if (other := others.get(place)) is None:
            continue
        columns = marked.columns & other.columns
        if columns or not (marked.columns or other.columns):
            stable[place] = MarkedRow(min(marked.times, other.times), columns, marked.sampled)
    return stable


async def compare(
    connection: Any,
    tables: Sequence[tuple[Table, TableUsage, Collection[str]]],
    ignore: set[ColumnName],
    put_back: set[ColumnName],
    sample_max: int,
    progress: Callable[[int], None],
    rebuild: str,
    drawn: Collection[ColumnName] = (),
) -> ComparisonResult:
    """Compare each table with its copy.

    tables: each with its use, and the columns whose volatile default gave a value. ignore, put_back: columns to leave out,
    and columns to compare in any case. progress: called with the index of each table. rebuild: a name that other rebuilds do
    not have (see TableComparison.marks). drawn: see drawn_values.py.
    """
    result = ComparisonResult()
    for place, (table, use, used) in enumerate(tables):
        progress(place)
        row = await connection.fetchrow(sql) if (sql := TableComparison(table, (), ()).clock_columns()) else None
        clock_names = {name for name, holds_time in row.items() if holds_time} if row else set()
        drawn_here = {column: DRAWN for name, column in drawn if name == table.name}
        ignored = ignored_columns(table, use, ignore, put_back, set(used), clock_names, drawn_here)
        key = match_key(table, ignored)
        comparison = _comparison(table, ignored, key)
        rows, rebuilt, missing, extra, different = await connection.fetchrow(comparison.counts())
        result.comparisons.append(comparison)
        result.tables.append(
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
            result.differences += [_difference(place, comparison, sample) for sample in samples]
            rows = await connection.fetch(comparison.marks(rebuild), MARKS_MAX)
            result.marks[str(table.name)] = {
                (row[0], row[1]): MarkedRow(row[2], frozenset(row[3]), row[4]) for row in rows
            }
            result.sums[str(table.name)] = dict(await connection.fetchrow(comparison.column_sums(rebuild)))
    progress(len(tables))
    return result


def _comparison(table: Table, ignored: Mapping[str, str], key: tuple[str, ...]) -> TableComparison:
    """Choose what is compared of a table.

    Columns that a rebuild cannot repeat are compared as null or not null.
    """
    rest = [column for column in table.columns if column.name not in key]
    clocked = frozenset(column.name for column in rest if ignored.get(column.name) == NOW and key)
    null_only = [
        column
        for column in rest
        if column.name in ignored and column.name not in clocked and ignored[column.name] not in (IGNORED, GENERATED)
    ]
    columns = [column for column in rest if column.name not in ignored or column.name in clocked]
    return TableComparison(table, key, tuple(columns), tuple(null_only), clocked)


def _difference(place: int, comparison: TableComparison, row: Any) -> Difference:
    kind, count, key, real, rebuilt, differs, deltas, mark = row
    columns: dict[str, dict[str, str | None]] = {}
    for n, column in enumerate(comparison.shown):
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
