"""SQL that compares tables with copies, and which columns are compared.

Pure. Every name is quoted by `ident`.
"""

# ruff: noqa: S608 - every name in the SQL of this file is quoted by `ident`

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from consumer.core.errors import Misconfigured
from consumer.core.identifiers import ident
from consumer.rebuild.table_model import Column, ColumnName, Table, TableUsage, literal

NOW = "written as now()"
IGNORED = "--ignore"
GENERATED = "generated"
SHOWN_MAX = 200  # characters of a value in an answer


def named(given: Sequence[str], option: str, columns: Iterable[ColumnName]) -> set[ColumnName]:
    """Return the columns that an option names.

    given: as `column`, `table.column` or `schema.table.column`. columns: all that exist. Raises Misconfigured for one that no
    table has, and suggests similar names.
    """
    columns_named: set[ColumnName] = set()
    forms: dict[str, list[ColumnName]] = {}
    for name, column in columns if given else ():
        for form in (column, f"{name.table}.{column}", f"{name}.{column}"):
            forms.setdefault(form, []).append((name, column))
    for text in given:
        if text not in forms:
            near = difflib.get_close_matches(text, forms, 3)
            action = (
                f"did you mean {' or '.join(near)}?" if near else "write column, table.column or schema.table.column"
            )
            raise Misconfigured(f"{option} {text}: no table has such a column; {action}")
        columns_named |= set(forms[text])
    return columns_named


