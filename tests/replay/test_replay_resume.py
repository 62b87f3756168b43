"""Interrupted replays end as uninterrupted ones, or refuse.

They refuse because something has changed.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from aiokafka.admin.records_to_delete import RecordsToDelete
from harness import Place, consume_all, delete_topic, migrated, new_topic, query
from payments_app import QUICK, Payment, payment, payments_app
from replay_runs import ledger_id, outcome_counts

from consumer import App, CannotTell, Misconfigured, Retry, Tx
from consumer.replay import ledger_diff, summary
from consumer.replay.findings import Findings
from consumer.replay.options import Limits, Options, Progress
from consumer.replay.resume_rules import what_changed
from consumer.replay.run import Run
from consumer.replay.verify import replay

State = dict[str, Any]
LIMITS = Limits(chunk_deliveries=20)


async def interrupted(place: Place, app: App, topic: str, *, at: int = 250, **options: Any) -> State:
    """The state of a replay interrupted after so many offsets.

    As it is read from disk.
    """
    states: list[str] = []

    def progress(phase: str, done: int, total: int) -> None:
        if done > at:
            task.cancel()

    reports = Progress(progress=progress, save=lambda state: states.append(json.dumps(state)))
    task = asyncio.create_task(replay(app, place.settings(), [topic], Options(**options), reports, limits=LIMITS))
    with pytest.raises(CannotTell, match="interrupted"):
        await task
    state: State = json.loads(states[-1])
    return state


async def resumed(place: Place, app: App, topic: str, state: State, **options: Any) -> Findings:
    return await replay(
        app, place.settings(), [topic], Options(**options), Progress(save=lambda _: None), state, limits=LIMITS
    )


def lost(findings: Findings) -> int:
    return sum(problem["count"] for problem in findings.problems() if problem["kind"] in ("missing", "rows_gone"))


async def settled(place: Place, n: int = 600, **more: Any) -> tuple[App, str]:
    topic = await place.topic(2)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}", n % 30, partition=n % 2, **more) for n in range(n)])
    await consume_all(app, place.settings())
    return app, topic


# -- the same verdict ---------------------------------------------------------------------------------------------------


async def test_dead_letters_made_before_the_interruption_count(place: Place) -> None:
    topic = await place.topic(2)
    app = payments_app(topic, retry=QUICK)
    amounts = {4: -1, 5: -1, 40: -1}
    await place.send(topic, *[payment(f"p{n}", n % 30, amounts.get(n, 1), partition=n % 2) for n in range(600)])
    state = await interrupted(place, app, topic, mode="apply")
    findings = await resumed(place, app, topic, state, mode="apply")
    assert findings.verdict().exit_code == 1
    assert [problem["kind"] for problem in findings.problems()] == ["dead_lettered_now"]
    assert outcome_counts(findings) == {"delivered": 600, "applied_now": 597, "dead_lettered_now": 3}
    assert findings.history == {"settle": {"rows": 600, "with_message": 600, "without_message": 0}}
    assert not any("dropped its first records" in note for note in findings.notes)
    assert len(await place.effects()) == 597


async def test_an_apply_with_messages_that_wait_counts_each_once(place: Place) -> None:
    topic = await place.topic(1)
    app = App(f"app-{uuid.uuid4().hex[:8]}")
    failing = {"p3", "p30"}

    @app.handler(topic, name="settle", retry=Retry(attempts=1000, base=0.01, cap=0.05))
    async def settle(payment: Payment, tx: Tx) -> None:
        if payment.id in failing:
            raise RuntimeError
        tx.defer("insert into effects values ($1, $2, $3)", payment.id, payment.account, payment.amount)

    await place.send(topic, *[payment(f"p{n}", n) for n in range(300)])
    state = await interrupted(place, app, topic, at=1, mode="apply")
    failing.clear()
    findings = await resumed(place, app, topic, state, mode="apply")
    assert findings.ok and outcome_counts(findings) == {"delivered": 300, "applied_now": 300}
    assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(300, 300)]


async def test_dead_letters_that_the_state_does_not_know_are_a_reason_for_doubt(place: Place) -> None:
    """Killed after its last saved state, the replay may have committed more.

    That is in the ledger only.
    """
    topic = await place.topic(1)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}", n % 30, -1 if n == 100 else 1) for n in range(200)])
    state = await interrupted(place, app, topic, at=30, mode="apply")
    assert await place.effects()
    await interrupted(place, app, topic, at=150, mode="apply")  # goes on from nothing: its state is lost
    findings = await resumed(place, app, topic, state, mode="apply")
    assert findings.verdict().exit_code == 2
    [doubt] = findings.unknowns()
    assert doubt["kind"] == "dead_letters_meanwhile" and doubt["count"] == 1 and "settle" in doubt["text"]


async def test_ledger_rows_deleted_before_a_check_goes_on_are_missing(place: Place) -> None:
    app, topic = await settled(place)
    state = await interrupted(place, app, topic)
    assert state["findings"]["counts"]
    gone = [ledger_id(f"p{n}") for n in range(100)]
    await query(place.dsn, "delete from consumer.ledger where id = any($1) returning id", gone)
    findings = await resumed(place, app, topic, state)
    assert findings.verdict().exit_code == 1
    assert lost(findings) == 100


async def test_a_ledger_that_is_emptied_before_a_check_goes_on_is_missing(place: Place) -> None:
    app, topic = await settled(place)
    state = await interrupted(place, app, topic, at=599)
    await query(place.dsn, "delete from consumer.ledger")
    findings = await resumed(place, app, topic, state)
    assert findings.verdict().exit_code == 1
    assert lost(findings) == 600


@pytest.mark.parametrize("narrowed", [{"key": "4"}, {"message_id": "p4"}], ids=["key", "message id"])
async def test_rows_deleted_before_a_narrowed_check_goes_on_are_missing(place: Place, narrowed: dict[str, Any]) -> None:
    app, topic = await settled(place)
    state = await interrupted(place, app, topic, **narrowed)
    await query(place.dsn, "delete from consumer.ledger where id = $1", ledger_id("p4"))
    findings = await resumed(place, app, topic, state, **narrowed)
    assert findings.verdict().exit_code == 1 and lost(findings) == 1


async def test_rows_of_a_copied_topic_deleted_before_a_check_goes_on_are_missing(place: Place) -> None:
    topic, copy = await place.topic(2), await place.topic(2)
    app = App(f"app-{uuid.uuid4().hex[:8]}")

    @app.handler(topic, copy, name="settle")
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer("insert into effects values ($1, $2, $3)", payment.id, payment.account, payment.amount)

    sent = [payment(f"p{n}", n % 30, partition=n % 2) for n in range(600)]
    await place.send(topic, *sent)
    await consume_all(app, place.settings())
    await place.send(copy, *sent)
    await consume_all(app, place.settings())
    state = await interrupted(place, app, copy)
    await query(place.dsn, "delete from consumer.ledger where id = $1", ledger_id("p1"))
    findings = await resumed(place, app, copy, state)
    assert findings.verdict().exit_code == 1 and lost(findings) == 1


async def test_dead_letters_deleted_before_a_check_goes_on_are_a_problem(place: Place) -> None:
    topic = await place.topic(1)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}", n % 30, -1 if n < 3 else 1) for n in range(300)])
    await consume_all(app, place.settings())
    state = await interrupted(place, app, topic, at=100)
    await query(place.dsn, "delete from consumer.dead_letters where id = $1", ledger_id("p2"))
    findings = await resumed(place, app, topic, state)
    assert findings.verdict().exit_code == 1
    assert [(problem["kind"], problem["count"]) for problem in findings.problems()] == [("unsettled", 1)]


async def test_rows_deleted_during_one_uninterrupted_check_are_missing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, topic = await settled(place)
    original = summary.conclude

    async def conclude(run: Run, *args: Any, **options: Any) -> None:
        await query(place.dsn, "delete from consumer.ledger where id = $1", ledger_id("p7"))
        await original(run, *args, **options)

    monkeypatch.setattr(summary, "conclude", conclude)
    findings = await replay(app, place.settings(), [topic], Options(), Progress(), limits=LIMITS)
    assert findings.verdict().exit_code == 1 and lost(findings) == 1


async def test_an_interruption_after_the_last_record_counts_nothing_twice(place: Place) -> None:
    topic = await place.topic(1)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}", n % 30, -1 if n < 3 else 1) for n in range(300)])
    await consume_all(app, place.settings())
    await query(place.dsn, "delete from consumer.ledger where id = $1", ledger_id("p50"))
    original = ledger_diff.compare

    async def stop(*args: Any) -> None:
        asyncio.current_task().cancel()  # type: ignore[union-attr]
        await original(*args)

    states: list[str] = []
    progress = Progress(save=lambda state: states.append(json.dumps(state)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_diff, "compare", stop)
        await query(place.dsn, "delete from consumer.dead_letters where id = $1", ledger_id("p2"))
        with pytest.raises(CannotTell, match="--resume"):
            await replay(app, place.settings(), [topic], Options(), progress, limits=LIMITS)
    findings = await resumed(place, app, topic, json.loads(states[-1]))
    assert outcome_counts(findings) == {"delivered": 300, "applied": 296, "dead_lettered": 3, "missing": 1}
    assert findings.unsettled == 1 and lost(findings) == 1


async def test_rows_dropped_by_the_ledger_during_a_check_are_a_reason_for_doubt(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, topic = await settled(place, 100)
    original = summary.conclude

    async def conclude(run: Run, *args: Any, **options: Any) -> None:
        await query(place.dsn, "delete from consumer.ledger where id = $1", ledger_id("p7"))
        await query(place.dsn, "update consumer.ledger_state set horizon = now() - interval '1 hour'")
        await original(run, *args, **options)

    monkeypatch.setattr(summary, "conclude", conclude)
    findings = await replay(app, place.settings(), [topic], Options(), Progress(), limits=LIMITS)
    assert findings.verdict().exit_code == 2
    assert [(unknown["kind"], unknown["count"]) for unknown in findings.unknowns()] == [("rows_dropped", 1)]


async def test_sequences_moved_before_an_interruption_are_known_after_it(place: Place) -> None:
    app, topic = await settled(place)
    for statement in (
        "create sequence counted",
        "grant all on sequence counted to public",
        """create function count_it() returns trigger language plpgsql as
           $$ begin perform nextval('public.counted'); return new; end $$""",
        "create trigger counts before insert on consumer.ledger for each row execute function count_it()",
    ):
        await query(place.dsn, statement)
    state = await interrupted(place, app, topic)
    await query(place.dsn, "drop trigger counts on consumer.ledger")
    findings = await resumed(place, app, topic, state)
    assert "sequences" in [problem["kind"] for problem in findings.problems()]


# -- or a refusal -------------------------------------------------------------------------------------------------------


Change = Callable[[Place, App, str], Awaitable[App | None]]


async def add_a_handler(place: Place, app: App, topic: str) -> App:
    changed = payments_app(topic, name=app.name, retry=QUICK)

    @changed.handler(topic, name="other")
    async def other(payment: Payment, tx: Tx) -> None: ...

    return changed


async def add_an_opted_out_handler(place: Place, app: App, topic: str) -> App:
    changed = payments_app(topic, name=app.name, retry=QUICK)

    @changed.handler(topic, name="other", idempotent=False)
    async def other(payment: Payment) -> None: ...

    return changed


async def rename_the_app(place: Place, app: App, topic: str) -> App:
    return payments_app(topic, name=app.name + "-b", retry=QUICK)


def settling(app: App, topic: str, name: str = "settle", **options: Any) -> App:
    changed = App(app.name)

    @changed.handler(topic, name=name, retry=QUICK, **options)
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer("insert into effects values ($1, $2, $3)", payment.id, payment.account, payment.amount)

    return changed


async def rename_the_handler(place: Place, app: App, topic: str) -> App:
    return settling(app, topic, "settles")


async def change_the_code(place: Place, app: App, topic: str) -> App:
    return settling(app, topic)


async def change_the_id(place: Place, app: App, topic: str) -> App:
    return settling(app, topic, message_id="field:id")


async def recreate_topic(place: Place, app: App, topic: str) -> None:
    await delete_topic(place.kafka, topic)

    async def exists_again() -> bool:
        try:
            await new_topic(place.kafka, 2, topic)
        except Exception:  # it is being deleted
            await asyncio.sleep(0.1)
            return False
        return True

    while not await exists_again():
        pass
    await place.send(topic, *[payment(f"p{n}", n % 30, partition=n % 2) for n in range(600)])


async def remove_records(place: Place, app: App, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
    await admin.start()
    await admin.delete_records({TopicPartition(topic, n): RecordsToDelete(before_offset=290) for n in (0, 1)})
    await admin.close()


async def add_a_partition(place: Place, app: App, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
    await admin.start()
    await admin.create_partitions({topic: NewPartitions(3)})
    await admin.close()


async def make_the_schema_again(place: Place, app: App, topic: str) -> None:
    await query(place.dsn, "drop schema consumer cascade")
    await query(place.dsn, "drop table if exists effects, accounts cascade")
    await migrated(place.dsn)


async def drop_old_rows(place: Place, app: App, topic: str) -> None:
    await query(place.dsn, "update consumer.ledger_state set horizon = now()")


async def begin_elsewhere(place: Place, app: App, topic: str) -> None:
    await query(place.dsn, "update consumer.positions set first_offset = 5 where topic = $1", topic)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (add_a_handler, "handler 'other' was added"),
        (add_an_opted_out_handler, "handler 'other' was added"),
        (rename_the_app, "the App's 'name' has changed"),
        (rename_the_handler, "handler 'settle' was removed"),
        (change_the_code, "handler 'settle' has changed"),
        (change_the_id, "handler 'settle' has changed"),
        (recreate_topic, "was deleted and recreated"),
        (remove_records, "begins at offset 290"),
        (add_a_partition, "partition '.*:2' was added"),
        (make_the_schema_again, "another one since"),
        (drop_old_rows, "retention 'ledger' has changed"),
        (begin_elsewhere, "beginning of the ledger in .* has changed"),
    ],
    ids=lambda change: change.__name__ if callable(change) else "",
)
async def test_resume_after_a_change_is_refused(place: Place, change: Change, says: str) -> None:
    await is_refused(place, "check", change, says)


@pytest.mark.parametrize("change", [add_a_handler, rename_the_handler], ids=lambda change: change.__name__)
async def test_resume_of_an_apply_after_a_change_is_refused(place: Place, change: Change) -> None:
    await is_refused(place, "apply", change, "--resume: handler")


async def is_refused(place: Place, mode: str, change: Change, says: str) -> None:
    app, topic = await settled(place)
    await query(place.dsn, "delete from consumer.ledger where id = $1", ledger_id("p590"))
    await query(place.dsn, "delete from effects where id = 'p590'")
    state = await interrupted(place, app, topic, mode=mode)
    changed = await change(place, app, topic) or app
    before = await query(place.dsn, "select count(*) from consumer.ledger")
    with pytest.raises((Misconfigured, CannotTell), match=says) as refused:
        await resumed(place, changed, topic, state, mode=mode)
    assert "\n" not in str(refused.value)
    assert await query(place.dsn, "select count(*) from consumer.ledger") == before


async def test_another_range_or_filter_is_a_refusal(place: Place) -> None:
    app, topic = await settled(place)
    state = await interrupted(place, app, topic)
    for other in ({"start": "5"}, {"end": "400"}, {"key": "3"}, {"partitions": (1,)}, {"mode": "apply"}):
        with pytest.raises(Misconfigured, match="--resume: option"):
            await resumed(place, app, topic, state, **other)


async def test_an_interruption_before_anything_was_read_offers_no_resume(place: Place) -> None:
    app, topic = await settled(place)
    saved: list[State] = []

    def cancel(_: str) -> None:
        task.cancel()

    progress = Progress(line=cancel, save=saved.append)
    original = summary.doubt_short_log

    async def stop(*args: Any) -> None:
        task.cancel()
        await original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "doubt_short_log", stop)
        task = asyncio.create_task(replay(app, place.settings(), [topic], Options(), progress, limits=LIMITS))
        with pytest.raises(CannotTell) as ended:
            await task
    assert not saved and "--resume" not in str(ended.value)


def test_refusal_names_the_first_difference() -> None:
    before: dict[str, dict[str, str | None]] = {"handler": {"a": "1", "b": "2"}, "topic": {"t": None}}
    assert what_changed(before, before) is None
    assert what_changed(before, {"handler": {"a": "1", "b": "2"}, "topic": {"t": "x"}}) is None  # was not known
    assert what_changed(before, {**before, "handler": {"a": "1"}}) == "handler 'b' was removed"
    assert what_changed(before, {**before, "handler": {**before["handler"], "c": ""}}) == "handler 'c' was added"
    assert what_changed(before, {**before, "handler": {"a": "1", "b": "3"}}) == "handler 'b' has changed"
