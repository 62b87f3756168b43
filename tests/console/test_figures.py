"""What the console remembers: rates, counts, and the last known ends."""

from __future__ import annotations

from typing import Any

import pytest

from consumer.console.figures import KEEP_SECONDS, History, Sample, outcomes_of, seconds_left, with_last_known
from consumer.core.message import Partition

pytestmark = pytest.mark.unit

AT = 1_700_000_000.0
HERE = Partition("payments", 0)


def sample(after: float, applied: int, position: int = 0, **more: int) -> Sample:
    return Sample(AT + after, {"settle": {"applied": applied, **more}}, {HERE: position})


def test_duplicates_are_counted_by_cause() -> None:
    row: dict[str, Any] = {"applied": 7, "duplicates": {"batch": 1, "ledger": 2}, "dead_lettered": 3, "skipped": 0}
    assert outcomes_of(row) == {
        "applied": 7,
        "duplicate_batch": 1,
        "duplicate_ledger": 2,
        "dead_lettered": 3,
        "skipped": 0,
    }


def test_counts_belong_to_the_step_in_which_they_were_seen() -> None:
    history = History()
    for after, applied, dead in ((0, 100, 5), (10, 130, 5), (20, 130, 4), (41, 131, 9)):  # a retry settled one
        history.add(sample(after, applied, dead_lettered=dead))
    assert history.buckets("settle", AT + 45, 10, 60) == [
        {"at": AT + 10, "applied": 30},
        {"at": AT + 20},
        {"at": AT + 30},
        {"at": AT + 40, "applied": 1, "dead_lettered": 5},
    ]
    assert [bucket["at"] for bucket in history.buckets("settle", AT + 45, 10, 2)] == [AT + 30, AT + 40]
    assert next(bucket["at"] for bucket in history.buckets("another", AT + 45, 10, 60)) == AT + 10
    assert History().buckets("settle", AT, 10, 60) == []


def test_memory_is_bounded_and_counts_nothing_twice() -> None:
    history = History()
    for second in range(int(2 * KEEP_SECONDS)):
        history.add(sample(second, second))
    assert len(history._samples) < KEEP_SECONDS / 3
    assert history.since == pytest.approx(AT + KEEP_SECONDS, abs=10)
    buckets = history.buckets("settle", AT + 2 * KEEP_SECONDS, 60, 60)
    assert len(buckets) == 60
    assert sum(int(bucket.get("applied", 0)) for bucket in buckets) == pytest.approx(KEEP_SECONDS, abs=130)


def test_rate_is_of_the_last_minute() -> None:
    history = History()
    assert history.rate(HERE) is None
    history.add(sample(0, 0, 1_000_000))
    assert history.rate(HERE) is None
    for after, position in ((100, 0), (110, 100), (120, 400)):
        history.add(sample(after, 0, position))
    assert history.rate(HERE) == 20
    assert history.rate(Partition("payments", 1)) is None
    history.add(sample(130, 0, 10))
    assert history.rate(HERE) == pytest.approx(10 / 30)
    history.add(sample(140, 0, -1))  # moved back by an operator: no rate
    assert history.rate(HERE) is None


def test_time_left_needs_a_lag_and_a_rate() -> None:
    assert seconds_left(100, 4.0) == 25
    assert seconds_left(100, 0.0) is None and seconds_left(100, None) is None
    assert seconds_left(0, 4.0) is None and seconds_left(None, 4.0) is None


def row(partition: int, position: int | None, end: int | None, stopped: object = None) -> dict[str, Any]:
    return {
        "topic": "payments",
        "partition": partition,
        "position": position,
        "end": end,
        "lag": None,
        "stopped": stopped,
    }


def test_ends_stay_known_while_kafka_is_away() -> None:
    known = [row(0, 10, 50), row(1, 10, 50, {"reason": "other_topic"}), row(2, None, 7), row(3, 5, None)]
    merged = with_last_known([row(0, 30, None), row(1, 10, None), row(3, 6, None), row(4, 1, None)], known)
    by_number = {entry["partition"]: entry for entry in merged}
    assert (by_number[0]["end"], by_number[0]["lag"]) == (50, 20)
    assert by_number[1]["stopped"] == {"reason": "other_topic"} and by_number[1]["lag"] == 40
    assert by_number[2] == row(2, None, 7)
    assert by_number[3]["lag"] is None and by_number[4]["lag"] is None
    moved = with_last_known([row(1, 11, None)], known)
    assert moved[0]["stopped"] is None  # it has moved: the stop is over, or is found again
