"""Retry, edit and discard dead letters in batches, through `apply_batch`.

Knows letters, chains and the App's handlers; knows no terminal and no Kafka. A retried message keeps its id: its claim is there
already, as dead, and becomes an applied one together with the handler's effects, so duplicates of it stay duplicates. After the first
letter of a chain those that wait behind it run, in order, until one fails. What a transaction does to letters is dead_letters/session.py's.

Limitations: whether a COMMIT whose answer was lost has happened is answered by running the letters again; when PostgreSQL does not
come back, the command stops and says which letters to look at.
"""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from consumer.app import App
from consumer.core.dead_letter_seal import REST, VALUE, altered
from consumer.core.dead_letters import DeadLetterState
from consumer.core.delivery import Batch, Delivery
from consumer.core.errors import CannotTell, Misconfigured
from consumer.core.handler import Handler
from consumer.core.identity import OffsetId, edit_id, message_id
from consumer.core.message import LogRecord
from consumer.core.ordering import Scheduler
from consumer.core.outcome import Reason
from consumer.core.retry import Retry
from consumer.dead_letters.session import DeadLetter, DeadLetterSession, Edit, NotClaimable
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
from consumer.transaction.handler_runner import observe
from consumer.transaction.identify import identify
from consumer.transaction.isolate import FAILURES_MAX, Part
from consumer.transaction.result import BEHIND, NEXT_BATCH, BatchResult, LedgerIds
from consumer.transaction.settle import next_parts, pause_seconds, settle

T = TypeVar("T")

_NOTHING_DELAYED = Scheduler({}, 1)
_AT_A_TIME = 500  # letters in one transaction
_BYTES_AT_A_TIME = 16 << 20
_ONCE = Retry(attempts=1)  # each retry command makes one attempt
# Kept under a stand-in for an id that was unknown. If it can be now, after a change of the code, that is the id.
_STAND_IN = {Reason.NO_MESSAGE_ID, Reason.AMBIGUOUS_MESSAGE_ID, Reason.BAD_HEADER, Reason.UNREADABLE, Reason.NO_VALUE}
# Left as they were, by a part of a batch that could not run them yet.
_NOT_RUN_YET = (NEXT_BATCH, BEHIND)


@dataclass(frozen=True, slots=True)
class Filters:
    """Which letters. None: all."""

    letters: tuple[int, ...] | None = None
    handler: str | None = None
    topic: str | None = None
    reason: str | None = None
    group: str | None = None
    older_than_seconds: float | None = None
    newer_than_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RetryResult:
    """What became of one letter.

    outcome: applied, duplicate or discarded where it is settled; taken, settled, behind, unsure, other_letter, postponed, gone,
    altered or no_handler where nothing was changed; else the reason of a failure. behind: it waited behind one that was asked for.
    """

    dead_letter: int
    outcome: str
    text: str = ""
    behind: bool = False

    @property
    def is_settled(self) -> bool:
        """Whether the letter is settled by this."""
        return self.outcome in ("applied", "duplicate", "discarded")


