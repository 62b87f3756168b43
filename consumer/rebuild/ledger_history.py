"""Reads from the ledger what became of the messages of a rebuild.

Which were applied and when, which are dead letters, and which an operator edited or retried. Uses the connection of the
rebuild: its transaction gives one snapshot for all questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from consumer.core.dead_letter_seal import is_erased
from consumer.core.delivery import Delivery
from consumer.core.errors import CannotTell
from consumer.core.fingerprint import BYTES
from consumer.core.handler import Handler
from consumer.core.message import LogRecord, Partition
from consumer.core.outcome import DUPLICATE, SKIPPED, Cause, Dead
from consumer.handler_records.source_text import Versions
from consumer.kafka.bounds import Span
from consumer.postgres import applied_queries, dead_letter_queries
from consumer.postgres.applied_queries import Fact, Offers
from consumer.postgres.claims import uuids
from consumer.postgres.protocol import Connection
from consumer.rebuild.applied_order import OrderEntry
from consumer.rebuild.omitted_messages import OmittedMessages
from consumer.transaction.identify import by_bytes

EDITS_MAX = 100_000
RETRIES_MAX = 100_000
UNREADABLE_MAX = 10_000  # messages that are looked up in the ledger


_Place = tuple[int, Partition, int]  # handler, partition, offset


def offers(deliveries: Sequence[Delivery]) -> Offers:
    """Return handlers, ids and fingerprints as columns."""
    return Offers(
        [delivery.handler.number for delivery in deliveries],
        uuids([delivery.id for delivery in deliveries]),
        [delivery.fingerprint for delivery in deliveries],
    )


@dataclass(slots=True)
class LedgerHistory:
    """Gives each message of a rebuild its time, or its outcome.

    positions: everything below them is settled. spans: the offsets that are replayed. conflicts: messages whose id was applied
    with another payload. unrecorded: settled messages without a ledger row. too_many_retries: the order of retries within a
    transaction is not followed. codes: of handlers, by number. with_other_code: by handler, messages that other code may
    have applied.
    """

    connection: Connection
    positions: Mapping[Partition, int]
    spans: Mapping[Partition, Span] = field(default_factory=dict)
    conflicts: int = 0
    unrecorded: int = 0
    too_many_retries: bool = False
    omitted: OmittedMessages = field(default_factory=OmittedMessages)
    codes: Mapping[int, Versions] = field(default_factory=dict)
    with_other_code: Counter[int] = field(default_factory=Counter)
    _dead: int = 0
    _edits: Sequence[Any] = ()
    _edited: set[_Place] = field(default_factory=set)
    _retries: dict[_Place, int] = field(default_factory=dict)
    _unreadable: set[_Place] = field(default_factory=set)

    async def read(self, handlers: Collection[int], topics: Collection[str]) -> None:
        """Read which messages are dead letters, were edited, or were retried.

        Call it before the transaction becomes read only, and before StatementGuard notes which tables are locked: a later
        lock counts as that of a handler's statement. Raises CannotTell if too many were edited.
        """
        self._dead = await applied_queries.collect_dead(self.connection, list(handlers))
        self._edits = await dead_letter_queries.applied_edits(
            self.connection, list(handlers), list(topics), EDITS_MAX + 1
        )
        if len(self._edits) > EDITS_MAX:
            raise CannotTell(f"more than {EDITS_MAX:,} dead letters were edited: a rebuild cannot follow so many")
        if erased := sum(is_erased(row) for row in self._edits):
            raise CannotTell(
                f"{erased:,} dead letters were edited, applied and then erased: nothing can repeat their effects"
            )
        retries = await dead_letter_queries.applied_retries(
            self.connection, list(handlers), list(topics), RETRIES_MAX + 1
        )
        self.too_many_retries = len(retries) > RETRIES_MAX
        if not self.too_many_retries:
            self._retries = dict(retries)

    def edits(self, handlers: Sequence[Handler]) -> list[OrderEntry]:
        """Return the applied dead letters that an operator edited.

        They have the edited value, and the time of the retry. The original messages are left out.
        """
        by_number = {handler.number: handler for handler in handlers}
        entries: list[OrderEntry] = []
        for row in self._edits:
            handler = by_number[row["handler"]]
            partition = Partition(row["topic"], row["partition"])
            if partition not in self.spans:
                continue
            self._edited.add((handler.number, partition, row["offset"]))
            names = [name.decode("utf-8", "surrogateescape") for name in row["header_keys"]]
            record = LogRecord(
                topic=row["topic"],
                partition=row["partition"],
                offset=row["offset"] if row["new_id"] is None else -row["dead_letter"],
                timestamp=row["timestamp"],
                key=row["key"],
                value=row["new_value"],
                headers=tuple(zip(names, row["header_values"], strict=True)),
            )
            delivery = Delivery(handler, record, (row["new_id"] or row["id"]).bytes, row["fingerprint"])
            entries.append(
                OrderEntry(
                    delivery, row["applied_at"] or row["acted_at"], row["timestamp"] * 1000, action=row["action"]
                )
            )
        return entries

    async def entries(self, deliveries: Sequence[Delivery]) -> list[OrderEntry]:
        """Return each delivery with its time, or set its outcome.

        An outcome is set for those without an effect: duplicates, dead letters, and messages that are not settled yet.
        deliveries: identified, of one partition, in offset order, the handlers of a record side by side.
        """
        waiting = [
            delivery for delivery in deliveries if delivery.outcome is None or isinstance(delivery.outcome, Dead)
        ]
        await self._sort_dead(waiting)
        times, facts = await self._facts(deliveries)
        entries: list[OrderEntry] = []
        last, turn = -1, 0
        for delivery, at in zip(deliveries, times, strict=True):
            record = delivery.record
            turn = turn + 1 if record.offset == last else 0
            last = record.offset
            if at is None or delivery.outcome is not None:
                at = self._classify(delivery, facts.get(delivery))
            versions = self.codes.get(delivery.handler.number)
            if versions is not None and delivery.outcome is None and versions.may_be_other(at):
                self.with_other_code[delivery.handler.number] += 1
            action = None
            if self._retries and at is not None:
                action = self._retries.get((delivery.handler.number, delivery.partition, record.offset))
            entries.append(OrderEntry(delivery, at, record.timestamp * 1000, turn, action))
        return entries

    async def _facts(self, deliveries: Sequence[Delivery]) -> tuple[list[int | None], dict[Delivery, Fact]]:
        """Return when each was applied, and the ledger rows of the others.

        deliveries: of one partition. A time is known if the ledger row names the same record and payload. Handlers with a
        rule of comparison are asked for under the fingerprint of the bytes too: their row may be older than the rule.
        """
        times: list[int | None] = [None] * len(deliveries)
        facts: dict[Delivery, Fact] = {}
        partition = deliveries[0].partition
        offsets = [delivery.record.offset for delivery in deliveries]
        answer = await applied_queries.times(self.connection, offers(deliveries), offsets, partition)
        for place, at in answer.same:
            times[place - 1] = at
        for place, fact in answer.others:
            delivery = deliveries[place - 1]
            if delivery not in facts or fact.is_alike:
                facts[delivery] = fact
        earlier = [
            delivery
            for delivery, at in zip(deliveries, times, strict=True)
            if at is None and delivery.handler.fingerprint is not BYTES
        ]
        if earlier:
            for place, fact in await applied_queries.facts(
                self.connection, offers([by_bytes(delivery) for delivery in earlier])
            ):
                delivery = earlier[place - 1]
                if delivery not in facts or fact.is_alike:
                    facts[delivery] = fact
        return times, facts

    async def _sort_dead(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries if self._edited else ():
            if (delivery.handler.number, delivery.partition, delivery.record.offset) in self._edited:
                delivery.outcome = DUPLICATE[Cause.DEAD_LETTER]
        if self._dead and deliveries:
            for delivery in await self.ask(applied_queries.dead_places, deliveries):
                delivery.outcome = DUPLICATE[Cause.DEAD_LETTER]

    async def ask(
        self, question: Callable[[Connection, Offers], Awaitable[list[int]]], deliveries: Sequence[Delivery]
    ) -> list[Delivery]:
        """Return the deliveries whose places answer a question.

        Handlers with a rule of comparison are asked for under the fingerprint of the bytes too: see `_facts`.
        """
        earlier = [delivery for delivery in deliveries if delivery.handler.fingerprint is not BYTES]
        asked = [*deliveries, *earlier]
        if not asked:
            return []
        offered = [*deliveries, *map(by_bytes, earlier)]
        return [asked[place - 1] for place in await question(self.connection, offers(offered))]

    def _classify(self, delivery: Delivery, fact: Fact | None) -> int | None:
        """Set the outcome of a delivery without an effect.

        Returns when it was applied, for one with an effect whose time the ledger knows.
        """
        record = delivery.record
        if isinstance(delivery.outcome, Dead):
            self.note_unreadable(delivery)
        elif delivery.outcome is None and fact is None:
            if self.omitted.takes(delivery, self.positions.get(delivery.partition, 0)):
                delivery.outcome = SKIPPED
            else:
                self.unrecorded += 1
        elif delivery.outcome is None and fact is not None:
            at, topic, number, offset, alike = fact
            if alike and offset == record.offset and number == record.partition and topic == record.topic:
                return int(at)
            span = self.spans.get(Partition(topic, number))
            if not alike and self.omitted.takes(delivery, self.positions.get(delivery.partition, 0)):
                # It was never applied, so a later payload with its id is no conflict.
                delivery.outcome = SKIPPED
            elif not alike or offset < 0 or (span is not None and span.first <= offset < span.end):
                # Another record made the effect, and is replayed in its own place.
                delivery.outcome = DUPLICATE[Cause.LEDGER]
                self.conflicts += not alike
            else:
                return int(at)
        return None

    async def unreadable_but_applied(self) -> int:
        """Count applied messages that the current code cannot read."""
        places = sorted(self._unreadable)
        if not places:
            return 0
        return await applied_queries.count_applied_at(self.connection, places)

    def note_unreadable(self, delivery: Delivery) -> None:
        """Note a message without an id or with an unreadable value."""
        if len(self._unreadable) < UNREADABLE_MAX:
            self._unreadable.add((delivery.handler.number, delivery.partition, delivery.record.offset))
