"""Order behind dead letters, saved attempts, operators, limit and topic.

With real processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any
from uuid import uuid4

import dead_letters_app
import pytest
from harness import (
    ROOT,
    Place,
    Sent,
    consume_all,
    consumer,
    counts,
    drained,
    letters,
    query,
    running,
    until,
    value,
    working,
)
from outgoing import all_published, check_published, records_of, values
from proxy import Proxy

from consumer.dead_letters.retry import DeadLetterRetrier, Filters
from consumer.local_servers import Postgres, Valkey
from consumer.replay.options import Options, Progress
from consumer.replay.verify import replay

PATH = f"{ROOT}{os.pathsep}{ROOT / 'tests'}:{ROOT / 'tests' / 'support'}"


class Shop:
    """dead_letters_app on a topic of its own."""

    def __init__(self, place: Place, topic: str, attempts: int = 1) -> None:
        self.place, self.topic = place, topic
        self.name = f"letters-{uuid4().hex[:8]}"
        self.app = dead_letters_app.make(self.name, topic, attempts)
        self.settings = place.settings()
        self.environment = {"TEST_APP": self.name, "TEST_TOPIC": topic, "PYTHONPATH": PATH}

    async def send(self, *ids: str, key: str | None = "k") -> None:
        await self.place.send(self.topic, *[sent(id, key) for id in ids])

    async def fail(self, kind: str, *ids: str) -> None:
        for id in ids:
            await query(
                self.place.dsn,
                "insert into faults values ($1, $2) on conflict (id) do update set kind = $2",
                id,
                kind,
            )

    async def heal(self) -> None:
        await query(self.place.dsn, "delete from faults")

    async def done(self) -> list[str]:
        return [row[0] for row in await query(self.place.dsn, "select id from done order by n")]

    async def states(self) -> dict[str, str]:
        """By the id in the payload."""
        rows = await query(self.place.dsn, "select value, state from consumer.dead_letters")
        return {json.loads(row[0])["id"]: row[1] for row in rows}

    async def numbers(self) -> dict[str, int]:
        rows = await query(self.place.dsn, "select value, dead_letter from consumer.dead_letters")
        return {json.loads(row[0])["id"]: row[1] for row in rows}

    async def dlq(self, tmp_path: Path, *arguments: str, code: int = 0) -> Any:
        """`consumer dlq retry|discard …` as a process; its JSON."""
        what, *rest = arguments
        result = await asyncio.to_thread(
            consumer, tmp_path, "dlq", what, "dead_letters_app:app", *rest, "--json",
            CONSUMER_POSTGRES_DSN=self.place.worker_dsn, **self.environment,
        )  # fmt: skip
        assert result.returncode == code, result.stderr + result.stdout
        return json.loads(result.stdout) if result.stdout else result.stderr

    async def consume(self) -> None:
        await consume_all(self.app, self.settings)

    async def replay_is_ok(self) -> None:
        findings = await replay(self.app, self.settings, [self.topic], Options(), Progress())
        assert findings.verdict().exit_code == 0, findings.problems()


def sent(id: str, key: str | None = "k") -> Sent:
    return Sent({"id": id, "amount": 1}, id=id, key=key)


@pytest.fixture
async def shop(place: Place) -> Shop:
    await query(place.dsn, "select 1")
    for sql in dead_letters_app.TABLES.split(";\n"):
        if sql.strip():
            await query(place.dsn, sql.split("--")[0])
    await query(place.dsn, 'grant all on faults, done to "test-worker"')
    return Shop(place, await place.topic(1))


async def test_later_messages_of_a_key_wait_in_order_until_a_retry(shop: Shop, tmp_path: Path) -> None:
    await shop.fail("fails", "a1")
    await shop.send("a1", "a2", key="a")
    await shop.send("b1", "b2", key="b")
    await shop.send("n1", key=None)
    await shop.consume()
    assert await shop.done() == ["b1", "b2", "n1"]
    assert await shop.states() == {"a1": "dead", "a2": "waiting"}
    await shop.send("a3", "a2", "a4", key="a")  # another worker, and one of them sent twice
    await shop.consume()
    assert await shop.states() == {"a1": "dead", "a2": "waiting", "a3": "waiting", "a4": "waiting"}
    await shop.replay_is_ok()

    first = (await shop.numbers())["a1"]
    answer = await shop.dlq(tmp_path, "retry", str(first), code=1)  # it still fails
    assert [letter["outcome"] for letter in answer["letters"]] == ["failed"]
    assert [letter["attempts"] for letter in await letters(shop.place.dsn) if letter["letter"] == first] == [2]
    assert await shop.done() == ["b1", "b2", "n1"]

    await shop.heal()
    await shop.fail("constraint", "a3")
    answer = await shop.dlq(tmp_path, "retry", "--all", "--yes", code=1)
    assert [(letter["outcome"], letter["behind"]) for letter in answer["letters"]] == [
        ("applied", False), ("applied", True), ("failed", True),
    ]  # fmt: skip
    assert await shop.states() == {"a1": "applied", "a2": "applied", "a3": "dead", "a4": "waiting"}
    await shop.send("a5", key="a")
    await shop.consume()
    assert (await shop.states())["a5"] == "waiting"
    await shop.heal()
    await shop.dlq(tmp_path, "retry", "--reason", "failed", "--yes")
    await shop.send("a1", "a6", key="a")  # what was retried stays a duplicate, and the key is free
    await shop.consume()
    assert [id for id in await shop.done() if id[0] == "a"] == ["a1", "a2", "a3", "a4", "a5", "a6"]
    assert await value(shop.place.dsn, "select count(*) from consumer.held") == 0
    answer = (await counts(shop.app, shop.place.dsn))["settle"]
    assert (answer["applied"], answer["dead_lettered"], sum(answer["duplicates"].values())) == (9, 0, 2)
    await shop.replay_is_ok()


async def test_a_worker_and_an_operator_at_one_key_keep_its_order(shop: Shop) -> None:
    """Dead letters appear while others are settled.

    These are the races that postgres/dead_letters.py describes.
    """
    ids = [f"{n:04}" for n in range(400)]
    await shop.fail("fails", *ids[::40])

    async def operate() -> None:
        retrier = await DeadLetterRetrier.open(shop.app, shop.settings, "test")
        try:
            while len(await shop.done()) < len(ids):
                await query(
                    shop.place.dsn, "delete from faults where id in (select id from faults order by id limit 1)"
                )
                for number in await retrier.select(Filters(), waiting=False):
                    async for _ in retrier.retry(number):
                        pass
        finally:
            retrier.close()

    async with working(shop.app, shop.place.settings(batch_messages_max=7)):
        operator = asyncio.create_task(operate())
        for start in range(0, len(ids), 20):
            await shop.send(*ids[start : start + 20])
        await asyncio.wait_for(operator, 60)
        await drained(shop.app, shop.settings)
    assert await shop.done() == ids
    assert set((await shop.states()).values()) <= {"applied"}
    assert await value(shop.place.dsn, "select count(*) from consumer.held") == 0


async def test_attempts_go_on_where_a_killed_worker_left_them(shop: Shop, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    await shop.fail("fails", "bad")
    await shop.send("bad", "behind", key="a")
    environment = {**shop.environment, "TEST_ATTEMPTS": "4", "TEST_BASE": "0.5", "TEST_CALLS": str(calls)}
    del environment["PYTHONPATH"]
    run = ["run", "dead_letters_app:app"]

    async def attempts(n: int) -> bool:
        return bool(await query(shop.place.dsn, "select from consumer.attempts where attempts >= $1", n))

    for n in (1, 2):
        async with running(run, shop.settings, tmp_path / f"run{n}", **environment) as command:
            await until(f"attempt {n}", lambda n=n: attempts(n))  # type: ignore[misc]
            for pid in command.worker_pids().values():
                os.kill(pid, signal.SIGKILL)
            command.process.kill()
    async with running(run, shop.settings, tmp_path / "run3", **environment) as command:
        await until("it to be dead", lambda: shop.states())
        await until(
            "the other to wait", lambda: value(shop.place.dsn, "select count(*) = 2 from consumer.dead_letters")
        )
    assert await shop.states() == {"bad": "dead", "behind": "waiting"}
    assert await value(shop.place.dsn, "select attempts from consumer.dead_letters where state = 'dead'") == 4
    called = calls.read_text().split()
    assert 4 <= called.count("bad") <= 6  # a run that a kill cut short, or whose batch ran again, is no attempt
    assert await value(shop.place.dsn, "select count(*) from consumer.attempts") == 0


async def test_two_operators_settle_each_of_thousands_of_dead_letters_once(shop: Shop, tmp_path: Path) -> None:
    ids = [f"m{n}" for n in range(1000)]
    await query(shop.place.dsn, "insert into faults select 'm' || n, 'fails' from generate_series(0, 999) n")
    shop.settings = shop.place.settings(dead_letter_limit=1)
    await shop.send(*ids, key=None)
    await consume_all(shop.app, shop.settings, 150)
    assert await value(shop.place.dsn, "select count(*) from consumer.dead_letters where state = 'dead'") == 1000
    await shop.heal()
    one, other = await asyncio.gather(
        shop.dlq(tmp_path, "retry", "--all", "--yes", "--operator", "ann"),
        shop.dlq(tmp_path, "retry", "--handler", "settle", "--yes", "--operator", "bob"),
    )
    assert one["counts"].get("applied", 0) + other["counts"].get("applied", 0) == 1000
    assert sorted(await shop.done()) == sorted(ids)
    assert await query(
        shop.place.dsn, "select result, count(*), count(distinct dead_letter) from consumer.audit group by 1"
    ) == [("applied", 1000, 1000)]


async def test_an_edit_is_the_same_intent_or_a_new_one_and_counts_once(shop: Shop, tmp_path: Path) -> None:
    await shop.fail("fails", "same", "new", "worse")
    for id in ("same", "new", "worse"):
        await shop.send(id, f"{id}-2", key=id)
    await shop.consume()
    numbers = await shop.numbers()
    edited = tmp_path / "edited.json"
    edited.write_text('{"id": "edited", "amount": 2}')
    edit = ["--value", str(edited)]
    text = await shop.dlq(tmp_path, "retry", str(numbers["same"]), *edit, code=2)
    assert "--same-id" in text and "--new-id" in text
    await shop.dlq(tmp_path, "retry", str(numbers["same"]), *edit, "--same-id")
    await shop.dlq(tmp_path, "retry", str(numbers["new"]), *edit, "--new-id", "auto")
    text = await shop.dlq(tmp_path, "retry", str(numbers["new"]), *edit, "--new-id", "auto", code=2)
    assert "discarded already" in text
    edited.write_text("{no json")
    answer = await shop.dlq(tmp_path, "retry", str(numbers["worse"]), *edit, "--same-id", code=1)
    assert answer["letters"][0]["outcome"] == "unreadable"
    states = await shop.states()
    assert [states[id] for id in ("same", "new", "worse", "worse-2")] == ["applied", "discarded", "dead", "waiting"]
    assert await shop.done() == ["edited", "same-2", "edited", "new-2"]
    for id in ("same", "new"):  # duplicates of both are duplicates
        await shop.send(id, key=id)
    await shop.consume()
    assert len(await shop.done()) == 4
    await shop.replay_is_ok()
    await shop.dlq(tmp_path, "erase", *(str(numbers[id]) for id in ("same", "new")), "--why", "a request", "--yes")
    for id in ("same", "new"):  # of an edit that is erased, they still are
        await shop.send(id, key=id)
    await shop.consume()
    assert len(await shop.done()) == 4
    [counted] = (await counts(shop.app, shop.place.dsn)).values()
    assert sum(counted["duplicates"].values()) == 4, counted
    await shop.replay_is_ok()


async def test_discarded_dead_letter_leaves_a_trace_and_frees_its_key(shop: Shop, tmp_path: Path) -> None:
    await shop.fail("fails", "a1", "c1")
    await shop.send("a1", "a2", "a3", key="a")
    await shop.send("c1", "c2", key="c")
    await shop.consume()
    numbers = await shop.numbers()
    assert "--why" in await shop.dlq(tmp_path, "discard", str(numbers["a1"]), code=2)
    answer = await shop.dlq(
        tmp_path, "discard", str(numbers["a1"]), str(numbers["a2"]), "--why", "a test order", "--operator", "eve"
    )
    assert [letter["outcome"] for letter in answer["letters"]] == ["discarded", "discarded", "applied"]
    assert await shop.done() == ["a3"]
    assert await shop.states() == {"a1": "discarded", "a2": "discarded", "a3": "applied", "c1": "dead", "c2": "waiting"}
    [action] = await query(
        shop.place.dsn, "select operator, action, why from consumer.audit where dead_letter = $1", numbers["a1"]
    )
    assert action == ("eve", "dlq discard", "a test order")
    await shop.heal()
    await shop.send("a1", "a4", key="a")
    await shop.consume()
    assert await shop.done() == ["a3", "a4"]
    await shop.replay_is_ok()
    shown = await asyncio.to_thread(
        consumer,
        tmp_path,
        "dlq",
        "show",
        shop.app.name,
        str(numbers["a1"]),
        CONSUMER_POSTGRES_DSN=shop.place.worker_dsn,
    )
    assert "discard by eve: discarded (a test order)" in shown.stdout
    answer = await shop.dlq(
        tmp_path, "discard", "--all", "--why", "x", "--yes"
    )  # those that wait are meant too, and do not run
    assert {letter["outcome"] for letter in answer["letters"]} == {"discarded"}
    assert await shop.done() == ["a3", "a4"]
    assert await value(shop.place.dsn, "select count(*) from consumer.held") == 0


async def test_filters_choose_and_bad_input_changes_nothing(shop: Shop, tmp_path: Path) -> None:
    await shop.fail("fails", "f1", "f2")
    await shop.fail("rejected", "r1")
    await shop.send("f1", "f2", "r1", key=None)
    await shop.place.send(shop.topic, Sent(b"{no json", id="u1"))
    await shop.consume()
    await query(
        shop.place.dsn, "update consumer.dead_letters set died_at = now() - interval '2 days' where reason = 'rejected'"
    )
    rows = {letter["reason"]: letter for letter in await letters(shop.place.dsn)}
    groups = {letter["group"] for letter in await letters(shop.place.dsn) if letter["reason"] == "failed"}
    assert len(groups) == 1  # the two differ in their values only
    retrier = await DeadLetterRetrier.open(shop.app, shop.settings, "test")
    try:

        async def chosen(**only: Any) -> int:
            return len(await retrier.select(Filters(**only), waiting=False))

        assert await chosen() == 4
        assert await chosen(reason="failed") == 2
        assert await chosen(group=groups.pop()) == 2
        assert await chosen(handler="settle") == 4
        assert await chosen(handler="other") == 0
        assert await chosen(topic=shop.topic, reason="unreadable") == 1
        assert await chosen(topic="other") == 0
        assert await chosen(older_than_seconds=86400) == 1
        assert await chosen(newer_than_seconds=86400) == 3
    finally:
        retrier.close()
    number = str(rows["rejected"]["letter"])
    for arguments, says in (
        ((), "LETTER: dead letters are not selected"),
        ((number, "--all"), "one of the three"),
        (("--all",), "--yes"),
        (("99999",), "dead letter 99999: there is none"),
        (("--reason", "sad", "--yes"), "--reason"),
        (("--older-than", "1y", "--yes"), "--older-than"),
        (("--handler", "other", "--yes"), "--handler 'other'"),
        ((number, "--same-id"), "--value"),
        ((number, "--value", "/nonexistent", "--same-id"), "--value /nonexistent"),
    ):
        text = await shop.dlq(tmp_path, "retry", *arguments, code=2)
        assert says in text, arguments
        assert len([line for line in text.splitlines() if line.strip()]) == 1
    assert (await shop.dlq(tmp_path, "retry", "--all", "--dry-run"))["changed"] is False
    assert await value(shop.place.dsn, "select count(*) from consumer.audit") == 0
    assert await query(shop.place.dsn, "select distinct state from consumer.dead_letters") == [("dead",)]


async def test_worker_above_the_dead_letter_limit_stops_for_good(shop: Shop, tmp_path: Path) -> None:
    await query(shop.place.dsn, "insert into faults select 'm' || n, 'fails' from generate_series(0, 199) n")
    await shop.send(*[f"m{n}" for n in range(200)], key=None)
    environment = {name: text for name, text in shop.environment.items() if name != "PYTHONPATH"}
    async with running(
        ["run", "dead_letters_app:app", "--workers", "2"], shop.settings, tmp_path / "run", **environment
    ) as command:
        assert await command.wait() == 1
    assert (
        "'settle'" in command.errors and "failed" in command.errors and "CONSUMER_DEAD_LETTER_LIMIT" in command.errors
    )
    assert not any(event["event"] == "worker ended; starting another" for event in command.events())
    assert await value(shop.place.dsn, "select count(*) from consumer.dead_letters") == 0
    assert await value(shop.place.dsn, "select max(next_offset) from consumer.positions") == 0


async def test_outage_of_any_service_makes_no_dead_letter(shop: Shop, postgres: Postgres, own_valkey: Valkey) -> None:
    """PostgreSQL and Redis stop and return; messages have one attempt."""
    dsn = shop.place.worker_dsn
    port = int(dsn.split("@")[1].split(":")[1].split("/")[0])
    async with Proxy(port, "postgres") as database, Proxy(own_valkey.port, "redis") as redis:
        away = dsn.replace(f":{port}/", f":{database.port}/")
        settings = shop.place.settings(
            postgres_dsn=away, redis_url=f"redis://127.0.0.1:{redis.port}/0", batch_messages_max=20
        )
        async with working(shop.app, settings):
            ids = [f"m{n:03}" for n in range(400)]
            for n, start in enumerate(range(0, 400, 100)):
                await shop.send(*ids[start : start + 100], key="k" if n % 2 else None)
                if n in (0, 2):
                    database.on("commit", "after")
                    database.refuse()
                    redis.refuse()
                    await asyncio.sleep(0.5)
                    await database.accept()
                    await redis.accept()
                else:
                    database.reset()
            await drained(shop.app, shop.settings, 60)
    assert sorted(await shop.done()) == ids
    assert await letters(shop.place.dsn) == []
    assert await value(shop.place.dsn, "select count(*) from consumer.attempts") == 0


async def test_a_dead_letter_topic_is_in_order_and_repeats_ids(shop: Shop, tmp_path: Path) -> None:
    target = await shop.place.topic(2)
    settings = shop.place.settings(dead_letter_topic=target, batch_messages_max=2)
    ids = [f"bad{number}" for number in range(6)]
    await shop.fail("fails", *ids, "behind")
    await shop.place.send(
        shop.topic,
        *[Sent({"id": id, "amount": 1}, id=id, key=f"k{id}", headers=[("trace", b"t1")]) for id in ids],
        Sent({"id": "behind", "amount": 1}, id="behind", key="kbad5"),
    )
    async with working(shop.app, settings):
        await drained(shop.app, settings)
        await all_published(shop.place)
    first = await check_published(shop.place, target)
    assert sorted(values(first), key=lambda letter: str(letter["id"])) == [{"id": id, "amount": 1} for id in ids]
    for partition in range(2):
        part = [letter for letter in first if letter.partition == partition]
        assert [letter.value for letter in part] == sorted(letter.value for letter in part)
    letter, number = first[0], (await shop.numbers())[json.loads(first[0].value)["id"]]
    headers, id = dict(letter.headers), json.loads(letter.value)["id"].encode()
    assert (letter.key, headers["trace"], headers["dead-letter-message-id"]) == (b"k" + id, b"t1", id)
    assert headers["message-id"] != id and headers["dead-letter-id"] == f"{shop.name}/settle/{number}".encode()
    assert headers["dead-letter-error"] == b"ValueError" and headers["dead-letter-reason"] == b"failed"
    assert "account" not in str(letter.headers)  # the text of the error may quote the payload

    # Its worker died before it noted Kafka's acknowledgement; and the one that waited becomes a dead letter, too.
    await query(shop.place.dsn, "update consumer.outbox_published set next_seq = 0 returning 1")
    await query(shop.place.dsn, "delete from faults where id = 'bad5'")
    await shop.dlq(tmp_path, "retry", "--all", "--yes", "--dead-letter-topic", target, code=1)
    async with working(shop.app, settings):
        await all_published(shop.place)
    again = await check_published(shop.place, target)
    assert len(await records_of(shop.place.kafka, target)) >= 13 and len(again) == 7
    assert {"id": "behind", "amount": 1} in values(again)


async def test_a_copy_too_large_for_its_topic_stops_no_other(shop: Shop) -> None:
    target = await shop.place.topic(1, **{"max.message.bytes": "3000"})
    await shop.fail("fails", "small", "after")
    large = Sent({"id": "large", "amount": "x" * 9000}, id="large", partition=0)
    await shop.place.send(
        shop.topic,
        Sent({"id": "small", "amount": 1}, id="small", partition=0),
        large,
        Sent({"id": "after", "amount": 1}, id="after", partition=0),
    )
    settings = shop.place.settings(dead_letter_topic=target)
    async with working(shop.app, settings):
        await drained(shop.app, settings)
        await all_published(shop.place)
    assert [letter["id"] for letter in values(await records_of(shop.place.kafka, target))] == ["small", "after"]
    assert await value(shop.place.dsn, "select count(*) from consumer.outbox_published where stopped is not null") == 0
    assert len(await letters(shop.place.dsn)) == 3  # PostgreSQL keeps it


async def test_dead_letters_that_the_version_before_has_not_published_are(shop: Shop) -> None:
    target = await shop.place.topic(1)
    await shop.fail("fails", "a", "b")
    await shop.send("a", "b", key=None)
    await consume_all(shop.app, shop.place.settings())
    left = "insert into consumer.letters_to_publish select dead_letter from consumer.dead_letters returning 1"
    assert len(await query(shop.place.dsn, left)) == 2
    async with working(shop.app, shop.place.settings(dead_letter_topic=target)):
        await until(
            "none to be left", lambda: value(shop.place.dsn, "select count(*) = 0 from consumer.letters_to_publish")
        )
        await all_published(shop.place)
    published = values(await check_published(shop.place, target))
    assert sorted(letter["id"] for letter in published) == ["a", "b"]


def test_a_dead_letter_topic_that_the_app_consumes_is_refused(tmp_path: Path, place: Place) -> None:
    environment = {"TEST_APP": "loop", "TEST_TOPIC": "loop-topic", "PYTHONPATH": PATH}
    result = consumer(
        tmp_path, "run", "dead_letters_app:app", "--dead-letter-topic", "loop-topic", CONSUMER_POSTGRES_DSN=place.worker_dsn,
        CONSUMER_KAFKA_BOOTSTRAP_SERVERS=place.kafka, **environment,
    )  # fmt: skip
    assert result.returncode == 2
    assert "consumes that topic itself" in result.stderr
