from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from consumer.core.retry import Retry

pytestmark = pytest.mark.unit

DRAWS = st.floats(0, 1, exclude_max=True)
SECONDS = st.floats(0, 1e6)
ENDLESS = 10**7


@given(SECONDS, SECONDS, st.integers(1, 10**6), DRAWS)
def test_a_delay_lies_between_nothing_and_the_cap(base: float, cap: float, attempts: int, draw: float) -> None:
    assume(base <= cap)
    delay = Retry(attempts=ENDLESS, base=base, cap=cap).delay_seconds(ValueError(), attempts, draw)
    assert delay is not None
    assert 0 <= delay <= cap


@given(st.integers(1, 60), DRAWS)
def test_a_delay_lies_in_the_upper_half_of_its_longest(attempts: int, draw: float) -> None:
    delay = Retry(attempts=ENDLESS, base=0.2, cap=30).delay_seconds(ValueError(), attempts, draw)
    longest = min(30, 0.2 * 2 ** (attempts - 1))
    assert delay is not None
    assert longest / 2 <= delay <= longest


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e6), DRAWS)
def test_delays_double_until_the_cap_and_stay_there(base: float, cap: float, draw: float) -> None:
    assume(base <= cap)
    retry = Retry(attempts=ENDLESS, base=base, cap=cap)
    delays = [retry.delay_seconds(ValueError(), n, draw) or 0.0 for n in range(1, 70)]
    top = cap * (0.5 + draw / 2)
    for one, other in zip(delays, delays[1:], strict=False):
        assert math.isclose(other, min(2 * one, top))
    assert math.isclose(delays[-1], top)


@given(st.integers(1, 50), st.integers(1, 100), DRAWS)
def test_retry_gives_attempts_up_to_its_limit(limit: int, failed: int, draw: float) -> None:
    delay = Retry(attempts=limit).delay_seconds(ValueError(), failed, draw)
    assert (delay is None) == (failed >= limit)


def test_one_attempt_means_never_again() -> None:
    assert Retry(attempts=1).delay_seconds(ValueError(), 1, 0.5) is None


def test_only_the_errors_named_are_worth_another_attempt() -> None:
    retry = Retry(on=(TimeoutError, LookupError))
    assert retry.delay_seconds(TimeoutError(), 1, 0) is not None
    assert retry.delay_seconds(KeyError(), 1, 0) is not None
    assert retry.delay_seconds(ValueError(), 1, 0) is None
    assert Retry(on=()).delay_seconds(ValueError(), 1, 0) is None


def test_a_single_error_class_may_stand_without_a_tuple() -> None:
    retry = Retry(on=TimeoutError)  # type: ignore[arg-type]
    assert retry.on == (TimeoutError,)
    assert retry.delay_seconds(ValueError(), 1, 0) is None


def test_by_default_an_exception_is_retried_and_an_exit_is_not() -> None:
    assert Retry().delay_seconds(Exception(), 1, 0) is not None
    assert Retry().delay_seconds(KeyboardInterrupt(), 1, 0) is None


BAD: list[dict[str, Any]] = [
    {"attempts": 0},
    {"attempts": -1},
    {"attempts": True},
    {"attempts": 2.0},
    {"attempts": "3"},
    {"attempts": None},
    {"base": -0.1},
    {"base": 31},
    {"base": 2, "cap": 1},
    {"cap": -1},
    {"base": math.nan},
    {"cap": math.nan},
    {"on": ("TimeoutError",)},
    {"on": (3,)},
    {"on": (int,)},
    {"on": int},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_a_bad_value_is_refused_with_its_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Retry(**options)


@pytest.mark.parametrize("options", [{"base": "1"}, {"cap": None}, {"on": None}, {"on": 3}], ids=str)
def test_a_value_of_another_type_is_refused_the_same_way(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Retry(**options)


def test_a_list_of_errors_either_works_or_is_refused_at_once() -> None:
    try:
        retry = Retry(on=[TimeoutError])  # type: ignore[arg-type]
    except ValueError:
        return
    assert retry.delay_seconds(TimeoutError(), 1, 0) is not None
