"""Retrying, editing and discarding dead letters: one transaction for each, through the worker's own `once.apply`.

Knows letters, chains and the App's handlers; knows no terminal and no Kafka. A retried message keeps its id: its claim is
there already, as dead, and is turned into an applied one together with the handler's effects, so duplicates of it stay
duplicates whatever happens. Then those that wait behind it run, in order, until one fails.

**Two operators at once.** The transaction begins by locking the row of the letter's chain, and then the letter (SKIP LOCKED: one that
somebody else has in hand is left to them). What is read of the letter is read under that lock. So each letter is
settled by one of them, and the other is told who has it.

What it does not know: whether a COMMIT whose answer was lost has happened. It stops there, and says which letter to look at.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from consumer import once
from consumer.app import App
from consumer.core.errors import CannotTell, ConsumerError, Misconfigured
from consumer.core.handler import Handler
from consumer.core.identity import OffsetId, fingerprint, message_id
from consumer.core.lanes import Batch, Delivery, Lane, Move
from consumer.core.letters import Fate, State, fate, group_of
from consumer.core.message import LogRecord
from consumer.core.outcome import Dead, Outcome, Parked, Reason
from consumer.core.retry import Retry
from consumer.core.sqlstate import Meaning
from consumer.deadletters import storable
from consumer.ledger import Conflict, Outage, Session, Standing, meaning_of, where
from consumer.settings import Settings

_NOBODY_WAITS = Lane({}, 1)
_CONFLICTS_MAX = 5
_ONCE = Retry(attempts=1)  # one press is one attempt
# Kept under a stand-in for an id that could not be told. If it can be now, after a change of the code, that is the id.
_STAND_IN = {Reason.NO_MESSAGE_ID, Reason.AMBIGUOUS_MESSAGE_ID, Reason.BAD_HEADER, Reason.UNREADABLE, Reason.NO_VALUE}

_SELECT = """
select d.dead_letter, d.state from consumer.dead_letters d join consumer.handlers h using (handler)
where h.app = $1 and d.state in ('dead', 'waiting')
  and ($2::int8[] is null or d.dead_letter = any($2)) and ($3::text is null or h.name = $3)
  and ($4::text is null or d.topic = $4) and ($5::text is null or d.reason = $5) and ($6::text is null or d.error_group = $6)
  and ($7::float8 is null or d.died_at < now() - make_interval(secs => $7))
  and ($8::float8 is null or d.died_at > now() - make_interval(secs => $8))
  -- Of a chain only the first may run. Those behind it come by themselves.
  and ($9 or d.chain is null or not exists (
       select from consumer.dead_letters e where e.handler = d.handler and e.chain = d.chain and e."offset" < d."offset"))
order by d.topic, d.partition, d."offset", d.dead_letter
"""
_STATES = """
select d.dead_letter, d.state, h.app, h.name,
       (select min(e.dead_letter) from consumer.dead_letters e where e.handler = d.handler and e.chain = d.chain
        and e."offset" = (select min(f."offset") from consumer.dead_letters f where f.handler = d.handler and f.chain = d.chain))
from consumer.dead_letters d join consumer.handlers h using (handler) where d.dead_letter = any($1)
"""
_LOCK_CHAIN = """
select true from consumer.held h join consumer.dead_letters d using (handler, chain) where d.dead_letter = $1 for update of h
"""
_LOCK = """
select d.*, h.name as handler_name,
       d.chain is not null and exists (select from consumer.dead_letters e where e.handler = d.handler and e.chain = d.chain
                                       and e."offset" < d."offset") as is_behind
from consumer.dead_letters d join consumer.handlers h using (handler) where d.dead_letter = $1 for update of d skip locked
"""
_REVIVE = """
update consumer.ledger set applied_at = now()
where handler = $1 and id = $2 and fingerprint = $3 and applied_at is null returning true
"""
_LAY_BACK = "update consumer.ledger set applied_at = null where handler = $1 and id = $2"
_UPDATE = """
update consumer.dead_letters set state = $2, chain = case when $3 then chain end, reason = $4, error = $5, attempts = $6,
       kind = $7, error_group = $8 where dead_letter = $1
