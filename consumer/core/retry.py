"""When a failed message is tried again.

Pure: attempts, errors and a random number are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a message whose handler raises is tried again, and when.

    attempts: calls in all, with the first; 1 means no retry. base, cap: seconds; the wait before attempt n+1 is random,
    between half and all of ``min(cap, base * 2**(n-1))`` (equal jitter). on: exceptions that are retried; any other
    makes the message a dead letter at once.

    Not only this message runs again: a batch that fails runs again as a whole, and its effects still count once.
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

    def delay_seconds(self, error: BaseException, attempts: int, random: float) -> float | None:
        """Return the seconds until the next attempt; None when there is none.

        attempts: failed attempts so far, at least 1. random: in [0, 1).
        """
        if attempts >= self.attempts or not isinstance(error, self.on):
            return None
        return self.pause_seconds(attempts, random)

    def pause_seconds(self, attempts: int, random: float) -> float:
        """Return the seconds after attempt `attempts`, without a limit of attempts.

        random: in [0, 1).
        """
        longest = min(self.cap, self.base * 2.0 ** min(attempts - 1, 60))  # 2**60 is past any cap; no overflow
        return longest * (0.5 + random / 2)
