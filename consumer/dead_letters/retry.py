"""Retries and discards dead letters in batches, through `apply_batch`.

Knows dead letters, their chains and the App's handlers; knows no terminal and no Kafka. A retried message keeps its id:
its claim exists already, as dead, and becomes an applied one together with the handler's effects, so duplicates of it
stay duplicates. After the first dead letter of a chain those that wait behind it run, in order, until one fails.
session.py does what a transaction does to dead letters; edits.py gives them another payload.

Limitations: whether a COMMIT without an answer happened is decided by running the dead letters again; if PostgreSQL
does not come back, the command stops and names the dead letters to check.
"""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from consumer.app import App
from consumer.core.dead_letters import DeadLetterState
from consumer.core.delivery import Batch, Delivery
from consumer.core.errors import CannotTell, Misconfigured
from consumer.core.handler import Handler
from consumer.core.ordering import Scheduler
from consumer.core.outcome import Reason
from consumer.core.retry import Retry
from consumer.dead_letters.deliveries import identified, stored_delivery
from consumer.dead_letters.edits import Edit
from consumer.dead_letters.session import DeadLetter, DeadLetterSession, NotClaimable
from consumer.decoders.preparation import fetch_schemas
from consumer.effects.stage import EffectStage
from consumer.handler_records import handler_code
from consumer.postgres import dead_letter_queries
from consumer.postgres.connection import dsn_label
from consumer.postgres.dead_letter_actions import Chain
from consumer.postgres.dead_letter_queries import OpenMatching
from consumer.postgres.errors import Conflict, Outage
from consumer.postgres.handlers import topic_numbers
from consumer.settings import Settings
from consumer.transaction.apply import apply_batch
from consumer.transaction.errors import error_text
from consumer.transaction.isolate import FAILURES_MAX, Part
from consumer.transaction.observe import observe
from consumer.transaction.result import BEHIND_RETRY, NEXT_BATCH, BatchResult, LedgerIds
from consumer.transaction.settle import next_parts, pause_seconds, settle

T = TypeVar("T")

_NOTHING_DELAYED = Scheduler({}, 1)
_AT_A_TIME = 500  # dead letters in one transaction
_BYTES_AT_A_TIME = 16 << 20
_ONCE = Retry(attempts=1)  # each retry command makes one attempt
# Left unchanged by a part of a batch that could not run them yet.
_NOT_RUN_YET = (NEXT_BATCH, BEHIND_RETRY)


@dataclass(frozen=True, slots=True)
class Filters:
    """Which dead letters; None: all."""

    dead_letters: tuple[int, ...] | None = None
    handler: str | None = None
    topic: str | None = None
    reason: str | None = None
    group: str | None = None
    older_than_seconds: float | None = None
    newer_than_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RetryResult:
    """The result of one dead letter.

    outcome: applied, duplicate or discarded if it is settled; taken, settled, behind, unsure, other_letter, postponed,
    gone, altered or no_handler if nothing was changed; else the reason of a failure. behind: it waited behind one that
    was asked for.
    """

    dead_letter: int
    outcome: str
    text: str = ""
    behind: bool = False

    @property
    def is_settled(self) -> bool:
        """Whether this settled the dead letter."""
        return self.outcome in ("applied", "duplicate", "discarded")