"""
_RELEASE = """
delete from consumer.held h where (h.handler, h.chain) = ($1, $2)
and not exists (select from consumer.dead_letters d where (d.handler, d.chain) = (h.handler, h.chain))
"""
_DROP_STAND_IN = "delete from consumer.ledger where handler = $1 and id = $2 and applied_at is null"
_ACTION = """
insert into consumer.letter_actions (dead_letter, operator, what, outcome, note, new_id, new_value)
values ($1, $2, $3, $4, $5, $6, $7)
"""
_NEXT = """
select dead_letter, state = 'waiting' from consumer.dead_letters where handler = $1 and chain = $2
order by "offset", dead_letter limit 1
"""
_PUBLISH = "insert into consumer.letters_to_publish (dead_letter) values ($1) on conflict do nothing"


class _NotOurs(ConsumerError):
    """The letter is not to be settled by us, now. `what` says why: taken, settled, behind."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(text)
        self.what = what


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
class Edit:
    """Another payload for one letter. new_id: it is another intent, under this id; None: the same one, under the same id."""

    value: bytes | None
    new_id: bytes | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """What became of one letter. outcome: applied, duplicate, discarded, taken, settled, postponed, or the reason of a failure.

    behind: it was not asked for itself, but waited behind one that was.
    """

    dead_letter: int
    outcome: str
    text: str = ""
    behind: bool = False

    @property
    def is_good(self) -> bool:
        """Whether the letter is settled by this."""
        return self.outcome in ("applied", "duplicate", "discarded")


@dataclass(slots=True)
class _Job:
    """One letter in one transaction."""

    number: int
    operator: str
    what: str  # retry, edit, discard
    why: str = ""
    edit: Edit | None = None
    row: Any = None  # the letter, as it was locked
    verdict: Dead | None = None
    attempts: int | None = None
    is_postponed: bool = False
    is_lost: bool = False  # the id was applied otherwise
    is_claimed: bool = False
    delivery: Delivery | None = None
    anew: bool = False  # under an id of its own, which is claimed as any other
    outcome: str = ""
    goes_on: bool = False  # whether those behind it may run


