"""Claims the ids of a batch: which messages are new, duplicates, conflicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from consumer.core.dead_letters import KeyHold
from consumer.core.delivery import Delivery
from consumer.core.fingerprint import BYTES
from consumer.core.ordering import Scheduler
from consumer.core.outcome import DUPLICATE, Applied, Cause, Dead, Duplicate, Outcome, Reason, RetryLater, Skipped
from consumer.core.retention import is_time, what_is_wrong
from consumer.postgres.claims import REDELIVERED, ExistingClaim
from consumer.transaction.batch_store import BatchStore
from consumer.transaction.identify import by_bytes, equal_values
from consumer.transaction.result import BEHIND_DEAD_LETTER, BEHIND_RETRY, BUSY, CONFLICT, TOO_OLD, LedgerIds


class ClaimResult(NamedTuple):
    """The messages whose claim was won, and the others' existing claims."""

    won: list[Delivery]
    existing: Mapping[Delivery, ExistingClaim]


async def claim(
    session: BatchStore,
    ids: LedgerIds,
    scheduler: Scheduler,
    deliveries: Sequence[Delivery],
    outcomes: dict[Delivery, Outcome],
) -> ClaimResult:
    """Claim the ids of a batch.

    A lost claim is a duplicate, or an id conflict. Messages that are settled already, or wait behind another, are not
    claimed.
    """
    claims, rivals = _distinct(deliveries, scheduler, outcomes)
    existing = await session.claim(claims, ids.topics) if claims else {}
    existing = await _under_rules(session, existing, ids.topics)
    won = _sort_out(claims, existing, scheduler, outcomes)
    if rivals:
        of_rivals = await _under_rules(session, await session.claims_of(rivals, ids.topics), ids.topics)
        _sort_out(rivals, of_rivals, scheduler, outcomes)
        _compare_values(rivals, won, outcomes)
    return ClaimResult(won, existing)


def _distinct(
    deliveries: Sequence[Delivery], scheduler: Scheduler, outcomes: dict[Delivery, Outcome]
) -> tuple[list[Delivery], list[Delivery]]:
    """Return the first delivery of every id, and their rivals.

    A rival has the same id and another payload. All others end here, or wait. A rival's outcome depends on what the
    claim of its id meets: of two payloads, the ledger may hold the second.
    """
    first: dict[tuple[int, bytes], Delivery] = {}
    rivals: list[Delivery] = []
    if known := [
        message for message in deliveries if type(message.outcome) is Duplicate
    ]:  # to Redis: there may be many
        outcomes |= {message: message.outcome for message in known if message.outcome is not None}
        deliveries = [message for message in deliveries if type(message.outcome) is not Duplicate]
    if not scheduler.delayed and all(
        [message.outcome is None and message.handler.idempotent for message in deliveries]
    ):
        # fast path. Reversed, so that the first occurrence of an id wins.
        keys = [(message.handler.number, message.id) for message in deliveries]
        first = dict(zip(reversed(keys), reversed(deliveries), strict=True))
        if len(first) == len(keys):
            return list(deliveries), rivals
        claims: list[Delivery] = []
        for key, delivery in zip(keys, deliveries, strict=True):
            if first[key] is delivery:
                claims.append(delivery)
            else:
                _settle_repeated(first[key], delivery, outcomes, rivals)
        return claims, rivals
    for delivery in deliveries:
        match delivery.outcome:
            case None if scheduler.is_blocked(delivery):
                outcomes[delivery] = BEHIND_RETRY
            case None | Dead() if delivery.handler.idempotent:
                key = (delivery.handler.number, delivery.id)
                earlier = first.setdefault(key, delivery)
                if earlier is not delivery:
                    _settle_repeated(earlier, delivery, outcomes, rivals)
            case RetryLater() | Dead() | Skipped():
                outcomes[delivery] = delivery.outcome
            case None | Applied() | Duplicate():
                raise AssertionError("a handler without a ledger row is settled before the transaction")
    return list(first.values()), rivals


def _settle_repeated(
    first: Delivery, second: Delivery, outcomes: dict[Delivery, Outcome], rivals: list[Delivery]
) -> None:
    """Settle the second message of an id, or keep a rival."""
    if first.fingerprint == second.fingerprint:
        outcomes[second] = DUPLICATE[Cause.BATCH]
    else:
        rivals.append(second)


