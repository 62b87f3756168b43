"""Decides when a further lane of a database takes a batch.

A lane that ends its batch takes everything that waits: with one lane at work, transactions are few and latency is low. A
further lane helps when there is more than one batch holds, or when a batch takes long: then one computes while another
waits for PostgreSQL. So a further lane begins when the last one to begin has left messages behind, or is at work for
PATIENCE_SECONDS. And while batches take so long, each takes only its lane's share of the partitions: otherwise one slow
batch would hold the partitions of all lanes. Measured with two and four lanes that always begin: docs/explanation/decisions/speed.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

PATIENCE_SECONDS = 0.01


class Timer(Protocol):
    """What `call_later` returns."""

    def cancel(self) -> None:
        """Call nothing."""


CallLater = Callable[[float, Callable[[], None]], Timer]


def _call_later(seconds: float, callback: Callable[[], None]) -> Timer:
    return asyncio.get_running_loop().call_later(seconds, callback)


class Lane(Protocol):
    """A lane, as far as it is started."""

    wake: asyncio.Event


class LaneStarts:
    """Which lanes are at work, and whether a further one may begin."""

    def __init__(self, call_later: CallLater = _call_later) -> None:
        self._call_later = call_later
        self._lanes: Sequence[Lane] = ()
        self._at_work: dict[int, Timer | None] = {}  # the timer: until a further lane may begin
        self._leaves_more: set[int] = set()  # the lanes at work that left messages behind
        self._is_slow = True  # the last batch outlasted the patience; until one has ended, nothing is known

    def connect(self, lanes: Sequence[Lane]) -> None:
        """Set the lanes of the database."""
        self._lanes = lanes

    def partitions_max(self, assigned: int) -> int:
        """Return how many of the assigned partitions a batch may hold."""
        return -(-assigned // len(self._lanes)) if self._is_slow else assigned

    @property
    def has_idle_lane(self) -> bool:
        """Whether some lane is not at work."""
        return len(self._at_work) < len(self._lanes)

    @property
    def may_begin(self) -> bool:
        """Whether a further lane may take a batch now."""
        return all(timer is None or lane in self._leaves_more for lane, timer in self._at_work.items())

    def began(self, lane: int, *, leaves_more: bool) -> None:
        """Note that a lane has taken a batch.

        leaves_more: it has left messages that another lane may take.
        """
        self._at_work[lane] = self._call_later(PATIENCE_SECONDS, lambda: self._patience_ends(lane))
        if leaves_more:
            self._leaves_more.add(lane)
            self.wake()

    def ended(self, lane: int) -> None:
        """Note that a lane has settled its batch, and looks for another."""
        self._leaves_more.discard(lane)
        timer = self._at_work.pop(lane)
        if timer is not None:
            timer.cancel()
        self._is_slow = timer is None

    def wake(self) -> None:
        """Wake a lane, unless one at work may still take what waits."""
        if self.may_begin:
            for number, lane in enumerate(self._lanes):
                if number not in self._at_work:
                    lane.wake.set()
                    return

    def _patience_ends(self, lane: int) -> None:
        self._at_work[lane] = None
        self._is_slow = True
        self.wake()
