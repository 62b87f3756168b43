"""Topics that match a pattern are consumed as soon as they exist.

On real services; tests/core/test_topic_names.py has the rules.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import types
from pathlib import Path
from uuid import uuid4

import documents
import pytest
from harness import (
    ROOT,
    Place,
    Result,
    consume_all,
    consumer,
    delete_topic,
    drained,
    fetched,
    is_one_line,
    new_topic,
    query,
    running,
    until,
    working,
)
from pattern_app import pattern_app
from payments_app import lone_payment
from worker_log import WorkerLog

from consumer import App, Tx
from consumer.core.message import Partition
from consumer.kafka.admin import group_offsets
from consumer.testing import ExactlyOnce
from consumer.testing import Sent as Delivery
from consumer.worker import log_monitor


async def effects(place: Place) -> list[str]:
    return [row[0] for row in await query(place.dsn, "select id from effects order by id")]


def place_of_names(prefix: str, name: str) -> dict[str, str]:
    support = ROOT / "tests" / "support"
    return {"TEST_APP": name, "TEST_PREFIX": prefix, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{support}"}


async def command(place: Place, app: App, prefix: str, *arguments: str) -> Result:
    """A `consumer` command about pattern_app."""
    settings = place.settings(log_level="warning").dump()
    environment = place_of_names(prefix, app.name)
    return await asyncio.to_thread(consumer, ROOT / "tests" / "support", *arguments, **settings, **environment)


async def test_two_workers_share_a_new_topic(
    place: Place, worker_log: WorkerLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first, nothing matches.

    Each pick-up is a rebalance, before which positions are copied to Kafka.
    """
    monkeypatch.setattr(log_monitor, "INTERVAL_SECONDS", 0.5)
    prefix = f"p-{uuid4().hex[:8]}"
    app, other = (pattern_app(prefix, prefix, "settle") for _ in range(2))
    named = await place.topic()
    for both in (app, other):

        @both.handler(named, f"{prefix}.us")
        async def also(body: dict[str, object], tx: Tx) -> None:
            tx.defer("insert into effects values ($1, 1, 1)", f"also {body['id']}")

    async def settled(*expected: str) -> None:
        async def done() -> bool:
            return await effects(place) == sorted(expected)

        await until(f"{len(expected)} effects", done, 60)

    # Only a rebalance copies positions to Kafka here.
    settings = place.settings(kafka_commit_interval_seconds=300)
    async with working(app, settings) as first, working(other, settings) as second:

        async def joined() -> bool:
            return all(worker.partitions.table.has_assignment for worker in (first, second))

        await until("both workers to have joined", joined, 60)
        await place.send(named, lone_payment("n"))
        await settled("also n")
        topic = await new_topic(place.kafka, 2, f"{prefix}.eu")
        await place.send(topic, *[lone_payment(f"p{n}", n % 2) for n in range(4)])
        before = ["also n", *(f"settle.eu p{n}" for n in range(4))]
        await settled(*before)
        assert (await group_offsets(settings, app.name))[Partition(named, 0)] == 1
        await new_topic(place.kafka, 1, f"{prefix}.eu.old")  # the pattern matches a part of its name only
        again = await new_topic(place.kafka, 2, f"{prefix}.us")
        await place.send(again, lone_payment("q"))

        async def shared() -> bool:
            return sorted([fetched(first), fetched(second)]) == [2, 3]

        await until("both workers to share all partitions", shared, 60)
        await settled(*before, "also q", "settle.us q")
        await delete_topic(place.kafka, topic)
        [deleted] = {event["topic"] for event in await worker_log.wait("a topic was deleted", 2, 60)}
        assert deleted == topic
        await place.send(named, lone_payment("r"))
        await settled(*before, "also q", "settle.us q", "also r")
    assert {event["topics"] for event in worker_log.events("patterns match topics")} == {f"{prefix}.eu"}


