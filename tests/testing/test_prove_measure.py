"""`prove` against handlers whose effects depend on more than the message.

It compares with one undisturbed run.
"""

from __future__ import annotations

import itertools
import random
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from consumer import App, Message, Misconfigured, Tx
from consumer.postgres.claims import ExistingClaim
from consumer.postgres.session import Session
from consumer.testing import ExactlyOnce, Sent

TABLES = """
create table effects (id text not null, amount numeric, noted text);
create table orders (number serial primary key, id text not null, made_at timestamptz not null default now());
create table items (id uuid primary key default gen_random_uuid(), order_number int references orders, name text);
"""
INSERT = "insert into effects values ($1, $2, $3)"

# -- what differs from one run to another ------------------------------------------------------------------------------


def seen_before(app: App) -> None:
    seen: set[str] = set()

    @app.handler("payments")
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        if message.id in seen:
            return
        seen.add(message.id)
        await tx.execute(INSERT, message.id, 1, "")


def every_tenth_call_only(app: App) -> None:
    calls = itertools.count()

    @app.handler("payments")
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        if next(calls) % 10 == 0:  # the undisturbed run makes calls 0 to 3, transactions that end 6 to 15
            await tx.execute(INSERT, message.id, 1, "")


def noting(what: Callable[[], object]) -> Callable[[App], None]:
    def build(app: App) -> None:
        @app.handler("payments")
        async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
            tx.defer(INSERT, message.id, 1, str(what()))

    return build


def place_in_the_batch(app: App) -> None:
    @app.handler("payments", batch=100)
    async def settle(messages: list[Message[dict[str, Any]]], tx: Tx) -> None:
        for n, message in enumerate(messages):
            tx.defer(INSERT, message.id, 1, str(n))


def size_of_the_batch(app: App) -> None:
    @app.handler("payments", batch=100)
    async def settle(messages: list[Message[dict[str, Any]]], tx: Tx) -> None:
        for message in messages:
            tx.defer(INSERT, message.id, len(messages), "")


def running_total(app: App) -> None:
    total = 0

    @app.handler("payments")
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        nonlocal total
        total += 1
        tx.defer(INSERT, message.id, total, "")


_counter = itertools.count()
FAULTS: dict[str, tuple[Callable[[App], None], str]] = {
    "a set of what was seen": (seen_before, "4 rows are missing and 0 are extra"),
    "every tenth call": (every_tenth_call_only, "1 rows are missing and 0 are extra"),
    "uuid4": (noting(uuid.uuid4), "other values in noted"),
    "random": (noting(random.random), "other values in noted"),
    "time": (noting(time.time_ns), "other values in noted"),
    "datetime": (noting(lambda: datetime.now(UTC)), "other values in noted"),
    "a counter of the process": (noting(lambda: next(_counter)), "other values in noted"),
    "a running total": (running_total, "other values in amount"),
    "the place in the batch": (place_in_the_batch, "other values in noted"),
    "the size of the batch": (size_of_the_batch, "other values in amount"),
}


def payments(number: int = 4) -> list[Sent]:
    return [Sent("payments", {"n": n}, id=f"p{n}", key=str(n)) for n in range(number)]


