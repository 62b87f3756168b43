"""For each mutant a small case that always shows it.

The batch rule holds in it, and breaks in the way of that mutant. Random cases show most mutants too, but not within a
time that a test may take.
"""

from __future__ import annotations

from typing import NamedTuple

from oracle.case import (
    Boom,
    Case,
    Defer,
    Execute,
    FetchVal,
    Handler,
    IfNone,
    Message,
    Publish,
    Savepoint,
    SetLocal,
    Table,
)


class Directed(NamedTuple):
    """A case, and what the oracle says of it under the mutant.

    The kind, and each line that must be in the text.
    """

    case: Case
    kind: str
    lines: tuple[str, ...]


_COUNTED = Table(
    "t0", ("k int primary key", "n bigint not null default 0"), ("insert into t0 (k) values (1), (2), (3), (4), (5)",)
)
_LOG = Table("l0", ("n bigint",))
_ADD = Defer("update t0 set n = n + $2 where k = $1", ("k", "n"))
_INSERT = Defer("insert into l0 (n) values ($1)", ("n",))
_UUID, _OTHER = "6f1c1f6e-0a3c-4d7e-9c35-5d8f3b0a7c11", "00000000-0000-4000-8000-000000000001"
_TENANT = "insert into l0 (txt) values (coalesce(nullif(current_setting('app.tenant', true), ''), '-'))"
_PARENT = "parent int references t0 (k) deferrable initially deferred"
_NOTE = (
    "create table l1 (txt text)",
    "create function note() returns trigger language plpgsql as "
    "$$ begin insert into l1 values ('statement'); return null; end $$",
)
_TRIGGER = "create trigger note after insert on l0 for each statement execute function note()"


def _adding(*numbers: int, key: int = 1) -> tuple[Message, ...]:
    return tuple(Message(f"key{n}", n, {"k": key, "n": n}) for n in numbers)


