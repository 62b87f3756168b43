"""Random cases: realistic applications on random tables, with messages.

The same seed gives the same case.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from oracle.case import (
    Boom,
    Case,
    Copy,
    Defer,
    Execute,
    FetchVal,
    Gather,
    Handler,
    IfNone,
    Many,
    Message,
    Publish,
    Savepoint,
    SetLocal,
    Step,
    Wait,
    arguments_of,
    walk,
)
from oracle.schemas import Drawn, draw_tables
from oracle.values import Kind

FUNCTIONS = {
    "l0_rows()": "create function l0_rows() returns int language sql as 'select count(*)::int from l0'",
    "l0_write()": "create function l0_write() returns int language sql as $$ insert into l0 (txt) values ('f'); select 1 $$",
}
_TEXTS = ("x", "y", "z", "xx", "", "it's")


@dataclass
class Slot:
    """A field of the messages. what: pool, fresh, other, number or text."""

    what: str
    kind: Kind | None = None
    style: str = "first"  # of spellings: first, mixed, or those of one class
    hot: int = 0  # how many values of the pool are used; 0: all
    number: str = ""
    of: str = ""


@dataclass
class Draft:
    """What is known while a handler is drawn."""

    chance: random.Random
    tables: list[Drawn]
    awaited: float  # share of statements that are awaited
    set_local: bool
    is_near: bool
    slots: dict[str, Slot] = field(default_factory=dict)
    needs: set[str] = field(default_factory=set)  # functions that statements call

    def slot(self, letter: str, slot: Slot) -> str:
        name = f"{letter}{len(self.slots)}"
        self.slots[name] = slot
        return name

    def pool(self, kind: Kind) -> str:
        same = [name for name, slot in self.slots.items() if slot.what == "pool" and slot.kind is kind]
        if same and self.chance.random() < 0.6:
            return self.chance.choice(same)
        style = self.chance.choice(
            ["first", "mixed", "class", "class"] if not self.is_near else ["mixed", "class", "class", "class"]
        )
        return self.slot("k", Slot("pool", kind, style, self.chance.choice([0, 0, 1, 2])))

    def key(self, kind: Kind, fresh: float) -> str:
        if kind.fresh is not None and self.chance.random() < fresh:
            return self.slot("f", Slot("fresh", kind))
        return self.pool(kind)

    def number(self, t: Drawn) -> str:
        return self.slot("n", Slot("number", number=t.number))

    def text(self) -> str:
        return self.slot("t", Slot("text"))

    def write(self, sql: str, *args: str) -> Step:
        return Execute(sql, args) if self.chance.random() < self.awaited else Defer(sql, args)

    def table(self) -> Drawn:
        return self.chance.choice(self.tables)

    def name(self, t: Drawn) -> str:
        return t.view if t.view and self.chance.random() < 0.5 else t.name


def draw(seed: object, set_local: bool = False) -> Case:
    """The case of a seed. set_local: whether handlers may use `tx.set_local`."""
    chance = random.Random(f"oracle:{seed}")
    is_near = chance.random() < 0.45  # near to what is grouped: plain tables and forms, but for a twist
    is_spelled = is_near and chance.random() < 0.3  # one table, whose keys come in several spellings
    tables, log = draw_tables(chance, 0.12 if is_near else 0.5, is_spelled)
    handlers: list[Handler] = []
    slots: dict[str, Slot] = {}
    needs: set[str] = set()
    for _ in range(1 if is_near else chance.choices([1, 2, 3], [8, 2, 1])[0]):
        awaited = chance.choice([0, 0, 0, 0.1]) if is_near else chance.choice([0, 0, 0.2, 0.5, 1])
        draft = Draft(chance, tables, awaited, set_local, is_near, slots, needs)
        handlers.append(_near_handler(draft, is_spelled) if is_near else _handler(draft))
    used = {name for handler in handlers for step in walk(handler.steps) for name in arguments_of(step)}
    used |= {step.variable for handler in handlers for step in walk(handler.steps) if isinstance(step, IfNone)}
    slots = {
        name: slot for name, slot in slots.items() if name in used or any(slot.of == name for slot in slots.values())
    }
    if is_near:
        messages = _messages(chance, slots, chance.choice([12, 20, 30, 60]), booms=0.02)
        batch = chance.choice([20, 60, 60, 60])
    else:
        count = chance.choices([3, 6, 12, 20, 40], [1, 2, 3, 4, 2])[0]
        messages = _messages(chance, slots, count, booms=chance.choice([0, 0.06]))
        batch = chance.choice([2, 5, 20, 60, 60, 60])
    handlers = _publishing(random.Random(f"oracle:{seed}:publish"), handlers, tables)
    ddl = tuple(FUNCTIONS[need] for need in sorted(needs))
    return Case((log, *(table.table() for table in tables)), tuple(handlers), tuple(messages), batch, ddl)


def _publishing(chance: random.Random, handlers: list[Handler], tables: list[Drawn]) -> list[Handler]:
    """Let the handlers of two cases of five publish, too.

    They publish fields of their message, or what they read.
    """
    if chance.random() < 0.6:
        return handlers
    return [
        handler if handler.many else replace(handler, steps=_with_publish(chance, handler, tables))
        for handler in handlers
    ]


def _with_publish(chance: random.Random, handler: Handler, tables: list[Drawn]) -> tuple[Step, ...]:
    names = sorted({name for step in walk(handler.steps) for name in arguments_of(step) if name[0] != "v"})
    steps = list(handler.steps)
    for number in range(chance.choice([1, 1, 2, 3])):
        args = tuple(chance.sample(names, min(len(names), chance.choice([0, 1, 2]))))
        key = chance.choice(names) if names and chance.random() < 0.7 else ""
        new: list[Step] = [Publish(chance.choice(["pa", "pb"]), args, key)]
        if chance.random() < 0.2:
            variable = f"p{number}"
            read = FetchVal(variable, f"select count(*)::int from {chance.choice(tables).name}")
            new = [read, Publish("pa", (*args, variable), key)]
        if chance.random() < 0.3:
            new = [Savepoint(tuple(new), fails=chance.random() < 0.4)]
        at = chance.randrange(len(steps) + 1)
        steps[at:at] = new
    return tuple(steps)


def _near_handler(draft: Draft, is_spelled: bool) -> Handler:
    """A few plain writes, often with one statement of another form.

    is_spelled: one that finds rows by their keys.
    """
    if is_spelled:
        first = draft.chance.choice([_add, _add, _add, _upsert, _update, _delete])
        rest = _log_row(draft, draft.table()) if draft.chance.random() < 0.3 else []
        return Handler((*first(draft, draft.table()), *rest))
    forms = draft.chance.choices(
        [_insert, _add, _upsert, _delete, _log_row], [5, 8, 4, 2, 4], k=draft.chance.choice([1, 1, 2, 3])
    )
    steps = [step for form in forms for step in form(draft, draft.table())]
    if draft.chance.random() < (0.15 if len(forms) == 1 else 0.4):
        names = list(_FORMS)
        form = draft.chance.choices(names, [_FORMS[name] for name in names])[0]
        at = draft.chance.randrange(len(steps) + 1)
        steps[at:at] = form(draft, draft.table())
    return Handler(tuple(steps))


def _handler(draft: Draft) -> Handler:
    chance = draft.chance
    steps: list[Step] = []
    for _ in range(chance.choices([1, 2, 3, 4], [4, 5, 2, 1])[0]):
        names = list(_FORMS)
        form = chance.choices(names, [_FORMS[name] for name in names])[0]
        handler_drawn = form(draft, draft.table())
        if chance.random() < 0.06 and handler_drawn:
            handler_drawn = [Savepoint(tuple(handler_drawn), fails=chance.random() < 0.3)]
        steps += handler_drawn
        if chance.random() < 0.04:
            steps.append(Boom())
    way = chance.random()
    order = chance.choices(["key", "partition", "none"], [8, 1, 1])[0]
    if way < 0.15:
        is_many = len(steps) == 1 and isinstance(steps[0], Execute) and chance.random() < 0.7
        return Handler(tuple(steps), batch=chance.choice([2, 7, 100]), many=is_many, order=order)
    if way < 0.27:
        at = chance.randrange(len(steps) + 1)
        return Handler(
            (*steps[:at], Wait(chance.choice([1, 1, 3])), *steps[at:]), concurrency=chance.choice([2, 5]), order=order
        )
    return Handler(tuple(steps), order=order)


# -- forms of statements: what a table is asked for, and what steps that takes ------------------------------------------


def _columns(draft: Draft, t: Drawn, key: str) -> tuple[list[str], list[str]]:
    columns, args = ["k", "n"], [key, draft.number(t)]
    if draft.chance.random() < 0.3:
        columns.append("s")
        args.append(draft.text())
    if t.has_u and draft.chance.random() < 0.8:
        columns.append("u")
        args.append(draft.slot("u", Slot("pool", _U, "first") if draft.chance.random() < 0.3 else Slot("fresh", _U)))
    if t.ref is not None and draft.chance.random() < 0.8:
        columns.append("ref")
        args.append(draft.key(t.ref.kind, 0.2))
    if t.has_parent and draft.chance.random() < 0.8:
        columns.append("parent")
        args.append(
            draft.slot("o", Slot("other", t.kind, of=key)) if draft.slots[key].what == "fresh" else draft.pool(t.kind)
        )
    return columns, args


_U = Kind("u", "int", ((1,), (2,), (3,)), lambda n: 100 + n)


def _insert_sql(draft: Draft, t: Drawn, fresh: float) -> tuple[str, list[str]]:
    columns, args = _columns(draft, t, draft.key(t.kind, fresh))
    places = ", ".join(f"${n}" for n in range(1, len(args) + 1))
    return f"insert into {draft.name(t)} ({', '.join(columns)}) values ({places})", args


def _insert(draft: Draft, t: Drawn) -> list[Step]:
    sql, args = _insert_sql(draft, t, 0.9 if t.is_unique else 0.3)
    return [draft.write(sql, *args)]


def _insert_rows(draft: Draft, t: Drawn) -> list[Step]:
    one, other = draft.key(t.kind, 0.9), draft.key(t.kind, 0.9)
    n = draft.number(t)
    return [draft.write(f"insert into {t.name} (k, n) values ($1, $3), ($2, $3)", one, other, n)]


def _insert_nothing(draft: Draft, t: Drawn) -> list[Step]:
    sql, args = _insert_sql(draft, t, 0.3)
    target = "(k) " if t.is_unique and draft.chance.random() < 0.5 else ""
    return [draft.write(f"{sql} on conflict {target}do nothing", *args)]


def _upsert(draft: Draft, t: Drawn) -> list[Step]:
    if not t.is_unique:
        return _insert_nothing(draft, t)
    columns, args = _columns(draft, t, draft.key(t.kind, 0.1))
    places = ", ".join(f"${n}" for n in range(1, len(args) + 1))
    change = draft.chance.choice(
        [
            f"n = {t.name}.n + excluded.n",
            f"n = {t.name}.n + excluded.n",
            "n = excluded.n",
            f"n = {t.name}.n + excluded.n, s = {t.name}.s || 'u'",
            f"n = {t.name}.n + 1",
            f"n = excluded.n where {t.name}.n < excluded.n",
            "s = excluded.s, n = excluded.n",
        ]
    )
    sql = f"insert into {t.name} ({', '.join(columns)}) values ({places}) on conflict (k) do update set {change}"
    return [draft.write(sql, *args)]


def _add(draft: Draft, t: Drawn) -> list[Step]:
    sign = draft.chance.choice(["+", "+", "-"])
    change = draft.chance.choice(
        [f"n = n {sign} $2", f"n = n {sign} $2", f"n = {t.name}.n {sign} $2", f"n = n {sign} $2, s = 'x'"]
    )
    name = t.name if f"{t.name}." in change else draft.name(t)
    where = draft.chance.choice(
        ["k = $1"] * 6 + ["$1 = k", f"k = $1::{t.kind.type}", '"k" = $1', f"k = $1 /* {t.name} */"]
    )
    target = f"public.{name}" if draft.chance.random() < 0.08 else name
    return [draft.write(f"update {target} set {change} where {where}", draft.pool(t.kind), draft.number(t))]


def _update(draft: Draft, t: Drawn) -> list[Step]:
    key, n, text = draft.pool(t.kind), draft.number(t), draft.text()
    sql, args = draft.chance.choice(
        [
            ("set n = $2 where k = $1", [key, n]),
            ("set s = s || $2 where k = $1", [key, text]),
            ("set n = n - $2 where k = $1 and n >= $2", [key, n]),
            ("set n = n * 2 where k = $1", [key]),
            (f"set n = (select count(*) from {t.name}) where k = $1", [key]),
            (f"set n = (select coalesce(max(n), 0) from {draft.table().name}), s = $2 where k = $1", [key, text]),
            ("set n = n + $2 where k = $1 and s = $3", [key, n, text]),
            ("set n = case when n > 20 then 0 else n + $2 end where k = $1", [key, n]),
            ("set n = coalesce(n, 0) + $2, s = $3 where k = $1", [key, n, text]),
            ("set n = n + 1 where n > $1", [n]),
            ("set s = $2 where n < $1", [n, text]),
            ("set n = n + 1", []),
            ("set (n, s) = ($2, $3) where k = $1", [key, n, text]),
            ("set n = default where k = $1", [key]),
            ("set n = n + $2 where k = $1 or s = $3", [key, n, text]),
            ("set n = n + $2 where not k = $1", [key, n]),
            (f"set n = n + $2 where k in ($1::{t.kind.type})", [key, n]),
            ("set n = n + $2 where k is not distinct from $1", [key, n]),
            ("set n = n + $2 where k = $1 and n is not null", [key, n]),
            ("set n = $2 + n, s = lower($3) where $1 = k", [key, n, text]),
            ("set n = n + $2, s = s || n where k = $1", [key, n]),
            ("set n = n + $2 where k = $1 and 1 = 1", [key, n]),
            (f"set n = {t.name}.n + l0.n from l0 where l0.txt = $2 and k = $1 and l0.n = 1", [key, text]),
        ]
    )
    return [draft.write(f"update {t.name} {sql}", *args)]


def _update_key(draft: Draft, t: Drawn) -> list[Step]:
    if t.has_u and draft.chance.random() < 0.6:
        u = draft.slot("u", Slot("pool", _U, "first"))
        return [draft.write(f"update {t.name} set u = $2 where k = $1", draft.pool(t.kind), u)]
    return [draft.write(f"update {t.name} set k = $2 where k = $1", draft.pool(t.kind), draft.key(t.kind, 0.4))]


def _delete(draft: Draft, t: Drawn) -> list[Step]:
    key = draft.pool(t.kind)
    sql, args = draft.chance.choice(
        [("where k = $1", [key])] * 3
        + [("where n > $1", [draft.number(t)]), ("where k = $1 and n < $2", [key, draft.number(t)])]
    )
    return [draft.write(f"delete from {t.name} {sql}", *args)]


def _log_row(draft: Draft, t: Drawn) -> list[Step]:
    return [draft.write("insert into l0 (txt, n) values ($1, $2)", draft.text(), draft.number(t))]


def _log(draft: Draft, t: Drawn) -> list[Step]:
    sql, args = draft.chance.choice(
        [
            ("insert into l0 (txt, n) values ($1, $2)", [draft.text(), draft.number(t)]),
            ("insert into l0 (txt, n) values ($1, $2)", [draft.text(), draft.number(t)]),
            (f"insert into l0 (txt, n) select $1::text, count(*) from {t.name}", [draft.text()]),
            (f"insert into l0 (txt, n) values ($1, (select coalesce(sum(n), 0) from {t.name}))", [draft.text()]),
            (f"insert into l0 (txt, n) select s, n from {t.name} where k = $1", [draft.pool(t.kind)]),
            ("insert into l0 (txt, nid8) values ($1, nextval('s0'))", [draft.text()]),
            ("insert into l0 (txt, n) values ($1, (select count(*) from l0))", [draft.text()]),
            (
                "insert into l0 (txt, n) values (upper($1::text), abs($2::int))",
                [draft.text(), draft.slot("n", Slot("number"))],
            ),
            ("insert into l0 (n, txt) values (coalesce($1, 0), 'c')", [draft.number(t)]),
            ("insert into l0 default values", []),
            ("insert into l0 (txt, n) values ($1, 1) returning n", [draft.text()]),
            ("insert into l0 (txt, n) select $1::text, count(*) from l0 where txt = $1", [draft.text()]),
        ]
    )
    return [draft.write(sql, *args)]


def _current(draft: Draft, t: Drawn) -> list[Step]:
    """A row, and another one with the number of the first."""
    if not t.serial:
        return _log(draft, t)
    sql, args = _insert_sql(draft, t, 1)
    if draft.slots[args[0]].what != "fresh" and t.is_unique:
        return _log(draft, t)
    way = draft.chance.random()
    if way < 0.3:
        variable = f"v{len(draft.slots)}"
        return [
            FetchVal(variable, f"{sql} returning {t.serial}", tuple(args)),
            draft.write(f"insert into l0 (txt, {t.serial}) values ($1, $2)", draft.text(), variable),
        ]
    current = f"currval('{t.sequence}')" if way < 0.8 else "lastval()"
    return [
        draft.write(sql, *args),
        draft.write(f"insert into l0 (txt, {t.serial}) values ($1, {current})", draft.text()),
    ]


def _pair(draft: Draft, t: Drawn) -> list[Step]:
    """An UPDATE with an INSERT where it met no row, or similar.

    Or a DELETE and an INSERT.
    """
    key, n = draft.pool(t.kind), draft.number(t)
    if draft.chance.random() < 0.4:
        return [
            draft.write(f"delete from {t.name} where k = $1", key),
            draft.write(f"insert into {t.name} (k, n) values ($1, $2)", key, n),
        ]
    return [
        draft.write(f"update {t.name} set n = n + $2 where k = $1", key, n),
        draft.write(
            f"insert into {t.name} (k, n) select $1::{t.kind.type}, $2::{t.number} where not exists (select from {t.name} where k = $1::{t.kind.type})",
            key,
            n,
        ),
    ]


def _read_modify_write(draft: Draft, t: Drawn) -> list[Step]:
    key, n, variable = draft.pool(t.kind), draft.slot("n", Slot("number", number="int")), f"v{len(draft.slots)}"
    cast = "::int" if t.number != "numeric(12,2)" else "::numeric::int"
    read = f"n{cast}" if t.is_unique else f"max(n){cast}"  # of several rows, any might be the first
    steps: list[Step] = [FetchVal(variable, f"select {read} from {t.name} where k = $1", (key,))]
    if draft.chance.random() < 0.3:
        steps.append(Wait())
    update = draft.write(f"update {t.name} set n = $2 where k = $1", key, f"{variable}+{n}")
    insert = draft.write(f"insert into {t.name} (k, n) values ($1, $2)", key, n)
    return [*steps, IfNone(variable, (insert,) if draft.chance.random() < 0.7 else (), (update,))]


def _cte(draft: Draft, t: Drawn) -> list[Step]:
    sql, args = draft.chance.choice(
        [
            (f"with gone as (delete from {t.name} where k = $1 returning n) insert into l0 (txt, n) select $2::text, n from gone", [draft.pool(t.kind), draft.text()]),
            (f"with moved as (update {t.name} set n = n + $2 where k = $1 returning n) insert into l0 (txt, n) select 'moved', count(*) from moved", [draft.pool(t.kind), draft.number(t)]),
            (f"with c as (select count(*) as c from {t.name}) update {t.name} set n = c.c from c where k = $1", [draft.pool(t.kind)]),
        ]
    )  # fmt: skip
    return [draft.write(sql, *args)]


def _many(draft: Draft, t: Drawn) -> list[Step]:
    if draft.chance.random() < 0.4:
        return [
            Copy("l0", ("txt", "n"), ((draft.text(), draft.slot("n", Slot("number", number="numeric(12,2)"))),) * 2)
        ]
    key = draft.pool(t.kind)
    return [
        Many(
            f"update {t.name} set n = n + $2 where k = $1",
            ((key, draft.number(t)), (draft.pool(t.kind), draft.number(t))),
        )
    ]


def _merge(draft: Draft, t: Drawn) -> list[Step]:
    sql = (
        f"merge into {t.name} using (values ($1::{t.kind.type}, $2::{t.number})) as m (k, n) on {t.name}.k = m.k "
        f"when matched then update set n = {t.name}.n + m.n when not matched then insert (k, n) values (m.k, m.n)"
    )
    return [draft.write(sql, draft.pool(t.kind), draft.number(t))]


def _function(draft: Draft, t: Drawn) -> list[Step]:
    """A function of the application's own, which reads or writes a table."""
    name = draft.chance.choice(["l0_rows()", "l0_write()"])
    draft.needs.add(name)
    sql, args = draft.chance.choice(
        [
            (f"update {t.name} set n = {name} where k = $1", [draft.pool(t.kind)]),
            (f"insert into l0 (txt, n) values ($1, {name})", [draft.text()]),
            (f"select {name}", []),
            (f"delete from {t.name} where k = $1 and n < {name}", [draft.pool(t.kind)]),
        ]
    )
    return [draft.write(sql, *args)]


