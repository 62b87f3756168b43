"""The SQL that makes copies of tables, fills them, and learns how handlers use them.

Pure: every name is quoted by `ident`; runs nothing.
"""

# ruff: noqa: S608 - every name in the SQL of this file is quoted by `ident`

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from consumer.core.errors import Misconfigured
from consumer.core.identifiers import ident
from consumer.rebuild.table_model import (
    Column,
    Constraint,
    DefaultSequence,
    Name,
    Table,
    TableUsage,
    literal,
)

LEARNED = "IC001"  # SQLSTATE of the triggers that tell how a table is used


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


def first_rows(table: Table, use: TableUsage, with_base: bool, real: Collection[str] = frozenset()) -> Filling | None:
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


def learning(number: int, table: Table, use: TableUsage) -> list[str]:
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


def learned(detail: str, tables: Sequence[Table], known: Mapping[Name, TableUsage]) -> Name:
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
