from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.precheck.breaker import Breaker, Sampler

pytestmark = pytest.mark.unit


def test_breaker_opens_at_the_first_failure_and_closes_after_a_success() -> None:
    breaker = Breaker()
    assert not breaker.is_open
    breaker.failed()
    assert breaker.is_open
    breaker.succeeded()
    assert not breaker.is_open


@given(st.integers(1, 2000))
def test_pauses_between_probes_double_up_to_the_longest(failures: int) -> None:
    breaker = Breaker(0.5, 30)
    pauses = [breaker.failed() for _ in range(failures)]
    assert pauses[:7] == [0.5, 1, 2, 4, 8, 16, 30][:failures]
    assert set(pauses[6:]) <= {30.0}


def test_a_success_makes_the_next_pause_short_again() -> None:
    breaker = Breaker(0.5, 30)
    for _ in range(10):
        breaker.failed()
    breaker.succeeded()
    assert breaker.failed() == 0.5


def asked_of(sampler: Sampler, batches: int, hits: int) -> int:
    """How many of `batches` batches are asked for, given their hits."""
    asked = 0
    for _ in range(batches):
        if sampler.should_ask():
            asked += 1
            sampler.observed(1000, hits)
    return asked


def test_a_sampler_begins_by_asking() -> None:
    assert Sampler().should_ask()


@given(st.integers(20, 1000))
def test_every_batch_is_asked_for_while_hits_are_worth_it(hits: int) -> None:
    assert asked_of(Sampler(worth_it=0.01), 200, hits) == 200


@given(st.integers(1, 50))
def test_without_hits_one_batch_in_so_many_is_asked_for(every: int) -> None:
    sampler = Sampler(every=every)
    asked_of(sampler, 1000, 0)
    assert asked_of(sampler, 20 * every, 0) == 20


def test_the_first_measurements_without_hits_take_a_while_to_count() -> None:
    assert asked_of(Sampler(), 20, 0) == 20


def test_a_burst_of_duplicates_is_noticed_by_the_first_batch_asked_for() -> None:
    sampler = Sampler(every=16)
    asked_of(sampler, 1000, 0)
    waited = 0
    while not sampler.should_ask():
        waited += 1
    assert waited < 16
    sampler.observed(1000, 900)
    assert asked_of(sampler, 40, 900) == 40


def test_a_batch_with_nothing_to_ask_for_says_nothing() -> None:
    sampler = Sampler()
    for _ in range(1000):
        sampler.observed(0, 0)
    assert asked_of(sampler, 20, 0) == 20
