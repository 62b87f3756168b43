"""Verdicts depend on which code has applied a message."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from harness import Place, Sent, consume_all, query, working
from payments_app import INSERT, Payment, payment

from consumer import App, Misconfigured, Tx
from consumer.replay.findings import Findings
from consumer.replay.options import Options, Progress
from consumer.replay.rebuild_run import RebuildOptions, run_rebuild
from consumer.replay.verify import replay


class WithFee(msgspec.Struct):
    id: str
    account: int
    amount: int = 0
    fee: int = 7


async def plain(payment: Payment, tx: Tx) -> None:
    tx.defer(INSERT, payment.id, payment.account, payment.amount)


async def doubling(payment: Payment, tx: Tx) -> None:
    tx.defer(INSERT, payment.id, payment.account, payment.amount * 2)


async def rearranged(payment: Payment, tx: Tx) -> None:
    amount = payment.amount
    tx.defer(INSERT, payment.id, payment.account, amount)


async def with_fee(payment: WithFee, tx: Tx) -> None:
    tx.defer(INSERT, payment.id, payment.account, payment.amount + payment.fee)


def by_id(value: Any) -> object:
    return value["id"] if isinstance(value, dict) else value.id


def by_account_and_id(value: Any) -> object:
    return f"{value.account} {value.id}"


def by_the_same_id(value: Any) -> object:
    id = value["id"] if isinstance(value, dict) else value.id
    return id


def app_of(topic: str, function: Callable[..., Any], name: str = "", handler: str = "settle", **options: Any) -> App:
    app = App(name or f"app-{uuid.uuid4().hex[:8]}")
    app.handler(topic, name=handler, **options)(function)
    return app


def messages(n: int, first: int = 0, **more: Any) -> list[Sent]:
    names = [f"p{number}" for number in range(first, first + n)]
    return [payment(name, id=None if more else name, key="k") for name in names]


async def rebuilt(place: Place, app: App, topic: str) -> Findings:
    return await run_rebuild(app, place.settings(), [topic], RebuildOptions(), Progress())


async def checked(place: Place, app: App, topic: str, **options: Any) -> Findings:
    return await replay(app, place.settings(), [topic], Options(**options), Progress())


async def applied(place: Place, function: Callable[..., Any] = plain, **options: Any) -> tuple[App, str]:
    topic = await place.topic()
    app = app_of(topic, function, **options)
    await place.send(topic, *messages(10))
    await consume_all(app, place.settings())
    return app, topic


async def test_rows_that_differ_after_a_change_of_the_code_are_no_proof(place: Place) -> None:
    app, topic = await applied(place)
    changed = app_of(topic, doubling, app.name)
    findings = await rebuilt(place, changed, topic)
    assert findings.verdict().exit_code == 2 and not findings.problems()
    [unknown] = findings.unknowns()
    assert unknown["kind"] == "differences" and unknown["count"] == 20
    assert "handler settle: 10 messages were, or may have been, applied by other code" in unknown["text"]
    assert "no worker has recorded" in unknown["text"]


async def test_rows_that_differ_under_the_same_code_are_a_fault(place: Place) -> None:
    app, topic = await applied(place)
    await query(place.dsn, "delete from effects where id = 'p3'")
    findings = await rebuilt(place, app, topic)
    assert findings.verdict().exit_code == 1
    again = app_of(topic, plain, app.name)  # as another process would have it
    assert (await rebuilt(place, again, topic)).verdict().exit_code == 1


async def test_rows_that_are_equal_after_a_change_of_the_code_are_right(place: Place) -> None:
    app, topic = await applied(place)
    changed = app_of(topic, rearranged, app.name)
    findings = await rebuilt(place, changed, topic)
    assert findings.verdict().exit_code == 0
    assert any("other code" in note for note in findings.notes)


async def test_code_of_two_deployments_names_since_when_the_last_one_is_known(place: Place) -> None:
    app, topic = await applied(place)
    changed = app_of(topic, doubling, app.name)
    await place.send(topic, *messages(10, 10))
    await consume_all(changed, place.settings())
    findings = await rebuilt(place, changed, topic)
    assert findings.verdict().exit_code == 2 and "which is recorded since 20" in findings.unknowns()[0]["text"]
    rows = await query(place.dsn, "select count(*), count(distinct code) from consumer.handler_code")
    assert rows == [(2, 2)]


async def test_two_versions_of_the_application_at_one_time_are_no_proof(place: Place) -> None:
    topic = await place.topic(2)
    old = app_of(topic, doubling)
    new = app_of(topic, plain, old.name)
    async with working(old, place.settings()), working(new, place.settings()):
        await place.send(topic, *messages(10))
        await consume_all(new, place.settings())
    await query(place.dsn, "delete from effects where id = 'p3'")
    assert (await rebuilt(place, new, topic)).verdict().exit_code == 2


async def test_a_version_says_that_changed_code_does_the_same(place: Place) -> None:
    app, topic = await applied(place, version="1")
    await query(place.dsn, "delete from effects where id = 'p3'")
    same = app_of(topic, rearranged, app.name, version="1")
    assert (await rebuilt(place, same, topic)).verdict().exit_code == 1
    other = app_of(topic, rearranged, app.name, version="2")
    assert (await rebuilt(place, other, topic)).verdict().exit_code == 2


async def test_a_changed_payload_type_is_a_change_of_the_code(place: Place) -> None:
    app, topic = await applied(place)
    changed = app_of(topic, with_fee, app.name)
    findings = await rebuilt(place, changed, topic)
    assert findings.verdict().exit_code == 2 and "other code" in findings.unknowns()[0]["text"]


async def test_rows_of_a_handler_that_is_gone_are_no_proof(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic, plain)
    app.handler(topic, name="second")(doubling)
    await place.send(topic, *messages(10))
    await consume_all(app, place.settings())
    without = app_of(topic, plain, app.name)
    findings = await rebuilt(place, without, topic)
    assert findings.verdict().exit_code == 2 and "not in the App any more: second" in findings.unknowns()[0]["text"]


async def test_workers_record_their_code_once(place: Place) -> None:
    app, topic = await applied(place)
    before = await query(place.dsn, "select code, first_seen, last_seen from consumer.handler_code")
    await place.send(topic, *messages(5, 10))
    await consume_all(app_of(topic, plain, app.name), place.settings())
    [(code, first, last)] = await query(place.dsn, "select code, first_seen, last_seen from consumer.handler_code")
    assert (code, first) == before[0][:2] and last > before[0][2]


async def test_an_apply_records_its_code(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic, plain)
    await place.send(topic, *messages(10))
    await checked(place, app, topic, mode="apply")
    assert await query(place.dsn, "select count(*) from consumer.handler_code") == [(1,)]
    await query(place.dsn, "delete from effects where id = 'p3'")
    assert (await rebuilt(place, app, topic)).verdict().exit_code == 1


async def test_messages_of_before_any_record_are_no_proof(place: Place) -> None:
    app, topic = await applied(place)
    await query(place.dsn, "update consumer.handler_code set first_seen = now(), last_seen = now()")
    await query(place.dsn, "update consumer.ledger set applied_at = applied_at - interval '1 hour'")
    await query(place.dsn, "delete from effects where id = 'p3'")
    assert (await rebuilt(place, app, topic)).verdict().exit_code == 2


# -- the function of message_id= ------------------------------------------------------------------------------------------


async def test_missing_messages_after_a_change_of_the_id_function_are_no_proof(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic, plain, message_id=by_id)
    await place.send(topic, *messages(10, id=None))
    await consume_all(app, place.settings())
    assert (await checked(place, app, topic)).verdict().exit_code == 0

    def changed_to(function: Callable[[Any], object]) -> App:
        function.__name__ = function.__qualname__ = "by_id"  # the same name: only its source has changed
        return app_of(topic, plain, app.name, message_id=function)

    same = changed_to(by_the_same_id)
    assert (await checked(place, same, topic)).verdict().exit_code == 0
    other = changed_to(by_account_and_id)
    findings = await checked(place, other, topic)
    assert findings.verdict().exit_code == 2 and not findings.problems()
    [unknown] = findings.unknowns()
    assert unknown["kind"] == "id_code_changed" and unknown["count"] == 20 and "'settle'" in unknown["text"]
    with pytest.raises(Misconfigured, match="name it with --handler settle"):
        await checked(place, other, topic, mode="apply")
    await query(place.dsn, "delete from consumer.ledger")
    assert (await checked(place, app, topic)).verdict().exit_code == 1