async def _under_rules(
    session: BatchStore, existing: dict[Delivery, ExistingClaim], topics: Mapping[str, int]
) -> dict[Delivery, ExistingClaim]:
    """Return the existing claims, with clashes as the handlers' rules see them.

    A handler that compares nothing has none. Rows from before a handler got its rule have the fingerprint of the bytes:
    the same bytes are the same message under any rule.
    """
    twins: dict[Delivery, Delivery] = {}
    for delivery in [delivery for delivery, claim in existing.items() if claim.clashes]:
        rule = delivery.handler.fingerprint
        if not rule.compares:
            claim = existing[delivery]._replace(clashes=False)
            existing[delivery] = REDELIVERED if claim == REDELIVERED else claim
        elif rule is not BYTES:
            twins[by_bytes(delivery)] = delivery
    if twins:
        for twin, claim in (await session.claims_of(list(twins), topics)).items():
            if not claim.clashes:
                existing[twins[twin]] = claim
    return existing


def _sort_out(
    claims: Sequence[Delivery],
    existing: Mapping[Delivery, ExistingClaim],
    scheduler: Scheduler,
    outcomes: dict[Delivery, Outcome],
) -> list[Delivery]:
    """Return the messages that won their claim; set the others' outcomes."""
    won: list[Delivery] = []
    for delivery in claims:
        earlier = existing.get(delivery)
        if earlier is REDELIVERED:
            outcomes[delivery] = DUPLICATE[Cause.LEDGER]
        elif earlier is None:
            won.append(delivery)
            if delivery.outcome is not None:
                outcomes[delivery] = delivery.outcome  # a dead letter before its handler ran
        elif earlier.clashes:
            outcomes[delivery] = CONFLICT
        else:
            outcomes[delivery] = DUPLICATE[Cause.DEAD_LETTER if earlier.dead else Cause.LEDGER]
            if earlier.dead and earlier.same_record:
                # By a COMMIT whose answer was lost, maybe: then it holds its key.
                scheduler.mark_possibly_held(delivery)
    return won


def _compare_values(rivals: Sequence[Delivery], won: Sequence[Delivery], outcomes: dict[Delivery, Outcome]) -> None:
    """Say whether the values are equal, for conflicts within the batch."""
    firsts = {(message.handler, message.id): message for message in won}
    for rival in rivals:
        first = firsts.get((rival.handler, rival.id))
        if first is not None and outcomes.get(rival) == CONFLICT:
            outcomes[rival] = conflict_of(equal_values(first, rival))


def conflict_of(is_equal: bool | None) -> Dead:
    """Return the outcome of a reused id. is_equal: None if unknown."""
    if is_equal is None:
        return CONFLICT
    values = 'equal: fingerprint="value" takes them as one message' if is_equal else "different"
    return Dead(Reason.ID_CONFLICT, f"{CONFLICT.error}; the decoded values are {values}")


async def refuse_forgotten(session: BatchStore, won: Sequence[Delivery], outcomes: dict[Delivery, Outcome]) -> None:
    """Make dead letters of messages that are older than the ledger remembers."""
    if not session.has_forgotten or not won:
        return
    for delivery in await session.too_old([message for message in won if message.outcome is None]):
        at = delivery.record.timestamp
        dead = TOO_OLD if is_time(at) else replace(TOO_OLD, error=f"{TOO_OLD.error} ({what_is_wrong(at)})")
        outcomes[delivery] = dead


async def hold_back(
    session: BatchStore, scheduler: Scheduler, won: Sequence[Delivery], outcomes: dict[Delivery, Outcome]
) -> None:
    """Keep messages behind the dead letters of their keys.

    race: a retry may settle those dead letters meanwhile; postgres/dead_letters.py says what happens then.
    """
    possibly_held = [message for message in scheduler.possibly_held(won) if message not in outcomes]
    if not possibly_held:
        return
    for delivery, hold in (await session.key_holds(possibly_held)).items():
        match hold:
            case KeyHold.HELD:
                outcomes[delivery] = BEHIND_DEAD_LETTER
            case KeyHold.BUSY:
                outcomes[delivery] = BUSY
            case KeyHold.FREE:
                scheduler.mark_not_held(delivery)
