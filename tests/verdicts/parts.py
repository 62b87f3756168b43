"""The parts of random applications: tables, and their handlers' steps.

A part makes its tables and handlers under a tag of its own. All handlers read the same fields: `i` (unique), `k` (a few
values, so that messages meet), `n`, `op` (a, b or c) and `ts` (the record's time).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from oracle.case import Boom, Defer, Execute, FetchVal, Step

from verdicts.case import Again, Draw, Table, When

KEYS = range(4)


@dataclass
class Part:
    """Tables, and the steps of one to three handlers.

    first: the handler whose messages others wait for, if any.
    """

    tables: list[Table]
    handlers: list[list[Step]]
    first: int | None = None
    reads: list[str] = field(default_factory=list)


def _seeds(name: str, more: str = "") -> tuple[str, ...]:
    return (f"insert into {name} (k{more and ', n'}) select g{more} from generate_series(0, {len(KEYS) - 1}) g",)


def journal(chance: random.Random, tag: str) -> Part:
    """One row for each message, with the usual extra columns."""
    name = f"journal{tag}"
    key = chance.choice(["i text primary key", "i text", "i text", "sid serial primary key, i text"])
    columns, names, values, args = [key, "k int", "n int"], ["i", "k", "n"], ["$1", "$2", "$3"], ["i", "k", "n"]
    ddl: list[str] = []
    for kind in chance.sample(range(9), chance.choice([0, 0, 1, 2])):
        match kind:
            case 0:
                columns.append("made_at timestamptz not null default now()")
            case 1:
                columns.append("r_rnd uuid default gen_random_uuid()")
            case 2 if "sid" not in key:
                columns.append(chance.choice(["sid bigserial", "sid bigint generated always as identity"]))
            case 3:
                ddl.append(f"create function draw{tag}() returns float language sql volatile as 'select random()'")
                columns.append(f"d_rnd float default draw{tag}()")
            case 4:
                columns.append("due_at timestamptz")
                names.append("due_at")
                values.append("now() + interval '1 day'")
            case 5:
                columns.append("stored_at timestamptz")
                names.append("stored_at")
                values.append("now()")
            case 6:
                columns.append("ts bigint")
                names.append("ts")
                args.append("ts")
                values.append(f"${len(args)}")
            case 7:
                columns.append("day_at date")
                names.append("day_at")
                values.append("current_date")
            case _:
                columns.append("state text not null default 'new'")
    ddl.append(f"create table {name} ({', '.join(columns)})")
    insert = f"insert into {name} ({', '.join(names)}) values ({', '.join(values)})"
    if key.endswith("primary key") and chance.random() < 0.3:
        insert += " on conflict do nothing"
    return Part([Table(name, tuple(ddl))], [[chance.choice([Defer, Execute])(insert, tuple(args))]])


def drawn(chance: random.Random, tag: str) -> Part:
    """Rows under an id that Python draws."""
    name = f"drawn{tag}"
    table = Table(name, (f"create table {name} (u_rnd text primary key, k int, n int)",))
    insert = f"insert into {name} values ($1, $2, $3)"
    return Part([table], [[Draw("u"), Defer(insert, ("u", "k", "n"))]])


def upsert(chance: random.Random, tag: str) -> Part:
    """A row for each key: last, first or greatest value, or sum."""
    name = f"upsert{tag}"
    at = chance.random() < 0.4
    ddl = f"create table {name} (k int primary key, n bigint not null default 0{', changed_at timestamptz' if at else ''})"
    set_at = ", changed_at = now()" if at else ""
    how = chance.choice(
        [
            f"do update set n = excluded.n{set_at}",
            f"do update set n = excluded.n{set_at}",
            "do nothing",
            f"do update set n = {name}.n + excluded.n{set_at}",
            f"do update set n = excluded.n{set_at} where excluded.n > {name}.n",
        ]
    )
    columns, values = ("k, n, changed_at", "$1, $2, now()") if at else ("k, n", "$1, $2")
    sql = f"insert into {name} ({columns}) values ({values}) on conflict (k) {how}"
    seeds = _seeds(name, ", 100") if chance.random() < 0.15 else ()
    handlers: list[list[Step]] = [[Defer(sql, ("k", "n"))] for _ in range(chance.choice([1, 1, 2]))]
    return Part([Table(name, (ddl,), seeds)], handlers)


def balance(chance: random.Random, tag: str) -> Part:
    """Seeded accounts that are only updated."""
    name = f"account{tag}"
    column = chance.choice(["n bigint not null default 0", "n bigint not null default 0", "n bigint"])
    change = "coalesce(n, 0) + $2" if column == "n bigint" else "n + $2"
    if chance.random() < 0.15:
        change = "$2"
    table = Table(name, (f"create table {name} (k int primary key, {column})",), _seeds(name))
    return Part([table], [[Defer(f"update {name} set n = {change} where k = $1", ("k", "n"))]])


def flow(chance: random.Random, tag: str) -> Part:
    """Orders that are made, paid and shipped.

    By one handler or by three.
    """
    name = f"flow{tag}"
    table = Table(name, (f"create table {name} (k int primary key, status text not null, paid_at timestamptz)",))
    steps: list[list[Step]] = [
        [Defer(f"insert into {name} (k, status) values ($1, 'new') on conflict do nothing", ("k",))],
        [Defer(f"update {name} set status = 'paid', paid_at = now() where k = $1 and status = 'new'", ("k",))],
        [Defer(f"update {name} set status = 'shipped' where k = $1 and status = 'paid'", ("k",))],
    ]
    if chance.random() < 0.5:
        return Part([table], steps)
    return Part([table], [[When("op", op, tuple(step)) for op, step in zip("abc", steps, strict=True)]])


def deletes(chance: random.Random, tag: str) -> Part:
    """Rows that are inserted, updated and deleted again.

    Deleted rows may be kept in another table.
    """
    name, kept = f"stock{tag}", f"sold{tag}"
    tables = [Table(name, (f"create table {name} (k int primary key, n int not null)",))]
    delete = f"delete from {name} where k = $1"
    if chance.random() < 0.4:
        tables.append(Table(kept, (f"create table {kept} (i text, n int)",)))
        delete = f"with gone as (delete from {name} where k = $1 returning n) insert into {kept} select $2::text, n from gone"
    args = ("k", "i") if len(tables) > 1 else ("k",)
    put = Defer(
        f"insert into {name} values ($1, $2) on conflict (k) do update set n = {name}.n + excluded.n", ("k", "n")
    )
    if chance.random() < 0.5:
        return Part(tables, [[put], [Execute(delete, args)]])
    return Part(tables, [[When("op", "a", (put,)), When("op", "b", (Execute(delete, args),)), When("op", "c", (put,))]])


def only_deleted(chance: random.Random, tag: str) -> Part:
    """Seeded rows that are deleted, and how much they held."""
    name, kept = f"offer{tag}", f"taken{tag}"
    tables = [
        Table(name, (f"create table {name} (k int primary key, n int not null)",), _seeds(name, ", 5")),
        Table(kept, (f"create table {kept} (i text, n int)",)),
    ]
    take = FetchVal("held", f"delete from {name} where k = $1 returning n", ("k",))
    return Part(tables, [[take, Defer(f"insert into {kept} values ($1, $2)", ("i", "held"))]])


def soft(chance: random.Random, tag: str) -> Part:
    """Rows that are marked as deleted, with the time."""
    name = f"soft{tag}"
    table = Table(name, (f"create table {name} (k int primary key, n int, deleted_at timestamptz)",))
    steps: tuple[Step, ...] = (
        When("op", "a", (Defer(f"insert into {name} (k, n) values ($1, $2) on conflict do nothing", ("k", "n")),)),
        When("op", "b", (Defer(f"update {name} set deleted_at = now() where k = $1", ("k",)),)),
        When("op", "c", (Defer(f"update {name} set deleted_at = null, n = $2 where k = $1", ("k", "n")),)),
    )
    return Part([table], [list(steps)])


def triggered(chance: random.Random, tag: str) -> Part:
    """A table whose trigger fills another or changes the row.

    Or a rule that does.
    """
    name, log = f"watched{tag}", f"audit{tag}"
    ddl = [f"create table {name} (i text, k int, n int)"]
    tables = []
    kind = chance.choice(["after", "before", "rule"])
    if kind == "before":
        ddl += [
            f"create function bump{tag}() returns trigger language plpgsql as $$ begin new.n := new.n * 2; return new; end $$",
            f"create trigger bump before insert on {name} for each row execute function bump{tag}()",
        ]
    else:
        tables.append(Table(log, (f"create table {log} (i text, n int)",), fed_by=name))
        ddl += (
            [f"create rule note as on insert to {name} do also insert into {log} values (new.i, new.n)"]
            if kind == "rule"
            else [
                f"create function note{tag}() returns trigger language plpgsql as $$ begin insert into {log} values (new.i, new.n); return null; end $$",
                f"create trigger note after insert on {name} for each row execute function note{tag}()",
            ]
        )
    tables.append(Table(name, tuple(ddl)))
    return Part(tables, [[Execute(f"insert into {name} values ($1, $2, $3)", ("i", "k", "n"))]])


def children(chance: random.Random, tag: str) -> Part:
    """Parents of one topic, children of another with a foreign key.

    Without a parent a child waits, is refused or fails.
    """
    parent, child = f"parent{tag}", f"child{tag}"
    action = chance.choice(["", " on delete cascade"])
    tables = [
        Table(parent, (f"create table {parent} (k int primary key, n int)",)),
        Table(child, (f"create table {child} (i text primary key, k int references {parent}{action}, n int)",)),
    ]
    put = Defer(f"insert into {parent} values ($1, $2) on conflict (k) do nothing", ("k", "n"))
    ask = FetchVal("parent", f"select k from {parent} where k = $1", ("k",))
    insert = Execute(f"insert into {child} values ($1, $2, $3)", ("i", "k", "n"))
    steps: list[Step] = [insert] if chance.random() < 0.3 else [ask, Again("parent"), insert]
    return Part(tables, [[put], steps], first=0)


def reader(chance: random.Random, tag: str) -> Part:
    """A handler that keeps what it reads of another one's rows."""
    source, copy = f"source{tag}", f"seen{tag}"
    tables = [
        Table(source, (f"create table {source} (i text, k int, n int)",)),
        Table(copy, (f"create table {copy} (i text primary key, total bigint)",)),
    ]
    write = Defer(f"insert into {source} values ($1, $2, $3)", ("i", "k", "n"))
    read = FetchVal("total", f"select coalesce(sum(n), 0)::bigint from {source} where k = $1", ("k",))
    store = Defer(f"insert into {copy} values ($1, $2) on conflict do nothing", ("i", "total"))
    return Part(tables, [[write], [read, store]])


_PARTS: tuple[tuple[Callable[[random.Random, str], Part], int], ...] = (
    (journal, 5), (upsert, 6), (balance, 4), (flow, 4), (deletes, 3), (soft, 3), (children, 3), (reader, 2),
    (only_deleted, 1), (triggered, 1), (drawn, 1),
)  # fmt: skip


def draw_part(chance: random.Random, tag: str) -> Part:
    """One of the parts.

    Each handler may fail before or after what it does.
    """
    [make] = chance.choices([kind for kind, _ in _PARTS], [weight for _, weight in _PARTS])
    part = make(chance, tag)
    for steps in part.handlers:
        steps.insert(chance.choice([0, len(steps)]), Boom())
    return part
