"""The settle loop: transaction after transaction, until a batch is settled.

The worker, replays, rebuilds, retries of dead letters and `consumer.testing` share it. They differ in `prepare`
(which connection), in `attempt` (how the transaction runs) and in `on_failure` (what they report, how long they wait).
Limitations: it opens no connection, waits for nothing and logs nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

from consumer.core.delivery import Batch, Delivery
from consumer.core.evidence import Evidence
from consumer.core.sqlstate import Meaning
from consumer.postgres.errors import Conflict, Outage
from consumer.transaction.errors import facts_of
from consumer.transaction.isolate import ErrorFacts, Part, TransactionPoisoned, run_again, run_smaller
from consumer.transaction.limits import HandlerTimeout
from consumer.transaction.result import NEXT_BATCH, BatchResult

_PAUSE_SECONDS_MAX = 5.0


async def settle(
    batches: Iterable[Batch],
    prepare: Callable[[Part], Awaitable[bool]],
    attempt: Callable[[Part], Awaitable[BatchResult]],
    on_failure: Callable[[Part, Exception], Awaitable[Sequence[Part] | None]],
    *,
    rerun_late: bool = False,
) -> AsyncIterator[tuple[Part, BatchResult]]:
    """Settle batches in parts; yields every committed part with its result.

    Args:
        batches: in the order in which they are settled.
        prepare: opens the connection for a part. False: stop here, and leave the rest as it is. What it raises, this
            raises.
        attempt: runs the part in one transaction.
        on_failure: returns what runs instead of a part whose transaction was rolled back, the first one last (see
            `next_parts`). None: stop here. It raises what cannot be tried again.
        rerun_late: run the messages that had no time in their transaction in another one. Without it, the caller's
            Lane hands them out again.
    """
    parts = [Part(batch) for batch in batches]
    parts.reverse()
    while parts:
        part = parts.pop()
        if not await prepare(part):
            return
        try:
            result = await attempt(part)
        except Exception as error:
            following = await on_failure(part, error)
            if following is None:
                return
            parts += following
            continue
        if rerun_late and (late := _late(part, result)):
            parts.append(Part(Batch(late, {}, {}), part.use_savepoints))
            ended = [message for message in part.batch.deliveries if message not in late]
            part = Part(Batch(ended, {}, {}), part.use_savepoints)
        yield part, result


def _late(part: Part, result: BatchResult) -> list[Delivery]:
    """Return the messages that had no time in their transaction."""
    outcomes = result.outcomes
    return [message for message in part.batch.deliveries if outcomes.get(message) is NEXT_BATCH] if outcomes else []


def next_parts(
    part: Part, error: Exception, random: Callable[[], float], evidence: Evidence | None = None
) -> list[Part]:
    """Return what runs after a failed transaction, the first part last.

    Raises an error that another attempt cannot heal.
    """
    match error:
        case TransactionPoisoned():
            facts = _facts(part, error.__cause__ or error)
            return run_smaller(part, facts, random, evidence)
        case Conflict():
            facts = _facts(part, error.__cause__ or error)
            return run_again(part, facts, random, evidence, at_least=Meaning.CONFLICT, answers=True)
        case Outage() | OSError():
            cause = error.__cause__ or error
            answers = getattr(cause, "severity_en", "") == "ERROR"  # FATAL and PANIC end the connection
            facts = _facts(part, cause)
            return run_again(part, facts, random, evidence, at_least=Meaning.OUTAGE, answers=answers)
        case _:
            raise error


def _facts(part: Part, error: BaseException) -> ErrorFacts:
    """Return the facts of an error, with its handler's place."""
    deliveries = error.deliveries if isinstance(error, HandlerTimeout) else part.batch.deliveries
    return facts_of(error, deliveries[0].handler.place if deliveries else "")


def pause_seconds(failures: int) -> float:
    """Return how long to wait after this many failures in a row."""
    # Bounded before it is raised to a power: an outage may last for hours.
    return min(_PAUSE_SECONDS_MAX, 0.005 * 3.0 ** min(failures, 10))