def ignored_columns(
    table: Table,
    use: TableUsage,
    ignore: set[ColumnName],
    compare: set[ColumnName],
    used: set[str],
    clock_names: set[str],
    drawn: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the columns that are not compared, each with the reason.

    ignore, compare: what the options name. used: columns whose volatile default gave a value in the rebuild. clock_names:
    columns that hold the time of the rebuild. drawn: columns that another rebuild has shown to be drawn, with the reason.
    """
    reasons: dict[str, str] = {}
    for column in table.columns:
        if (table.name, column.name) in compare:
            continue
        if (table.name, column.name) in ignore:
            reasons[column.name] = IGNORED
        elif column.generated:
            reasons[column.name] = GENERATED
        elif column.has_volatile_default and (column.name in used or (not use.inserted and column.name in use.updated)):
            reasons[column.name] = column.ignored_because
        elif column.name in clock_names:
            reasons[column.name] = NOW
        elif drawn and column.name in drawn:
            reasons[column.name] = drawn[column.name]
    return reasons


def match_key(table: Table, ignored: Mapping[str, str]) -> tuple[str, ...]:
    """Return the columns to match rows by; none: count whole rows."""
    return next((key for key in table.keys if not any(name in ignored for name in key)), ())


@dataclass(frozen=True, slots=True)
class TableComparison:
    """The SQL that compares a table with its copy.

    The counts are asked for first, samples only where they differ. columns: compared, without those of the key.
    null_only: columns that a rebuild cannot repeat, compared as null or not null. clocked: of `columns`, those that hold the
    rebuild's own time in some rows. where: which real rows are compared, as SQL.
    """

    table: Table
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    null_only: tuple[Column, ...] = ()
    clocked: frozenset[str] = frozenset()
    where: str = "true"

    @property
    def shown(self) -> tuple[Column, ...]:
        """The columns of a sample, in order."""
        return self.columns + self.null_only

    @property
    def marked(self) -> tuple[str, ...]:
        """The columns that identify a row in another pass."""
        return self.key or tuple(column.name for column in self.columns)

    @property
    def numeric(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns if column.numeric) if self.key else ()

    def counts(self) -> str:
        """Return SQL for: rows, rebuilt, missing, extra, different."""
        if not self.key:
            return (
                "select coalesce(sum(real), 0)::int8, coalesce(sum(rebuilt), 0)::int8, "
                "coalesce(sum(greatest(rebuilt - real, 0)), 0)::int8, coalesce(sum(greatest(real - rebuilt, 0)), 0)::int8, "
                f"0::int8 from ({self._row_counts()}) as counted"
            )
        real, rebuilt = f"r.{ident(self.key[0])}", f"b.{ident(self.key[0])}"
        return (
            f"select count({real}), count({rebuilt}), count(*) filter (where {real} is null), "
            f"count(*) filter (where {rebuilt} is null), "
            f"count(*) filter (where {real} is not null and {rebuilt} is not null and ({self._row_differs()})) "
            f"from {self._joined()}"
        )

    def samples(self) -> str:
        """Return SQL for a sample of the differing rows.

        Columns: kind, count, key, real, rebuilt, differs, deltas, mark. At most $1 rows, the kinds in turn.
        """
        if not self.key:
            shown = _array(f"left(c{n}::text, {SHOWN_MAX + 1})" for n in range(len(self.shown)))
            order = ", ".join(["kind", *(f"c{n}" for n in range(len(self.shown)))])
            return (
                "select kind, count, array[]::text[] as key, shown as real, shown as rebuilt, array[]::bool[] as differs, "
                f"array[]::text[] as deltas, mark from (select kind, abs(real - rebuilt)::int8 as count, {shown} as shown, "
                f"{row_mark(f'c{n}' for n in range(len(self.columns)))} as mark, "
                f"row_number() over (partition by kind order by {order}) as place from "
                f"(select *, case when real > rebuilt then 'extra' else 'missing' end as kind from ({self._row_counts()}) "
                "as counted where real <> rebuilt) as differing) as numbered order by place, kind limit $1"
            )
        real, rebuilt = f"r.{ident(self.key[0])}", f"b.{ident(self.key[0])}"
        key_values = self._key_values()
        names = [ident(column.name) for column in self.shown]
        return (
            "select kind, 1::int8 as count, key, real, rebuilt, differs, deltas, mark from (select *, "
            "row_number() over (partition by kind order by place) as turn from ("
            f"select case when {real} is null then 'missing' when {rebuilt} is null then 'extra' else 'different' end as kind, "
            f"row({', '.join(key_values)}) as place, "
            f"{_array(f'left({value}::text, {SHOWN_MAX + 1})' for value in key_values)} as key, "
            f"{_array(f'left(r.{name}::text, {SHOWN_MAX + 1})' for name in names)} as real, "
            f"{_array(f'left(b.{name}::text, {SHOWN_MAX + 1})' for name in names)} as rebuilt, "
            f"{_array((self._column_differs(column) for column in self.shown), 'bool')} as differs, "
            f"{_array(f'(r.{ident(name)}::numeric - b.{ident(name)}::numeric)::text' for name in self.numeric)} as deltas, "
            f"{row_mark(key_values)} as mark from {self._joined()} "
            f"where {real} is null or {rebuilt} is null or {self._row_differs()}) as differing) as numbered "
            "order by turn, kind limit $1"
        )

    def marks(self, rebuild: str) -> str:
        """Return SQL for the marks of the differing rows.

        Columns: kind, mark, how often, a mark of each differing column, the mark in `samples`. At most $1 rows, in order. The mark
        is of the key, or else of the whole row. rebuild: replaces values that are the rebuild's own day or time, which differ
        in another rebuild.
        """
        if not self.key:
            shown = [
                self._value_or_rebuild_time(
                    column, f"c{n}", f"rebuilt > real and {_is_rebuild_time(column, f'c{n}')}", rebuild
                )
                for n, column in enumerate(self.columns)
            ]
            shown += [f"c{n}" for n in range(len(self.columns), len(self.shown))]
            plain = row_mark(f"c{n}" for n in range(len(self.columns)))
            return (
                "select case when real > rebuilt then 'extra' else 'missing' end as kind, "
                f"{row_mark(shown)} as mark, abs(real - rebuilt)::int8, array[]::int8[], {plain} "
                f"from ({self._row_counts()}) as counted where real <> rebuilt order by kind, mark limit $1"
            )
        real, rebuilt = f"r.{ident(self.key[0])}", f"b.{ident(self.key[0])}"
        by_name = {column.name: column for column in self.table.columns}
        key_values = self._key_values()
        keys = [
            self._value_or_rebuild_time(
                by_name[name],
                value,
                f"{real} is null and {_is_rebuild_time(by_name[name], f'b.{ident(name)}')}",
                rebuild,
            )
            for name, value in zip(self.key, key_values, strict=True)
        ]
        differing = _array((self._column_mark(n, column, rebuild) for n, column in enumerate(self.shown)), "int8")
        return (
            f"select case when {real} is null then 'missing' when {rebuilt} is null then 'extra' else 'different' end "
            f"as kind, {row_mark(keys)} as mark, 1::int8, array_remove({differing}, null), {row_mark(key_values)} from {self._joined()} "
            f"where {real} is null or {rebuilt} is null or {self._row_differs()} order by kind, mark limit $1"
        )

    def _column_mark(self, number: int, column: Column, rebuild: str) -> str:
        """Return SQL: a hash of the rebuilt value, null if not different."""
        real, value = f"r.{ident(column.name)}", f"b.{ident(column.name)}"
        given = self._value_or_rebuild_time(column, value, _is_rebuild_time(column, value), rebuild)
        return (
            f"case when {self._column_differs(column)} then hashtextextended('{number:d} ' || "
            f"case when {real} is null then 'some' when {value} is null then 'none' else {given} end, 0) end"
        )

    @staticmethod
    def _value_or_rebuild_time(column: Column, value: str, condition: str, rebuild: str) -> str:
        if not column.is_date_or_time:
            return _text(column, value)
        return f"case when {condition} then {literal(rebuild)} else {_text(column, value)} end"

    def column_sums(self, rebuild: str) -> str:
        """Return SQL for a hash of each column of the copy.

        The order of the rows does not matter. rebuild: as for `marks`.
        """
        by_name = {column.name: column for column in self.table.columns}
        columns_sql = ", ".join(
            f"sum(hashtextextended({self._value_or_rebuild_time(column, ident(name), _is_rebuild_time(column, ident(name)), rebuild)}, 0)::numeric)::text "
            f"as {ident(name)}"
            for name in [*self.key, *(column.name for column in self.columns)]
            if (column := by_name[name])
        )
        return f"select {columns_sql or 'null'} from {self.table.name.copy}"

    def clock_columns(self) -> str | None:
        """Return SQL: which columns hold the rebuild's time; None without times."""
        times = [column.name for column in self.table.columns if column.timestamp]
        columns_sql = ", ".join(f"coalesce(bool_or({ident(name)} = now()), false) as {ident(name)}" for name in times)
        return f"select {columns_sql} from {self.table.name.copy}" if times else None

    def _key_values(self) -> list[str]:
        return [f"coalesce(r.{ident(name)}, b.{ident(name)})" for name in self.key]

    def _joined(self) -> str:
        on = " and ".join(f"r.{ident(name)} = b.{ident(name)}" for name in self.key)
        return f"{self._real} as r full join {self.table.name.copy} as b on {on}"

    @property
    def _real(self) -> str:
        name = self.table.name.real
        return name if self.where == "true" else f"(select * from {name} where {self.where})"

    def _column_differs(self, column: Column) -> str:
        real, rebuilt = f"r.{ident(column.name)}", f"b.{ident(column.name)}"
        if column in self.null_only:
            return f"({real} is null) <> ({rebuilt} is null)"
        cast = "" if column.comparable else "::text"
        differs = f"{real}{cast} is distinct from {rebuilt}{cast}"
        if column.name in self.clocked:
            return f"case when {rebuilt} = now() then {real} is null else {differs} end"
        return differs

    def _row_differs(self) -> str:
        return " or ".join(self._column_differs(column) for column in self.shown) or "false"

    def _row_counts(self) -> str:
        """Return SQL: how often each row is in table and copy."""
        taken = [f"{self._counted_value(column)} as c{n}" for n, column in enumerate(self.shown)]
        both = " union all ".join(
            f"select {', '.join([*taken, f'{real} as real', f'{1 - real} as rebuilt'])} from {place} as side_{real:d}"
            for real, place in ((1, self._real), (0, self.table.name.copy))
        )
        columns = [f"c{n}" for n in range(len(self.shown))]
        group = f" group by {', '.join(columns)}" if columns else ""
        return f"select {', '.join([*columns, 'sum(real) as real', 'sum(rebuilt) as rebuilt'])} from ({both}) as both_{group}"

    def _counted_value(self, column: Column) -> str:
        name = ident(column.name)
        if column in self.null_only:
            return f"case when {name} is not null then 'not null' end"
        return name if column.comparable else f"{name}::text"


# The current minute, hour, …, year, in the local zone and in UTC: values that come from the clock, not from a message.
_MOMENTS = "unnest('{minute,hour,day,week,month,quarter,year}'::text[]) u, unnest(array[now(), clock_timestamp()]) t"
_REBUILD_TIMES = {
    "date": f"array(select date_trunc(u, x)::date from {_MOMENTS}, unnest(array[t::timestamp, t at time zone 'UTC']) x)",
    "timestamp": f"array(select date_trunc(u, x) from {_MOMENTS}, unnest(array[t::timestamp, t at time zone 'UTC']) x)",
    "timestamptz": f"array(select x from {_MOMENTS}, unnest(array[date_trunc(u, t), date_trunc(u, t, 'UTC')]) x)",
}


def _is_rebuild_time(column: Column, value: str) -> str:
    """Return SQL: whether a value is the rebuild's own day or time."""
    return f"coalesce({value} = any({_REBUILD_TIMES[column.type_name]}), false)" if column.is_date_or_time else "false"


def _text(column: Column, value: str) -> str:
    """Return SQL: a value as text, the same in all time zones."""
    return (
        f"(({value}) at time zone 'UTC')::text"
        if column.is_date_or_time and column.type_name == "timestamptz"
        else f"({value})::text"
    )


def _array(expressions: Iterable[str], kind: str = "text") -> str:
    return f"array[{', '.join(expressions)}]::{kind}[]"


def row_mark(expressions: Iterable[str]) -> str:
    """Return SQL: a hash of values, the same in both passes."""
    texts = ", ".join(f"({expression})::text" for expression in expressions)
    return f"encode(sha256(convert_to(row({texts})::text, 'UTF8')), 'hex')"
