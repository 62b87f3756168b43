"""The rules of a Scheduler, against a simple model.

The model keeps the whole log and the set of what is settled.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from consumer import App
from consumer.core.delivery import Batch, Delivery, size_of
from consumer.core.handler import Handler
from consumer.core.message import LogRecord, Partition
from consumer.core.ordering import Scheduler
from consumer.transaction.apply import apply_batch
from consumer.transaction.identify import identify
from consumer.transaction.result import LedgerIds

pytestmark = pytest.mark.unit

Order = Literal["key", "partition", "none"]
Name = tuple[str, int]  # of a delivery: handler and offset

P0, P1, Q0 = Partition("pay", 0), Partition("pay", 1), Partition("ship", 0)
LARGE = 1 << 30


@dataclass(frozen=True, slots=True)
class Rec:
    """A record, and the opening of its partition that received it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None = b""
    timestamp: int = 0
    headers: tuple[tuple[str, bytes | None], ...] = ()
    opening: int = 0


def handlers_of(orders: Mapping[str, Sequence[Order]]) -> dict[str, list[Handler]]:
    """One handler for each order named of each topic."""
    app = App("test")
    for topic, names in orders.items():
        for number, order in enumerate(names):

            async def handle(payload: bytes) -> None: ...

            app.handler(topic, name=f"{topic}-{number}-{order}", order=order)(handle)
    return app.by_topic()


def rec(offset: int, key: bytes | None = b"k", at: Partition = P0, size: int = 0) -> Rec:
    return Rec(at.topic, at.partition, offset, key, b"x" * size)


def lane_of(*orders: Order, parked_max: int = 1000, at: Sequence[Partition] = (P0,), position: int = 0) -> Scheduler:
    lane = Scheduler(handlers_of({partition.topic: orders or ("key",) for partition in at}), parked_max)
    for partition in at:
        lane.assign(partition, position)
    return lane


def take(lane: Scheduler, now: float = 0.0, messages_max: int = 1000, bytes_max: int = LARGE) -> Batch:
    batch = lane.take(now, messages_max, bytes_max)
    assert batch is not None
    return batch


def settle(lane: Scheduler, batch: Batch, parked: Mapping[Delivery, float] | None = None) -> None:
    parked = parked or {}
    lane.settle(batch, parked, lane.position_updates(batch, parked))


def offsets(batch: Batch) -> list[int]:
    return [delivery.record.offset for delivery in batch.deliveries]


# -- the machine --------------------------------------------------------------------------------------------------------

ORDERS: dict[str, Sequence[Order]] = {"pay": ("key", "partition"), "ship": ("none", "key")}
PARKED_MAX = 6
HANDLERS_MAX = 2
BATCH_MAX = 8
FLIGHTS_MAX = 3


@dataclass
class Model:
    """One partition: its log, and what was settled since it was opened."""

    log: list[Rec] = field(default_factory=list)
    end: int = 0  # of the log
    stored: int = 0  # the position as PostgreSQL has it
    openings: int = 0
    is_open: bool = False
    opened_at: int = 0
    received: int = 0
    taken: int = 0  # records below were taken
    settled: set[Name] = field(default_factory=set)


@dataclass
class Flight:
    """A batch in flight.

    A message behind a failed one of its unit of order is not run. That holds over all parts of a batch that was cut, too:
    `blocked` lives as long as the batch.
    """

    batch: Batch
    parts: list[Batch]  # the next one last
    blocked: set[Hashable] = field(default_factory=set)


flights = st.integers(0, FLIGHTS_MAX - 1)


