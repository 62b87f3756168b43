"""A further lane begins when others leave messages, or take long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from consumer.worker.lane_starts import PATIENCE_SECONDS, LaneStarts

pytestmark = pytest.mark.unit


@dataclass
class FakeTimer:
    seconds: float
    callback: Callable[[], None]
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


@dataclass
class FakeLane:
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Group:
    """Four lanes and their timers."""

    def __init__(self) -> None:
        self.timers: list[FakeTimer] = []
        self.lanes = [FakeLane() for _ in range(4)]
        self.starts = LaneStarts(self.call_later)
        self.starts.connect(self.lanes)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> FakeTimer:
        self.timers.append(FakeTimer(seconds, callback))
        return self.timers[-1]

    def woken(self) -> list[int]:
        """Return the lanes woken since the last time."""
        numbers = [number for number, lane in enumerate(self.lanes) if lane.wake.is_set()]
        for lane in self.lanes:
            lane.wake.clear()
        return numbers


@pytest.fixture
def group() -> Group:
    return Group()


def test_records_wake_the_first_lane_alone(group: Group) -> None:
    group.starts.wake()
    assert group.woken() == [0] and group.starts.may_begin


def test_lane_that_took_all_lets_no_other_begin_until_its_patience_ends(group: Group) -> None:
    group.starts.began(0, leaves_more=False)
    group.starts.wake()
    assert group.woken() == [] and not group.starts.may_begin
    [timer] = group.timers
    assert timer.seconds == PATIENCE_SECONDS
    timer.callback()
    assert group.woken() == [1] and group.starts.may_begin
    group.starts.wake()
    assert group.woken() == [1], "it may have found nothing before"


def test_lane_that_left_messages_wakes_another_at_once(group: Group) -> None:
    group.starts.began(0, leaves_more=True)
    assert group.woken() == [1] and group.starts.may_begin
    group.starts.began(1, leaves_more=True)
    group.starts.began(2, leaves_more=False)
    assert group.woken() == [2] and not group.starts.may_begin


def test_lane_that_ends_within_its_patience_stops_its_timer(group: Group) -> None:
    group.starts.began(0, leaves_more=False)
    group.starts.ended(0)
    assert group.timers[0].is_cancelled and group.starts.may_begin
    group.starts.wake()
    assert group.woken() == [0]


def test_the_last_lane_to_begin_decides_for_the_next(group: Group) -> None:
    group.starts.began(0, leaves_more=True)
    group.starts.began(1, leaves_more=False)
    group.woken()
    group.starts.ended(0)
    assert not group.starts.may_begin, "lane 1 may still take what waits when it ends"
    group.timers[1].callback()
    assert group.woken() == [0]


def test_records_wake_no_lane_when_all_are_at_work(group: Group) -> None:
    for number in range(4):
        group.starts.began(number, leaves_more=True)
    group.woken()
    group.starts.wake()
    assert group.woken() == []


def test_batches_are_of_a_share_of_the_partitions_while_they_take_long(group: Group) -> None:
    assert group.starts.partitions_max(10) == 3, "nothing is known yet"
    group.starts.began(0, leaves_more=False)
    group.starts.ended(0)
    assert group.starts.partitions_max(10) == 10
    group.starts.began(0, leaves_more=False)
    group.timers[1].callback()
    assert group.starts.partitions_max(10) == 3, "while it lasts"
    group.starts.ended(0)
    assert group.starts.partitions_max(10) == 3, "and after it"
    group.starts.began(0, leaves_more=False)
    group.timers[2].callback()
    group.starts.began(1, leaves_more=False)
    group.starts.ended(1)
    group.starts.ended(0)
    assert group.starts.partitions_max(10) == 3, "also if another was fast meanwhile"
    group.starts.began(0, leaves_more=True)
    group.starts.ended(0)
    assert group.starts.partitions_max(10) == 10
