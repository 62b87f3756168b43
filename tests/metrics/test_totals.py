"""Sums over workers: monotone and exact, whatever happens to beats and processes."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.metrics.catalog import (
    BATCH_MESSAGES,
    BY_NAME,
    DELAY,
    FAILED_ATTEMPTS,
    LAG_MESSAGES,
    LOOP_BLOCKED,
    MESSAGES,
    METRICS,
    OTHER,
    VALUES_MAX,
    WAITING,
    Kind,
)
from consumer.metrics.recorder import Recorder
from consumer.metrics.totals import Totals

pytestmark = pytest.mark.unit

APPLIED = ("settle", "payments", "applied", "")


def as_sent(beat: dict[str, Any]) -> Any:
    """A beat as the supervisor reads it."""
    return json.loads(json.dumps(beat))


class Worker:
    """A process: its beats, and which counts have reached the supervisor."""

    def __init__(self, totals: Totals, process: int) -> None:
        self.totals, self.process = totals, process
        self.recorder = Recorder()
        self.beats: list[Any] = []
        self.counted = self.arrived = 0
        totals.begin(process)

    def count(self, amount: int) -> None:
        self.recorder.add(MESSAGES, APPLIED, amount)
        self.recorder.observe(BATCH_MESSAGES, (), amount)
        self.counted += amount

    def beat(self, is_sent: bool) -> None:
        beat = as_sent(self.recorder.beat())
        if is_sent:
            self.recorder.sent()
            self.beats.append(beat)
            self.totals.report(self.process, beat)
            self.arrived = self.counted

    def repeat(self, which: int) -> None:
        if self.beats:
            self.totals.report(self.process, self.beats[which % len(self.beats)])


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("count"), st.integers(0, 2), st.integers(1, 100)),
        st.tuples(st.just("beat"), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("repeat"), st.integers(0, 2), st.integers(0, 50)),
        st.tuples(st.just("die"), st.integers(0, 2), st.just(0)),
    ),
    max_size=60,
)


@given(ACTIONS)
def test_counters_are_monotone_and_count_each_beat_once(actions: list[tuple[str, int, Any]]) -> None:
    totals = Totals()
    workers = [Worker(totals, number) for number in range(3)]
    dead: list[Worker] = []
    before = 0.0
    for action, slot, argument in actions:
        worker = workers[slot]
        match action:
            case "count":
                worker.count(argument)
            case "beat":
                worker.beat(is_sent=argument)
            case "repeat":
                worker.repeat(argument)
                for gone in dead:
                    gone.repeat(argument)
            case _:
                totals.end(worker.process)
                dead.append(worker)
                workers[slot] = Worker(totals, len(dead) + 10)
        expected = sum(one.arrived for one in [*workers, *dead])
        value = totals.counters().get((MESSAGES, APPLIED), 0)
        assert before <= value == expected
        before = value
        distribution = totals.distributions().get((BATCH_MESSAGES, ()))
        assert (distribution.sum if distribution is not None else 0) == expected


@given(
    st.lists(st.lists(st.floats(0, 1e6), min_size=1, max_size=3), min_size=2, max_size=5),
    st.randoms(use_true_random=False),
)
def test_the_end_of_processes_changes_no_sum_by_rounding(values: list[list[float]], random: Any) -> None:
    totals = Totals()
    for process, of_process in enumerate(values):
        totals.begin(process)
        recorder = Recorder()
        for value in of_process:
            recorder.add(LOOP_BLOCKED, (), value)
            recorder.observe(DELAY, ("settle", "payments"), value)
        totals.report(process, as_sent(recorder.beat()))

    def sums() -> tuple[list[float], list[float]]:
        return list(totals.counters().values()), [one.sum for one in totals.distributions().values()]

    before = sums()
    for process in random.sample(range(len(values)), len(values)):
        totals.end(process)
        assert sums() == before


def test_an_earlier_beat_and_the_end_of_a_process_change_no_count() -> None:
    totals = Totals()
    worker = Worker(totals, 1)
    for amount in (3, 4):
        worker.count(amount)
        worker.beat(is_sent=True)
    worker.repeat(0)
    assert totals.counters() == {(MESSAGES, APPLIED): 7}
    totals.end(1)
    assert totals.counters() == {(MESSAGES, APPLIED): 7}
    distribution = totals.distributions()[BATCH_MESSAGES, ()]
    assert (distribution.sum, sum(distribution.counts)) == (7, 2)


def test_a_beat_that_was_not_sent_is_in_the_next_one() -> None:
    recorder = Recorder()
    recorder.add(MESSAGES, APPLIED, 2)
    recorder.beat()
    assert as_sent(recorder.beat())["counters"] == [["messages_total", list(APPLIED), 2]]
    recorder.sent()
    assert recorder.beat()["counters"] == [] and not recorder.has_changed


@pytest.mark.parametrize(
    "beat",
    [
        None,
        [],
        {"number": 1},
        {"number": "x", "counters": [], "histograms": []},
        {"number": 1, "counters": [["messages_total", ["too", "few"], 1]], "histograms": []},
        {"number": 1, "counters": [["no such metric", [], 1]], "histograms": []},
        {"number": 1, "counters": [["messages_total", list(APPLIED), float("nan")]], "histograms": []},
        {"number": 1, "counters": [], "histograms": [["batch_messages", [], [1], 1]]},
        {
            "number": 1,
            "counters": [["messages_total", list(APPLIED), 7]],
            "histograms": [],
            "gauges": [["lag_seconds"]],
        },
    ],
)
def test_a_beat_that_cannot_be_read_changes_nothing(beat: Any) -> None:
    totals = Totals()
    totals.begin(1)
    totals.report(1, beat)
    assert not totals.counters() and not totals.distributions() and not totals.gauges()


def test_kinds_are_few_over_all_workers_and_nothing_is_lost() -> None:
    totals = Totals()
    for process in range(3):
        recorder = Recorder()
        for kind in range(40):
            recorder.add(FAILED_ATTEMPTS, ("settle", "payments", f"Error{process * 40 + kind}"))
        totals.begin(process)
        totals.report(process, as_sent(recorder.beat()))
        if process < 2:
            totals.end(process)
    counts = {labels[2]: count for (_, labels), count in totals.counters().items()}
    assert len(counts) == VALUES_MAX + 1
    assert sum(counts.values()) == 120 and counts[OTHER] == 120 - VALUES_MAX


def test_a_kind_that_was_cut_off_in_a_worker_is_other() -> None:
    recorder = Recorder()
    for kind in range(VALUES_MAX + 5):
        recorder.add(FAILED_ATTEMPTS, ("settle", "payments", "E" * 300 + str(kind)))
        recorder.add(FAILED_ATTEMPTS, ("settle", "payments", f"Error{kind}"))
    kinds = Counter({labels[2]: count for _, labels, count in recorder.beat()["counters"]})
    assert len(kinds) == VALUES_MAX + 1 and max(map(len, kinds)) == 100


def test_gauges_go_with_their_worker() -> None:
    totals = Totals()
    for process in (1, 2):
        totals.begin(process)
        gauges = [(LAG_MESSAGES, ("payments", "0"), 5.0 * process), (WAITING, ("settle", "payments", "retry"), 2.0)]
        totals.report(process, as_sent(Recorder().beat(gauges)))
    assert totals.gauges() == {
        (LAG_MESSAGES, ("payments", "0")): 10.0,
        (WAITING, ("settle", "payments", "retry")): 4.0,
    }
    totals.end(2)
    assert totals.gauges()[LAG_MESSAGES, ("payments", "0")] == 5.0
    totals.report(1, as_sent({"number": 2, "counters": [], "histograms": [], "gauges": []}))
    assert totals.gauges() == {}


@given(st.lists(st.tuples(st.floats(-1, 1e6), st.integers(1, 5)), max_size=30))
def test_a_histogram_counts_every_value_in_its_bucket(values: list[tuple[float, int]]) -> None:
    recorder = Recorder()
    for value, count in values:
        recorder.observe(BATCH_MESSAGES, (), value, count)
    totals = Totals()
    totals.begin(1)
    totals.report(1, as_sent(recorder.beat()))
    counts = totals.distributions()[BATCH_MESSAGES, ()].counts if values else []
    assert sum(counts) == sum(count for _, count in values)
    for place, bound in enumerate(BATCH_MESSAGES.buckets[: len(counts)]):
        assert sum(counts[: place + 1]) == sum(count for value, count in values if value <= bound)


def test_names_follow_the_conventions() -> None:
    assert len(BY_NAME) == len(METRICS) > 30
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)) and len(metric.buckets) <= 14, metric.name
        assert metric.bounded is None or metric.bounded in metric.labels
        assert not {"id", "key", "message_id", "offset", "payload", "le", "app"} & set(metric.labels), metric.name
