"""Decides what became of a message for a handler.

Limitations: the ledger forgets old messages, and a message that is being applied at this moment is unsettled.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple

from consumer.core.dead_letters import DeadLetterState
from consumer.core.delivery import Delivery
from consumer.core.message import Partition


class StoredState(NamedTuple):
    """What is stored of a message for one handler; None: nothing.

    claimed_by: the record whose claim holds the id. same_payload: it had this one's payload. attempts: that failed.
    """

    applied_at: Any = None
    same_payload: bool = False
    claimed_by: tuple[Partition, int] | None = None
    letter: int | None = None
    letter_state: str | None = None
    reason: str | None = None
    died_at: Any = None
    attempts: int | None = None


NOTHING = StoredState()


class State(StrEnum):
    """What became of a message for one handler."""

    APPLIED = "applied"
    DUPLICATE = "duplicate"  # another record with this id was settled
    DEAD_LETTERED = "dead-lettered"
    WAITING = "waiting"  # tried again later, or behind a dead letter
    DISCARDED = "discarded"
    SKIPPED = "skipped"  # by a handler with idempotent=False
    UNSETTLED = "unsettled"  # no worker has settled it yet
    UNKNOWN = "unknown"  # the position has passed it, and the ledger does not hold it


class HandlerState(NamedTuple):
    """The state of a message for one handler.

    first: the record that was settled with this id, of a duplicate. problem: why it cannot be applied as it is.
    """

    handler: str
    id: str
    state: State
    at: Any = None
    first: str | None = None
    attempts: int | None = None
    letter: int | None = None
    reason: str | None = None
    problem: str | None = None


_OF_LETTER = {
    DeadLetterState.DEAD: State.DEAD_LETTERED,
    DeadLetterState.WAITING: State.WAITING,
    DeadLetterState.DISCARDED: State.DISCARDED,
}


def state_of(delivery: Delivery, stored: StoredState, position: int | None, problem: str | None) -> HandlerState:
    """Return the state of an identified message.

    position: of its partition. problem: a fault in its form, or None.
    """
    name, id = delivery.handler.name, delivery.id.hex()
    place = (delivery.partition, delivery.record.offset)
    is_passed = position is not None and delivery.record.offset < position
    letter = None if stored.letter_state is None else _OF_LETTER.get(DeadLetterState(stored.letter_state))
    if letter is not None:
        return HandlerState(
            name, id, letter, stored.died_at, letter=stored.letter, reason=stored.reason, problem=problem
        )
    if stored.applied_at is not None and stored.claimed_by == place:
        return HandlerState(name, id, State.APPLIED, stored.applied_at, letter=stored.letter)
    if stored.claimed_by is not None and stored.same_payload and stored.claimed_by != place:
        first = place_text(*stored.claimed_by)
        return HandlerState(name, id, State.DUPLICATE if is_passed else State.UNSETTLED, stored.applied_at, first)
    if stored.letter_state == DeadLetterState.APPLIED and delivery.handler.idempotent:
        # By a retry, whatever the ledger still holds.
        return HandlerState(name, id, State.APPLIED, letter=stored.letter)
    if stored.attempts and not is_passed:
        return HandlerState(name, id, State.WAITING, attempts=stored.attempts)
    if not is_passed:
        return HandlerState(name, id, State.UNSETTLED, problem=problem)
    return HandlerState(name, id, State.UNKNOWN if delivery.handler.idempotent else State.SKIPPED)


def place_text(partition: Partition, offset: int) -> str:
    """Return topic:partition:offset."""
    return f"{partition.topic}:{partition.partition}:{offset}"
