"""Name the outcomes that a replay counts, and say what they mean.

Every delivery ends in exactly one of them. The findings, the terminal and the HTML page take them from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class CountedOutcome(NamedTuple):
    """How an outcome is called, and what it means."""

    title: str
    meaning: str


# The order is that of the JSON report and of the terminal.
OUTCOMES: Mapping[str, CountedOutcome] = {
    "applied": CountedOutcome("applied", "the ledger holds its id as applied"),
    "dead_lettered": CountedOutcome("dead letters", "kept in the database with its bytes and the reason"),
    "skipped": CountedOutcome("skipped", "its handler opted out of the ledger"),
    "missing": CountedOutcome("missing", "in the topic, but not in the ledger"),
    "repeated": CountedOutcome("repeated", "delivered again, with an id that is counted as missing already"),
    "conflicts": CountedOutcome("conflicts", "its id was used before with another payload"),
    "unreadable": CountedOutcome("unreadable", "its payload or its id cannot be read"),
    "unknown": CountedOutcome("cannot tell", "from before the ledger began, or otherwise in doubt"),
    "applied_now": CountedOutcome("applied now", "applied by this replay"),
    "dead_lettered_now": CountedOutcome("dead letters now", "made a dead letter by this replay"),
}
OF_THIS_RUN = ("applied_now", "dead_lettered_now")  # with --apply
