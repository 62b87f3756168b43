"""What the PostgreSQL schemes need of a transaction, and their errors.

Knows the three methods that a `Tx` and an asyncpg connection share, and SQLSTATEs; knows no driver.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar

from consumer.core.errors import ConsumerError

T = TypeVar("T")

_MISFITS = {
    "0A000": "the table, a view or a rule does not support this statement",
    "3F000": "there is no such schema",
    "42P01": "there is no such table",
    "42703": "there is no such column",
    "42P10": "no unique index is on exactly these columns (partial ones and those on expressions do not count)",
    "42804": "a column is of another type",
    "42809": "this is not a table that can be written to",
    "42883": "a column's type cannot be compared with the value's",
    "428C9": "a column is generated",
    "55000": "the table, or its constraint, cannot be used like this",
}
SUPPRESSED = "a trigger, a rule or row-level security suppresses it: let that raise an error instead, or write through it by SQL of your own"


class Database(Protocol):
    """A `consumer.Tx`, an asyncpg connection, or a connection of an asyncpg pool."""

    async def fetch(self, sql: str, /, *args: Any) -> list[Any]: ...

    async def fetchval(self, sql: str, /, *args: Any) -> Any: ...


class Misfit(ConsumerError):
    """The table is not as the call says.

    There is no such table, column or unique index, or something suppresses the write.
    """


class NotFound(ConsumerError, LookupError):
    """No row has this key; in a handler, a counted attempt.

    If another message creates the row, catch this and raise `RunAgain`: then the message is early, and waits.
    """


async def checked(statement: Awaitable[T], call: str) -> T:
    """Run a statement and return its answer.

    Raises Misfit, naming the call, for a table that does not fit; else what the driver raises.
    """
    try:
        return await statement
    except Exception as error:
        why = _MISFITS.get(getattr(error, "sqlstate", None) or "")
        # With a context the error is of a function or trigger of the application, whose text may hold values.
        if why is None or getattr(error, "context", None):
            raise
        # PostgreSQL's text names tables and columns here, and holds no values.
        raise Misfit(f"{call}: {why} (PostgreSQL: {error})") from error
