"""How failures are judged, and the evidence of a process."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.evidence import ALIKE_MIN, Evidence, FailureVerdict, Others, judge
from consumer.core.message import Partition
from consumer.core.sqlstate import Meaning

pytestmark = pytest.mark.unit

P = Partition("t", 0)
_ = FailureVerdict
# class -> (not alone; alone and others succeed, all fail alike, unknown). Without an answer it is an outage.
CELLS = {
    Meaning.CONFLICT: (_.AGAIN, _.COUNT, _.WAIT, _.WAIT),
    Meaning.LOCKED: (_.AGAIN, _.COUNT, _.WAIT, _.WAIT),
    Meaning.OUTAGE: (_.OUTAGE, _.COUNT, _.WAIT, _.WAIT),
    Meaning.INTERNAL: (_.ISOLATE, _.COUNT, _.WAIT, _.WAIT),
    Meaning.DEPLOYMENT: (_.ISOLATE, _.COUNT, _.WAIT, _.WAIT),
    Meaning.STATE: (_.ISOLATE, _.COUNT, _.WAIT, _.WAIT),
    Meaning.MESSAGE: (_.ISOLATE, _.COUNT, _.WAIT, _.COUNT),
    Meaning.CODE: (_.ISOLATE, _.COUNT, _.COUNT, _.COUNT),
}


@pytest.mark.parametrize(
    ("may_be", "answers", "alone", "others"), list(itertools.product(Meaning, (True, False), (True, False), Others))
)
def test_every_cell_of_the_table_is_decided(may_be: Meaning, answers: bool, alone: bool, others: Others) -> None:
    verdict = judge(may_be, answers=answers, alone=alone, others=others)
    many, *by_others = CELLS[may_be]
    expected = many if not alone else by_others[list(Others).index(others)]
    assert verdict is (expected if answers else FailureVerdict.OUTAGE)


def test_message_that_fails_as_all_others_do_counts_only_for_handler_code() -> None:
    counted = {
        meaning
        for meaning in Meaning
        if judge(meaning, answers=True, alone=True, others=Others.FAIL_ALIKE) is FailureVerdict.COUNT
    }
    assert counted == {Meaning.CODE}


def test_others_are_known_by_successes_after_the_first_failure_only() -> None:
    seen = Evidence()
    seen.succeeded("h")
    mark = seen.mark("h")
    seen.failed("h", "42P01", P, 1)
    assert seen.others("h", "42P01", mark) is Others.UNKNOWN
    seen.succeeded("other")
    assert seen.others("h", "42P01", mark) is Others.UNKNOWN
    seen.succeeded("h")
    assert seen.others("h", "42P01", mark) is Others.SUCCEED
    assert seen.others("h", "42P01", seen.mark("h")) is Others.UNKNOWN


def test_the_same_message_failing_again_is_no_evidence_about_others() -> None:
    seen = Evidence()
    for n in range(100):
        seen.failed("h", "23503", P, 7)
        seen.failed("h", f"kind {n}", P, n)
    assert seen.others("h", "23503", seen.mark("h")) is Others.UNKNOWN


@given(st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=60))
def test_messages_fail_alike_when_enough_of_them_do_and_none_succeeds(events: list[int | None]) -> None:
    """The verdict equals a recount.

    None is a success, a number the offset of a message that fails.
    """
    seen, failing = Evidence(), set[int]()
    mark = seen.mark("h")
    since = 0
    for event in events:
        if event is None:
            seen.succeeded("h")
            failing.clear()
            since += 1
        else:
            seen.failed("h", "k", P, event)
            failing.add(event)
        if since:
            assert seen.others("h", "k", mark) is Others.SUCCEED
        expected = Others.FAIL_ALIKE if len(failing) >= ALIKE_MIN else Others.UNKNOWN
        assert seen.others("h", "k", seen.mark("h")) is expected
