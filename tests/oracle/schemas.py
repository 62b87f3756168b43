"""Random tables, with all that may surprise a batch.

Types of keys, defaults, sequences, constraints, triggers, rules, policies, partitions, children and views.
"""

from __future__ import annotations

import datetime
import random
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from oracle.case import Table
from oracle.values import KINDS, Kind, draw_kind

NUMBERS = ("bigint", "bigint", "bigint", "int", "smallint", "numeric(12,2)", "float8")
_ACTIONS = (
    "",
    " on delete cascade",
    " on delete set null",
    " on update cascade",
    " on delete cascade on update cascade",
)


@dataclass
class Drawn:
    """A random table: what statements need to know of it."""

    name: str
    kind: Kind
    number: str
    is_unique: bool = False
    serial: str = ""  # the column that a sequence fills, and its sequence
    sequence: str = ""
    has_u: bool = False
    ref: Drawn | None = None
    has_parent: bool = False
    is_partial: bool = False  # its only unique index is partial
    view: str = ""
    columns: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    options: str = ""
    rows: list[str] = field(default_factory=list)
    is_watched: bool = False  # a trigger or a rule writes to the log for it

    def table(self) -> Table:
        return Table(self.name, tuple(self.columns), (*self.extras, *self.rows), self.options, tuple(self.before))


def literal(value: Any) -> str:
    """A value as SQL, to be cast to its column's type."""
    match value:
        case bool():
            return str(value).lower()
        case None:
            return "null"
        case bytes():
            return f"'\\x{value.hex()}'"
        case tuple():
            return f"row({', '.join(map(literal, value))})"
        case list():
            return "'{" + ", ".join(map(str, value)) + "}'"
        case datetime.timedelta():
            return f"'{value.total_seconds():g} seconds'"
        case datetime.datetime() | datetime.date():
            return f"'{value.isoformat()}'"
        case int():
            return str(int(value))
        case float() | Decimal():
            return f"'{value}'"
        case _:
            return "'" + str(value).replace("'", "''") + "'"


def draw_tables(chance: random.Random, odd: float, is_spelled: bool) -> tuple[list[Drawn], Table]:
    """One to three tables, and the log that anything may write.

    odd: the share of tables with features. is_spelled: one table, with a key of a type whose values people spell in
    several ways.
    """
    kinds = [draw_kind(chance) for _ in range(2)]
    if odd < 0.5 and chance.random() < 0.7:  # the types whose keys can be grouped
        common = [kind for kind in KINDS if kind.name in ("int", "bigint", "uuid", "uuid", "text")]
        kinds = [chance.choice(common), chance.choice(common)]
    if is_spelled:
        several = [kind for kind in KINDS if any(len(values) > 1 for values in kind.pool)]
        kinds = [chance.choice(several)]
    if chance.random() < (0.6 if is_spelled else 0.2):  # the key that is spelled in most ways
        kinds[0] = next(kind for kind in KINDS if kind.name == "uuid")
    before: set[str] = set()
    tables: list[Drawn] = []
    for number in range(1 if is_spelled else chance.choices([1, 2, 3], [5, 4, 2])[0]):
        drawn = _draw(chance, number, chance.choice(kinds), tables, odd)
        if drawn.kind.before and drawn.kind.before not in before:
            before.add(drawn.kind.before)
            drawn.before.append(drawn.kind.before)
        tables.append(drawn)
    columns = ["txt text", "n numeric", *(f"{table.serial} bigint" for table in tables if table.serial), "nid8 bigint"]
    if not any(table.is_watched for table in tables) and chance.random() < 0.3:
        columns.append("sid9 serial")
    log = Table("l0", tuple(columns), before=("create sequence s0",))
    return tables, log