class LaneMachine(RuleBasedStateMachine):
    """Takes and settles batches as transaction/apply.py does, several at a time."""

    @initialize()
    def begin(self) -> None:
        self.handlers = handlers_of(ORDERS)
        self.lane = Scheduler(self.handlers, PARKED_MAX)
        self.models = {partition: Model() for partition in (P0, P1, Q0)}
        self.now = 0.0
        self.flights: list[Flight] = []

    # What happens outside: the log grows, the client fetches, time passes.

    @rule(
        at=st.sampled_from([P0, P1, Q0]),
        keys=st.lists(st.sampled_from([b"a", b"b", b"c", None]), min_size=1, max_size=6),
        gaps=st.lists(st.integers(0, 3), min_size=6, max_size=6),
        size=st.integers(0, 40),
    )
    def the_log_grows(self, at: Partition, keys: list[bytes | None], gaps: list[int], size: int) -> None:
        model = self.models[at]
        for key, gap in zip(keys, gaps, strict=False):
            model.log.append(rec(model.end + gap, key, at, size))
            model.end += gap + 1

    @rule(at=st.sampled_from([P0, P1, Q0]), most=st.integers(1, 8), again=st.integers(0, 4))
    def records_are_fetched(self, at: Partition, most: int, again: int) -> None:
        """again: the client hands over records that it has handed over before."""
        model = self.models[at]
        wanted = [record for record in model.log if record.offset >= model.received - again][: most + again]
        opened = [
            Rec(record.topic, record.partition, record.offset, record.key, record.value, opening=model.openings)
            for record in wanted
        ]
        kept, size = self.lane.add(at, opened)
        new = [record for record in opened if record.offset >= model.received] if model.is_open else []
        assert (kept, size) == (len(new), sum(map(size_of, new)))
        if new:
            model.received = new[-1].offset + 1
        assert self.lane.received(at) == (model.received if model.is_open else None)

    @rule(at=st.sampled_from([P0, P1, Q0]), gap=st.integers(1, 4))
    def the_log_holds_nothing_more_for_a_while(self, at: Partition, gap: int) -> None:
        """Markers at the log's end move the position without a record."""
        model = self.models[at]
        if model.is_open and model.received >= model.end:
            model.end += gap
            self.lane.add(at, (), model.received, model.end)
            model.received = model.end
            assert self.lane.received(at) == model.received

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(at=st.sampled_from([P0, P1, Q0]))
    def what_is_fetched_of_a_full_partition_is_dropped(self, at: Partition) -> None:
        """What is dropped is fetched again, so that others have its room."""
        model = self.models[at]
        if model.is_open and self.lane.is_full(at) and (fetched := self.fetched(model)):
            self.lane.drop_fetched(at)
            model.received = fetched[0].offset
            assert self.lane.received(at) == model.received

    @staticmethod
    def fetched(model: Model) -> list[Rec]:
        return [record for record in model.log if model.taken <= record.offset < model.received]

    # Partitions come and go, between batches.

    @precondition(lambda self: not self.flights)
    @rule(at=st.sampled_from([P0, P1, Q0]), back=st.sampled_from([0, 0, 0, 3]))
    def a_partition_is_opened_or_opened_again(self, at: Partition, back: int) -> None:
        model = self.models[at]
        position = max(0, model.stored - back)  # back: positions rewound, for a replay
        self.lane.assign(at, position)
        model.is_open, model.openings = True, model.openings + 1
        model.opened_at = model.received = model.taken = model.stored = position
        model.settled.clear()

    @precondition(lambda self: not self.flights)
    @rule(at=st.sampled_from([P0, P1, Q0]))
    def a_partition_is_closed(self, at: Partition) -> None:
        self.lane.revoke(at)
        self.models[at].is_open = False
        assert self.lane.received(at) is None
        assert at not in self.lane.partitions

    @precondition(lambda self: self.flights)
    @rule(number=flights)
    def a_batch_in_flight_is_lost_and_its_partitions_are_read_again(self, number: int) -> None:
        flight = self.flights.pop(number % len(self.flights))
        for at in flight.batch.partition_epochs:
            self.a_partition_is_opened_or_opened_again(at, 0)
        self.lane.finish(flight.batch)

    # Batches go out and are settled, whole or in halves.

    @precondition(lambda self: len(self.flights) < FLIGHTS_MAX)
    @rule(
        messages_max=st.integers(1, 8),
        bytes_max=st.sampled_from([1, 50, LARGE]),
        partitions_max=st.sampled_from([1, 2, 3]),
    )
    def a_batch_is_taken(self, messages_max: int, bytes_max: int, partitions_max: int) -> None:
        due = self.lane.next_due()
        full = {partition for partition in self.models if self.lane.is_full(partition)}
        in_flight = {partition for flight in self.flights for partition in flight.batch.partition_epochs}
        buffered = {partition for partition, model in self.models.items() if model.is_open and self.fetched(model)}
        assert self.lane.has_more == bool(buffered - full - in_flight)
        batch = self.lane.take(self.now, messages_max, bytes_max, partitions_max)
        if due is not None and due <= self.now:
            assert batch is not None, "a retry that is due is held up"
        elif buffered - full - in_flight:
            assert batch is not None, "keys that did not fail are delayed"
        elif full - in_flight:
            assert batch is not None or due is not None, "nothing will ever make room"
        assert batch is None or not full & batch.ends.keys(), "records were taken although enough are parked"
        if batch is not None:
            assert len(batch.deliveries) < messages_max + HANDLERS_MAX
            touched = {*batch.ends, *(delivery.partition for delivery in batch.deliveries)}
            assert batch.partition_epochs.keys() == touched
            assert not touched & in_flight, "two batches at a time of one partition"
            self.check_what_was_taken(batch)
            self.lane.begin(batch)
            self.flights.append(Flight(batch, [batch]))

    def check_what_was_taken(self, batch: Batch) -> None:
        """Check that a delivery is taken unless its unit of order waits."""
        inside = {
            (delivery.handler.name, delivery.partition, delivery.record.offset): delivery
            for delivery in batch.deliveries
        }
        assert len(inside) == len(batch.deliveries)
        for at, end in batch.ends.items():
            model = self.models[at]
            waiting = {
                delivery.ordering_key()
                for delivery in self.unsettled(at, model.taken)
                if (delivery.handler.name, at, delivery.record.offset) not in inside
            }
            for record in model.log:
                if model.taken <= record.offset < end:
                    for handler in self.handlers[at.topic]:
                        is_free = Delivery(handler, record).ordering_key() not in waiting
                        assert ((handler.name, at, record.offset) in inside) == is_free
            model.taken = max(model.taken, end)
            assert model.taken <= model.received

    def unsettled(self, at: Partition, below: int) -> list[Delivery]:
        model = self.models[at]
        return [
            Delivery(handler, record)
            for record in model.log
            if model.opened_at <= record.offset < below
            for handler in self.handlers[at.topic]
            if (handler.name, record.offset) not in model.settled
        ]

    @precondition(lambda self: self.flights)
    @rule(number=flights)
    def a_part_is_cut_in_halves(self, number: int) -> None:
        parts = self.flights[number % len(self.flights)].parts
        if len(parts[-1].deliveries) < 2:
            return
        whole = parts.pop()
        head, tail = whole.split()
        assert head.deliveries + tail.deliveries == whole.deliveries
        assert head.deliveries and tail.deliveries
        parts += [tail, head]

    @precondition(lambda self: self.flights)
    @rule(number=flights, failing=st.sets(st.integers(0, 15), max_size=6), delay=st.sampled_from([0.0, 1.0, 5.0]))
    def a_part_is_settled(self, number: int, failing: set[int], delay: float) -> None:
        flight = self.flights[number % len(self.flights)]
        part = flight.parts.pop()
        parked: dict[Delivery, float] = {}
        for number, delivery in enumerate(part.deliveries):
            if delivery.ordering_key() in flight.blocked:
                parked[delivery] = self.now
            elif number in failing:
                parked[delivery] = self.now + delay
                flight.blocked.add(delivery.ordering_key())
            else:
                self.apply(delivery)
        moves = self.lane.position_updates(part, parked)
        assert moves == self.lane.position_updates(part, parked), "asking for the moves changes nothing"
        self.lane.settle(part, parked, moves)
        if not flight.parts:
            self.flights.remove(flight)
            self.lane.finish(flight.batch)
        for move in moves:
            assert move.previous == self.models[move.partition].stored
            assert move.next > move.previous, "a position goes back"
            self.models[move.partition].stored = move.next
        self.check_positions()

    def apply(self, delivery: Delivery) -> None:
        at, offset = delivery.partition, delivery.record.offset
        model = self.models[at]
        assert isinstance(delivery.record, Rec)
        assert model.is_open and delivery.record.opening == model.openings, "a delivery outlived its partition"
        assert (delivery.handler.name, offset) not in model.settled, "applied twice"
        earlier = [other for other in self.unsettled(at, offset) if other.ordering_key() == delivery.ordering_key()]
        assert not earlier, "applied before an earlier message of its unit"
        model.settled.add((delivery.handler.name, offset))

    def check_positions(self) -> None:
        """Check that positions are at the first unsettled message, or before it."""
        for at, model in self.models.items():
            if model.is_open:
                first = min(
                    (delivery.record.offset for delivery in self.unsettled(at, model.end)), default=model.received
                )
                first = min(first, model.received)
                last = max((r.offset for r in model.log if r.offset < first), default=-1)
                assert model.stored <= first, "a position passed a message that is not settled"
                assert model.stored >= max(model.opened_at, last + 1), "a position lags behind what is settled"
                assert self.lane.position(at) == model.stored

    @invariant()
    def what_is_parked_is_what_was_taken_and_is_not_settled(self) -> None:
        if hasattr(self, "lane") and not self.flights:
            opened = [(at, model) for at, model in self.models.items() if model.is_open]
            assert self.lane.delayed == sum(len(self.unsettled(at, model.taken)) for at, model in opened)
            assert self.lane.delayed == 0 or self.lane.next_due() is not None or self.lane.take(-1.0, 0, 0) is None

    @invariant()
    def what_is_parked_of_a_partition_is_bounded_beside_the_batch_that_failed(self) -> None:
        if hasattr(self, "lane") and not self.flights:
            for at, model in self.models.items():
                if model.is_open:
                    parked = len(self.unsettled(at, model.taken))
                    assert parked <= PARKED_MAX + BATCH_MAX + HANDLERS_MAX
                    assert self.lane.is_full(at) or parked < PARKED_MAX

    @invariant()
    def what_is_fetched_is_what_was_received_and_is_not_taken(self) -> None:
        if hasattr(self, "lane") and not self.flights:
            waiting = [
                record
                for model in self.models.values()
                if model.is_open
                for record in model.log
                if model.taken <= record.offset < model.received
            ]
            assert self.lane.fetched == (len(waiting), sum(map(size_of, waiting)))

    def teardown(self) -> None:
        """Without failures everything drains, and positions reach the log's end."""
        if not hasattr(self, "lane"):
            return
        for _ in range(10_000):
            while self.flights:
                self.a_part_is_settled(0, set(), 0)
            for at in self.models:
                self.records_are_fetched(at, 8, 0)
            self.a_batch_is_taken(5, LARGE, 3)
            if not self.flights:
                due = self.lane.next_due()
                if due is None:
                    break
                assert due > self.now
                self.now = due
        else:
            raise AssertionError("it never drains")
        assert self.lane.delayed == 0
        assert self.lane.fetched == (0, 0)
        assert not self.lane.in_flight
        for at, model in self.models.items():
            if model.is_open:
                assert not self.unsettled(at, model.end)
                assert self.lane.position(at) == model.received


LaneMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=40)
TestLaneAgainstItsModel = LaneMachine.TestCase


# -- cases worth a name -------------------------------------------------------------------------------------------------


def test_a_failed_message_holds_its_place_and_only_its_keys() -> None:
    lane = lane_of()
    lane.add(P0, [rec(0, b"a"), rec(1, b"b"), rec(2, b"a"), rec(3, None)])
    batch = take(lane)
    settle(lane, batch, {batch.deliveries[0]: 9.0, batch.deliveries[2]: 0.0})
    assert lane.position(P0) == 0
    lane.add(P0, [rec(4, b"a"), rec(5, b"b")])
    later = take(lane)
    assert offsets(later) == [5]
    settle(lane, later)
    assert lane.take(8.9, 100, LARGE) is None
    assert lane.next_due() == 9.0
    retry = take(lane, now=9.0)
    assert offsets(retry) == [0]
    settle(lane, retry)
    assert lane.position(P0) == 2
    rest = take(lane, now=9.0)
    assert offsets(rest) == [2, 4]
    settle(lane, rest)
    assert lane.position(P0) == 6
    assert lane.delayed == 0


def test_order_partition_makes_everything_wait_and_order_none_nothing() -> None:
    for order, expected in [("partition", []), ("none", [1])]:
        lane = lane_of(order)  # type: ignore[arg-type]
        lane.add(P0, [rec(0)])
        batch = take(lane)
        settle(lane, batch, {batch.deliveries[0]: 9.0})
        lane.add(P0, [rec(1)])
        assert offsets(take(lane)) == expected


