"""The SQL that compares a table with its copy, and which columns are left out.

Pure: every name is quoted by `ident`; runs nothing.
"""

# ruff: noqa: S608 - every name in the SQL of this file is quoted by `ident`

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from consumer.core.errors import Misconfigured
from consumer.core.identifiers import ident
from consumer.rebuild.table_model import Column, Name, Table, TableUsage, literal

NOW = "written as now()"
IGNORED = "--ignore"
GENERATED = "generated"
SHOWN_MAX = 200  # characters of a value in an answer


def named(given: Sequence[str], option: str, columns: Iterable[tuple[Name, str]]) -> set[tuple[Name, str]]:
    """The columns that `column`, `table.column` or `schema.table.column` means.

    Raises Misconfigured for one that no table has, with names that are near it.
    """
    found: set[tuple[Name, str]] = set()
    forms: dict[str, list[tuple[Name, str]]] = {}
    for name, column in columns if given else ():
        for form in (column, f"{name.table}.{column}", f"{name}.{column}"):
            forms.setdefault(form, []).append((name, column))
    for text in given:
        if text not in forms:
            near = difflib.get_close_matches(text, forms, 3)
            raise Misconfigured(
                f"{option} {text}: no table has such a column"
                + (f", did you mean {' or '.join(near)}?" if near else "")
                + " (write column, table.column or schema.table.column)"
            )
        found |= set(forms[text])
    return found