def _draw(chance: random.Random, number: int, kind: Kind, earlier: list[Drawn], odd: float) -> Drawn:
    name = f"t{number}"
    t = Drawn(name, kind, chance.choice(NUMBERS))
    unique = chance.choices(["primary key", "unique", "not null", ""], [60, 15, 10, 15])[0]
    if kind.name == "jsonb" and unique == "primary key" and chance.random() < 0.5:
        unique = ""
    t.is_unique = unique in ("primary key", "unique")
    t.columns = [f"k {kind.type} {unique}".strip(), f"n {t.number} default 0", "s text default ''"]
    if chance.random() < 0.6:
        values = [spellings[0] for spellings in kind.pool if chance.random() < 0.8]
        t.rows = [f"insert into {name} (k, n) values ({literal(value)}, 10)" for value in values]
    if chance.random() < odd * 0.7:
        _add_serial(chance, t, number)
    if chance.random() < odd:
        for _ in range(chance.choices([1, 2, 3], [6, 3, 1])[0]):
            chance.choice(_FEATURES)(chance, t, earlier)
    return t


def _add_serial(chance: random.Random, t: Drawn, number: int) -> None:
    t.serial = f"sid{number}"
    t.sequence = f"{t.name}_{t.serial}_seq"
    t.columns.append(
        chance.choice(
            [f"{t.serial} serial", f"{t.serial} bigint generated always as identity", f"{t.serial} bigserial unique"]
        )
    )


