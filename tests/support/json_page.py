"""The shapes of docs/reference/json.md, to compare with what commands print.

Each heading of the page names the commands whose answers the table below it describes: a row for each key, by its path.
`*` in a path stands for any name, `[]` for the items of a list. A path without a row of its own is an object or a list
whose keys have rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from documents import ROOT

PAGE = ROOT / "docs" / "reference" / "json.md"
_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "object": lambda value: isinstance(value, dict),
    "list": lambda value: isinstance(value, list),
    "bytes": lambda value: isinstance(value, str) or (isinstance(value, dict) and list(value) == ["base64"]),
    "strings": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "integers": lambda value: isinstance(value, list) and all(isinstance(item, int) for item in value),
    "counts": lambda value: isinstance(value, dict) and all(isinstance(item, int) for item in value.values()),
    "texts": lambda value: isinstance(value, dict) and all(isinstance(item, str | None) for item in value.values()),
    "problems": lambda value: (
        isinstance(value, list) and all(list(item) == ["kind", "count", "text"] for item in value)
    ),
    "answer": lambda value: True,  # what the command prints without shards
}


class Shape:
    """The documented keys of one answer, and which of them were printed."""

    def __init__(self, rows: dict[str, list[str]]) -> None:
        self.rows = rows
        self.printed: set[str] = set()

    def faults(self, value: Any, path: str = "") -> list[str]:
        """Compare an answer with the table; return undocumented keys and wrong types."""
        types = self.rows.get(path)
        if types is None and not self._is_inside(path):
            return [f"{path or 'the answer'}: not documented"]
        if types is not None:
            self.printed.add(path)
            if not any(_TYPES[name](value) for name in types):
                return [f"{path}: {type(value).__name__} is not {' or '.join(types)}"]
            if value is None or not self._is_inside(path):
                return []
        elif not isinstance(value, dict | list):
            return [f"{path}: {type(value).__name__} instead of an object or a list"]
        if isinstance(value, list):
            return [fault for item in value for fault in self.faults(item, f"{path}[]")]
        return [fault for key, item in value.items() for fault in self.faults(item, self._path_of(path, key))]

    def missing(self) -> list[str]:
        """Return the documented keys that no answer had."""
        return sorted(set(self.rows) - self.printed)

    def _path_of(self, path: str, key: str) -> str:
        named = f"{path}.{key}" if path else key
        anything = f"{path}.*" if path else "*"
        known = named in self.rows or self._is_inside(named)
        return anything if not known and (anything in self.rows or self._is_inside(anything)) else named

    def _is_inside(self, path: str) -> bool:
        """Whether rows describe parts of what has this path."""
        return any(row != path and (not path or row.startswith((f"{path}.", f"{path}["))) for row in self.rows)


def shapes(text: str | None = None) -> dict[str, Shape]:
    """Read the page: the shape of each command, by its heading."""
    page = PAGE.read_text("utf-8") if text is None else text
    by_command: dict[str, Shape] = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|[^|]*\|$", body, re.MULTILINE)
        shape = Shape({path: types.strip().split(" or ") for path, types in rows})
        assert rows, heading
        for types in shape.rows.values():
            assert set(types) <= set(_TYPES), f"{heading}: {types}"
        for command in re.findall("`([^`]+)`", heading):
            by_command[command] = shape
    return by_command
