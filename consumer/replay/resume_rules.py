"""Decides whether an interrupted replay may go on: whatever its answer depends on must be as it was."""

from __future__ import annotations

from collections.abc import Mapping

# Subject ("handler", "topic", "option") -> name -> what it was, None where that was not known.
Conditions = Mapping[str, Mapping[str, str | None]]


def what_changed(before: Conditions, now: Conditions) -> str | None:
    """The first difference in a few words, without values; None where nothing differs."""
    for subject, here in now.items():
        then = before.get(subject, {})
        for name in sorted({*then, *here}):
            if name not in here:
                return f"{subject} {name!r} was removed"
            if name not in then:
                return f"{subject} {name!r} was added"
            if None not in (then[name], here[name]) and then[name] != here[name]:
                return f"{subject} {name!r} has changed"
    return None
