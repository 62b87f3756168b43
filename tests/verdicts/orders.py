"""The possible orders of the effects of a settled case.

The calls of a case are recorded when they begin. Where transactions overlap, that is not yet the order of their
effects: a handler that is called later may read before the writes of an earlier one are committed. Knows calls; knows
no table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from verdicts.handlers import Call, Place
from verdicts.settling import Settled

Calls = list[tuple[Place, Call]]


def possible_orders(done: Settled) -> Iterator[Calls]:
    """The order in which calls began, and likely others.

    Where transactions may have overlapped: the ledger's order, and small changes of the first.
    """
    yield done.applied
    if done.case.is_serial:
        return
    yield done.by_ledger
    groups = [list(some) for _, some in groupby(done.applied, lambda call: done.times[call[0]])]
    for parts in ([[call] for call in done.applied], groups):
        for distance in range(1, len(parts)):
            for last in range(distance, len(parts)):
                yield from _exchanged(parts, last - distance, last)


def _exchanged(parts: Sequence[Calls], first: int, last: int) -> Iterator[Calls]:
    """One part moved across those between.

    The last to the front, or the first to the end. A partition keeps its order.
    """
    before, across, after = parts[:first], parts[first : last + 1], parts[last + 1 :]
    for moved, others, changed in (
        (across[-1], across[:-1], [across[-1], *across[:-1]]),
        (across[0], across[1:], [*across[1:], across[0]]),
    ):
        lanes = {place[:3] for place, _ in moved}
        if not any(place[:3] in lanes for part in others for place, _ in part):
            yield [call for part in (*before, *changed, *after) for call in part]
