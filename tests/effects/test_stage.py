"""Calls of other systems are made once, or left to an operator.

The PostgreSQL is real. The other system is a function of the test that keeps a journal. tests/effects/test_provider.py has one behind HTTP, and
workers that are killed.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
import pytest

from consumer import App, Call, Misconfigured, NotDone, Reject, Retry, Tx
from consumer.core.idempotency import idempotency_key
from consumer.core.identity import message_id
from consumer.postgres import effects
from consumer.testing import EFFECT_STEPS, STEPS, ExactlyOnce, Sent

pytest_plugins = ["consumer.testing"]

SCHEMA = "create table receipts (id text, receipt text, attempt int)"
DAY = timedelta(hours=24)


class Order(msgspec.Struct):
    id: str


class Receipt(msgspec.Struct):
    key: str
    attempt: int


class Journal:
    """What the other system was asked to do, and how it answers."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.asked: list[str] = []
        self.fails: list[Exception] = []  # of the next calls
        self.answers: list[Any] = []  # of .unsure

    async def charge(self, order: Order, call: Call) -> Receipt:
        self.calls.append((order.id, call.key))
        if self.fails:
            raise self.fails.pop(0)
        return Receipt(call.key, call.attempt)

    async def find(self, order: Order, call: Call) -> Receipt | None:
        self.asked.append(order.id)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Receipt(call.key, call.attempt) if answer else None


def app_of(remembers: Any = DAY, *, unsure: bool = False, attempts: int = 3, **options: Any) -> App:
    app = App("billing")

    @app.effect("charges", remembers=remembers, retry=Retry(attempts=attempts), **options)
    async def charge(order: Order, call: Call) -> Receipt:
        raise AssertionError("a test calls no other system")

    @charge.settled
    async def charged(order: Order, receipt: Receipt, tx: Tx) -> None:
        tx.defer("insert into receipts values ($1, $2, $3)", order.id, receipt.key, receipt.attempt)

    if unsure:

        @charge.unsure
        async def find(order: Order, call: Call) -> Receipt | None:
            raise AssertionError("a test asks no other system")

    return app


def order(name: str, key: str | None = None) -> Sent:
    return Sent("charges", Order(name), id=name, key=key)


async def trial_of(exactly_once: ExactlyOnce, app: App, journal: Journal) -> Any:
    stand_ins: dict[str, Any] = {"charge": journal.charge}
    effect = app.handlers["charge"].effect
    if effect is not None and effect.unsure is not None:
        stand_ins["charge.unsure"] = journal.find
    return await exactly_once(app, schema=SCHEMA, effects=stand_ins)


def key_of(name: str) -> str:
    return idempotency_key("billing", "charge", message_id(name.encode()), "call")


def outcomes(delivered: list[Any]) -> list[tuple[str, str]]:
    return [(end.outcome, end.cause) for end in delivered]


AGE = "update consumer.effects set first_at = first_at - interval '23 hours'"


async def test_a_call_is_made_once_and_its_result_applied_once(exactly_once: ExactlyOnce) -> None:
    journal = Journal()
    trial = await trial_of(exactly_once, app_of(concurrency=2), journal)
    sent = [order("a", "k"), order("b", "k"), order("c"), order("a", "k")]
    assert [end.outcome for end in await trial.deliver(*sent)] == ["applied"] * 3 + ["duplicate"]
    await trial.deliver_again()
    trial.assert_no_new_effects()
    assert sorted(journal.calls) == [(name, key_of(name)) for name in "abc"]
    rows = await trial.fetch("select id, receipt, attempt from receipts order by id")
    assert [tuple(row) for row in rows] == [(name, key_of(name), 1) for name in "abc"]


