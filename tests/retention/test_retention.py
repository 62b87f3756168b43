"""Generations of the ledger turn and drop without applying an id twice.

The interleavings are of real connections under the worker's role; a step that waits for another transaction is left waiting,
and the next step is taken.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from harness import (
    WORKER,
    Place,
    Sent,
    as_worker,
    consume_all,
    consumer,
    counts,
    delete_topic,
    is_one_line,
    migrated,
    new_topic,
    query,
    settings_for,
    until,
    value,
    working,
)
from pattern_app import pattern_app
from worker_log import WorkerLog

from consumer import App, Reject, Tx
from consumer.core.delivery import Delivery
from consumer.core.message import LogRecord, Partition
from consumer.core.retention import Drop, Forget, RotateGeneration
from consumer.postgres import generations
from consumer.postgres.session import Session
from consumer.replay.options import Options, Progress
from consumer.replay.verify import replay
from consumer.retention import task as retention

TOPIC = "t"


class Claims:
    """A handler's claims without Kafka: sessions, numbers and a watcher."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.settings = settings_for(as_worker(dsn), "127.0.0.1:1")
        self.opened: list[Session] = []
        self.expects_new = False
        app = App("retention")

        @app.handler(TOPIC)
        async def settle(message: dict[str, int], tx: Tx) -> None: ...

        self.handler = app.handlers["settle"]
        self.topics: dict[str, int] = {}
        self.watcher: asyncpg.Connection[Any]
        self.leader: asyncpg.Connection[Any]

    async def open(self) -> None:
        self.watcher = await asyncpg.connect(self.dsn)
        self.leader = await asyncpg.connect(self.settings.dsn)
        session = await self.session()
        numbers, self.topics = await session.numbers("retention", ["settle"], [TOPIC])
        self.handler.number = numbers["settle"]

    async def session(self) -> Session:
        self.opened.append(await Session.open(self.settings))
        return self.opened[-1]

    def close(self) -> None:
        for session in self.opened:
            session.close()
        self.watcher.terminate()
        self.leader.terminate()

    def at(self, timestamp: int, offset: int = 0) -> Delivery:
        return Delivery(self.handler, LogRecord(TOPIC, 0, offset, timestamp, None, b"{}", (), ""))

    def delivery(self, id: UUID, offset: int = 0) -> Delivery:
        delivery = self.at(0, offset)
        delivery.id, delivery.fingerprint = id.bytes, 1
        return delivery

    async def claim(self, session: Session, *ids: UUID) -> set[UUID]:
        """Those that were won, in a transaction that is left open."""
        offered = {self.delivery(id): id for id in ids}
        while self.expects_new and not session.claims.history.expects_new:
            session.claims.history.claimed(1, 0)
        await session.begin()
        lost = await session.claim(list(offered), self.topics)
        return {id for delivery, id in offered.items() if delivery not in lost}

    async def version(self) -> int:
        return int(await self.watcher.fetchval("select version from consumer.ledger_state"))

    async def turn(self) -> str:
        return str(await self.leader.fetchval("select consumer.turn($1)", await self.version()))

    async def forget(self, number: int) -> str:
        return str(await self.leader.fetchval("select consumer.forget($1, $2)", await self.version(), number))

    async def drop(self, number: int) -> str:
        return str(await self.leader.fetchval("select consumer.drop_generation($1)", number))

    async def rows(self, id: UUID) -> int:
        return int(await self.watcher.fetchval("select count(*) from consumer.ledger where id = $1", id))

    async def turn_to_the_next(self) -> int:
        """A whole turn; returns the generation that claims go into now."""
        while await self.turn() != "turned":
            pass
        return int(await self.watcher.fetchval("select target from consumer.ledger_state"))

    async def let_go_of_the_old(self) -> None:
        """Keep the present generation alone."""
        for number in [
            row[0] for row in await self.watcher.fetch("select number from consumer.generations order by 1")
        ]:
            if number < await self.watcher.fetchval("select target from consumer.ledger_state"):
                assert await self.forget(number) == "forgotten"
                assert await self.drop(number) == "dropped"


@pytest.fixture
async def claims(database: str) -> AsyncIterator[Claims]:
    await migrated(database)
    claims = Claims(database)
    await claims.open()
    try:
        yield claims
    finally:
        claims.close()


def orders(steps: str) -> Iterator[str]:
    """All orders in which each capital comes after its small letter."""
    for order in sorted(set(itertools.permutations(steps))):
        if all(order.index(letter) < order.index(letter.upper()) for letter in "ab"):
            yield "".join(order)


