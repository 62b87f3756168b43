from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.worker.restart_policy import (
    EXIT_DEAD_LETTERS,
    EXIT_MISCONFIGURED,
    EXIT_OUTGROWN,
    GiveUp,
    RestartAfter,
    Restarts,
)

pytestmark = pytest.mark.unit

# Of ends that only count how many come in a row.
CODES = st.integers(-64, 255).filter(lambda code: code not in {EXIT_MISCONFIGURED, EXIT_DEAD_LETTERS, EXIT_OUTGROWN})


def test_waits_double_up_to_the_longest() -> None:
    restarts = Restarts(in_a_row_max=8, first_seconds=0.5, longest_seconds=15)
    waits = [restarts.ended(1, 1) for _ in range(8)]
    assert waits == [RestartAfter(seconds) for seconds in (0.5, 1, 2, 4, 8, 15, 15, 15)]


@given(st.integers(1, 20), CODES)
def test_supervisor_gives_up_after_too_many_short_runs(limit: int, code: int) -> None:
    restarts = Restarts(in_a_row_max=limit)
    assert all(isinstance(restarts.ended(0.1, code), RestartAfter) for _ in range(limit))
    decision = restarts.ended(0.1, code)
    assert isinstance(decision, GiveUp)
    assert str(limit + 1) in decision.why


@given(st.lists(st.booleans(), max_size=60), CODES)
def test_a_healthy_run_forgets_the_ends_before_it(healthy: list[bool], code: int) -> None:
    restarts = Restarts(in_a_row_max=3, healthy_seconds=30)
    row = 0
    for is_healthy in healthy:
        row = 1 if is_healthy else row + 1
        decision = restarts.ended(30 if is_healthy else 29.9, code)
        assert isinstance(decision, GiveUp) == (row > 3)
        if row > 3:
            return


def test_worker_that_dies_after_healthy_runs_is_always_restarted_soon() -> None:
    restarts = Restarts()
    assert {restarts.ended(3600, -9) for _ in range(1000)} == {RestartAfter(0.5)}


@pytest.mark.parametrize("ran", [0.0, 1e6])
def test_a_misconfigured_worker_is_not_tried_again(ran: float) -> None:
    decision = Restarts().ended(ran, 2)
    assert isinstance(decision, GiveUp)
    assert "configured" in decision.why


@given(st.integers(1, 5000))
def test_a_very_patient_policy_never_overflows(ends: int) -> None:
    restarts = Restarts(in_a_row_max=10_000)
    for _ in range(ends):
        decision = restarts.ended(0, 1)
    assert isinstance(decision, RestartAfter)
    assert decision.seconds <= 15
