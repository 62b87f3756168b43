"""The example application does what its files say, on its own schema."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import (
    ROOT,
    Place,
    Sent,
    consume_all,
    counts,
    letters,
    migrated,
    new_topic,
    produce,
    query,
    settings_for,
    value,
)
from services import Kafka

from consumer import App
from consumer.loading import load_app
from handlers import app as billing


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    """The app as a group of its own, since its topics have fixed names and Kafka is shared by all tests."""
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


def payment(account: int, amount: int) -> tuple[str, Sent]:
    name = str(uuid.uuid4())
    return name, Sent({"payment_id": name, "account": account, "amount": amount}, id=name, key=str(account))


async def test_payments_refunds_bookings_and_clicks(kafka: Kafka, database: str, redis_url: str, renamed: App) -> None:
    await migrated(database, (ROOT / "handlers" / "schema.sql").read_text())
    await migrated(database, (ROOT / "handlers" / "schema.sql").read_text())  # it may run again
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
    await consume_all(renamed, settings_for(database, kafka.bootstrap_servers, redis_url))

    assert await query(database, "select account, balance from accounts where balance <> 0 order by 1") == [
        (7, 700),
        (8, 500),
    ]
    assert await value(database, "select count(*) from receipts") == 2
    assert await query(database, "select count(*), sum(amount) from bookings") == [(900, sum(range(900)))]
    assert sorted(each["error"] for each in await letters(database)) == [
        "a refund needs a positive amount",
        "more than is left of the payment",
    ]
    found = await counts(renamed, database)
    assert found["count"]["skipped"] == 10
    assert found["audit"]["applied"] == 2 + 4 + 1000  # refunds and entries have no id of their own for it
    assert found["book"]["applied"] == 900 and sum(found["book"]["duplicates"].values()) == 100
