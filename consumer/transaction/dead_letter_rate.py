"""Limits the share of dead letters, for example after a bad deploy.

Pure: counts over the recent messages of a handler. Limitations: it knows this process only, from its start.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from consumer.core.errors import ConsumerError

WINDOW = 1000  # recent messages of a handler
DEAD_LETTERS_MIN = 50  # below, a share means nothing: a small topic may have a handful of bad messages


class TooManyDeadLetters(ConsumerError):
    """The share of dead letters is above the limit.

    Nothing more is settled; the worker ends and is not started again. handler, reason, count: whose they are, the
    commonest reason with its place or field, and how many there are of it.
    """

    def __init__(self, text: str, handler: str, reason: str, count: int) -> None:
        super().__init__(text)
        self.handler = handler
        self.reason = reason
        self.count = count


class DeadLetterRateLimit:
    """Limits the share of dead letters among a handler's recent messages.

    limit: from 0 to 1. 0: not one dead letter is accepted. 1: there is no limit, since a share cannot be above it.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._recent: dict[str, deque[tuple[int, Counter[str]]]] = {}  # handler -> batches: messages, dead by reason

    def check(self, handler: str, messages: int, reasons: Iterable[str]) -> None:
        """Raise TooManyDeadLetters if settling these messages exceeds the limit.

        reasons: of the dead letters among them.
        """
        dead = Counter(reasons)
        if self._limit >= 1 or not dead:
            return
        total = messages
        for count, before in self._recent.get(handler, ()):
            total += count
            dead += before
        bad = dead.total()
        if bad > self._limit * total and (bad >= DEAD_LETTERS_MIN or self._limit == 0):
            reason, most = dead.most_common(1)[0]
            raise TooManyDeadLetters(
                f"handler {handler!r} would make {bad:,} dead letters of its last {total:,} messages, more than the limit of "
                f"{self._limit:g} (most for the reason {reason!r}: {most:,}); nothing of this batch was settled. Mend the handler, "
                "or set CONSUMER_DEAD_LETTER_LIMIT=1 if they are to become dead letters all the same",
                handler,
                reason,
                most,
            )

    def settled(self, handler: str, messages: int, reasons: Iterable[str]) -> None:
        """Count what is committed."""
        if self._limit >= 1:
            return
        recent = self._recent.setdefault(handler, deque())
        recent.append((messages, Counter(reasons)))
        total = sum(count for count, _ in recent)
        while len(recent) > 1 and total - recent[0][0] >= WINDOW:
            total -= recent.popleft()[0]
