"""Decide whether an interrupted replay may go on.

Everything that its answer depends on must be unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

# Subject ("handler", "topic", "option") -> name -> its value then, None where that was unknown.
Conditions = Mapping[str, Mapping[str, str | None]]


def what_changed(before: Conditions, now: Conditions) -> str | None:
    """Return the first difference in a few words, without values.

    None where nothing differs.
    """
    for subject, current in now.items():
        earlier = before.get(subject, {})
        for name in sorted({*earlier, *current}):
            if name not in current:
                return f"{subject} {name!r} was removed"
            if name not in earlier:
                return f"{subject} {name!r} was added"
            if None not in (earlier[name], current[name]) and earlier[name] != current[name]:
                return f"{subject} {name!r} has changed"
    return None
