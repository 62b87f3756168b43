"""How many messages of a batch run in one transaction while transactions meet on the same rows.

Statements that run in message order lock rows in that order, so two large transactions easily wait for each other. Each
deadlock costs PostgreSQL's `deadlock_timeout` (1 s). Smaller transactions hold their locks for less time.
"""

from __future__ import annotations


class BatchSize:
    """A limit that halves with each conflict and grows by a quarter with each success."""

    __slots__ = ("_most", "now")

    def __init__(self, most: int) -> None:
        self._most = most
        self.now = most

    def met(self, size: int) -> None:
        """A transaction of so many messages met another one."""
        self.now = max(1, min(self.now, size) // 2)

    def settled(self) -> None:
        """A transaction went through."""
        if self.now < self._most:
            self.now = min(self._most, self.now + self.now // 4 + 1)
