"""Runs the steps of apply.py for an observer, and rolls everything back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from consumer.core.delivery import Batch, Delivery
from consumer.core.ordering import Scheduler
from consumer.postgres.claims import ExistingClaim
from consumer.postgres.session import Session
from consumer.transaction.dedupe import claim
from consumer.transaction.errors import statements_of_messages, transaction
from consumer.transaction.handler_runner import HandlerRunner
from consumer.transaction.result import BatchResult, LedgerIds


class DryRunObserver(Protocol):
    """Looks at a transaction that is rolled back at its end."""

    async def claimed(
        self, session: Session, existing: Mapping[Delivery, ExistingClaim], won: list[Delivery]
    ) -> list[Delivery]:
        """Look at the claims, and return which of the won messages run."""

    async def handled(self, session: Session, result: BatchResult) -> None:
        """Look at what the handlers wrote, before the rollback."""


class OnlyResult:
    """An observer that looks at nothing: only the result is used."""

    async def claimed(
        self, session: Session, existing: Mapping[Delivery, ExistingClaim], won: list[Delivery]
    ) -> list[Delivery]:
        return won

    async def handled(self, session: Session, result: BatchResult) -> None:
        return None


async def dry_run(
    session: Session,
    ids: LedgerIds,
    scheduler: Scheduler,
    batch: Batch,
    observer: DryRunObserver,
    *,
    use_savepoints: bool,
    random: Callable[[], float],
) -> BatchResult:
    """Claim a batch and run its handlers, and roll everything back.

    It refuses no message as too old and holds none back behind a dead letter: the observer chooses. Raises what
    `apply_batch` raises, but for Fenced and TooManyDeadLetters.
    """
    result = BatchResult()
    handlers = HandlerRunner(session, result, use_savepoints, random)
    async with transaction(session):
        claims = await claim(session, ids, scheduler, batch.deliveries, result.outcomes)
        chosen = await observer.claimed(session, claims.existing, claims.won)
        await handlers.run(chosen)
        with statements_of_messages(session):
            await session.check_constraints()  # those that a COMMIT would check
        result.conclude(chosen)
        await observer.handled(session, result)
        await session.rollback()
    return result
