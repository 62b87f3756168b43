"""Which offsets a handler has settled, and what other handlers change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.message import Partition
from consumer.handler_records.settled_ranges import (
    At,
    HandlerChange,
    Known,
    Rename,
    SettledRange,
    as_numbers,
    as_text,
    assess,
    changes,
    missed,
)

pytestmark = pytest.mark.unit

P = Partition("payments", 0)
STRETCHES = st.lists(
    st.tuples(st.integers(0, 30), st.none() | st.integers(0, 30)).map(
        lambda bounds: SettledRange(bounds[0], None if bounds[1] is None else max(bounds[0], bounds[1]))
    ),
    max_size=5,
)


@given(st.integers(0, 20), st.integers(0, 40), STRETCHES)
def test_missed_offsets_are_those_in_no_stretch(first: int, position: int, stretches: list[SettledRange]) -> None:
    covered = {
        offset
        for settled in stretches
        for offset in range(settled.first, position if settled.past is None else settled.past)
    }  # fmt: skip
    gaps = missed(first, position, stretches)
    assert [offset for a, b in gaps for offset in range(a, b)] == [
        offset for offset in range(first, position) if offset not in covered
    ]
    assert all(a < b for a, b in gaps)


def test_numbers_of_handlers_survive_being_written() -> None:
    assert as_numbers(as_text([3, 20, 1])) == frozenset({1, 3, 20})
    assert as_numbers(as_text([])) == frozenset()
    assert as_numbers(None) is None


@pytest.mark.parametrize(
    ("at", "wanted", "begun", "ended", "late"),
    [
        (At(0, 50, frozenset({1})), {1}, [], [], []),
        (At(0, 50, frozenset({1})), {1, 2}, [(2, 50)], [], [2]),
        (At(0, 50, frozenset({1, 2})), {1}, [], [(2, 50)], []),
        (At(0, 50, frozenset({1})), {2}, [(2, 50)], [(1, 50)], [2]),
        (At(50, 50, None), {2}, [(2, 50)], [], []),  # a partition that begins
        (At(7, 50, None), {1}, [(1, 7)], [], []),  # of the version before: it has been there all the time
        (At(None, 50, None), {1}, [(1, 0)], [], []),
        (At(7, 50, None), {2}, [(2, 50)], [], [2]),  # new with this version
    ],
)
def test_handlers_that_come_and_go(
    at: At, wanted: set[int], begun: list[tuple[int, int]], ended: list[tuple[int, int]], late: list[int]
) -> None:
    difference = changes({P: at}, {P: frozenset(wanted)}, legacy={1})
    assert difference.begun == tuple(HandlerChange(P, *change) for change in begun)
    assert difference.ended == tuple(HandlerChange(P, *change) for change in ended)
    assert [handler.handler for handler in difference.late] == late


def test_renamed_handler_is_recognized_by_the_one_that_is_gone() -> None:
    known = {
        "settle": Known(1, frozenset({"payments"}), False),
        "audit": Known(2, frozenset({"audits"}), False),
        "kept": Known(3, frozenset({"payments"}), False),
    }
    positions = {P: At(0, 50, frozenset({1, 3}))}
    stretches = {(1, P): [SettledRange(0, None)], (3, P): [SettledRange(0, None)]}
    assessment = assess({"settle_payment": ("payments",), "kept": ("payments",)}, known, positions, stretches)
    assert assessment.renames == (Rename("settle", "settle_payment", "payments"),)
    assert assessment.absent == ("settle",)
    assert [(gap.handler, gap.first, gap.past) for gap in assessment.gaps] == [("settle_payment", 0, 50)]
    # What the one that is gone has never settled is no sign of a new name: it was removed before, or added to other workers.
    late = {(1, P): [SettledRange(0, 30)], (3, P): [SettledRange(0, 30), SettledRange(40, None)]}
    gap = assess({"kept": ("payments",)}, known, {P: At(0, 50, frozenset({3}))}, late)
    assert [gap[2:] for gap in gap.gaps] == [(30, 40)] and gap.renames == ()
    nothing_yet = assess({"settle_payment": ("payments",)}, known, {P: At(0, 0, frozenset({1}))}, {})
    assert (nothing_yet.renames, nothing_yet.gaps) == ((), ())