def test_messages_without_a_key_are_ordered_with_nothing() -> None:
    lane = lane_of("key")
    lane.add(P0, [rec(0, None)])
    batch = take(lane)
    settle(lane, batch, {batch.deliveries[0]: 9.0})
    lane.add(P0, [rec(1, None)])
    assert offsets(take(lane)) == [1]


def test_an_empty_key_is_a_key() -> None:
    lane = lane_of("key")
    lane.add(P0, [rec(0, b"")])
    batch = take(lane)
    settle(lane, batch, {batch.deliveries[0]: 9.0})
    lane.add(P0, [rec(1, b"")])
    assert offsets(take(lane)) == []


def test_failing_handler_holds_the_position_but_no_other_handler() -> None:
    lane = lane_of("key", "key")
    lane.add(P0, [rec(0)])
    batch = take(lane)
    first, second = batch.deliveries
    settle(lane, batch, {first: 9.0})
    assert lane.position(P0) == 0
    lane.add(P0, [rec(1)])
    assert [(delivery.handler, delivery.record.offset) for delivery in take(lane).deliveries] == [(second.handler, 1)]


def test_the_same_key_of_two_partitions_is_two_units() -> None:
    lane = lane_of(at=(P0, P1))
    lane.add(P0, [rec(0)])
    batch = take(lane)
    settle(lane, batch, {batch.deliveries[0]: 9.0})
    lane.add(P1, [rec(0, at=P1)])
    assert [delivery.partition for delivery in take(lane).deliveries] == [P1]


def test_record_without_a_handler_still_moves_the_position() -> None:
    lane = lane_of(position=5)
    lane.add(P0, (), 5, 9)
    batch = take(lane)
    assert batch.deliveries == []
    settle(lane, batch)
    assert lane.position(P0) == 9


def test_an_end_never_goes_back_nor_over_what_was_not_read() -> None:
    lane = lane_of(position=5)
    lane.add(P0, (), 2, 3)
    assert lane.received(P0) == 5
    lane.add(P0, [rec(7)], 5, 9)
    assert lane.received(P0) == 9
    lane.add(P0, (), 12, 20)  # what lies between 9 and 12 is unknown
    assert lane.received(P0) == 9
    lane.add(P1, (), 0, 20)  # not open: not an error
    assert lane.received(P1) is None


def test_records_below_what_was_received_are_dropped() -> None:
    lane = lane_of(position=5)
    assert lane.add(P0, [rec(3), rec(4)]) == (0, 0)
    assert lane.add(P0, [rec(4), rec(5, size=7), rec(8, size=1)]) == (2, 8 + 2)  # and a key each
    assert lane.add(P0, [rec(8)]) == (0, 0)
    assert lane.add(P1, [rec(0, at=P1)]) == (0, 0)
    assert offsets(take(lane)) == [5, 8]