async def test_of_one_key_a_call_waits_until_the_message_before_is_applied(exactly_once: ExactlyOnce) -> None:
    journal = Journal()
    seen: list[int] = []

    async def charge(message: Order, call: Call) -> Receipt:
        seen.append(await trial.fetchval("select count(*) from receipts"))
        return await journal.charge(message, call)

    trial = await exactly_once(app_of(concurrency=10), schema=SCHEMA, effects={"charge": charge})
    await trial.deliver(*[order(name, "k") for name in "abc"])
    assert seen == [0, 1, 2] and [name for name, _ in journal.calls] == ["a", "b", "c"]


@pytest.mark.parametrize("step", [*EFFECT_STEPS, *STEPS])
async def test_a_crash_anywhere_repeats_a_call_only_under_its_key(exactly_once: ExactlyOnce, step: str) -> None:
    journal = Journal()
    trial = await trial_of(exactly_once, app_of(), journal)
    await trial.deliver(order("a"), crash_at=step)
    await trial.deliver()
    await trial.deliver_again()
    trial.assert_no_new_effects()
    assert set(journal.calls) == {("a", key_of("a"))}
    assert len(journal.calls) == (2 if step == "called" else 1)  # only its result was lost
    assert await trial.fetchval("select count(*) from receipts") == 1


@pytest.mark.parametrize("step", EFFECT_STEPS)
async def test_without_a_key_a_crash_leaves_the_message_to_an_operator(exactly_once: ExactlyOnce, step: str) -> None:
    journal = Journal()
    trial = await trial_of(exactly_once, app_of(remembers=0), journal)
    await trial.deliver(order("a"), crash_at=step)
    [end] = await trial.deliver()
    assert len(journal.calls) == (0 if step == "intended" else 1)
    assert (end.outcome, end.cause) == (
        ("applied", "") if step == "remembered" else ("dead-lettered", "effect_unknown")
    )


async def test_a_key_that_may_be_forgotten_is_not_used_again(exactly_once: ExactlyOnce) -> None:
    journal = Journal()
    trial = await trial_of(exactly_once, app_of(), journal)
    await trial.deliver(order("a", "k"), crash_at="called")
    await trial.execute(AGE)
    assert outcomes(await trial.deliver(order("b", "k"), order("c"))) == [
        ("dead-lettered", "effect_unknown"),
        ("dead-lettered", "behind"),  # its key waits
        ("applied", ""),
    ]
    assert [name for name, _ in journal.calls] == ["a", "c"]


async def test_the_other_system_is_asked_where_the_key_may_be_forgotten(exactly_once: ExactlyOnce) -> None:
    journal = Journal()
    trial = await trial_of(exactly_once, app_of(unsure=True), journal)
    await trial.deliver(order("done"), order("not done"), order("unknown"), crash_at="called")
    await trial.execute(AGE)
    assert len(journal.calls) == 3
    journal.answers = [True, False, RuntimeError("down"), Reject("look at it")]
    ends = outcomes(await trial.deliver())
    assert ends == [("applied", ""), ("applied", ""), ("dead-lettered", "effect_unknown")]
    assert [name for name, _ in journal.calls[3:]] == ["not done"]  # called again, with the key it had
    assert journal.calls[3][1] == key_of("not done")
    assert journal.asked == ["done", "not done", "unknown", "unknown"]


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (True, ("applied", "")),
        (False, ("dead-lettered", "failed")),
        (RuntimeError("down"), ("dead-lettered", "effect_unknown")),
    ],
)
async def test_the_other_system_is_asked_before_a_message_is_given_up(
    exactly_once: ExactlyOnce, answer: Any, end: tuple[str, str]
) -> None:
    journal = Journal()
    trial = await trial_of(exactly_once, app_of(unsure=True, attempts=2), journal)
    journal.fails, journal.answers = [TimeoutError(), TimeoutError()], [answer]
    assert outcomes(await trial.deliver(order("a"))) == [end]
    assert journal.calls == [("a", key_of("a"))] * 2
    assert await trial.fetchval("select count(*) from consumer.effects") == (0 if answer is False else 1)


