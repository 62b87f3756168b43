"""Select dead letters, then retry or discard them.

Knows what must be confirmed; the caller asks the operator. dead_letters/retry.py settles.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from consumer.core.errors import Misconfigured
from consumer.core.outcome import Reason
from consumer.core.suggestions import suggestion
from consumer.dead_letters.edits import Edit
from consumer.dead_letters.retry import DeadLetterRetrier, Filters, RetryResult
from consumer.postgres.dead_letter_actions import Chain

_DISCARD_AT_A_TIME = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleOptions:
    """What to do with the dead letters.

    why: discard them for this reason. None: retry. edit: retry the one with this payload.
    """

    why: str | None = None
    edit: Edit | None = None

    @property
    def verb(self) -> str:
        return "retry" if self.why is None else "discard"

    @property
    def is_discard(self) -> bool:
        return self.why is not None


class Selection(NamedTuple):
    """The selected dead letters.

    left_out: how many more match, but may have been applied already. question: what the operator must confirm. unsure:
    some of the selected ones may have been applied already; call `allow_unsure` once that is confirmed.
    """

    numbers: Sequence[int]
    left_out: int
    question: str | None
    unsure: bool


async def select(retrier: DeadLetterRetrier, filters: Filters, options: SettleOptions) -> Selection:
    """Select the dead letters. Raises Misconfigured for one that cannot be settled."""
    if filters.dead_letters is not None:
        return await _select_by_number(retrier, filters, filters.dead_letters, options)
    if filters.handler is not None and filters.handler not in retrier.handlers and not options.is_discard:
        raise Misconfigured(
            f"--handler {filters.handler[:80]!r}: not known to App {retrier.app.name!r}, so nothing can run its dead letters; "
            f"{suggestion(filters.handler, retrier.handlers)}"
        )
    numbers = await retrier.select(filters, waiting=options.is_discard)
    unsure = await retrier.unsure(filters)
    is_named = filters.reason == Reason.TOO_OLD
    left_out = 0 if options.is_discard or is_named else unsure
    note = ""
    if left_out:
        note = f" ({left_out:,} that may have been applied already are left out)"
    elif unsure:
        note = f" ({unsure:,} of them may have been applied already)"
    question = f"{options.verb} {len(numbers):,} dead letters{note}?" if numbers else None
    return Selection(numbers, left_out, question, is_named)


async def _select_by_number(
    retrier: DeadLetterRetrier, filters: Filters, numbers: Sequence[int], options: SettleOptions
) -> Selection:
    await retrier.check(numbers, waiting=options.is_discard)
    unsure = await retrier.unsure(filters)
    if not unsure or options.is_discard:
        return Selection(numbers, 0, None, False)
    return Selection(
        numbers,
        0,
        f"{unsure:,} of these dead letters may have been applied already (too_old: the ledger no longer remembers their time). "
        "Look at the handler's own tables first. Apply anyway?",
        True,
    )


async def settle(
    retrier: DeadLetterRetrier, numbers: Sequence[int], options: SettleOptions
) -> AsyncIterator[RetryResult]:
    """Retry or discard dead letters, then run those that wait behind them.

    Raises CannotTell if PostgreSQL is lost: what was settled is settled, once.
    """
    if options.why is None:
        async for result in retrier.retry(numbers, options.edit):
            yield result
        return
    # First discard all of them, then run what waited behind them: else one would run that is about to be discarded.
    chains: dict[Chain, None] = {}
    for start in range(0, len(numbers), _DISCARD_AT_A_TIME):
        if retrier.stopping():
            return
        results, freed = await retrier.discard(numbers[start : start + _DISCARD_AT_A_TIME], options.why)
        chains |= dict.fromkeys(freed)
        for result in results:
            yield result
    async for result in retrier.release(list(chains)):
        yield result
