"""What became of dead letters, in a bounded amount of memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from consumer.dead_letters.retry import RetryResult

SHOWN_MAX = 20  # dead letters with a line each
LISTED_MAX = 10_000  # dead letters that the JSON lists
_SETTLED = ("applied", "duplicate", "discarded")
_SETTLED_ELSEWHERE = ("taken", "settled", "behind")


class SettleResult:
    """Counts, and the first results.

    asked: dead letters that were selected. left_out: those that the filters match and that may have been applied already.
    """

    def __init__(self, asked: int, left_out: int) -> None:
        self.asked = asked
        self.left_out = left_out
        self.reached = 0  # of those selected; the others waited behind them
        self.counts: Counter[str] = Counter()
        self._listed: list[RetryResult] = []
        self._unsettled: list[RetryResult] = []

    def add(self, result: RetryResult) -> None:
        self.counts[result.outcome] += 1
        self.reached += not result.behind
        if len(self._listed) < LISTED_MAX:
            self._listed.append(result)
        if not result.is_settled and len(self._unsettled) < SHOWN_MAX:
            self._unsettled.append(result)

    @property
    def total(self) -> int:
        """How many dead letters have a result."""
        return sum(self.counts.values())

    def is_good(self, bulk: bool) -> bool:
        """Whether all are settled.

        bulk: selected by filters; then another command or a worker may have settled some of them.
        """
        good = {*_SETTLED, *(_SETTLED_ELSEWHERE if bulk else ())}
        return good.issuperset(self.counts)

    def counted(self) -> str:
        """Return the counts as text."""
        return (
            ", ".join(f"{count:,} {outcome}" for outcome, count in self.counts.most_common()) or "nothing was changed"
        )

    def shown(self, bulk: bool) -> tuple[Sequence[RetryResult], int]:
        """Return the results to print, and how many others there are.

        Of a bulk, only those that are not settled.
        """
        shown = self._unsettled if bulk else self._listed[:SHOWN_MAX]
        settled = sum(self.counts[outcome] for outcome in _SETTLED) if bulk else 0
        return shown, max(0, self.total - settled - len(shown))

    def as_dict(self, error: str | None, *, changed: bool = True, selected: Sequence[int] = ()) -> dict[str, Any]:
        """Return what `--json` prints.

        selected: dead letters that nothing was done to.
        """
        listed = [
            {"letter": result.dead_letter, "outcome": result.outcome, "text": result.text, "behind": result.behind}
            for result in self._listed
        ] or [
            {"letter": number, "outcome": "selected", "text": "", "behind": False} for number in selected[:LISTED_MAX]
        ]
        return {
            "asked": self.asked,
            "changed": changed,
            "counts": dict(self.counts),
            "left_out": self.left_out,
            "letters": listed,
            "letters_not_listed": max(self.total, len(selected)) - len(listed),
            "error": error,
        }