def test_batch_stays_within_its_limits_but_holds_at_least_one_message() -> None:
    lane = lane_of()
    lane.add(P0, [rec(n, size=10) for n in range(10)])
    for messages_max, bytes_max, expected in [(3, LARGE, [0, 1, 2]), (100, 20, [3, 4]), (100, 1, [5]), (1, LARGE, [6])]:
        batch = take(lane, messages_max=messages_max, bytes_max=bytes_max)
        assert offsets(batch) == expected
        settle(lane, batch)


def test_a_busy_partition_does_not_starve_another() -> None:
    lane = lane_of(at=(P0, P1))
    seen = set()
    for n in range(4):
        lane.add(P0, [rec(10 * n + m, None) for m in range(10)])
        lane.add(P1, [rec(10 * n + m, None, P1) for m in range(10)])
        batch = take(lane, messages_max=5)
        seen |= {delivery.partition for delivery in batch.deliveries}
        settle(lane, batch)
    assert seen == {P0, P1}


def test_opening_again_forgets_what_was_fetched_and_parked() -> None:
    lane = lane_of()
    lane.add(P0, [rec(0), rec(1, b"z")])
    batch = take(lane)
    settle(lane, batch, {batch.deliveries[0]: 1.0})
    lane.add(P0, [rec(2)])
    lane.assign(P0, 0)
    assert (lane.delayed, lane.fetched, lane.next_due(), lane.received(P0), lane.position(P0)) == (
        0,
        (0, 0),
        None,
        0,
        0,
    )
    assert lane.take(99, 100, LARGE) is None


def test_closing_one_partition_keeps_what_is_parked_of_another() -> None:
    lane = lane_of(at=(P0, P1))
    lane.add(P0, [rec(0)])
    lane.add(P1, [rec(0, at=P1)])
    batch = take(lane)
    settle(lane, batch, dict.fromkeys(batch.deliveries, 1.0))
    lane.revoke(P0)
    assert lane.delayed == 1
    assert [delivery.partition for delivery in take(lane, now=1.0).deliveries] == [P1]


def test_a_retry_keeps_its_place_when_it_fails_again() -> None:
    lane = lane_of()
    lane.add(P0, [rec(0), rec(1)])
    batch = take(lane)
    settle(lane, batch, {batch.deliveries[0]: 1.0, batch.deliveries[1]: 0.0})
    for attempt in range(1, 5):
        retry = take(lane, now=attempt)
        assert offsets(retry) == [0]
        settle(lane, retry, {retry.deliveries[0]: attempt + 1.0})
        assert lane.delayed == 2
    settle(lane, take(lane, now=9))
    assert offsets(take(lane, now=9)) == [1]


def test_full_partition_takes_nothing_new_while_its_retries_go_on() -> None:
    lane = lane_of(parked_max=2)
    lane.add(P0, [rec(0, b"a"), rec(1, b"b")])
    batch = take(lane)
    settle(lane, batch, dict.fromkeys(batch.deliveries, 5.0))
    lane.add(P0, [rec(2, b"c")])
    assert lane.take(0, 100, LARGE) is None
    retries = take(lane, now=5)
    assert offsets(retries) == [0, 1]  # of different units: together
    settle(lane, retries)
    assert offsets(take(lane, now=5)) == [2]


def test_a_full_partition_does_not_hold_up_another() -> None:
    lane = lane_of(parked_max=2, at=(P0, P1))
    lane.add(P0, [rec(n, b"%d" % n) for n in range(3)])
    batch = take(lane, messages_max=2)
    settle(lane, batch, dict.fromkeys(batch.deliveries, 5.0))
    lane.add(P1, [rec(0, at=P1)])
    assert (lane.is_full(P0), lane.is_full(P1)) == (True, False)
    lane.drop_fetched(P0)
    assert (lane.received(P0), lane.fetched[0]) == (2, 1)
    batch = take(lane)
    assert [delivery.partition for delivery in batch.deliveries] == [P1]
    settle(lane, batch)
    settle(lane, take(lane, now=5.0))
    assert not lane.is_full(P0)
    lane.add(P0, [rec(2, b"2")], 2, 3)
    assert offsets(take(lane)) == [2]


def test_waiting_messages_are_listed_with_those_behind_them() -> None:
    lane = lane_of()
    lane.add(P0, [rec(0), rec(1, b"z"), rec(2)])
    batch = take(lane)
    settle(lane, batch, {batch.deliveries[0]: 1.0, batch.deliveries[2]: 0.0})
    assert [(head.record.offset, count, frontier) for head, count, frontier in lane.waiting()] == [(0, 2, 3)]
    settle(lane, take(lane, now=1.0))
    assert lane.waiting() == []


def test_taking_parks_no_more_than_the_limit() -> None:
    lane = lane_of(parked_max=3)
    lane.add(P0, [rec(0)])
    batch = take(lane)
    settle(lane, batch, {batch.deliveries[0]: 9.0})
    lane.add(P0, [rec(n) for n in range(1, 500)])
    lane.take(0, 100, LARGE)
    assert lane.delayed <= 3


