from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.message import Partition
from consumer.worker.watchdog import Watchdog

pytestmark = pytest.mark.unit

A, B = Partition("t", 0), Partition("t", 1)
TIMES = st.lists(st.floats(0, 1000), min_size=1, max_size=20).map(sorted)


@given(TIMES)
def test_partition_that_stands_still_is_stalled_since_it_was_first_seen(times: list[float]) -> None:
    watchdog = Watchdog()
    for now in times:
        assert watchdog.fetching_stalled_seconds(now, {A: 5}, {A: 9}) == now - times[0]


@given(TIMES)
def test_a_partition_that_moves_is_not_stalled(times: list[float]) -> None:
    watchdog = Watchdog()
    for offset, now in enumerate(times):
        assert watchdog.fetching_stalled_seconds(now, {A: offset}, {A: 1000}) == 0


@given(TIMES)
def test_a_partition_at_its_end_is_idle_and_not_stalled(times: list[float]) -> None:
    watchdog = Watchdog()
    for now in times:
        assert watchdog.fetching_stalled_seconds(now, {A: 9}, {A: 9}) == 0


def test_the_time_spent_idle_does_not_count_once_there_is_something() -> None:
    watchdog = Watchdog()
    watchdog.fetching_stalled_seconds(0, {A: 9}, {A: 9})
    watchdog.fetching_stalled_seconds(100, {A: 9}, {A: 9})
    assert watchdog.fetching_stalled_seconds(101, {A: 9}, {A: 10}) == 1


def test_the_longest_stall_counts() -> None:
    watchdog = Watchdog()
    watchdog.fetching_stalled_seconds(0, {A: 0, B: 0}, {A: 9, B: 9})
    watchdog.fetching_stalled_seconds(4, {A: 0, B: 1}, {A: 9, B: 9})
    assert watchdog.fetching_stalled_seconds(10, {A: 0, B: 1}, {A: 9, B: 9}) == 10


def test_partition_that_was_paused_or_lost_starts_its_watch_again() -> None:
    watchdog = Watchdog()
    watchdog.fetching_stalled_seconds(0, {A: 0}, {A: 9})
    assert watchdog.fetching_stalled_seconds(50, {}, {}) == 0
    assert watchdog.fetching_stalled_seconds(60, {A: 0}, {A: 9}) == 0


def test_a_partition_without_a_known_end_is_not_stalled() -> None:
    watchdog = Watchdog()
    watchdog.fetching_stalled_seconds(0, {A: 5}, {})
    assert watchdog.fetching_stalled_seconds(50, {A: 5}, {}) == 0


@given(TIMES)
def test_settling_stands_still_from_the_last_change_while_there_is_work(times: list[float]) -> None:
    watchdog = Watchdog()
    for now in times:
        assert watchdog.settling_stalled_seconds(now, 7, has_work=True) == now - times[0]


def test_settling_is_not_stalled_by_progress_nor_by_want_of_work() -> None:
    watchdog = Watchdog()
    watchdog.settling_stalled_seconds(0, 0, has_work=True)
    assert watchdog.settling_stalled_seconds(10, 1, has_work=True) == 0
    assert watchdog.settling_stalled_seconds(30, 1, has_work=False) == 0
    assert watchdog.settling_stalled_seconds(35, 1, has_work=True) == 5


def test_a_late_first_look_is_no_stall() -> None:
    assert Watchdog().settling_stalled_seconds(1e9, 0, has_work=True) == 0
