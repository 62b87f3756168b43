"""When rows may be forgotten, and which settings contradict each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.retention import (
    GENERATIONS_MAX,
    HOUR,
    Drop,
    Forget,
    Generation,
    LedgerState,
    Policy,
    RotateGeneration,
    TopicRetention,
    Wait,
    contradictions,
    due,
    wanted,
)

pytestmark = pytest.mark.unit

hours = st.floats(0.01, 10_000)


@given(
    retention=hours,
    share=st.floats(1 / (GENERATIONS_MAX - 2), 1),
    pauses=st.lists(st.floats(0, 3), min_size=1, max_size=60),
)
def test_row_is_forgotten_within_one_generation_after_its_retention(
    retention: float, share: float, pauses: list[float]
) -> None:
    """After steps of 0 to 3 generations, everything that is due happens."""
    policy = Policy(retention, retention * share, 0)
    now, numbers = 0.0, 1
    live = [Generation(1, now, None, False)]
    turning = False
    for pause in pauses:
        now += pause * policy.generation * HOUR
        while True:
            state = LedgerState(now, 1, live[-1].number, turning, None, tuple(live))
            match due(state, policy):
                case RotateGeneration() if not turning:
                    assert now - live[-1].opened_at >= policy.generation * HOUR - 1e-3
                    turning = True
                case RotateGeneration():
                    numbers += 1
                    live = [*live[:-1], live[-1]._replace(closed_at=now), Generation(numbers, now, None, False)]
                    turning = False
                case Forget(number, closed_at):
                    assert live[0].number == number and live[0].closed_at == closed_at
                    assert now - closed_at >= retention * HOUR - 1e-3  # its youngest row is as old as that
                    live[0] = live[0]._replace(forgotten=True)
                case Drop(number):
                    assert live.pop(0).number == number
                case Wait(seconds):
                    assert seconds > 0
                    break
        # What is kept: at most the generations that a whole retention needs, one that is filling and one that is going.
        assert all(generation.closed_at is None or now - generation.closed_at < retention * HOUR for generation in live)
        assert len(live) <= GENERATIONS_MAX


def test_generations_stop_growing_while_the_oldest_is_held_back() -> None:
    policy = Policy.of(4, 1, 0)
    live = [Generation(n, n * HOUR, (n + 1) * HOUR, False) for n in range(1, GENERATIONS_MAX)]
    live.append(Generation(GENERATIONS_MAX, GENERATIONS_MAX * HOUR, None, False))
    now = (GENERATIONS_MAX + 5) * HOUR
    assert due(LedgerState(now, 1, GENERATIONS_MAX, False, None, tuple(live)), policy) == Forget(1, 2 * HOUR)
    young = [generation._replace(closed_at=generation.closed_at and now) for generation in live]
    assert due(LedgerState(now, 1, GENERATIONS_MAX, False, None, tuple(young)), policy) == Wait(4 * HOUR)
    assert due(LedgerState(now, 1, GENERATIONS_MAX, False, None, tuple(young[1:])), policy) == RotateGeneration()


@given(own=hours, others=st.dictionaries(st.text(min_size=1), st.none() | hours))
def test_rows_are_kept_for_the_longest_declared_retention(own: float, others: dict[str, float | None]) -> None:
    kept, longer = wanted(own, others)
    if None in others.values():
        assert kept is None
    else:
        assert kept == max([own, *(hours for hours in others.values() if hours is not None)])
    assert longer == sorted(app for app, hours in others.items() if hours is None or hours > own)


@given(kept=hours, skew=st.floats(0, 100), log=hours, segment=hours)
def test_log_that_outlives_the_ledger_is_an_error_or_a_warning(
    kept: float, skew: float, log: float, segment: float
) -> None:
    errors, warnings = contradictions(Policy.of(kept, None, skew), None, [TopicRetention("t", log, segment, False)])
    assert any("topic t" in error for error in errors) == (log + skew > kept)
    assert bool(warnings) == (log + skew <= kept < log + skew + segment)
    assert any("too old to judge" in error for error in errors) == (kept <= skew)


def test_each_contradiction_shows_its_arithmetic_and_what_to_set() -> None:
    week = Policy.of(168, None, 1)
    assert contradictions(week, 24, [TopicRetention("t", 24, 24, False)]) == ([], [])
    cases = [
        (Policy.of(24, 48, 1), None, [], ["24 + 48 = 72 hours", "a quarter, 6"]),
        (Policy.of(168, 1, 1), None, [], ["168 generations", "5.6"]),
        (Policy.of(1, None, 1), None, [], ["every message would be too old"]),
        (Policy.of(12, None, 1), 24.0, [], ["CONSUMER_PRECHECK_WINDOW_HOURS=24", "12 at most"]),
        (
            Policy.of(24, None, 1),
            None,
            [TopicRetention("t", 168, 1, False)],
            ["is 169", "145 too few", "169 at least", "82800000"],
        ),
        (week, None, [TopicRetention("t", None, 1, False)], ["retention.ms=-1", "for ever"]),
        (week, None, [TopicRetention("t", 24, 1, True)], ["cleanup.policy=compact"]),
    ]
    for policy, window, logs, said in cases:
        errors, _ = contradictions(policy, window, logs)
        assert len(errors) == 1, (policy, errors)
        for phrase in said:
            assert phrase in errors[0], errors[0]
    assert "DescribeConfigs" in contradictions(week, None, [TopicRetention("t", None, 0, False, known=False)])[1][0]
