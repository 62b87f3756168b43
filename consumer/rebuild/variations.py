"""How the further rebuilds of one command differ from the first.

Pure.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variation:
    """In what a further rebuild differs from the first one.

    shift: how many microseconds later each partition comes than the one before it: transactions that are less than a second
    apart may have overlapped, and then met a row in either order. zone: hours from UTC. begins: with real values, where
    it is not known what a table began with. by_records: in the order of the records' times, not of the ledger's.
    """

    shift: int = 0
    zone: int | None = None
    begins: bool = False
    by_records: bool = False
    same: bool = False  # as the first one, to find values that are drawn

    @property
    def name(self) -> str:
        return repr(dataclasses.replace(self, same=False))


FIRST = Variation()
# In one of the two zones it is another day than in the server's, at any time.
OTHER_ORDERS = (Variation(-1_000_000, zone=14), Variation(1_000_000, zone=-12))
OTHER_ROWS = Variation(begins=True)
BY_RECORDS = Variation(by_records=True)
SAME_ORDER = Variation(same=True)
