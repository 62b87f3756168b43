"""Decides whether a call of another system is made.

    intent      result    age                        step
    none                                             call: the intent is committed first
    committed   known                                settle: the call is not made again
    committed   unknown   the key is surely known    call again, with the same key
    committed   unknown   older                      ask the other system, or leave it to an operator

Pure. "Surely known" leaves a margin of a tenth of the time for which the other system remembers a key, and of at least
30 s: a call begins some seconds after its intent.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

_MARGIN_SECONDS_MIN = 30.0


class Intent(NamedTuple):
    """A call that was begun, as the database has it.

    is_new: this transaction has stored it. key: as the first call has it. age_seconds: since the first call was begun.
    attempts: calls that were begun. payload: the fingerprint of the bytes that the first call was for. result: None if
    unknown.
    """

    is_new: bool
    key: str
    age_seconds: float
    attempts: int
    payload: int
    result: bytes | None


class Step(Enum):
    """What is done for a message of an effect."""

    CALL = "call"
    ASK = "ask what was done"
    SETTLE = "settle"
    LEAVE = "leave it to an operator"
    WAIT = "wait for another payload of its id"


def surely_known_seconds(remembers: float) -> float:
    """Return up to which age a call may be made again.

    Both in seconds.
    """
    return max(0.0, remembers - max(_MARGIN_SECONDS_MIN, remembers / 10))


def next_step(intent: Intent, remembers: float, *, can_ask: bool, payload: int | None) -> Step:
    """Return what is done next.

    remembers: seconds. can_ask: whether the effect has a function that asks. payload: the fingerprint of the message's
    bytes; None where other bytes may be the same message.
    """
    if intent.is_new:
        return Step.CALL
    if payload is not None and payload != intent.payload:
        return Step.WAIT  # until the ledger has one of the two; then the other one is a conflict
    if intent.result is not None:
        return Step.SETTLE
    if intent.age_seconds < surely_known_seconds(remembers):
        return Step.CALL
    return Step.ASK if can_ask else Step.LEAVE


def may_withdraw(intent: Intent) -> bool:
    """Return whether a call that has done nothing leaves nothing open.

    It does where an earlier call for the message is without a result.
    """
    return intent.attempts == 1
