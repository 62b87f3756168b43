"""SQL that copies tables, and notes how handlers use them.

Pure. Every name is quoted by `ident`.
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

LEARNED = "IC001"  # SQLSTATE of the triggers that report how a table is used


class CopySql(NamedTuple):
    """The statements that copy a table.

    counters: by column, a sequence that is called when its volatile default gives a value.
    """

    statements: list[str]
    counters: dict[str, str]


class Copier:
    """Writes the SQL of copies, and keeps the names used in pg_temp.

    sequence_start: the first value of the copies' sequences.
    """

    def __init__(self, sequence_start: int = 1) -> None:
        self._sequence_start = sequence_start
        self._taken: dict[str, str] = {}  # name in pg_temp -> the real name
        self._counters = 0

    def copy(self, table: Table) -> CopySql:
        """Return the SQL of an empty copy.

        Raises Misconfigured for a second table of the same name.
        """
        other = self._taken.setdefault(table.name.table, str(table.name))
        if other != str(table.name):
            raise Misconfigured(
                f"{other} and {table.name}: they have one name, and a rebuild can copy only one of them; "
                "rebuild their handlers one after the other with --handler"
            )
        copy = table.name.copy
        statements = [
            f"create temp table {ident(table.name.table)} "
            f"(like {table.name.real} including all excluding comments excluding statistics)"
        ]
        counters: dict[str, str] = {}
        for column in table.columns:
            default = column.default
            if default is None or column.generated or column.identity:
                continue
            for sequence in column.sequences:
                created, own = self._sequence(sequence)
                statements += created
                default = default.replace(f"{literal(sequence.written)}::regclass", f"{literal(own)}::regclass")
            if column.has_volatile_default:
                # A value of the default cannot be compared, but one that a handler gives can: so uses of the default are
                # noted. setval() survives a rollback and does not change lastval().
                self._counters += 1
                counter = f"consumer_used_{self._counters}"
                statements.append(f"create temp sequence {counter}")
                counters[column.name] = f"pg_temp.{counter}"
                default = f"case when setval('pg_temp.{counter}'::regclass, 1) > 0 then {default} end"
            if default != column.default:
                statements.append(f"alter table {copy} alter column {ident(column.name)} set default {default}")
        return CopySql(statements, counters)

    def _sequence(self, sequence: DefaultSequence) -> tuple[list[str], str]:
        """Return the SQL for a sequence's copy, and the copy's name.

        No SQL if the copy exists.
        """
        for name in (sequence.name, *(f"{sequence.name[:55]}_{n}" for n in range(1, 1000))):
            own = f"pg_temp.{ident(name)}"
            if name not in self._taken:
                self._taken[name] = sequence.written
                start = f" start {self._sequence_start:d}" if self._sequence_start != 1 else ""
                return [f"create temp sequence {ident(name)}{start}"], own
            if self._taken[name] == sequence.written:
                return [], own
        raise AssertionError("a thousand sequences of one name")


def renamings(table: Table, constraints: Sequence[Constraint]) -> list[str]:
    """Return SQL that gives a copy's keys the names of their originals.

    `on conflict on constraint` may use these names. constraints: of the copy. Renames in two steps, because PostgreSQL may
    have given one key the name of another key's original.
    """
    left = {constraint.name: constraint.definition for constraint in constraints}
    pairs: list[tuple[str, str]] = []
    for wanted in table.constraints:
        current = next((name for name, text in left.items() if text == wanted.definition), None)
        if current is not None:
            del left[current]
            if current != wanted.name:
                pairs.append((current, wanted.name))
    alter = f"alter table {table.name.copy} rename constraint"
    return [f"{alter} {ident(old)} to consumer_renamed_{n}" for n, (old, _) in enumerate(pairs)] + [
        f"{alter} consumer_renamed_{n} to {ident(new)}" for n, (_, new) in enumerate(pairs)
    ]


class Filling(NamedTuple):
    """SQL that fills a copy.

    sql: takes the real rows, with defaults in the columns that handlers update. as_it_is: takes the real rows unchanged.
    doubt: why the copy does not begin as the table did, if so.
    """

    sql: str
    as_it_is: str
    doubt: str | None


def first_rows(table: Table, use: TableUsage, with_base: bool, real: Collection[str] = frozenset()) -> Filling | None:
    """Return how to fill a copy; None if it begins empty.

    Rows that no handler inserts are copied, and the columns that handlers update begin with their defaults. Where this is
    impossible, it is only a doubt for now: the next statement may insert. with_base: the first rows come from --base. real:
    columns that begin with their real values in any case.
    """
    if with_base or (use.inserted and not real):
        return None
    writable = [column for column in table.columns if not column.generated]
    kept = [column for column in writable if column.name not in use.updated or column.name in real or use.inserted]
    unknown = [
        column.name
        for column in writable
        if column not in kept and column.not_null and column.default is None and not column.identity
    ]
    doubt = None
    if use.inserted:
        pass
    elif use.deleted:
        doubt = f"{table.name}: handlers delete from it and none inserts into it, so what they deleted is not known"
    elif unknown:
        doubt = (
            f"{table.name}: handlers update {', '.join(unknown)}, which has no default, so its first values are unknown"
        )
    elif not kept:
        doubt = f"{table.name}: handlers update all of its columns, so their first values are unknown"

    def taking(columns: Sequence[Column]) -> str:
        names = ", ".join(ident(column.name) for column in columns)
        return f"insert into {table.name.copy} ({names}) overriding system value select {names} from {table.name.real}"

    return Filling(taking(writable if doubt else kept), taking(writable), doubt)


def learning(number: int, table: Table, use: TableUsage) -> list[str]:
    """Return triggers that raise LEARNED at a new use of a copy.

    For copies with real rows: an insert, a delete, or an update of another column. They fire once for each statement, even
    without rows. Those of single columns run first and take notes, so that one exception names all columns of an UPDATE.
    A use that is known already has no trigger, and costs nothing.
    """
    if use.inserted:
        return []
    copy, call = table.name.copy, "for each statement execute function pg_temp.consumer_learn"
    triggers = [f"create trigger consumer_learn_i before insert on {copy} {call}('{number}', 'insert')"]
    if not use.deleted:
        triggers.append(f"create trigger consumer_learn_d before delete on {copy} {call}('{number}', 'delete')")
    unknown = [
        (place, column.name)
        for place, column in enumerate(table.columns)
        if not column.generated and column.name not in use.updated
    ]
    for place, name in unknown:
        triggers.append(
            f"create trigger consumer_learn_a{place} before update of {ident(name)} on {copy} "
            f"{call}('{number}', 'note', '{place}')"
        )
    if unknown:
        columns = ", ".join(ident(name) for _, name in unknown)
        triggers.append(
            f"create trigger consumer_learn_b before update of {columns} on {copy} {call}('{number}', 'update')"
        )
    return triggers


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
    raise exception using errcode = '{LEARNED}', message = 'consumer: a table is used in a new way',
        detail = tg_argv[0] || ' ' || tg_argv[1] || noted;
end $learn$
"""


def learned(detail: str, tables: Sequence[Table], usage: Mapping[Name, TableUsage]) -> Name:
    """Add what a learning trigger reported to `usage`; return the table."""
    number, how, *places = detail.split()
    table = tables[int(number)]
    use = usage[table.name]
    if how == "insert":
        use.inserted = True
    if how == "delete":
        use.deleted = True
    use.updated |= {table.columns[int(place)].name for place in places}
    return table.name


def compaction(table: Table) -> list[str]:
    """Return SQL that rewrites a copy without dead row versions.

    VACUUM cannot remove them while the one long transaction runs.
    """
    columns = ", ".join(ident(column.name) for column in table.columns if not column.generated)
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
