"""When to ask Redis. Knows successes, failures and hits as they are reported; knows no clock and no Redis."""

from __future__ import annotations


class Breaker:
    """Closed while the service answers; open from its first failure until a probe made in the background succeeds.

    Nobody waits for an open breaker, so an outage costs the one call that found it.
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
    """Asks for every batch while hits are worth it, and for one batch in `every` while there are next to none.

    The share of hits is an average that forgets with a half-life of about seven asked batches.
    """

    def __init__(self, worth_it: float = 0.1, every: int = 16) -> None:
        self._worth_it = worth_it
        self._every = every
        self._share = 1.0  # innocent until measured: begin by asking
        self._skipped = 0

    def should_ask(self) -> bool:
        """Whether to ask for the next batch."""
        if self._share >= self._worth_it or self._skipped + 1 >= self._every:
            self._skipped = 0
            return True
        self._skipped += 1
        return False

    def observed(self, asked: int, hits: int) -> None:
        """Tell what came of asking for `asked` ids."""
        if asked:
            share = hits / asked
            # A burst of duplicates (a replay) must not wait for an average to climb.
            self._share = share if share > self._share else self._share * 0.9 + share * 0.1
