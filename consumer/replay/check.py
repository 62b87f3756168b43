"""What is seen of the messages of a replay: in transactions that are undone, and counted after them.

Knows the dry runs of transaction/dry_run.py and the findings of replay/findings.py; knows no Kafka, and settles nothing. Read `ChunkCheck`: it
is the proof of one chunk. What it does not know: what a handler did outside its transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from uuid import UUID

from consumer.core.delivery import Delivery
from consumer.core.fingerprint import BYTES
from consumer.core.message import Partition
from consumer.core.outcome import Dead, Outcome, Reason, RetryLater
from consumer.handler_records.settled_ranges import SettledRange
from consumer.postgres.claims import REDELIVERED, ExistingClaim
from consumer.postgres.session import Session
from consumer.replay import effects as proof
from consumer.replay import ledger_diff
from consumer.replay.findings import BLOCK_BITS, Findings, blocks
from consumer.transaction.identify import by_bytes
from consumer.transaction.result import BEHIND, BatchResult

UNCALLED = RetryLater(0.0, "its handler was not called")  # of a missing message that can be read
_MISSING_MAX = 200_000  # ids kept, so that a repetition among them is not counted as another message
_OPEN_MAX = 20_000  # messages without their dead letter that are asked again at the end
_SLICE = 4096  # of them, in one question
_APART_MAX = 50_000  # ids kept, to be looked at again at the end
_UNREADABLE = {
    Reason.UNREADABLE,
    Reason.NO_VALUE,
    Reason.NO_MESSAGE_ID,
    Reason.AMBIGUOUS_MESSAGE_ID,
    Reason.BAD_HEADER,
}


class Open(NamedTuple):
    """A message that should be a dead letter and is none so far. fingerprints: under which it may be one. kind: of its sample."""

    handler: str
    partition: Partition
    offset: int
    id: bytes
    fingerprints: tuple[int, ...]
    kind: str

    @classmethod
    def of(cls, delivery: Delivery, kind: str) -> Open:
        handler = delivery.handler
        found = [delivery.fingerprint]
        if handler.fingerprint is not BYTES:  # dead letters from before a rule of comparison have that of the bytes
            found.append(by_bytes(delivery).fingerprint)
        return cls(handler.name, delivery.partition, delivery.record.offset, delivery.id, tuple(found), kind)

    def as_state(self) -> list[Any]:
        """As JSON can hold it."""
        return [self.handler, *self.partition, self.offset, self.id.hex(), list(self.fingerprints), self.kind]

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Open:
        handler, topic, partition, offset, id, fingerprints, kind = state
        return cls(handler, Partition(topic, partition), offset, bytes.fromhex(id), tuple(fingerprints), kind)


@dataclass(slots=True)
class ReplayCheck:
    """What all looks of one replay share: the findings, what is missing so far, and a connection that sees what others commit.

    storing: what is missing is about to be applied, so it is counted when that is done. calling: handlers may be called
    for what looks wrong. horizon: where the ledger began
    in a partition, None where that was not recorded; below it, what is absent is in doubt.
    """

    findings: Findings
    storing: bool
    calling: bool
    assume_unapplied: bool
    connect: Callable[[], Awaitable[Session]]
    topics: Mapping[str, int] = field(default_factory=dict)
    horizon: dict[Partition, int | None] = field(default_factory=dict)
    exempt: Mapping[tuple[str, Partition], Sequence[SettledRange]] = field(default_factory=dict)  # by handler
    floors: Mapping[tuple[str, Partition], int] = field(default_factory=dict)  # below: ids may be of another rule
    matched: dict[ledger_diff.Block, int] = field(default_factory=dict)  # rows made by the very records that were read
    # handler and id -> partition, offset, timestamp, fingerprint
    missing: dict[tuple[str, bytes], tuple[Partition, int, int, int]] = field(default_factory=dict)
    # Settled before, and not among the rows that replay/ledger_diff.py counts: handler and id -> partition, offset.
    apart: dict[tuple[str, bytes], tuple[Partition, int]] = field(default_factory=dict)
    letters_seen: dict[tuple[str, bytes, int], tuple[Partition, int]] = field(default_factory=dict)  # with fingerprints
    uncounted: frozenset[str] = frozenset()  # handlers whose rows replay/ledger_diff.py does not count
    forgets: str = ""  # of what there was more than could be kept
    would: dict[str, int] = field(default_factory=dict)  # what the handlers of missing messages would do
    unsettled: list[Open] = field(default_factory=list)  # that should be dead letters, to be asked again at the end
    session: Session | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def standing(self, deliveries: Sequence[Delivery]) -> tuple[dict[Delivery, ExistingClaim], list[Delivery]]:
        """What is committed of these ids, and those without a row, as another connection sees it."""
        async with self._lock:
            session = await self.open()
            found, absent = await session.existing_claims(deliveries, self.topics)
            # Rows from before a handler's rule of comparison have the fingerprint of the bytes.
            by_rule = [
                each for each, stands in found.items() if stands.clashes and each.handler.fingerprint is not BYTES
            ]
            if by_rule:
                earlier = {by_bytes(each): each for each in by_rule}
                again, _ = await session.existing_claims(list(earlier), self.topics)
                found |= {earlier[each]: stands for each, stands in again.items() if not stands.clashes}
            return found, absent

    async def letters(self, deliveries: Sequence[Delivery]) -> set[Delivery]:
        """Those that are dead letters, with this id and this payload."""
        async with self._lock:
            session = await self.open()
            found = set(await session.with_dead_letter(deliveries))
            # Dead letters from before a handler's rule of comparison have the fingerprint of the bytes.
            earlier = {
                by_bytes(each): each
                for each in deliveries
                if each not in found and each.handler.fingerprint is not BYTES
            }
            of_bytes = await session.with_dead_letter(list(earlier)) if earlier else []
            self.keep_letters([*found, *of_bytes])
            return found | {earlier[each] for each in of_bytes}

    async def which_stand(self, ids: Sequence[tuple[int, bytes]]) -> set[tuple[int, bytes]]:
        """Those (handler, id) that the ledger holds now."""
        async with self._lock:
            return await (await self.open()).claimed_ids(ids)

    def keep_apart(self, delivery: Delivery) -> None:
        """Note a settled message whose row is to be looked at again."""
        key = (delivery.handler.name, delivery.id)
        if len(self.apart) < _APART_MAX:
            self.apart.setdefault(key, (delivery.partition, delivery.record.offset))
        elif key not in self.apart:
            self.forgets = "messages that were applied as records of another place, or of a key"

    def matched_now(self, delivery: Delivery) -> None:
        """Note a message that was applied now: its row is made by its own record."""
        key = (delivery.handler.name, delivery.partition, delivery.record.offset >> BLOCK_BITS)
        self.matched[key] = self.matched.get(key, 0) + 1

    def keep_letters(self, deliveries: Iterable[Delivery]) -> None:
        """Note dead letters that are to be looked at again."""
        for each in deliveries:
            key = (each.handler.name, each.id, each.fingerprint)
            if len(self.letters_seen) < _APART_MAX:
                self.letters_seen.setdefault(key, (each.partition, each.record.offset))
            elif key not in self.letters_seen:
                self.forgets = "dead letters"

    async def look_again(self, numbers: Mapping[str, int]) -> None:
        """Find rows and dead letters that were there when their messages were read, and are gone. numbers: of handlers."""
        for apart in _slices(list(self.apart.items())):
            keys = [(numbers[name], id) for (name, id), _ in apart]
            there = await self.which_stand(keys)
            for key, ((name, id), (partition, offset)) in zip(keys, apart, strict=True):
                if key not in there:
                    self.findings.count_gone(name, partition, offset, id)
        for letters in _slices(list(self.letters_seen.items())):
            asked = [(numbers[name], id, fingerprint) for (name, id, fingerprint), _ in letters]
            async with self._lock:
                gone = await (await self.open()).without_dead_letter(asked)
            for place in gone:
                (name, id, _), (partition, offset) = letters[place]
                self.findings.unsettled += 1
                where = {"topic": partition.topic, "partition": partition.partition, "offset": offset}
                self.findings.sample(
                    "unsettled", handler=name, **where, id=str(UUID(bytes=id)), detail="its dead letter is gone"
                )

    async def open(self) -> Session:
        """The connection, made again where it was lost."""
        if self.session is None or not self.session.is_usable:
            self.session = await self.connect()
        return self.session

    def count_unsettled(self, delivery: Delivery, kind: str) -> None:
        """Count a message that should be a dead letter. kind: of its sample."""
        self.findings.unsettled += 1
        if len(self.unsettled) < _OPEN_MAX:
            self.unsettled.append(Open.of(delivery, kind))

    def in_doubt(self, delivery: Delivery) -> bool:
        """Whether absence from the ledger means nothing: it began later, or no longer remembers the time of the message."""
        if self.assume_unapplied:
            return False
        if self.is_exempt(delivery):
            return True
        if self.has_other_id(delivery):
            return True
        partition = delivery.partition
        horizon = self.horizon.get(partition)
        if horizon is None:  # not recorded: all below the position may have been before
            horizon = self.findings.positions.get(partition, 0)
        return delivery.record.offset < horizon

    def has_other_id(self, delivery: Delivery) -> bool:
        """Whether the handler may have applied the message under an id of another rule."""
        return bool(self.floors) and delivery.record.offset < self.floors.get(
            (delivery.handler.name, delivery.partition), 0
        )

    def is_exempt(self, delivery: Delivery) -> bool:
        """Whether the handler need not settle the message: recorded by `consumer positions --begin-here`."""
        if not self.exempt or self.assume_unapplied:
            return False
        offset = delivery.record.offset
        found = self.exempt.get((delivery.handler.name, delivery.partition), ())
        return any(each.past is not None and each.first <= offset < each.past for each in found)


class ChunkCheck:
    """What is seen of one chunk in the transaction that is undone; counted once that has gone through."""

    def __init__(self, check: ReplayCheck, partition: Partition, deliveries: Sequence[Delivery]) -> None:
        self.check = check
        self.partition = partition
        self.deliveries = deliveries
        self.unreadable = {each for each in deliveries if each.outcome is not None}  # as they were identified
        self.missing: list[Delivery] = []  # to be rehearsed, or stored
        self.hits: set[Delivery] | None = set()  # of the pre-check
        self.others: list[Delivery] = []  # all but those that the ledger has as applied, by the very same record
        self.clashing: set[Delivery] = set()  # with the payload of a message that is missing too
        self.buried: set[Delivery] = set()  # of which there is a dead letter
        self.begin()

    def begin(self) -> None:
        """Forget what was seen by an attempt that did not go through."""
        self.standing: dict[Delivery, ExistingClaim] = {}
        self.absent: set[Delivery] = set()  # claimed, and not in the ledger
        self.forgotten: set[Delivery] = set()  # of those, the ones that a worker would not apply: too old
        self.reclaimed = 0  # claimed, although the ledger holds them
        self.before: dict[str, proof.Rows] | None = None
        self.rows: dict[str, proof.Rows] = {}
        self.non_row_writes = False
        self.lost_claims_wrote = False

    # -- in the transaction -----------------------------------------------------------------------------------------

    async def claimed(
        self, session: Session, standing: Mapping[Delivery, ExistingClaim], fresh: list[Delivery]
    ) -> list[Delivery]:
        self.standing = dict(standing)
        # Counts of earlier transactions may still show here: ours, or behind a pooler those of any other client.
        self.before = await proof.rows_written(session.connection)
        if not fresh:
            # race: while the ledger turns, or a worker claims the same id at this moment, a claim that is lost writes too
            self.lost_claims_wrote = await proof.wrote_anything(session.connection)
            return fresh
        # While our claims are held, nobody else can commit these ids. So what another connection sees of them now was
        # there before, and should not have been claimable: their handlers may be called, and what they write is counted.
        check = self.check
        there, absent = await check.standing(fresh)
        self.standing |= there
        self.absent = set(absent)
        self.forgotten = set(await session.too_old(absent))
        self.reclaimed = len(there)
        return [each for each in fresh if each in there] if check.calling else []

    async def handled(self, session: Session, done: BatchResult) -> None:
        self.rows = await proof.rows_written(session.connection, self.before)
        # Claims that were won, of what is missing, are writes too: then the id of the transaction says nothing.
        says_nothing = self.rows or self.absent or self.lost_claims_wrote
        self.non_row_writes = not says_nothing and await proof.wrote_anything(session.connection)

    # -- after it ---------------------------------------------------------------------------------------------------

    async def sort(self) -> None:
        """Find what is missing, and whether what should be a dead letter is one."""
        check, standing = self.check, self.standing
        await self._ask_behind_clashes()
        self.others = [each for each in self.deliveries if standing.get(each) is not REDELIVERED]
        self.others += [each for each in self.unreadable if standing.get(each) is REDELIVERED]
        seen: set[tuple[str, bytes]] = set()
        doubtful: list[Delivery] = []  # of which there should be a dead letter
        for delivery in self.others:
            what = self._what(delivery)
            if what is not None and (what.clashes or what.dead):
                doubtful.append(delivery)
            if delivery not in self.absent or self._in_doubt(delivery):
                continue
            key = (delivery.handler.name, delivery.id)
            before = check.missing.get(key)
            if before is not None and before[3] != delivery.fingerprint:
                self.clashing.add(delivery)  # with one that is missing itself
                if check.storing:
                    self.missing.append(delivery)
            elif before is None and key not in seen:
                seen.add(key)
                self.missing.append(delivery)
                if check.storing:  # on its way: not to be taken up again
                    check.missing[key] = _missed(self.partition, delivery)
        if doubtful:
            self.buried = await check.letters(doubtful)
            if check.storing:
                clashing = [
                    each
                    for each in doubtful
                    if each not in self.buried and self._clashes(each) and not self._in_doubt(each)
                ]
                self.missing = sorted([*self.missing, *clashing], key=lambda each: each.record.offset)

    async def _ask_behind_clashes(self) -> None:
        """Ask the ledger about payloads whose id comes first in the chunk with a payload that is not the ledger's.

        Only the first with an id was claimed. Of another payload its answer says nothing: it may be the one that was applied,
        where the worker began behind the first.
        """
        unsure = [
            each
            for each in self.deliveries
            if each not in self.standing
            and each not in self.absent
            and (first := self._firsts[each.handler.name, each.id]) is not each
            and first.fingerprint != each.fingerprint
            and (of_first := self.standing.get(first)) is not None
            and of_first.clashes
        ]
        if unsure:
            found, _ = await self.check.standing(unsure)
            self.standing |= found

    def _in_doubt(self, delivery: Delivery) -> bool:
        return delivery in self.forgotten or self.check.in_doubt(delivery)

    def _clashes(self, delivery: Delivery) -> bool:
        what = self._what(delivery)
        return delivery in self.clashing or (what is not None and what.clashes)

    def _what(self, delivery: Delivery) -> ExistingClaim | None:
        """What stands for a delivery; that of the first with its id where several stand in one chunk."""
        found = self.standing.get(delivery)
        if found is not None or delivery in self.absent:
            return found
        twin = self._firsts[delivery.handler.name, delivery.id]
        if twin.fingerprint != delivery.fingerprint:
            return ExistingClaim(False, True, False)
        found = self.standing.get(twin)
        return None if found is None else ExistingClaim(found.dead, found.clashes, False)

    @cached_property
    def _firsts(self) -> dict[tuple[str, bytes], Delivery]:
        found: dict[tuple[str, bytes], Delivery] = {}
        for each in self.deliveries:
            found.setdefault((each.handler.name, each.id), each)
        return found

    def tally_effects(self) -> None:
        """Count what was written."""
        effects = self.check.findings.effects
        assert effects is not None
        effects.transactions += bool(self.deliveries)
        effects.claims += self.reclaimed
        effects.non_row_writes += self.non_row_writes
        for table, rows in self.rows.items():
            effects.add(table, rows.inserted, rows.updated, rows.deleted)

    def tally(self) -> None:
        """Count everything but what is missing."""
        check, findings, partition = self.check, self.check.findings, self.partition
        counts: dict[str, dict[str, list[int]]] = {}  # handler -> outcome -> timestamps
        here: dict[str, list[int]] = {}  # handler -> offsets of those whose row was made by themselves
        if len(self.others) < len(self.deliveries):
            others = set(self.others)
            plain = [each for each in self.deliveries if each not in others] if others else self.deliveries
            for handler in {each.handler for each in plain}:
                if handler.name in check.uncounted:
                    for each in plain:
                        if each.handler is handler:
                            check.keep_apart(each)
                own = [each.record for each in plain if each.handler is handler]
                counts[handler.name] = {"applied": [each.timestamp for each in own]}
                here[handler.name] = [each.offset for each in own]
        storing = set(self.missing) if check.storing else set()
        for delivery in self.others:
            if delivery in storing:
                continue
            what = self._what(delivery)
            record = delivery.record
            if what is not None and what.same_record:
                here.setdefault(delivery.handler.name, []).append(record.offset)
            if (
                what is not None
                and not what.clashes
                and (not what.same_record or delivery.handler.name in check.uncounted)
            ):
                check.keep_apart(delivery)
            if self._clashes(delivery):
                is_open = delivery not in self.buried and self._in_doubt(delivery)
                outcome = self._doubt(delivery) if is_open else self._clash(delivery)
            elif what is not None:
                outcome = "unreadable" if delivery in self.unreadable else "dead_lettered" if what.dead else "applied"
                if what.dead and delivery not in self.buried:
                    self._unsettled(delivery, "its dead letter is gone")
            elif delivery in self.absent:
                outcome = self._absent(delivery)
                if outcome == "missing":
                    continue
            else:
                outcome = self._doubt(delivery) if self._in_doubt(delivery) else "repeated"
            counts.setdefault(delivery.handler.name, {}).setdefault(outcome, []).append(record.timestamp)
        for name, by_outcome in counts.items():
            for outcome, timestamps in by_outcome.items():
                findings.count(name, partition, outcome, len(timestamps))
                findings.times.add(timestamps, outcome)
        for name, offsets in here.items():
            for block, n in blocks(offsets).items():
                key = (name, partition, block)
                check.matched[key] = check.matched.get(key, 0) + n
        self._tally_precheck()

    def _absent(self, delivery: Delivery) -> str:
        findings = self.check.findings
        if self.check.is_exempt(delivery):
            return "skipped"
        if self._in_doubt(delivery):
            detail = (
                "older than what the ledger remembers"
                if delivery in self.forgotten
                else "from before message_id= changed"
                if self.check.has_other_id(delivery)
                else "from before the ledger began"
            )
            findings.sample("unknown", **place(delivery), detail=detail)
            return "unknown"
        if delivery in self.unreadable:
            self._unsettled(delivery, f"would {would_text(delivery.outcome)}")
            return "unreadable"
        if delivery in self._missing_now:
            return "missing"
        # Another lane, or a chunk before, was first with this id.
        first = self.check.missing.get((delivery.handler.name, delivery.id))
        return self._clash(delivery) if first is not None and first[3] != delivery.fingerprint else "repeated"

    def _doubt(self, delivery: Delivery) -> str:
        return "skipped" if self.check.is_exempt(delivery) else "unknown"

    def _unsettled(self, delivery: Delivery, detail: str) -> None:
        self.check.count_unsettled(delivery, "unsettled")
        self.check.findings.sample("unsettled", **place(delivery), detail=detail)

    @cached_property
    def _missing_now(self) -> set[Delivery]:
        return {each for each in self.missing if (each.handler.name, each.id) not in self.check.missing}

    def _clash(self, delivery: Delivery) -> str:
        findings = self.check.findings
        if delivery not in self.buried:
            self.check.count_unsettled(delivery, "conflicts")
        text = "a dead letter" if delivery in self.buried else "no dead letter"
        findings.sample("conflicts", **place(delivery), detail=f"the id was used before with another payload; {text}")
        return "conflicts"

    def tally_missing(self, would: Mapping[Delivery, Outcome | None]) -> None:
        """Count what is missing. Its time is counted at the end, when it is known whether it still is."""
        check, findings = self.check, self.check.findings
        for delivery in self.missing:
            key = (delivery.handler.name, delivery.id)
            if delivery in self.unreadable or key in check.missing:
                continue  # counted as unreadable; or another lane was first, and this one as repeated
            record, outcome = delivery.record, would.get(delivery)
            if isinstance(outcome, Dead) and outcome.reason in _UNREADABLE:
                findings.count(delivery.handler.name, self.partition, "unreadable")
                findings.times.add([record.timestamp], "unreadable")
                self._unsettled(delivery, f"would {would_text(outcome)}")
                continue
            ahead = findings.is_ahead(self.partition, record.offset)
            findings.count(delivery.handler.name, self.partition, "missing")
            findings.ahead += ahead
            if len(check.missing) < _MISSING_MAX:
                check.missing[key] = _missed(self.partition, delivery)
            else:
                findings.inexact = True
                findings.times.add([record.timestamp], "missing")
            what = would_text(outcome)
            check.would[what] = check.would.get(what, 0) + 1
            detail = ("not applied" if outcome is UNCALLED else f"would {what}") + (
                "; workers have not come to it yet" if ahead else ""
            )
            findings.sample("missing", **place(delivery), detail=detail)

    def _tally_precheck(self) -> None:
        found = self.check.findings.precheck
        if found is None:
            return
        asked = [each for each in self.deliveries if each not in self.unreadable]
        if self.hits is None:
            found["unanswered"] += len(asked)
            return
        found["asked"] += len(asked)
        found["hits"] += len(self.hits)
        for each in self.hits:
            what = self._what(each)
            if what is None and each in self.forgotten:
                continue  # applied before the ledger forgot it, which Redis has not
            if what is None or what.clashes:
                found["wrong"] += 1
                self.check.findings.sample(
                    "precheck_wrong", **place(each), detail="Redis has a mark, the ledger has no row"
                )


def _slices(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), _SLICE):
        yield items[start : start + _SLICE]


def _missed(partition: Partition, delivery: Delivery) -> tuple[Partition, int, int, int]:
    return partition, delivery.record.offset, delivery.record.timestamp, delivery.fingerprint


def would_text(outcome: Outcome | None) -> str:
    """What a handler would do, to go on after "would"."""
    match outcome:
        case None:
            return "be applied"
        case RetryLater() if outcome is UNCALLED:
            return "be tried"
        case Dead(reason):
            return f"become a dead letter ({reason.value})"
        case RetryLater() if outcome is BEHIND:
            return "wait behind a failed message of its key"
        case RetryLater():
            return "fail and be tried again"
        case _:
            return "be a duplicate by now"


def place(delivery: Delivery) -> dict[str, Any]:
    """Where a delivery is, for a sample."""
    record = delivery.record
    return {
        "handler": delivery.handler.name,
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "id": str(UUID(bytes=delivery.id)),
    }
