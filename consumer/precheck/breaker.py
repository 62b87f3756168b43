"""Decides when to ask Redis.

Pure: successes, failures and hits are reported to it.
"""

from __future__ import annotations


class Breaker:
    """Open from the first failure until a probe in the background succeeds.

    No caller waits for an open breaker, so an outage costs one call.
    """

    def __init__(self, first_pause_seconds: float = 0.5, longest_pause_seconds: float = 30.0) -> None:
        self._first = first_pause_seconds
        self._longest = longest_pause_seconds
        self._failures = 0
        self.is_open = False

    def failed(self) -> float:
        """Open it, and return the seconds to wait before the next probe."""
        self.is_open = True
        self._failures += 1
        return min(self._longest, self._first * 2.0 ** min(self._failures - 1, 30))

    def succeeded(self) -> None:
        """Close it."""
        self.is_open = False
        self._failures = 0


class Sampler:
    """Asks for every batch while hits are frequent, else rarely.

    Rarely is one batch in `every`. The share of hits is a moving average with a half-life of about seven asked batches.
    worth_it: the least share for which asking pays.
    """

    def __init__(self, worth_it: float = 0.1, every: int = 16) -> None:
        self._worth_it = worth_it
        self._every = every
        self._share = 1.0  # ask at first, to measure
        self._skipped = 0

    def should_ask(self) -> bool:
        """Return whether to ask for the next batch."""
        if self._share >= self._worth_it or self._skipped + 1 >= self._every:
            self._skipped = 0
            return True
        self._skipped += 1
        return False

    def observed(self, asked: int, hits: int) -> None:
        """Record the hits among `asked` ids."""
        if asked:
            share = hits / asked
            # A burst of duplicates (a replay) must not wait for the average to rise.
            self._share = share if share > self._share else self._share * 0.9 + share * 0.1
