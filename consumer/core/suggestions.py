"""Checks names given to commands against those that exist.

Pure. A misspelt filter must not look like an empty answer, so an unknown name is an error that shows close matches.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from consumer.core.errors import Misconfigured

_SHOWN_MAX = 8


class UnknownName(Misconfigured):
    """A filter has a name that this database does not have."""


def check_known(option: str, given: str, known: Iterable[str], where: str) -> None:
    """Raise UnknownName unless `given` is one of the known names.

    option: as typed, such as --topic. where: whose names these are, to follow "not known to".
    """
    names = sorted(set(known))
    if given not in names:
        raise UnknownName(f"{option} {given[:80]!r}: not known to {where}; {suggestion(given, names)}")


def suggestion(given: str, names: Iterable[str]) -> str:
    """Return close matches as text, or all names when there are few."""
    known = sorted(set(names))
    lowered = {name.lower(): name for name in known}
    close = [lowered[name] for name in get_close_matches(given.lower(), lowered, n=3, cutoff=0.6)]
    if close:
        return f"did you mean {' or '.join(close)}?"
    if not known:
        return "there is none yet"
    more = f" and {len(known) - _SHOWN_MAX} more" if len(known) > _SHOWN_MAX else ""
    return f"it has: {', '.join(known[:_SHOWN_MAX])}{more}"
