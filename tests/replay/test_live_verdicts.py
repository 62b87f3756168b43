"""Verdicts beside workers and operators.

What they settle, forget or declare between two steps is no fault, and never hides one.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from handler_versions import app_with
from harness import Place, Sent, consume_all, consumer, query, until
from payments_app import QUICK, payment, payments_app
from replay_runs import ledger_id, outcome_counts, run_replay

from consumer import App
from consumer.replay import summary
from consumer.replay.findings import Findings
from consumer.replay.run import Run


async def settled_meanwhile(
    place: Place, app: App, topic: str, monkeypatch: pytest.MonkeyPatch, *, settle: bool
) -> Findings:
    """A check that takes its last look after a worker's.

    settle: the worker has settled everything, or nothing.
    """
    original = summary.conclude

    async def conclude(replay_run: Run, *args: Any, **options: Any) -> None:
        assert replay_run.findings.unsettled == 2
        if settle:
            await consume_all(app, place.settings())
        await original(replay_run, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(summary, "conclude", conclude)
        return await run_replay(place, app, topic)


async def test_letters_that_a_worker_makes_during_the_check_are_there(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, payment("a"))
    await consume_all(app, place.settings())
    # A conflict and a message that cannot be read: the worker makes dead letters of them, and has not come to them yet.
    await place.send(topic, payment("a", amount=11), Sent(b"{", id="bad", key="1"))
    findings = await settled_meanwhile(place, app, topic, monkeypatch, settle=False)
    assert findings.verdict().exit_code == 1 and findings.unsettled == findings.unsettled_ahead == 2
    assert "2 of them beyond the position" in findings.problems()[0]["text"]
    findings = await settled_meanwhile(place, app, topic, monkeypatch, settle=True)
    assert findings.ok, findings.problems()
    assert outcome_counts(findings) == {"delivered": 3, "applied": 1, "conflicts": 1, "unreadable": 1}
    await query(place.dsn, "delete from consumer.dead_letters where id = $1", ledger_id("a"))
    findings = await run_replay(place, app, topic)
    assert findings.verdict().exit_code == 1 and (findings.unsettled, findings.unsettled_ahead) == (1, 0)


async def purge(place: Place, tmp_path: Path, hours: str = "0") -> None:
    """Purge all rows of the ledger, by force.

    Those of the current second only once it is over.
    """
    environment = {
        "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": place.kafka,
        "CONSUMER_POSTGRES_DSN": place.worker_dsn,
        "CONSUMER_LEDGER_CLOCK_SKEW_HOURS": "0",
    }

    async def dropped() -> bool:
        done = await asyncio.to_thread(
            consumer, tmp_path, "purge", "--older-than", hours, "--force", "--json", **environment
        )
        assert done.returncode == 0, done.stderr
        return bool(json.loads(done.stdout)["dropped"])

    await until("rows that are old enough", dropped, 60)


async def test_marks_in_redis_of_rows_that_the_ledger_forgot_are_not_wrong(place: Place, tmp_path: Path) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}") for n in range(5)])
    await consume_all(app, place.settings(ledger_clock_skew_hours=0, precheck_budget_ms=10_000))
    await purge(place, tmp_path)
    findings = await run_replay(place, app, topic, settings={"ledger_clock_skew_hours": 0})
    assert findings.precheck is not None and findings.precheck["hits"] == 5
    assert findings.precheck["wrong"] == 0 and not findings.problems()
    assert [unknown["kind"] for unknown in findings.unknowns()] == ["before_ledger"]


async def test_claims_that_are_lost_while_the_ledger_turns_are_no_writes(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}") for n in range(5)])
    await consume_all(app, place.settings())
    for version in range(1, 5):  # from every step of a turn to the next one
        findings = await run_replay(place, app, topic)
        assert findings.ok and outcome_counts(findings) == {"delivered": 5, "applied": 5}, (
            version,
            findings.problems(),
        )
        assert await query(place.dsn, "select consumer.turn($1)", version)


async def declare(place: Place, topic: str, past: int) -> None:
    """Declare that the handler need not settle what is before an offset.

    As `consumer positions --begin-here` does.
    """
    await query(
        place.dsn,
        """insert into consumer.coverage (handler, topic, partition, first_offset, past_offset, why)
           select handler, $1, 0, 0, $2::int, 'declared' from consumer.handlers where name = 'record' returning 1""",
        topic,
        past,
    )


async def rebuild(place: Place, app: App, topic: str) -> Findings:
    return await run_replay(place, app, topic, mode="rebuild", settings={"ledger_clock_skew_hours": 0})


async def test_rebuild_leaves_out_what_a_new_handler_need_not_settle(place: Place) -> None:
    topic = await place.topic()
    app = app_with(f"here-{uuid4().hex[:8]}", topic, "settle")
    both = app_with(app.name, topic, "settle", "record")
    await place.send(topic, *[payment(f"p{n}") for n in range(10)])
    await consume_all(app, place.settings())
    await place.send(topic, *[payment(f"q{n}") for n in range(10)])
    await consume_all(both, place.settings())
    findings = await rebuild(place, both, topic)
    assert findings.verdict().exit_code == 1, (
        "the new handler has missed what was before it, and no declaration allows it"
    )
    await declare(place, topic, 10)
    findings = await rebuild(place, both, topic)
    assert findings.ok, [*findings.problems(), *findings.unknowns()]
    assert any("10 messages were left out" in note for note in findings.notes)
    await query(place.dsn, "delete from effects where id = 'record q3'")
    findings = await rebuild(place, both, topic)
    assert findings.verdict().exit_code == 1


async def test_conflicts_that_a_new_handler_need_not_settle_are_no_problem(place: Place) -> None:
    topic = await place.topic()
    app = app_with(f"here-{uuid4().hex[:8]}", topic, "settle")
    both = app_with(app.name, topic, "settle", "record")
    await place.send(topic, payment("a"), payment("a", amount=11), payment("b"))
    await consume_all(app, place.settings())
    await place.send(topic, payment("a"), payment("a", amount=12), payment("c"))
    await consume_all(both, place.settings())
    await declare(place, topic, 3)
    for options in ({}, {"end": "position"}, {"message_id": "a"}):
        findings = await run_replay(place, both, topic, **options)
        assert findings.ok, [*findings.problems(), *findings.unknowns()]
    assert outcome_counts(findings, "record") == {"delivered": 4, "skipped": 1, "applied": 2, "conflicts": 1}
    await query(place.dsn, 'delete from consumer.dead_letters where "offset" = 4 returning 1')
    findings = await run_replay(place, both, topic)
    assert findings.verdict().exit_code == 1 and findings.unsettled == 2


@pytest.mark.parametrize("delivered_again", [False, True])
async def test_rebuild_does_not_guess_about_what_the_ledger_forgot(
    place: Place, tmp_path: Path, delivered_again: bool
) -> None:
    """The ledger has forgotten messages above a position that was moved back.

    They were applied, or never were.
    """
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    settings = place.settings(redis_url=None, ledger_clock_skew_hours=0)
    await place.send(topic, *[payment(f"p{n}") for n in range(10)])
    await consume_all(app, settings)
    await purge(place, tmp_path)
    findings = await rebuild(place, app, topic)
    assert findings.ok, "below the position everything was settled, whatever the ledger remembers"
    await query(place.dsn, "update consumer.positions set next_offset = 4 returning 1")
    if delivered_again:
        await consume_all(app, settings)
        assert await place.reasons() == ["too_old"] * 6
    else:
        await place.send(topic, payment("new"))
    findings = await rebuild(place, app, topic)
    assert findings.verdict().exit_code == 2, findings.problems()
    [doubt] = findings.unknowns()
    assert (
        "the ledger has forgotten" in doubt["text"] and f"settle 6; the first is {topic}:0 at offset 4" in doubt["text"]
    )
