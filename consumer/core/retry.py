"""When a failed message is tried again. Knows attempts and errors; knows no clock, and chance comes in as a draw."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retry:
    """How often, and how long apart, a message whose handler raises is tried again.

    attempts: runs in all, the first one included; 1 means never again. base, cap: seconds; the wait before attempt n+1
    is drawn between half and all of ``min(cap, base * 2**(n-1))`` (equal jitter: it never hammers and never synchronises).
    on: the exceptions worth another attempt; any other makes the message a dead letter at once.

    A caller may not assume that only this message is run again: a batch that fails runs again as a whole, and its
    effects still count once.
    """

    attempts: int = 5
    base: float = 0.2
    cap: float = 30.0
    on: tuple[type[BaseException], ...] = (Exception,)

    def __post_init__(self) -> None:
        kinds = (self.on,) if isinstance(self.on, type) else self.on
        if not isinstance(kinds, tuple | list) or not all(
            isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds
        ):
            raise ValueError(f"Retry(on={self.on!r}): a tuple of exception classes")
        object.__setattr__(self, "on", tuple(kinds))
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise ValueError(f"Retry(attempts={self.attempts!r}): a whole number of at least 1")
        numbers = all(isinstance(number, int | float) for number in (self.base, self.cap))
        if not numbers or not 0 <= self.base <= self.cap:
            raise ValueError(f"Retry(base={self.base!r}, cap={self.cap!r}): seconds, 0 <= base <= cap")

    def delay_seconds(self, error: BaseException, attempts: int, draw: float) -> float | None:
        """Seconds until the next attempt, or None when there is none.

        attempts: runs that have failed so far, at least 1. draw: a number in [0, 1).
        """
        if attempts >= self.attempts or not isinstance(error, self.on):
            return None
        return self.pause_seconds(attempts, draw)

    def pause_seconds(self, attempts: int, draw: float) -> float:
        """Seconds between attempt `attempts` and the next, whether or not there is one. draw: a number in [0, 1)."""
        longest = min(self.cap, self.base * 2.0 ** min(attempts - 1, 60))  # 2**60 is past any cap; no overflow
        return longest * (0.5 + draw / 2)
