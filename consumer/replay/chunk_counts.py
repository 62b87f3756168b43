"""Count the messages of one checked chunk in the findings.

Asks nothing: chunk_check.py has the answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from consumer.core.delivery import Delivery
from consumer.core.outcome import Dead, Outcome, Reason
from consumer.postgres.claims import ExistingClaim
from consumer.replay.chunk_check import ChunkCheck
from consumer.replay.findings import blocks
from consumer.replay.samples import UNCALLED, delivery_place, would_text

_UNREADABLE = {
    Reason.UNREADABLE,
    Reason.NO_VALUE,
    Reason.NO_MESSAGE_ID,
    Reason.AMBIGUOUS_MESSAGE_ID,
    Reason.BAD_HEADER,
}


class ChunkCounts:
    """Counts one chunk, once it was checked and sorted."""

    def __init__(self, chunk: ChunkCheck) -> None:
        self._chunk = chunk
        self._check = chunk.check
        self._findings = chunk.check.findings
        self._by_handler: dict[str, dict[str, list[int]]] = {}  # handler -> outcome -> timestamps
        self._own_rows: dict[str, list[int]] = {}  # handler -> offsets whose ledger row their own record made

    def count_effects(self) -> None:
        """Count what the transaction wrote."""
        chunk, effects = self._chunk, self._findings.effects
        assert effects is not None
        effects.transactions += bool(chunk.deliveries)
        effects.claims += chunk.reclaimed
        effects.non_row_writes += chunk.non_row_writes
        for table, rows in chunk.rows.items():
            effects.add(table, rows.inserted, rows.updated, rows.deleted)

    def count_settled(self) -> None:
        """Count everything but what is missing."""
        chunk, check, findings = self._chunk, self._check, self._findings
        if len(chunk.others) < len(chunk.deliveries):
            self._count_redelivered()
        being_applied = set(chunk.missing) if check.applies else set()
        for delivery in chunk.others:
            if delivery in being_applied:
                continue
            outcome = self._settled_outcome(delivery)
            if outcome != "missing":
                outcomes = self._by_handler.setdefault(delivery.handler.name, {})
                outcomes.setdefault(outcome, []).append(delivery.record.timestamp)
        for name, outcomes in self._by_handler.items():
            for outcome, timestamps in outcomes.items():
                findings.count(name, chunk.partition, outcome, len(timestamps))
                findings.times.add(timestamps, outcome)
        for name, offsets in self._own_rows.items():
            for block, count in blocks(offsets).items():
                key = (name, chunk.partition, block)
                check.matched[key] = check.matched.get(key, 0) + count
        self._count_precheck()

    def count_missing(self, would: Mapping[Delivery, Outcome | None]) -> None:
        """Count what is missing.

        Its time is counted at the end, when it is known whether it still is missing.
        """
        chunk, check, findings = self._chunk, self._check, self._findings
        for delivery in chunk.missing:
            if delivery in chunk.unreadable or (delivery.handler.name, delivery.id) in check.missing:
                continue  # counted as unreadable; or another lane was first, and this one as repeated
            record, outcome = delivery.record, would.get(delivery)
            if isinstance(outcome, Dead) and outcome.reason in _UNREADABLE:
                findings.count(delivery.handler.name, chunk.partition, "unreadable")
                findings.times.add([record.timestamp], "unreadable")
                self._count_unsettled(delivery, f"would {would_text(outcome)}")
                continue
            ahead = findings.is_ahead(chunk.partition, record.offset)
            findings.count(delivery.handler.name, chunk.partition, "missing")
            findings.ahead += ahead
            if not check.keep_missing(delivery):
                findings.inexact = True
                findings.times.add([record.timestamp], "missing")
            effect = would_text(outcome)
            check.would[effect] = check.would.get(effect, 0) + 1
            detail = ("not applied" if outcome is UNCALLED else f"would {effect}") + (
                "; workers have not come to it yet" if ahead else ""
            )
            findings.sample("missing", **delivery_place(delivery), detail=detail)

    # -- outcomes ---------------------------------------------------------------------------------------------------

    def _count_redelivered(self) -> None:
        """Count messages that their own record has applied, by the ledger.

        Fast path: nearly all messages are these.
        """
        chunk, check = self._chunk, self._check
        others = set(chunk.others)
        redelivered = (
            [delivery for delivery in chunk.deliveries if delivery not in others] if others else chunk.deliveries
        )
        for handler in {delivery.handler for delivery in redelivered}:
            if handler.name in check.uncounted:
                for delivery in redelivered:
                    if delivery.handler is handler:
                        check.keep_settled(delivery)
            records = [delivery.record for delivery in redelivered if delivery.handler is handler]
            self._by_handler[handler.name] = {"applied": [record.timestamp for record in records]}
            self._own_rows[handler.name] = [record.offset for record in records]

    def _settled_outcome(self, delivery: Delivery) -> str:
        """Return the outcome of a delivery, and keep what is checked again."""
        chunk = self._chunk
        claim = chunk.claim_of(delivery)
        clashes = chunk.clashes(delivery)
        if claim is not None:
            self._keep(delivery, claim)
        if clashes:
            is_open = delivery not in chunk.dead and chunk.in_doubt(delivery)
            return self._doubtful_outcome(delivery) if is_open else self._conflict(delivery)
        if claim is not None:
            if claim.dead and delivery not in chunk.dead:
                self._count_unsettled(delivery, "its dead letter is gone")
            return "unreadable" if delivery in chunk.unreadable else "dead_lettered" if claim.dead else "applied"
        if delivery in chunk.absent:
            return self._absent_outcome(delivery)
        return self._doubtful_outcome(delivery) if chunk.in_doubt(delivery) else "repeated"

    def _keep(self, delivery: Delivery, claim: ExistingClaim) -> None:
        if claim.same_record:
            self._own_rows.setdefault(delivery.handler.name, []).append(delivery.record.offset)
        is_uncounted = not claim.same_record or delivery.handler.name in self._check.uncounted
        if not claim.clashes and is_uncounted:
            self._check.keep_settled(delivery)

    def _absent_outcome(self, delivery: Delivery) -> str:
        """Return the outcome of a message that the ledger lacks."""
        chunk, check = self._chunk, self._check
        if check.is_exempt(delivery):
            return "skipped"
        if chunk.in_doubt(delivery):
            detail = (
                "older than what the ledger remembers"
                if delivery in chunk.too_old
                else "from before message_id= changed"
                if check.may_have_other_id(delivery)
                else "from before the ledger began"
            )
            self._findings.sample("unknown", **delivery_place(delivery), detail=detail)
            return "unknown"
        if delivery in chunk.unreadable:
            self._count_unsettled(delivery, f"would {would_text(delivery.outcome)}")
            return "unreadable"
        if delivery in self._first_missing:
            return "missing"
        # Another lane, or a chunk before, was first with this id.
        first = check.missing.get((delivery.handler.name, delivery.id))
        is_conflict = first is not None and first.fingerprint != delivery.fingerprint
        return self._conflict(delivery) if is_conflict else "repeated"

    @cached_property
    def _first_missing(self) -> set[Delivery]:
        """Missing messages whose ids were not missing before this chunk."""
        return {
            delivery
            for delivery in self._chunk.missing
            if (delivery.handler.name, delivery.id) not in self._check.missing
        }

    def _doubtful_outcome(self, delivery: Delivery) -> str:
        return "skipped" if self._check.is_exempt(delivery) else "unknown"

    def _conflict(self, delivery: Delivery) -> str:
        """Return the outcome "conflicts", and count the missing dead letter."""
        is_dead = delivery in self._chunk.dead
        if not is_dead:
            self._check.count_unsettled(delivery, "conflicts")
        text = "a dead letter" if is_dead else "no dead letter"
        detail = f"the id was used before with another payload; {text}"
        self._findings.sample("conflicts", **delivery_place(delivery), detail=detail)
        return "conflicts"

    def _count_unsettled(self, delivery: Delivery, detail: str) -> None:
        self._check.count_unsettled(delivery, "unsettled")
        self._findings.sample("unsettled", **delivery_place(delivery), detail=detail)

    def _count_precheck(self) -> None:
        """Count what Redis answered, and marks without a ledger row."""
        chunk, counts = self._chunk, self._findings.precheck
        if counts is None:
            return
        asked = sum(delivery not in chunk.unreadable for delivery in chunk.deliveries)
        if chunk.precheck_hits is None:
            counts["unanswered"] += asked
            return
        counts["asked"] += asked
        counts["hits"] += len(chunk.precheck_hits)
        for delivery in chunk.precheck_hits:
            claim = chunk.claim_of(delivery)
            if claim is None and delivery in chunk.too_old:
                continue  # applied before the ledger forgot it, which Redis has not
            if claim is None or claim.clashes:
                counts["wrong"] += 1
                detail = "Redis has a mark, the ledger has no row"
                self._findings.sample("precheck_wrong", **delivery_place(delivery), detail=detail)
