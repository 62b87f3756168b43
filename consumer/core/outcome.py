"""How a message ends for one handler: a closed set.

Knows no table and no counter: `transaction/result.py` turns outcomes into rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias


class Cause(StrEnum):
    """Why a message was recognized as a duplicate."""

    BATCH = "batch"  # the same id came earlier in the same batch
    PRECHECK = "precheck"  # Redis had the mark of a committed transaction
    LEDGER = "ledger"  # PostgreSQL's unique key had the id
    DEAD_LETTER = "dead_letter"  # its first delivery is a dead letter


class Reason(StrEnum):
    """Why a message is a dead letter."""

    UNREADABLE = "unreadable"  # not the declared type
    NO_VALUE = "no_value"  # a null value for a handler that does not take None
    NO_MESSAGE_ID = "no_message_id"  # none where one is required, or it is empty
    AMBIGUOUS_MESSAGE_ID = "ambiguous_message_id"  # several id headers
    BAD_HEADER = "bad_header"  # a header key that is not UTF-8
    ID_CONFLICT = "id_conflict"  # the id was used before with another payload
    REJECTED = "rejected"  # the handler raised Reject
    FAILED = "failed"  # the handler kept raising
    TOO_OLD = "too_old"  # older than the ledger remembers: it may have been applied
    EFFECT_UNKNOWN = "effect_unknown"  # another system was called, and it is unknown what it has done
    BEHIND = "behind"  # it waits behind a dead letter of its key; its handler was not called


@dataclass(frozen=True, slots=True)
class Applied:
    """The handler's effects are stored, together with the claim."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Nothing to do: the handler has settled this id already.

    label: its name in counts.
    """

    cause: Cause
    label: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", f"duplicate:{self.cause.value}")


@dataclass(frozen=True, slots=True)
class Dead:
    """A dead letter, stored with its bytes; the handler left no effects.

    kind: class of the exception, or SQLSTATE. trace: one line of kind, place and schema objects, then the frames; no
    values.
    """

    reason: Reason
    error: str
    kind: str = ""
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Seen by a handler that opted out of the guarantee."""


@dataclass(frozen=True, slots=True)
class RetryLater:
    """The attempt failed; the message waits for its next attempt."""

    delay_seconds: float
    error: str


Outcome: TypeAlias = Applied | Duplicate | Dead | Skipped | RetryLater

APPLIED = Applied()
SKIPPED = Skipped()
DUPLICATE = {cause: Duplicate(cause) for cause in Cause}