def _gather(draft: Draft, t: Drawn) -> list[Step]:
    """Two tasks of the handler, on the one Tx."""
    steps = (*_add(draft, t), *_log_row(draft, t), *_log(draft, t))
    return [Gather(tuple(Execute(step.sql, step.args) if isinstance(step, Defer) else step for step in steps))]


def _temporary(draft: Draft, t: Drawn) -> list[Step]:
    """A table of the transaction's own."""
    return [
        Execute("create temp table tmp0 (x bigint) on commit drop"),
        draft.write("insert into tmp0 values ($1)", draft.slot("n", Slot("number", number="bigint"))),
        draft.write("insert into l0 (txt, n) select 'tmp', count(*) from tmp0"),
    ]


def _double(draft: Draft, t: Drawn) -> list[Step]:
    """Two statements in one text."""
    return [draft.write(f"update {t.name} set n = n + 1; insert into l0 (txt, n) values ('double', 1)")]


def _tenant(draft: Draft, t: Drawn) -> list[Step]:
    if not draft.set_local:
        return _log(draft, t)
    text = draft.text()
    insert = draft.write(
        "insert into l0 (txt, n) values (coalesce(nullif(current_setting('app.tenant', true), ''), '-'), $1)",
        draft.number(t),
    )
    return [*([SetLocal("app.tenant", text)] if draft.chance.random() < 0.7 else []), insert]


