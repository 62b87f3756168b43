"""The tables of a rebuild: how the copies are made and begin, what a statement may touch, how two tables are compared.

Decides and writes SQL, with every name quoted by `ident`; knows no connection. Copies live in pg_temp under the names of
their originals, so that whoever names a table without its schema meets the copy. What it cannot know: what a function
does inside. That is PostgreSQL's to refuse (the transaction is read only), and the rebuild's to notice afterwards.
"""

# ruff: noqa: S608 - every name in the SQL of this file is quoted by `ident`

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from consumer.core.errors import Misconfigured
from consumer.core.identifiers import ident
from consumer.postgres.sql_tokens import first_words

LEARNED = "IC001"  # SQLSTATE of the triggers that tell how a table is used
OURS = "consumer"  # the schema that no handler may touch
NOW = "written as now()"
IGNORED = "--ignore"
GENERATED = "generated"
UPSERT = "Upsert"  # among the operations of a plan
SHOWN_MAX = 200  # characters of a value in an answer
_DEFAULT_MAX = 80
_AFTER = ("consumer_after", "consumer_after")

# What gives another value at another time, in another order or session.
_MOVING = re.compile(
    r"\b(nextval|now|current_timestamp|current_date|current_time|localtimestamp|localtime|clock_timestamp"
    r"|statement_timestamp|transaction_timestamp|timeofday|random|random_normal|gen_random_uuid|gen_random_bytes|uuidv4"
    r"|uuidv7|uuid_generate_v[0-9a-z]+|txid_current|pg_current_xact_id|pg_backend_pid|current_user|session_user)\b",
    re.IGNORECASE,
)
# Types whose `=` says that two values are the same; points have none, and that of boxes compares their areas.
_COMPARABLE_CATEGORIES = frozenset("NSBDTIEV")
_COMPARABLE_TYPES = frozenset({"uuid", "bytea", "jsonb", "pg_lsn"})


def literal(text: str) -> str:
    """Text as SQL, quoted (standard_conforming_strings is on)."""
    if "\0" in text:
        raise Misconfigured("text with a NUL cannot be sent to PostgreSQL")
    return "'" + text.replace("'", "''") + "'"


class Name(NamedTuple):
    """A relation by its schema and name."""

    schema: str
    table: str

    @property
    def real(self) -> str:
        """The real one, as SQL."""
        return f"{ident(self.schema)}.{ident(self.table)}"

    @property
    def copy(self) -> str:
        """Its copy, as SQL."""
        return f"pg_temp.{ident(self.table)}"

    def __str__(self) -> str:
        return f"{self.schema}.{self.table}"


class DefaultSequence(NamedTuple):
    """A sequence that a default takes numbers from: how PostgreSQL writes it there, and its name."""

    written: str
    name: str


@dataclass(frozen=True, slots=True)
class Column:
    """A column, as far as a copy and a comparison need to know it."""

    name: str
    not_null: bool = False
    default: str | None = None
    identity: bool = False
    generated: bool = False
    type_name: str = "text"
    category: str = "S"  # pg_type.typcategory
    built_in: bool = True
    sequences: tuple[DefaultSequence, ...] = ()

    @property
    def moves(self) -> bool:
        """Whether its default depends on when, and in which order, it is asked for."""
        return self.identity or (self.default is not None and moving(self.default))

    @property
    def comparable(self) -> bool:
        """Whether `=` compares its values; else their texts are compared."""
        if self.category == "E":
            return True
        return self.built_in and (self.category in _COMPARABLE_CATEGORIES or self.type_name in _COMPARABLE_TYPES)

    @property
    def numeric(self) -> bool:
        return self.built_in and self.category == "N" and self.type_name not in ("money", "oid")

    @property
    def timestamp(self) -> bool:
        return self.built_in and self.type_name in ("timestamptz", "timestamp")

    @property
    def dated(self) -> bool:
        """Whether its values may be taken from the clock."""
        return self.built_in and self.type_name in ("date", "timestamp", "timestamptz")

    @property
    def why(self) -> str:
        """Why it is not compared, when it moves."""
        return "identity" if self.identity else f"default {self.default}"[:_DEFAULT_MAX]


class Constraint(NamedTuple):
    """A key or an exclusion, as PostgreSQL describes it."""

    name: str
    definition: str
    deferrable: bool = False
    deferred: bool = False  # initially


@dataclass(frozen=True, slots=True)
class Table:
    """A real table that is copied. keys: of columns that are not null, the primary key first."""

    name: Name
    oid: int
    columns: tuple[Column, ...]
    keys: tuple[tuple[str, ...], ...] = ()
    constraints: tuple[Constraint, ...] = ()
    triggers: tuple[str, ...] = ()  # of users: a copy has none of them
    row_security: bool = False  # hides rows from the role of this connection
    rules: tuple[str, ...] = ()