@dataclass(slots=True)
class DeadLetterRetrier:
    """An operator's session with the dead letters of one App.

    Open it, select, and settle; close it at the end. The App must be running (its lifespan entered) for anything but
    `discard` of a dead letter that blocks no other. stopping: asked between transactions; when it returns True, the
    rest is left as it is.
    """

    app: App
    settings: Settings
    operator: str
    why: str
    session: DeadLetterSession
    names: LedgerIds
    handlers: Mapping[str, Handler] = field(default_factory=dict)
    stopping: Callable[[], bool] = lambda: False
    code_is_recorded: bool = False

    @classmethod
    async def open(cls, app: App, settings: Settings, operator: str, why: str = "") -> DeadLetterRetrier:
        """Raises Outage, Misconfigured."""
        await app.open_registry(settings)
        session = await _session(app, settings, operator, why)
        numbers, _ = await session.known_numbers(app.name, app.handlers, ())
        handlers = {name: replace(handler, retry=_ONCE, number=numbers[name]) for name, handler in app.handlers.items()}
        return cls(app, settings, operator, why, session, LedgerIds(app.name, session.topics), handlers)

    def close(self) -> None:
        self.session.close()

    def allow_unsure(self) -> None:
        """Also run dead letters whose messages may have been applied already."""
        self.session.may_be_applied = True

    # -- which dead letters ------------------------------------------------------------------------------------------

    async def select(self, filters: Filters, *, waiting: bool) -> array[int]:
        """Return the numbers of open dead letters, in log order.

        waiting: also those behind a dead one of their chain. A retry leaves out those that may have been applied
        already (see `unsure`), unless their reason is named.
        """
        sure = waiting or filters.reason == Reason.TOO_OLD
        return await dead_letter_queries.select(
            self.session.connection, self._matching(filters), waiting=waiting, too_old=sure
        )

    async def unsure(self, filters: Filters) -> int:
        """Return how many selected dead letters may have been applied already."""
        return await dead_letter_queries.count_unsure(self.session.connection, self._matching(filters))

    def _matching(self, filters: Filters) -> OpenMatching:
        return OpenMatching(
            self.app.name,
            None if filters.dead_letters is None else list(filters.dead_letters),
            filters.handler,
            filters.topic,
            filters.reason,
            filters.group,
            filters.older_than_seconds,
            filters.newer_than_seconds,
        )

    async def check(self, dead_letters: Sequence[int], *, waiting: bool) -> None:
        """Raise Misconfigured for a dead letter that cannot be settled.

        It does not exist, is settled, belongs to another App, or waits behind another. Changes nothing.
        """
        rows = await dead_letter_queries.standings(self.session.connection, list(dead_letters))
        for number in dead_letters:
            if number not in rows:
                raise Misconfigured(
                    f"dead letter {number}: there is none; see `consumer dlq list APP --state all` (nothing was changed)"
                )
            state, app, handler, first = rows[number]
            if app != self.app.name:
                raise Misconfigured(
                    f"dead letter {number}: belongs to the App {app!r}, not {self.app.name!r}; name that App (nothing was changed)"
                )
            if state not in (DeadLetterState.DEAD, DeadLetterState.WAITING):
                raise Misconfigured(
                    f"dead letter {number}: is {state} already; see `consumer dlq show APP {number}` (nothing was changed)"
                )
            if handler not in self.handlers and not waiting:
                raise Misconfigured(
                    f"dead letter {number}: {self.app.name!r} has no handler {handler!r}; discard it, or add the handler (nothing was changed)"
                )
            if not waiting and first is not None and first not in dead_letters:
                raise Misconfigured(
                    f"dead letter {number}: waits behind number {first} of its key; retry that one first (nothing was changed)"
                )

    # -- settling them ----------------------------------------------------------------------------------------------

    async def retry(self, dead_letters: int | Sequence[int], edit: Edit | None = None) -> AsyncIterator[RetryResult]:
        """Run dead letters, then those behind them until one fails.

        Raises CannotTell when PostgreSQL is lost: what was settled is settled, once, and nothing is half done.
        """
        numbers = [dead_letters] if isinstance(dead_letters, int) else dead_letters
        what = "retry" if edit is None else "edit"
        for start in range(0, len(numbers), _AT_A_TIME):
            for some in await self._by_size(numbers[start : start + _AT_A_TIME]):
                chosen = [DeadLetter(number, what, edit=edit, behind=before) for number, before in some]
                async for done in self._run(chosen):
                    yield done
                async for done in self.release(_released_keys(chosen)):
                    yield done
                if self.stopping():
                    return

    async def discard(self, dead_letters: Sequence[int], why: str) -> tuple[list[RetryResult], list[Chain]]:
        """Settle dead letters as discarded.

        Returns the results, and their chains in which others wait: see `release`.
        """
        chosen = [DeadLetter(number, "discard", why) for number in dead_letters]
        results: list[RetryResult] = []
        chains: list[Chain] = []
        failures = 0
        while chosen:
            try:
                chains = await self.session.discard(chosen)
                break
            except NotClaimable as error:
                results += [
                    RetryResult(dead_letter.number, what, text)
                    for dead_letter, (what, text) in error.dead_letters.items()
                ]
                chosen = [dead_letter for dead_letter in chosen if dead_letter not in error.dead_letters]
            except Conflict as error:
                failures += 1
                if failures > FAILURES_MAX:
                    raise CannotTell(
                        f"dead letters {_range(chosen)}: {failures} conflicts with other transactions in a row ({error}); "
                        "nothing was changed, try again"
                    ) from None
                await asyncio.sleep(0.02 * failures)
            except (Outage, OSError) as error:
                raise self._lost(error, chosen) from None
        results += [RetryResult(dead_letter.number, "discarded") for dead_letter in chosen]
        return results, chains

    async def release(self, chains: Sequence[Chain]) -> AsyncIterator[RetryResult]:
        """Run the dead letters of chains in order until one fails.

        Runs only those that have never run.
        """
        for start in range(0, len(chains), _AT_A_TIME):
            free = list(chains[start : start + _AT_A_TIME])
            while free and not self.stopping():
                numbers = await self._next(free)
                chosen = [
                    DeadLetter(number, why="those before it are settled", behind=True)
                    for some in await self._by_size(numbers)
                    for number, _ in some
                ]
                async for done in self._run(chosen):
                    yield done
                free = _released_keys(chosen)

    async def _next(self, chains: Sequence[Chain]) -> list[int]:
        limit = max(1, _AT_A_TIME // len(chains))
        rows = await self._read(dead_letter_queries.first_of(self.session.connection, chains, limit))
        numbers, ended = [], set()
        for place, number, never_ran in rows:
            if place not in ended and never_ran:
                numbers.append(number)
            else:
                ended.add(place)
        return numbers

    async def _by_size(self, numbers: Sequence[int]) -> list[list[tuple[int, bool]]]:
        """Split dead letters into transactions by their bytes.

        Each is a pair of its number and whether it waits before one that was asked for.
        """
        groups: list[list[tuple[int, bool]]] = []
        size = 0
        for number, before, length in await self._read(
            dead_letter_queries.sizes(self.session.connection, list(numbers))
        ):
            if not groups or size + length > _BYTES_AT_A_TIME:
                groups.append([])
                size = 0
            groups[-1].append((number, before))
            size += length
        return groups

    async def _read(self, answer: Awaitable[T]) -> T:
        try:
            return await answer
        except Exception as error:
            raise self._lost(error) from None

    async def _record_code(self) -> None:
        try:
            await handler_code.record(self.session.connection, self.app)
        except Exception as error:
            raise self._lost(error) from None
        self.code_is_recorded = True

    def _lost(self, error: BaseException, dead_letters: Sequence[DeadLetter] = ()) -> CannotTell:
        look = (
            f"; look at `consumer dlq show APP {dead_letters[0].number}`: of dead letters {_range(dead_letters)} all are settled, or none"
            if dead_letters
            else ""
        )
        return CannotTell(f"{dsn_label(self.settings.dsn)}: {str(error) or type(error).__name__}{look}")

    async def _run(self, dead_letters: Sequence[DeadLetter]) -> AsyncIterator[RetryResult]:
        """Run dead letters as a worker does, in parts if needed.

        Leaves the rest when asked to stop.
        """
        if not self.code_is_recorded:
            await self._record_code()
        by_delivery: dict[Delivery, DeadLetter] = {}
        for dead_letter, delivery in await self._deliveries(dead_letters):
            if isinstance(delivery, Delivery):
                by_delivery[delivery] = dead_letter
            else:
                yield RetryResult(dead_letter.number, *delivery, dead_letter.behind)
        await observe([delivery for delivery in by_delivery if not delivery.handler.idempotent], random.random)
        refused: list[tuple[DeadLetter, tuple[str, str]]] = []
        stage = EffectStage(self.names, _NOTHING_DELAYED, random.random)

        async def prepare(part: Part) -> bool:
            return not self.stopping()

        async def attempt(part: Part) -> BatchResult:
            try:
                await self._start(stage, {delivery: by_delivery[delivery] for delivery in part.batch.deliveries})
                return await apply_batch(
                    self.session,
                    self.names,
                    _NOTHING_DELAYED,
                    part.batch,
                    use_savepoints=part.use_savepoints,
                    random=random.random,
                    on_step=lambda _: None,
                )
            except NotClaimable as error:
                # Nothing was done: the dead letters that are left run in the next transaction.
                refused.extend(error.dead_letters.items())
                rest = [
                    delivery for delivery in part.batch.deliveries if by_delivery[delivery] not in error.dead_letters
                ]
                return BatchResult(outcomes=dict.fromkeys(rest, NEXT_BATCH))

        async def after_failure(part: Part, error: Exception) -> Sequence[Part]:
            if isinstance(error, Outage | OSError):
                await self._reconnect(error, [by_delivery[delivery] for delivery in part.batch.deliveries])
            parts = next_parts(part, error, random.random)
            if isinstance(error, Conflict):
                await asyncio.sleep(pause_seconds(part.failures))
            return parts

        async for part, result in settle(_batches(by_delivery), prepare, attempt, after_failure, rerun_late=True):
            if refused:
                for dead_letter, (what, text) in refused:
                    if not (dead_letter.behind and what == "behind"):
                        yield RetryResult(dead_letter.number, what, text, dead_letter.behind)
                refused.clear()
                continue
            for done in await self._results_of(
                {delivery: by_delivery[delivery] for delivery in part.batch.deliveries}, result
            ):
                yield done

    async def _start(self, stage: EffectStage, dead_letters: Mapping[Delivery, DeadLetter]) -> None:
        """Prepare a transaction; effects make their calls before it."""
        self.session.start(dead_letters)
        if any(delivery.handler.effect is not None for delivery in dead_letters):
            await stage.run(self.session, dead_letters)
            self.session.start(dead_letters)

    async def _results_of(self, dead_letters: Mapping[Delivery, DeadLetter], settled: BatchResult) -> list[RetryResult]:
        """Return the results of a transaction.

        Postponed dead letters changed nothing, and are recorded here.
        """
        postponed = []
        results = []
        for delivery, dead_letter in dead_letters.items():
            outcome = settled.outcomes.get(delivery, delivery.outcome)
            if outcome in _NOT_RUN_YET or dead_letter.outcome == "behind":
                continue
            if dead_letter.is_postponed:
                failure = settled.failures.get(delivery)
                reason = error_text(failure.error) if failure is not None else str(getattr(outcome, "error", ""))
                dead_letter.text = f"its handler cannot run it now, and nothing was changed ({reason[:200]})"
                postponed.append((dead_letter, None))
            results.append(RetryResult(dead_letter.number, dead_letter.outcome, dead_letter.text, dead_letter.behind))
        try:
            await self.session.act(postponed)
        except Exception as error:
            raise self._lost(error) from None
        return results

    async def _reconnect(self, error: BaseException, dead_letters: Sequence[DeadLetter]) -> None:
        """Open another connection to the same database.

        Raises CannotTell when it does not answer, or is another database.
        """
        before = self.session
        before.close()
        try:
            session = await _session(self.app, self.settings, self.operator, self.why)
        except (Outage, Misconfigured, OSError):
            raise self._lost(error, dead_letters) from None
        if session.epoch != before.epoch:
            session.close()
            raise self._lost(error, dead_letters) from None
        session.may_be_applied = before.may_be_applied
        self.session = session

    # -- dead letters as deliveries ----------------------------------------------------------------------------------

    async def _deliveries(
        self, dead_letters: Sequence[DeadLetter]
    ) -> list[tuple[DeadLetter, Delivery | tuple[str, str]]]:
        """Return each dead letter as its handler gets it, or why not.

        Read without a lock: what is decided on is read again.
        """
        numbers = [dead_letter.number for dead_letter in dead_letters]
        rows = await self._read(dead_letter_queries.whole(self.session.connection, numbers)) if dead_letters else {}
        read = [
            (dead_letter, stored_delivery(dead_letter, rows.get(dead_letter.number), self.app.name, self.handlers))
            for dead_letter in dead_letters
        ]
        await fetch_schemas([one for _, one in read if isinstance(one, Delivery)], self.settings)
        return [
            (dead_letter, identified(dead_letter, rows[dead_letter.number], one) if isinstance(one, Delivery) else one)
            for dead_letter, one in read
        ]


async def _session(app: App, settings: Settings, operator: str, why: str) -> DeadLetterSession:
    session = await DeadLetterSession.open(settings, init=app.connection_init)
    session.operator, session.why = operator, why
    session.topics = await topic_numbers(session.connection)
    return session


def _batches(deliveries: Iterable[Delivery]) -> Iterator[Batch]:
    """Yield batches in which no id comes twice.

    A dead letter must not count as a duplicate of another that may fail.
    """
    some: list[Delivery] = []
    seen: set[tuple[int, bytes]] = set()
    for delivery in deliveries:
        key = (delivery.handler.number, delivery.id)
        if key in seen:
            yield Batch(some, {}, {})
            some, seen = [], set()
        some.append(delivery)
        seen.add(key)
    if some:
        yield Batch(some, {}, {})


def _released_keys(dead_letters: Iterable[DeadLetter]) -> list[Chain]:
    """Return the chains whose next dead letters may run now.

    A chain whose last dead letter of a transaction failed is not among them.
    """
    free: dict[Chain, bool] = {}
    for dead_letter in dead_letters:
        if dead_letter.row is not None and dead_letter.row["chain"] is not None:
            free[dead_letter.row["handler"], dead_letter.row["chain"]] = dead_letter.releases_next
    return [chain for chain, goes_on in free.items() if goes_on]


def _range(dead_letters: Sequence[DeadLetter]) -> str:
    numbers = [dead_letter.number for dead_letter in dead_letters]
    return str(numbers[0]) if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"
