"""How the further rebuilds of one command differ from the first.

Pure.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variation:
    """How a further rebuild differs from the first one.

    shift: microseconds by which each partition comes later than the one before it. Transactions less than a second apart
    may have overlapped, and then met a row in either order. zone: hours from UTC. with_real_values: columns whose first
    values are not known begin with today's values. by_records: in the order of the records' times, not of the ledger's.
    repeats_first: no difference, to find drawn values.
    """

    shift: int = 0
    zone: int | None = None
    with_real_values: bool = False
    by_records: bool = False
    repeats_first: bool = False

    @property
    def name(self) -> str:
        """A name that the first rebuild and its repetition share."""
        return repr(dataclasses.replace(self, repeats_first=False))


FIRST = Variation()
# One of the two zones has, at any time, another day than the server.
OTHER_ORDERS = (Variation(-1_000_000, zone=14), Variation(1_000_000, zone=-12))
OTHER_ROWS = Variation(with_real_values=True)
BY_RECORDS = Variation(by_records=True)
SAME_ORDER = Variation(repeats_first=True)
