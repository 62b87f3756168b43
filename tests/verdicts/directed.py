"""Cases that are written by hand.

The right answer of each is known, and a broken verdict gets one of them wrong.
"""

from __future__ import annotations

from typing import Any

from oracle.case import Boom, Defer, Step

from verdicts.case import Case, Draw, Event, Fault, Handler, Heal, Operate, Send, Settle, Table, When

_UPSERT = Defer("insert into latest values ($1, $2) on conflict (k) do update set n = excluded.n", ("k", "n"))
_LATEST = Table("latest", ("create table latest (k int primary key, n int)",))
_INSERT = Defer("insert into journal values ($1, $2)", ("i", "n"))
_JOURNAL = Table("journal", ("create table journal (i text, n int)",))
_SOFT = Table("soft", ("create table soft (k int primary key, n int, deleted_at timestamptz)",))
_SOFT_STEPS = (
    When("op", "a", (Defer("insert into soft (k, n) values ($1, $2)", ("k", "n")),)),
    When("op", "b", (Defer("update soft set deleted_at = now() where k = $1", ("k",)),)),
)


def _payload(n: int, **more: Any) -> dict[str, Any]:
    return {"i": f"m{n}", "k": 1, "n": n + 1, "op": "a", "boom": "", **more}


def _case(
    seed: int, table: Table, steps: tuple[Step, ...], payloads: list[dict[str, Any]], *history: Event, **more: Any
) -> Case:
    spread = more.pop("spread", True)
    partitions = more.pop("partitions", (1,))
    return Case(-seed, (table,), (Handler("handle", 0, (Boom(), *steps)),), partitions, tuple(payloads), history, spread=spread, **more)  # fmt: skip


def _sends(count: int, partition: int = 0) -> list[Event]:
    return [Send(n, n, 0, partition, f"k{n}", n) for n in range(count)]


_WRITERS: list[Event] = [Send(0, 0, 0, 1, "x", 0), Settle(), Send(1, 1, 0, 0, "y", 1), Settle()]
_MARKED = [_payload(0, k=1), _payload(1, k=2), _payload(2, k=1, op="b")]
_DRAWN = Table("drawn", ("create table drawn (u_rnd text primary key, k int, n int)",))
_DRAWN_STEPS = (Draw("u"), Defer("insert into drawn values ($1, $2, $3)", ("u", "k", "n")))
_THREE = [_payload(n) for n in range(3)]
_DEAD = [_payload(0), _payload(1, boom="raise"), _payload(2), _payload(3)]

# name -> the case, and the exit codes of check and rebuild that are right.
DIRECTED: dict[str, tuple[Case, int, int]] = {
    "the last of two partitions": (_case(1, _LATEST, (_UPSERT,), _THREE, *_WRITERS, partitions=(2,)), 0, 0),
    "the last of two partitions, swapped": (
        _case(2, _LATEST, (_UPSERT,), _THREE, *_WRITERS, partitions=(2,), fault=Fault("effects_swapped", 0, 0, 1)),
        0,
        1,
    ),
    "a soft delete": (_case(3, _SOFT, _SOFT_STEPS, _MARKED, *_sends(3), Settle()), 0, 0),
    "a lost soft delete": (
        _case(4, _SOFT, _SOFT_STEPS, _MARKED, *_sends(3), Settle(), fault=Fault("effect_lost", 0, 2)),
        0,
        1,
    ),
    "a lost row": (_case(5, _JOURNAL, (_INSERT,), _THREE, *_sends(3), Settle(), fault=Fault("effect_lost", 0, 1)), 0, 1),
    "a doubled row": (
        _case(6, _JOURNAL, (_INSERT,), _THREE, *_sends(3), Settle(), fault=Fault("effect_doubled", 0, 1)),
        0,
        1,
    ),
    "a lost ledger row": (_case(7, _JOURNAL, (_INSERT,), _THREE, *_sends(3), Settle(), fault=Fault("ledger_lost")), 1, 0),
    "a foreign ledger row": (
        _case(8, _JOURNAL, (_INSERT,), _THREE, *_sends(3), Settle(), fault=Fault("ledger_foreign")),
        1,
        0,
    ),
    "a removed dead letter": (
        _case(9, _JOURNAL, (_INSERT,), _DEAD, *_sends(3), Settle(), fault=Fault("letter_removed")),
        1,
        0,
    ),
    "an edited dead letter": (
        _case(10, _JOURNAL, (_INSERT,), _DEAD, *_sends(3), Settle(), Heal(), Operate("edit", 1, 3)),
        0,
        0,
    ),
    "a log without its first record": (
        _case(11, _JOURNAL, (_INSERT,), _THREE, *_sends(3), Settle(), fault=Fault("log_head")),
        0,
        2,
    ),
    "keys that Python draws": (_case(12, _DRAWN, _DRAWN_STEPS, _THREE, *_sends(3), Settle()), 0, 0),
    "a lost row under a drawn key": (
        _case(13, _DRAWN, _DRAWN_STEPS, _THREE, *_sends(3), Settle(), fault=Fault("effect_lost", 0, 1)),
        0,
        1,
    ),
    "a doubled effect under drawn keys": (
        _case(14, _DRAWN, _DRAWN_STEPS, _THREE, *_sends(3), Settle(), fault=Fault("effect_doubled", 0, 1)),
        0,
        1,
    ),
    "an altered row under a drawn key": (
        _case(15, _DRAWN, _DRAWN_STEPS, _THREE, *_sends(3), Settle(), fault=Fault("row_altered")),
        0,
        1,
    ),
}  # fmt: skip

# mutant -> the case that it gets wrong, the mode, and the wrong exit code.
CAUGHT = {
    "partition-order": ("the last of two partitions", "rebuild", 1),
    "dropped-columns": ("a lost soft delete", "rebuild", 0),
    "ledger-unread": ("a foreign ledger row", "check", 0),
    "missing-uncounted": ("a lost ledger row", "check", 0),
}
