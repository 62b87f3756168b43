"""The guarantee: all of a batch commits in one transaction, or nothing.

Read `apply_batch`: it is the whole promise on one screen. Limitations: whether a COMMIT happened whose answer was lost
is unknown here; then the batch runs again, and its claims decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from consumer.core.dead_letters import blocks_key
from consumer.core.delivery import Batch, Delivery
from consumer.core.evidence import Evidence
from consumer.core.ordering import Scheduler
from consumer.postgres.errors import Fenced
from consumer.transaction.batch_store import BatchStore
from consumer.transaction.dead_letter_rate import DeadLetterRateLimit
from consumer.transaction.dedupe import claim, hold_back, refuse_forgotten
from consumer.transaction.errors import statements_of_messages, transaction
from consumer.transaction.handler_runner import HandlerRunner
from consumer.transaction.limits import CallTracker
from consumer.transaction.position_updates import position_updates
from consumer.transaction.result import BatchResult, LedgerIds, ended_by_handler, numbered, outcome_counts


async def apply_batch(
    session: BatchStore,
    ids: LedgerIds,
    scheduler: Scheduler,
    batch: Batch,
    *,
    use_savepoints: bool,
    random: Callable[[], float],
    on_step: Callable[[str], None] = lambda step: None,
    calls: CallTracker | None = None,
    limit: DeadLetterRateLimit | None = None,
    evidence: Evidence | None = None,
) -> BatchResult:
    """Commit claims, effects, dead letters and positions of a batch, or nothing.

    Raises TransactionPoisoned, Conflict, Outage (settle.py runs the batch again), Fenced or TooManyDeadLetters.
    """
    result = BatchResult()
    handlers = HandlerRunner(session, result, use_savepoints, random, calls, evidence)
    async with transaction(session):  # rolled back by any error from here to COMMIT
        on_step("begun")
        # Before any work: a concurrent duplicate waits here on the unique key. A lost claim is a duplicate.
        won, _ = await claim(session, ids, scheduler, batch.deliveries, result.outcomes)
        on_step("claimed")
        await refuse_forgotten(session, won, result.outcomes)
        await hold_back(session, scheduler, won, result.outcomes)

        await handlers.run(won)  # what a handler writes through its Tx, it writes in this transaction
        on_step("handled")
        result.conclude(won)

        await _release_claims(session, won, result)  # of messages that are tried again
        has_dead = await _store_dead_letters(session, scheduler, won, result, limit)  # these keep their claim
        if not scheduler.is_current(batch):
            raise Fenced("its partitions were assigned again meanwhile: what it settled would be counted twice")
        # A position passes no message that is not settled. Compare-and-set: Fenced if another worker has moved it.
        result.position_updates = position_updates(scheduler, batch, result.delayed, ids.logs)
        await _save_attempts(session, batch, result)
        result.counts = outcome_counts(result)
        await session.write_positions(ids.app, result.position_updates, numbered(result.counts, ids))
        outgoing = handlers.outgoing(result.applied)
        if has_dead:
            outgoing = [*outgoing, *await session.dead_letter_copies()]
        if outgoing:
            # After the positions, as every transaction locks them in this order; their owner publishes it after COMMIT.
            result.published = await session.store_outgoing(ids.app, outgoing)
        on_step("before_commit")
        with statements_of_messages(session):  # deferred constraints are checked now
            await session.commit()  # only the command tag COMMIT counts; without an answer: Outage
        on_step("committed")
    return result


async def _release_claims(session: BatchStore, won: Sequence[Delivery], result: BatchResult) -> None:
    if result.delayed and (released := [delivery for delivery in won if delivery in result.delayed]):
        await session.release_claims(released)


async def _store_dead_letters(
    session: BatchStore,
    scheduler: Scheduler,
    won: Sequence[Delivery],
    result: BatchResult,
    limit: DeadLetterRateLimit | None,
) -> bool:
    """Store the dead letters, and return whether there are any.

    Raises TooManyDeadLetters beyond the limit.
    """
    dead = result.dead
    if not dead:
        return False
    if limit is not None:
        for handler, (messages, reasons) in ended_by_handler(result.applied, result.outcomes).items():
            limit.check(handler, messages, reasons)
    for delivery, outcome in dead.items():
        if blocks_key(outcome):
            scheduler.mark_possibly_held(delivery)
    attempts = {delivery: failure.attempts for delivery, failure in result.failures.items()}
    await session.store_dead_letters(dead, attempts, claimed=[delivery for delivery in won if delivery in dead])
    return True


async def _save_attempts(session: BatchStore, batch: Batch, result: BatchResult) -> None:
    """Save the attempts of waiting messages, and forget those of settled ones."""
    delayed = result.delayed
    if tried := {
        message: (count, delay) for message, delay in delayed.items() if (count := result.attempts_of(message))
    }:
        await session.save_attempts(tried, ())
    if settled := [message for message in batch.deliveries if message.attempts and message not in delayed]:
        await session.save_attempts({}, settled)
