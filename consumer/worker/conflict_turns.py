"""Decides when transactions run one at a time, after a conflict.

Statements that run in message order lock rows in that order, so two batches easily wait for each other. Each deadlock
costs PostgreSQL's `deadlock_timeout` (1 s) and undoes a batch. Transactions that take turns cannot meet.
"""

from __future__ import annotations

import zlib

_FEW, _MANY = 8, 1024  # transactions


def turn_of(app: str) -> int:
    """Return the number under which an App's workers take turns; 32 bits."""
    return zlib.crc32(app.encode()) - (1 << 31)


class Turns:
    """Counts the transactions of one lane that still take turns.

    Each conflict asks for twice as many as the one before it; a transaction that goes through without a turn asks for
    one fewer the next time.
    """

    __slots__ = ("_left", "_next")

    def __init__(self) -> None:
        self._left = 0
        self._next = _FEW

    @property
    def is_needed(self) -> bool:
        """Whether the next transaction takes its turn."""
        return self._left > 0

    def conflicted(self) -> None:
        """A transaction and another one wanted the same rows."""
        self._left = self._next
        self._next = min(_MANY, self._next * 2)

    def timed_out(self) -> None:
        """Note that a transaction waited too long for its turn.

        Another one is slow, and waiting costs more than a deadlock.
        """
        self._left = 0

    def committed(self) -> None:
        """A transaction was committed."""
        if self._left:
            self._left -= 1
        else:
            self._next = max(_FEW, self._next - 1)
