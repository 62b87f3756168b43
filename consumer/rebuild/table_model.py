"""The tables of a rebuild, and how handlers use them.

Pure. A copy lives in pg_temp under the name of its original, so that a statement that names no schema meets the copy.
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
# What gives another value at another time, in another order or session.
_MOVING = re.compile(
    r"\b(nextval|now|current_timestamp|current_date|current_time|localtimestamp|localtime|clock_timestamp"
    r"|statement_timestamp|transaction_timestamp|timeofday|random|random_normal|gen_random_uuid|gen_random_bytes|uuidv4"
    r"|uuidv7|uuid_generate_v[0-9a-z]+|txid_current|pg_current_xact_id|pg_backend_pid|current_user|session_user)\b",
    re.IGNORECASE,
)
# Types whose `=` says that two values are the same; points have none, and that of boxes compares their areas.
_COMPARABLE_CATEGORIES = frozenset("NSBDTIEV")
_COMPARABLE_TYPES = frozenset({"uuid", "bytea", "jsonb", "pg_lsn"})


def literal(text: str) -> str:
    """Text as SQL, quoted (standard_conforming_strings is on)."""
    if "\0" in text:
        raise Misconfigured("text with a NUL cannot be sent to PostgreSQL")
    return "'" + text.replace("'", "''") + "'"


class Name(NamedTuple):
    """A relation by its schema and name."""

    schema: str
    table: str

    @property
    def real(self) -> str:
        """The real one, as SQL."""
        return f"{ident(self.schema)}.{ident(self.table)}"

    @property
    def copy(self) -> str:
        """Its copy, as SQL."""
        return f"pg_temp.{ident(self.table)}"

    def __str__(self) -> str:
        return f"{self.schema}.{self.table}"


class DefaultSequence(NamedTuple):
    """A sequence that a default takes numbers from: how PostgreSQL writes it there, and its name."""

    written: str
    name: str


@dataclass(frozen=True, slots=True)
class Column:
    """A column, as far as a copy and a comparison need to know it."""

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
    def moves(self) -> bool:
        """Whether its default depends on when, and in which order, it is asked for."""
        return self.identity or (self.default is not None and moving(self.default))

    @property
    def comparable(self) -> bool:
        """Whether `=` compares its values; else their texts are compared."""
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
    def dated(self) -> bool:
        """Whether its values may be taken from the clock."""
        return self.built_in and self.type_name in ("date", "timestamp", "timestamptz")

    @property
    def why(self) -> str:
        """Why it is not compared, when it moves."""
        return "identity" if self.identity else f"default {self.default}"[:_DEFAULT_MAX]


class Constraint(NamedTuple):
    """A key or an exclusion, as PostgreSQL describes it."""

    name: str
    definition: str
    deferrable: bool = False
    deferred: bool = False  # initially


@dataclass(frozen=True, slots=True)
class Table:
    """A real table that is copied. keys: of columns that are not null, the primary key first."""

    name: Name
    oid: int
    columns: tuple[Column, ...]
    keys: tuple[tuple[str, ...], ...] = ()
    constraints: tuple[Constraint, ...] = ()
    triggers: tuple[str, ...] = ()  # of users: a copy has none of them
    row_security: bool = False  # hides rows from the role of this connection
    rules: tuple[str, ...] = ()


@dataclass(slots=True)
class TableUsage:
    """How handlers use a table, as far as it is known. One that none of them inserts into begins with its real rows."""

    inserted: bool = False
    updated: set[str] = field(default_factory=set)
    deleted: bool = False


def moving(expression: str) -> bool:
    """Whether an expression gives another value when it is asked again, in a rebuild for example."""
    return _MOVING.search(re.sub("'(?:[^']|'')*'", "''", expression)) is not None


def statements(sql: str) -> Iterator[str]:
    """The statements of a text, one by one. A semicolon inside quotes, comments or a function's body ends none.

    For each semicolon it is asked whether the words after it would begin a statement.
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
