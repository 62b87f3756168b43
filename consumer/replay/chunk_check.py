"""Check one chunk: claim its messages again, and roll back.

A claim that is won shows that the ledger lacks the message, or that the claim does not hold. chunk_counts.py counts the
result. Limitations: it does not see what a handler did outside its transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from consumer.core.delivery import Delivery
from consumer.core.message import Partition
from consumer.postgres.claims import REDELIVERED, ExistingClaim
from consumer.postgres.session import Session
from consumer.replay.check import MissingMessage, ReplayCheck
from consumer.replay.effects import Rows, rows_written, wrote_anything
from consumer.transaction.result import BatchResult


class ChunkCheck:
    """Observes the dry run of one chunk, and asks the ledger.

    missing: to be run dry, or applied. precheck_hits: None where Redis did not answer. others: all but those that the
    ledger has as applied by the very same record. clashing: with the payload of a message that is missing too. dead:
    those that are a dead letter.
    """

    def __init__(self, check: ReplayCheck, partition: Partition, deliveries: Sequence[Delivery]) -> None:
        self.check = check
        self.partition = partition
        self.deliveries = deliveries
        self.unreadable = {delivery for delivery in deliveries if delivery.outcome is not None}  # as identified
        self.missing: list[Delivery] = []
        self.precheck_hits: set[Delivery] | None = set()
        self.others: list[Delivery] = []
        self.clashing: set[Delivery] = set()
        self.dead: set[Delivery] = set()
        self.begin()

    def begin(self) -> None:
        """Forget what a failed attempt saw."""
        self.existing: dict[Delivery, ExistingClaim] = {}
        self.absent: set[Delivery] = set()  # claimed, and not in the ledger
        self.too_old: set[Delivery] = set()  # of those, the ones that a worker would not apply
        self.reclaimed = 0  # claimed, although the ledger holds them
        self.rows_before: dict[str, Rows] | None = None
        self.rows: dict[str, Rows] = {}
        self.non_row_writes = False
        self.lost_claims_wrote = False

    # -- in the transaction -----------------------------------------------------------------------------------------

    async def claimed(
        self, session: Session, existing: Mapping[Delivery, ExistingClaim], won: list[Delivery]
    ) -> list[Delivery]:
        """Ask another connection about the claims that were won.

        Returns the messages whose handlers run: settled ones that could be claimed again.
        """
        self.existing = dict(existing)
        # Counts of earlier transactions may still show here: ours, or behind a pooler those of any other client.
        self.rows_before = await rows_written(session.connection)
        if not won:
            # race: while the ledger rotates, or a worker claims the same id at this moment, a lost claim writes too
            self.lost_claims_wrote = await wrote_anything(session.connection)
            return won
        # invariant: while our claims are held, no other transaction can commit these ids. What another connection sees
        # of them now was there before, and must not have been claimable: the writes of their handlers are counted.
        check = self.check
        settled, absent = await check.existing_claims(won)
        self.existing |= settled
        self.absent = set(absent)
        self.too_old = set(await session.too_old(absent))
        self.reclaimed = len(settled)
        return [delivery for delivery in won if delivery in settled] if check.calls_handlers else []

    async def handled(self, session: Session, result: BatchResult) -> None:
        """Read what the transaction wrote, before its rollback."""
        self.rows = await rows_written(session.connection, self.rows_before)
        # Claims of missing messages are writes too: then the id of the transaction says nothing.
        says_nothing = self.rows or self.absent or self.lost_claims_wrote
        self.non_row_writes = not says_nothing and await wrote_anything(session.connection)

    # -- after it ---------------------------------------------------------------------------------------------------

    async def sort(self) -> None:
        """Find missing messages, and those that should be dead letters."""
        check, existing = self.check, self.existing
        await self._ask_behind_clashes()
        self.others = [delivery for delivery in self.deliveries if existing.get(delivery) is not REDELIVERED]
        self.others += [delivery for delivery in self.unreadable if existing.get(delivery) is REDELIVERED]
        seen: set[tuple[str, bytes]] = set()
        should_be_dead: list[Delivery] = []
        for delivery in self.others:
            claim = self.claim_of(delivery)
            if claim is not None and (claim.clashes or claim.dead):
                should_be_dead.append(delivery)
            if delivery not in self.absent or self.in_doubt(delivery):
                continue
            key = (delivery.handler.name, delivery.id)
            before = check.missing.get(key)
            if before is not None and before.fingerprint != delivery.fingerprint:
                self.clashing.add(delivery)  # with one that is missing itself
                if check.applies:
                    self.missing.append(delivery)
            elif before is None and key not in seen:
                seen.add(key)
                self.missing.append(delivery)
                if check.applies:  # on its way: no other lane may take it
                    check.missing[key] = MissingMessage.of(delivery)
        if should_be_dead:
            await self._find_dead_letters(should_be_dead)

    async def _find_dead_letters(self, should_be_dead: Sequence[Delivery]) -> None:
        check = self.check
        self.dead = await check.with_dead_letter(should_be_dead)
        if check.applies:
            clashing = [
                delivery
                for delivery in should_be_dead
                if delivery not in self.dead and self.clashes(delivery) and not self.in_doubt(delivery)
            ]
            self.missing = sorted([*self.missing, *clashing], key=lambda delivery: delivery.record.offset)

    async def _ask_behind_clashes(self) -> None:
        """Ask about payloads behind a first one that clashes.

        Only the first delivery with an id was claimed. Its answer says nothing about another payload: that may be the
        one that was applied, where the worker began behind the first.
        """
        unsure = [
            delivery
            for delivery in self.deliveries
            if delivery not in self.existing
            and delivery not in self.absent
            and (first := self._firsts[delivery.handler.name, delivery.id]) is not delivery
            and first.fingerprint != delivery.fingerprint
            and (claim := self.existing.get(first)) is not None
            and claim.clashes
        ]
        if unsure:
            claims, _ = await self.check.existing_claims(unsure)
            self.existing |= claims

    # -- about one delivery -----------------------------------------------------------------------------------------

    def in_doubt(self, delivery: Delivery) -> bool:
        """Return whether absence from the ledger proves nothing."""
        return delivery in self.too_old or self.check.in_doubt(delivery)

    def clashes(self, delivery: Delivery) -> bool:
        """Return whether its id was used with another payload."""
        claim = self.claim_of(delivery)
        return delivery in self.clashing or (claim is not None and claim.clashes)

    def claim_of(self, delivery: Delivery) -> ExistingClaim | None:
        """Return the claim of a delivery.

        Of several with one id in a chunk, only the first was claimed: it speaks for the others.
        """
        claim = self.existing.get(delivery)
        if claim is not None or delivery in self.absent:
            return claim
        first = self._firsts[delivery.handler.name, delivery.id]
        if first.fingerprint != delivery.fingerprint:
            return ExistingClaim(False, True, False)
        claim = self.existing.get(first)
        return None if claim is None else ExistingClaim(claim.dead, claim.clashes, False)

    @cached_property
    def _firsts(self) -> dict[tuple[str, bytes], Delivery]:
        """Return the first delivery of each handler and id."""
        firsts: dict[tuple[str, bytes], Delivery] = {}
        for delivery in self.deliveries:
            firsts.setdefault((delivery.handler.name, delivery.id), delivery)
        return firsts
