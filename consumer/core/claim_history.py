"""What earlier claims of a connection say about the next one.

Pure. A wrong guess costs time, never the guarantee: the ledger's unique key decides.
"""

from __future__ import annotations

_MOSTLY_KNOWN = 0.5
_CLEAN_MIN = 3  # claims in a row without a known id, before one is expected to have none
_CLEAN_MAX = 96
_WORTH_IT = 8  # right guesses in a row that pay for the wrong one after them


class ClaimHistory:
    """Guesses whether the ids of the next claim are known.

    A claim that expects only new ids and meets another is undone, which wastes its rows. If the guesses before it do not
    make up for that, twice as many clean claims are needed for the next guess, up to 96.
    """

    __slots__ = ("_clean", "_needed", "share_known")

    def __init__(self) -> None:
        self.share_known = 0.0  # of the ids of the latest claim
        self._clean = 0  # claims in a row that met only new ids
        self._needed = _CLEAN_MIN

    @property
    def expects_known(self) -> bool:
        """Whether most ids are known, as in a replay.

        Then looking costs half as much as losing a claim.
        """
        return self.share_known > _MOSTLY_KNOWN

    @property
    def expects_new(self) -> bool:
        """Whether all ids are new.

        Then a plain insert costs half as much as a claim that may lose.
        """
        return self._clean >= self._needed

    def surprised(self) -> None:
        """Record that a claim met a known id although it expected none."""
        if self._clean - self._needed >= _WORTH_IT:
            self._needed = max(self._needed // 2, _CLEAN_MIN)
        else:
            self._needed = min(2 * self._needed, _CLEAN_MAX)
        self._clean = 0

    def claimed(self, ids: int, known: int) -> None:
        """Record how many ids a claim had, and how many were known."""
        self.share_known = known / ids
        self._clean = 0 if known else self._clean + 1
