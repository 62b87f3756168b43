"""Ids for new messages."""

from __future__ import annotations

import time
from uuid import RFC_4122

import pytest

from consumer import new_message_id

pytestmark = pytest.mark.unit


def test_id_is_of_version_seven_and_tells_its_time() -> None:
    before = time.time_ns() // 1_000_000
    id = new_message_id()
    assert (id.version, id.variant) == (7, RFC_4122)
    assert before <= id.int >> 80 <= time.time_ns() // 1_000_000


def test_ids_ascend_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within a millisecond, in steps of a quarter of a microsecond."""
    nanoseconds = 1_750_000_000_000_000_000
    ids = []
    for step in range(5000):
        monkeypatch.setattr(time, "time_ns", lambda at=nanoseconds + 250 * step: at)
        ids.append(new_message_id())
    assert ids == sorted(ids)


def test_ids_of_one_moment_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert len({new_message_id() for _ in range(10_000)}) == 10_000
    assert all(
        bit in {id.int >> place & 1 for id in [new_message_id() for _ in range(99)]}
        for place in range(62)
        for bit in (0, 1)
    )
