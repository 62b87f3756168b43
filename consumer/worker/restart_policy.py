"""Decides whether and when an ended worker process is started again.

Pure: judges exit codes and times, and starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class RestartAfter:
    """Start it again after this many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Restarts do not help: end the other workers and exit non-zero."""

    why: str


RestartDecision: TypeAlias = RestartAfter | GiveUp

EXIT_MISCONFIGURED = 2
EXIT_STALLED = 75  # alive, and consumed nothing; or a handler that cannot be stopped
EXIT_OUTGROWN = 76  # drained, because it used too much memory
EXIT_DEAD_LETTERS = 77  # stopped at the limit of dead letters: a restart would stop there too


def reason_of(exit_code: int) -> str:
    """Return why a process ended on its own, as metrics name it.

    exit_code: as of a process, negative for a signal.
    """
    if exit_code < 0:
        return "killed"
    reasons = {
        EXIT_MISCONFIGURED: "misconfigured",
        EXIT_STALLED: "stalled",
        EXIT_OUTGROWN: "memory",
        EXIT_DEAD_LETTERS: "dead_letters",
    }
    return reasons.get(exit_code, "failed")


@dataclass(slots=True)
class Restarts:
    """The policy for one worker slot: exponential backoff.

    A healthy run resets it.
    """

    in_a_row_max: int = 5
    healthy_seconds: float = 30.0
    first_seconds: float = 0.5
    longest_seconds: float = 15.0
    _in_a_row: int = field(default=0, init=False)

    def ended(self, ran_seconds: float, exit_code: int) -> RestartDecision:
        """Decide what follows when a worker ended without being stopped.

        exit_code: as of a process, negative for a signal. A worker that found itself misconfigured is not tried again.
        One that has grown too large is replaced at once, unless it did so soon after its start: then a new one will, too.
        """
        if exit_code == EXIT_MISCONFIGURED:
            return GiveUp("it cannot start as it is configured")
        if exit_code == EXIT_OUTGROWN and ran_seconds >= self.healthy_seconds:
            self._in_a_row = 0
            return RestartAfter(0.0)
        if exit_code == EXIT_DEAD_LETTERS:
            return GiveUp("it would have made too many dead letters")
        self._in_a_row = 1 if ran_seconds >= self.healthy_seconds else self._in_a_row + 1
        if self._in_a_row > self.in_a_row_max:
            return GiveUp(f"{self._in_a_row} ends in a row, each within {self.healthy_seconds:g} s of its start")
        return RestartAfter(min(self.longest_seconds, self.first_seconds * 2.0 ** min(self._in_a_row - 1, 30)))