@dataclass(slots=True)
class Use:
    """How handlers use a table, as far as it is known. One that none of them inserts into begins with its real rows."""

    inserted: bool = False
    updated: set[str] = field(default_factory=set)
    deleted: bool = False


def moving(expression: str) -> bool:
    """Whether an expression gives another value when it is asked again, in a rebuild for example."""
    return _MOVING.search(re.sub("'(?:[^']|'')*'", "''", expression)) is not None


def statements(sql: str) -> Iterator[str]:
    """The statements of a text, one by one. A semicolon inside quotes, comments or a function's body ends none.

    For each semicolon it is asked whether the words after it would begin a statement.
    """
    start = at = 0
    while (at := sql.find(";", at)) >= 0:
        if first_words(f"{sql[start:at]} ;{' '.join(_AFTER)}")[-1:] == [_AFTER]:
            if first_words(sql[start:at]):
                yield sql[start:at].strip()
            start = at + 1
        at += 1
    if first_words(sql[start:]):
        yield sql[start:].strip()


# -- copies -------------------------------------------------------------------------------------------------------------


class Copying(NamedTuple):
    """How the copy of a table is made, and the sequence that tells, for a column, whether its moving default was used."""

    statements: list[str]
    counters: dict[str, str]


class Copier:
    """Writes the SQL that makes copies; keeps the names that are taken in pg_temp.

    numbers_from: where the sequences of the copies start.
    """

    def __init__(self, numbers_from: int = 1) -> None:
        self._numbers_from = numbers_from
        self._taken: dict[str, str] = {}  # name in pg_temp -> what it stands for
        self._counters = 0

    def copy(self, table: Table) -> Copying:
        """The copy without its rows. Raises Misconfigured for a second table of one name."""
        other = self._taken.setdefault(table.name.table, str(table.name))
        if other != str(table.name):
            raise Misconfigured(
                f"{other} and {table.name} have one name, and a rebuild can have a copy of one of them only: "
                "replay their handlers one after the other with --handler"
            )
        copy = table.name.copy
        made = [
            f"create temp table {ident(table.name.table)} "
            f"(like {table.name.real} including all excluding comments excluding statistics)"
        ]
        counters: dict[str, str] = {}
        for column in table.columns:
            default = column.default
            if default is None or column.generated or column.identity:
                continue
            for sequence in column.sequences:
                own, fresh = self._sequence(sequence)
                start = f" start {self._numbers_from:d}" if self._numbers_from != 1 else ""
                made += [f"create temp sequence {ident(own)}{start}"] if fresh else []
                name = literal(f"pg_temp.{ident(own)}")
                default = default.replace(f"{literal(sequence.written)}::regclass", f"{name}::regclass")
            if column.moves:
                # What the default gives cannot be compared, what a handler gives in its place can: so a use is noted. By
                # setval(), which a rollback does not undo, and which leaves lastval() alone.
                self._counters += 1
                counter = f"consumer_used_{self._counters}"
                made.append(f"create temp sequence {counter}")
                counters[column.name] = f"pg_temp.{counter}"
                default = f"case when setval('pg_temp.{counter}'::regclass, 1) > 0 then {default} end"
            if default != column.default:
                made.append(f"alter table {copy} alter column {ident(column.name)} set default {default}")
        return Copying(made, counters)

    def _sequence(self, sequence: DefaultSequence) -> tuple[str, bool]:
        for name in (sequence.name, *(f"{sequence.name[:55]}_{n}" for n in range(1, 1000))):
            if name not in self._taken:
                self._taken[name] = sequence.written
                return name, True
            if self._taken[name] == sequence.written:
                return name, False
        raise AssertionError("a thousand sequences of one name")


def renamings(table: Table, made: Sequence[Constraint]) -> list[str]:
    """Give the keys of a copy the names of their originals, which `on conflict on constraint` may use.

    made: the constraints of the copy. In two steps, because PostgreSQL may have named one like another's original.
    """
    left = {each.name: each.definition for each in made}
    pairs: list[tuple[str, str]] = []
    for wanted in table.constraints:
        found = next((name for name, text in left.items() if text == wanted.definition), None)
        if found is not None:
            del left[found]
            if found != wanted.name:
                pairs.append((found, wanted.name))
    alter = f"alter table {table.name.copy} rename constraint"
    return [f"{alter} {ident(old)} to consumer_renamed_{n}" for n, (old, _) in enumerate(pairs)] + [
        f"{alter} consumer_renamed_{n} to {ident(new)}" for n, (_, new) in enumerate(pairs)
    ]


class Filling(NamedTuple):
    """How a copy is filled: with the defaults of what handlers update, or as it is, and why that says nothing."""

    sql: str
    as_it_is: str
    doubt: str | None


