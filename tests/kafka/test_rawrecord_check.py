"""Frames of record batches are checked for order, size and format.

The checksums of batches cover none of them.
"""

from __future__ import annotations

import struct

import pytest

from consumer.kafka.record_batch import HEADER_BYTES, check

pytestmark = pytest.mark.unit

_HEADER = struct.Struct(">qiibIhiqqqhii")


def batch(base: int, count: int = 5, *, magic: int = 2, length: int | None = None) -> bytes:
    body = b"r" * 40
    return (
        _HEADER.pack(
            base,
            HEADER_BYTES - 12 + len(body) if length is None else length,
            0,
            magic,
            7,
            0,
            count - 1,
            1000,
            1000,
            -1,
            -1,
            -1,
            count,
        )
        + body
    )


SIZE = len(batch(0))


def test_check_of_sound_batches_takes_all_with_gaps_and_a_cut_end() -> None:
    log = batch(0) + batch(5) + batch(20)
    assert check(log, 0, 25) == (3 * SIZE, None)
    assert check(log, 3, 25) == (3 * SIZE, None)  # in the middle of the first one
    assert check(log + batch(25)[:70], 0, 30) == (3 * SIZE, None)
    assert check(log + batch(25)[:20], 0, 30) == (3 * SIZE, None)
    assert check(log, 0, -1) == (3 * SIZE, None)
    assert check(batch(0)[:70], 0, 5) == (0, None)
    assert check(b"", 0, 0) == (0, None)


@pytest.mark.parametrize(
    "bad",
    [
        batch(5, magic=3),
        batch(5, magic=-1),
        batch(5, length=-5),
        batch(5, length=0),
        batch(5, length=48),
        batch(5, length=1 << 30),
        batch(1 << 40),
        batch(2),
        batch(4),
        batch(-7),
        batch(8),
        batch(5, count=0),
    ],
    ids=lambda raw: raw[:17].hex(),
)
def test_check_of_a_broken_frame_cuts_before_it_and_names_what_is_missing(bad: bytes) -> None:
    size, damage = check(batch(0) + bad + batch(10), 0, 15)
    assert size == SIZE
    assert damage is not None
    assert (damage.first, damage.last, damage.next_at) == (5, 9, 2 * SIZE)
    size, damage = check(bad + batch(10), 10, 15)
    if damage is not None:  # it stands before what is wanted
        assert (size, damage.last, damage.next_at) == (0, 9, SIZE)


def test_check_of_a_broken_last_batch_knows_no_last_offset() -> None:
    size, damage = check(batch(0) + batch(5, magic=9), 0, 10)
    assert size == SIZE
    assert damage is not None and (damage.first, damage.last) == (5, None)