@pytest.mark.parametrize("batch", [None, 1, 2], ids=["all at once", "one by one", "by two"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_prove_with_effects_that_do_not_follow_from_the_message_fails(
    exactly_once: ExactlyOnce, fault: str, batch: int | None
) -> None:
    app = App(f"shop-{uuid.uuid4().hex[:8]}")
    build, says = FAULTS[fault]
    build(app)
    trial = await exactly_once(app, schema=TABLES)
    with pytest.raises(AssertionError, match=f"(?s)than in one undisturbed run:.*public.effects: .*{says}"):
        await trial.prove(*payments(), batch=batch)


async def test_prove_leaves_out_ignored_tables(exactly_once: ExactlyOnce) -> None:
    app = App(f"shop-{uuid.uuid4().hex[:8]}")
    noting(uuid.uuid4)(app)
    for ignore in (["effects.noted"], ["noted"], ["public.effects.noted"], ["effects"]):
        trial = await exactly_once(app, schema=TABLES)
        await trial.prove(*payments(), ignore=ignore)
        assert await trial.fetchval("select count(*) from effects") == 4
    with pytest.raises(Misconfigured, match=r"ignore='effects[.]note': no such table or column"):
        await trial.prove(*payments(), ignore=["effects.note"])


async def test_prove_does_not_compare_what_postgresql_makes_up(exactly_once: ExactlyOnce) -> None:
    """Sequences have gaps after a crash; so do foreign keys to them."""
    app = App(f"shop-{uuid.uuid4().hex[:8]}")

    @app.handler("payments")
    async def order(message: Message[dict[str, Any]], tx: Tx) -> None:
        number = await tx.fetchval("insert into orders (id) values ($1) returning number", message.id)
        await tx.execute("insert into items (order_number, name) values ($1, $2)", number, message.id)

    trial = await exactly_once(app, schema=TABLES)
    await trial.prove(*payments())
    assert await trial.fetchval("select count(*) from items join orders on order_number = number") == 4


async def test_prove_compares_beside_rows_that_were_there(exactly_once: ExactlyOnce) -> None:
    app = App(f"shop-{uuid.uuid4().hex[:8]}")
    noting(lambda: "")(app)
    trial = await exactly_once(app, schema=TABLES)
    await trial.execute("insert into effects values ('mine', 1, '')")
    await trial.deliver(*payments(2))
    await trial.prove(*[Sent("payments", {"n": n}, id=f"q{n}") for n in range(3)])
    assert await trial.fetchval("select count(*) from effects") == 6


async def test_prove_while_another_session_is_connected_says_so(exactly_once: ExactlyOnce) -> None:
    app = App(f"shop-{uuid.uuid4().hex[:8]}")
    noting(lambda: "")(app)
    trial = await exactly_once(app, schema=TABLES)
    connection = await asyncpg.connect(trial.dsn)
    try:
        with pytest.raises(Misconfigured, match="other sessions are connected"):
            await trial.prove(*payments())
    finally:
        await connection.close()
    await trial.prove(*payments())


# -- faults in a single run of the handler, or of the claim ------------------------------------------------------------

# With one message, the handler runs once undisturbed, and then in the transactions that crash when it has run (handled,
# before the COMMIT, committed): what the fourth run has written is stored.
STORED_RUN = 4
BALANCES = "create table balances (account int primary key, amount int not null); insert into balances values (1, 0)"


@pytest.mark.parametrize("what", ["update", "insert", "deferred"])
async def test_prove_with_another_value_after_crashes_fails(exactly_once: ExactlyOnce, what: str) -> None:
    """As many rows as undisturbed, one of them with another value."""
    app = App(f"shop-{uuid.uuid4().hex[:8]}")
    runs = itertools.count(1)

    @app.handler("payments")
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        amount = 2 if next(runs) == STORED_RUN else 1
        match what:
            case "update":
                await tx.execute("update balances set amount = amount + $1", amount)
            case "insert":
                await tx.execute("insert into balances values (2, $1)", amount)
            case _:
                tx.defer("update balances set amount = amount + $1", amount)

    trial = await exactly_once(app, schema=BALANCES)
    with pytest.raises(AssertionError, match=r"public.balances: 1 rows have other values in amount"):
        await trial.prove(*payments(1))


@pytest.mark.parametrize("answer", ["new", "taken"])
@pytest.mark.parametrize("question", range(1, 8))
async def test_prove_with_one_wrong_answer_of_the_claim_fails(
    exactly_once: ExactlyOnce, monkeypatch: pytest.MonkeyPatch, question: int, answer: str
) -> None:
    """A wrong answer doubles or loses an update, if it is stored.

    In a transaction that is rolled back it does no harm.
    """
    app = App(f"shop-{uuid.uuid4().hex[:8]}")

    @app.handler("payments")
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        tx.defer("update balances set amount = amount + 1")

    trial = await exactly_once(app, schema=BALANCES)
    claim = Session.claim
    questions = itertools.count(1)

    async def wrong(self: Any, deliveries: Any, topics: Any) -> Any:
        claims = await claim(self, deliveries, topics)
        if next(questions) != question:
            return claims
        return (
            {}
            if answer == "new"
            else dict.fromkeys(deliveries, ExistingClaim(dead=False, clashes=False, same_record=False))
        )

    monkeypatch.setattr(Session, "claim", wrong)
    try:
        await trial.prove(*payments(1))
    except AssertionError:
        failed = True
    else:
        failed = False
    # The undisturbed run asks first; the crash at "begun" comes before the question, four more steps ask, and then the
    # message is delivered again twice.
    harmful = {"new": {6, 7}, "taken": {1, 5}}[answer]
    assert failed == (question in harmful)
    if not failed:
        assert await trial.fetchval("select amount from balances") == 1
