"""One transaction over dead letters: locks, runs and records them.

Knows dead letters, their chains and their rows of the ledger; knows no terminal and no Kafka.

**Invariant.** Ledger, dead letter and chain change only for dead letters that end as applied, duplicate, dead or
discarded. Every other outcome (postponed, waiting, taken, unsure) undoes the claim: a dead row that was turned into an
applied one becomes dead again, a row that was inserted is deleted. A failed edit does the same, since the dead letter
keeps its own bytes.

**Two operators at once.** The transaction begins by locking the rows of the dead letters' chains, and then the dead
letters (SKIP LOCKED: those that another operator has locked are left to them). State, reason and fingerprint are read
under these locks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from consumer.core.dead_letters import DeadLetterState, Transition, group_of, next_state
from consumer.core.delivery import Delivery, PositionUpdate
from consumer.core.errors import ConsumerError
from consumer.core.outcome import Dead, Reason, RetryLater
from consumer.core.sqlstate import Meaning
from consumer.dead_letters.edits import Edit
from consumer.outbox.record import Outgoing
from consumer.postgres import claims, dead_letter_actions, dead_letter_copies
from consumer.postgres.claims import ExistingClaim
from consumer.postgres.dead_letter_actions import Action, Settled
from consumer.postgres.dead_letters import storable
from consumer.postgres.errors import Conflict, Outage, meaning_of
from consumer.postgres.session import Session

UNSURE = "it may have been applied already: the ledger no longer remembers its time"


@dataclass(slots=True, eq=False)
class DeadLetter:
    """A dead letter that is being settled.

    The fields from `row` on belong to the transaction that runs.
    """

    number: int
    what: str = "retry"  # retry, edit, discard
    why: str = ""
    edit: Edit | None = None
    behind: bool = False  # not asked for: it waited behind one that was settled
    other_id: bool = False  # claimed under an id that is not the dead letter's own
    row: Any = None  # as it was locked
    has_claim_revived: bool = False  # its dead row of the ledger was turned into an applied one
    has_new_claim: bool = False  # a row was inserted for it
    existing_claim: ExistingClaim | None = None  # the ledger's row, if its id was claimed before
    is_postponed: bool = False
    verdict: Dead | None = None
    attempts: int | None = None
    outcome: str = ""
    text: str = ""
    releases_next: bool = False  # whether those behind it may run

    def begin(self, row: Any) -> None:
        """Reset the fields of an earlier transaction, which was rolled back."""
        self.row, self.verdict, self.attempts, self.existing_claim = row, None, None, None
        self.has_claim_revived = self.has_new_claim = self.is_postponed = self.releases_next = False
        self.outcome = self.text = ""


class NotClaimable(ConsumerError):
    """Some dead letters cannot be settled now.

    dead_letters: each with the outcome (taken, settled, behind, unsure) and a text.
    """

    def __init__(self, dead_letters: Mapping[DeadLetter, tuple[str, str]]) -> None:
        super().__init__("; ".join(text for _, text in dead_letters.values()))
        self.dead_letters = dead_letters


class DeadLetterSession(Session):
    """A Session whose messages are dead letters.

    They are locked, revived instead of claimed, and recorded instead of stored. Call `start` before each transaction.
    """

    owns_positions = False  # nor the saved attempts: those of a dead letter are in its own row
    claims_first = False
    operator: str = ""
    why: str = ""  # given by the operator for all of them
    may_be_applied: bool = False  # the operator has said to run dead letters whose messages may have been applied
    topics: Mapping[str, int] = {}

    def start(self, dead_letters: Mapping[Delivery, DeadLetter]) -> None:
        """Set the dead letters of the next transaction."""
        self._dead_letters = dict(dead_letters)
        self._begun = False
        self._now_dead: list[int] = []
        self._who: Delivery | None = None

    async def begin(self) -> None:
        if self._begun:  # the claim met a new generation of the ledger, and rolled back what was revived
            raise Conflict("the ledger has begun another generation")
        self._begun = True
        await super().begin()
        await self._lock(list(self._dead_letters.values()))

    async def _lock(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Lock chains and dead letters. Raises NotClaimable."""
        numbers = [dead_letter.number for dead_letter in dead_letters]
        rows = await dead_letter_actions.lock(self.connection, numbers)
        others = await dead_letter_actions.first_others(self.connection, numbers)
        refused: dict[DeadLetter, tuple[str, str]] = {}
        for dead_letter in dead_letters:
            row = rows.get(dead_letter.number)
            if row is None:
                refused[dead_letter] = ("taken", "another operator has locked it")
                continue
            dead_letter.begin(row)
            other = others.get((row["handler"], row["chain"]))
            if row["state"] not in (DeadLetterState.DEAD, DeadLetterState.WAITING):
                refused[dead_letter] = (
                    "settled",
                    f"it is {row['state']} already: see `consumer dlq show APP {dead_letter.number}`",
                )
            elif dead_letter.what == "discard":
                continue
            elif other is not None and other < (row["offset"], dead_letter.number):
                refused[dead_letter] = ("behind", "it waits behind another dead letter of its key")
            elif row["reason"] == Reason.TOO_OLD and not self.may_be_applied:
                refused[dead_letter] = ("unsure", UNSURE)
        if refused:
            raise NotClaimable(refused)

    async def claim(self, deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> dict[Delivery, ExistingClaim]:
        dead_letters = self._dead_letters
        own = {
            (dead_letters[delivery].row["handler"], dead_letters[delivery].row["id"]): delivery
            for delivery in deliveries
            if not dead_letters[delivery].other_id
        }
        prints = [dead_letters[delivery].row["fingerprint"] for delivery in own.values()]
        if own:
            for key in await claims.revive(self.connection, list(own), prints):
                dead_letters[own[key]].has_claim_revived = True
        # Other ids, and ids whose row was dropped with its generation of the ledger: claimed like any other.
        rest = [delivery for delivery in deliveries if not dead_letters[delivery].has_claim_revived]
        lost = await super().claim(rest, topics) if rest else {}
        for delivery in rest:
            dead_letters[delivery].existing_claim = lost.get(delivery)
            dead_letters[delivery].has_new_claim = delivery not in lost
        return lost

    async def may_run(self, deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> set[Delivery]:
        """Return the messages that are not applied and not too old.

        The ledger has most as dead, which `claim` revives.
        """
        existing, _ = await self.existing_claims(deliveries, topics)
        dead = {
            delivery for delivery, claim in existing.items() if claim.dead and not self._dead_letters[delivery].other_id
        }
        return dead | await super().may_run([delivery for delivery in deliveries if delivery not in dead], topics)

    async def too_old(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Return those whose new claim proves nothing.

        A dead row in the ledger proves that its message was not applied.
        """
        if self.may_be_applied:
            return []
        dead_letters = [(delivery, self._dead_letters[delivery]) for delivery in deliveries]
        return await super().too_old(
            [
                delivery
                for delivery, of in dead_letters
                if not (of.has_claim_revived or (of.edit is not None and of.edit.new_id is not None))
            ]
        )

    async def release_claims(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._dead_letters[delivery].is_postponed = True
        await self._undo_claims(deliveries)

    async def store_dead_letters(
        self, dead: Mapping[Delivery, Dead], attempts: Mapping[Delivery, int], claimed: Sequence[Delivery]
    ) -> None:
        for delivery, verdict in dead.items():
            dead_letter = self._dead_letters[delivery]
            dead_letter.verdict, dead_letter.attempts = verdict, attempts.get(delivery, delivery.attempts)
        await self._undo_claims(claimed)

    async def _undo_claims(self, deliveries: Sequence[Delivery]) -> None:
        """Undo claims: mark revived rows dead again, delete inserted ones."""
        revived = [
            self._dead_letters[delivery].row
            for delivery in deliveries
            if self._dead_letters[delivery].has_claim_revived
        ]
        if revived:
            await claims.mark_dead_again(self.connection, [(row["handler"], row["id"]) for row in revived])
        if claimed := [delivery for delivery in deliveries if self._dead_letters[delivery].has_new_claim]:
            await super().release_claims(claimed)

    async def write_positions(
        self, app: str, moves: Sequence[PositionUpdate], counts: Mapping[tuple[int, int, int, str], int]
    ) -> None:
        """Record the results, in the transaction that settles them."""
        totals = {key: n for key, n in counts.items() if key[3] in ("skipped", "kept")}
        updates: list[Settled] = []
        acted: list[tuple[DeadLetter, bytes | None]] = []
        now_dead, released, stand_ins = [], [], []
        for delivery, dead_letter in self._dead_letters.items():
            dead_letter.is_postponed = dead_letter.is_postponed or isinstance(delivery.outcome, RetryLater)
            dead_letter.outcome, dead_letter.text = outcome_of(dead_letter)
            if dead_letter.is_postponed or not (after := _next_state_of(dead_letter)):
                if dead_letter.outcome in ("unsure", "other_letter"):
                    acted.append((dead_letter, None))
                continue
            row, new_id = dead_letter.row, dead_letter.edit.new_id if dead_letter.edit is not None else None
            if new_id is not None and after.state is DeadLetterState.APPLIED:
                after = after._replace(state=DeadLetterState.DISCARDED)
            acted.append((dead_letter, new_id if after.state is DeadLetterState.DISCARDED else None))
            if dead_letter.edit is not None and after.state is DeadLetterState.DEAD:
                continue  # the edit failed: the dead letter stays as it was
            updates.append(_updated(dead_letter, after))
            dead_letter.releases_next = after.releases_next
            if row["state"] == DeadLetterState.WAITING and after.state is DeadLetterState.DEAD:
                now_dead.append(dead_letter.number)
            if row["chain"] is not None and not after.keeps_key_blocked:
                released.append((row["handler"], row["chain"]))
            if after.state is DeadLetterState.APPLIED:
                if dead_letter.other_id and dead_letter.edit is None:
                    stand_ins.append((row["handler"], row["id"]))
                # It was counted as dead-lettered before; now its message is applied or a duplicate.
                place = (row["handler"], self.topics.get(row["topic"], -1), row["partition"])
                totals[*place, "dead_lettered"] = totals.get((*place, "dead_lettered"), 0) - 1
                if dead_letter.outcome == "duplicate":
                    totals[*place, "duplicate:ledger"] = totals.get((*place, "duplicate:ledger"), 0) + 1
        if updates:
            await dead_letter_actions.settle(self.connection, updates)
        await self.act(acted)
        self._now_dead = now_dead
        if released:
            await dead_letter_actions.release(self.connection, released)
        if stand_ins:
            await claims.drop_dead(self.connection, stand_ins)
        await super().write_positions(app, (), totals)

    async def dead_letter_copies(self) -> Sequence[Outgoing]:
        """Return the copies of those that waited, and are dead now."""
        topic = self._settings.dead_letter_topic
        if topic is None or not self._now_dead:
            return ()
        return await dead_letter_copies.of_numbers(self.connection, self._now_dead, topic)

    async def act(self, dead_letters: Sequence[tuple[DeadLetter, bytes | None]]) -> None:
        """Record what was done to dead letters, and their new ids."""
        rows = [
            Action(
                dead_letter.number,
                storable(self.operator),
                f"dlq {dead_letter.what}",
                dead_letter.outcome,
                storable(dead_letter.why or self.why),
                storable(dead_letter.text) if dead_letter.text != dead_letter.why else "",
                UUID(bytes=new_id) if new_id is not None else None,
                dead_letter.edit.value if dead_letter.edit is not None else None,
            )
            for dead_letter, new_id in dead_letters
        ]
        if rows:
            await dead_letter_actions.record(self.connection, rows)

    async def discard(self, dead_letters: Sequence[DeadLetter]) -> list[tuple[int, UUID]]:
        """Settle dead letters in one transaction, without running them.

        Returns their chains in which others wait. Raises NotClaimable, Conflict and Outage.
        """
        try:
            await super().begin()
            await self._lock(dead_letters)
            after = Transition(DeadLetterState.DISCARDED, keeps_key_blocked=False, releases_next=True)
            for dead_letter in dead_letters:
                dead_letter.outcome, dead_letter.text = "discarded", dead_letter.why
            await dead_letter_actions.settle(
                self.connection, [_updated(dead_letter, after) for dead_letter in dead_letters]
            )
            await self.act([(dead_letter, None) for dead_letter in dead_letters])
            rows = [dead_letter.row for dead_letter in dead_letters if dead_letter.row["chain"] is not None]
            chains = dict.fromkeys((row["handler"], row["chain"]) for row in rows)
            for chain in await dead_letter_actions.release(self.connection, list(chains)):
                chains.pop(chain, None)
            await self.commit()
            return list(chains)
        except (NotClaimable, Conflict, Outage):
            await self.rollback()
            raise
        except Exception as error:
            await self.rollback()
            if not self.is_usable or meaning_of(error) is Meaning.OUTAGE:
                raise Outage(str(error)) from error
            if meaning_of(error) is Meaning.CONFLICT:
                raise Conflict(str(error)) from error
            raise
        except BaseException:
            self.close()
            raise


def _next_state_of(dead_letter: DeadLetter) -> Transition | None:
    """Return what an attempt makes of a dead letter; None: no change."""
    if dead_letter.outcome in ("unsure", "other_letter", "behind"):
        return None
    return next_state(dead_letter.verdict)


def outcome_of(dead_letter: DeadLetter) -> tuple[str, str]:
    """Return the outcome and the text of an attempt."""
    if dead_letter.is_postponed:
        return "postponed", "its handler cannot run it now; nothing was changed"
    if dead_letter.verdict is not None:
        if dead_letter.verdict.reason is Reason.TOO_OLD:
            return "unsure", UNSURE
        if dead_letter.verdict.reason is Reason.BEHIND:
            return "behind", "it waits behind another dead letter of its key"
        return dead_letter.verdict.reason.value, dead_letter.verdict.error
    if dead_letter.existing_claim is not None:
        if dead_letter.existing_claim.dead:
            return (
                "other_letter",
                "another dead letter has its id, and is not applied: retry that one; see `consumer show APP ID`",
            )
        return "duplicate", "its id was applied otherwise"
    return "applied", dead_letter.why


def _updated(dead_letter: DeadLetter, after: Transition) -> Settled:
    """Return the new values of a dead letter's row."""
    row, verdict = dead_letter.row, dead_letter.verdict if dead_letter.edit is None else None
    reason, error, kind, group = row["reason"], row["error"], row["kind"], row["error_group"]
    if verdict is not None:
        # With a stand-in id it keeps its reason: its own id is still unknown, even after a change of the code.
        reason = reason if dead_letter.other_id else verdict.reason.value
        error, kind = storable(verdict.error), storable(verdict.kind)
        group = group_of(row["handler_name"], reason, kind, error)
    attempts = row["attempts"] if dead_letter.attempts is None else dead_letter.attempts
    return Settled(dead_letter.number, after.state.value, after.keeps_key_blocked, reason, error, attempts, kind, group)
