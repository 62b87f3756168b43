"""Decides when a further lane of a database takes a batch.

A lane that ends its batch takes everything that waits: with one lane at work, transactions are few and latency is low. A
further lane helps when there is more than one batch holds, or when a batch takes long: then one computes while another
waits for PostgreSQL. So a further lane begins when the last one to begin has left messages behind, or is at work for
PATIENCE_SECONDS. Measured with two and four lanes that always begin: docs/explanation/decisions/speed.md.
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

    def connect(self, lanes: Sequence[Lane]) -> None:
        """Set the lanes of the database."""
        self._lanes = lanes

    @property
    def may_begin(self) -> bool:
        """Whether a lane that is not at work may take a batch now."""
        return all(timer is None for timer in self._at_work.values())

    def began(self, lane: int, *, leaves_more: bool) -> None:
        """Note that a lane has taken a batch. leaves_more: it has left messages that another lane may take."""
        if leaves_more:
            self._let_begin(lane)
        else:
            self._at_work[lane] = self._call_later(PATIENCE_SECONDS, lambda: self._let_begin(lane))

    def ended(self, lane: int) -> None:
        """Note that a lane has no batch any more; it looks for the next one itself."""
        timer = self._at_work.pop(lane)
        if timer is not None:
            timer.cancel()

    def wake(self) -> None:
        """Wake a lane to look for a batch, unless one at work may still take what waits."""
        if self.may_begin:
            for number, lane in enumerate(self._lanes):
                if number not in self._at_work:
                    lane.wake.set()
                    return

    def _let_begin(self, lane: int) -> None:
        self._at_work[lane] = None
        self.wake()