def left_out(
    table: Table,
    use: TableUsage,
    ignore: set[tuple[Name, str]],
    compare: set[tuple[Name, str]],
    used: set[str],
    nows: set[str],
    drawn: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The columns that are not compared, each with the reason.

    used: columns whose moving default gave a value in the rebuild. nows: columns that hold the time of the rebuild.
    drawn: columns that another rebuild has shown to be drawn, each with what to say.
    """
    reasons: dict[str, str] = {}
    for column in table.columns:
        if (table.name, column.name) in compare:
            continue
        if (table.name, column.name) in ignore:
            reasons[column.name] = IGNORED
        elif column.generated:
            reasons[column.name] = GENERATED
        elif column.moves and (column.name in used or (not use.inserted and column.name in use.updated)):
            reasons[column.name] = column.why
        elif column.name in nows:
            reasons[column.name] = NOW
        elif drawn and column.name in drawn:
            reasons[column.name] = drawn[column.name]
    return reasons


def key_of(table: Table, ignored: Mapping[str, str]) -> tuple[str, ...]:
    """The columns to match rows by, none when only whole rows can be counted."""
    return next((key for key in table.keys if not any(each in ignored for each in key)), ())


@dataclass(frozen=True, slots=True)
class Comparison:
    """The SQL that compares a table with its copy. Counts first: samples are only worth asking for where they differ."""

    table: Table
    key: tuple[str, ...]
    columns: tuple[Column, ...]  # compared, without those of the key
    null_only: tuple[Column, ...] = ()  # values that no rebuild can give again: compared as null or not null
    clocked: frozenset[str] = frozenset()  # of `columns`: hold the rebuild's own time in some rows
    where: str = "true"  # which real rows are compared, as SQL

    @property
    def shown(self) -> tuple[Column, ...]:
        """The columns of a sample, in order."""
        return self.columns + self.null_only

    @property
    def marked(self) -> tuple[str, ...]:
        """The columns by which a row is known again."""
        return self.key or tuple(each.name for each in self.columns)

    @property
    def numeric(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.columns if each.numeric) if self.key else ()

    def counts(self) -> str:
        """rows, rebuilt, missing, extra, different."""
        if not self.key:
            return (
                "select coalesce(sum(real), 0)::int8, coalesce(sum(rebuilt), 0)::int8, "
                "coalesce(sum(greatest(rebuilt - real, 0)), 0)::int8, coalesce(sum(greatest(real - rebuilt, 0)), 0)::int8, "
                f"0::int8 from ({self._counted()}) as counted"
            )
        real, rebuilt = f"r.{ident(self.key[0])}", f"b.{ident(self.key[0])}"
        return (
            f"select count({real}), count({rebuilt}), count(*) filter (where {real} is null), "
            f"count(*) filter (where {rebuilt} is null), "
            f"count(*) filter (where {real} is not null and {rebuilt} is not null and ({self._differs()})) "
            f"from {self._joined()}"
        )

    def samples(self) -> str:
        """kind, count, key, real, rebuilt, differs, deltas, mark: at most $1 rows, of every kind in turn."""
        if not self.key:
            shown = _array(f"left(c{n}::text, {SHOWN_MAX + 1})" for n in range(len(self.shown)))
            order = ", ".join(["kind", *(f"c{n}" for n in range(len(self.shown)))])
            return (
                "select kind, count, array[]::text[] as key, shown as real, shown as rebuilt, array[]::bool[] as differs, "
                f"array[]::text[] as deltas, mark from (select kind, abs(real - rebuilt)::int8 as count, {shown} as shown, "
                f"{row_mark(f'c{n}' for n in range(len(self.columns)))} as mark, "
                f"row_number() over (partition by kind order by {order}) as place from "
                f"(select *, case when real > rebuilt then 'extra' else 'missing' end as kind from ({self._counted()}) "
                "as counted where real <> rebuilt) as differing) as numbered order by place, kind limit $1"
            )
        real, rebuilt = f"r.{ident(self.key[0])}", f"b.{ident(self.key[0])}"
        either = self._either()
        names = [ident(each.name) for each in self.shown]
        return (
            "select kind, 1::int8 as count, key, real, rebuilt, differs, deltas, mark from (select *, "
            "row_number() over (partition by kind order by place) as turn from ("
            f"select case when {real} is null then 'missing' when {rebuilt} is null then 'extra' else 'different' end as kind, "
            f"row({', '.join(either)}) as place, "
            f"{_array(f'left({each}::text, {SHOWN_MAX + 1})' for each in either)} as key, "
            f"{_array(f'left(r.{each}::text, {SHOWN_MAX + 1})' for each in names)} as real, "
            f"{_array(f'left(b.{each}::text, {SHOWN_MAX + 1})' for each in names)} as rebuilt, "
            f"{_array((self._differ(each) for each in self.shown), 'bool')} as differs, "
            f"{_array(f'(r.{ident(each)}::numeric - b.{ident(each)}::numeric)::text' for each in self.numeric)} as deltas, "
            f"{row_mark(either)} as mark from {self._joined()} "
            f"where {real} is null or {rebuilt} is null or {self._differs()}) as differing) as numbered "
            "order by turn, kind limit $1"
        )

    def marks(self, rebuild: str) -> str:
        """kind, a mark of every row that differs, how often, a mark of each column that does, and its mark in `samples`.

        At most $1, in order. The mark of a row with a key is one of the key, else one of the whole row. rebuild: stands for
        values that are the rebuild's own day or time, which another one makes otherwise.
        """
        if not self.key:
            every = [
                self._own_or(each, f"c{n}", f"rebuilt > real and {_own(each, f'c{n}')}", rebuild)
                for n, each in enumerate(self.columns)
            ]
            every += [f"c{n}" for n in range(len(self.columns), len(self.shown))]
            plain = row_mark(f"c{n}" for n in range(len(self.columns)))
            return (
                "select case when real > rebuilt then 'extra' else 'missing' end as kind, "
                f"{row_mark(every)} as mark, abs(real - rebuilt)::int8, array[]::int8[], {plain} "
                f"from ({self._counted()}) as counted where real <> rebuilt order by kind, mark limit $1"
            )
        real, rebuilt = f"r.{ident(self.key[0])}", f"b.{ident(self.key[0])}"
        by_name = {each.name: each for each in self.table.columns}
        either = self._either()
        keys = [
            self._own_or(by_name[name], each, f"{real} is null and {_own(by_name[name], f'b.{ident(name)}')}", rebuild)
            for name, each in zip(self.key, either, strict=True)
        ]
        differing = _array((self._column_mark(n, each, rebuild) for n, each in enumerate(self.shown)), "int8")
        return (
            f"select case when {real} is null then 'missing' when {rebuilt} is null then 'extra' else 'different' end "
            f"as kind, {row_mark(keys)} as mark, 1::int8, array_remove({differing}, null), {row_mark(either)} from {self._joined()} "
            f"where {real} is null or {rebuilt} is null or {self._differs()} order by kind, mark limit $1"
        )

    def _column_mark(self, number: int, column: Column, rebuild: str) -> str:
        """A hash of what the rebuild gives for a column, null where it does not differ."""
        real, value = f"r.{ident(column.name)}", f"b.{ident(column.name)}"
        given = self._own_or(column, value, _own(column, value), rebuild)
        return (
            f"case when {self._differ(column)} then hashtextextended('{number:d} ' || "
            f"case when {real} is null then 'some' when {value} is null then 'none' else {given} end, 0) end"
        )

    @staticmethod
    def _own_or(column: Column, value: str, condition: str, rebuild: str) -> str:
        if not column.dated:
            return _text(column, value)
        return f"case when {condition} then {literal(rebuild)} else {_text(column, value)} end"

    def sums(self, rebuild: str) -> str:
        """A hash of every column of the copy, whatever the order of its rows. rebuild: as for `marks`."""
        by_name = {each.name: each for each in self.table.columns}
        asked = ", ".join(
            f"sum(hashtextextended({self._own_or(column, ident(name), _own(column, ident(name)), rebuild)}, 0)::numeric)::text "
            f"as {ident(name)}"
            for name in [*self.key, *(each.name for each in self.columns)]
            if (column := by_name[name])
        )
        return f"select {asked or 'null'} from {self.table.name.copy}"

    def nows(self) -> str | None:
        """Which columns hold the time of the rebuild: a value of each, and None where there are no times."""
        times = [each.name for each in self.table.columns if each.timestamp]
        asked = ", ".join(f"coalesce(bool_or({ident(each)} = now()), false) as {ident(each)}" for each in times)
        return f"select {asked} from {self.table.name.copy}" if times else None

    def _either(self) -> list[str]:
        return [f"coalesce(r.{ident(each)}, b.{ident(each)})" for each in self.key]

    def _joined(self) -> str:
        on = " and ".join(f"r.{ident(each)} = b.{ident(each)}" for each in self.key)
        return f"{self._real} as r full join {self.table.name.copy} as b on {on}"

    @property
    def _real(self) -> str:
        name = self.table.name.real
        return name if self.where == "true" else f"(select * from {name} where {self.where})"

    def _differ(self, column: Column) -> str:
        real, rebuilt = f"r.{ident(column.name)}", f"b.{ident(column.name)}"
        if column in self.null_only:
            return f"({real} is null) <> ({rebuilt} is null)"
        cast = "" if column.comparable else "::text"
        differs = f"{real}{cast} is distinct from {rebuilt}{cast}"
        if column.name in self.clocked:
            return f"case when {rebuilt} = now() then {real} is null else {differs} end"
        return differs

    def _differs(self) -> str:
        return " or ".join(self._differ(each) for each in self.shown) or "false"

    def _counted(self) -> str:
        """How often each row stands in the real table and in its copy."""
        taken = [f"{self._counted_value(each)} as c{n}" for n, each in enumerate(self.shown)]
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


# Beginnings of what the rebuild runs in, here and in UTC: values that a handler made of the clock, and not of its message.
_MOMENTS = "unnest('{minute,hour,day,week,month,quarter,year}'::text[]) u, unnest(array[now(), clock_timestamp()]) t"
_OWN = {
    "date": f"array(select date_trunc(u, x)::date from {_MOMENTS}, unnest(array[t::timestamp, t at time zone 'UTC']) x)",
    "timestamp": f"array(select date_trunc(u, x) from {_MOMENTS}, unnest(array[t::timestamp, t at time zone 'UTC']) x)",
    "timestamptz": f"array(select x from {_MOMENTS}, unnest(array[date_trunc(u, t), date_trunc(u, t, 'UTC')]) x)",
}


def _own(column: Column, value: str) -> str:
    """Whether a value is the rebuild's own day or time."""
    return f"coalesce({value} = any({_OWN[column.type_name]}), false)" if column.dated else "false"


def _text(column: Column, value: str) -> str:
    """A value as text, the same in all time zones."""
    return (
        f"(({value}) at time zone 'UTC')::text"
        if column.dated and column.type_name == "timestamptz"
        else f"({value})::text"
    )


def _array(expressions: Iterable[str], kind: str = "text") -> str:
    return f"array[{', '.join(expressions)}]::{kind}[]"


def row_mark(expressions: Iterable[str]) -> str:
    """A row's columns as a hash of their texts: of one length, and the same in both passes."""
    texts = ", ".join(f"({each})::text" for each in expressions)
    return f"encode(sha256(convert_to(row({texts})::text, 'UTF8')), 'hex')"