def first_rows(table: Table, use: Use, with_base: bool, real: Collection[str] = frozenset()) -> Filling | None:
    """What a copy begins with; None when it begins empty.

    Rows that no handler inserts are taken over, and the columns that handlers update begin with their defaults. Where
    that cannot be, it is only a doubt for now: the statement that inserts may be the next one. real: columns that begin
    with what is there now, whatever is known of the table.
    """
    if with_base or (use.inserted and not real):
        return None
    every = [each for each in table.columns if not each.generated]
    kept = [each for each in every if each.name not in use.updated or each.name in real or use.inserted]
    unknown = [
        each.name for each in every if each not in kept and each.not_null and each.default is None and not each.identity
    ]
    doubt = None
    if use.inserted:
        pass
    elif use.deleted:
        doubt = f"{table.name}: handlers delete from it and none inserts into it, so what they deleted is not known"
    elif unknown:
        doubt = f"{table.name}: handlers update {', '.join(unknown)}, which has no default, so nobody knows what it began with"
    elif not kept:
        doubt = f"{table.name}: handlers update all of its columns, so nobody knows what they began with"

    def taking(columns: Sequence[Column]) -> str:
        names = ", ".join(ident(each.name) for each in columns)
        return f"insert into {table.name.copy} ({names}) overriding system value select {names} from {table.name.real}"

    return Filling(taking(every if doubt else kept), taking(every), doubt)


def learning(number: int, table: Table, use: Use) -> list[str]:
    """Triggers on a copy with real rows that raise LEARNED when it is inserted into, or another column is updated.

    They fire once a statement, for no rows too. Those of single columns come first and take notes, so that one
    exception tells all columns of an UPDATE. Of columns that are known already there are none: they cost nothing.
    """
    if use.inserted:
        return []
    copy, call = table.name.copy, "for each statement execute function pg_temp.consumer_learn"
    made = [f"create trigger consumer_learn_i before insert on {copy} {call}('{number}', 'insert')"]
    if not use.deleted:
        made.append(f"create trigger consumer_learn_d before delete on {copy} {call}('{number}', 'delete')")
    unknown = [
        (place, each.name)
        for place, each in enumerate(table.columns)
        if not each.generated and each.name not in use.updated
    ]
    for place, name in unknown:
        made.append(
            f"create trigger consumer_learn_a{place} before update of {ident(name)} on {copy} "
            f"{call}('{number}', 'note', '{place}')"
        )
    if unknown:
        columns = ", ".join(ident(name) for _, name in unknown)
        made.append(
            f"create trigger consumer_learn_b before update of {columns} on {copy} {call}('{number}', 'update')"
        )
    return made


LEARN_FUNCTION = f"""
create function pg_temp.consumer_learn() returns trigger language plpgsql as $learn$
declare noted text := coalesce(current_setting('consumer.noted', true), '');
begin
    if tg_argv[1] = 'note' then
        perform set_config('consumer.noted', noted || ' ' || tg_argv[2], true);
        return null;
    end if;
    if tg_argv[1] in ('insert', 'delete') then
        noted := '';
    end if;
    raise exception using errcode = '{LEARNED}', message = 'consumer: a table is used in a way that was not known',
        detail = tg_argv[0] || ' ' || tg_argv[1] || noted;
end $learn$
"""


def learned(detail: str, tables: Sequence[Table], known: Mapping[Name, Use]) -> Name:
    """Note in `known` what a learning trigger told, and return the table."""
    number, how, *places = detail.split()
    table = tables[int(number)]
    use = known[table.name]
    if how == "insert":
        use.inserted = True
    if how == "delete":
        use.deleted = True
    use.updated |= {table.columns[int(each)].name for each in places}
    return table.name


# -- statements ---------------------------------------------------------------------------------------------------------


class Touch(NamedTuple):
    """A real relation that a statement touches. kind: pg_class.relkind. part: of a partitioned or inherited table."""

    name: Name
    kind: str
    part: bool
    written: bool  # or its rows locked
    inserted: bool


class Judgement(NamedTuple):
    """What to do about a statement: refuse it, or begin again with copies of these tables. Neither: run it."""

    refusal: str | None
    copies: dict[Name, bool]  # and whether it is known to insert into them


def operations(plan: Any) -> dict[Name, set[str]]:
    """The relations of an `explain (verbose, format json)`, with what is done to each (Insert, Update, …, or read)."""
    found: dict[Name, set[str]] = {}
    pending = [plan]
    while pending:
        each = pending.pop()
        if isinstance(each, list):
            pending += each
        elif isinstance(each, dict):
            if "Relation Name" in each and "Schema" in each:
                name = Name(each["Schema"], each["Relation Name"])
                found.setdefault(name, set()).add(each.get("Operation", "read"))
                if "Conflict Resolution" in each:
                    found[name].add(UPSERT)
            pending += [value for value in each.values() if isinstance(value, dict | list)]
    return found