@dataclass(slots=True)
class Redrive:
    """An operator's session with the dead letters of one App.

    Open it, select, and settle; close it at the end.

    The App must be running (its lifespan entered) for anything but `discard` of a letter that holds back nothing.
    stopping: asked between transactions; what is not begun then is left as it is.
    """

    app: App
    settings: Settings
    operator: str
    session: DeadLetterSession
    names: LedgerIds
    handlers: Mapping[str, Handler] = field(default_factory=dict)
    stopping: Callable[[], bool] = lambda: False
    code_is_recorded: bool = False

    @classmethod
    async def open(cls, app: App, settings: Settings, operator: str) -> Redrive:
        """Raises Outage, Misconfigured."""
        session = await _session(settings, operator)
        numbers, _ = await session.known_numbers(app.name, app.handlers, ())
        handlers = {name: replace(handler, retry=_ONCE, number=numbers[name]) for name, handler in app.handlers.items()}
        return cls(app, settings, operator, session, LedgerIds(app.name, session.topics), handlers)

    def close(self) -> None:
        self.session.close()

    def allow_unsure(self) -> None:
        """Run also letters whose messages may have been applied already."""
        self.session.may_be_applied = True

    # -- which letters ----------------------------------------------------------------------------------------------

    async def select(self, filters: Filters, *, waiting: bool) -> array[int]:
        """Return open dead letters, in the order of the log.

        waiting: also those behind a dead one of their chain.

        A retry leaves out those that may have been applied already (see `unsure`), unless their reason is named.
        """
        sure = waiting or filters.reason == Reason.TOO_OLD
        return await dead_letter_queries.select(
            self.session.connection, self._matching(filters), waiting=waiting, too_old=sure
        )

    async def unsure(self, filters: Filters) -> int:
        """How many open letters of the filters may have been applied already."""
        return await dead_letter_queries.count_unsure(self.session.connection, self._matching(filters))

    def _matching(self, filters: Filters) -> OpenMatching:
        return OpenMatching(
            self.app.name,
            None if filters.letters is None else list(filters.letters),
            filters.handler,
            filters.topic,
            filters.reason,
            filters.group,
            filters.older_than_seconds,
            filters.newer_than_seconds,
        )

    async def check(self, letters: Sequence[int], *, waiting: bool) -> None:
        """Raise Misconfigured for a letter that cannot be settled.

        It does not exist, or belongs to another App. Nothing is done before.
        """
        rows = await dead_letter_queries.standings(self.session.connection, list(letters))
        for number in letters:
            if number not in rows:
                raise Misconfigured(
                    f"no dead letter {number}; see `consumer dlq list APP --state all` (nothing was changed)"
                )
            state, app, handler, first = rows[number]
            if app != self.app.name:
                raise Misconfigured(
                    f"dead letter {number} is of the App {app!r}, not {self.app.name!r} (nothing was changed)"
                )
            if state not in (DeadLetterState.DEAD, DeadLetterState.WAITING):
                raise Misconfigured(
                    f"dead letter {number} is {state} already: see `consumer dlq show APP {number}` (nothing was changed)"
                )
            if handler not in self.handlers and not waiting:
                raise Misconfigured(
                    f"dead letter {number} is of the handler {handler!r}, which {self.app.name!r} does not have (nothing was changed)"
                )
            if not waiting and first is not None and first not in letters:
                raise Misconfigured(
                    f"dead letter {number} waits behind number {first} of its key: that one comes first (nothing was changed)"
                )

    # -- settling them ----------------------------------------------------------------------------------------------

    async def retry(self, letters: int | Sequence[int], edit: Edit | None = None) -> AsyncIterator[RetryResult]:
        """Run letters, and then those that wait behind them until one fails.

        Raises CannotTell when PostgreSQL is lost: what was settled is settled, once, and nothing is half done.
        """
        numbers = [letters] if isinstance(letters, int) else letters
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

    async def discard(self, letters: Sequence[int], why: str) -> tuple[list[RetryResult], list[Chain]]:
        """Settle dead letters as discarded.

        Returns those of their chains in which others wait: see `release`.
        """
        chosen = [DeadLetter(number, "discard", why) for number in letters]
        results: list[RetryResult] = []
        chains: list[Chain] = []
        failures = 0
        while chosen:
            try:
                chains = await self.session.discard(chosen)
                break
            except NotClaimable as error:
                results += [RetryResult(letter.number, what, text) for letter, (what, text) in error.letters.items()]
                chosen = [letter for letter in chosen if letter not in error.letters]
            except Conflict as error:
                failures += 1
                if failures > FAILURES_MAX:
                    raise CannotTell(
                        f"dead letters {_range(chosen)} met other transactions {failures} times in a row ({error}): "
                        "nothing was changed of them"
                    ) from None
                await asyncio.sleep(0.02 * failures)
            except (Outage, OSError) as error:
                raise self._lost(error, chosen) from None
        results += [RetryResult(letter.number, "discarded") for letter in chosen]
        return results, chains

    async def release(self, chains: Sequence[Chain]) -> AsyncIterator[RetryResult]:
        """Run the dead letters of chains in order until one fails.

        Only as long as the first one has never run.
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

        Each as (number, whether it waits before one that was asked for).
        """
        groups: list[list[tuple[int, bool]]] = []
        size = _BYTES_AT_A_TIME
        for number, before, length in await self._read(
            dead_letter_queries.sizes(self.session.connection, list(numbers))
        ):
            if size + length > _BYTES_AT_A_TIME:
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

    def _lost(self, error: BaseException, letters: Sequence[DeadLetter] = ()) -> CannotTell:
        look = (
            f"; look at `consumer dlq show APP {letters[0].number}`: of letters {_range(letters)} all are settled, or none"
            if letters
            else ""
        )
        return CannotTell(f"{dsn_label(self.settings.dsn)}: {str(error) or type(error).__name__}{look}")

    async def _run(self, letters: Sequence[DeadLetter]) -> AsyncIterator[RetryResult]:
        """Run dead letters as a worker does, in parts if needed.

        Leaves the rest when it is to stop.
        """
        if not self.code_is_recorded:
            await self._record_code()
        by_delivery: dict[Delivery, DeadLetter] = {}
        for letter, delivery in await self._deliveries(letters):
            if isinstance(delivery, Delivery):
                by_delivery[delivery] = letter
            else:
                yield RetryResult(letter.number, *delivery, letter.behind)
        watched = [delivery for delivery in by_delivery if not delivery.handler.idempotent]
        await observe(watched, random.random)
        refused: list[tuple[DeadLetter, tuple[str, str]]] = []

        async def prepare(part: Part) -> bool:
            return not self.stopping()

        async def attempt(part: Part) -> BatchResult:
            self.session.start({delivery: by_delivery[delivery] for delivery in part.batch.deliveries})
            try:
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
                # Nothing was done: the letters that are left run in the next transaction.
                refused.extend(error.letters.items())
                rest = [delivery for delivery in part.batch.deliveries if by_delivery[delivery] not in error.letters]
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
                for letter, (what, text) in refused:
                    if not (letter.behind and what == "behind"):
                        yield RetryResult(letter.number, what, text, letter.behind)
                refused.clear()
                continue
            for done in await self._results_of(
                {delivery: by_delivery[delivery] for delivery in part.batch.deliveries}, result
            ):
                yield done

    async def _results_of(self, letters: Mapping[Delivery, DeadLetter], settled: BatchResult) -> list[RetryResult]:
        """Return the results of a transaction.

        Postponed dead letters changed nothing, and are recorded here.
        """
        postponed = []
        results = []
        for delivery, letter in letters.items():
            outcome = settled.outcomes.get(delivery, delivery.outcome)
            if outcome in _NOT_RUN_YET or letter.outcome == "behind":
                continue
            if letter.is_postponed:
                failure = settled.failures.get(delivery)
                reason = error_text(failure.error) if failure is not None else str(getattr(outcome, "error", ""))
                letter.text = f"its handler cannot run it now, and nothing was changed ({reason[:200]})"
                postponed.append((letter, None))
            results.append(RetryResult(letter.number, letter.outcome, letter.text, letter.behind))
        try:
            await self.session.act(postponed)
        except Exception as error:
            raise self._lost(error) from None
        return results

    async def _reconnect(self, error: BaseException, letters: Sequence[DeadLetter]) -> None:
        """Open another connection to the same database.

        Raises CannotTell when it does not answer, or is another database.
        """
        before, self.session = self.session, self.session
        before.close()
        try:
            session = await _session(self.settings, self.operator)
        except (Outage, Misconfigured, OSError):
            raise self._lost(error, letters) from None
        if session.epoch != before.epoch:
            session.close()
            raise self._lost(error, letters) from None
        session.may_be_applied = before.may_be_applied
        self.session = session

    # -- letters as deliveries --------------------------------------------------------------------------------------

    async def _deliveries(self, letters: Sequence[DeadLetter]) -> list[tuple[DeadLetter, Delivery | tuple[str, str]]]:
        """Return each dead letter as its handler gets it, or why not.

        Read without a lock: what is decided on is read again.
        """
        numbers = [letter.number for letter in letters]
        rows = await self._read(dead_letter_queries.whole(self.session.connection, numbers)) if letters else {}
        return [(letter, self._delivery(letter, rows.get(letter.number))) for letter in letters]

    def _delivery(self, letter: DeadLetter, row: Any) -> Delivery | tuple[str, str]:
        if row is None:
            return "gone", "there is no such letter any more"
        handler = self.handlers.get(row["handler_name"])
        if handler is None:
            return "no_handler", f"{self.app.name!r} has no handler {row['handler_name']!r} any more"
        edit = letter.edit
        if parts := _altered(row, edit):
            return (
                "altered",
                f"{' and '.join(parts)} not as its message had it; {_how_to_repair(letter.number, parts)}",
            )
        names = [name.decode("utf-8", "surrogateescape") for name in row["header_keys"]]
        record = LogRecord(
            topic=row["topic"],
            partition=row["partition"],
            # A new intent is of no record in the log: its row of the ledger names the letter instead.
            offset=row["offset"] if edit is None or edit.new_id is None else -letter.number,
            timestamp=row["timestamp"],
            key=row["key"],
            value=row["value"] if edit is None else edit.value,
            headers=tuple(zip(names, row["header_values"], strict=True)),
            fault="a header key that is not UTF-8" if any(not _is_text(name) for name in names) else "",
        )
        attempts = row["attempts"]
        delivery = Delivery(handler, record, attempts=attempts)
        by_offset = bool(identify([delivery])) or isinstance(handler.rule, OffsetId)
        if edit is not None and edit.new_id is not None:
            letter.other_id = True
            return Delivery(handler, record, edit.new_id, delivery.fingerprint, attempts=attempts)
        own_id = row["id"].bytes
        if delivery.outcome is None and not by_offset and row["reason"] in _STAND_IN and delivery.id != own_id:
            letter.other_id = True  # its id is known now
            return delivery
        return Delivery(handler, record, own_id, row["fingerprint"], attempts=attempts, outcome=delivery.outcome)


