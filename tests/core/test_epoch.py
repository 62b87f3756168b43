from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from consumer.core.epoch import is_left_behind

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
