"""Calls other systems for the messages of a batch, before their transaction.

First a transaction commits an intent for each call that is about to begin. Then the calls run, with no transaction
open. A second transaction keeps their results. What has a result runs in the batch's transaction (transaction/apply.py)
like any message; what has none waits there, or becomes a dead letter.

**Order.** Of an ordering key, at most one message of a batch is called: the next one when that is settled.

Limitations: whether a call without a result has done anything is unknown. The keys of calls, and `steps.py`, decide
what follows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from consumer.core.dead_letters import KeyHold
from consumer.core.delivery import Delivery
from consumer.core.effect import Call, first_key
from consumer.core.errors import NotDone, Reject, Unreadable
from consumer.core.evidence import Evidence
from consumer.core.fingerprint import BYTES
from consumer.core.handler import Effect, Handler
from consumer.core.identity import fingerprint
from consumer.core.ordering import Scheduler
from consumer.core.outcome import Dead, Reason, RetryLater
from consumer.effects.steps import Intent, Step, may_withdraw, next_step
from consumer.postgres import effects
from consumer.postgres.protocol import Connection
from consumer.postgres.session import Session
from consumer.transaction.arguments import argument_of
from consumer.transaction.chains import in_chains
from consumer.transaction.errors import facts_of, transaction
from consumer.transaction.invoke import finish_call
from consumer.transaction.isolate import decide
from consumer.transaction.limits import CallTracker
from consumer.transaction.result import NEXT_BATCH, LedgerIds

_CALLS_IN_TURN = 20  # of one task, in one batch: their intents and results share two transactions
_BEGIN_SECONDS_MAX = 5.0  # after its intent, within the margin of steps.py
_OTHER_PAYLOAD = RetryLater(1.0, "another payload of its id is being called for")
_UNCALLED = "a replay calls no other system; `consumer dlq retry` does"
_UNKNOWN = "a call has no result, and the other system may have forgotten its key: ask there what was done"


@dataclass(slots=True)
class EffectStage:
    """The calls for one batch.

    `run` may be called again after an outage of PostgreSQL: results that were not stored are kept. failures: messages
    whose call failed, with what it raised. on_step: intended, called, remembered.
    """

    ids: LedgerIds
    scheduler: Scheduler
    random: Callable[[], float]
    on_step: Callable[[str], None] = lambda step: None
    calls: CallTracker | None = None
    evidence: Evidence | None = None
    failures: list[tuple[Delivery, Exception]] = field(default_factory=list)
    _results: list[Delivery] = field(default_factory=list)  # that are not stored yet
    _withdrawn: list[tuple[Delivery, Intent]] = field(default_factory=list)
    _until: float = 0.0

    async def run(self, session: Session, deliveries: Iterable[Delivery]) -> None:
        """Call the other systems for the messages of effects.

        Sets the reply of those whose result is known, and the outcome of those that cannot run now. Raises Conflict or
        Outage; then call it again.
        """
        if self._results or self._withdrawn:
            await self._finish(session)
        waiting = [delivery for delivery in deliveries if delivery.handler.effect is not None]
        for delivery in waiting:
            if delivery.outcome is NEXT_BATCH:
                delivery.outcome = None
        waiting = [delivery for delivery in waiting if delivery.outcome is None and delivery.reply is None]
        if not waiting:
            return
        steps = await self._begin(session, waiting)
        self.on_step("intended")
        self._until = time.monotonic() + _BEGIN_SECONDS_MAX
        by_handler: dict[Handler, list[Delivery]] = {}
        for delivery in steps:
            by_handler.setdefault(delivery.handler, []).append(delivery)

        async def run_one(delivery: Delivery, task: asyncio.Task[Any] | None) -> None:
            await self._run_one(delivery, *steps[delivery])

        for handler, chosen in by_handler.items():
            await in_chains(chosen, handler.concurrency, run_one)
        if steps:
            self.on_step("called")
            await self._finish(session)
            self.on_step("remembered")

    # -- before the calls -------------------------------------------------------------------------------------------

    async def _begin(self, session: Session, waiting: Sequence[Delivery]) -> dict[Delivery, tuple[Step, Intent]]:
        """Commit the intents of the calls to make; return them."""
        async with transaction(session):
            chosen = self._choose(await self._may_run(session, waiting), waiting)
            steps = await self._intend(session, chosen) if chosen else {}
            await session.commit()
        return steps

    async def _may_run(self, session: Session, waiting: Sequence[Delivery]) -> set[Delivery]:
        """Return the messages that their transaction would run."""
        free = await session.may_run(waiting, self.ids.topics)
        free = {delivery for delivery in free if not self.scheduler.is_blocked(delivery)}
        possibly_held = [delivery for delivery in self.scheduler.possibly_held(waiting) if delivery in free]
        if possibly_held:
            holds = await session.key_holds(possibly_held)
            free -= {delivery for delivery, hold in holds.items() if hold is not KeyHold.FREE}
        return free

    def _choose(self, free: set[Delivery], waiting: Sequence[Delivery]) -> list[Delivery]:
        """Return the messages to call for now.

        The others wait for the next batch.
        """
        chosen: list[Delivery] = []
        taken: set[Hashable] = set()
        counts: dict[Handler, int] = {}
        for delivery in waiting:
            if delivery not in free:
                continue  # a duplicate, or it waits, as the transaction will say
            handler = delivery.handler
            keys = {delivery.ordering_key(), (handler.number, delivery.id)}
            count = counts.get(handler, 0)
            if keys & taken or count >= _at_once(handler):
                delivery.outcome = NEXT_BATCH
                continue
            taken |= keys
            counts[handler] = count + 1
            chosen.append(delivery)
        return chosen

    async def _intend(self, session: Session, chosen: Sequence[Delivery]) -> dict[Delivery, tuple[Step, Intent]]:
        """Store intents, and decide what is done for the messages."""
        offers = [
            (
                (handler := delivery.handler).number,
                delivery.id,
                first_key(handler, delivery.id),
                fingerprint(delivery.record.value),
            )
            for delivery in chosen
        ]
        rows = await effects.begin(session.connection, offers)
        steps: dict[Delivery, tuple[Step, Intent]] = {}
        again: list[effects.Key] = []
        for delivery, (number, id, _, payload) in zip(chosen, offers, strict=True):
            row = rows.get((number, id))
            if row is None:  # begun by another transaction at this moment
                delivery.outcome = NEXT_BATCH
                continue
            intent, effect = Intent(*row), _effect(delivery)
            compares = delivery.handler.fingerprint is BYTES
            step = next_step(
                intent, effect.remembers, can_ask=effect.unsure is not None, payload=payload if compares else None
            )
            match step:
                case Step.CALL | Step.ASK:
                    if step is Step.CALL and not intent.is_new:
                        again.append((number, id))
                        intent = intent._replace(attempts=intent.attempts + 1)
                    steps[delivery] = step, intent
                case Step.SETTLE:
                    delivery.reply = intent.result
                case Step.LEAVE:
                    delivery.outcome = Dead(Reason.EFFECT_UNKNOWN, _UNKNOWN)
                case Step.WAIT:
                    delivery.outcome = _OTHER_PAYLOAD
        if again:
            await effects.count_again(session.connection, again)
        return steps

    # -- the calls --------------------------------------------------------------------------------------------------

    async def _run_one(self, delivery: Delivery, step: Step, intent: Intent) -> None:
        effect = _effect(delivery)
        if time.monotonic() > self._until:  # the key may be forgotten by now, and the worker is expected elsewhere
            delivery.outcome = NEXT_BATCH
            return
        if step is Step.ASK:
            await self._ask(delivery, intent)
            return
        try:
            await self._call(effect.call, delivery, intent)
        except Exception as error:
            is_done = not isinstance(error, NotDone | Reject | Unreadable)
            if not is_done and may_withdraw(intent):
                self._withdrawn.append((delivery, intent))
            self._failed(delivery, error, effect.call)
            outcome = delivery.outcome
            if is_done and isinstance(outcome, RetryLater) and effect.remembers == 0 and effect.unsure is None:
                text = f"{type(error).__name__}: {facts_of(error).text}"
                delivery.outcome = outcome = Dead(Reason.EFFECT_UNKNOWN, text, type(error).__name__)
            if isinstance(outcome, Dead) and outcome.reason is Reason.EFFECT_UNKNOWN and effect.unsure is not None:
                await self._ask_at_last(delivery, intent, outcome)

    async def _ask(self, delivery: Delivery, intent: Intent) -> None:
        """Ask what an earlier call has done.

        If it has done nothing, another one is made in the next batch.
        """
        unsure = _effect(delivery).unsure
        assert unsure is not None
        try:
            if not await self._call(unsure, delivery, intent):
                self._withdrawn.append((delivery, intent))
                delivery.outcome = NEXT_BATCH
        except Exception as error:
            self._failed(delivery, error, unsure)
            if isinstance(error, Reject):  # what was done is as unknown as before
                delivery.outcome = Dead(Reason.EFFECT_UNKNOWN, facts_of(error).text, type(error).__name__)

    async def _ask_at_last(self, delivery: Delivery, intent: Intent, dead: Dead) -> None:
        """Ask what the last call has done, before giving up."""
        unsure = _effect(delivery).unsure
        assert unsure is not None
        try:
            if await self._call(unsure, delivery, intent):
                delivery.outcome = None
            else:
                self._withdrawn.append((delivery, intent))
                delivery.outcome = replace(dead, reason=Reason.FAILED)
        except Exception as error:
            self.failures.append((delivery, error))

    async def _call(self, handler: Handler, delivery: Delivery, intent: Intent) -> bool:
        """Call a function of an effect; keep its result.

        Returns False where it says that nothing was done. Raises what it raises, and what its result cannot become.
        """
        effect = _effect(delivery)
        results: list[Any] = []

        async def call() -> None:
            assert handler.call is not None
            argument = argument_of(delivery, handler)
            results.append(await handler.call(argument, argument, Call(intent.key, intent.attempts)))

        await finish_call(handler, call(), None, [delivery], self.calls)
        [result] = results
        if handler is effect.unsure and result is None:
            return False
        raw = effect.encode(result)
        effect.decode(raw)  # what cannot be read again must not be settled
        delivery.reply = raw
        self._results.append(delivery)
        return True

    def _failed(self, delivery: Delivery, error: Exception, handler: Handler) -> None:
        facts = facts_of(error, handler.place)
        delivery.outcome, delivery.attempts = decide(delivery, facts, self.random, self.evidence)
        self.failures.append((delivery, error))

    # -- after them -------------------------------------------------------------------------------------------------

    async def _finish(self, session: Session) -> None:
        """Store results, and delete the intents of calls that have done nothing."""
        results = [(delivery.handler.number, delivery.id, delivery.reply or b"") for delivery in self._results]
        withdrawn = [(delivery.handler.number, delivery.id, intent.attempts) for delivery, intent in self._withdrawn]
        if results or withdrawn:
            async with transaction(session):
                await effects.finish(session.connection, results, withdrawn)
                await session.commit()
        self._results, self._withdrawn = [], []


def _effect(delivery: Delivery) -> Effect:
    effect = delivery.handler.effect
    assert effect is not None
    return effect


def _at_once(handler: Handler) -> int:
    """Return for how many messages of a batch a call is made.

    At most once means an intent only for calls that begin at once: after a crash, what they have done is unknown.
    """
    effect = handler.effect
    assert effect is not None
    return handler.concurrency * (_CALLS_IN_TURN if effect.remembers else 1)


async def take_results(connection: Connection, deliveries: Iterable[Delivery]) -> list[Delivery]:
    """Set the replies that are stored; return the messages without one.

    For replays and rebuilds, which call no other system. Raises what the connection raises.
    """
    waiting = [
        delivery
        for delivery in deliveries
        if delivery.handler.effect is not None and delivery.outcome is None and delivery.reply is None
    ]
    if not waiting:
        return []
    results = await effects.results_of(connection, [(delivery.handler.number, delivery.id) for delivery in waiting])
    for delivery in waiting:
        delivery.reply = results.get((delivery.handler.number, delivery.id))
    return [delivery for delivery in waiting if delivery.reply is None]


def leave_uncalled(deliveries: Iterable[Delivery]) -> None:
    """Make dead letters of messages whose call no replay makes."""
    for delivery in deliveries:
        delivery.outcome = Dead(Reason.EFFECT_UNKNOWN, _UNCALLED)
