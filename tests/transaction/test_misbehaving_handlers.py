"""Handlers that hang, block, leak or go around their Tx."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from harness import Place, Sent, consume_all, drained, letters, query, until, value, working
from payments_app import INSERT
from stored_state import effect_ids
from worker_app import SWALLOWS
from worker_service import Service, message

from consumer import App, Message, Retry, TransactionMisuse, Tx
from consumer.core.errors import Misconfigured, RegistrationError
from consumer.transaction import limits
from consumer.transaction.limits import HandlerUncancellable
from consumer.worker.restart_policy import EXIT_OUTGROWN, EXIT_STALLED
from consumer.worker.worker import Worker

TWICE = Retry(attempts=2, base=0.01, cap=0.01)
NAMES = [f"p{n:03}" for n in range(100)]
BAD = "p037"


def new_app() -> App:
    return App(f"misbehaving-{uuid.uuid4().hex[:8]}")


def sent(name: str, key: str | None = None) -> Sent:
    return Sent({"id": name}, id=name, key=key or name)


# -- that hang ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["before it wrote", "after it wrote", "batch", "batch after it wrote", "concurrent"])
async def test_a_call_that_hangs_is_ended_found_at_once_and_counted(place: Place, kind: str) -> None:
    """Its batch reaches the limit once per attempt, not once per half."""
    topic = await place.topic()
    app = new_app()
    hung: list[int] = []
    order: list[str] = []

    async def one(body: dict[str, str], tx: Tx) -> None:
        if "after" in kind:
            await tx.execute(INSERT, body["id"], 1, 1)
        else:
            tx.defer(INSERT, body["id"], 1, 1)

    async def hang() -> None:
        hung.append(1)
        await asyncio.Event().wait()

    if "batch" in kind:

        @app.handler(topic, batch=100, timeout=0.4, retry=TWICE, name="settle")
        async def many(bodies: list[dict[str, str]], tx: Tx) -> None:
            for body in bodies:
                await one(body, tx)
            if BAD in [body["id"] for body in bodies]:
                await hang()

    else:

        @app.handler(topic, timeout=0.4, retry=TWICE, concurrency=8 if kind == "concurrent" else 1)
        async def settle(body: dict[str, str], tx: Tx) -> None:
            await one(body, tx)
            if body["id"] == BAD:
                await hang()
            order.append(body["id"])

    # The next message has the key of the bad one: it waits behind it, in the end as a dead letter.
    await place.send(topic, *[sent(name, "same" if name in (BAD, "p038") else name) for name in NAMES])
    await consume_all(app, place.settings())
    assert await effect_ids(place) == [name for name in NAMES if name not in (BAD, "p038")]
    assert await place.reasons() == ["failed", "behind"]
    [letter] = [letter for letter in await letters(place.dsn) if letter["state"] == "dead"]
    assert (letter["attempts"], "HandlerTimeout" in letter["error"]) == (2, True)
    assert len(hung) == (3 if "batch" in kind else 2)  # a batch does not say whose fault it was: once for all of it


async def test_statement_that_takes_too_long_is_cancelled_and_not_counted(place: Place) -> None:
    """The message waits alone, since the database may be slow."""
    topic = await place.topic()
    app = new_app()
    runs: Counter[str] = Counter()

    @app.handler(topic, timeout=0.4, retry=Retry(attempts=1))
    async def settle(body: dict[str, str], tx: Tx) -> None:
        runs[body["id"]] += 1
        if body["id"] == BAD:
            await tx.execute("select pg_sleep(60)")
        await tx.execute(INSERT, body["id"], 1, 1)

    await place.send(topic, *map(sent, NAMES))
    async with working(app, place.settings()):

        async def others() -> bool:
            return len(await effect_ids(place)) == 99

        await until("the others", others)
        assert runs[BAD] == 1
        sleeping = "select count(*) from pg_stat_activity where query like '%pg_sleep(60)%' and state = 'active' and pid <> pg_backend_pid()"
        assert not await value(place.dsn, sleeping)
    assert await place.reasons() == []


async def test_a_handler_without_a_ledger_has_a_limit_too(place: Place) -> None:
    topic = await place.topic()
    app = new_app()
    seen: list[str] = []

    @app.handler(topic, timeout=0.3, idempotent=False, retry=TWICE)
    async def watch(body: dict[str, str]) -> None:
        if body["id"] == "bad":
            await asyncio.Event().wait()
        seen.append(body["id"])

    await place.send(topic, sent("a"), sent("bad"), sent("c"))
    await consume_all(app, place.settings())
    assert set(seen) == {"a", "c"}
    assert await place.reasons() == ["failed"]


async def test_a_limit_that_postgresql_would_not_wait_for_is_refused(place: Place) -> None:
    app = new_app()

    @app.handler("t", timeout=50)
    async def settle(body: bytes, tx: Tx) -> None: ...

    with pytest.raises(Misconfigured, match=r"at least 83, or the limit to at most 36"):
        Worker(app, place.settings())
    Worker(app, place.settings(postgres_idle_in_transaction_timeout_seconds=84))
    with pytest.raises(RegistrationError, match="timeout"):
        app.handler("t", name="other", timeout=-1)(settle)


async def test_an_order_to_stop_is_not_taken_for_a_handlers_limit(place: Place) -> None:
    topic = await place.topic()
    app = new_app()
    entered = asyncio.Event()

    @app.handler(topic, timeout=0)  # no limit
    async def settle(body: dict[str, str], tx: Tx) -> None:
        entered.set()
        await asyncio.Event().wait()

    await place.send(topic, sent("a"))
    async with working(app, place.settings(grace_seconds=1)):
        await asyncio.wait_for(entered.wait(), 30)
    assert await query(place.dsn, "select * from consumer.ledger") == []
    assert await place.reasons() == []


# -- that cannot be stopped -----------------------------------------------------------------------------------------


async def test_handler_that_swallows_its_cancellation_ends_the_worker(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(limits, "LAST_SECONDS", 0.3)
    topic = await place.topic()
    app = new_app()
    let_go, over = asyncio.Event(), asyncio.Event()
    late: list[BaseException] = []

    @app.handler(topic, timeout=0.3, retry=Retry(attempts=1))
    async def settle(body: dict[str, str], tx: Tx) -> None:
        tx.defer(INSERT, body["id"], 1, 1)
        await tx.fetchval("select 1")
        if body["id"] != "a":
            return
        while not let_go.is_set():
            try:
                await let_go.wait()
            except BaseException:
                continue
        try:
            await tx.execute(INSERT, "LATE", 1, 1)
        except BaseException as error:
            late.append(error)
        over.set()

    await place.send(topic, sent("before"), sent("a"), sent("after"))
    with pytest.raises(HandlerUncancellable, match="settle"):
        await asyncio.wait_for(Worker(app, place.settings()).run(), 30)
    open_ones = """select count(*) from pg_stat_activity where datname = current_database()
                   and xact_start is not null and pid <> pg_backend_pid()"""

    async def undone() -> bool:
        return not await value(place.dsn, open_ones)

    await until("PostgreSQL to have undone it", undone)
    let_go.set()
    await asyncio.wait_for(over.wait(), 10)
    assert [type(error) for error in late] == [TransactionMisuse]
    assert (await effect_ids(place), await place.reasons()) == (
        [],
        ["failed"],
    )  # its attempt was counted, for all to see
    await consume_all(app, place.settings())  # so the next process does not meet it
    assert (await effect_ids(place), await place.reasons()) == (["after", "before"], ["failed"])


async def test_the_process_of_such_a_handler_ends_and_another_takes_over(place: Place, tmp_path: Path) -> None:
    service = Service(place, await place.topic(), tmp_path, handler_timeout_seconds=0.3, restarts_max=1)
    async with service.run() as command:
        await service.opened(command, 1)
        await place.send(service.topic, message("m", SWALLOWS))

        async def replaced() -> bool:
            return len({event["worker_pid"] for event in command.events() if "worker_pid" in event}) == 2

        await until("another worker process", replaced, 60)
        assert [event["exit_code"] for event in command.events() if "exit_code" in event] == [EXIT_STALLED]


# -- that block -----------------------------------------------------------------------------------------------------


async def test_handler_that_blocks_the_event_loop_is_named_and_stays_a_member(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """As `time.sleep(12)` with the default session timeout, but shorter."""
    caplog.set_level(logging.INFO, "consumer")
    topic = await place.topic(2)
    app = new_app()
    woke: list[float] = []

    @app.handler(topic)
    async def settle(body: dict[str, str], tx: Tx) -> None:
        tx.defer(INSERT, body["id"], 1, 1)
        if body["id"] == "blocks":
            time.sleep(4)  # noqa: ASYNC251 - that is the trap
            woke.append(time.time())

    async with working(app, place.settings(kafka_session_timeout_seconds=10)) as worker:
        await place.send(topic, sent("a"))
        await drained(app, place.settings())
        before = (worker.source.member_id, worker.source.consumer._coordinator.generation)
        await place.send(topic, sent("blocks"), sent("b"))
        await drained(app, place.settings())
        assert (worker.source.member_id, worker.source.consumer._coordinator.generation) == before
    blocked = [
        record
        for record in caplog.records
        if record.getMessage() == "the event loop is blocked: a handler does not await"
    ]
    assert blocked
    fields: dict[str, Any] = blocked[0].__dict__["fields"]
    assert fields["handler"] == "settle"
    assert "test_misbehaving_handlers.py" in fields["at"]
    assert blocked[0].created < woke[0]
    revoked = [record.created for record in caplog.records if record.getMessage() == "partitions revoked"]
    assert all(moment > woke[0] for moment in revoked)
    assert await effect_ids(place) == ["a", "b", "blocks"]


# -- that leak ------------------------------------------------------------------------------------------------------


async def test_a_worker_that_has_grown_too_large_drains_and_is_replaced(place: Place, tmp_path: Path) -> None:
    service = Service(place, await place.topic(), tmp_path, worker_memory_max_mb=1, restarts_max=1)
    async with service.run() as command:
        assert await command.wait(60) == 1  # each is too large at once here: the supervisor does not go on for ever
        events = command.events()
        assert any("too much memory" in event["event"] for event in events)
        assert [event["exit_code"] for event in events if "exit_code" in event] == [EXIT_OUTGROWN] * 2
        assert sum(event["event"] == "worker stopped" for event in events) == 2  # in order, not killed


# -- that go around their Tx, or end its transaction ------------------------------------------------------------------


async def test_write_on_a_handlers_own_connection_happens_at_least_once(place: Place) -> None:
    """A failed run keeps its own write, and the next repeats it."""
    topic = await place.topic()
    app = new_app()
    failing = [1]

    @app.handler(topic, retry=TWICE)
    async def settle(body: dict[str, str], tx: Tx) -> None:
        own = await asyncpg.connect(place.dsn)
        try:
            await own.execute(INSERT, "own", 1, 1)
        finally:
            await own.close()
        await tx.execute(INSERT, "through tx", 1, 1)
        if failing:
            failing.pop()
            raise ConnectionError("something far away")

    await place.send(topic, sent("a"))
    await consume_all(app, place.settings())
    assert await effect_ids(place) == ["own", "own", "through tx"]


ENDING = [
    "do $$ begin commit; end $$",
    "do $$ begin rollback; end $$",
    "call ends_it()",
    "call outer_one()",
    "select calls_it()",
    "select 1; commit",
    "commit and chain",
    "/* a */ End -- b",
    "prepare transaction 'x'",
    "do $$ begin execute 'commit'; end $$",
    "rollback to savepoint consumer_1",
]


async def test_commit_by_a_handler_is_refused_in_every_way(place: Place) -> None:
    """Each is refused before it is sent, or by PostgreSQL.

    What was written before it is not stored, and no other message suffers.
    """
    await query(place.dsn, "create procedure ends_it() language plpgsql as $$ begin commit; end $$")
    await query(place.dsn, "create procedure outer_one() language plpgsql as $$ begin call ends_it(); end $$")
    await query(
        place.dsn,
        "create function calls_it() returns int language plpgsql as $$ begin call ends_it(); return 1; end $$",
    )
    topic = await place.topic()
    app = new_app()

    @app.handler(topic, retry=Retry(attempts=1))
    async def settle(message: Message[dict[str, str]], tx: Tx) -> None:
        name = message.value["id"]
        await tx.execute(INSERT, name, 1, 1)
        if name in ENDING:
            await tx.execute(name)

    good = [f"good {n:02}" for n in range(len(ENDING) + 1)]
    both = [name for pair in zip(good, ENDING, strict=False) for name in pair]
    await place.send(topic, *map(sent, [*both, good[-1]]))
    await consume_all(app, place.settings())
    assert await effect_ids(place) == good
    assert await place.reasons() == ["failed"] * len(ENDING)
