"""Dead letters: their states, what they block, and kinds of errors.

Knows states and texts; knows no table. A *chain* is a dead letter whose handler kept failing, or whose effect in another
system is unknown, and the later messages of its unit of order (the key, or the partition), which become dead letters too
and wait behind it. Only the first of a
chain may run. A dead letter for any other reason concerns its message alone, and blocks nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from enum import Enum, StrEnum
from hashlib import blake2b
from typing import NamedTuple

from consumer.core.errors import Misconfigured
from consumer.core.message import Record
from consumer.core.outcome import Applied, Dead, Duplicate, Outcome, Reason, RetryLater, Skipped


class DeadLetterState(StrEnum):
    """The state of a dead letter.

    Dead and waiting ones are open; the others are settled for good, and are kept as a record.
    """

    DEAD = "dead"  # an operator must decide
    WAITING = "waiting"  # behind a dead one of its key; it has never run
    APPLIED = "applied"  # by a retry
    DISCARDED = "discarded"


class KeyHold(Enum):
    """Whether dead letters hold a key, within the transaction that asks."""

    HELD = "held"  # until this transaction ends
    BUSY = "busy"  # another transaction is settling them
    FREE = "free"


class Transition(NamedTuple):
    """A dead letter after an attempt.

    Its state, whether its key stays blocked by it, and whether the next one of its chain may run.
    """

    state: DeadLetterState
    keeps_key_blocked: bool
    releases_next: bool


def blocks_key(verdict: Dead) -> bool:
    """Return whether later messages of its ordering key wait for it."""
    return verdict.reason in (Reason.FAILED, Reason.EFFECT_UNKNOWN, Reason.BEHIND)


def next_state(outcome: Outcome | None) -> Transition:
    """Return what a dead letter becomes after an attempt.

    It is the first one of its chain, or has no chain. outcome: None for applied.
    """
    match outcome:
        case Dead() if blocks_key(outcome):
            return Transition(DeadLetterState.DEAD, keeps_key_blocked=True, releases_next=False)
        case Dead():
            return Transition(
                DeadLetterState.DEAD, keeps_key_blocked=False, releases_next=True
            )  # it concerns this message alone
        case RetryLater():
            return Transition(DeadLetterState.DEAD, keeps_key_blocked=True, releases_next=False)
        case None | Applied() | Duplicate() | Skipped():
            return Transition(DeadLetterState.APPLIED, keeps_key_blocked=False, releases_next=True)


def ordering_key_hash(order: str, record: Record) -> bytes | None:
    """Return 16 bytes that stand for an ordering key in every process.

    None for a message that is ordered with nothing.
    """
    if order == "none" or (order == "key" and record.key is None):
        return None
    digest = blake2b(digest_size=16)
    digest.update(f"{record.topic}:{record.partition}:".encode())
    if order == "key":
        digest.update(b"k" + (record.key or b""))
    return digest.digest()


# What differs between two errors of one kind, the widest first: quoted text, ids, hexadecimal, numbers.
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
_IDS = re.compile(
    r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b|\b(?=[a-zA-Z]*[0-9])[0-9a-fA-F]{8,}\b|0x[0-9a-fA-F]+"
)
_NUMBERS = re.compile(r"[0-9]+(?:[.,][0-9]+)*")
_TEXT_MAX = 200


def normalized(text: str) -> str:
    """Return an error's text without what belongs to one message."""
    text = _QUOTED.sub("'…'", text)
    text = _NUMBERS.sub("N", _IDS.sub("N", text))
    return " ".join(text.split())[:_TEXT_MAX]


def group_of(handler: str, reason: str, kind: str, error: str) -> str:
    """Return ten hexadecimal digits, the same for errors of one kind.

    kind: the exception's class, or the SQLSTATE.
    """
    parts = "\0".join((handler, reason, kind, normalized(error)))
    return blake2b(parts.encode("utf-8", "replace"), digest_size=5).hexdigest()


_AGE = re.compile(r"([0-9]{1,9})(s|m|h|d|w)")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def age_seconds(text: str, option: str) -> int:
    """Return the seconds of an age.

    For example 90s, 10m, 24h, 7d or 2w.

    Raises Misconfigured, naming the option.
    """
    match = _AGE.fullmatch(text)
    if match is None:
        raise Misconfigured(f"{option} {text[:40]!r}: not an age; write 10m, 24h or 7d, for example")
    return int(match[1]) * _UNITS[match[2]]


def edit_fault(applied: bool, fingerprint: int | None, expected: Collection[int]) -> str:
    """Return what is wrong with an edit's row in the ledger.

    The edit was applied under a new id. Empty for nothing. fingerprint: of the row; None without a row. expected:
    fingerprints of the edited value; empty where the value is not stored.
    """
    if fingerprint is None:
        return "the ledger has no row of its new id"
    if not applied:
        return "the ledger's row of its new id is that of a dead letter"
    if expected and fingerprint not in expected:
        return "the ledger's row of its new id is of another payload"
    return ""
