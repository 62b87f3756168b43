"""Names of tables, columns and roles as SQL: checked, then quoted. Every name that a statement is built from passes here.

Pure. What it does not know: whether the table has such a column (PostgreSQL says so).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from consumer.core.errors import Misconfigured

BYTES_MAX = 63  # PostgreSQL cuts longer names with a notice, and would then mean another table


class BadName(Misconfigured, ValueError):
    """What can be no name in PostgreSQL: a mistake in a call, or in what somebody typed."""


def ident(name: str) -> str:
    """A name as SQL, quoted: it means exactly this name, with its capitals.

    A name that was created without quotes stands in the catalog in lower case: write it so. Raises TypeError for what
    is no text, BadName for what can be no name in PostgreSQL.
    """
    if not isinstance(name, str):
        raise TypeError(f"a name of a table or column is text, not {type(name).__name__}")
    if not name or "\0" in name or len(name.encode("utf-8", "surrogatepass")) > BYTES_MAX:
        raise BadName(f"{name[:80]!r} can be no name in PostgreSQL: 1 to {BYTES_MAX} bytes, without NUL")
    return '"' + name.replace('"', '""') + '"'


def table_ident(name: str) -> str:
    """A table as SQL, from ``table`` or ``schema.table``. Names with a dot in them are not supported.

    Without a schema the search path decides, as always. Raises TypeError and ValueError as `ident`.
    """
    if not isinstance(name, str):
        raise TypeError(f"a table is named by text, not {type(name).__name__}")
    parts = name.split(".")
    if len(parts) > 2:
        raise ValueError(f"{name[:80]!r} is no table: write table or schema.table")
    return ".".join(map(ident, parts))


def column_names(what: str, given: str | Collection[str]) -> list[str]:
    """Columns by name: one, or several. Raises ValueError when there are none or one is named twice."""
    names = [given] if isinstance(given, str) else list(given)
    if not names:
        raise ValueError(f"{what}: name at least one column")
    for name in names:
        ident(name)
    if len(set(names)) != len(names):
        raise ValueError(f"{what}: a column is named twice")
    return names


def columns_of(what: str, given: Mapping[str, object]) -> list[str]:
    """The columns of a mapping from column to value. Raises TypeError when it is none, ValueError when it is empty."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} is a mapping from column to value, not {type(given).__name__}")
    return column_names(what, given)
