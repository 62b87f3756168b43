"""What a pause of an operator covers."""

from __future__ import annotations

import pytest

from consumer.core.message import Partition
from consumer.core.pauses import PauseOrder, pause_of, paused_among

pytestmark = pytest.mark.unit

P0, P1, Q0 = Partition("pay", 0), Partition("pay", 1), Partition("ship", 0)


def order(topic: str | None = None, partition: int | None = None) -> PauseOrder:
    return PauseOrder(topic, partition, "ann", "why", 0.0)


@pytest.mark.parametrize(
    ("orders", "paused"),
    [
        ([], set()),
        ([order()], {P0, P1, Q0}),
        ([order("pay")], {P0, P1}),
        ([order("pay", 1), order("ship", 1)], {P1}),
        ([order("pay", 0), order("ship")], {P0, Q0}),
    ],
    ids=["none", "the App", "a topic", "a partition", "several"],
)
def test_pause_is_of_an_app_a_topic_or_a_partition(orders: list[PauseOrder], paused: set[object]) -> None:
    assert paused_among(orders, [P0, P1, Q0]) == paused


def test_status_names_the_widest_pause() -> None:
    assert pause_of([order("pay", 0), order("pay"), order("ship")], P0) == order("pay")
    assert pause_of([order("pay", 0), order()], P0) == order()
    assert pause_of([order("pay", 1)], P0) is None
