"""The order of a rebuild, against a naive sort of everything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer import App
from consumer.core.delivery import Delivery
from consumer.core.message import Partition
from consumer.core.outcome import DUPLICATE, Cause
from consumer.rebuild.applied_order import AppliedOrder, Backlog, OrderEntry, transactions

pytestmark = pytest.mark.unit

PARTITIONS = [Partition("orders", 0), Partition("orders", 1), Partition("payments", 0)]


@dataclass(frozen=True, slots=True)
class Rec:
    topic: str
    partition: int
    offset: int
    timestamp: int = 0
    key: bytes | None = None
    value: bytes | None = b"12345678"
    headers: tuple[Any, ...] = field(default=())


def _handler() -> Any:
    app = App("test")

    @app.handler("orders", name="handle")
    async def handle(payload: bytes) -> None: ...

    return app.handlers["handle"]


HANDLER = _handler()


def entry(partition: Partition, offset: int, applied_at: int | None, time: int = 0) -> OrderEntry:
    return OrderEntry(Delivery(HANDLER, Rec(*partition, offset)), applied_at, time)


def taken(order: AppliedOrder, most: int = 1000) -> list[tuple[int, int]]:
    """Place of the partition and offset of what is handed out now."""
    return [(PARTITIONS.index(entry.delivery.partition), entry.delivery.record.offset) for entry in order.take(most)]


def test_partitions_follow_the_time_of_their_transactions() -> None:
    order = AppliedOrder(PARTITIONS[:2])
    order.add(PARTITIONS[0], [entry(PARTITIONS[0], 0, 30), entry(PARTITIONS[0], 1, 50)], complete=True)
    assert taken(order) == []
    order.add(PARTITIONS[1], [entry(PARTITIONS[1], 0, 40), entry(PARTITIONS[1], 1, 60)], complete=True)
    assert taken(order) == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_one_transaction_goes_by_topic_partition_and_offset() -> None:
    order = AppliedOrder(PARTITIONS)
    for partition in reversed(PARTITIONS):
        order.add(partition, [entry(partition, n, 5) for n in range(2)], complete=True)
    assert taken(order) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_a_retry_runs_when_it_was_applied() -> None:
    order = AppliedOrder(PARTITIONS[:2])
    order.add(PARTITIONS[0], [entry(PARTITIONS[0], n, at) for n, at in enumerate([90, 10, 10, 20])], complete=True)
    order.add(PARTITIONS[1], [entry(PARTITIONS[1], 0, 50), entry(PARTITIONS[1], 1, 95)], complete=True)
    assert taken(order) == [(0, 1), (0, 2), (0, 3), (1, 0), (0, 0), (1, 1)]


def test_unknown_entries_keep_their_place_in_the_partition() -> None:
    order = AppliedOrder(PARTITIONS[:2])
    mine = [entry(PARTITIONS[0], 0, 10), entry(PARTITIONS[0], 1, None, 999), entry(PARTITIONS[0], 2, 20)]
    order.add(PARTITIONS[0], mine, complete=True)
    order.add(PARTITIONS[1], [entry(PARTITIONS[1], 0, None, 15), entry(PARTITIONS[1], 1, None, 3)], complete=True)
    assert taken(order) == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2)]


def test_a_shift_gives_the_other_order_of_what_overlapped() -> None:
    for shift, expected in ((0, [(0, 0), (1, 0)]), (50, [(0, 0), (1, 0)])):
        order = AppliedOrder(PARTITIONS[:2], shift=shift)
        order.add(PARTITIONS[0], [entry(PARTITIONS[0], 0, 10)], complete=True)
        order.add(PARTITIONS[1], [entry(PARTITIONS[1], 0, 20)], complete=True)
        assert taken(order) == expected
    order = AppliedOrder(PARTITIONS[:2], shift=50)
    order.add(PARTITIONS[0], [entry(PARTITIONS[0], 0, 20)], complete=True)
    order.add(PARTITIONS[1], [entry(PARTITIONS[1], 0, 10)], complete=True)
    assert taken(order) == [(0, 0), (1, 0)]


def keyed(offset: int, applied_at: int, key: bytes | None, time: int = 0) -> OrderEntry:
    return OrderEntry(Delivery(HANDLER, Rec("orders", 0, offset, key=key)), applied_at, time)


def test_times_that_contradict_the_offsets_of_a_key_are_counted() -> None:
    for keys, count in (((b"a", b"a", b"a"), 2), ((b"a", b"b", b"a"), 1), ((b"a", b"b", b"c"), 0), ((None,) * 3, 0)):
        order = AppliedOrder(PARTITIONS[:1])
        mine = [keyed(n, at, key) for n, (at, key) in enumerate(zip((30, 20, 10), keys, strict=True))]
        order.add(PARTITIONS[0], mine, complete=True)
        assert taken(order) == [(0, 2), (0, 1), (0, 0)]
        assert order.contradicted.total() == count


def test_by_records_a_partition_follows_its_offsets_and_others_their_times() -> None:
    order = AppliedOrder(PARTITIONS[:2], by_records=True)
    order.add(PARTITIONS[0], [keyed(0, 30, b"a", 5), keyed(1, 20, b"a", 7)], complete=True)
    order.add(PARTITIONS[1], [entry(PARTITIONS[1], 0, 1, 6), entry(PARTITIONS[1], 1, 99, 8)], complete=True)
    assert taken(order) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert not order.contradicted


times = st.integers(0, 30)


@given(
    st.lists(st.lists(times, max_size=25), min_size=3, max_size=3),
    st.integers(1, 30),
    st.randoms(use_true_random=False),
)
def test_known_times_are_sorted_however_they_come(ats: list[list[int]], most: int, chance: Any) -> None:
    """With full lookahead, the order is a sort's, in any chunking."""
    order = AppliedOrder(PARTITIONS, lookahead=25)
    rest = {p: [entry(p, n, at) for n, at in enumerate(those)] for p, those in zip(PARTITIONS, ats, strict=True)}
    expected = sorted((at, place, offset) for place, those in enumerate(ats) for offset, at in enumerate(those))
    offsets: list[tuple[int, int]] = []
    while rest:
        partition = chance.choice(sorted(rest))
        size = chance.randrange(1, 10)
        order.add(partition, rest[partition][:size], complete=len(rest[partition]) <= size)
        rest[partition] = rest[partition][size:]
        if not rest[partition]:
            del rest[partition]
        offsets += taken(order, most)
    while more := taken(order, most):
        offsets += more
    assert offsets == [(place, offset) for _, place, offset in expected]
    assert order.held == 0


