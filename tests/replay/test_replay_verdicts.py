"""Verdicts of a check: clocks ahead, and messages produced meanwhile."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from aiokafka import AIOKafkaProducer
from harness import Place, consume_all, query
from payments_app import QUICK, payment, payments_app
from replay_runs import ledger_id, outcome_counts, run_replay

from consumer.core.message import Partition
from consumer.replay import ledger_diff


async def test_an_end_in_time_includes_older_records_behind_a_clock_ahead(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    now = int(time.time() * 1000)
    producer = AIOKafkaProducer(bootstrap_servers=place.kafka)
    await producer.start()
    try:
        for n, at in enumerate([now - 60_000, now - 20_000, now - 50_000, now - 10_000]):
            sent = payment(f"p{n}")
            await producer.send_and_wait(topic, sent.value, key=sent.key, headers=sent.headers, timestamp_ms=at)
    finally:
        await producer.stop()
    await consume_all(app, place.settings())
    end = datetime.fromtimestamp((now - 30_000) / 1000, UTC).isoformat()
    findings = await run_replay(place, app, topic, end=end)
    assert findings.ok and outcome_counts(findings) == {"delivered": 3, "applied": 3}
    await query(place.dsn, "delete from consumer.ledger where id = $1", ledger_id("p2"))
    findings = await run_replay(place, app, topic, end=end)
    assert outcome_counts(findings)["missing"] == 1 and findings.verdict().exit_code == 1


async def test_rows_of_messages_produced_meanwhile_are_not_beyond_the_log() -> None:
    class Rows:
        async def fetch(self, query: str, /, *args: Any) -> list[Any]:
            return [(1, 1, 0, UUID(int=1), 7), (1, 1, 0, UUID(int=2), 12), (1, 1, 5, UUID(int=3), 0)]

    reads = iter([{Partition("t", 0): 5}, {Partition("t", 0): 10, Partition("t", 5): 1}])

    async def read_ends() -> dict[Partition, int]:
        return next(reads)

    connection: Any = Rows()
    rows = await ledger_diff.rows_nowhere(connection, {}, {"t": 1}, read_ends)
    assert [row[4] for row in rows] == [12]


async def test_blocks_with_new_dead_letters_are_all_compared(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_diff, "FAULTY_MAX", 1)
    topic = await place.topic(4)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}", n, partition=n % 4) for n in range(8)])
    await consume_all(app, place.settings())
    await place.send(topic, *[payment(f"bad{n}", n, -1, partition=n) for n in range(4)])
    findings = await run_replay(place, app, topic, mode="apply")
    assert outcome_counts(findings) == {"delivered": 12, "applied": 8, "dead_lettered_now": 4}
    assert [problem["kind"] for problem in findings.problems()] == ["dead_lettered_now"]
    assert findings.history == {"settle": {"rows": 12, "with_message": 12, "without_message": 0}}


async def test_after_enough_faulty_blocks_the_others_are_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_diff, "FAULTY_MAX", 1)
    topic = await place.topic(3)
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, *[payment(f"p{n}", n, partition=n % 3) for n in range(6)])
    await consume_all(app, place.settings())
    await query(
        place.dsn,
        """insert into consumer.ledger (fingerprint, "offset", applied_at, partition, handler, topic, id)
           select fingerprint, "offset", applied_at, partition, handler, topic, gen_random_uuid() from consumer.ledger
           where "offset" = 0 returning id""",
    )
    findings = await run_replay(place, app, topic)
    assert [(problem["kind"], problem["count"]) for problem in findings.problems()] == [("rows_without_message", 1)]
    assert any("in 2 more blocks" in note for note in findings.notes)