def judge(touches: Sequence[Touch], shadows: Mapping[Name, Name]) -> Judgement:
    """Whether a statement stays within the copies.

    touches: the real relations that it touches. shadows: real relations whose rows are those of a table that has a
    copy: itself, its partitions, views of it. What is only read and has no copy is the same here as there, so it is read
    where it is.
    """
    for each in touches:
        if each.name.schema == OURS:
            return Judgement(f"touches {each.name}, which is the framework's own", {})
    views = [each for each in touches if each.kind in "vm"]
    for each in [*views, *touches]:
        table = shadows.get(each.name)
        if table is None:
            continue
        if each.kind in "vm":
            return Judgement(f"reads {table} through the view {each.name}, which shows the real table only", {})
        if table == each.name:
            return Judgement(f"names {table} with its schema, and so means the real table: leave the schema out", {})
        return Judgement(f"names {each.name}, a part of {table}: name {table.table} itself", {})
    copies: dict[Name, bool] = {}
    for each in touches:
        if not each.written:
            continue
        if each.kind in "vm":
            return Judgement(f"writes or locks through the view {each.name}: name its table", {})
        if each.kind == "f":
            return Judgement(f"writes to {each.name}, a foreign table: its rows are in another place", {})
        if each.part:
            return Judgement(f"writes to {each.name}, a part of another table or one with parts: that has no copy", {})
        copies[each.name] = copies.get(each.name, False) or each.inserted
    return Judgement(None, copies)


# -- comparison ---------------------------------------------------------------------------------------------------------


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
    use: Use,
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
                f"{_mark(f'c{n}' for n in range(len(self.columns)))} as mark, "
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
            f"{_mark(either)} as mark from {self._joined()} "
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
            plain = _mark(f"c{n}" for n in range(len(self.columns)))
            return (
                "select case when real > rebuilt then 'extra' else 'missing' end as kind, "
                f"{_mark(every)} as mark, abs(real - rebuilt)::int8, array[]::int8[], {plain} "
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
            f"as kind, {_mark(keys)} as mark, 1::int8, array_remove({differing}, null), {_mark(either)} from {self._joined()} "
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


def _mark(expressions: Iterable[str]) -> str:
    """A row's columns as a hash of their texts: of one length, and the same in both passes."""
    texts = ", ".join(f"({each})::text" for each in expressions)
    return f"encode(sha256(convert_to(row({texts})::text, 'UTF8')), 'hex')"


# -- the messages behind a difference -----------------------------------------------------------------------------------

SOUGHT = (
    "create temp table consumer_sought (place int4 not null, mark text not null, deltas jsonb not null, "
    "primary key (place, mark))",
    "create temp table consumer_touched (place int4 not null, mark text not null, explains bool not null)",
)


def tracing(place: int, comparison: Comparison) -> list[str]:
    """A trigger on a copy that notes when a sought row is touched, and whether that changed a number by the difference."""
    name, copy = f"pg_temp.consumer_touch_{place}", comparison.table.name.copy

    def mark(of: str) -> str:
        return _mark(f"{of}.{ident(each)}" for each in comparison.marked)

    explains = " or ".join(
        f"abs(cast(s.deltas ->> {literal(each)} as numeric)) = "
        f"abs(coalesce(new.{ident(each)}, 0)::numeric - coalesce(old.{ident(each)}, 0)::numeric)"
        for each in comparison.numeric
    )
    body = f"""
declare
    before text := case when tg_op <> 'INSERT' then {mark("old")} end;
    after text := case when tg_op <> 'DELETE' then {mark("new")} end;
begin
    insert into pg_temp.consumer_touched select s.place, s.mark, coalesce({explains or "false"}, false)
    from pg_temp.consumer_sought s where s.place = {place} and s.mark in (before, after);
    return null;
end"""
    return [
        f"create function {name}() returns trigger language plpgsql as {literal(body)}",
        f"create trigger consumer_touch after insert or update or delete on {copy} for each row execute function {name}()",
    ]


def compaction(table: Table) -> list[str]:
    """Write a copy anew without the dead versions of its rows, which the one long transaction can drop in no other way."""
    columns = ", ".join(ident(each.name) for each in table.columns if not each.generated)
    copy = table.name.copy
    return [
        f"create temp table consumer_side as select {columns} from {copy}",
        f"alter table {copy} disable trigger user",
        f"truncate {copy}",
        f"insert into {copy} ({columns}) overriding system value select {columns} from pg_temp.consumer_side",
        f"alter table {copy} enable trigger user",
        "drop table pg_temp.consumer_side",
        f"analyze {copy}",
    ]