def _times(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    t.columns.append(chance.choice(["made_at timestamptz default now()", "r_rnd uuid default gen_random_uuid()"]))


def _second_key(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    if not t.has_u:
        t.has_u = True
        t.columns.append("u int unique" + chance.choice(["", "", " deferrable initially deferred"]))


def _check(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    t.columns.append(
        chance.choice(["check (n >= 0)", "check (n < 60)", "check (n <= length(s) + 40)", "check (s <> 'bad')"])
    )


def _generated(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    if not any(column.startswith("g ") for column in t.columns):
        t.columns.append(f"g {t.number} generated always as (n * 2) {chance.choice(['stored', 'virtual'])}")


def _parent(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    if t.is_unique and not t.has_parent and not t.options:
        t.has_parent = True
        t.columns.append(
            f"parent {t.kind.type} references {t.name} (k)"
            + chance.choice(["", "", " on delete cascade", " deferrable initially deferred"])
        )


def _reference(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    fitting = [table for table in earlier if table.is_unique]
    if fitting and t.ref is None:
        t.ref = chance.choice(fitting)
        t.columns.append(
            f"ref {t.ref.kind.type} references {t.ref.name} (k){chance.choice(_ACTIONS)}"
            + chance.choice(["", "", " deferrable initially deferred", " deferrable"])
        )


def _exclusion(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    t.columns.append("exclude (s with =) where (s like 'x%')")


def _partitions(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    if (
        t.options
        or t.has_parent
        or t.kind.type == "jsonb"
        or any("exclude" in column or "unique" in column for column in t.columns[1:])
    ):
        return
    if t.kind.name == "enum":  # its hash is of the type's oid, which is another one in the other database
        t.options = " partition by list (k)"
        t.extras += [
            f"create table {t.name}_p0 partition of {t.name} for values in ('sad')",
            f"create table {t.name}_p1 partition of {t.name} default",
        ]
        return
    t.options = " partition by hash (k)"
    t.extras += [
        f"create table {t.name}_p{n} partition of {t.name} for values with (modulus 2, remainder {n})" for n in (0, 1)
    ]


def _child(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    if t.options or t.has_parent:
        return
    t.extras.append(f"create table {t.name}_c () inherits ({t.name})")
    t.rows.append(f"insert into {t.name}_c (k, n) values ({literal(t.kind.pool[0][0])}, 5)")


def _trigger(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    name = f"{t.name}_f{len(t.extras)}"
    count = f"(select count(*) from {t.name})"
    bodies = [
        ("before insert or update", "row", "new.n := new.n + 1; return new;"),
        ("before insert", "row", f"if {count} > 6 then return null; end if; return new;"),
        ("before insert or update", "row", "if new.n > 40 then raise exception 'too much'; end if; return new;"),
        ("before insert", "row", f"new.s := {count}::text; return new;"),
        ("after insert", "row", f"insert into l0 (txt, n) values ('row', {count}); return null;"),
        ("after insert or update or delete", "row", "insert into l0 (txt, n) values (tg_op, 1); return null;"),
        ("after insert", "statement", f"insert into l0 (txt, n) values ('statement', {count}); return null;"),
        ("after update", "statement", f"insert into l0 (txt, n) select 'sum', sum(n) from {t.name}; return null;"),
        ("before delete", "statement", "insert into l0 (txt, n) values ('delete', 1); return null;"),
    ]
    when, level, body = chance.choice(bodies)
    if t.options and level == "row" and "new.k" in body:
        return
    t.is_watched = True
    t.extras += [
        f"create function {name}() returns trigger language plpgsql as $$ begin {body} end $$",
        f"create trigger {name} {when} on {t.name} for each {level} execute function {name}()",
    ]


def _transition(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    if t.options:
        return
    name = f"{t.name}_f{len(t.extras)}"
    t.is_watched = True
    t.extras += [
        f"create function {name}() returns trigger language plpgsql as $$ begin "
        "insert into l0 (txt, n) select 'rows', count(*) from new_rows; return null; end $$",
        f"create trigger {name} after {chance.choice(['insert', 'update'])} on {t.name} referencing new table as new_rows "
        f"for each statement execute function {name}()",
    ]


def _rule(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    t.is_watched = True
    t.extras.append(
        chance.choice(
            [
                f"create rule {t.name}_r as on insert to {t.name} do also insert into l0 (txt, n) values ('rule', 1)",
                f"create rule {t.name}_r as on delete to {t.name} do instead update {t.name} set s = 'gone' where k = old.k",
                f"create rule {t.name}_r as on update to {t.name} do also insert into l0 (txt, n) values ('rule', new.n)",
            ]
        )
    )


def _policy(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    if any("row level security" in extra for extra in t.extras):
        return
    t.extras += [
        f"alter table {t.name} enable row level security",
        f"alter table {t.name} force row level security",
        f"create policy {t.name}_y on {t.name} "
        + chance.choice(
            [
                "using (n < 30) with check (true)",
                "using (true) with check (n < 50)",
                "using ((select count(*) from l0) < 20) with check (true)",
                "using (coalesce(current_setting('app.tenant', true), '') <> 'y') with check (true)",
            ]
        ),
    ]


def _index(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    if t.options:
        return
    t.extras.append(
        chance.choice(
            [
                f"create unique index on {t.name} (k) where n > 0",
                f"create unique index on {t.name} (k, n)",
                f"create index on {t.name} (lower(s))",
                f"create unique index on {t.name} (k) nulls not distinct",
            ]
        )
    )


def _counting_default(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    if any("_count" in extra for extra in t.extras):
        return
    t.extras += [
        f"create function {t.name}_count() returns bigint language plpgsql as $$ begin return (select count(*) from {t.name}); end $$",
        f"alter table {t.name} alter column n set default {t.name}_count()"
        if chance.random() < 0.5
        else f"alter table {t.name} add column d bigint default {t.name}_count()",
    ]


def _counting_check(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    if any("_limit" in extra for extra in t.extras):
        return
    t.extras += [
        f"create function {t.name}_limit() returns bool language plpgsql as $$ begin return (select coalesce(sum(n), 0) < 150 from {t.name}); end $$",
        f"alter table {t.name} add check ({t.name}_limit())",
    ]


def _view(chance: random.Random, t: Drawn, earlier: list[Drawn]) -> None:
    if t.view:
        return
    t.view = f"v{t.name[1:]}"
    t.extras.append(
        f"create view {t.view} as select * from {t.name} where n < 100" + chance.choice(["", " with check option", ""])
    )


_FEATURES = (
    _times, _second_key, _second_key, _check, _check, _generated, _parent, _parent, _reference, _reference, _exclusion, _partitions, _child,
    _trigger, _trigger, _trigger, _transition, _rule, _policy, _index, _index, _counting_default, _counting_check, _view,
)  # fmt: skip
