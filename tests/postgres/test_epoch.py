from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.postgres.epoch import is_left_behind, lineage

pytestmark = pytest.mark.unit

NUMBERS = st.integers(1, 2**32 - 1)
EPOCHS = st.tuples(st.sampled_from(["6a", "6b"]), NUMBERS, st.sampled_from(["0" * 12, "f" * 12]))


def text(epoch: tuple[str, int, str]) -> str:
    return f"{epoch[0]}-{epoch[1]:08X}-{epoch[2]}"


@given(EPOCHS, EPOCHS)
def test_left_behind_is_a_lower_timeline_of_the_same_system_and_nonce(
    one: tuple[str, int, str], other: tuple[str, int, str]
) -> None:
    same = (one[0], one[2]) == (other[0], other[2])
    assert is_left_behind(text(one), text(other)) == (same and one[1] < other[1])


def test_timelines_are_compared_as_numbers() -> None:
    assert is_left_behind("6a-00000009-0", "6a-00000010-0")
    assert is_left_behind("6a-000000FF-0", "6a-00000100-0")


def test_start_time_makes_another_epoch_of_the_same_lineage() -> None:
    before, after = "6a-00000001-abc-100", "6a-00000001-abc-200"
    assert before != after and lineage(before) == lineage(after)
    assert not is_left_behind(before, after) and not is_left_behind(after, before)
    assert is_left_behind("6a-00000001-abc-300", "6a-00000002-abc-200")


def test_unknown_parts_make_no_server_an_old_primary() -> None:
    assert not is_left_behind("0-0-abc-100", "6a-00000002-abc-200")
    assert not is_left_behind("6a-00000001-abc-100", "0-0-abc-200")
