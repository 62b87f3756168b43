"""Count messages by time, in bounded memory.

Every count is kept, whatever its time: the buckets grow wider when the span grows, and the same counts give the same
buckets in any order. Uses timestamps as records carry them, and no clock. Limitation: one wrong but plausible
timestamp, years away from the others, makes all buckets wide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

BUCKETS_MAX = 240
# In seconds. Each divides the next, so that a bucket goes whole into a wider one; after the last they double.
_WIDTHS = (1, 5, 15, 60, 300, 900, 1800, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86400, 7 * 86400)
# A client without a clock sends 0, and -1 is Kafka's own sign for none. From 2200 on: nanoseconds, 2**63-1.
_FIRST_MS, _END_MS = 1, 7_258_118_400_000
_AT = "at"


class Timeline:
    """Counts under names, in at most BUCKETS_MAX buckets of time."""

    def __init__(self) -> None:
        self._width = _WIDTHS[0]
        self._buckets: dict[str, Counter[int]] = {}  # by name, then by seconds since 1970, in widths
        self._untimed: Counter[str] = Counter()
        self._first, self._last = 0, -1  # the outermost buckets of all names; none yet

    def add(self, timestamps_ms: Iterable[int], name: str) -> None:
        """Count each timestamp once under this name.

        They are milliseconds since 1970; any number is allowed. Raises ValueError for the name "at".
        """
        if name == _AT:
            raise ValueError(f"a count cannot be called {name!r}")
        times = timestamps_ms if isinstance(timestamps_ms, list) else list(timestamps_ms)
        if not times:
            return
        lowest, highest = min(times), max(times)
        if lowest < _FIRST_MS or highest >= _END_MS:
            usable = [timestamp for timestamp in times if _FIRST_MS <= timestamp < _END_MS]
            self._untimed[name] += len(times) - len(usable)
            if not usable:
                return
            times, lowest, highest = usable, min(usable), max(usable)
        # The width comes first, so that the counts of this batch never need more buckets than are kept.
        self._include(lowest // 1000, highest // 1000)
        width_ms = self._width * 1000
        buckets = self._buckets.setdefault(name, Counter())
        if lowest // width_ms == highest // width_ms:
            buckets[lowest // width_ms] += len(times)
        else:
            buckets.update(Counter([timestamp // width_ms for timestamp in times]))

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it.

        Empty buckets are left out. The others are in order, and begin `at`.
        """
        rows: dict[int, dict[str, Any]] = {}
        for name in sorted(self._buckets):
            for bucket, count in self._buckets[name].items():
                rows.setdefault(bucket, {_AT: _iso(bucket * self._width)})[name] = count
        return {
            "width_seconds": self._width,
            "buckets": [rows[bucket] for bucket in sorted(rows)],
            "untimed": dict(sorted(self._untimed.items())),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Timeline:
        """Return what `as_dict` wrote, to go on from there.

        Raises ValueError for anything else.
        """
        self = cls()
        try:
            self._width = _known_width(state["width_seconds"])
            for row in state["buckets"]:
                seconds = _seconds(row[_AT])
                if seconds % self._width or not 0 <= seconds * 1000 < _END_MS:
                    raise ValueError(f"no bucket of {self._width} s begins at {row[_AT]}")
                for name, count in row.items():
                    if name != _AT:
                        self._buckets.setdefault(name, Counter())[seconds // self._width] += _positive(count)
                self._include(seconds, seconds)
            if self._width != state["width_seconds"]:
                raise ValueError(f"more than {BUCKETS_MAX} buckets of {state['width_seconds']} s")
            self._untimed.update({name: _positive(count) for name, count in state["untimed"].items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a timeline: {error!r}") from None
        return self

    def _include(self, first: int, last: int) -> None:
        """Cover the time between two seconds, with wider buckets if need be."""
        first, last = first // self._width, last // self._width
        if self._first <= self._last:
            first, last = min(first, self._first), max(last, self._last)
        while last - first >= BUCKETS_MAX:
            wider = _wider(self._width)
            factor = wider // self._width
            for name, buckets in self._buckets.items():
                merged: Counter[int] = Counter()
                for bucket, count in buckets.items():
                    merged[bucket // factor] += count
                self._buckets[name] = merged
            self._width, first, last = wider, first // factor, last // factor
        self._first, self._last = first, last


def _wider(width: int) -> int:
    return next((wider for wider in _WIDTHS if wider > width), width * 2)


def _known_width(value: Any) -> int:
    width = _WIDTHS[0]
    while width < _positive(value):
        width = _wider(width)
    if width != value:
        raise ValueError(f"no width of a bucket: {value}")
    return width


def _positive(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"not a count: {value!r}")
    return value


# A pure module does not import `datetime`, which has a clock. The calendar is arithmetic: a year that begins in March
# has its leap day at its end, and 146,097 days are 400 years. 719,468 days are between 0000-03-01 and 1970-01-01.


def _iso(seconds: int) -> str:
    """Return a time such as 2026-11-25T10:00:00Z."""
    days, rest = divmod(seconds, 86400)
    era, day = divmod(days + 719_468, 146_097)
    year = (day - day // 1460 + day // 36524 - day // 146_096) // 365
    day -= 365 * year + year // 4 - year // 100
    month = (5 * day + 2) // 153  # 0 is March
    day -= (153 * month + 2) // 5
    year += era * 400 + (month >= 10)
    return (
        f"{year:04}-{month - 9 if month >= 10 else month + 3:02}-{day + 1:02}"
        f"T{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}Z"
    )


def _seconds(text: str) -> int:
    """Return the seconds of what `_iso` wrote.

    Raises ValueError for anything else.
    """
    try:
        year, month, day = int(text[0:4]), int(text[5:7]), int(text[8:10])
        hour, minute, second = int(text[11:13]), int(text[14:16]), int(text[17:19])
    except ValueError:
        raise ValueError(f"not a time: {text!r}") from None
    year -= month <= 2
    shifted = (month + 9) % 12
    of_year = (153 * shifted + 2) // 5 + day - 1
    days = year * 365 + year // 4 - year // 100 + year // 400 + of_year - 719_468
    seconds = days * 86400 + hour * 3600 + minute * 60 + second
    if _iso(seconds) != text:
        raise ValueError(f"not a time: {text!r}")
    return seconds