class _LetterSession(Session):
    """A Session whose messages are letters: they are locked, revived instead of claimed, and recorded instead of buried."""

    job: _Job
    topics: Mapping[str, int] = {}

    async def begin(self) -> None:
        await super().begin()
        job, connection = self.job, self.connection
        await connection.fetchval(_LOCK_CHAIN, job.number)
        row = await connection.fetchrow(_LOCK, job.number)
        if row is None:
            raise _NotOurs("taken", "somebody else is at it this moment")
        if row["state"] not in (State.DEAD, State.WAITING):
            raise _NotOurs("settled", f"it is {row['state']} already: see `consumer dlq show {job.number}`")
        if row["is_behind"] and job.what != "discard":
            raise _NotOurs("behind", "it waits behind another letter of its key")
        job.row, job.verdict, job.attempts = row, None, None
        job.is_postponed = job.is_lost = job.is_claimed = False

    async def claim(self, deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> dict[Delivery, Standing]:
        row = self.job.row
        self.job.is_claimed = True
        if not self.job.anew and await self.connection.fetchval(_REVIVE, row["handler"], row["id"], row["fingerprint"]):
            return {}
        # An id of its own, or one whose row went with its generation of the ledger: claimed like any other.
        lost = await super().claim(deliveries, topics)
        self.job.is_lost = bool(lost)
        return lost

    def is_too_old(self, timestamp_ms: int) -> bool:
        """Never: that it was not applied is known from the letter, whose row is locked."""
        return False

    async def unclaim(self, deliveries: Sequence[Delivery]) -> None:
        self.job.is_postponed = True
        await self._lay_back()

    async def bury(
        self, dead: Mapping[Delivery, Dead], attempts: Mapping[Delivery, int], claimed: Sequence[Delivery]
    ) -> None:
        [(delivery, self.job.verdict)] = dead.items()
        self.job.attempts = attempts.get(delivery, delivery.attempts)
        if claimed:
            await self._lay_back(claimed[0])

    async def _lay_back(self, delivery: Delivery | None = None) -> None:
        row = self.job.row
        if self.job.anew:
            if delivery is not None:
                await super().unclaim([delivery])
        else:
            await self.connection.execute(_LAY_BACK, row["handler"], row["id"])

    async def note_attempts(self, tried: Any, settled: Any) -> None:
        """Those of a letter are in its own row."""

    async def close_batch(
        self, app: str, moves: Sequence[Move], counts: Mapping[tuple[int, int, int, str], int]
    ) -> None:
        """Record what became of the letter, in the transaction that made it so."""
        job, row, delivery = self.job, self.job.row, self.job.delivery
        assert delivery is not None
        # Put back before its claim: by an attempt that spoiled its transaction, and does not count.
        job.is_postponed = job.is_postponed or isinstance(delivery.outcome, Parked)
        found: Outcome | None = Parked(0.0, "") if job.is_postponed else job.verdict
        after = fate(found)
        assert after.state is State.DEAD or job.is_claimed or not delivery.handler.idempotent
        job.outcome, text = _told(job)
        new_id = None
        if job.edit is not None and after.state is State.DEAD:
            after = Fate(
                State(row["state"]), stays=True, goes_on=False
            )  # the edit was no good: the letter is as it was
        elif job.edit is not None and job.edit.new_id is not None:
            after, new_id = after._replace(state=State.DISCARDED), job.edit.new_id
        await self._update(after)
        await self._act(job.outcome, text, new_id)
        if self._settings.dead_letter_topic is not None and row["state"] == State.WAITING and after.state is State.DEAD:
            await self.connection.execute(_PUBLISH, job.number)
        if row["chain"] is not None and not after.stays:
            await self.connection.execute(_RELEASE, row["handler"], row["chain"])
        job.goes_on = after.goes_on
        if after.state is State.APPLIED:
            if job.anew:
                await self.connection.execute(_DROP_STAND_IN, row["handler"], row["id"])
            # A letter was counted when it died; now its message is applied, or something else.
            place = (row["handler"], self.topics.get(row["topic"], -1), row["partition"])
            own = {key: n for key, n in counts.items() if key[3] == "skipped"} | {(*place, "dead_lettered"): -1}
            if job.outcome == "duplicate":
                own[*place, "duplicate:ledger"] = 1
            await super().close_batch(app, (), own)

    async def _update(self, after: Fate) -> None:
        job, row = self.job, self.job.row
        verdict = job.verdict if job.edit is None else None
        reason, error, kind = row["reason"], row["error"], row["kind"]
        if verdict is not None:
            reason, error, kind = verdict.reason.value, storable(verdict.error), storable(verdict.kind)
        await self.connection.execute(
            _UPDATE,
            job.number,
            after.state.value,
            after.stays,
            reason,
            error,
            row["attempts"] if job.attempts is None else job.attempts,
            kind,
            group_of(row["handler_name"], reason, kind, error) if verdict is not None else row["error_group"],
        )

    async def discard(self, job: _Job) -> None:
        """Settle a letter without running anything."""
        self.job = job
        try:
            await self.begin()
            row = job.row
            await self.connection.execute(
                _UPDATE, job.number, State.DISCARDED.value, False, row["reason"], row["error"], row["attempts"], row["kind"],
                row["error_group"],
            )  # fmt: skip
            job.outcome = "discarded"
            await self._act("discarded", job.why, None)
            if row["chain"] is not None:
                await self.connection.execute(_RELEASE, row["handler"], row["chain"])
            await self.commit()
        except (_NotOurs, Conflict, Outage):
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

    async def _act(self, outcome: str, note: str, new_id: bytes | None) -> None:
        job = self.job
        await self.connection.execute(
            _ACTION,
            job.number,
            storable(job.operator),
            job.what,
            outcome,
            storable(note),
            UUID(bytes=new_id) if new_id is not None else None,
            job.edit.value if job.edit is not None else None,
        )


def _told(job: _Job) -> tuple[str, str]:
    """Outcome and note of an action."""
    if job.is_postponed:
        return "postponed", "its handler cannot run it now, and that does not count"
    if job.verdict is not None:
        return job.verdict.reason.value, job.verdict.error
    if job.is_lost:
        return "duplicate", "its id was applied otherwise"
    return "applied", job.why


@dataclass(slots=True)
class Redrive:
    """An operator at the dead letters of one App. Open it, select, and settle; close it at the end.

    The App must be running (its lifespan entered) for anything but `discard` of a letter that holds back nothing.
    """

    app: App
    settings: Settings
    operator: str
    session: _LetterSession
    names: once.Names
    handlers: Mapping[str, Handler] = field(default_factory=dict)

    @classmethod
    async def open(cls, app: App, settings: Settings, operator: str) -> Redrive:
        """Raises Outage, Misconfigured."""
        session = await _LetterSession.open(settings)
        assert isinstance(session, _LetterSession)
        session.owns_positions = False
        numbers, _ = await session.known_numbers(app.name, app.handlers, ())
        session.topics = dict(await session.connection.fetch("select name, topic from consumer.topics"))
        handlers = {}
        for name, handler in app.handlers.items():
            handlers[name] = replace(handler, retry=_ONCE, number=numbers[name])
        return cls(app, settings, operator, session, once.Names(app.name, session.topics), handlers)

    def close(self) -> None:
        self.session.close()

    async def select(self, filters: Filters, *, waiting: bool) -> list[int]:
        """Open letters, in the order of the log. waiting: also those that are not the first of their chain."""
        rows = await self.session.connection.fetch(
            _SELECT,
            self.app.name,
            None if filters.letters is None else list(filters.letters),
            filters.handler,
            filters.topic,
            filters.reason,
            filters.group,
            filters.older_than_seconds,
            filters.newer_than_seconds,
            waiting,
        )
        return [row[0] for row in rows]

    async def check(self, letters: Sequence[int], *, waiting: bool) -> None:
        """Raise Misconfigured for a letter that is not there, or of another App, or not to be settled, before anything is done."""
        rows = {row[0]: tuple(row)[1:] for row in await self.session.connection.fetch(_STATES, list(letters))}
        for number in letters:
            if number not in rows:
                raise Misconfigured(f"no dead letter {number}: see `consumer dlq list` (nothing was changed)")
            state, app, handler, first = rows[number]
            if app != self.app.name:
                raise Misconfigured(
                    f"dead letter {number} is of the App {app!r}, not {self.app.name!r} (nothing was changed)"
                )
            if state not in (State.DEAD, State.WAITING):
                raise Misconfigured(
                    f"dead letter {number} is {state} already: see `consumer dlq show {number}` (nothing was changed)"
                )
            if handler not in self.handlers and not waiting:
                raise Misconfigured(
                    f"dead letter {number} is of the handler {handler!r}, which {self.app.name!r} does not have (nothing was changed)"
                )
            if not waiting and first is not None and first != number:
                raise Misconfigured(
                    f"dead letter {number} waits behind number {first} of its key: that one comes first (nothing was changed)"
                )

    async def retry(self, number: int, edit: Edit | None = None) -> AsyncIterator[Done]:
        """Run one letter, and then those that wait behind it until one fails.

        Raises CannotTell when PostgreSQL is lost: what was settled is settled, once, and nothing is half done.
        """
        job = _Job(number, self.operator, "retry" if edit is None else "edit", edit=edit)
        done = await self._run(job)
        yield done
        if job.goes_on and job.row["chain"] is not None:
            async for each in self.release((job.row["handler"], job.row["chain"].bytes)):
                yield each

    async def discard(self, number: int, why: str) -> tuple[Done, tuple[int, bytes] | None]:
        """Settle a letter as discarded. Returns the chain that it was the first of, if others wait in it: see `release`."""
        job = _Job(number, self.operator, "discard", why)
        try:
            await self._guarded(lambda: self.session.discard(job), job)
        except _NotOurs as error:
            return Done(number, error.what, str(error)), None
        chain = job.row["chain"]
        return Done(number, "discarded"), None if chain is None else (job.row["handler"], chain.bytes)

    async def release(self, chain: tuple[int, bytes]) -> AsyncIterator[Done]:
        """Run the letters of a chain in order until one fails, as long as the first one has never run."""
        while (number := await self._next(*chain)) is not None:
            job = _Job(number, self.operator, "retry", why="those before it are settled")
            done = await self._run(job)
            yield replace(done, behind=True)
            if not job.goes_on:
                return

    async def _next(self, handler: int, chain: bytes) -> int | None:
        try:
            found = await self.session.connection.fetchrow(_NEXT, handler, UUID(bytes=chain))
        except Exception as error:
            raise self._lost(error) from None
        return found[0] if found is not None and found[1] else None

    async def _run(self, job: _Job) -> Done:
        try:
            await self._guarded(lambda: self._apply(job), job)
        except _NotOurs as error:
            return Done(job.number, error.what, str(error))
        text = job.verdict.error if job.verdict is not None else ""
        return Done(job.number, job.outcome, text)

    async def _guarded(self, run: Any, job: _Job) -> None:
        conflicts = 0
        while True:
            try:
                await run()
                return
            except Conflict as error:
                conflicts += 1
                if conflicts >= _CONFLICTS_MAX:
                    raise CannotTell(
                        f"dead letter {job.number} met another transaction {conflicts} times in a row ({error}): nothing was changed of it"
                    ) from None
            except _NotOurs:
                raise
            except (Outage, OSError) as error:
                raise self._lost(error, job.number) from None

    def _lost(self, error: BaseException, number: int | None = None) -> CannotTell:
        look = (
            f"; look at `consumer dlq show {number}`: it is settled as a whole, or not at all"
            if number is not None
            else ""
        )
        return CannotTell(f"{where(self.settings.dsn)}: {str(error) or type(error).__name__}{look}")

    async def _apply(self, job: _Job) -> None:
        """One letter through `once.apply`, as a worker would run it."""
        session = self.session
        session.job = job
        delivery = await self._delivery(job)
        job.delivery = delivery
        if not delivery.handler.idempotent:
            for _, error in await once.observe([delivery], random.random):
                delivery.outcome, delivery.attempts = once.verdict(delivery, error, random.random)
        parts: list[once.Part] = [(Batch([delivery], {}, {}), True, 0)]
        while parts:
            part, careful, _ = parts.pop()
            try:
                await once.apply(
                    session, self.names, _NOBODY_WAITS, part, careful=careful, draw=random.random, step=lambda _: None
                )
            except once.Isolate as isolate:
                parts += once.smaller(part, careful, isolate.__cause__, random.random)

    async def _delivery(self, job: _Job) -> Delivery:
        """The letter as its handler gets it. Read without a lock: of what the transaction decides on, it reads anew."""
        try:
            row = await self.session.connection.fetchrow(
                "select d.*, h.name as handler_name from consumer.dead_letters d join consumer.handlers h using (handler) where d.dead_letter = $1",
                job.number,
            )
        except Exception as error:
            raise Outage(str(error)) from error
        if row is None:
            raise _NotOurs("gone", "there is no such letter any more")
        handler = self.handlers.get(row["handler_name"])
        if handler is None:
            raise _NotOurs("no_handler", f"{self.app.name!r} has no handler {row['handler_name']!r} any more")
        names = [name.decode("utf-8", "surrogateescape") for name in row["header_keys"]]
        record = LogRecord(
            topic=row["topic"],
            partition=row["partition"],
            offset=row["offset"],
            timestamp=row["timestamp"],
            key=row["key"],
            value=row["value"],
            headers=tuple(zip(names, row["header_values"], strict=True)),
            fault="a header key that is not UTF-8" if any(not _is_text(name) for name in names) else "",
        )
        delivery = Delivery(handler, record)
        delivery.attempts = row["attempts"]
        by_offset = False
        if job.edit is not None:
            delivery = self._edited(job.edit, delivery, job.number)
            job.anew = job.edit.new_id is not None
        else:
            by_offset = bool(once.identify([delivery])) or isinstance(handler.rule, OffsetId)
        id, print_ = row["id"].bytes, row["fingerprint"]
        if job.edit is not None and job.edit.new_id is not None:
            delivery.id, delivery.fingerprint = job.edit.new_id, fingerprint(job.edit.value)
        elif delivery.outcome is None and not by_offset and row["reason"] in _STAND_IN and delivery.id != id:
            job.anew = True  # its id can be told now
        else:
            delivery.id, delivery.fingerprint = id, print_
        return delivery

    def _edited(self, edit: Edit, delivery: Delivery, number: int) -> Delivery:
        record = delivery.record
        edited = LogRecord(
            topic=record.topic,
            partition=record.partition,
            # A new intent is of no record in the log: its row of the ledger names the letter instead.
            offset=record.offset if edit.new_id is None else -number,
            timestamp=record.timestamp,
            key=record.key,
            value=edit.value,
            headers=tuple(record.headers),
        )
        found = Delivery(delivery.handler, edited)
        found.attempts = delivery.attempts
        return found


def edit_of(number: int, value: bytes | None, new_id: str | None) -> Edit:
    """An edit; new_id "auto" is made of the letter's number, so that the same command means the same intent."""
    if new_id is None:
        return Edit(value)
    return Edit(value, message_id((f"edit-of-dead-letter-{number}" if new_id == "auto" else new_id).encode()))


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
