"""What the ledger knows of the messages of a rebuild: applied where and when, dead, or edited by an operator.

Knows SQL through a connection that is handed in; the transaction that it runs in gives one snapshot for all questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from consumer.rebuild.applied_order import Entry
from consumer.rebuild.left_out import LeftOut
from consumer.transaction.identify import by_bytes

EDITS_MAX = 100_000
RETRIES_MAX = 100_000
UNREADABLE_MAX = 10_000  # whose place in the ledger is looked up


_Place = tuple[int, Partition, int]  # handler, partition, offset


def offers(deliveries: Sequence[Delivery]) -> Offers:
    """Handlers, ids and fingerprints, as columns."""
    return Offers(
        [each.handler.number for each in deliveries],
        uuids([each.id for each in deliveries]),
        [each.fingerprint for each in deliveries],
    )


@dataclass(slots=True)
class Applied:
    """Sorts the messages of one rebuild by what the ledger says of them.

    positions: below them everything is settled. conflicts: messages whose id was applied with another payload.
    unrecorded: messages that the ledger does not know although they are settled. too_many_retries: the order of the retries of
    one transaction is not followed.
    """

    connection: Connection
    positions: Mapping[Partition, int]
    spans: Mapping[Partition, Span] = field(default_factory=dict)
    conflicts: int = 0
    unrecorded: int = 0
    too_many_retries: bool = False
    left_out: LeftOut = field(default_factory=LeftOut)
    codes: Mapping[int, Versions] = field(default_factory=dict)  # of handlers, by number
    # Messages that may have met another code, by handler.
    with_other_code: Counter[int] = field(default_factory=Counter)
    _dead: int = 0
    _edits: Sequence[Any] = ()
    _edited: set[_Place] = field(default_factory=set)
    _retries: dict[_Place, int] = field(default_factory=dict)
    _unreadable: set[_Place] = field(default_factory=set)

    async def read(self, handlers: Collection[int], topics: Collection[str]) -> None:
        """Note the messages that were never applied, and those that were edited. Raises CannotTell.

        Call it before the transaction becomes read only, and before the guard of the copies notes which tables of the
        framework are locked: what is locked later is taken for a handler's statement.
        """
        self._dead = await applied_queries.collect_dead(self.connection, list(handlers))
        self._edits = await dead_letter_queries.applied_edits(
            self.connection, list(handlers), list(topics), EDITS_MAX + 1
        )
        if len(self._edits) > EDITS_MAX:
            raise CannotTell(f"more than {EDITS_MAX:,} dead letters were edited; a rebuild cannot follow so many")
        retries = await dead_letter_queries.applied_retries(
            self.connection, list(handlers), list(topics), RETRIES_MAX + 1
        )
        self.too_many_retries = len(retries) > RETRIES_MAX
        if not self.too_many_retries:
            self._retries = dict(retries)

    def edits(self, handlers: Sequence[Handler]) -> list[Entry]:
        """Dead letters that an operator has edited and that were applied: with the edited value, when that was.

        The message of the log that each of them replaces is left out.
        """
        by_number = {handler.number: handler for handler in handlers}
        entries: list[Entry] = []
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
                Entry(delivery, row["applied_at"] or row["acted_at"], row["timestamp"] * 1000, action=row["action"])
            )
        return entries

    async def entries(self, deliveries: Sequence[Delivery]) -> list[Entry]:
        """Each delivery with its time. Those without an effect have an outcome: duplicates, dead, or not settled yet.

        deliveries: identified, of one partition, in offset order, a record's handlers side by side.
        """
        waiting = [each for each in deliveries if each.outcome is None or isinstance(each.outcome, Dead)]
        await self._sort_dead(waiting)
        times, facts = await self._facts(deliveries)
        entries: list[Entry] = []
        last, turn = -1, 0
        for delivery, at in zip(deliveries, times, strict=True):
            record = delivery.record
            turn = turn + 1 if record.offset == last else 0
            last = record.offset
            if at is None or delivery.outcome is not None:
                at = self._judge(delivery, facts.get(delivery))
            versions = self.codes.get(delivery.handler.number)
            if versions is not None and delivery.outcome is None and versions.may_be_other(at):
                self.with_other_code[delivery.handler.number] += 1
            action = None
            if self._retries and at is not None:
                action = self._retries.get((delivery.handler.number, delivery.partition, record.offset))
            entries.append(Entry(delivery, at, record.timestamp * 1000, turn, action))
        return entries

    async def _facts(self, deliveries: Sequence[Delivery]) -> tuple[list[int | None], dict[Delivery, Fact]]:
        """When each was applied, if as what it is here, and what there is to know of the others.

        deliveries: of one partition. Those of a handler with a rule of comparison are looked for under the fingerprint of
        their bytes too: their row may be from before the rule.
        """
        times: list[int | None] = [None] * len(deliveries)
        facts: dict[Delivery, Fact] = {}
        partition = deliveries[0].partition
        offsets = [each.record.offset for each in deliveries]
        answer = await applied_queries.times(self.connection, offers(deliveries), offsets, partition)
        for place, at in answer.same:
            times[place - 1] = at
        for place, fact in answer.others:
            delivery = deliveries[place - 1]
            if delivery not in facts or fact.is_alike:
                facts[delivery] = fact
        earlier = [
            each
            for each, at in zip(deliveries, times, strict=True)
            if at is None and each.handler.fingerprint is not BYTES
        ]
        if earlier:
            for place, fact in await applied_queries.facts(
                self.connection, offers([by_bytes(each) for each in earlier])
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

        Deliveries of a handler with a rule
        of comparison are also looked for under the fingerprint of their bytes: their row may be from before the rule.
        """
        earlier = [each for each in deliveries if each.handler.fingerprint is not BYTES]
        asked = [*deliveries, *earlier]
        if not asked:
            return []
        offered = [*deliveries, *map(by_bytes, earlier)]
        return [asked[place - 1] for place in await question(self.connection, offers(offered))]

    def _judge(self, delivery: Delivery, fact: Fact | None) -> int | None:
        """Give a delivery without an effect its outcome; return when the others were applied, if that is known."""
        record = delivery.record
        if isinstance(delivery.outcome, Dead):
            if len(self._unreadable) < UNREADABLE_MAX:
                self._unreadable.add((delivery.handler.number, delivery.partition, record.offset))
        elif delivery.outcome is None and fact is None:
            if self.left_out.takes(delivery, self.positions.get(delivery.partition, 0)):
                delivery.outcome = SKIPPED
            else:
                self.unrecorded += 1
        elif delivery.outcome is None and fact is not None:
            at, topic, number, offset, alike = fact
            if alike and offset == record.offset and number == record.partition and topic == record.topic:
                return int(at)
            span = self.spans.get(Partition(topic, number))
            if not alike and self.left_out.takes(delivery, self.positions.get(delivery.partition, 0)):
                # Never applied, so the payload that came later with its id is no conflict.
                delivery.outcome = SKIPPED
            elif not alike or offset < 0 or (span is not None and span.first <= offset < span.end):
                # The effect is that of another record, which is replayed in its own place.
                delivery.outcome = DUPLICATE[Cause.LEDGER]
                self.conflicts += not alike
            else:
                return int(at)
        return None

    async def unreadable_but_applied(self) -> int:
        """How many messages the ledger has as applied although today's code cannot read or identify them."""
        places = sorted(self._unreadable)
        if not places:
            return 0
        return await applied_queries.count_applied_at(self.connection, places)

    def note_unreadable(self, delivery: Delivery) -> None:
        """Note a message whose handler could not be given its value."""
        if len(self._unreadable) < UNREADABLE_MAX:
            self._unreadable.add((delivery.handler.number, delivery.partition, delivery.record.offset))
