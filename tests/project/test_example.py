"""The example application does what its files say, on its own schema."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from harness import (
    ROOT,
    Place,
    Sent,
    as_worker,
    consume_all,
    counts,
    letters,
    migrated,
    new_topic,
    produce,
    query,
    settings_for,
    until,
    value,
)
from services import Kafka

from consumer import App, testing
from consumer.app_loader import load_app
from consumer.testing import STEPS, ExactlyOnce
from consumer.testing.trial import Trial
from handlers import app as billing
from handlers.application import Clicks

pytest_plugins = ["consumer.testing"]


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    """The App as its own group, because its topics are fixed."""
    monkeypatch.setattr(billing, "name", f"billing-{uuid.uuid4().hex[:8]}")
    yield billing


async def test_the_readmes_first_handler_works_as_it_stands(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    topic = await place.topic()
    (tmp_path / "readme_shop.py").write_text(code.replace('"payments"', repr(topic)))  # a topic of this test's own
    monkeypatch.chdir(tmp_path)
    app = load_app("readme_shop:app")
    await query(place.dsn, "create table payments (payment_id uuid, account int, amount int)")
    await query(place.dsn, "alter table accounts rename column id to account")
    _, sent = payment(7, 1000)
    await place.send(topic, sent, sent)
    await consume_all(app, place.settings())
    assert await query(place.dsn, "select account, amount from payments") == [(7, 1000)]
    assert await value(place.dsn, "select balance from accounts where account = 7") == 1000


async def test_documented_refund_waits_for_its_payment_or_is_rejected(
    exactly_once: ExactlyOnce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [ROOT / "README.md", ROOT / "docs" / "reference" / "handlers.md"]
    first, handlers = (page.read_text("utf-8").split("```python\n", 1)[1].split("```", 1)[0] for page in pages)
    refund = "class Refund" + handlers.split("class Refund", 1)[1].split('@app.handler("entries"', 1)[0]
    code = "\n".join([first, "from consumer import Message, Reject, Retry\n", refund])
    (tmp_path / "readme_refund.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    app = load_app("readme_refund:app")
    tables = """create table payments (payment_id uuid, account int, amount int);
                create table accounts (account int, balance int)"""
    shop = await exactly_once(app, schema=tables)
    payment_id = str(uuid.uuid4())
    early, more = (
        testing.Sent("refunds", {"refund_id": str(uuid.uuid4()), "payment_id": payment_id, "amount": amount})
        for amount in (300, 1300)
    )
    [waits] = await shop.deliver(early, retry=False)
    assert (waits.outcome, waits.attempts) == ("waiting", 1)
    paid = testing.Sent("payments", {"payment_id": payment_id, "account": 7, "amount": 1000}, id=payment_id)
    outcomes = {delivered.message: delivered.outcome for delivered in await shop.deliver(paid, more)}
    assert outcomes == {early: "applied", paid: "applied", more: "dead-lettered"}


def payment(account: int, amount: int) -> tuple[str, Sent]:
    name = str(uuid.uuid4())
    return name, Sent({"payment_id": name, "account": account, "amount": amount}, id=name, key=str(account))


async def without(kafka: Kafka, topics: Sequence[str]) -> None:
    """Delete topics, and wait until they are gone."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    try:
        await admin.delete_topics([topic for topic in topics if topic in await admin.list_topics()])

        async def gone() -> bool:
            return not set(topics) & set(await admin.list_topics())

        await until("the topics to be gone", gone)
    finally:
        await admin.close()


async def test_payments_refunds_bookings_and_clicks(kafka: Kafka, database: str, redis_url: str, renamed: App) -> None:
    await migrated(database, (ROOT / "handlers" / "schema.sql").read_text())
    await migrated(database, (ROOT / "handlers" / "schema.sql").read_text())  # it may run again
    await without(kafka, renamed.topics)  # of other tests
    for topic in renamed.topics:
        await new_topic(kafka.bootstrap_servers, 2, topic)
    first, sent = payment(7, 1000)
    _, other = payment(8, 500)
    await produce(kafka.bootstrap_servers, "payments", [sent, other, sent])

    def refund(of: str, amount: int, name: Any = None) -> Sent:
        return Sent({"refund_id": str(name or uuid.uuid4()), "payment_id": of, "amount": amount}, key=of)

    twice = uuid.uuid4()
    refunds = [refund(first, 300, twice), refund(first, 300, twice), refund(first, 900), refund(first, -1)]
    await produce(kafka.bootstrap_servers, "refunds", refunds)
    entries = [Sent({"entry_id": f"e{n % 900}", "account": n % 10, "amount": n % 900}) for n in range(1000)]
    await produce(kafka.bootstrap_servers, "ledger", entries)
    await produce(kafka.bootstrap_servers, "clicks", [Sent({"page": "/"}) for _ in range(10)])
    await consume_all(renamed, settings_for(as_worker(database), kafka.bootstrap_servers, redis_url))

    assert await query(database, "select account, balance from accounts where balance <> 0 order by 1") == [
        (7, 700),
        (8, 500),
    ]
    assert await value(database, "select count(*) from receipts") == 2
    assert await query(database, "select count(*), sum(amount) from bookings") == [(900, sum(range(900)))]
    assert sorted(letter["error"] for letter in await letters(database)) == [
        "a refund needs a positive amount",
        "more than is left of the payment",
    ]
    outcome_counts = await counts(renamed, database)
    assert outcome_counts["count"]["skipped"] == 10
    assert outcome_counts["audit"]["applied"] == 2 + 4 + 1000  # refunds and entries have no id of their own for it
    assert outcome_counts["book"]["applied"] == 900 and sum(outcome_counts["book"]["duplicates"].values()) == 100


