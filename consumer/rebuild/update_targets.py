"""Reads from an UPDATE which rows it looks for.

Pure. Limitation: rows that a function updates are not seen here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from consumer.deferred_writes.grammar import shape_of

_RETURNING = re.compile(r"\sreturning\s.*\Z", re.IGNORECASE | re.DOTALL)
_CAST = re.compile(r"(\$[0-9]+)::[a-z0-9_]+", re.IGNORECASE)


class UpdateTarget(NamedTuple):
    """The rows that an UPDATE looks for.

    columns: those that equal an argument, each with the index of the argument.
    """

    table: str
    columns: tuple[tuple[str, int], ...]


def update_target(sql: str) -> UpdateTarget | None:
    """Return what an UPDATE looks for.

    None for any other statement, and for rows that do not follow from columns that equal arguments.
    """
    shape = shape_of(_CAST.sub(r"\1", _RETURNING.sub("", sql)))
    if shape is None or shape.kind != "update" or "." in shape.table:
        return None
    name = shape.table
    plain = name[1:-1].replace('""', '"') if name.startswith('"') else name
    return UpdateTarget(plain, shape.keys)