async def _session(settings: Settings, operator: str) -> DeadLetterSession:
    session = await DeadLetterSession.open(settings)
    session.operator = operator
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


def _altered(row: Any, edit: Edit | None) -> list[str]:
    """Return stored parts that were changed and would be applied."""
    return [part for part in altered(row) or () if part == REST or edit is None]


def _how_to_repair(number: int, parts: Sequence[str]) -> str:
    if VALUE in parts and REST not in parts:
        return f"give the right one: `consumer dlq retry APP {number} --value FILE --same-id`, or discard it"
    return "discard it, and produce the message again"


def _released_keys(letters: Iterable[DeadLetter]) -> list[Chain]:
    """Return the chains whose next dead letters may run now.

    A chain whose last dead letter of a transaction failed is not among them.
    """
    free: dict[Chain, bool] = {}
    for letter in letters:
        if letter.row is not None and letter.row["chain"] is not None:
            free[letter.row["handler"], letter.row["chain"]] = letter.releases_next
    return [chain for chain, goes_on in free.items() if goes_on]


def _range(letters: Sequence[DeadLetter]) -> str:
    numbers = [letter.number for letter in letters]
    return str(numbers[0]) if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def edit_of(number: int, value: bytes | None, new_id: str | None) -> Edit:
    """Return an edit.

    new_id "auto" is derived from the letter's number, so that the same command means the same intent.
    """
    if new_id is None:
        return Edit(value)
    return Edit(value, edit_id(number) if new_id == "auto" else message_id(new_id.encode("utf-8", "surrogateescape")))


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