async def settled_or_blocked(claims: Claims, session: Session, task: asyncio.Task[Any]) -> None:
    """Until a claim has ended, or waits for another transaction."""
    pid = session.connection.get_server_pid()

    async def is_so() -> bool:
        return task.done() or await claims.watcher.fetchval("select cardinality(pg_blocking_pids($1)) > 0", pid)

    while not await is_so():
        pass


async def run_order(claims: Claims, sessions: dict[str, Session], order: str, ends: dict[str, str]) -> None:
    """Run the steps: a, b claim; A, B end; L turns."""
    id = uuid4()
    won: dict[str, bool] = {}
    running: dict[str, asyncio.Task[set[UUID]]] = {}
    await sessions["a"].claims.read_generations()

    async def end(name: str) -> None:
        won[name] = bool(await running.pop(name)) and ends[name] == "commit"
        await sessions[name].connection.execute(ends[name])

    put_off: list[str] = []
    for step in order:
        if step == "L":
            assert await claims.turn() in ("opened", "moved", "turned", "waiting")
        elif step in sessions:
            if step == "b":
                await sessions["b"].claims.read_generations()
            running[step] = asyncio.create_task(claims.claim(sessions[step], id))
            await settled_or_blocked(claims, sessions[step], running[step])
        elif running[step.lower()].done():
            await end(step.lower())
        else:
            put_off.append(step.lower())  # it waits for the other one, whose end comes later
    for name in put_off:
        await end(name)
    winners = sum(won.values())
    assert winners == 1 if "commit" in ends.values() else winners == 0, (order, ends, won)
    assert await claims.rows(id) == winners, (order, ends)
    # From now on it is a duplicate for every session.
    for session in sessions.values():
        assert await claims.claim(session, id) == set()
        await session.rollback()


@pytest.mark.parametrize("expects_new", [False, True])
async def test_two_claims_never_both_win_in_any_order_with_a_turn(claims: Claims, expects_new: bool) -> None:
    """From each phase of a turn on."""
    claims.expects_new = expects_new
    sessions = {"a": await claims.session(), "b": await claims.session()}
    tried = 0
    for phase in ("turned", "opened", "moved"):
        for ends in ({"a": "commit", "b": "commit"}, {"a": "rollback", "b": "commit"}):
            for order in orders("aAbBLL"):
                if ends["a"] == "rollback" and order.replace("L", "") != "abAB":
                    continue  # b does not wait for a
                await claims.turn_to_the_next()
                await claims.let_go_of_the_old()
                while phase != "turned" and await claims.turn() != phase:
                    pass
                await run_order(claims, sessions, order, ends)
                tried += 1
    assert tried == 3 * (90 + 15)


async def test_a_claim_that_is_running_holds_up_the_turn_and_not_the_reverse(claims: Claims) -> None:
    slow, quick = await claims.session(), await claims.session()
    assert len(await claims.claim(slow, first := uuid4())) == 1  # and its handler takes its time
    assert await claims.turn() == "opened"
    assert [await claims.turn() for _ in range(3)] == ["waiting"] * 3
    assert len(await claims.claim(quick, second := uuid4())) == 1  # which waits for no other
    await quick.commit()
    await slow.commit()
    assert [await claims.turn() for _ in range(2)] == ["moved", "turned"]
    for session in (slow, quick):
        assert await claims.claim(session, first, second, third := uuid4()) == {third}
        await session.commit()
    where = await query(
        claims.dsn, "select tableoid::regclass::text, count(*) from consumer.ledger group by 1 order by 1"
    )
    assert where == [("consumer.ledger", 2), ("consumer.ledger_2", 2)]


async def test_a_worker_of_the_version_before_ends_at_the_first_turn(claims: Claims) -> None:
    old = await asyncpg.connect(claims.settings.dsn)
    statement = """insert into consumer.ledger values (1, 1, now(), 0, $1, 1, $2)
                   on conflict on constraint ledger_claim do nothing"""
    try:
        assert await old.execute(statement, claims.handler.number, uuid4()) == "INSERT 0 1"
        await old.execute("begin")
        assert await old.execute(statement, claims.handler.number, id := uuid4()) == "INSERT 0 1"
        assert [await claims.turn() for _ in range(3)] == ["opened", "waiting", "waiting"]  # for that one
        await old.execute("commit")
        with pytest.raises(asyncpg.UndefinedObjectError):
            await old.execute(statement, claims.handler.number, uuid4())
    finally:
        old.terminate()
    assert await claims.turn_to_the_next() == 2
    assert await claims.claim(await claims.session(), id) == set()