DIRECTED: dict[str, Directed] = {
    # 1, doubled, + 2, doubled, + 3, doubled; or 6, doubled three times.
    "grouping-without-proof": Directed(
        Case((_COUNTED,), (Handler((_ADD, Defer("update t0 set n = n * 2 where k = $1", ("k",)))),), _adding(1, 2, 3)),
        "table",
        ("batch only:      ('1', '48')", "one by one only: ('1', '22')"),
    ),
    "barriers-are-passed": Directed(
        Case(
            (_COUNTED, _LOG),
            (Handler((_ADD, Defer("insert into l0 (n) select n from t0 where k = $1 group by n", ("k",)))),),
            _adding(1, 2, 3),
        ),
        "table",
        ("l0 (n) differs", "one by one only: ('1',)"),
    ),
    "keys-as-python-compares-them": Directed(
        Case(
            (
                Table(
                    "t0",
                    ("k uuid primary key", "n bigint not null default 0"),
                    (f"insert into t0 (k) values ('{_UUID}'), ('{_OTHER}')",),
                ),
            ),
            (Handler((_ADD,)),),
            tuple(
                Message(f"key{n}", n, {"k": key, "n": 1}) for n, key in enumerate([_UUID, _UUID.upper(), _OTHER] * 4)
            ),
        ),
        "table",
        (f"batch only:      ('{_UUID}', '4')", f"one by one only: ('{_UUID}', '8')"),
    ),
    "blind-to-the-catalog": Directed(
        Case((_LOG,), (Handler((_INSERT,)),), _adding(*range(10)), ddl=(*_NOTE, _TRIGGER)),
        "table",
        ("l1 (txt) differs", "one by one only: ('statement',)"),
    ),
    "rows-met-twice": Directed(
        Case(
            (_COUNTED,),
            (Handler((_ADD,)),),
            tuple(Message(f"key{n}", n, {"k": n % 2 + 1, "n": 1}) for n in range(20)),
        ),
        "table",
        ("batch only:      ('1', '1')", "one by one only: ('1', '10')"),
    ),
    "sums-beyond-the-keys": Directed(
        Case(
            (_COUNTED,),
            (Handler((_ADD,)),),
            tuple(Message(f"key{n}", n, {"k": n % 2 + 1, "n": n}) for n in range(20)),
        ),
        "table",
        ("batch only:      ('1', '18')", "one by one only: ('1', '90')"),
    ),
    "no-turns": Directed(
        Case(
            (_COUNTED,),
            (
                Handler(
                    (
                        FetchVal("v", "select n from t0 where k = $1", ("k",)),
                        Execute("update t0 set n = $2 where k = $1", ("k", "v+n")),
                    ),
                    concurrency=3,
                ),
            ),
            _adding(1, 2, 4),
        ),
        "outcome",
        ("InterfaceError: cannot perform operation", "alone it succeeds"),
    ),
    "awaited-before-deferred": Directed(
        Case(
            (_COUNTED, _LOG),
            (Handler((_ADD, Execute("insert into l0 (n) select n from t0 where k = $1", ("k",)))),),
            _adding(5),
        ),
        "table",
        ("batch only:      ('0',)", "one by one only: ('5',)"),
    ),
    "constraints-at-the-end": Directed(
        Case(
            (Table("t0", ("k int primary key", _PARENT)),),
            (Handler((Defer("insert into t0 (k, parent) values ($1, $2)", ("k", "p")),)),),
            (Message("a", 1, {"k": 1, "p": 2}), Message("b", 2, {"k": 2, "p": None})),
        ),
        "outcome",
        ("message 0 at handler 0 is applied", "alone it fails with ForeignKeyViolationError"),
    ),
    # The trigger that one message makes fires once for each later statement.
    "schema-known-for-a-minute": Directed(
        Case(
            (_LOG,),
            (Handler((IfNone("d", (_INSERT,), (Execute(_TRIGGER),)),)),),
            tuple(Message(f"key{n}", n, {"n": n, "d": 1 if n == 10 else None}) for n in range(21)),
            ddl=_NOTE,
        ),
        "table",
        ("l1 (txt) differs", "one by one only: ('statement',)"),
    ),
    "failures-leave-their-writes": Directed(
        Case(
            (_LOG,),
            (Handler((Execute(_INSERT.sql, _INSERT.args), Boom())),),
            tuple(Message(f"key{n}", n, {"n": n, "boom": "raise" if n == 2 else None}) for n in range(4)),
        ),
        "table",
        ("l0 (n) differs", "batch only:      ('2',)"),
    ),
    "settings-stay": Directed(
        Case(
            (Table("l0", ("txt text",)),),
            (Handler((IfNone("d", (), (SetLocal("app.tenant", "t"),)), Defer(_TENANT))),),
            (Message("a", 1, {"d": 1, "t": "x"}), Message("b", 2, {"d": None, "t": "y"})),
        ),
        "table",
        ("batch only:      ('x',)", "one by one only: ('-',)"),
    ),
    "handler-after-handler": Directed(
        Case(
            (_COUNTED,),
            (Handler((_ADD,)), Handler((Defer("update t0 set n = n * 2 where k = $1", ("k",)),))),
            _adding(1, 2, 3),
        ),
        "table",
        ("batch only:      ('1', '48')", "one by one only: ('1', '22')"),
    ),
    "errors-are-swallowed": Directed(
        Case(
            (Table("l0", ("n bigint check (n < 3)",)),),
            (Handler((_INSERT,)),),
            _adding(1, 2, 3),
        ),
        "outcome",
        ("message 2 at handler 0 is applied", "alone it fails with CheckViolationError"),
    ),
    "undone-savepoints-publish": Directed(
        Case((_LOG,), (Handler((_INSERT, Savepoint((Publish("pa", ("n",)),), fails=True))),), _adding(1, 2)),
        "published",
        ("what ('pa', 0, 'h0') publishes differs", "batch only:"),
    ),
    "published-in-the-order-of-ids": Directed(
        Case((_LOG,), (Handler((_INSERT, Publish("pa", ("n",), "k"))),), _adding(*range(1, 9))),
        "published",
        ("what ('pa', 0, 'h0') publishes differs", "in its order"),
    ),
}
