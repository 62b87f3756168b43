"""Checks and quotes names of tables, columns and roles for SQL.

Every name in a generated statement passes through here. Pure. Limitations: only PostgreSQL knows whether the table has
such a column.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from consumer.core.errors import Misconfigured

BYTES_MAX = 63  # PostgreSQL truncates longer names with a notice, and uses another table


class BadName(Misconfigured, ValueError):
    """Text that cannot be a name in PostgreSQL."""


def ident(name: str) -> str:
    """Return a name as SQL, quoted, so that its capitals count.

    The catalog has names that were created without quotes in lower case; write them in lower case. Raises TypeError for
    anything but text, and BadName for text that cannot be a name in PostgreSQL.
    """
    if not isinstance(name, str):
        raise TypeError(f"a name of a table or column is text, not {type(name).__name__}")
    if not name or "\0" in name or len(name.encode("utf-8", "surrogatepass")) > BYTES_MAX:
        raise BadName(f"{name[:80]!r}: not a name in PostgreSQL; use 1 to {BYTES_MAX} bytes, without NUL")
    return '"' + name.replace('"', '""') + '"'


def table_ident(name: str) -> str:
    """Return a table as SQL, from ``table`` or ``schema.table``.

    Names with a dot in them are not supported. Without a schema the search path decides. Raises TypeError and
    ValueError as `ident`.
    """
    if not isinstance(name, str):
        raise TypeError(f"a table is named by text, not {type(name).__name__}")
    parts = name.split(".")
    if len(parts) > 2:
        raise ValueError(f"{name[:80]!r}: not a table; write table or schema.table")
    return ".".join(map(ident, parts))


def column_names(what: str, given: str | Collection[str]) -> list[str]:
    """Return one column, or several, as a list.

    Raises ValueError for none, and for a name that comes twice.
    """
    names = [given] if isinstance(given, str) else list(given)
    if not names:
        raise ValueError(f"{what}: name at least one column")
    for name in names:
        ident(name)
    if len(set(names)) != len(names):
        raise ValueError(f"{what}: a column is named twice")
    return names


def columns_of(what: str, given: Mapping[str, object]) -> list[str]:
    """Return the columns of a mapping from column to value.

    Raises TypeError for anything but a mapping, and ValueError for an empty one.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} is a mapping from column to value, not {type(given).__name__}")
    return column_names(what, given)
