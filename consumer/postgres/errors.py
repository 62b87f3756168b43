"""Errors of PostgreSQL and its driver, and what they mean.

core/sqlstate.py has the table of SQLSTATEs; this adds what only the driver's exceptions show.
"""

from __future__ import annotations

import re

import asyncpg

from consumer.core.errors import ConsumerError, Misconfigured
from consumer.core.sqlstate import Meaning, meaning, without_values

_CLAIM_KEY = re.compile("ledger(_[0-9]+)?_claim")


class Outage(ConsumerError):
    """PostgreSQL is unavailable, or the outcome of a COMMIT is unknown.

    Reconnect and run the batch again.
    """


class NotPrimary(Outage):
    """The server answers but must not be written to.

    The text contains no values of rows.
    """


class OtherEpoch(Outage):
    """The transaction ran in another epoch than its connection began in.

    What is known of the ledger no longer holds.
    """


class Conflict(ConsumerError):
    """Two transactions conflict: run the batch again at once."""


class Fenced(ConsumerError):
    """A position is not what this worker last knew.

    Another owner has moved it, or the database went back in time.
    """


class SchemaMissing(Misconfigured):
    """The schema is missing or older than this code: run `consumer migrate`."""


def meaning_of(error: BaseException) -> Meaning:
    """Classify an error.

    Errors of neither database nor driver are the handler's code.
    """
    if isinstance(error, asyncpg.InvalidCachedStatementError):
        return Meaning.CONFLICT  # a table was altered meanwhile: prepared again, the statement works
    if isinstance(error, asyncpg.PostgresError):
        if _CLAIM_KEY.fullmatch(getattr(error, "constraint_name", None) or ""):
            return Meaning.CONFLICT  # a concurrent REINDEX may let a conflict through as an error
        if error.sqlstate == "23514" and not getattr(error, "constraint_name", None):
            return Meaning.STATE  # no partition takes the row
        return meaning(error.sqlstate or "")
    if isinstance(error, asyncpg.InternalClientError):
        return Meaning.OUTAGE
    if isinstance(error, asyncpg.InterfaceError):
        return Meaning.MESSAGE
    return Meaning.CODE


def is_definite(error: asyncpg.PostgresError) -> bool:
    """Return whether a failed COMMIT is certainly rolled back."""
    match meaning_of(error):
        case Meaning.OUTAGE:
            return False
        case Meaning.INTERNAL:
            return getattr(error, "severity_en", None) == "ERROR"
        case _:
            return True


def sqlstate_of(error: BaseException) -> str | None:
    """Return the SQLSTATE of a database error, for logs."""
    return error.sqlstate if isinstance(error, asyncpg.PostgresError) else None


def lock_timed_out(error: BaseException) -> bool:
    """Return whether lock_timeout ended a wait.

    NOWAIT fails with the same SQLSTATE, at once.
    """
    is_locked = isinstance(error, asyncpg.LockNotAvailableError)
    return is_locked and getattr(error, "server_source_function", None) == "ProcessInterrupts"


def redacted_message(error: BaseException) -> str | None:
    """Return a database error's text without values; None for other errors.

    PostgreSQL's DETAIL quotes rows ("Key (email)=(…) already exists"), and the driver quotes arguments that do not fit.
    """
    if isinstance(error, asyncpg.PostgresError):
        return without_values(error.sqlstate or "", str(error.args[0]) if error.args else "")
    if isinstance(error, asyncpg.InterfaceError):
        return str(error).partition(": ")[0]
    return None