def _deferred_constraints(draft: Draft, t: Drawn) -> list[Step]:
    return [Execute("set constraints all deferred"), *_insert(draft, t)]


def _alter(draft: Draft, t: Drawn) -> list[Step]:
    """A message that alters the table.

    What was known of the table before no longer holds.
    """
    flag = draft.slot("d", Slot("once"))
    sql = draft.chance.choice(
        [
            f"alter table {t.name} add check (n < 25) not valid",
            f"create rule {t.name}_late as on insert to {t.name} do also insert into l0 (txt, n) values ('late', 1)",
            f"alter table {t.name} alter column n set default 7",
        ]
    )
    return [IfNone(flag, (), (Execute(sql),)), *_add(draft, t), *_insert(draft, t)]


_FORMS = {
    _insert: 14, _insert_rows: 2, _insert_nothing: 5, _upsert: 12, _add: 18, _update: 9, _update_key: 3, _delete: 6, _log: 8,
    _current: 6, _pair: 6, _read_modify_write: 5, _cte: 2, _merge: 2, _function: 3, _gather: 1, _many: 2, _double: 1, _tenant: 3, _deferred_constraints: 1, _alter: 1, _temporary: 1,
}  # fmt: skip


# -- messages ---------------------------------------------------------------------------------------------------------------