def test_the_first_half_of_a_batch_ends_below_everything_of_the_second() -> None:
    lane = lane_of("key", "none")
    lane.add(P0, [rec(0), rec(4), rec(9)])
    head, tail = take(lane).split()
    assert [(delivery.handler.order, delivery.record.offset) for delivery in head.deliveries] == [
        ("key", 0),
        ("none", 0),
        ("key", 4),
    ]
    settle(lane, head)
    assert lane.position(P0) == 4
    settle(lane, tail)
    assert lane.position(P0) == 10


def test_a_failure_in_the_second_half_queues_behind_one_of_the_first() -> None:
    lane = lane_of()
    lane.add(P0, [rec(0), rec(1)])
    head, tail = take(lane).split()
    settle(lane, head, {head.deliveries[0]: 1.0})
    settle(lane, tail, {tail.deliveries[0]: 0.0})  # it only waits: its own time does not count
    assert lane.delayed == 2
    assert lane.next_due() == 1.0
    settle(lane, take(lane, now=1.0))
    settle(lane, take(lane, now=1.0))
    assert (lane.delayed, lane.position(P0)) == (0, 2)


def test_batch_settled_after_its_partition_closed_leaves_nothing() -> None:
    lane = lane_of()
    lane.add(P0, [rec(0), rec(1)])
    batch = take(lane)
    moves = lane.position_updates(batch, {batch.deliveries[0]: 1.0, batch.deliveries[1]: 0.0})
    lane.revoke(P0)
    lane.settle(batch, {batch.deliveries[0]: 1.0, batch.deliveries[1]: 0.0}, moves)
    assert (lane.delayed, lane.next_due()) == (0, None)
    assert lane.take(99, 100, LARGE) is None


def test_batch_settled_after_a_reopening_does_not_touch_the_new_opening() -> None:
    lane = lane_of()
    lane.add(P0, [rec(0), rec(1, b"z")])
    batch = take(lane)
    moves = lane.position_updates(batch, {batch.deliveries[1]: 1.0})
    lane.assign(P0, 0)
    lane.settle(batch, {batch.deliveries[1]: 1.0}, moves)
    assert (lane.position(P0), lane.delayed, lane.next_due()) == (0, 0, None)
    lane.add(P0, [rec(0), rec(1, b"z")])
    again = take(lane)
    assert offsets(again) == [0, 1]
    assert [update.next for update in lane.position_updates(again, again.deliveries)] == [], (
        "nothing of it is settled yet"
    )


def test_closing_a_partition_keeps_the_counts_of_another_in_flight() -> None:
    lane = lane_of(at=(P0, P1))
    lane.add(P0, [rec(0), rec(1)])
    batch = take(lane)
    settle(lane, batch, {batch.deliveries[0]: 1.0, batch.deliveries[1]: 0.0})
    settle(lane, take(lane, now=1))
    behind = take(lane, now=1)
    assert offsets(behind) == [1]
    lane.revoke(P1)
    settle(lane, behind)
    assert lane.delayed == 0


async def test_second_half_of_a_batch_does_not_overtake_a_failed_first_half() -> None:
    """The worker cuts a batch whose fault is unknown.

    This runs apply_batch itself, with a session that stores nothing.
    """

    ran: list[int] = []
    app = App("test")

    @app.handler("pay", order="key")
    async def handle(payload: bytes) -> None:
        ran.append(len(payload))
        if len(payload) == 1 and ran.count(1) == 1:
            raise ValueError("the first attempt of the first message")

    for handler in app.handlers.values():
        handler.bind({})
    lane = Scheduler(app.by_topic(), 100)
    lane.assign(P0, 0)
    lane.add(P0, [rec(0, size=1), rec(1, size=2)])
    now = 0.0
    for _ in range(10):
        batch = lane.take(now, 100, LARGE)
        now += 1000
        if batch is None:
            continue  # not due yet
        identify(batch.deliveries)
        for part in batch.split() if len(batch.deliveries) > 1 else (batch,):
            done = await apply_batch(
                _Nowhere(),  # type: ignore[arg-type]
                LedgerIds("test", {"pay": 1}),
                lane,
                part,
                use_savepoints=False,
                random=lambda: 0.5,
                on_step=lambda _: None,
            )
            lane.settle(
                part, {delivery: now + delay for delivery, delay in done.delayed.items()}, done.position_updates
            )
    assert ran == [1, 1, 2]


class _Nowhere:
    """A Session, and its connection, that agrees to everything."""

    is_usable = True
    batch_seconds_max = 60.0

    bulk_writer: Any = None
    preparer: Any = None

    @property
    def connection(self) -> _Nowhere:
        return self

    handler_connection = connection

    def is_in_transaction(self) -> bool:
        return True

    has_forgotten = False

    async def claim(self, *_: Any) -> dict[Delivery, Any]:
        return {}

    async def nothing(self, *_: Any, **__: Any) -> None: ...

    begin = commit = rollback = release_claims = store_dead_letters = save_attempts = write_positions = execute = (
        nothing
    )