async def test_worker_killed_while_a_topic_is_picked_up_and_a_handler_added(place: Place, tmp_path: Path) -> None:
    prefix = f"p-{uuid4().hex[:8]}"
    app = pattern_app(prefix, f"killed-{prefix}", "settle")
    path, environment = "pattern_app:app", place_of_names(prefix, app.name)
    async with running(["run", path, "--workers", "2"], place.settings(), tmp_path / "run", **environment) as run:

        async def logged(text: str, count: int = 1) -> list[int]:
            async def enough() -> bool:
                return sum(text in event["event"] for event in run.events()) >= count

            await until(text, enough, 60)
            return [event["pid"] for event in run.events() if text in event["event"]]

        await logged("worker started", 2)
        topic = await new_topic(place.kafka, 2, f"{prefix}.eu")
        await place.send(topic, *[lone_payment(f"p{n:03}", n % 2) for n in range(100)])
        victim = (await logged("patterns match topics"))[0]
        os.kill(victim, signal.SIGKILL)
        await place.send(topic, *[lone_payment(f"q{n:03}", n % 2) for n in range(100)])
        await drained(app, place.settings(), 60)
        run.process.terminate()
        assert await run.wait() == 0, run.errors[-2000:]
        waits = [event for event in run.events() if "no topic matches a handler's pattern yet" in event["event"]]
    assert [(event["handler"], event["pattern"]) for event in waits] == [("settle", rf"{prefix}\.(eu|us)")]
    expected = [f"settle.eu {kind}{n:03}" for kind in "pq" for n in range(100)]
    assert await effects(place) == expected
    checked = await command(place, app, prefix, "replay", path, topic)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    is_one_line(await command(place, app, prefix, "replay", path, f"{prefix}.fr"), "those that p-")
    tail = await command(place, app, prefix, "tail", path, "-n", "1", "--until", "latest", "--json")
    assert [json.loads(line)["topic"] for line in tail.stdout.splitlines()] == [topic], tail.stderr
    await _added_handler(place, prefix, app, topic)
    assert await effects(place) == sorted([*expected, *(line.replace("settle", "record") for line in expected)])


async def _added_handler(place: Place, prefix: str, app: App, topic: str) -> None:
    """A handler that comes later has gaps, and can fill them."""
    await consume_all(pattern_app(prefix, app.name, "settle", "record"), place.settings())
    path = "pattern_app:both"
    shown = await command(place, app, prefix, "status", path, "--json")
    answer = json.loads(shown.stdout)
    gaps = [(gap["handler"], gap["topic"], gap["first"], gap["past"]) for gap in answer["gaps"]]
    assert shown.returncode == 1 and gaps == [("record", topic, 0, 100)] * 2
    filled = await command(place, app, prefix, "replay", path, topic, "--apply", "--handler", "record")
    assert filled.returncode == 0, filled.stdout + filled.stderr
    shown = await command(place, app, prefix, "status", path, "--json")
    assert shown.returncode == 0, shown.stdout
    await delete_topic(place.kafka, topic)

    async def reported() -> bool:
        answer = json.loads((await command(place, app, prefix, "status", path, "--json")).stdout)
        kinds = [notice["kind"] for notice in answer["notices"]]
        return bool(answer["missing_topics"] == [topic] and kinds == ["deleted_topic"])

    await until("the deleted topic to be reported", reported, 60)


async def test_code_of_the_page_settles_messages_of_matching_topics(
    exactly_once: ExactlyOnce, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ROOT / "docs/how-to/topic-patterns.md"
    code = next(block.code for block in documents.blocks(file) if block.language == "python")
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # where annotations are looked up
    exec(compile(code, str(file), "exec"), page.__dict__)
    trial = await exactly_once(
        page.app, schema="create table payments (payment_id text primary key, region text, amount int)"
    )
    body = {"payment_id": "p", "amount": 5}
    paid = [Delivery("payments.eu", body, id="1"), Delivery("payments.us", {**body, "payment_id": "q"}, id="2")]
    back = [Delivery(topic, {"payment_id": "p", "amount": 1}, id=topic) for topic in ("refunds", "refunds.fr")]
    await trial.deliver(*paid, *back)
    await trial.deliver_again()
    rows = [tuple(row) for row in await trial.fetch("select * from payments order by payment_id")]
    assert rows == [("p", "eu", 3), ("q", "us", 5)]
