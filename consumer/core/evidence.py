"""Decides what a failure is, from its error class and from evidence.

A SQLSTATE says what an error may be (sqlstate.py). Three observations say what it is: whether the connection still
answers, whether the failure repeats when its message is alone, and whether other messages of the same handler succeed.
`judge` is the table; `Evidence` is what one process has observed. Pure: no clock, no driver.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from consumer.core.message import Partition
from consumer.core.sqlstate import Meaning

ALIKE_MIN = 5  # messages failing in one way, with no success between: the handler is at fault, not the messages
_REMEMBERED_MAX = 64  # failing messages of one handler and kind; only whether there are ALIKE_MIN matters


class Others(Enum):
    """How other messages of the handler ended since the first failure."""

    SUCCEED = "some succeeded"
    FAIL_ALIKE = "several failed in the same way and none succeeded"
    UNKNOWN = "too few to decide"


class FailureVerdict(Enum):
    """What to do about a failure."""

    AGAIN = "run the batch again at once"
    OUTAGE = "drop the connection, wait, run the batch again"
    ISOLATE = "run in smaller parts, to find the message"
    COUNT = "an attempt of the message: the retry policy decides"
    WAIT = "the message waits; no attempt is counted"


_LOST = {(meaning, alone): FailureVerdict.OUTAGE for meaning in Meaning for alone in (False, True)}
_MANY = {
    Meaning.CONFLICT: FailureVerdict.AGAIN,
    Meaning.LOCKED: FailureVerdict.AGAIN,
    Meaning.OUTAGE: FailureVerdict.OUTAGE,
    Meaning.INTERNAL: FailureVerdict.ISOLATE,
    Meaning.DEPLOYMENT: FailureVerdict.ISOLATE,
    Meaning.STATE: FailureVerdict.ISOLATE,
    Meaning.MESSAGE: FailureVerdict.ISOLATE,
    Meaning.CODE: FailureVerdict.ISOLATE,
}
_C, _W = FailureVerdict.COUNT, FailureVerdict.WAIT
_ALONE = {  #                 SUCCEED  FAIL_ALIKE  UNKNOWN
    Meaning.CONFLICT: dict(zip(Others, (_C, _W, _W), strict=True)),  # repeated: its own statements cause it
    Meaning.LOCKED: dict(zip(Others, (_C, _W, _W), strict=True)),
    Meaning.OUTAGE: dict(zip(Others, (_C, _W, _W), strict=True)),  # the server works for the others
    Meaning.INTERNAL: dict(zip(Others, (_C, _W, _W), strict=True)),
    Meaning.DEPLOYMENT: dict(zip(Others, (_C, _W, _W), strict=True)),
    Meaning.STATE: dict(zip(Others, (_C, _W, _W), strict=True)),
    Meaning.MESSAGE: dict(zip(Others, (_C, _W, _C), strict=True)),
    # A bug fails for every message too, but no waiting heals it: the policy decides, the dead-letter limit stops it.
    Meaning.CODE: dict(zip(Others, (_C, _C, _C), strict=True)),
}


def judge(may_be: Meaning, *, answers: bool, alone: bool, others: Others) -> FailureVerdict:
    """Decide about a failure. Defined for every combination.

    Args:
        may_be: what the error's class allows it to be.
        answers: whether the connection still answers.
        alone: whether the message failed by itself, so that nothing else can have caused it. For CONFLICT, LOCKED and
            OUTAGE: several times in a row.
        others: see `Evidence.others`.
    """
    if not answers:
        return _LOST[may_be, alone]
    return _ALONE[may_be][others] if alone else _MANY[may_be]


class FailureCause(NamedTuple):
    """Why a message waits.

    error: its kind and its place, never a value. since: Unix seconds. systemic: the handler or a service is at fault,
    not the message.
    """

    error: str
    since: float
    systemic: bool


@dataclass(slots=True)
class _Handler:
    successes: int = 0
    failing: dict[str, set[tuple[Partition, int]]] = field(default_factory=dict)  # kind -> messages, since a success


class Evidence:
    """Successes of each handler, and failures since the last one.

    Limitations: it knows this process only, until `succeeded` reports what others have committed. A restart forgets it:
    then a message waits once more, which loses nothing.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, _Handler] = {}
        self.is_needed = False  # whether anything has failed; until then, successes need not be reported

    def _of(self, handler: str) -> _Handler:
        record = self._handlers.get(handler)
        if record is None:
            record = self._handlers[handler] = _Handler()
        return record

    def succeeded(self, handler: str) -> None:
        """Count a commit with messages of a handler; called once a batch."""
        record = self._of(handler)
        record.successes += 1
        if record.failing:
            record.failing.clear()

    def mark(self, handler: str) -> int:
        """Return the number of successes; kept with a message that fails first."""
        self.is_needed = True
        return self._of(handler).successes

    def failed(self, handler: str, kind: str, partition: Partition, offset: int) -> None:
        """Record that a message failed. kind: equal for similar failures."""
        messages = self._of(handler).failing.setdefault(kind, set())
        if len(messages) < _REMEMBERED_MAX:
            messages.add((partition, offset))

    def others(self, handler: str, kind: str, mark: int) -> Others:
        """Return how other messages of the handler ended since `mark`."""
        record = self._of(handler)
        if record.successes > mark:
            return Others.SUCCEED
        return Others.FAIL_ALIKE if len(record.failing.get(kind, ())) >= ALIKE_MIN else Others.UNKNOWN
