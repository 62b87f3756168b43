"""Replay on real services: what it finds, repairs, and leaves alone."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.records_to_delete import RecordsToDelete
from aiokafka.structs import OffsetAndMetadata
from database_contents import all_rows
from harness import Place, Sent, consume_all, drained, letters, query, until, value, working
from payments_app import INSERT, QUICK, UPDATE, Payment, payment, payments_app
from replay_runs import ledger_id, outcome_counts, run_replay

from consumer import App, CannotTell, Message, Misconfigured, Reject, Retry, RunAgain, Tx, verify
from consumer.admin.positions import move_position
from consumer.core.message import Partition
from consumer.demo.application import settle
from consumer.demo.plan import plan
from consumer.kafka import log_reader
from consumer.local_servers import Valkey
from consumer.postgres.session import Session
from consumer.precheck.client import Precheck
from consumer.replay import engine, summary
from consumer.replay.findings import Findings
from consumer.replay.options import Limits, Options, Progress
from consumer.replay.run import Run
from consumer.replay.verify import replay


@pytest.fixture
async def settled(place: Place) -> tuple[Place, App, str]:
    """A topic of 60 messages, 10 of them twice, all applied.

    One is a dead letter.
    """
    topic = await place.topic(2)
    app = payments_app(topic, retry=QUICK)
    sent = [payment(f"p{n}", n % 7, n + 1) for n in range(59)] + [payment("bad", 1, -1)]
    await place.send(topic, *sent, *sent[:10])
    await consume_all(app, place.settings(precheck_budget_ms=5000))
    return place, app, topic


async def test_check_of_a_consumed_topic_finds_everything_applied(settled: tuple[Place, App, str]) -> None:
    place, app, topic = settled
    before = await all_rows(place.dsn)
    findings = await run_replay(place, app, topic)
    assert outcome_counts(findings) == {"delivered": 70, "applied": 69, "dead_lettered": 1}
    assert findings.verdict().exit_code == 0
    assert findings.as_dict()["effects"]["rows"] == 0 and findings.as_dict()["effects"]["transactions"] == 2
    assert findings.history == {"settle": {"rows": 60, "with_message": 60, "without_message": 0}}
    assert findings.precheck == {"asked": 70, "hits": 69, "wrong": 0, "unanswered": 0}
    assert await all_rows(place.dsn) == before


async def test_a_message_that_was_lost_is_found_and_repaired(settled: tuple[Place, App, str]) -> None:
    place, app, topic = settled
    [(id,)] = await query(place.dsn, "select id from consumer.ledger where id = $1", ledger_id("p3"))
    await query(place.dsn, "delete from consumer.ledger where id = $1", id)
    await query(place.dsn, "delete from effects where id = 'p3'")
    await query(place.dsn, "update accounts set balance = balance - 4 where id = 3")
    before = await all_rows(place.dsn)
    findings = await run_replay(place, app, topic)
    assert outcome_counts(findings) == {"delivered": 70, "applied": 67, "dead_lettered": 1, "missing": 1, "repeated": 1}
    assert findings.verdict().exit_code == 1
    assert findings.precheck is not None and findings.precheck["wrong"] == 2
    [sample] = [sample for sample in findings.samples if sample["kind"] == "missing"]
    assert sample["id"] == str(id) and sample["detail"] == "not applied"
    assert findings.ahead == 0
    assert await all_rows(place.dsn) == before

    findings = await run_replay(place, app, topic, mode="apply")
    assert outcome_counts(findings) == {
        "delivered": 70,
        "applied": 67,
        "dead_lettered": 1,
        "repeated": 1,
        "applied_now": 1,
    }
    assert findings.verdict().exit_code == 0
    assert await value(place.dsn, "select count(*) from effects") == 59
    assert await value(place.dsn, "select sum(balance) from accounts") == sum(range(60))
    findings = await run_replay(place, app, topic)
    assert (
        outcome_counts(findings) == {"delivered": 70, "applied": 69, "dead_lettered": 1}
        and findings.verdict().exit_code == 0
    )


# -- what it finds ------------------------------------------------------------------------------------------------------


async def test_an_effect_without_a_ledger_row_is_missing_in_the_ledger(settled: tuple[Place, App, str]) -> None:
    place, app, topic = settled
    await query(place.dsn, "delete from consumer.ledger where id = $1 returning id", ledger_id("p20"))
    findings = await run_replay(place, app, topic)
    assert outcome_counts(findings) == {"delivered": 70, "applied": 68, "dead_lettered": 1, "missing": 1}
    assert findings.verdict().exit_code == 1


@pytest.mark.parametrize("offset", ["its own", "another's", "one that is not there"])
async def test_a_ledger_row_without_a_message_is_found(settled: tuple[Place, App, str], offset: str) -> None:
    place, app, topic = settled
    await query(
        place.dsn,
        """insert into consumer.ledger (fingerprint, "offset", applied_at, partition, handler, topic, id)
           select 1, case $1 when 'one that is not there' then 30 else "offset" end, now(), partition, handler, topic, $2
           from consumer.ledger where id = $3 returning id""",
        offset,
        ledger_id("never sent"),
        ledger_id("p5"),
    )
    if offset == "its own":  # as if p5 had been applied under another id
        await query(place.dsn, "delete from consumer.ledger where id = $1 returning id", ledger_id("p5"))
    findings = await run_replay(place, app, topic)
    assert findings.history == {
        "settle": {"rows": 60 + (offset != "its own"), "with_message": 59 + (offset != "its own"), "without_message": 1}
    }
    assert findings.verdict().exit_code == 1
    [sample] = [sample for sample in findings.samples if sample["kind"] == "rows_without_message"]
    assert sample["id"] == str(ledger_id("never sent"))


@pytest.mark.parametrize("what", ["rows", "a lock", "a sequence", "a failure"])
async def test_a_handler_that_is_called_in_spite_of_its_claim_is_caught(
    place: Place, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    topic = await place.topic(2)
    app = App(f"app-{uuid.uuid4().hex[:8]}")
    await query(place.dsn, "create sequence numbers")
    broken = False

    @app.handler(topic, name="settle")
    async def settle(payment: Payment, tx: Tx) -> None:
        if not broken or what == "rows":
            tx.defer(INSERT, payment.id, payment.account, payment.amount)
            tx.defer(UPDATE, payment.account, payment.amount)
        elif what == "a lock":
            await tx.execute("select * from accounts where id = 1 for update")
        elif what == "a sequence":
            await tx.fetchval("select nextval('numbers')")
        else:
            await tx.execute("select 1 / 0")

    await place.send(topic, *[payment(f"p{n}") for n in range(20)])
    await consume_all(app, place.settings())
    assert (await run_replay(place, app, topic)).ok

    original = Session.claim

    async def claim(self: Session, deliveries: Any, topics: Mapping[str, int]) -> Any:
        await original(self, deliveries, topics)
        return {}  # as if no claim had been lost

    monkeypatch.setattr(Session, "claim", claim)
    # Several transactions of one session: each counts only its own rows.
    limits = {"chunk_deliveries": 5} if what == "rows" else {}
    broken = True
    before = await all_rows(place.dsn)
    unclaimed = await run_replay(place, app, topic, limits=limits)  # calls no handler, and the claims tell
    assert {problem["kind"]: problem["count"] for problem in unclaimed.problems()} == {"claims": 20}
    findings = await run_replay(place, app, topic, call_handlers=True, limits=limits)
    kinds = {problem["kind"]: problem["count"] for problem in findings.problems()}
    expected = {
        "rows": {"claims": 20, "effects": 40},
        "a lock": {"claims": 20, "effects_otherwise": 1},
        "a sequence": {"claims": 20, "sequences": 1, "effects_otherwise": 1},
        "a failure": {"claims": 20},
    }[what]
    assert kinds == expected
    assert findings.verdict().exit_code == 1
    assert outcome_counts(findings) == {"delivered": 20, "applied": 20}
    if what == "rows":
        effects = findings.as_dict()["effects"]
        assert effects["tables"] == {
            "public.accounts": {"inserted": 0, "updated": 20, "deleted": 0},
            "public.effects": {"inserted": 20, "updated": 0, "deleted": 0},
        }
        assert "pg_stat_xact" in effects["how"]
    if what != "a sequence":
        assert await all_rows(place.dsn) == before


async def test_every_outcome_is_counted_once_and_under_its_own_name(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)

    @app.handler(topic, idempotent=False)
    async def look(payment: bytes) -> None: ...

    await place.send(
        topic,
        payment("a"),
        payment("a"),
        payment("other", id="a"),  # the id of another payload
        payment("no", amount=-1),
        Sent(b"{", id="unreadable"),
        Sent({"id": "none", "account": 1, "amount": 1}, id=""),  # an empty id
    )
    await consume_all(app, place.settings())
    findings = await run_replay(place, app, topic)
    assert outcome_counts(findings) == {
        "delivered": 6,
        "applied": 2,
        "conflicts": 1,
        "dead_lettered": 2,
        "unreadable": 1,
    }
    assert outcome_counts(findings, "look") == {"delivered": 6, "skipped": 6}
    assert findings.ok and findings.unsettled == 0
    # What is not consumed yet, in the same chunk as what is.
    await place.send(
        topic,
        payment("b"),
        payment("b"),
        payment("c", amount=-1),
        Sent(b"{", id="unreadable too"),
        Sent({"id": "none", "account": 1, "amount": 1}, id=""),
        payment("other again", id="a"),
    )
    before = await all_rows(place.dsn)
    unclaimed = await run_replay(place, app, topic)
    findings = await run_replay(place, app, topic, call_handlers=True)
    assert outcome_counts(unclaimed) == outcome_counts(findings)
    assert {sample["detail"] for sample in unclaimed.samples if sample["kind"] == "missing"} == {
        "not applied; workers have not come to it yet"
    }
    assert outcome_counts(findings) == {
        "delivered": 12,
        "applied": 2,
        "conflicts": 2,
        "dead_lettered": 2,
        "unreadable": 3,
        "missing": 2,
        "repeated": 1,
    }
    assert (findings.unsettled, findings.ahead) == (3, 2)
    assert {sample["detail"] for sample in findings.samples if sample["kind"] == "missing"} == {
        "would be applied; workers have not come to it yet",
        "would become a dead letter (rejected); workers have not come to it yet",
    }
    assert await all_rows(place.dsn) == before
    assert (await run_replay(place, app, topic, end="position")).ok

    findings = await run_replay(place, app, topic, mode="apply")
    assert (findings.total("applied_now"), findings.total("dead_lettered_now")) == (1, 4)
    assert [problem["kind"] for problem in findings.problems()] == ["dead_lettered_now"]  # somebody must look at those
    assert len(await letters(place.dsn)) == 8
    assert (await run_replay(place, app, topic)).ok


async def test_conflict_whose_dead_letter_is_gone_is_reported(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, payment("a"), payment("b", id="a"))
    await consume_all(app, place.settings())
    assert (await run_replay(place, app, topic)).ok
    await query(place.dsn, "delete from consumer.dead_letters returning id")
    findings = await run_replay(place, app, topic)
    assert [problem["kind"] for problem in findings.problems()] == ["unsettled"] and findings.verdict().exit_code == 1


@pytest.mark.parametrize("rule", ["bytes", "value"])
async def test_an_applied_payload_behind_a_conflicting_one_is_no_conflict(place: Place, rule: str) -> None:
    """The first of two payloads with one id became the conflict later.

    A worker began behind it. The row is from before the handler compared values, if it does now.
    """
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, payment("first", id="same"), payment("second", id="same"), payment("second", id="same"))
    await commit(place, app.name, topic, 1)
    await consume_all(app, place.settings())
    assert await place.effects() == [("second", 1, 10)]
    app = payments_app(topic, name=app.name, retry=QUICK, fingerprint=rule)
    applied = await run_replay(place, app, topic, mode="apply", assume_unapplied=True)
    assert (applied.total("dead_lettered_now"), applied.total("applied_now")) == (1, 0)
    findings = await run_replay(place, app, topic)
    assert findings.ok, findings.answer()
    assert outcome_counts(findings) == {"delivered": 3, "applied": 2, "conflicts": 1}


async def test_message_from_before_the_ledger_is_unknown(place: Place, kafka: Any) -> None:
    """The framework continues a group that another loop began.

    That loop brought the group to offset 10.
    """
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}") for n in range(10)])
    admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
    await admin.start()
    await admin.alter_consumer_group_offsets(
        app.name, {TopicPartition(topic, 0): OffsetAndMetadata(10, "")}
    ) if hasattr(admin, "alter_consumer_group_offsets") else await commit(place, app.name, topic, 10)
    await admin.close()
    for consumed in (False, True):
        if consumed:
            await place.send(topic, payment("new"))
            await consume_all(app, place.settings())
            assert await place.effects() == [("new", 1, 10)]
        findings = await run_replay(place, app, topic)
        assert findings.total("unknown") == 10 and findings.total("missing") == 0
        assert findings.verdict().exit_code == 2
        assert "--assume-unapplied" in findings.answer()
    assert (await run_replay(place, app, topic, start="10")).ok
    before = await all_rows(place.dsn)
    assert (await run_replay(place, app, topic, mode="apply")).verdict().exit_code == 2
    assert await all_rows(place.dsn) == before
    findings = await run_replay(place, app, topic, assume_unapplied=True)
    assert findings.total("missing") == 10 and findings.verdict().exit_code == 1
    assert (await run_replay(place, app, topic, mode="apply", assume_unapplied=True)).total("applied_now") == 10
    assert (await run_replay(place, app, topic)).ok


async def test_a_position_that_is_moved_back_takes_the_ledgers_beginning_with_it(place: Place) -> None:
    """Absent messages above it are missing; below it they stay in doubt.

    Workers will come to what is above it.
    """
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}") for n in range(10)])
    await commit(place, app.name, topic, 10)
    await place.send(topic, payment("new"))
    await consume_all(app, place.settings())
    connection = await asyncpg.connect(place.dsn)
    try:
        for to, unknown in ((3, 3), (8, 3)):
            await move_position(connection, app.name, Partition(topic, 0), to)
            findings = await run_replay(place, app, topic)
            assert (findings.total("unknown"), findings.total("missing")) == (unknown, 10 - unknown)
    finally:
        await connection.close()


async def commit(place: Place, group: str, topic: str, offset: int) -> None:
    from aiokafka import AIOKafkaConsumer

    consumer = AIOKafkaConsumer(bootstrap_servers=place.kafka, group_id=group, enable_auto_commit=False)
    await consumer.start()
    consumer.assign([TopicPartition(topic, 0)])
    await consumer.commit({TopicPartition(topic, 0): offset})
    await consumer.stop()


async def test_marks_in_redis_are_compared_with_the_ledger(place: Place, own_valkey: Valkey) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}") for n in range(10)])
    await consume_all(app, place.settings(redis_url=own_valkey.url))
    findings = await run_replay(place, app, topic, settings={"redis_url": own_valkey.url})
    assert findings.precheck == {"asked": 10, "hits": 10, "wrong": 0, "unanswered": 0}
    findings = await run_replay(place, app, topic, settings={"redis_url": None})
    assert findings.precheck is None and findings.ok
    own_valkey.stop()
    findings = await run_replay(place, app, topic, settings={"redis_url": own_valkey.url})
    assert findings.precheck == {"asked": 0, "hits": 0, "wrong": 0, "unanswered": 10} and findings.ok


async def test_message_that_a_worker_settles_meanwhile_is_not_missing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}", n) for n in range(20)])
    original = summary.conclude

    async def conclude(replay_run: Run, *args: Any, **options: Any) -> None:
        assert replay_run.findings.total("missing") == 20
        await consume_all(app, place.settings())
        await original(replay_run, *args, **options)

    monkeypatch.setattr(summary, "conclude", conclude)
    findings = await run_replay(place, app, topic)
    assert outcome_counts(findings) == {"delivered": 20, "applied": 20} and findings.ok and findings.ahead == 0


async def test_aborted_transactions_and_markers_are_passed_over(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    producer = AIOKafkaProducer(bootstrap_servers=place.kafka, transactional_id=uuid.uuid4().hex)
    await producer.start()
    for n, abort in enumerate([False, True, False, True]):
        await producer.begin_transaction()
        sent = payment(f"p{n}")
        await producer.send_and_wait(topic, sent.value, key=sent.key, headers=sent.headers)
        await (producer.abort_transaction() if abort else producer.commit_transaction())
    await consume_all(app, place.settings())
    findings = await run_replay(place, app, topic)
    assert outcome_counts(findings) == {"delivered": 2, "applied": 2} and findings.ok
    await producer.begin_transaction()  # and stays open: it is not read, nor waited for
    sent = payment("open")
    await producer.send_and_wait(topic, sent.value, key=sent.key, headers=sent.headers)
    assert (await run_replay(place, app, topic)).ok
    await producer.abort_transaction()
    await producer.stop()


@pytest.mark.parametrize("policy", ["compact", "delete"])
async def test_a_compacted_log_may_lack_what_the_ledger_has(place: Place, policy: str) -> None:
    topic = await place.topic(1, **{"cleanup.policy": policy})
    app = payments_app(topic, retry=QUICK)
    producer = AIOKafkaProducer(bootstrap_servers=place.kafka, transactional_id=uuid.uuid4().hex)
    await producer.start()
    async with producer.transaction():
        for name in ("a", "b"):
            sent = payment(name)
            await producer.send_and_wait(topic, sent.value, key=name.encode(), headers=sent.headers)
    await producer.stop()
    await consume_all(app, place.settings())
    assert (await run_replay(place, app, topic)).ok
    # Its row now names the marker's offset, as if its record were gone.
    await query(place.dsn, """update consumer.ledger set "offset" = 2 where id = $1 returning id""", ledger_id("a"))
    findings = await run_replay(place, app, topic)
    assert findings.ok is (policy == "compact")
    assert findings.gone == (policy == "compact")


@pytest.mark.parametrize(("partition", "offset"), [(0, 999_999), (77, 0), (1, 40)])
async def test_a_ledger_row_that_names_no_place_of_the_log_is_found(
    settled: tuple[Place, App, str], partition: int, offset: int
) -> None:
    place, app, topic = settled
    await query(
        place.dsn,
        """insert into consumer.ledger (fingerprint, "offset", applied_at, partition, handler, topic, id)
           select 1, $1, now(), $2, handler, topic, $3 from consumer.ledger limit 1 returning id""",
        offset,
        partition,
        ledger_id("never sent"),
    )
    findings = await run_replay(place, app, topic)
    assert [problem["kind"] for problem in findings.problems()] == ["rows_without_message"]
    assert findings.samples[-1]["detail"] == "the log has no such offset"


async def test_a_filter_that_lets_nothing_through_is_no_proof(settled: tuple[Place, App, str]) -> None:
    place, app, topic = settled
    for narrowed in ({"message_id": "nope"}, {"key": "nope"}):
        with pytest.raises(Misconfigured, match="no message of the range has that"):
            await run_replay(place, app, topic, **narrowed)
    with pytest.raises(Misconfigured, match="no message of the range has that key"):
        await run_replay(place, app, topic, mode="republish", target=await place.topic(), key="nope")
    with pytest.raises(Misconfigured, match="--message-id: empty"):
        await run_replay(place, app, topic, message_id="")


async def test_tombstone_with_a_used_id_is_a_conflict_until_dead_lettered(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, payment("a"))
    await consume_all(app, place.settings())
    await place.send(topic, Sent(None, id="a", key="k"))
    assert (await run_replay(place, app, topic)).unsettled == 1
    await consume_all(app, place.settings())
    findings = await run_replay(place, app, topic)
    assert findings.ok and outcome_counts(findings) == {"delivered": 2, "applied": 1, "conflicts": 1}


@pytest.mark.parametrize("chunk", [1, 4096])
async def test_an_id_with_two_payloads_is_settled_by_one_apply(place: Place, chunk: int) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, payment("x", id="same", partition=0), payment("y", id="same", partition=1))
    await place.send(topic, payment("z", id="same", partition=0))
    findings = await run_replay(place, app, topic, limits={"chunk_deliveries": chunk})
    assert (findings.total("missing"), findings.total("conflicts"), findings.unsettled) == (1, 2, 2)
    findings = await run_replay(place, app, topic, mode="apply", limits={"chunk_deliveries": chunk})
    assert (findings.total("applied_now"), findings.total("dead_lettered_now")) == (1, 2)
    assert (await run_replay(place, app, topic, limits={"chunk_deliveries": chunk})).ok
    assert len(await place.effects()) == 1 and len(await letters(place.dsn)) == 2


async def test_missing_dead_letter_is_reported(settled: tuple[Place, App, str]) -> None:
    place, app, topic = settled
    await query(place.dsn, "delete from consumer.dead_letters returning 1")
    findings = await run_replay(place, app, topic)
    assert [problem["kind"] for problem in findings.problems()] == ["unsettled"]
    assert findings.samples[-1]["detail"] == "its dead letter is gone"


async def test_unreadable_message_from_before_the_ledger_is_unknown(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, Sent(None, id="old", key="k"), payment("new"))
    await commit(place, app.name, topic, 1)
    await consume_all(app, place.settings())
    findings = await run_replay(place, app, topic)
    assert (
        outcome_counts(findings) == {"delivered": 2, "applied": 1, "unknown": 1} and findings.verdict().exit_code == 2
    )


async def test_a_redis_that_hangs_is_not_asked_for_ever(
    place: Place, own_valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}") for n in range(40)])
    settings = {"redis_url": own_valkey.url}
    await consume_all(app, place.settings(**settings))
    asked = 0
    original = Precheck.known

    async def known(self: Any, *args: Any) -> Any:
        nonlocal asked
        asked += 1
        return await original(self, *args)

    monkeypatch.setattr(Precheck, "known", known)
    os.kill(own_valkey.pid, signal.SIGSTOP)
    try:
        findings = await run_replay(
            place, app, topic, settings=settings, limits={"chunk_deliveries": 1, "precheck_seconds": 0.05}
        )
    finally:
        os.kill(own_valkey.pid, signal.SIGCONT)
    assert findings.ok and findings.precheck is not None and findings.precheck["unanswered"] == 40
    assert asked == 3


# -- what it repairs ----------------------------------------------------------------------------------------------------


async def test_a_new_handler_is_filled_from_the_history(settled: tuple[Place, App, str]) -> None:
    place, app, topic = settled
    await query(place.dsn, "create table receipts (id text, at int)")

    @app.handler(topic, name="receipts")
    async def receipt(message: Message[Payment], tx: Tx) -> None:
        await tx.execute("insert into receipts values ($1, $2)", message.value.id, message.offset)

    before = await all_rows(place.dsn)
    findings = await run_replay(place, app, topic, handlers=("receipts",))
    assert outcome_counts(findings, "receipts") == {"delivered": 70, "missing": 60, "repeated": 10}
    assert list(findings.as_dict()["handlers"]) == ["receipts"]
    assert await all_rows(place.dsn) == before
    findings = await run_replay(place, app, topic, mode="apply", handlers=("receipts",))
    assert findings.total("applied_now") == 60 and findings.ok
    assert await query(place.dsn, "select count(*), count(distinct id) from receipts") == [(60, 60)]
    assert (await run_replay(place, app, topic)).ok


@pytest.mark.parametrize("chunk", [1, 4096])
async def test_failed_message_is_retried_in_order_and_then_a_dead_letter(place: Place, chunk: int) -> None:
    topic = await place.topic()
    app = App(f"app-{uuid.uuid4().hex[:8]}")
    tries: dict[str, int] = {}

    @app.handler(topic, name="settle", retry=Retry(attempts=3, base=0.05, cap=0.1))
    async def settle(payment: Payment, tx: Tx) -> None:
        tries[payment.id] = tries.get(payment.id, 0) + 1
        if payment.id == "hopeless" or (payment.id == "late" and tries["late"] < 3):
            raise ValueError("not yet")
        await tx.execute("insert into effects select $1, $2, count(*) from effects", payment.id, payment.account)

    sent = [payment("late", 1), payment("after late", 1), payment("other", 2), payment("hopeless", 3), payment("d", 3)]
    await place.send(topic, *sent)
    findings = await run_replay(place, app, topic, mode="apply", limits={"chunk_deliveries": chunk})
    assert outcome_counts(findings) == {
        "delivered": 5,
        "applied_now": 3,
        "dead_lettered_now": 2,
    }  # "d" waits behind the hopeless one
    assert findings.verdict().exit_code == 1
    order = dict(await query(place.dsn, "select id, amount from effects"))
    assert order["other"] < order["late"] < order["after late"]
    assert tries["hopeless"] == 3 and await place.reasons() == ["failed", "behind"]
    assert (await run_replay(place, app, topic, limits={"chunk_deliveries": chunk})).ok


async def test_apply_beside_running_workers_applies_once_and_leaves_the_group(place: Place) -> None:
    topic = await place.topic(4)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}", n % 50) for n in range(3000)])
    generations: list[int] = []
    async with working(app, place.settings(batch_messages_max=50)) as worker:

        async def joined() -> bool:
            return len(worker.partitions.table) == 4

        await until("the worker to have its partitions", joined)
        generations.append(worker.source.consumer._coordinator.generation)
        for _ in range(2):
            findings = await run_replay(place, app, topic, mode="apply")
            assert findings.ok, findings.problems()
        await drained(app, place.settings())
        assert (await run_replay(place, app, topic)).ok
        generations.append(worker.source.consumer._coordinator.generation)
    assert generations[0] == generations[1]
    assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(3000, 3000)]
    assert await value(place.dsn, "select sum(balance) from accounts") == 30_000


async def test_a_rebalance_meanwhile_disturbs_nothing(place: Place) -> None:
    topic = await place.topic(4)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}", n % 50) for n in range(3000)])
    async with working(app, place.settings(batch_messages_max=50)):
        checking = asyncio.create_task(run_replay(place, app, topic, mode="apply"))
        async with working(app, place.settings(batch_messages_max=50)):
            assert (await checking).ok
            await drained(app, place.settings())
    assert (await run_replay(place, app, topic)).ok
    assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(3000, 3000)]


# -- ranges -------------------------------------------------------------------------------------------------------------


async def test_a_range_is_what_was_asked_for(place: Place) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}", n % 2, partition=n % 2) for n in range(20)])
    await asyncio.sleep(0.05)  # a gap between the timestamps
    middle = int(time.time() * 1000)
    await asyncio.sleep(0.05)
    await place.send(topic, *[payment(f"q{n}", n % 2, partition=n % 2) for n in range(10)])
    await consume_all(app, place.settings())

    async def delivered(**options: Any) -> int:
        findings = await run_replay(place, app, topic, **options)
        assert findings.ok
        return outcome_counts(findings)["delivered"]

    iso = f"{uuid_time(middle)}"
    assert await delivered() == 30
    assert await delivered(start="5", end="7") == 4
    assert await delivered(start="5", end="7", partitions=(1,)) == 2
    assert await delivered(start=iso) == 10
    assert await delivered(end=iso) == 20
    assert await delivered(start="1h") == 30
    assert await delivered(key="1") == 15
    assert await delivered(message_id="q3") == 1
    assert await delivered(handlers=("settle",)) == 30
    assert await delivered(start="earliest", end="position") == 30
    narrowed = await run_replay(place, app, topic, start="5", end="7")
    assert narrowed.history == {"settle": {"rows": 4, "with_message": 4, "without_message": 0}}
    assert (await run_replay(place, app, topic, message_id="q3")).history is None


def uuid_time(milliseconds: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"partitions": (9,)}, "no partition 9"),
        ({"handlers": ("settel",)}, "no handler 'settel'"),
        ({"handlers": ("look",)}, "not idempotent"),
        ({"start": "2999-01-01"}, "in the future"),
        ({"end": "2999-01-01T00:00Z"}, "in the future"),
        ({"start": "yesterday"}, "--from 'yesterday'"),
        ({"start": "70", "end": "10"}, "the range is empty"),
        ({"start": "1000"}, "beyond the end of the log"),
        ({"end": "1000"}, "beyond the end of the log"),
        ({"start": "latest"}, "the range is empty"),
        ({"start": "position", "end": "position"}, "the range is empty"),
        ({"end": "1970-01-02"}, "the range is empty"),
        ({"start": "-5"}, "--from '-5'"),
    ],
    ids=str,
)
async def test_a_range_that_cannot_be_is_one_clear_line(
    settled: tuple[Place, App, str], options: dict[str, Any], says: str
) -> None:
    place, app, topic = settled

    @app.handler(topic, idempotent=False)
    async def look(payment: bytes) -> None: ...

    with pytest.raises(Misconfigured, match=says):
        await run_replay(place, app, topic, **options)


async def test_topics_that_cannot_be_are_one_clear_line(place: Place) -> None:
    topic, empty = await place.topic(), await place.topic()
    app = payments_app(topic, retry=QUICK)

    @app.handler(empty, "nowhere", name="other")
    async def other(payment: bytes, tx: Tx) -> None: ...

    @app.handler("clicks", idempotent=False)
    async def click(payment: bytes) -> None: ...

    for asked, says in (
        (("unknown",), "no handler of topic 'unknown'"),
        (("nowhere",), "topic 'nowhere': does not exist"),
        ((empty,), "the range is empty"),
        (("clicks",), "nothing to verify"),
        ((), "name at least one topic"),
    ):
        with pytest.raises(Misconfigured, match=says):
            await run_replay(place, app, *asked)
    with pytest.raises(Misconfigured, match="does not take"):
        await run_replay(place, app, topic, handlers=("other",))


async def test_records_that_the_log_has_dropped_are_named(settled: tuple[Place, App, str]) -> None:
    place, app, topic = settled
    admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
    await admin.start()
    await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(before_offset=7)})
    await admin.close()
    for start in ("0", "6"):
        with pytest.raises(Misconfigured, match=rf"{topic}:0 begins at offset 7"):
            await run_replay(place, app, topic, start=start)
    with pytest.raises(Misconfigured, match=rf"{topic}:0 begins at offset 7"):
        await run_replay(place, app, topic, start="1h")
    findings = await run_replay(place, app, topic)
    assert outcome_counts(findings)["delivered"] == 63 and findings.ok
    assert findings.as_dict()["ranges"][0]["from"] == 7


async def test_records_that_are_dropped_while_they_are_read_end_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}") for n in range(50)])
    await consume_all(app, place.settings())
    original = log_reader.resolve

    async def resolve(*args: Any) -> Any:
        spans = await original(*args)
        admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
        await admin.start()
        await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(before_offset=20)})
        await admin.close()
        return spans

    monkeypatch.setattr(engine, "resolve", resolve)
    with pytest.raises(CannotTell, match=rf"{topic}:0: records were removed .* offset 0"):
        await run_replay(place, app, topic)


# -- interrupted, and gone on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["check", "apply"])
async def test_interrupted_replay_resumes_where_it_was(place: Place, mode: str) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}", n % 30, partition=n % 2) for n in range(600)])
    await consume_all(app, place.settings())
    await query(
        place.dsn, "delete from consumer.ledger where id = any($1) returning id", [ledger_id("p3"), ledger_id("p590")]
    )
    await query(place.dsn, "delete from effects where id in ('p3', 'p590') returning id")
    limits = Limits(chunk_deliveries=20)
    states: list[dict[str, Any]] = []

    def progress(phase: str, done: int, total: int) -> None:
        if done > 250 and not states:
            task.cancel()

    reports = Progress(progress=progress, save=states.append)
    options = Options(mode=mode)  # type: ignore[arg-type]
    task = asyncio.create_task(replay(app, place.settings(), [topic], options, reports, limits=limits))
    with pytest.raises(CannotTell, match=r"interrupted after 2\d\d of 600 offsets; .*--resume"):
        await task
    findings = await replay(
        app, place.settings(), [topic], options, Progress(save=lambda _: None), states[-1], limits=limits
    )
    if mode == "check":
        assert outcome_counts(findings) == {"delivered": 600, "applied": 598, "missing": 2}
        assert findings.history == {"settle": {"rows": 598, "with_message": 598, "without_message": 0}}
        assert findings.messages == 600
    else:
        assert findings.ok and findings.messages == 600
        assert outcome_counts(findings) == {"delivered": 600, "applied": 598, "applied_now": 2}
        assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(600, 600)]
    other = [{**states[-1], "epoch": "another"}]
    with pytest.raises(Misconfigured, match="another one since"):
        await replay(app, place.settings(), [topic], options, Progress(), other[0])


# -- copying ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partitions", [3, 2, 5])
async def test_copied_topic_is_not_applied_twice(place: Place, partitions: int) -> None:
    topic, copy = await place.topic(3), await place.topic(partitions)
    app = App(f"app-{uuid.uuid4().hex[:8]}")

    @app.handler(topic, copy, name="settle")
    async def settle(payment: Payment, tx: Tx) -> None:
        await tx.execute("insert into effects values ($1, $2, $3)", payment.id, payment.account, payment.amount)

    bare = [Sent({"id": f"bare {n}", "account": 1, "amount": n}, key=None if n % 2 else "k") for n in range(10)]
    await place.send(topic, *[payment(f"p{n}", n % 5) for n in range(50)], *bare)
    await consume_all(app, place.settings())
    assert len(await place.effects()) == 60
    findings = await run_replay(place, app, topic, mode="republish", target=copy)
    assert findings.republished == {"topic": copy, "copied": 60, "refused": 0} and findings.ok
    for redis in (place.redis_url, None):
        await consume_all(app, place.settings(redis_url=redis))
        assert len(await place.effects()) == 60
    findings = await run_replay(place, app, copy)
    assert outcome_counts(findings) == {"delivered": 60, "applied": 60} and findings.ok
    narrowed = await run_replay(place, app, topic, mode="republish", target=copy, key="3")
    assert narrowed.republished is not None and narrowed.republished["copied"] == 10


async def test_a_copy_that_would_be_applied_again_is_refused(place: Place) -> None:
    topic, copy = await place.topic(), await place.topic()
    app = App(f"app-{uuid.uuid4().hex[:8]}")

    @app.handler(topic, name="by_offset", message_id="offset")
    async def by_offset(payment: Payment, tx: Tx) -> None: ...

    await place.send(topic, payment("a"))
    with pytest.raises(Misconfigured, match="would be applied again"):
        await run_replay(place, app, topic, mode="republish", target=copy)
    with pytest.raises(Misconfigured, match="this topic is read"):
        await run_replay(place, app, topic, mode="republish", target=topic)
    with pytest.raises(Misconfigured, match="'nowhere': does not exist"):
        await run_replay(place, payments_app(topic, retry=QUICK), topic, mode="republish", target="nowhere")


# -- as a call ----------------------------------------------------------------------------------------------------------


async def test_verify_is_the_same_as_a_call(settled: tuple[Place, App, str], tmp_path: Path) -> None:
    place, app, topic = settled
    findings = await verify(app, topic, settings=place.settings())
    assert findings.ok
    findings.check()
    assert (await verify(app, settings=place.settings())).messages == 70  # all its topics
    await query(place.dsn, "delete from consumer.ledger where id = $1 returning id", ledger_id("p3"))
    findings = await verify(app, topic, settings=place.settings(), start=0, end="latest")
    assert not findings.ok
    with pytest.raises(AssertionError, match="missing: 1 message missing"):
        findings.check()
    assert (await verify(app, topic, settings=place.settings(), apply=True)).ok
    with pytest.raises(Misconfigured, match="choose one"):
        await verify(app, topic, settings=place.settings(), apply=True, rebuild=True)
    calls: list[dict[str, Any]] = [
        {"rebuild": True, "start": 3},
        {"rebuild": True, "key": "a"},
        {"rebuild": True, "partitions": [0]},
        {"ignore": ["a"]},
        {"base": "select 1"},
        {"key": 5},
        {"message_id": b"x"},
        {"partitions": [-1]},
    ]
    for wrong in calls:
        with pytest.raises(Misconfigured):
            await verify(app, topic, settings=place.settings(), **wrong)


@pytest.mark.parametrize("batch", [None, 7])
async def test_several_handlers_of_several_topics(place: Place, batch: int | None) -> None:
    one, two = await place.topic(2), await place.topic(1)
    app = App(f"app-{uuid.uuid4().hex[:8]}")

    @app.handler(one, two, name="both", batch=batch)
    async def both(bodies: list[bytes] if batch else bytes, tx: Tx) -> None:  # type: ignore[valid-type]
        await tx.execute("insert into effects values ('both', 1, $1)", len(bodies) if batch else 1)

    @app.handler(one, name="first", message_id="field:id")
    async def first(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    await place.send(one, *[payment(f"p{n}", n % 3) for n in range(50)])
    await place.send(two, *[payment(f"q{n}", n % 3) for n in range(20)])
    await consume_all(app, place.settings())
    findings = await run_replay(place, app, one, two)
    assert outcome_counts(findings, "both") == {"delivered": 70, "applied": 70}
    assert outcome_counts(findings, "first") == {"delivered": 50, "applied": 50}
    assert findings.ok and len(findings.as_dict()["partitions"]) == 5
    assert findings.history is not None and findings.history["both"]["rows"] == 70


# -- the demo's topic, and the four ways in which ledger, log and state can disagree ------------------------------------


@pytest.fixture
async def paid(place: Place) -> tuple[Place, App, str]:
    """The demo's payments and handler, on Kafka: all applied.

    2,000 messages, 10 % of them twice.
    """
    await query(place.dsn, "drop table accounts, effects")
    await query(
        place.dsn, "create table payments (payment_id uuid not null, account int not null, amount bigint not null)"
    )
    await query(place.dsn, "create table accounts (account int primary key, balance bigint not null default 0)")
    await query(place.dsn, "insert into accounts (account) select generate_series(0, 999)")
    topic = await place.topic(8)
    app = App(f"demo-{uuid.uuid4().hex[:8]}", publishes=["receipts"])
    app.handler(topic)(settle)
    sent = [
        Sent(
            {"payment_id": str(payment.payment_id), "account": payment.account, "amount": payment.amount},
            id=payment.payment_id,
            key=str(payment.account),
            partition=(payment.account + payment.elsewhere) % 8,
        )
        for payment in plan(2000, random.Random(4))
    ]
    await place.send(topic, *sent)
    await consume_all(app, place.settings(outbox_relay="off"))
    return place, app, topic


async def test_the_demos_topic_has_nothing_to_complain_of(paid: tuple[Place, App, str]) -> None:
    place, app, topic = paid
    check = await run_replay(place, app, topic)
    assert check.ok and outcome_counts(check) == {"delivered": 2000, "applied": 2000}
    apply = await run_replay(place, app, topic, mode="apply")
    assert apply.ok and apply.total("applied_now") == 0
    rebuilt = await run_replay(place, app, topic, mode="rebuild")
    assert rebuilt.ok and rebuilt.rebuilt is not None
    assert (rebuilt.rebuilt["messages"], rebuilt.rebuilt["applied"], rebuilt.rebuilt["repeated"]) == (2000, 1800, 200)
    assert {table["table"] for table in rebuilt.rebuilt["tables"]} == {"public.accounts", "public.payments"}
    assert await value(place.dsn, "select count(*) from payments") == 1800


async def one_payment(dsn: str) -> tuple[uuid.UUID, int, int]:
    [(id, account, amount)] = await query(dsn, "select * from payments order by payment_id limit 1")
    return id, account, amount


def differences(findings: Findings) -> dict[str, list[dict[str, Any]]]:
    assert findings.rebuilt is not None
    by_table: dict[str, list[dict[str, Any]]] = {}
    for difference in findings.rebuilt["differences"]:
        by_table.setdefault(difference["table"], []).append(difference)
    return by_table


async def test_a_lost_message_is_repaired_and_the_rebuild_agrees(paid: tuple[Place, App, str]) -> None:
    place, app, topic = paid
    id, account, amount = await one_payment(place.dsn)
    await query(place.dsn, "delete from consumer.ledger where id = $1", id)
    await query(place.dsn, "delete from payments where payment_id = $1", id)
    await query(place.dsn, "update accounts set balance = balance - $2 where account = $1", account, amount)
    assert (await run_replay(place, app, topic)).total("missing") == 1
    rebuilt = differences(await run_replay(place, app, topic, mode="rebuild"))
    assert [difference["messages"] for difference in rebuilt["public.payments"]] == [[str(id)]]
    assert (await run_replay(place, app, topic, mode="apply")).total("applied_now") == 1
    assert (await run_replay(place, app, topic)).ok
    assert (await run_replay(place, app, topic, mode="rebuild")).ok


async def test_an_effect_doubled_by_hand_is_named_with_columns_and_message(paid: tuple[Place, App, str]) -> None:
    place, app, topic = paid
    id, account, amount = await one_payment(place.dsn)
    await query(place.dsn, "insert into payments values ($1, $2, $3)", id, account, amount)
    [(balance,)] = await query(
        place.dsn, "update accounts set balance = balance + $2 where account = $1 returning balance", account, amount
    )
    assert (await run_replay(place, app, topic)).ok  # the ledger is right
    findings = await run_replay(place, app, topic, mode="rebuild")
    assert findings.verdict().exit_code == 1
    by_table = differences(findings)
    [extra] = by_table["public.payments"]
    assert (extra["kind"], extra["count"], extra["messages"]) == ("extra", 1, [str(id)])
    [other] = by_table["public.accounts"]
    assert (other["kind"], other["key"]) == ("different", {"account": str(account)})
    assert other["columns"] == {"balance": {"real": str(balance), "rebuilt": str(balance - amount)}}
    assert other["messages"]


async def test_an_effect_without_a_ledger_row_is_seen_by_the_check_alone(paid: tuple[Place, App, str]) -> None:
    place, app, topic = paid
    id, *_ = await one_payment(place.dsn)
    await query(place.dsn, "delete from consumer.ledger where id = $1", id)
    assert (await run_replay(place, app, topic)).total("missing") == 1
    assert (await run_replay(place, app, topic, mode="rebuild")).ok  # the state is right: --apply would double it


async def test_a_ledger_row_without_its_effect_is_seen_by_the_rebuild_alone(paid: tuple[Place, App, str]) -> None:
    place, app, topic = paid
    id, *_ = await one_payment(place.dsn)
    await query(place.dsn, "delete from payments where payment_id = $1", id)
    assert (await run_replay(place, app, topic)).ok
    [missing] = differences(await run_replay(place, app, topic, mode="rebuild"))["public.payments"]
    assert (missing["kind"], missing["messages"]) == ("missing", [str(id)])


async def test_a_log_that_ends_below_the_position_is_doubted(settled: tuple[Place, App, str]) -> None:
    """A recreated topic: nothing is missing in it, but the log differs."""
    place, app, topic = settled
    await query(place.dsn, "update consumer.positions set next_offset = 1000 where partition = 1")
    findings = await run_replay(place, app, topic)
    assert [unknown["kind"] for unknown in findings.unknowns()] == [
        "log_too_short"
    ] and findings.verdict().exit_code == 2


async def test_endless_run_again_ends_an_apply(place: Place) -> None:
    topic = await place.topic()
    app = App(f"app-{uuid.uuid4().hex[:8]}")

    @app.handler(topic, name="settle", retry=QUICK)
    async def settle(payment: Payment, tx: Tx) -> None:
        if payment.id == "held":
            raise RunAgain("not yet")
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    await place.send(topic, payment("held", 1), payment("other", 2))
    with pytest.raises(CannotTell, match="1 messages: their handlers ask to run again"):
        await run_replay(place, app, topic, mode="apply", limits={"fruitless_seconds": 0.0})
    assert await place.effects() == [("other", 2, 10)] and await place.reasons() == []


# -- what only a rebuild meets --------------------------------------------------------------------------------------------


def shop_of(pays: str, refunds: str) -> App:
    """A refund is rejected unless its payment is there.

    The payment comes from another topic or partition.
    """
    app = App(f"app-{uuid.uuid4().hex[:8]}")

    @app.handler(pays, name="settle")
    async def settle(payment: Payment, tx: Tx) -> None:
        if payment.amount > 0:
            tx.defer(INSERT, payment.id, payment.account, payment.amount)
        elif not await tx.fetchval("select true from effects where id = $1", payment.id.removeprefix("r-")):
            raise Reject("no such payment")
        else:
            await tx.execute(INSERT, payment.id, payment.account, payment.amount)

    if refunds != pays:
        app.handler(refunds, name="refund")(settle)
    return app


@pytest.mark.parametrize("where", ["payments first", "refunds first", "one topic"])
async def test_a_rebuild_does_not_depend_on_the_names_of_topics(place: Place, where: str) -> None:
    first, second = sorted([await place.topic(2), await place.topic(2)])
    pays, refunds = {"payments first": (first, second), "refunds first": (second, first), "one topic": (first, first)}[
        where
    ]
    app = shop_of(pays, refunds)
    await place.send(pays, *[payment(f"p{n}", partition=1) for n in range(30)])
    await consume_all_of(app, place, pays, 30)
    await place.send(refunds, *[payment(f"r-p{n}", amount=-5, partition=0) for n in range(30)])
    await consume_all(app, place.settings()) if where == "one topic" else await consume_all_of(app, place, refunds, 30)
    assert await value(place.dsn, "select count(*) from effects") == 60
    findings = await run_replay(place, app, *{pays, refunds}, mode="rebuild")
    assert findings.ok, findings.answer()


async def consume_all_of(app: App, place: Place, topic: str, messages: int) -> None:
    """Run a worker until so many messages of a topic are settled.

    Other topics of the App may be empty.
    """
    async with working(app, place.settings()):

        async def settled() -> bool:
            at = await value(
                place.dsn, "select coalesce(sum(next_offset), 0) from consumer.positions where topic = $1", topic
            )
            return bool(at >= messages)

        await until("the messages to be settled", settled)


async def test_message_rejected_in_the_rebuild_alone_makes_it_uncertain(place: Place) -> None:
    topic = await place.topic()
    app = App(f"app-{uuid.uuid4().hex[:8]}")
    changed_its_mind = False

    @app.handler(topic, name="settle")
    async def settle(payment: Payment, tx: Tx) -> None:
        if changed_its_mind:
            raise Reject("not any more")
        tx.defer(INSERT, payment.id, payment.account, payment.amount)

    await place.send(topic, payment("a"))
    await consume_all(app, place.settings())
    changed_its_mind = True
    findings = await run_replay(place, app, topic, mode="rebuild")
    assert findings.verdict().exit_code == 2 and "although the ledger has it as applied" in findings.answer()


async def test_a_group_that_only_a_replay_has_filled_can_be_rebuilt(place: Place) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}", n) for n in range(20)])
    assert (await run_replay(place, app, topic, mode="apply")).total("applied_now") == 20
    findings = await run_replay(place, app, topic, mode="rebuild")
    assert findings.ok and findings.messages == 20, findings.answer()
    await query(place.dsn, "delete from effects where id = 'p7' returning 1")
    assert (await run_replay(place, app, topic, mode="rebuild")).verdict().exit_code == 1


async def test_a_compacted_log_makes_a_difference_uncertain(place: Place) -> None:
    topic = await place.topic(1, **{"cleanup.policy": "compact"})
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, payment("a"), payment("b"))
    await consume_all(app, place.settings())
    assert (await run_replay(place, app, topic, mode="rebuild")).ok
    await query(place.dsn, "insert into effects values ('of a record that is gone', 1, 1) returning 1")
    findings = await run_replay(place, app, topic, mode="rebuild")
    assert findings.verdict().exit_code == 2 and "is compacted" in findings.answer()
