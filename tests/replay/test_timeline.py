"""The timeline: no count lost, few buckets, the same answer always.

Whatever timestamps come, in whatever order and batches. A saved state can be resumed; another one is refused.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from consumer.replay.timeline import BUCKETS_MAX, Timeline

pytestmark = pytest.mark.unit

END = int(datetime(2200, 1, 1, tzinfo=UTC).timestamp()) * 1000
NOW = 1_790_000_000_000
ABSURD = (-1, 0, -(2**63), 2**63 - 1, END, NOW * 1000, NOW * 1_000_000)
# Close together, spread at every scale, at the edges, and nonsense.
TIMES = st.one_of(
    st.integers(NOW, NOW + 5000),
    st.integers(0, 40).map(lambda power: NOW + 2**power),
    st.integers(1, END - 1),
    st.sampled_from([1, END - 1, *ABSURD]),
)
BATCHES = st.lists(st.tuples(st.lists(TIMES, max_size=30), st.sampled_from(["applied", "missing", "unknown"])))
WIDTHS = [1, 5, 15, 60, 300, 900, 1800, 3600, 10800, 21600, 43200, 86400, *(604800 * 2**n for n in range(10))]

Batches = Sequence[tuple[Sequence[int], str]]


def timeline(batches: Batches) -> Timeline:
    timeline = Timeline()
    for times, name in batches:
        timeline.add(times, name)
    return timeline


def totals(findings: dict[str, Any]) -> Counter[str]:
    counted = Counter(findings["untimed"])
    for row in findings["buckets"]:
        counted.update({name: count for name, count in row.items() if name != "at"})
    return counted


def naive(batches: Batches) -> dict[str, Any]:
    """The same from all timestamps at once, by the standard library's calendar."""
    pairs = [(time, name) for times, name in batches for time in times]
    timed = [(time // 1000, name) for time, name in pairs if 0 < time < END]
    seconds = [time for time, _ in timed] or [0]
    width = next(width for width in WIDTHS if max(seconds) // width - min(seconds) // width < BUCKETS_MAX)
    counts = Counter((time // width * width, name) for time, name in timed)
    rows: dict[int, dict[str, Any]] = {}
    for (start, name), count in sorted(counts.items()):
        at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=start)
        rows.setdefault(start, {"at": at.strftime("%Y-%m-%dT%H:%M:%SZ")})[name] = count
    untimed = Counter(name for time, name in pairs if not 0 < time < END)
    return {"width_seconds": width, "buckets": list(rows.values()), "untimed": dict(untimed)}


@given(BATCHES)
@example([([1, END - 1, *ABSURD], "applied")])
@example([([NOW], "applied"), ([NOW + 240_000], "missing")])
def test_timeline_equals_a_naive_count(batches: Batches) -> None:
    findings = timeline(batches).as_dict()
    assert findings == naive(batches)
    assert totals(findings) == Counter(name for times, name in batches for _ in times)
    assert len(findings["buckets"]) <= BUCKETS_MAX


@given(BATCHES, st.randoms(use_true_random=False))
def test_the_order_and_the_batches_do_not_matter(batches: Batches, chance: random.Random) -> None:
    singles = [([time], name) for times, name in batches for time in times]
    chance.shuffle(singles)
    assert timeline(singles).as_dict() == timeline(batches).as_dict()


@given(BATCHES, BATCHES)
def test_timeline_resumes_from_its_saved_state(before: Batches, after: Batches) -> None:
    report = json.loads(json.dumps(timeline(before).as_dict()))
    restored = Timeline.from_dict(report)
    assert restored.as_dict() == report
    for times, name in after:
        restored.add(times, name)
    assert restored.as_dict() == timeline([*before, *after]).as_dict()


@pytest.mark.parametrize(("width", "wider"), list(zip(WIDTHS[:18], WIDTHS[1:19], strict=True)))
def test_one_bucket_too_many_takes_the_next_width(width: int, wider: int) -> None:
    start = NOW // 1000 // width * width * 1000
    last = start + width * 1000 * BUCKETS_MAX - 1
    assert timeline([([start, last], "x")]).as_dict()["width_seconds"] == width
    assert timeline([([start, last + 1], "x")]).as_dict()["width_seconds"] == wider


def test_the_calendar_is_right_on_every_day() -> None:
    day, number = datetime(1970, 1, 1, 23, 59, 59, tzinfo=UTC), 0
    while day.year < 2200:
        timeline = Timeline()
        timeline.add([number * 86_400_000 + 86_399_999], "x")
        report = timeline.as_dict()
        assert report["buckets"][0]["at"] == f"{day:%Y-%m-%dT%H:%M:%S}Z"
        assert Timeline.from_dict(report).as_dict() == report
        day, number = day + timedelta(days=1), number + 1
    assert number == END // 86_400_000


def test_absurd_times_do_not_make_the_buckets_wide() -> None:
    findings = timeline([([NOW, *ABSURD], "applied"), ([-1], "missing")]).as_dict()
    assert findings["width_seconds"] == 1
    assert findings["buckets"] == [{"at": "2026-09-21T14:13:20Z", "applied": 1}]
    assert findings["untimed"] == {"applied": len(ABSURD), "missing": 1}


def test_an_iterator_will_do_and_nothing_is_nothing() -> None:
    timeline = Timeline()
    timeline.add(iter([NOW, NOW]), "applied")
    timeline.add([], "missing")
    assert totals(timeline.as_dict()) == {"applied": 2}
    assert Timeline().as_dict() == {"width_seconds": 1, "buckets": [], "untimed": {}}


def test_a_name_that_would_hide_the_time_is_refused() -> None:
    with pytest.raises(ValueError, match="at"):
        Timeline().add([NOW], "at")


GOOD = {"width_seconds": 60, "buckets": [{"at": "2026-09-21T14:13:00Z", "applied": 3}], "untimed": {"applied": 1}}


@pytest.mark.parametrize(
    "change",
    [
        {"width_seconds": 0},
        {"width_seconds": 61},
        {"width_seconds": "60"},
        {"width_seconds": None},
        {"buckets": None},
        {"buckets": [None]},
        {"buckets": [{"applied": 3}]},
        {"buckets": [{"at": None, "applied": 3}]},
        {"buckets": [{"at": "2026-09-21T14:13:20Z", "applied": 3}]},  # not where a minute begins
        {"buckets": [{"at": "2026-02-29T00:00:00Z", "applied": 3}]},
        {"buckets": [{"at": "2200-01-01T00:00:00Z", "applied": 3}]},
        {"buckets": [{"at": "1969-12-31T23:59:00Z", "applied": 3}]},
        {"buckets": [{"at": "2026-09-21T14:13:00+02:00", "applied": 3}]},
        {"buckets": [{"at": "2026-09-21T14:13:00Z", "applied": -3}]},
        {"buckets": [{"at": "2026-09-21T14:13:00Z", "applied": 3.5}]},
        {"buckets": [{"at": f"20{year}-09-21T00:00:00Z", "applied": 3} for year in (25, 26)]},  # too many minutes
        {"untimed": {"applied": True}},
        {"untimed": [1]},
    ],
)
def test_state_that_is_not_a_timelines_is_refused(change: dict[str, Any]) -> None:
    assert Timeline.from_dict(GOOD).as_dict() == GOOD
    with pytest.raises(ValueError):
        Timeline.from_dict({**GOOD, **change})
    for name in change:
        with pytest.raises(ValueError):
            Timeline.from_dict({key: value for key, value in GOOD.items() if key != name})