def _messages(chance: random.Random, slots: dict[str, Slot], count: int, booms: float) -> list[Message]:
    keys: list[str | None] = [f"key{n}" for n in range(chance.choice([1, 3, 8, 30]))]
    if chance.random() < 0.2:
        keys.append(None)
    partitions = chance.choice([1, 1, 1, 3])
    classes = {name: chance.randrange(8) for name in slots}
    once = chance.randrange(count)
    messages: list[Message] = []
    for number in range(count):
        what = chance.random()
        if messages and what < 0.04:
            again = chance.choice(messages)
            payload = None if chance.random() < 0.7 else 10_000 + number
            messages.append(
                Message(again.key, again.id, again.fields, again.partition, payload if payload else again.payload)
            )
            continue
        fields = {
            name: _value(chance, slot, number * len(slots) + place, count, len(slots), classes[name], number == once)
            for place, (name, slot) in enumerate(slots.items())
        }
        if chance.random() < booms:
            fields["boom"] = chance.choice(["raise", "reject"])
        key = chance.choice(keys)
        messages.append(Message(key, number + 1, fields, keys.index(key) % partitions))
    for message in messages:
        for name, slot in slots.items():
            if slot.what == "other":  # the fresh key of another message, or of this one
                message.fields[name] = (
                    chance.choice([*messages, message]).fields[slot.of] if chance.random() < 0.8 else None
                )
    return messages