# -- the same, without Kafka: other batches, crashes, and again --------------------------------------------------------

SCHEMA = "handlers/schema.sql"
PAID = [str(uuid.uuid5(uuid.NAMESPACE_OID, str(n))) for n in range(4)]


def sent() -> list[testing.Sent]:
    """Payments, refunds and bookings, with duplicates, one early and one too high."""

    def payment(n: int) -> testing.Sent:
        value = {"payment_id": PAID[n], "account": n % 3, "amount": 100 * (n + 1)}
        return testing.Sent("payments", value, id=PAID[n], key=n % 3, partition=n % 2)

    def refund(n: int, of: int, amount: int) -> testing.Sent:
        value = {"refund_id": uuid.UUID(int=n), "payment_id": PAID[of], "amount": amount}
        return testing.Sent("refunds", value, key=PAID[of])

    def entry(n: int) -> testing.Sent:
        return testing.Sent("ledger", {"entry_id": f"e{n}", "account": n, "amount": n}, partition=n % 2)

    return [
        payment(0), payment(1), payment(0), entry(1), entry(2), entry(1),
        refund(1, 0, 30), refund(1, 0, 30), refund(2, 1, 900), refund(3, 3, 50),
        payment(2), payment(3), payment(2), entry(3),
    ]  # fmt: skip


async def is_stored_once(trial: Trial) -> None:
    balances = await trial.fetch("select account, balance from accounts where balance <> 0 order by 1")
    assert [tuple(balance) for balance in balances] == [(0, 100 - 30 + 400 - 50), (1, 200), (2, 300)]
    assert await trial.fetchval("select count(*) from payments") == 4
    assert await trial.fetchval("select count(*) from receipts") == 4
    assert await trial.fetchval("select sum(amount) from bookings") == 1 + 2 + 3
    assert await trial.fetchval("select sum(refunded) from payments") == 80
    # A payment has an id; refunds and entries have one only for the handlers that read it from a field.
    assert await trial.fetchval("select count(*) from audit_trail") == 4 + 4 + 4
    [letter] = await trial.fetch("select error from consumer.dead_letters")
    assert letter[0] == "more than is left of the payment"


@pytest.mark.parametrize("batch", [1, 3, None])
async def test_each_effect_is_there_once_in_batches_of_any_size(exactly_once: ExactlyOnce, batch: int | None) -> None:
    trial = await exactly_once(billing, schema=SCHEMA)
    deliveries = await trial.deliver(*sent(), batch=batch)
    assert {delivered.outcome for delivered in deliveries} == {"applied", "duplicate", "dead-lettered"}
    await is_stored_once(trial)
    for size in (1, 5, None):
        again = await trial.deliver_again(batch=size)
        assert {delivered.outcome for delivered in again} == {"duplicate"}
        trial.assert_no_new_effects()
    trial.assert_nothing_outside()
    await is_stored_once(trial)


@pytest.mark.parametrize("step", STEPS)
async def test_each_effect_is_there_once_after_a_crash(exactly_once: ExactlyOnce, step: str) -> None:
    trial = await exactly_once(billing, schema=SCHEMA)
    await trial.deliver(*sent(), batch=4, crash_at=step)
    await trial.deliver(batch=3)
    await is_stored_once(trial)
    await trial.deliver_again()
    trial.assert_no_new_effects()


async def test_each_effect_is_there_once_after_crashes_everywhere(exactly_once: ExactlyOnce) -> None:
    trial = await exactly_once(billing, schema=SCHEMA)
    await trial.prove(*sent(), batch=2)
    await is_stored_once(trial)


async def test_an_early_refund_waits_for_its_payment(exactly_once: ExactlyOnce) -> None:
    trial = await exactly_once(billing, schema=SCHEMA)
    early = testing.Sent("refunds", {"refund_id": uuid.uuid4(), "payment_id": PAID[0], "amount": 5}, key=PAID[0])
    [audited, refunded] = await trial.deliver(early, retry=False)
    assert (refunded.outcome, audited.outcome) == ("waiting", "applied")
    assert refunded.error == "PaymentNotSettled: no payment of that id yet"
    deliveries = await trial.deliver(sent()[0])
    assert {delivered.handler for delivered in deliveries if delivered.outcome == "applied"} == {
        "refund",
        "audit",
        "settle",
        "receipts",
    }
    assert await trial.fetchval("select balance from accounts where account = 0") == 95


async def test_clicks_are_counted_at_least_once(exactly_once: ExactlyOnce) -> None:
    clicks = Clicks()
    trial = await exactly_once(billing, schema=SCHEMA, resources={"clicks": clicks})
    looked = [testing.Sent("clicks", {"page": page}) for page in ("/", "/", "/help")]
    assert {delivered.outcome for delivered in await trial.deliver(*looked)} == {"skipped"}
    assert clicks.pages == {"/": 2, "/help": 1}
    await trial.deliver_again()
    assert clicks.pages == {"/": 4, "/help": 2}, "an opt-out is called again"
    [unread] = await trial.deliver(testing.Sent("clicks", {"site": "/"}))
    assert (unread.outcome, unread.cause) == ("dead-lettered", "unreadable")
