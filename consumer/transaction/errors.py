"""What an error does to a batch's transaction, and what it says.

The only file that says what an error of a statement does to the whole transaction. isolate.py decides what runs next.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from consumer.core.errors import RunAgain
from consumer.core.evidence import FailureVerdict, Others, judge
from consumer.core.sqlstate import Meaning
from consumer.error_places import error_summary, frames, names
from consumer.postgres.errors import Conflict, Fenced, Outage, meaning_of, redacted_message, sqlstate_of
from consumer.transaction.batch_store import BatchStore
from consumer.transaction.identify import printable
from consumer.transaction.isolate import ErrorFacts, TransactionPoisoned
from consumer.transaction.limits import HandlerTimeout


@asynccontextmanager
async def transaction(session: BatchStore) -> AsyncIterator[None]:
    """Begin a transaction; the block commits it, an error rolls it back.

    Raises TransactionPoisoned, Conflict, Outage, Fenced, or the error of a statement of our own: then the rights or the
    schema do not fit this code. The connection is left without a transaction, or dropped.
    """
    try:
        await session.begin()
        yield
    except (TransactionPoisoned, Conflict, Outage, Fenced) as failure:
        await session.rollback()
        cause = failure.__cause__
        if isinstance(failure, TransactionPoisoned) and not session.is_usable:
            if not isinstance(cause, HandlerTimeout):
                raise Outage(error_text(cause)) from cause  # the rollback did not go through
            if cause.in_statement:  # neither the statement was answered nor its cancellation
                raise Outage("postgresql does not answer") from cause
        raise
    except Exception as error:
        await session.rollback()
        if not session.is_usable:
            raise Outage(error_text(error)) from error
        if (failed := _failed_transaction(_own_meaning(error), error)) is not None:
            if isinstance(failed, Outage):
                session.close()
            raise failed from error
        raise
    except BaseException:
        session.close()  # cancelled: what was sent is undone by the server; a COMMIT on its way decides for itself
        raise


@contextmanager
def statements_of_messages(session: BatchStore) -> Iterator[None]:
    """Blame errors in the block on some message, unknown which.

    For what sends deferred writes, and for the checks of a COMMIT. Raises TransactionPoisoned, Conflict or Outage.
    """
    try:
        yield
    except (TransactionPoisoned, Conflict, Outage, Fenced):
        raise
    except Exception as error:
        raise_for_transaction(session, error, spoiled=True)
        raise TransactionPoisoned from error


def raise_for_transaction(session: BatchStore, error: BaseException, *, spoiled: bool) -> None:
    """Raise Conflict or Outage if an error ends the whole transaction.

    spoiled: whether the transaction is lost in any case. A conflict or an outage ends it, whichever message met it.
    """
    meaning = meaning_of(error)
    alone = not spoiled and meaning not in (Meaning.CONFLICT, Meaning.LOCKED, Meaning.OUTAGE)
    if (failed := _failed_transaction(meaning, error, answers=session.is_usable, alone=alone)) is not None:
        if isinstance(failed, Outage):
            session.close()
        raise failed from error


def _failed_transaction(
    meaning: Meaning, error: BaseException, *, answers: bool = True, alone: bool = False
) -> Conflict | Outage | None:
    match judge(meaning, answers=answers, alone=alone, others=Others.UNKNOWN):
        case FailureVerdict.AGAIN:
            return Conflict(error_text(error))
        case FailureVerdict.OUTAGE:
            return Outage(error_text(error))
        case _:
            return None


def _own_meaning(error: BaseException) -> Meaning:
    """Return what an error of our own statements may be.

    They provoke no internal errors: the server is broken.
    """
    meaning = meaning_of(error)
    return Meaning.OUTAGE if meaning is Meaning.INTERNAL else meaning


# -- what an error says ---------------------------------------------------------------------------------------------


def facts_of(error: BaseException, handler_place: str = "") -> ErrorFacts:
    """Return what isolation and retry policies need to know about an error.

    handler_place: shown where no frame is the user's.
    """
    code = sqlstate_of(error) or type(error).__name__
    summary = error_summary(error, handler_place)
    return ErrorFacts(
        error=error,
        meaning=_meaning(error),
        kind=f"{code} {names(error)}",
        code=code,
        text=error_text(error),
        summary=summary,
        trace="\n".join([summary, *frames(error)]),
        at=time.time(),
        timed_out=error.deliveries if isinstance(error, HandlerTimeout) else (),
    )


def _meaning(error: BaseException) -> Meaning:
    if isinstance(error, HandlerTimeout) and error.in_statement:
        return Meaning.CONFLICT  # a slow database, or a slow statement of this message
    return meaning_of(error)


def is_uncounted(error: BaseException) -> bool:
    """Return whether this failure, without evidence, does not count as an attempt."""
    if isinstance(error, RunAgain):
        return True
    return judge(_meaning(error), answers=True, alone=True, others=Others.UNKNOWN) is FailureVerdict.WAIT


def error_text(error: BaseException | None) -> str:
    """Return an exception's text, without values that a database error quotes."""
    try:
        redacted = redacted_message(error) if error is not None else "unknown"
        return printable(str(error) if redacted is None else redacted)
    except Exception:
        return "(unprintable exception)"