async def test_a_drop_waits_for_claims_and_readers_and_carries_dead_letters(claims: Claims) -> None:
    session, looking = await claims.session(), await claims.session()
    ids = [uuid4() for _ in range(3)]
    assert len(await claims.claim(session, *ids)) == 3
    dead = claims.delivery(ids[2])
    await session.connection.execute(
        """insert into consumer.dead_letters (handler, id, fingerprint, topic, partition, "offset", "timestamp",
               header_keys, header_values, reason, error, attempts) values ($1, $2, 1, 't', 0, 0, 0, '{}', '{}', 'rejected', '', 1)""",
        claims.handler.number,
        ids[2],
    )
    await session.connection.execute("update consumer.ledger set applied_at = null where id = $1", ids[2])
    await session.commit()
    assert await claims.turn_to_the_next() == 2
    # One session locks the dead letter, as a retry does; the claim of another looked into the first generation.
    await claims.watcher.execute("begin; select from consumer.dead_letters for update")
    assert await claims.forget(1) == "waiting"
    await claims.watcher.execute("commit")
    assert await claims.forget(1) == "carried"
    assert await claims.rows(ids[2]) == 1
    assert await claims.claim(looking, *ids) == set()
    assert await looking.too_old([claims.at(0), claims.at(946_684_800_000)]) == []
    assert await claims.forget(1) == "forgotten"
    assert await claims.drop(1) == "waiting"
    # A transaction that begins now sees only the dead letter, and that the rest cannot be judged.
    assert await claims.claim(session, *ids) == set(ids[:2])
    closed = await value(claims.dsn, "select (extract(epoch from horizon) * 1000)::int8 from consumer.ledger_state")
    hour = 3_600_000
    # Without a usable timestamp the offset decides, and the dropped rows were of offset 0.
    old = [claims.at(closed + hour), *(claims.at(timestamp, offset=0) for timestamp in (-1, 0, closed // 1000))]
    new = [claims.at(closed + hour + 2), *(claims.at(timestamp, offset=1) for timestamp in (-1, 0, closed // 1000))]
    assert await session.too_old(old + new) == old
    standing = await session.claim([dead], claims.topics)
    assert standing[dead].dead
    await session.rollback()
    await looking.rollback()
    await claims.watcher.execute("begin; select count(*) from consumer.ledger")  # a long report
    assert await retention.act(claims.leader, await generations.read_state(claims.leader), Drop(1)) == "waiting"
    assert len(await claims.claim(session, uuid4())) == 1  # is held up by neither
    await claims.watcher.execute("commit")
    await session.commit()
    assert await claims.drop(1) == "dropped"
    assert await query(claims.dsn, "select outcome, count from consumer.outcomes where count > 0") == [("applied", 2)]
    assert [await claims.rows(id) for id in ids] == [0, 0, 1]


def app_of(topic: str, name: str | None = None) -> App:
    app = App(name or topic)

    @app.handler(topic)
    async def settle(message: dict[str, str], tx: Tx) -> None:
        if message["id"] == "bad":
            raise Reject("no")
        await tx.execute("insert into effects values ($1, 0, 0)", message["id"])

    return app


def sent(*ids: str) -> list[Sent]:
    return [Sent({"id": id}, id=id) for id in ids]


async def test_messages_of_a_dropped_generation_are_too_old_to_judge(place: Place, tmp_path: Path) -> None:
    """The log is delivered again from the beginning after a purge."""
    topic = await place.topic()
    app = app_of(topic)
    settings = place.settings(redis_url=None, ledger_clock_skew_hours=0)
    await place.send(topic, *sent("a", "b", "bad"))
    await consume_all(app, settings)
    environment = {
        "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": place.kafka,
        "CONSUMER_POSTGRES_DSN": place.worker_dsn,
        "CONSUMER_LEDGER_CLOCK_SKEW_HOURS": "0",
    }
    is_one_line(consumer(tmp_path, "purge", **environment), "CONSUMER_LEDGER_RETENTION_HOURS")
    refused = consumer(tmp_path, "purge", "--older-than", "1", CONSUMER_LEDGER_RETENTION_HOURS="24", **environment)
    is_one_line(refused, "--older-than 1", "CONSUMER_LEDGER_RETENTION_HOURS=24")
    # The topic keeps records for a week, and this application said nothing.
    is_one_line(
        consumer(tmp_path, "purge", "--older-than", "0", **environment), "168 hours", "168 too few", topic, "--force"
    )
    looked = consumer(tmp_path, "purge", "--older-than", "0", "--dry-run", "--json", **environment)
    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout)["generations"][0]["why"] == "claims go into it"
    assert await value(place.dsn, "select version from consumer.ledger_state") == 1
    done = consumer(tmp_path, "purge", "--older-than", "0", "--force", "--json", **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dropped"] == [1]
    assert (await counts(app, place.dsn))["settle"]["applied"] == 2

    await query(place.dsn, "update consumer.positions set next_offset = 0, first_offset = 0 returning 1")
    findings = await replay(app, settings, [topic], Options(), Progress())
    counted = {name: n for name, n in findings.as_dict()["handlers"]["settle"].items() if n}
    assert counted == {"delivered": 3, "unknown": 2, "dead_lettered": 1}
    assert findings.verdict().exit_code == 2
    await place.send(topic, *sent("c"))
    await consume_all(app, settings)
    assert [row[0] for row in await place.effects()] == ["a", "b", "c"]
    assert await place.reasons() == ["too_old", "too_old", "rejected"]


async def delete_records(place: Place, topic: str, partitions: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
    await admin.start()
    try:
        await admin.delete_records(
            {TopicPartition(topic, n): RecordsToDelete(before_offset=-1) for n in range(partitions)}
        )
    finally:
        await admin.close()


async def test_workers_drop_generations_that_the_log_no_longer_holds(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retention, "ROUND_SECONDS_MAX", 0.2)
    caplog.set_level(logging.INFO)
    # The broker's time: a record that is sent late would be older than what was dropped meanwhile.
    topic = await place.topic(2, **{"message.timestamp.type": "LogAppendTime"})
    other = app_of(topic, f"{topic}-other")
    app = app_of(topic)
    settings = place.settings(ledger_retention_hours=1 / 3600, ledger_clock_skew_hours=0, lanes_max=1)
    await consume_all(other, place.settings(lanes_max=1))  # which keeps its rows for ever

    def logged(text: str) -> Any:
        async def is_there() -> bool:
            return text in caplog.messages

        return is_there

    async def has_horizon() -> Any:
        return await value(place.dsn, "select horizon from consumer.ledger_state")

    async def applied() -> bool:
        return len(await place.effects()) == number

    number = 0
    async with working(app, settings), working(app, settings):
        while (
            not number
            or not await logged("nothing of the ledger is dropped: other applications keep theirs for ever")()
        ):
            await place.send(topic, *sent(f"a{number}", f"a{number}"))
            number += 1
            await until("it to be applied", applied)
        await generations.declare(connection := await asyncpg.connect(place.dsn), other.name, 0)
        await until(
            "the log to hold it back",
            logged("nothing of the ledger is dropped: a log still holds records of that time"),
        )
        assert await has_horizon() is None
        await delete_records(place, topic, 2)
        await until("a generation to go", has_horizon)
        for _ in range(5):
            await place.send(topic, *sent(f"a{number}", f"a{number}"))
            number += 1
            await until("it to be applied", applied)
        await until("its table to go", logged("ledger dropped"))
        await connection.execute(f'revoke execute on function consumer.turn(integer) from "{WORKER}"')
        await delete_records(place, topic, 2)  # which hold back every later step
        await until("the worker to say that it may not", logged("the ledger is not kept short"))
    await connection.close()
    assert [row[0] for row in await place.effects()] == sorted(f"a{n}" for n in range(number))


async def test_logs_of_topics_that_appear_later_are_asked_too(
    place: Place, worker_log: WorkerLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check at the start has not seen them.

    Still no message is applied twice.
    """
    monkeypatch.setattr(retention, "ROUND_SECONDS_MAX", 0.2)
    prefix = f"p-{uuid4().hex[:8]}"
    app = pattern_app(prefix, prefix, "settle")
    settings = place.settings(redis_url=None, ledger_retention_hours=1 / 3600, ledger_clock_skew_hours=0)
    [message], before = sent("x"), int(time.time() * 1000)
    early, late = await new_topic(place.kafka, 1, f"{prefix}.eu"), f"{prefix}.us"

    async def is_forgotten() -> bool:
        return not await value(place.dsn, "select count(*) from consumer.ledger")

    async def is_applied() -> bool:
        return bool(await place.effects())

    async def is_judged() -> bool:
        return bool(await place.reasons())

    async with working(app, settings) as worker:

        async def is_read() -> bool:
            return worker.partitions.table.may_be_read(Partition(late, 0))

        await worker_log.wait("patterns match topics", 1, 60)
        await new_topic(place.kafka, 1, late)
        # From here on its log is asked; before, a record could be older than what was dropped meanwhile.
        await until("it to be read", is_read, 60)
        await place.send(late, message)
        held = await worker_log.wait("a log still holds records of that time", 1, 60)
        assert held[0]["topic"] == late
        await until("it to be applied", is_applied, 60)
        assert not await is_forgotten()
        await delete_topic(place.kafka, late)
        await until("its row to go", is_forgotten, 60)
        async with AIOKafkaProducer(bootstrap_servers=place.kafka) as producer:  # a copy, as a mirror makes it
            await producer.send_and_wait(early, message.value, headers=message.headers, timestamp_ms=before)
        await until("the copy to be judged", is_judged, 60)
    assert [row[0] for row in await place.effects()] == ["settle.us x"]
    assert await place.reasons() == ["too_old"]


async def test_contradicting_settings_are_reported_at_start(place: Place, tmp_path: Path) -> None:
    topic = await place.topic()
    (tmp_path / "mine.py").write_text(
        f"from consumer import App\napp = App('mine')\n@app.handler({topic!r})\nasync def f(value: bytes) -> None: ...\n"
    )
    environment = {
        "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": place.kafka,
        "CONSUMER_POSTGRES_DSN": place.worker_dsn,
        "CONSUMER_LEDGER_RETENTION_HOURS": "24",
        "PYTHONPATH": str(tmp_path),
    }
    is_one_line(consumer(tmp_path, "run", "mine:app", **environment), topic, "168 hours", "169", "145 too few")
    is_one_line(
        consumer(tmp_path, "run", "mine:app", "--ledger-generation-hours", "48", **environment), "24 + 48 = 72 hours"
    )


async def test_records_without_usable_timestamps_are_noticed_and_applied_once(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Producers send seconds, zeros or no time, before and after a drop."""
    topic = await place.topic()
    app = app_of(topic)
    settings = place.settings(redis_url=None, ledger_retention_hours=200, ledger_clock_skew_hours=0)
    producer = AIOKafkaProducer(bootstrap_servers=place.kafka)
    await producer.start()

    async def send(prefix: str) -> None:
        for n, timestamp in enumerate((1_764_450_000, 0, 946_684_799_999)):
            id = f"{prefix}{n}"
            body = json.dumps({"id": id}).encode()
            await producer.send_and_wait(topic, body, headers=[("message-id", id.encode())], timestamp_ms=timestamp)

    try:
        await send("a")
        with caplog.at_level(logging.WARNING):
            await consume_all(app, settings)
        warnings = [record.getMessage() for record in caplog.records if "timestamp" in record.getMessage()]
        assert len(warnings) == 1 and "1764450000 is in seconds" in warnings[0]
        assert [row[0] for row in await place.effects()] == ["a0", "a1", "a2"]
        owner = await asyncpg.connect(place.dsn)
        try:  # everything that was applied is forgotten
            while await retention.act(owner, await generations.read_state(owner), RotateGeneration()) != "turned":
                pass
            while await retention.act(owner, await generations.read_state(owner), Forget(1, 0.0)) != "forgotten":
                pass
            await retention.act(owner, await generations.read_state(owner), Drop(1))
        finally:
            await owner.close()
        await send("b")  # new records: never silently lost
        await consume_all(app, settings)
        assert [row[0] for row in await place.effects()] == ["a0", "a1", "a2", "b0", "b1", "b2"]
        assert await place.reasons() == []
        await query(place.dsn, "update consumer.positions set next_offset = 0 returning 1")
        await consume_all(app, settings)  # delivered again: never applied twice
        assert [row[0] for row in await place.effects()] == ["a0", "a1", "a2", "b0", "b1", "b2"]
        assert await place.reasons() == ["too_old"] * 3
        texts = [row[0] for row in await query(place.dsn, 'select error from consumer.dead_letters order by "offset"')]
        assert "1764450000 is in seconds" in texts[0] and "timestamp 0 is not a time" in texts[1]
    finally:
        await producer.stop()
