"""Which generations of the ledger a purge drops, and why.

Pure: the state of the ledger and what the logs hold come in as arguments; times are seconds since 1970 UTC.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from consumer.core.dead_letters import age_seconds
from consumer.core.errors import Misconfigured
from consumer.core.message import Partition
from consumer.core.retention import HOUR, Generation, LedgerState, RotateGeneration, Step, Wait

_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?(e-?[0-9]+)?", re.IGNORECASE | re.ASCII)


class Decision(NamedTuple):
    """Whether a generation is dropped, and why or why not."""

    drop: bool
    why: str


class PurgeEnd(NamedTuple):
    """Where the steps of a purge ended.

    partitions: their logs still hold records of the next generation's time. waits: the next step waits for another
    transaction.
    """

    step: Step
    partitions: Sequence[Partition] = ()
    waits: bool = False

    @property
    def is_unfinished(self) -> bool:
        """Whether something that is due was not done."""
        return not isinstance(self.step, Wait)

    @property
    def refusal(self) -> str | None:
        """Return why not all that is due was done.

        None: all was."""
        if self.partitions:
            first = self.partitions[0]
            others = " and others" if len(self.partitions) > 1 else ""
            return (
                f"the log of {first.topic}:{first.partition}{others} still holds records of the generation's time, which may "
                "be delivered again; wait until they are gone, or --force"
            )
        if self.waits:
            what = "a turn" if isinstance(self.step, RotateGeneration) else "a drop"
            return (
                f"ledger: {what} waits for a transaction or a reader that does not end; run it again (nothing is lost)"
            )
        return None


def decide(generation: Generation, state: LedgerState, hours: float) -> Decision | None:
    """Decide by age whether a generation is dropped.

    None: the logs decide, see `decide_by_logs`."""
    if generation.forgotten:
        return Decision(True, "forgotten: its table is dropped as soon as no transaction reads it")
    if generation.closed_at is None:
        return Decision(False, "claims go into it")
    if generation.closed_at + hours * HOUR > state.now:
        return Decision(False, f"{_age(generation.closed_at, state)}, and kept for {hours:g}")
    return None


def decide_by_logs(generation: Generation, state: LedgerState, hours: float, holding: Sequence[Partition]) -> Decision:
    """Decide about a generation that is old enough.

    holding: partitions whose logs still hold records of its time.
    """
    if holding:
        first = holding[0]
        return Decision(False, f"the log of {first.topic}:{first.partition} still holds records of its time")
    return Decision(True, f"{_age(generation.closed_at or 0.0, state)}, more than {hours:g}")


def _age(closed_at: float, state: LedgerState) -> str:
    return f"closed {(state.now - closed_at) / HOUR:,.2f} hours ago"


def hours_to_keep(older_than: str | None, own: float | None, force: bool) -> float:
    """Choose how many hours rows are kept.

    older_than: the flag, an age such as 24h or a number of hours. own: CONSUMER_LEDGER_RETENTION_HOURS. Raises
    Misconfigured if neither says it, or if the flag is less than the setting without force.
    """
    if older_than is None:
        if own is None:
            raise Misconfigured(
                "--older-than: nothing says how long rows are needed; set CONSUMER_LEDGER_RETENTION_HOURS, or give --older-than AGE"
            )
        return own
    hours = float(older_than) if _NUMBER.fullmatch(older_than) else age_seconds(older_than, "--older-than") / HOUR
    if own is not None and hours < own and not force:
        raise Misconfigured(
            f"--older-than {older_than}: less than CONSUMER_LEDGER_RETENTION_HOURS={own:g}; give one of them, or --force"
        )
    return hours


def longer_needs(apps: Sequence[str], hours: float) -> str:
    """Describe Apps that need rows for longer, or did not say."""
    verb = "wants" if len(apps) == 1 else "want"
    return (
        f"{', '.join(apps)}: {verb} rows for longer than {hours:g} hours, or did not say for how long; set "
        "CONSUMER_LEDGER_RETENTION_HOURS there and start it, or --retired NAME if it is decommissioned"
    )
