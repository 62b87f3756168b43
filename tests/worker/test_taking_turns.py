"""How many transactions take turns after conflicts."""

from __future__ import annotations

import pytest

from consumer.worker.conflict_turns import Turns

pytestmark = pytest.mark.unit


def turns_after_a_conflict(turns: Turns) -> int:
    turns.conflicted()
    count = 0
    while turns.is_needed:
        turns.committed()
        count += 1
    return count


def test_lanes_take_no_turns_without_a_conflict() -> None:
    turns = Turns()
    turns.committed()
    assert not turns.is_needed


def test_each_conflict_doubles_the_turns_up_to_a_bound() -> None:
    turns = Turns()
    counts = [turns_after_a_conflict(turns) for _ in range(10)]
    assert counts[:3] == [8, 16, 32]
    assert counts[-2:] == [1024, 1024]


def test_transactions_without_turns_let_the_next_conflict_cost_less() -> None:
    turns = Turns()
    for _ in range(3):
        turns_after_a_conflict(turns)
    for _ in range(10_000):
        turns.committed()
    assert turns_after_a_conflict(turns) == 8


def test_a_turn_that_does_not_come_ends_the_turns_until_the_next_conflict() -> None:
    turns = Turns()
    turns.conflicted()
    turns.timed_out()
    assert not turns.is_needed
    assert turns_after_a_conflict(turns) == 16
