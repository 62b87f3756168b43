"""The record of operators' actions: what an entry holds.

Knows names and numbers. Invariant: no part of a message is in an entry, since everyone who may read figures may read
it. Limitations: who an operator is was said by the command, or is the user of its system; the database user is
PostgreSQL's own answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# Every action that is recorded, by the command that does it.
ACTIONS = (
    "dlq retry",
    "dlq edit",
    "dlq discard",
    "dlq erase",
    "dlq view",  # of its message, in the console
    "outbox resume",
    "outbox discard",
    "positions move",
    "positions adopt",
    "positions begin-here",
    "positions accept-id-rule",
    "pause",
    "resume",
    "purge",
    "replay apply",
    "rename handler",
)


class ActedBy(NamedTuple):
    """Who acts, and why.

    why: empty where no reason was given.
    """

    operator: str
    why: str = ""


class Entry(NamedTuple):
    """One action, as it is recorded.

    app: None for an action on all applications of a database. result: one or few words. numbers: counts and positions.
    """

    action: str
    by: ActedBy
    result: str
    app: str | None
    topic: str | None = None
    partition: int | None = None
    stream: int | None = None
    numbers: Mapping[str, int | float | None] = {}


def known_actions() -> list[str]:
    """Return what `consumer audit --action` takes."""
    return sorted({*ACTIONS, *(action.split(" ")[0] for action in ACTIONS)})