def test_retries_and_fresh_messages_take_turns() -> None:
    lane = lane_of()
    lane.add(P0, [rec(0, b"a")])
    batch = take(lane)
    settle(lane, batch, {batch.deliveries[0]: 0.0})
    turns = []
    for n in range(1, 7):
        lane.add(P0, [rec(n, b"b")])
        batch = take(lane)
        turns += offsets(batch)
        settle(lane, batch, {delivery: 0.0 for delivery in batch.deliveries if delivery.record.offset == 0})
    assert turns.count(0) >= 2
    assert [offset for offset in turns if offset] == list(range(1, len(turns) - turns.count(0) + 1))


def test_bytes_that_wait_are_bounded_too() -> None:
    lane = Scheduler(handlers_of({"pay": ("key",)}), 100, 1000)
    lane.assign(P0, 0)
    lane.add(P0, [rec(n, size=400_000) for n in range(10)])  # one partition may have 1 MB at least
    batch = take(lane, messages_max=1)
    settle(lane, batch, {batch.deliveries[0]: 9.0})
    while (pair := lane.take(0, 2, LARGE)) is not None:
        settle(lane, pair)
    assert lane.delayed <= 1 + 4


def test_batch_knows_that_its_partition_was_opened_again() -> None:
    lane = lane_of("key")
    lane.add(P0, [rec(0)])
    batch = take(lane)
    assert lane.is_current(batch)
    lane.assign(P0, 0)
    assert not lane.is_current(batch)
    lane.revoke(P0)
    assert not lane.is_current(batch)


def test_records_behind_a_gap_are_refused_because_the_gap_would_be_lost() -> None:
    lane = lane_of()
    lane.assign(P0, 10)
    assert lane.add(P0, [rec(12)], start=11, end=13) == (0, 0)
    assert lane.received(P0) == 10
    assert lane.add(P0, [rec(12)], start=10, end=20)[0] == 1
    assert lane.received(P0) == 20  # nothing else up to there was for this lane
    assert lane.add(P0, [rec(15), rec(21)], start=15, end=22)[0] == 1  # one of them it has had
    assert lane.received(P0) == 22
    batch = lane.take(0, 100, 1000)
    assert batch is not None
    assert [delivery.record.offset for delivery in batch.deliveries] == [12, 21]
    assert [update.next for update in lane.position_updates(batch, [])] == [22]


def test_batches_that_only_move_positions_are_rare_and_delay_no_message() -> None:
    lane = Scheduler(handlers_of({"pay": ("key",)}), 100, idle_batch_interval=5)
    lane.assign(P0, 0)

    def bare(now: float) -> bool:
        batch = lane.take(now, 100, 1000)
        if batch is not None:
            lane.settle(batch, {}, lane.position_updates(batch, []))
        return batch is not None

    lane.add(P0, (), 0, 10)
    assert bare(100)
    lane.add(P0, (), 10, 20)
    assert not bare(104)
    lane.add(P0, [rec(20)], 20, 30)
    assert bare(104)  # that one has a message
    lane.add(P0, (), 30, 40)
    assert not bare(104.9)
    assert bare(105)
    assert lane.position(P0) == 40


def test_size_of_a_record_counts_the_objects_of_its_headers() -> None:
    plain = LogRecord("t", 0, 0, 0, b"key", b"value", (), "")
    many = LogRecord("t", 0, 0, 0, b"key", b"value", tuple(("h", b"v") for _ in range(50)), "")
    assert size_of(plain) == 8
    assert size_of(many) > 50 * 147


def test_batch_is_in_order_of_topic_partition_and_offset() -> None:
    lane = lane_of("none", at=(P0, P1, Q0))
    for turn in range(3):
        for partition in (Q0, P0, P1):
            lane.add(partition, [rec(turn * 2 + n, at=partition) for n in range(2)])
        batch = lane.take(0.0, 100, LARGE)
        assert batch is not None
        places = [(delivery.partition, delivery.record.offset) for delivery in batch.deliveries]
        assert places == sorted(places) and len(places) == 6
        lane.settle(batch, {}, lane.position_updates(batch, ()))


def test_messages_that_waited_are_in_the_order_of_the_log_too() -> None:
    lane = lane_of("key", at=(P0, P1))
    for partition in (P1, P0):
        lane.add(partition, [rec(n, b"%d" % (n % 2), at=partition) for n in range(4)])
    batch = lane.take(0.0, 100, LARGE)
    assert batch is not None
    failed = {delivery: 1.0 for delivery in batch.deliveries if delivery.record.offset % 2}
    lane.settle(batch, failed, lane.position_updates(batch, failed))
    retries = lane.take(2.0, 100, LARGE)
    assert retries is not None and {delivery.record.offset for delivery in retries.deliveries} == {1}
    lane.settle(retries, {}, lane.position_updates(retries, ()))
    freed = lane.take(3.0, 100, LARGE)
    assert freed is not None
    places = [(delivery.partition, delivery.record.offset) for delivery in freed.deliveries]
    assert places == [(P0, 3), (P1, 3)]


# -- paused by an operator ---------------------------------------------------------------------------------------------