def _value(chance: random.Random, slot: Slot, fresh: int, count: int, width: int, chosen: int, is_once: bool) -> Any:
    match slot.what:
        case "fresh":
            assert slot.kind is not None and slot.kind.fresh is not None
            return slot.kind.fresh(fresh)
        case "pool":
            assert slot.kind is not None
            if chance.random() < 0.005:
                return None
            pool = slot.kind.pool[: slot.hot] if slot.hot else slot.kind.pool
            spellings = chance.choice(pool)
            if slot.style == "mixed":
                return chance.choice(spellings)
            if slot.style == "class":
                kinds = list(
                    dict.fromkeys(
                        type(spelling) for spellings_of_value in slot.kind.pool for spelling in spellings_of_value
                    )
                )
                kind = kinds[-1] if chosen % 2 else kinds[chosen % len(kinds)]  # the last one has most spellings
                wanted = [spelling for spelling in spellings if type(spelling) is kind]
                return chance.choice(wanted or spellings[:1])
            return spellings[0]
        case "number":
            return _number(chance, slot.number)
        case "text":
            return chance.choice(_TEXTS)
        case "once":
            return 1 if is_once else None
    return None


def _number(chance: random.Random, kind: str) -> Any:
    what = chance.random()
    if what < 0.004:
        return None
    if what < 0.008:
        return {"smallint": 32_767, "int": 2_147_483_647}.get(kind, 1_000_000)
    number = chance.choice([1, 1, 2, 3, 5, 10]) if chance.random() < 0.8 else chance.randint(-6, 25)
    if kind == "numeric(12,2)" and chance.random() < 0.5:
        return Decimal(number) / 4
    if kind == "float8":
        return number * 0.25  # sums of these are exact in any order
    return number
