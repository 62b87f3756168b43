"""Bounds become offsets, within what the log holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.errors import Misconfigured
from consumer.core.message import Partition
from consumer.kafka.bounds import AtPosition, Bound, Earliest, Latest, LogRange, Offset, Time, span

pytestmark = pytest.mark.unit

P = Partition("t", 3)


def log(
    begin: int = 10, end: int = 50, position: int | None = 40, from_time: int | None = 20, to_time: int | None = 30
) -> LogRange:
    return LogRange(begin, end, position, from_time, to_time)


@pytest.mark.parametrize(
    ("start", "end", "given", "expected"),
    [
        (Earliest(), Latest(), log(), (10, 50)),
        (Earliest(), AtPosition(), log(), (10, 40)),
        (AtPosition(), Latest(), log(), (40, 50)),
        (Earliest(), AtPosition(), log(position=None), (10, 10)),
        (AtPosition(), Latest(), log(position=None), (10, 50)),
        (Offset(10), Offset(11), log(), (10, 11)),
        (Offset(12), Offset(99), log(), (12, 50)),
        (Offset(99), Latest(), log(), (50, 50)),
        (Time(1), Time(2), log(), (20, 30)),
        (Time(1), Latest(), log(from_time=None), (50, 50)),
        (Earliest(), Time(2), log(to_time=None), (10, 50)),
        (Time(1), Latest(), log(begin=0, from_time=0), (0, 50)),
        (Offset(30), Offset(20), log(), (30, 30)),
        (Earliest(), Latest(), log(begin=50), (50, 50)),
    ],
)
def test_a_span_is_what_the_bounds_say(start: Bound, end: Bound, given: LogRange, expected: tuple[int, int]) -> None:
    resolved = span(P, given, start, end)
    assert (resolved.first, resolved.end) == expected
    assert resolved.length == expected[1] - expected[0]


@pytest.mark.parametrize(
    ("start", "end", "given"),
    [
        (Offset(9), Latest(), log()),
        (Time(1), Latest(), log(from_time=10)),
        (AtPosition(), Latest(), log(position=9)),
        (Earliest(), Offset(9), log()),
        (Earliest(), AtPosition(), log(position=3)),
    ],
)
def test_offset_that_the_log_has_dropped_is_refused_by_name(start: Bound, end: Bound, given: LogRange) -> None:
    with pytest.raises(Misconfigured, match="t:3 begins at offset 10"):
        span(P, given, start, end)


@given(
    st.integers(0, 100),
    st.integers(0, 100),
    st.sampled_from([Earliest(), Latest(), AtPosition(), Offset(0), Offset(55), Offset(200), Time(5)]),
    st.sampled_from([Earliest(), Latest(), AtPosition(), Offset(0), Offset(55), Offset(200), Time(5)]),
    st.none() | st.integers(0, 200),
    st.none() | st.integers(0, 100),
)
def test_a_span_never_leaves_the_log(
    begin: int, length: int, start: Bound, end: Bound, position: int | None, at: int | None
) -> None:
    at = None if at is None else begin + min(at, length)  # Kafka names no record that the log does not hold
    try:
        resolved = span(P, LogRange(begin, begin + length, position, at, at), start, end)
    except Misconfigured:
        return
    assert resolved.first <= resolved.end <= begin + length
    assert resolved.first >= begin or not resolved.length