def test_paused_partition_is_not_taken_while_others_go_on() -> None:
    lane = lane_of(at=[P0, P1])
    lane.add(P0, [rec(0), rec(1)])
    lane.add(P1, [rec(0, at=P1)])
    lane.paused = frozenset({P0})
    batch = take(lane)
    assert [delivery.partition for delivery in batch.deliveries] == [P1] and batch.ends == {P1: 1}
    settle(lane, batch)
    assert lane.take(0.0, 9, 1 << 20) is None
    lane.paused = frozenset()
    assert offsets(take(lane)) == [0, 1]


def test_batch_in_flight_still_moves_a_paused_position() -> None:
    lane = lane_of()
    lane.add(P0, [rec(0), rec(1)])
    batch = take(lane)
    lane.paused = frozenset({P0})
    lane.drop_fetched(P0)
    settle(lane, batch)
    assert lane.position(P0) == 2


def test_retries_wait_for_the_end_of_a_pause_and_wake_no_lane() -> None:
    lane = lane_of(at=[P0, P1])
    lane.add(P0, [rec(0), rec(1)])
    batch = take(lane)
    settle(lane, batch, {delivery: 5.0 for delivery in batch.deliveries})
    lane.paused = frozenset({P0})
    assert lane.next_due() is None and lane.take(9.0, 9, 1 << 20) is None
    lane.paused = frozenset({P1})
    assert lane.next_due() == 5.0
    retried = take(lane, now=9.0)
    assert offsets(retried) == [0]
    settle(lane, retried)  # the one behind it is free now
    lane.paused = frozenset({P0})
    assert lane.take(9.0, 9, 1 << 20) is None
    lane.paused = frozenset()
    assert offsets(take(lane, now=9.0)) == [1]


def test_partition_in_flight_is_not_taken() -> None:
    lane = lane_of(at=(P0, P1))
    lane.add(P0, [rec(0), rec(1)])
    first = take(lane, messages_max=1)
    lane.begin(first)
    assert not lane.has_more and lane.take(0, 10, LARGE) is None
    lane.add(P1, [rec(0, at=P1)])
    assert lane.has_more
    other = take(lane)
    assert other.ends == {P1: 1}
    lane.begin(other)
    settle(lane, first)
    assert lane.take(0, 10, LARGE) is None, "the rest of a batch that was cut may follow"
    lane.finish(first)
    assert offsets(take(lane)) == [1]


def test_retries_wait_for_the_batch_of_their_partition_and_wake_no_lane() -> None:
    lane = lane_of(at=(P0, P1))
    lane.add(P0, [rec(0, b"a"), rec(1, b"a"), rec(2, b"b")])
    batch = take(lane)
    [failed, behind, _] = batch.deliveries
    settle(lane, batch, {failed: 5.0, behind: 5.0})
    lane.add(P0, [rec(3, b"c")])
    other = take(lane)
    lane.begin(other)
    assert lane.next_due() is None and lane.take(6.0, 10, LARGE) is None
    settle(lane, other)
    lane.finish(other)
    assert lane.next_due() == 5.0 and offsets(take(lane, now=6.0)) == [0]


def test_batch_of_few_partitions_leaves_the_others_to_another_lane() -> None:
    lane = lane_of(at=(P0, P1, Q0))
    for at in (P0, P1, Q0):
        lane.add(at, [rec(0, at=at)])
    first = lane.take(0, 10, LARGE, 2)
    assert first is not None and first.ends == {P0: 1, P1: 1}
    lane.begin(first)
    second = lane.take(0, 10, LARGE, 2)
    assert second is not None and second.ends == {Q0: 1}


def test_batch_of_retries_is_of_few_partitions_too() -> None:
    lane = lane_of(at=(P0, P1))
    for at in (P0, P1):
        lane.add(at, [rec(0, b"a", at), rec(1, b"b", at)])
    batch = take(lane)
    settle(lane, batch, dict.fromkeys(batch.deliveries, 1.0))
    retries = lane.take(2.0, 10, LARGE, 1)
    assert retries is not None and retries.partition_epochs.keys() == {P0} and len(retries.deliveries) == 2


def test_batch_of_one_partition_stays_current_when_another_is_opened_again() -> None:
    lane = lane_of(at=(P0, P1))
    lane.add(P0, [rec(0)])
    batch = take(lane)
    lane.assign(P1, 0)
    assert lane.is_current(batch)


def test_retries_that_fail_again_hold_up_no_other_partition() -> None:
    lane = lane_of("none", at=(P0, P1))
    for at in (P0, P1):
        lane.add(at, [rec(0, None, at)])
    batch = take(lane)
    settle(lane, batch, dict.fromkeys(batch.deliveries, 1.0))
    served: list[Partition] = []
    for _ in range(4):
        retries = lane.take(2.0, 10, LARGE, 1)
        assert retries is not None
        served += retries.partition_epochs
        settle(lane, retries, dict.fromkeys(retries.deliveries, 1.0))
    assert served == [P0, P1, P0, P1]
