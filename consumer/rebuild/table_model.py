"""The tables of a rebuild, and how handlers use them.

Pure. A copy is in pg_temp under the name of its original, so that a statement that names no schema uses the copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from consumer.core.errors import Misconfigured
from consumer.core.identifiers import ident
from consumer.postgres.sql_tokens import first_words

OURS = "consumer"  # the schema that no handler may touch
_DEFAULT_MAX = 80
_AFTER = ("consumer_after", "consumer_after")
# Functions whose value depends on the time, the order of calls or the session.
_VOLATILE = re.compile(
    r"\b(nextval|now|current_timestamp|current_date|current_time|localtimestamp|localtime|clock_timestamp"
    r"|statement_timestamp|transaction_timestamp|timeofday|random|random_normal|gen_random_uuid|gen_random_bytes|uuidv4"
    r"|uuidv7|uuid_generate_v[0-9a-z]+|txid_current|pg_current_xact_id|pg_backend_pid|current_user|session_user)\b",
    re.IGNORECASE,
)
# Types whose `=` means the same value; points have no `=`, and that of boxes compares areas.
_COMPARABLE_CATEGORIES = frozenset("NSBDTIEV")
_COMPARABLE_TYPES = frozenset({"uuid", "bytea", "jsonb", "pg_lsn"})


def literal(text: str) -> str:
    """Quote a text as SQL; standard_conforming_strings must be on.

    Raises Misconfigured for a text with a NUL.
    """
    if "\0" in text:
        raise Misconfigured("--base: the SQL has a NUL character, which PostgreSQL cannot read; remove it")
    return "'" + text.replace("'", "''") + "'"


class Name(NamedTuple):
    """A relation by its schema and name."""

    schema: str
    table: str

    @property
    def real(self) -> str:
        """The real table, as SQL."""
        return f"{ident(self.schema)}.{ident(self.table)}"

    @property
    def copy(self) -> str:
        """The copy, as SQL."""
        return f"pg_temp.{ident(self.table)}"

    def __str__(self) -> str:
        return f"{self.schema}.{self.table}"


ColumnName = tuple[Name, str]  # a table and one of its columns


class DefaultSequence(NamedTuple):
    """A sequence that a column's default uses.

    written: how PostgreSQL writes it in the default. name: without its schema.
    """

    written: str
    name: str


@dataclass(frozen=True, slots=True)
class Column:
    """What a copy and a comparison need to know of a column."""

    name: str
    not_null: bool = False
    default: str | None = None
    identity: bool = False
    generated: bool = False
    type_name: str = "text"
    category: str = "S"  # pg_type.typcategory
    built_in: bool = True
    sequences: tuple[DefaultSequence, ...] = ()

    @property
    def has_volatile_default(self) -> bool:
        """Whether its default depends on the time or the order of calls."""
        return self.identity or (self.default is not None and is_volatile(self.default))

    @property
    def comparable(self) -> bool:
        """Whether its values are compared with `=`, not as texts."""
        if self.category == "E":
            return True
        return self.built_in and (self.category in _COMPARABLE_CATEGORIES or self.type_name in _COMPARABLE_TYPES)

    @property
    def numeric(self) -> bool:
        return self.built_in and self.category == "N" and self.type_name not in ("money", "oid")

    @property
    def timestamp(self) -> bool:
        return self.built_in and self.type_name in ("timestamptz", "timestamp")

    @property
    def is_date_or_time(self) -> bool:
        """Whether its values may come from the clock."""
        return self.built_in and self.type_name in ("date", "timestamp", "timestamptz")

    @property
    def ignored_because(self) -> str:
        """Why it is not compared, if its default is volatile."""
        return "identity" if self.identity else f"default {self.default}"[:_DEFAULT_MAX]


class Constraint(NamedTuple):
    """A key or exclusion constraint, as PostgreSQL describes it."""

    name: str
    definition: str
    deferrable: bool = False
    deferred: bool = False  # initially


@dataclass(frozen=True, slots=True)
class Table:
    """A real table that is copied.

    keys: unique keys whose columns are not null, the primary key first. triggers: enabled ones of users; a copy has none.
    row_security: it hides rows from the role of this connection.
    """

    name: Name
    oid: int
    columns: tuple[Column, ...]
    keys: tuple[tuple[str, ...], ...] = ()
    constraints: tuple[Constraint, ...] = ()
    triggers: tuple[str, ...] = ()
    row_security: bool = False
    rules: tuple[str, ...] = ()


@dataclass(slots=True)
class TableUsage:
    """How handlers use a table, as far as this is known.

    A table that no handler inserts into begins with its real rows. updated: names of columns.
    """

    inserted: bool = False
    updated: set[str] = field(default_factory=set)
    deleted: bool = False


def is_volatile(expression: str) -> bool:
    """Return whether an expression may give another value when evaluated again."""
    return _VOLATILE.search(re.sub("'(?:[^']|'')*'", "''", expression)) is not None


def split_statements(sql: str) -> Iterator[str]:
    """Yield the statements of a text.

    A semicolon inside quotes, a comment or the body of a function ends no statement: one ends it only if the words after it
    would begin another statement.
    """
    start = at = 0
    while (at := sql.find(";", at)) >= 0:
        if first_words(f"{sql[start:at]} ;{' '.join(_AFTER)}")[-1:] == [_AFTER]:
            if first_words(sql[start:at]):
                yield sql[start:at].strip()
            start = at + 1
        at += 1
    if first_words(sql[start:]):
        yield sql[start:].strip()
