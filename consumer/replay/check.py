"""Keep what all chunks of one replay share.

That is what is missing so far, and a connection that sees what others commit. Asks the ledger and the dead letters, and
settles nothing. Reads no log. chunk_check.py checks one chunk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from consumer.core.delivery import Delivery
from consumer.core.fingerprint import BYTES
from consumer.core.message import Partition
from consumer.handler_records.settled_ranges import SettledRange
from consumer.postgres.claims import ExistingClaim
from consumer.postgres.session import Session
from consumer.replay import ledger_diff
from consumer.replay.findings import BLOCK_BITS, Findings
from consumer.replay.samples import sample_place
from consumer.replay.unsettled import UnsettledMessage
from consumer.transaction.identify import by_bytes

_MISSING_MAX = 200_000  # ids kept, so that a repetition among them is not counted as another message
_UNSETTLED_MAX = 20_000  # messages without their dead letter that are asked again at the end
_KEPT_MAX = 50_000  # settled messages and dead letters that are checked again at the end
_ONE_QUESTION = 4096  # of them


class MissingMessage(NamedTuple):
    """Where a missing message is, and what it holds."""

    partition: Partition
    offset: int
    timestamp: int
    fingerprint: int

    @classmethod
    def of(cls, delivery: Delivery) -> MissingMessage:
        """Return a delivery as a missing message."""
        record = delivery.record
        return cls(delivery.partition, record.offset, record.timestamp, delivery.fingerprint)


@dataclass(slots=True)
class ReplayCheck:
    """What all chunks of one replay share.

    applies: what is missing is about to be applied, so it is counted when that is done. calls_handlers: handlers may be
    called for messages that could be claimed although they are settled. horizons: where the ledger began in a
    partition, None where that was not recorded; absence of earlier messages proves nothing.
    """

    findings: Findings
    applies: bool
    calls_handlers: bool
    assume_unapplied: bool
    connect: Callable[[], Awaitable[Session]]
    topics: Mapping[str, int] = field(default_factory=dict)
    horizons: dict[Partition, int | None] = field(default_factory=dict)
    exempt: Mapping[tuple[str, Partition], Sequence[SettledRange]] = field(default_factory=dict)  # by handler
    floors: Mapping[tuple[str, Partition], int] = field(default_factory=dict)  # below: ids may be of another rule
    # Ledger rows of the very records that were read.
    matched: dict[ledger_diff.Block, int] = field(default_factory=dict)
    missing: dict[tuple[str, bytes], MissingMessage] = field(default_factory=dict)  # by handler and id
    # Settled messages whose rows replay/ledger_diff.py does not count: handler and id -> partition, offset.
    settled_elsewhere: dict[tuple[str, bytes], tuple[Partition, int]] = field(default_factory=dict)
    # Handler, id and fingerprint -> partition, offset.
    dead_letters_seen: dict[tuple[str, bytes, int], tuple[Partition, int]] = field(default_factory=dict)
    uncounted: frozenset[str] = frozenset()  # handlers whose rows replay/ledger_diff.py does not count
    overflow: str = ""  # which messages were more than could be kept
    would: dict[str, int] = field(default_factory=dict)  # what the handlers of missing messages would do
    unsettled: list[UnsettledMessage] = field(default_factory=list)  # to be asked again at the end
    session: Session | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    # -- questions to the database ----------------------------------------------------------------------------------

    async def open(self) -> Session:
        """Return the connection; opens another one where it was lost."""
        if self.session is None or not self.session.is_usable:
            self.session = await self.connect()
        return self.session

    async def existing_claims(
        self, deliveries: Sequence[Delivery]
    ) -> tuple[dict[Delivery, ExistingClaim], list[Delivery]]:
        """Return the committed claims of these ids, and deliveries without one."""
        async with self._lock:
            session = await self.open()
            claims, absent = await session.existing_claims(deliveries, self.topics)
            # Rows from before a handler's rule of comparison have the fingerprint of the bytes.
            by_rule = [
                delivery
                for delivery, claim in claims.items()
                if claim.clashes and delivery.handler.fingerprint is not BYTES
            ]
            if by_rule:
                compared = {by_bytes(delivery): delivery for delivery in by_rule}
                claims_by_bytes, _ = await session.existing_claims(list(compared), self.topics)
                claims |= {compared[twin]: claim for twin, claim in claims_by_bytes.items() if not claim.clashes}
            return claims, absent

    async def with_dead_letter(self, deliveries: Sequence[Delivery]) -> set[Delivery]:
        """Return those that are dead letters, with this id and this payload."""
        async with self._lock:
            session = await self.open()
            dead = set(await session.with_dead_letter(deliveries))
            # Dead letters from before a handler's rule of comparison have the fingerprint of the bytes.
            compared = {
                by_bytes(delivery): delivery
                for delivery in deliveries
                if delivery not in dead and delivery.handler.fingerprint is not BYTES
            }
            dead_by_bytes = await session.with_dead_letter(list(compared)) if compared else []
            self._keep_dead_letters([*dead, *dead_by_bytes])
            return dead | {compared[twin] for twin in dead_by_bytes}

    async def claimed_ids(self, ids: Sequence[tuple[int, bytes]]) -> set[tuple[int, bytes]]:
        """Return those (handler, id) that the ledger holds now."""
        async with self._lock:
            return await (await self.open()).claimed_ids(ids)

    # -- what is kept -----------------------------------------------------------------------------------------------

    def keep_missing(self, delivery: Delivery) -> bool:
        """Keep a missing message; return False where there are too many."""
        if len(self.missing) >= _MISSING_MAX:
            return False
        self.missing[delivery.handler.name, delivery.id] = MissingMessage.of(delivery)
        return True

    def keep_settled(self, delivery: Delivery) -> None:
        """Keep a settled message whose row is to be checked again."""
        key = (delivery.handler.name, delivery.id)
        if len(self.settled_elsewhere) < _KEPT_MAX:
            self.settled_elsewhere.setdefault(key, (delivery.partition, delivery.record.offset))
        elif key not in self.settled_elsewhere:
            self.overflow = "messages that were applied as records of another place, or of a key"

    def _keep_dead_letters(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            key = (delivery.handler.name, delivery.id, delivery.fingerprint)
            if len(self.dead_letters_seen) < _KEPT_MAX:
                self.dead_letters_seen.setdefault(key, (delivery.partition, delivery.record.offset))
            elif key not in self.dead_letters_seen:
                self.overflow = "dead letters"

    def count_unsettled(self, delivery: Delivery, kind: str) -> None:
        """Count a message that should be a dead letter.

        kind: of its sample.
        """
        self.findings.unsettled += 1
        if len(self.unsettled) < _UNSETTLED_MAX:
            self.unsettled.append(UnsettledMessage.of(delivery, kind))

    def count_applied(self, delivery: Delivery) -> None:
        """Count the row of a message that was applied now."""
        key = (delivery.handler.name, delivery.partition, delivery.record.offset >> BLOCK_BITS)
        self.matched[key] = self.matched.get(key, 0) + 1

    async def find_deleted(self, numbers: Mapping[str, int]) -> None:
        """Find rows and dead letters that are gone since they were seen.

        numbers: of the handlers, by name.
        """
        for settled in _slices(list(self.settled_elsewhere.items())):
            keys = [(numbers[name], id) for (name, id), _ in settled]
            claimed = await self.claimed_ids(keys)
            for key, ((name, id), (partition, offset)) in zip(keys, settled, strict=True):
                if key not in claimed:
                    self.findings.count_gone(name, partition, offset, id)
        for dead_letters in _slices(list(self.dead_letters_seen.items())):
            asked = [(numbers[name], id, fingerprint) for (name, id, fingerprint), _ in dead_letters]
            async with self._lock:
                gone = await (await self.open()).without_dead_letter(asked)
            for index in gone:
                (name, id, _), (partition, offset) = dead_letters[index]
                self.findings.unsettled += 1
                where = sample_place(name, partition, offset, id)
                self.findings.sample("unsettled", **where, detail="its dead letter is gone")

    # -- what absence means -----------------------------------------------------------------------------------------

    def in_doubt(self, delivery: Delivery) -> bool:
        """Return whether absence from the ledger proves nothing.

        The handler need not settle the message, may have known it under another id, or the ledger began later.
        """
        if self.assume_unapplied:
            return False
        if self.is_exempt(delivery):
            return True
        if self.may_have_other_id(delivery):
            return True
        partition = delivery.partition
        horizon = self.horizons.get(partition)
        if horizon is None:  # not recorded: the ledger may have begun anywhere below the position
            horizon = self.findings.positions.get(partition, 0)
        return delivery.record.offset < horizon

    def may_have_other_id(self, delivery: Delivery) -> bool:
        """Return whether the message may be applied under another rule's id."""
        return bool(self.floors) and delivery.record.offset < self.floors.get(
            (delivery.handler.name, delivery.partition), 0
        )

    def is_exempt(self, delivery: Delivery) -> bool:
        """Return whether the handler need not settle the message.

        `consumer positions --begin-here` records that.
        """
        if not self.exempt or self.assume_unapplied:
            return False
        offset = delivery.record.offset
        ranges = self.exempt.get((delivery.handler.name, delivery.partition), ())
        return any(settled.past is not None and settled.first <= offset < settled.past for settled in ranges)


def _slices(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), _ONE_QUESTION):
        yield items[start : start + _ONE_QUESTION]
