"""Select dead letters, and erase their messages.

Knows what must be confirmed; the caller asks the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from consumer.core.audit import ActedBy
from consumer.core.suggestions import UnknownName
from consumer.dead_letters.retry import Filters
from consumer.postgres import dead_letter_actions, dead_letter_queries
from consumer.postgres.dead_letter_queries import Matching
from consumer.postgres.protocol import Connection

_AT_A_TIME = 500
_ALL = 2**31 - 1


class Selection(NamedTuple):
    """Dead letters to erase. open: how many of them are not settled."""

    numbers: Sequence[int]
    open: int

    @property
    def question(self) -> str:
        """What the operator must confirm."""
        note = f" ({self.open:,} of them are open, and can only be discarded then)" if self.open else ""
        return f"erase {len(self.numbers):,} dead letters for good{note}?"


@dataclass(frozen=True, slots=True)
class Erased:
    """What was erased. asked: dead letters that were selected."""

    asked: int
    erased: int
    open: int

    def as_dict(self, *, dry_run: bool) -> dict[str, Any]:
        """Return the answer of `--json`."""
        return {"asked": self.asked, "erased": self.erased, "open": self.open, "dry_run": dry_run}


async def select(connection: Connection, app: str, filters: Filters, key: bytes | None) -> Selection:
    """Select dead letters of any state that are not erased.

    Raises UnknownName for a number that is not of the App.
    """
    matching = Matching(
        app,
        filters.handler,
        filters.topic,
        filters.reason,
        _ALL,
        group=filters.group,
        older_than_seconds=filters.older_than_seconds,
        newer_than_seconds=filters.newer_than_seconds,
    )
    open_by_number = await dead_letter_queries.erasable(connection, matching, key)
    if filters.dead_letters is not None:
        known = await dead_letter_queries.standings(connection, filters.dead_letters)
        for number in filters.dead_letters:
            if number not in known or known[number].app != app:
                raise UnknownName(
                    f"LETTER: no dead letter {number} of App {app!r}; see `consumer dlq list APP --state all`"
                )
        open_by_number = {number: open_by_number[number] for number in filters.dead_letters if number in open_by_number}
    return Selection(list(open_by_number), sum(open_by_number.values()))


async def erase(connection: Connection, selection: Selection, by: ActedBy) -> Erased:
    """Erase them in small transactions, each with its record."""
    erased = 0
    for start in range(0, len(selection.numbers), _AT_A_TIME):
        erased += await dead_letter_actions.erase(connection, selection.numbers[start : start + _AT_A_TIME], by)
    return Erased(len(selection.numbers), erased, selection.open)
