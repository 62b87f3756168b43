"""The schemes inside handlers, on a real worker.

What is not the message's fault costs no attempt.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any, Literal

import asyncpg
import pytest
from harness import Place, Sent, consume_all, counts, drained, query, until, value, working
from redis.asyncio import Redis

from consumer import App, Message, Retry, RunAgain, Tx
from consumer.core.delivery import Delivery
from consumer.core.message import LogRecord
from consumer.core.outcome import RetryLater
from consumer.local_servers import Valkey
from consumer.schemes.lock import LateWriter, Lock, check_fence
from consumer.schemes.states import Moved, StateMachine, TooLate
from consumer.schemes.tokens import Fresh, Tokens, Unknown
from consumer.schemes.unique import insert_once
from consumer.schemes.versioned import update_versioned
from consumer.transaction.errors import facts_of
from consumer.transaction.isolate import decide

ONE_ATTEMPT = Retry(attempts=1, base=0.02, cap=0.1)  # any attempt that counted would be the last
ORDERS = StateMachine("orders", "status", {"new": {"paid"}, "paid": {"shipped"}, "shipped": ()})
TABLES = """
create table orders (id int primary key, status text not null, version bigint not null default 0, note text);
insert into orders (id, status) select n, 'new' from generate_series(1, 9) n;
create table payments (number text primary key, amount int);
create table fences (name text primary key, number bigint not null)
"""


@pytest.fixture
async def shop(place: Place) -> Place:
    connection = await asyncpg.connect(place.dsn)
    await connection.execute(TABLES)
    await connection.close()
    return place


def new_app() -> App:
    return App(f"app-{uuid.uuid4().hex[:8]}")


async def status(place: Place, id: int = 1) -> str:
    return str(await value(place.dsn, "select status from orders where id = $1", id))


async def outcomes(app: App, place: Place, handler: str) -> tuple[int, int]:
    outcome_counts = (await counts(app, place.dsn))[handler]
    return outcome_counts["applied"], outcome_counts["dead_lettered"]


# -- an optimistic lock ---------------------------------------------------------------------------------------------------


async def test_stale_runs_again_with_a_fresh_read_and_costs_no_attempt(shop: Place) -> None:
    topic, app, reads = await shop.topic(), new_app(), []

    @app.handler(topic, retry=ONE_ATTEMPT)
    async def note(body: dict[str, Any], tx: Tx) -> None:
        version = await tx.fetchval("select version from orders where id = 1")
        reads.append(version)
        if body["n"] == 1 and len(reads) <= 6:  # another is first, again and again
            await query(shop.dsn, "update orders set version = version + 1 where id = 1")
        key = {"id": body["n"]}
        await update_versioned(tx, "orders", key, expected=version if body["n"] == 1 else 0, set={"note": "seen"})

    await shop.send(topic, *[Sent({"n": n}, id=str(n), key=str(n)) for n in (2, 1, 3)])  # with neighbours in its batch
    await consume_all(app, shop.settings())
    assert await outcomes(app, shop, "note") == (3, 0)
    noted = await query(shop.dsn, "select id, version from orders where note = 'seen' order by id")
    assert noted == [(1, reads[-1] + 1), (2, 1), (3, 1)]
    assert reads[-1] >= 2


async def test_hot_row_in_two_workers_loses_no_update_and_no_message(shop: Place) -> None:
    topic, app = await shop.topic(2), new_app()

    @app.handler(topic, retry=ONE_ATTEMPT)
    async def count(body: dict[str, Any], tx: Tx) -> None:
        row = await tx.fetchrow("select version, coalesce(note, '0')::int as n from orders where id = 1")
        await update_versioned(tx, "orders", {"id": 1}, expected=row["version"], set={"note": str(row["n"] + 1)})

    await shop.send(topic, *[Sent({"n": n}, id=str(n), key=str(n), partition=n % 2) for n in range(40)])
    async with working(app, shop.settings()):
        await consume_all(app, shop.settings())
    assert await value(shop.dsn, "select note from orders where id = 1") == "40"
    assert await outcomes(app, shop, "count") == (40, 0)


# -- a state machine ------------------------------------------------------------------------------------------------------


async def test_an_early_event_is_held_until_its_time_and_costs_no_attempt(shop: Place) -> None:
    topics, app, tries = [await shop.topic(), await shop.topic()], new_app(), 0

    @app.handler(topics[0], retry=ONE_ATTEMPT)
    async def shipped(body: dict[str, Any], tx: Tx) -> None:
        nonlocal tries
        tries += 1
        assert await ORDERS.move(tx, body["n"], "shipped") is Moved.NOW

    @app.handler(topics[1], retry=ONE_ATTEMPT)
    async def paid(body: dict[str, Any], tx: Tx) -> None:
        assert await ORDERS.move(tx, body["n"], "paid") is Moved.NOW

    async with working(app, shop.settings()):
        await shop.send(topics[0], Sent({"n": 1}, id="s", key="1"))

        async def held() -> bool:
            return tries > 5

        await until("the early event to have been tried often", held)
        assert await status(shop) == "new"
        await shop.send(topics[1], Sent({"n": 1}, id="p", key="1"))
        await drained(app, shop.settings())
    assert await status(shop) == "shipped"
    assert await outcomes(app, shop, "shipped") == (1, 0)


async def test_limit_early_event_blocks_the_one_it_waits_for_in_one_order(
    shop: Place,
) -> None:
    tries = {"shipped": 0, "paid": 0}

    def app_of(topic: str, order: Literal["key", "none"]) -> App:
        app = new_app()

        @app.handler(topic, name="event", retry=ONE_ATTEMPT, order=order)
        async def event(body: dict[str, Any], tx: Tx) -> None:
            tries[body["to"]] += 1
            await ORDERS.move(tx, 1, body["to"])

        return app

    early = [Sent({"to": to}, id=to, key="1") for to in ("shipped", "paid")]
    topic = await shop.topic()
    await shop.send(topic, *early)

    async def tried_often() -> bool:
        return tries["shipped"] > 8

    async with working(app_of(topic, "key"), shop.settings()):
        await until("the early event to have been tried often", tried_often)
        assert (await status(shop), tries["paid"]) == ("new", 0)  # for ever
    app = app_of(topic, "none")
    await consume_all(app, shop.settings())
    assert await status(shop) == "shipped"
    assert await outcomes(app, shop, "event") == (2, 0)


async def test_a_hold_ends_where_the_handler_says_by_the_messages_age(shop: Place) -> None:
    topic, app = await shop.topic(), new_app()

    @app.handler(topic, retry=ONE_ATTEMPT)
    async def shipped(message: Message[dict[str, Any]], tx: Tx) -> None:
        age_seconds = time.time() - message.timestamp / 1000
        await ORDERS.move(tx, message.value["n"], "shipped", early="hold" if age_seconds < 1 else "reject")

    await shop.send(topic, Sent({"n": 1}, id="s", key="1"))
    await consume_all(app, shop.settings())
    assert await shop.reasons() == ["rejected"]


async def test_late_and_illegal_events_are_dead_letters_at_once(shop: Place) -> None:
    topic, app, tries = await shop.topic(), new_app(), 0

    @app.handler(topic)
    async def event(body: dict[str, Any], tx: Tx) -> None:
        nonlocal tries
        tries += 1
        try:
            await ORDERS.move(tx, body["n"], body["to"], early="reject")
        except TooLate:
            if body["n"] == 1:
                return
            raise

    for id in (1, 2):
        await query(shop.dsn, "update orders set status = 'shipped' where id = $1", id)
    await shop.send(
        topic, *[Sent({"n": n, "to": to}, id=f"{n}{to}") for n, to in ((1, "paid"), (2, "paid"), (3, "shipped"))]
    )
    await consume_all(app, shop.settings())
    assert await shop.reasons() == ["rejected", "rejected"]
    assert [await status(shop, id) for id in (1, 2, 3)] == ["shipped", "shipped", "new"]
    assert (await outcomes(app, shop, "event"))[0] == 1


# -- a business key, and a fence ------------------------------------------------------------------------------------------


async def test_a_business_key_stops_what_comes_under_two_message_ids(shop: Place) -> None:
    topic, app = await shop.topic(), new_app()

    @app.handler(topic)
    async def pay(body: dict[str, Any], tx: Tx) -> None:
        if await insert_once(tx, "payments", {"number": body["number"], "amount": 5}, conflict="number"):
            tx.defer("update accounts set balance = balance + 5 where id = 1")

    await shop.send(
        topic, *[Sent({"number": "A7"}, id=str(n)) for n in range(3)]
    )  # the producer made a new id for each try
    await consume_all(app, shop.settings())
    assert await value(shop.dsn, "select balance from accounts where id = 1") == 5
    assert await outcomes(app, shop, "pay") == (3, 0)  # the ledger saw three messages, and could see no more


async def test_late_writer_in_a_handler_writes_nothing_and_locks_again(shop: Place, own_valkey: Valkey) -> None:
    topic, app = await shop.topic(), new_app()
    numbers: list[int] = []

    async with Redis.from_url(own_valkey.url) as redis:

        @app.handler(topic, retry=ONE_ATTEMPT)
        async def close(body: dict[str, Any], tx: Tx) -> None:
            async with Lock(redis, "books", 30, wait_seconds=5) as lock:
                if not numbers:  # paused here, while another takes the lock and writes
                    await redis.delete("consumer:lock:{books}")
                    async with Lock(redis, "books", 30) as other:
                        await query(shop.dsn, "insert into fences values ('books', $1)", other.number)
                    await redis.set("consumer:lock:{books}", lock._token)  # so that only the fence can know
                numbers.append(lock.number)
                tx.defer("insert into effects values ('closed', 1, 1)")
                await check_fence(tx, "fences", "books", lock.number)

        await shop.send(topic, Sent({}, id="c"))
        await consume_all(app, shop.settings())
    assert len(numbers) >= 2
    assert len(await shop.effects()) == 1
    assert await outcomes(app, shop, "close") == (1, 0)
    assert issubclass(LateWriter, Exception)


# -- a token before Kafka, and the ledger behind it -----------------------------------------------------------------------


def paying(topic: str) -> App:
    app = new_app()

    @app.handler(topic)
    async def pay(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into effects values ('paid', 1, $1)", body["amount"])

    return app


async def tap(shop: Place, topic: str, tokens: Tokens, token: str) -> object:
    """Redeem and publish, as a web application does.

    Under the message id that the token becomes.
    """
    answer = await tokens.redeem(token, "alice")
    if isinstance(answer, Fresh):
        await shop.send(topic, Sent({"amount": 5}, id=answer.message_id))
    return answer


async def test_redis_flushed_between_two_taps_does_not_double_the_payment(shop: Place, own_valkey: Valkey) -> None:
    topic = await shop.topic()
    app = paying(topic)
    async with Redis.from_url(own_valkey.url) as redis:
        tokens = Tokens(redis)
        token = await tokens.issue("alice", 60)
        first = await tap(shop, topic, tokens, token)
        assert isinstance(first, Fresh)
        await redis.flushall()
        assert await tap(shop, topic, tokens, token) == Unknown()
        # A client that retries under the id that it was given is let through, and the ledger knows it.
        await shop.send(topic, Sent({"amount": 5}, id=first.message_id))
        await consume_all(app, shop.settings(redis_url=own_valkey.url))
    assert len(await shop.effects()) == 1
    assert (await counts(app, shop.dsn))["pay"]["applied"] == 1


async def test_ledger_stops_the_second_tap_after_a_failover_forgot_the_first(shop: Place, own_valkey: Valkey) -> None:
    topic = await shop.topic()
    app = paying(topic)
    async with Redis.from_url(own_valkey.url) as redis:
        tokens = Tokens(redis)
        token = await tokens.issue("alice", 60)
        [key] = [key_name async for key_name in redis.scan_iter(match="consumer:token:*")]
        replica = await redis.dump(key)
        assert replica is not None
        taps = [await tap(shop, topic, tokens, token)]
        await consume_all(app, shop.settings(redis_url=None))
        await redis.restore(key, 60_000, replica, replace=True)  # promoted without the first tap
        taps += await asyncio.gather(*[tap(shop, topic, tokens, token) for _ in range(5)])
        await consume_all(app, shop.settings(redis_url=None))
    assert [type(tap) for tap in taps].count(Fresh) == 2
    assert len(await shop.effects()) == 1
    outcome_counts = (await counts(app, shop.dsn))["pay"]
    assert (outcome_counts["applied"], outcome_counts["duplicates"]["ledger"]) == (1, 1)


async def test_limit_after_a_flush_a_new_token_is_a_new_payment(shop: Place, own_valkey: Valkey) -> None:
    """A business key (`insert_once`) recognizes it; token and ledger cannot.

    They cannot know that a person meant the same payment.
    """
    topic = await shop.topic()
    app = paying(topic)
    async with Redis.from_url(own_valkey.url) as redis:
        tokens = Tokens(redis)
        for _ in range(2):
            await tap(shop, topic, tokens, await tokens.issue("alice", 60))
            await redis.flushall()
    await consume_all(app, shop.settings(redis_url=None))
    assert len(await shop.effects()) == 2


@pytest.mark.parametrize(("base", "pauses"), [(0.2, [0.2, 0.4, 0.8, 1.0, 1.0]), (0.0, [0.05] * 5)])
def test_the_pauses_of_what_is_run_again_grow_and_never_vanish(base: float, pauses: list[float]) -> None:
    app = App("again")

    @app.handler("t", retry=Retry(attempts=1, base=base, cap=1.0))
    async def handle(body: bytes, tx: Tx) -> None: ...

    delivery = Delivery(app.handlers["handle"], LogRecord("t", 0, 0, 0, None, b"", ()))
    decisions = [decide(delivery, facts_of(RunAgain("not yet")), lambda: 1.0) for _ in pauses]
    delayed = [(outcome.delay_seconds, tries) for outcome, tries in decisions if isinstance(outcome, RetryLater)]
    assert delayed == [(pause, 0) for pause in pauses]