def test_message_without_effect_splits_no_transaction() -> None:
    """Duplicates and dead letters have no time; unknown messages stand alone."""
    orders = PARTITIONS[0]
    entries = [entry(orders, offset, at) for offset, at in enumerate([None, 7, None, 7, 9, None, 9])]
    for place in (0, 2):
        entries[place].delivery.outcome = DUPLICATE[Cause.LEDGER]
    offsets = [[entry.delivery.record.offset for entry in part] for part in transactions(entries)]
    assert offsets == [[0], [1, 2, 3], [4], [5], [6]]


def test_backlog_hands_out_blocks_and_says_which_is_the_last() -> None:
    backlog, partition = Backlog(), PARTITIONS[0]
    assert not backlog.holds(partition)
    backlog.add(partition, [Rec(*partition, number) for number in range(5)], complete=False)
    taken, is_last = backlog.take(partition, 3)
    assert [record.offset for record in taken] == [0, 1, 2] and not is_last
    backlog.add(partition, [], complete=True)
    taken, is_last = backlog.take(partition, 3)
    assert [record.offset for record in taken] == [3, 4] and is_last
    assert not backlog.holds(partition)
    backlog.add(partition, [], complete=True)
    assert backlog.holds(partition) and backlog.take(partition, 3) == ([], True)


def test_retries_of_one_transaction_follow_their_actions() -> None:
    """A retry takes the dead letters of a key in order.

    One after the other, whatever their offsets and partitions.
    """
    order = AppliedOrder(PARTITIONS[:2])
    first = [
        entry(PARTITIONS[0], 0, 10),
        entry(PARTITIONS[0], 1, 30)._replace(action=9),
        entry(PARTITIONS[0], 2, 10),
        entry(PARTITIONS[0], 3, 30)._replace(action=4),
        entry(PARTITIONS[0], 4, 40),
    ]
    order.add(PARTITIONS[0], first, complete=True)
    order.add(PARTITIONS[1], [entry(PARTITIONS[1], 0, 30)._replace(action=7)], complete=True)
    assert taken(order) == [(0, 0), (0, 2), (0, 3), (1, 0), (0, 1), (0, 4)]
    assert not order.contradicted
