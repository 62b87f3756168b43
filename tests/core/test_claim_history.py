"""What claims expect of the next one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.claim_history import ClaimHistory

pytestmark = pytest.mark.unit


def guesses(pattern: list[bool]) -> tuple[int, int]:
    """How often only new ids are expected, wrongly and rightly.

    True: the claim has a known id.
    """
    history, wrong, right = ClaimHistory(), 0, 0
    for is_known in pattern:
        if history.expects_new and is_known:
            history.surprised()
            wrong += 1
        elif history.expects_new:
            right += 1
        history.claimed(10, int(is_known))
    return wrong, right


def test_new_ids_are_expected_after_three_claims_without_a_known_one() -> None:
    history = ClaimHistory()
    expected = []
    for _ in range(4):
        expected.append(history.expects_new)
        history.claimed(10, 0)
    assert expected == [False, False, False, True]
    history.claimed(10, 1)
    assert not history.expects_new


def test_known_ids_are_expected_while_most_are() -> None:
    history = ClaimHistory()
    for known, expected in ((5, False), (6, True), (10, True), (0, False)):
        history.claimed(10, known)
        assert history.expects_known is expected


@pytest.mark.parametrize("every", range(2, 60))
def test_wrong_guesses_are_few_or_pay_off(every: int) -> None:
    """A wrong one costs about as much as a right one saves."""
    wrong, right = guesses([number % every == every - 1 for number in range(10_000)])
    assert wrong <= 6 or wrong * 8 <= right
    assert every < 30 or right > 8_000


def test_surprises_are_forgotten_as_guesses_come_true() -> None:
    history = ClaimHistory()
    for _ in range(10):
        history.surprised()
    for _ in range(6):
        for _ in range(200):
            history.claimed(10, 0)
        history.surprised()
    for _ in range(3):
        history.claimed(10, 0)
    assert history.expects_new


@given(st.lists(st.booleans(), max_size=300))
def test_both_are_never_expected_at_once(pattern: list[bool]) -> None:
    history = ClaimHistory()
    for is_known in pattern:
        history.claimed(10, 10 if is_known else 0)
        assert not (history.expects_known and history.expects_new)
