"""Tables beside their copies: how many rows are missing, extra or different, and a few of them.

Knows PostgreSQL through a connection that is handed in, in a transaction where both sides stand still; knows no message.
Everything is counted there: no more rows than the sample come here, whatever the tables hold. What it does not know: which
side is right. A column that depends on when things ran says nothing, so it is left out, and that is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from consumer.rebuild.compare_sql import GENERATED, IGNORED, NOW, SHOWN_MAX, Comparison, key_of, left_out
from consumer.rebuild.drawn_values import DRAWN
from consumer.rebuild.table_model import Name, Table, TableUsage

KINDS = ("missing", "extra", "different")
MARKS_MAX = 100_000  # differing rows of a table that two rebuilds are compared by


class Excuse(str):
    """A note that may explain a difference between two states."""

    __slots__ = ()


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


class Marked(NamedTuple):
    """How often a row differs, in which columns and by which values, and its mark in the sample. See Comparison.marks."""

    times: int
    columns: frozenset[int]
    sampled: str


@dataclass(slots=True)
class Compared:
    """What a comparison has found: a dictionary for each table, and the sample."""

    tables: list[dict[str, Any]] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    marks: dict[str, dict[tuple[str, str], Marked]] = field(default_factory=dict)  # by table, and by kind and mark
    sums: dict[str, dict[str, str | None]] = field(default_factory=dict)  # of their columns, in the rebuild

    def differing(self) -> set[str]:
        """The tables in which rows differ."""
        return {table["table"] for table in self.tables if any(table[kind] for kind in KINDS)}

    def varying(self, again: Compared, table: str) -> list[str]:
        """The columns of a table that another rebuild fills otherwise."""
        sums = again.sums.get(table, {})
        return [column for column, value in self.sums.get(table, {}).items() if sums.get(column) != value]

    def keep_stable(self, again: Compared) -> dict[str, int]:
        """Keep the differences that another rebuild has found too. Returns how many rows of each table were dropped.

        What two rebuilds make differently depends on the order of messages, or on when they run: it says nothing
        about the real rows.
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
            # A row that no rebuild makes may be one that each rebuild makes otherwise.
            table["extra"] = max(0, table["extra"] - (before["missing"] - table["missing"]))
            dropped[name] = sum(before[kind] - table[kind] for kind in KINDS)
            if all(before[kind] <= MARKS_MAX for kind in KINDS):
                self.marks[name] = stable
                kept = {(kind, marked.sampled) for (kind, _), marked in stable.items()}
                self.differences = [
                    each for each in self.differences if str(each.table) != name or (each.kind, each.mark) in kept
                ]
        return {name: count for name, count in dropped.items() if count}


def _stable(
    mine: Mapping[tuple[str, str], Marked], others: Mapping[tuple[str, str], Marked]
) -> dict[tuple[str, str], Marked]:
    """The rows that differ in both, and where both have them in a column for which the two rebuilds give one value."""
    found: dict[tuple[str, str], Marked] = {}
    for place, marked in mine.items():
        if (other := others.get(place)) is None:
            continue
        columns = marked.columns & other.columns
        if columns or not (marked.columns or other.columns):
            found[place] = Marked(min(marked.times, other.times), columns, marked.sampled)
    return found


async def compare(
    connection: Any,
    tables: Sequence[tuple[Table, TableUsage, Collection[str]]],
    ignore: set[tuple[Name, str]],
    put_back: set[tuple[Name, str]],
    sample_max: int,
    progress: Callable[[int], None],
    rebuild: str,
    drawn: Collection[tuple[Name, str]] = (),
) -> Compared:
    """Compare each table with its copy. tables: each with its use, and the columns whose moving default gave a value.

    rebuild: a name of this one, another than those that it will be compared with have. drawn: see core/drawn.py.
    """
    found = Compared()
    for place, (table, use, used) in enumerate(tables):
        progress(place)
        row = await connection.fetchrow(sql) if (sql := Comparison(table, (), ()).nows()) else None
        nows = {name for name, holds in row.items() if holds} if row else set()
        chance = {column: DRAWN for name, column in drawn if name == table.name}
        ignored = left_out(table, use, ignore, put_back, set(used), nows, chance)
        key = key_of(table, ignored)
        comparison = _comparison(table, ignored, key)
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
            rows = await connection.fetch(comparison.marks(rebuild), MARKS_MAX)
            found.marks[str(table.name)] = {(row[0], row[1]): Marked(row[2], frozenset(row[3]), row[4]) for row in rows}
            found.sums[str(table.name)] = dict(await connection.fetchrow(comparison.sums(rebuild)))
    progress(len(tables))
    return found


def _comparison(table: Table, ignored: Mapping[str, str], key: tuple[str, ...]) -> Comparison:
    """What is compared of a table. Of values that a rebuild cannot give again: whether there is one."""
    rest = [each for each in table.columns if each.name not in key]
    clocked = frozenset(each.name for each in rest if ignored.get(each.name) == NOW and key)
    null_only = [
        each
        for each in rest
        if each.name in ignored and each.name not in clocked and ignored[each.name] not in (IGNORED, GENERATED)
    ]
    columns = [each for each in rest if each.name not in ignored or each.name in clocked]
    return Comparison(table, key, tuple(columns), tuple(null_only), clocked)


def _difference(place: int, comparison: Comparison, row: Any) -> Difference:
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