@pytest.mark.parametrize(
    ("error", "remembers", "calls", "end"),
    [
        (ValueError("500"), DAY, 3, ("dead-lettered", "effect_unknown")),
        (ValueError("500"), 0, 1, ("dead-lettered", "effect_unknown")),
        (Reject("declined"), DAY, 1, ("dead-lettered", "rejected")),
        (NotDone("refused"), 0, 4, ("applied", "")),
        (NotDone("refused"), DAY, 4, ("applied", "")),
    ],
)
async def test_exception_of_a_call_says_whether_it_may_have_been_made(
    exactly_once: ExactlyOnce, error: Exception, remembers: Any, calls: int, end: tuple[str, str]
) -> None:
    journal = Journal()
    trial = await trial_of(exactly_once, app_of(remembers), journal)
    journal.fails = [error] * 3
    [delivered] = await trial.deliver(order("a"))
    assert (delivered.outcome, delivered.cause) == end
    assert len(journal.calls) == calls
    open_intents = await trial.fetchval("select count(*) from consumer.effects where result is null")
    assert open_intents == (1 if end[1] == "effect_unknown" else 0)


async def test_a_result_outlives_a_handler_that_fails(exactly_once: ExactlyOnce) -> None:
    journal = Journal()
    app = app_of(attempts=2)
    trial = await trial_of(exactly_once, app, journal)
    await trial.execute("alter table receipts add check (id <> 'a')")
    assert outcomes(await trial.deliver(order("a"))) == [("dead-lettered", "failed")]
    assert len(journal.calls) == 1
    assert await trial.fetchval("select result is not null from consumer.effects")


async def test_another_payload_of_the_id_is_not_called_for(exactly_once: ExactlyOnce) -> None:
    journal = Journal()
    trial = await trial_of(exactly_once, app_of(), journal)
    await trial.deliver(order("a"), crash_at="called")
    other = Sent("charges", Order("b"), id="a", key="another")
    assert sorted(outcomes(await trial.deliver(other))) == [("applied", ""), ("dead-lettered", "id_conflict")]
    assert {name for name, _ in journal.calls} == {"a"}


async def test_a_test_names_what_stands_in_for_the_other_system(exactly_once: ExactlyOnce) -> None:
    wrong: list[Callable[[], Any]] = [
        lambda: exactly_once(app_of(), schema=SCHEMA),
        lambda: exactly_once(app_of(), schema=SCHEMA, effects={"charge": Journal().charge, "other": Journal().charge}),
    ]
    for make, says in zip(wrong, ("a test must not", "no such effect"), strict=True):
        trial = await make()
        with pytest.raises(Misconfigured, match=says):
            await trial.deliver(order("a"))


async def test_results_are_dropped_with_the_ledger(exactly_once: ExactlyOnce) -> None:
    journal = Journal()
    trial = await trial_of(exactly_once, app_of(attempts=1), journal)
    journal.fails = [ValueError()]
    await trial.deliver(order("unknown"), order("forgotten"), order("applied"), batch=1)
    await trial.execute("alter table receipts add check (id <> 'dead')")
    await trial.deliver(order("dead"), order("later"), batch=1)
    await trial.execute(
        "update consumer.effects set first_at = first_at - interval '9 days' where id <> $1", _uuid("later")
    )
    await trial.execute("update consumer.ledger_state set horizon = now() - interval '8 days'")
    await trial.execute("delete from consumer.ledger where id = any($1)", [_uuid("forgotten"), _uuid("later")])
    connection = await asyncpg.connect(trial.dsn)
    await effects.forget(connection)
    await connection.close()
    rows = await trial.fetch("select id from consumer.effects")
    assert {row[0] for row in rows} == {_uuid(name) for name in ("unknown", "applied", "dead", "later")}


def _uuid(name: str) -> UUID:
    return UUID(bytes=message_id(name.encode()))
