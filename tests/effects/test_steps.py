"""The table of effects/steps.py, line by line."""

from __future__ import annotations

import pytest

from consumer.effects.steps import Intent, Step, may_withdraw, next_step, surely_known_seconds

pytestmark = pytest.mark.unit

DAY = 86_400.0


def intent(
    age: float = 0.0, result: bytes | None = None, *, is_new: bool = False, attempts: int = 1, payload: int = 7
) -> Intent:
    return Intent(is_new, "key", age, attempts, payload, result)


@pytest.mark.parametrize(
    ("stored", "remembers", "can_ask", "step"),
    [
        (intent(is_new=True), DAY, False, Step.CALL),
        (intent(is_new=True), 0, False, Step.CALL),
        (intent(1, b"{}"), DAY, False, Step.SETTLE),
        (intent(9 * DAY, b"{}"), DAY, True, Step.SETTLE),
        (intent(1, b"{}"), 0, False, Step.SETTLE),
        (intent(1, b""), 0, False, Step.SETTLE),  # an empty result is a result
        (intent(1), DAY, False, Step.CALL),
        (intent(1), DAY, True, Step.CALL),
        (intent(0.9 * DAY - 1), DAY, False, Step.CALL),
        (intent(0.9 * DAY), DAY, False, Step.LEAVE),
        (intent(0.9 * DAY), DAY, True, Step.ASK),
        (intent(0), 0, False, Step.LEAVE),  # at most once
        (intent(0), 0, True, Step.ASK),
    ],
)
def test_step(stored: Intent, remembers: float, can_ask: bool, step: Step) -> None:
    assert next_step(stored, remembers, can_ask=can_ask, payload=7) is step


def test_another_payload_of_the_id_waits_whatever_is_known_of_the_first() -> None:
    for stored in (intent(1), intent(9 * DAY), intent(1, b"{}")):
        assert next_step(stored, DAY, can_ask=True, payload=8) is Step.WAIT
        assert next_step(stored, DAY, can_ask=True, payload=None) is not Step.WAIT


def test_the_margin_is_a_tenth_and_at_least_half_a_minute() -> None:
    assert [surely_known_seconds(seconds) for seconds in (0, 60, 600, DAY)] == [0, 30, 540, 0.9 * DAY]


def test_an_intent_with_an_earlier_open_call_stays() -> None:
    assert may_withdraw(intent(attempts=1)) and not may_withdraw(intent(attempts=2))
