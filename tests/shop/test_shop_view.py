"""What the page says, without any service.

Never that something was charged unless PostgreSQL says so; and amounts, orders.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumer.schemes.tokens import message_id_of
from handlers.shop.orders import TAPS_KEPT, Order, Orders, Sent, Switches, cents, money, switches
from handlers.shop.view import Seen, Services, describe, is_waiting

VISITOR = UUID(int=1)
PLACES = st.tuples(st.integers(0, 2), st.integers(0, 4))
SENT = st.lists(st.builds(Sent, st.just("m"), st.none() | PLACES, st.booleans(), st.just(UUID(int=2))), max_size=4)
SEEN = st.builds(
    Seen,
    state=st.sampled_from([None, "placed", "paid", "shipped"]),
    version=st.integers(1, 5),
    charges=st.dictionaries(PLACES, st.integers(1, 3), max_size=3),
    charged=st.integers(0, 10_000),
    positions=st.dictionaries(st.integers(0, 2), st.integers(0, 5)),
    letters=st.dictionaries(PLACES, st.sampled_from(["id_conflict", "failed"]), max_size=2),
)
SWITCHES = st.builds(Switches, st.booleans(), st.booleans(), st.booleans())
SERVICES = st.builds(Services, st.booleans(), st.booleans(), st.booleans(), st.sampled_from([0, 77]))
CAUSES = st.dictionaries(PLACES, st.sampled_from(["precheck", "ledger", "batch", "dead_letter", "new one"]))


@given(SENT, st.none() | SEEN, SWITCHES, SERVICES, CAUSES, st.booleans(), st.booleans())
@settings(derandomize=True, database=None, deadline=None, max_examples=150)
def test_order_is_called_charged_only_if_postgresql_holds_the_charge(
    sent: list[Sent], seen: Seen | None, layers: Switches, up: Services, causes: Any, token: bool, unchecked: bool
) -> None:
    order = Order(
        uuid4(), VISITOR, layers, "t" * 43 if token and layers.token else None, sent=sent, unchecked=unchecked
    )
    view = describe(order, seen, up, causes)
    verdict = view["verdict"]["text"]
    times = sum(seen.charges.values()) if seen is not None else 0
    assert verdict.startswith("Charged") == (times > 0)
    assert ("Charged once" in verdict) == (times == 1)
    assert (view["verdict"]["tone"] == "ok") == (times == 1)
    if times > 1:
        assert f"{times} times" in verdict and view["verdict"]["tone"] == "bad"
    if verdict.startswith("Accepted"):  # only what PostgreSQL has confirmed, or what is in Kafka
        assert any(tap.is_stored or tap.place is not None for tap in sent)
    if not up.kafka and up.worker and verdict.startswith("Accepted, not"):
        assert "the message waits in PostgreSQL" in verdict
    assert (view["charged"] is None) == (view["account"]["balance"] is None) == (seen is None)
    for message, tap in zip(view["messages"], sent, strict=True):
        says_charged = message["fate"].endswith(": charged") or "charged " in message["fate"]
        assert says_charged == (tap.place is not None and seen is not None and tap.place in seen.charges)
        settled = tap.place is not None and seen is not None and tap.place[1] < seen.positions.get(tap.place[0], 0)
        assert settled or "stopped" not in message["fate"]
    if seen is None and any(tap.is_stored or tap.place is not None for tap in sent):
        assert is_waiting(order, seen)


def test_taps_of_an_order_share_its_message_id_with_a_ledger() -> None:
    for greying in (True, False):
        for token in (None, "t" * 43):
            order = Order(uuid4(), VISITOR, Switches(greying, token is not None, True), token)
            assert order.message_id == (message_id_of(token) if token else str(order.id))
    assert Order(uuid4(), VISITOR, Switches(True, False, False)).message_id is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.01", 1),
        ("12.50", 1250),
        ("12.5", 1250),
        ("12", 1200),
        (12, 1200),
        (Decimal("0.29"), 29),
        ("1000.00", 100_000),
    ],
)
def test_amounts(text: object, expected: int) -> None:
    assert cents(text) == expected


def test_money() -> None:
    assert [money(amount) for amount in (0, 5, 123_456, -5, -123_450)] == [
        "0.00",
        "0.05",
        "1,234.56",
        "-0.05",
        "-1,234.50",
    ]


def test_an_order_is_its_visitors_and_the_oldest_are_forgotten() -> None:
    orders = Orders()
    first = Order(uuid4(), VISITOR, Switches())
    orders.add(first)
    assert orders.open(VISITOR) is orders.find(first.id, VISITOR) is first
    assert orders.find(first.id, uuid4()) is None and orders.open(uuid4()) is None
    second = Order(uuid4(), VISITOR, Switches(ledger=False))
    orders.add(second)
    assert orders.open(VISITOR) is second and orders.find(first.id, VISITOR) is first
    for _ in range(5000):
        orders.add(Order(uuid4(), uuid4(), Switches()))
    assert orders.find(second.id, VISITOR) is None and orders.open(VISITOR) is None
    assert len(orders._orders) == len(orders._open) == 2000


def test_taps_are_numbered_and_only_the_newest_are_kept() -> None:
    order = Order(uuid4(), VISITOR, Switches())
    numbers = [order.tap().number for _ in range(TAPS_KEPT + 5)]
    assert numbers == list(range(1, TAPS_KEPT + 6))
    assert [tap.number for tap in order.taps] == numbers[5:]


def test_switches_that_are_not_named_are_on() -> None:
    assert switches({}) == Switches(True, True, True)
    assert switches({"ledger": False}) == Switches(True, True, False)
    for wrong in ({"ledger": 0}, {"ledger": "off"}, {"ledgers": True}):
        with pytest.raises(ValueError, match="ledger"):
            switches(wrong)
