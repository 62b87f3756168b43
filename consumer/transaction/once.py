"""The guarantee: a batch becomes one transaction that holds the claims, the handlers' effects and the positions.

Knows a Session and handlers; knows no Kafka and no Redis. Read `apply` first: it is the whole promise in one screen.
What it does not know: whether a COMMIT whose answer was lost has happened. Then the batch runs again from the top, and
its claims tell.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from consumer.core.cloudevents import from_event
from consumer.core.dead_letters import KeyHold, holds
from consumer.core.decode import read_again
from consumer.core.errors import Reject, RunAgain, TransactionMisuse, Unreadable
from consumer.core.evidence import Evidence, Others, Verdict, Why, judge
from consumer.core.fingerprint import BYTES, of_value
from consumer.core.handler import Handler
from consumer.core.identity import (
    CallableId,
    DefaultId,
    FieldId,
    HeaderId,
    OffsetId,
    fingerprint,
    from_headers,
    from_value,
    offset_id,
)
from consumer.core.log_identity import Position, Print
from consumer.core.message import LogRecord, Message, Partition
from consumer.core.ordering import UNDECODED, Batch, Delivery, PositionUpdate, Scheduler
from consumer.core.outcome import (
    DUPLICATE,
    SKIPPED,
    Applied,
    Cause,
    Dead,
    Duplicate,
    Outcome,
    Reason,
    RetryLater,
    Skipped,
)
from consumer.core.retention import is_time, what_is_wrong
from consumer.core.sqlstate import Meaning
from consumer.core.values import canonical
from consumer.error_places import frames, names, told
from consumer.postgres.claims import REDELIVERED, ExistingClaim
from consumer.postgres.errors import Conflict, Fenced, Outage, meaning_of, redacted_message, sqlstate_of
from consumer.postgres.session import Session
from consumer.transaction.dead_letter_rate import DeadShare
from consumer.transaction.invoke import finish_call, start_call
from consumer.transaction.limits import CallTracker, HandlerTimeout
from consumer.transaction.scope import Scope, savepoint_name
from consumer.transaction.tx import Tx

_CALLS_AT_A_TIME = 100
FAILURES_MAX = 4  # in a row, of a part of a batch, before it is cut
_ASIDE_SECONDS = 10.0
_AGAIN_SECONDS_MIN = 0.05  # of what is never given up, whatever its policy says
SAVEPOINTS_MAX = 64  # more subtransactions than this in one transaction slow the whole server down

TOO_OLD = Dead(
    Reason.TOO_OLD,
    "too old to judge: the ledger no longer remembers the time of this message, so it may have been applied, or not",
)
CONFLICT = Dead(Reason.ID_CONFLICT, "this message id was used before with another payload")
BEHIND = RetryLater(0.0, "waits behind a failed message of its key")
BUSY = RetryLater(0.1, "letters before it are being settled")
HELD_BACK = Dead(Reason.BEHIND, "waits behind a dead letter of its key")
NEXT_BATCH = RetryLater(0.0, "batch time limit reached; it runs in the next batch")

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Part:
    """A batch, or a part of one, that is settled in one transaction.

    use_savepoints: run each message between savepoints. failures: how often in a row it has failed as it is.
    """

    batch: Batch
    use_savepoints: bool = False
    failures: int = 0

    def halves(self) -> list[Part]:
        """Two parts to run instead, the first one last."""
        head, tail = self.batch.split()
        return [Part(tail, self.use_savepoints), Part(head, self.use_savepoints)]


class TransactionPoisoned(Exception):
    """The transaction is lost to a message's fault, and it is not known, or not repairable, which: run in smaller parts."""


@dataclass(slots=True)
class LedgerIds:
    """The application's name, the numbers that stand for names in the ledger, and which logs the positions are of."""

    app: str
    topics: Mapping[str, int]
    logs: dict[Partition, Position] = field(default_factory=dict)  # as the positions were read


@dataclass(slots=True)
class BatchResult:
    """What a transaction did, for the caller to record once it is committed."""

    outcomes: dict[Delivery, Outcome] = field(default_factory=dict)  # those that are not simply applied
    applied: list[Delivery] = field(default_factory=list)
    parked: dict[Delivery, float] = field(default_factory=dict)  # seconds until the next attempt; 0 behind another
    attempts: dict[Delivery, int] = field(default_factory=dict)
    errors: dict[Delivery, BaseException] = field(default_factory=dict)  # of attempts that failed
    moves: list[PositionUpdate] = field(default_factory=list)


class DryRunObserver(Protocol):
    """What looks at a transaction that is undone at its end."""

    async def claimed(
        self, session: Session, standing: Mapping[Delivery, ExistingClaim], fresh: list[Delivery]
    ) -> list[Delivery]:
        """After the claims: what stood before, and what was claimed now. Returns those whose handlers are to be called."""

    async def handled(self, session: Session, done: BatchResult) -> None:
        """After the handlers and their writes, before everything is undone."""


async def apply(
    session: Session,
    names: LedgerIds,
    lane: Scheduler,
    batch: Batch,
    *,
    use_savepoints: bool,
    random: Callable[[], float],
    on_step: Step,
    rehearsal: DryRunObserver | None = None,
    calls: CallTracker | None = None,
    limit: DeadShare | None = None,
    evidence: Evidence | None = None,
) -> BatchResult:
    """Settle a batch in one transaction: all of it, or nothing.

    use_savepoints: a savepoint around every message, so that one failure costs one message (at most SAVEPOINTS_MAX of them).
    rehearsal: do everything but store it: neither positions nor dead letters are written, and all else is undone.
    calls: what ends calls of handlers that take too long; without it, they have no limit.
    limit: how many dead letters are too many; beyond it TooManyDeadLetters is raised, and nothing is settled.
    evidence: how other messages of each handler fare, to tell a message's fault from a systemic one.
    Raises TransactionPoisoned when the batch must be cut smaller or run with savepoints, Conflict to run it again at once, Outage when
    PostgreSQL cannot say, Fenced when a partition is no longer ours. The connection is left without a transaction,
    or dropped.
    """
    done = BatchResult()
    claims, rivals = _distinct(batch.deliveries, lane, done)
    run = _Run(session, done, use_savepoints, random, calls, evidence)
    theirs = False  # whose statement a failure comes from: the handlers', or our own
    try:
        await session.begin()
        on_step("begun")
        # Claim first: a concurrent duplicate waits here on the unique key, before any work of it was done.
        standing = await session.claim(claims, names.topics) if claims else {}
        standing = await _by_rules(session, standing, names.topics)
        on_step("claimed")
        fresh = _sort_out(claims, standing, lane, done)
        if rivals:
            stands = await _by_rules(session, await session.claimed(rivals, names.topics), names.topics)
            _sort_out(rivals, stands, lane, done)
            _compare(rivals, fresh, done)
        if rehearsal is None:
            if session.has_forgotten and fresh:
                await _refuse_too_old(session, fresh, done)
            if suspects := [each for each in lane.possibly_held(fresh) if each not in done.outcomes]:
                await _wait_for_letters(session, lane, suspects, done)
        else:
            fresh = await rehearsal.claimed(session, standing, fresh)
        theirs = True
        await run.handlers(fresh)
        await run.scope.flush()
        if rehearsal is not None:
            await session.check_constraints()  # those that a COMMIT would check
        theirs = False
        on_step("handled")
        if rehearsal is not None:
            return await _undone(session, rehearsal, fresh, done)
        if done.parked and (retracted := [each for each in fresh if each in done.parked]):
            await session.release_claims(retracted)
        dead = {each: verdict for each, verdict in done.outcomes.items() if isinstance(verdict, Dead)}
        if dead:
            if limit is not None:
                _within(limit, fresh, done.outcomes)
            for each, verdict in dead.items():
                if holds(verdict):
                    lane.mark_possibly_held(each)
            await session.store_dead_letters(dead, done.attempts, claimed=[each for each in fresh if each in dead])
        done.applied = [each for each in fresh if each not in done.outcomes] if done.outcomes else fresh
        if not lane.is_current(batch):
            raise Fenced("its partitions were opened anew meanwhile: what it settled would be counted again")
        done.moves = _of_their_logs(
            names, batch, _with_unmoved(lane, batch, lane.position_updates(batch, done.parked), done)
        )
        if tried := {each: (n, delay) for each, delay in done.parked.items() if (n := _attempts(each, done))}:
            await session.save_attempts(tried, ())
        if over := [each for each in batch.deliveries if each.attempts and each not in done.parked]:
            await session.save_attempts({}, over)
        await session.write_positions(names.app, done.moves, _count(names, done))
        on_step("before_commit")
        theirs = True
        await session.commit()
        on_step("committed")
    except (TransactionPoisoned, Conflict, Outage, Fenced) as failure:
        await session.rollback()
        slow = failure.__cause__
        if isinstance(slow, HandlerTimeout) and slow.in_statement and not session.is_usable:
            raise Outage("postgresql does not answer") from slow  # neither the statement nor its cancellation
        raise
    except Exception as error:
        await session.rollback()
        if not session.is_usable:
            raise Outage(text_of(error)) from error
        may_be = meaning_of(error)
        if not theirs and may_be is Meaning.INTERNAL:
            may_be = Meaning.OUTAGE  # our own statements do not provoke it: the server is broken
        match judge(may_be, answers=True, alone=False, others=Others.UNKNOWN):
            case Verdict.AGAIN:
                raise Conflict(text_of(error)) from error
            case Verdict.OUTAGE:
                session.close()
                raise Outage(text_of(error)) from error
            case _:
                # A deferred write or a constraint checked at COMMIT: some message of the batch, unknown which.
                if theirs:
                    raise TransactionPoisoned from error
                raise  # our own statement: the rights or the schema do not fit this code
    except BaseException:
        session.close()  # cancelled: what was sent is undone by the server; a COMMIT on its way decides for itself
        raise
    return done


def _with_unmoved(
    lane: Scheduler, batch: Batch, moves: list[PositionUpdate], done: BatchResult
) -> list[PositionUpdate]:
    """Also the positions that a waiting message keeps where they are: whoever settles something must still own them."""
    if not (lane.delayed or done.parked):
        return moves
    unmoved = {each.partition for each in batch.deliveries} - {each.partition for each in moves}
    here = [each for each in lane.partitions if each in unmoved]
    return [*moves, *(PositionUpdate(each, lane.position(each), lane.position(each)) for each in here)]


def _of_their_logs(names: LedgerIds, batch: Batch, moves: Sequence[PositionUpdate]) -> list[PositionUpdate]:
    """The moves with the logs that they are of, and the last record of each: what its log must show again."""
    last: dict[Partition, Print] = {}
    wanted = {each.partition for each in moves}
    for delivery in reversed(batch.deliveries):
        if len(last) == len(wanted):
            break
        partition = delivery.partition
        if partition in wanted and partition not in last:
            record = delivery.record
            same = delivery.handler.fingerprint is BYTES  # the log is compared by its bytes
            print_ = delivery.fingerprint if same else fingerprint(record.value)
            last[partition] = Print(record.offset, record.timestamp, print_)
    found = []
    for each in moves:
        at = names.logs.get(each.partition) or Position(0)
        found.append(
            each._replace(topic_id=at.topic_id, handlers=at.handlers, holds=at.holds, seen=last.get(each.partition))
        )
    return found


async def _undone(
    session: Session, rehearsal: DryRunObserver, fresh: Sequence[Delivery], done: BatchResult
) -> BatchResult:
    done.applied = [each for each in fresh if each not in done.outcomes]
    await rehearsal.handled(session, done)
    await session.rollback()
    return done


def again(
    part: Part,
    error: Conflict | Outage | OSError,
    random: Callable[[], float],
    evidence: Evidence | None = None,
) -> list[Part]:
    """How to run again what failed through no fault of its own, as far as one can tell.

    A part that keeps failing on fresh connections is cut, so that one message that always fails so does not hold up
    the others. A message that keeps failing alone is put aside; evidence decides whether that counts as an attempt.
    """
    failures = part.failures + 1
    if failures < FAILURES_MAX:
        return [replace(part, failures=failures)]
    if len(part.batch.deliveries) > 1:
        return part.halves()
    if part.batch.deliveries and part.batch.deliveries[0].outcome is None:
        [delivery] = part.batch.deliveries
        cause = error.__cause__ or error
        at_least = Meaning.CONFLICT if isinstance(error, Conflict) else Meaning.OUTAGE
        # FATAL and PANIC end the connection.
        answers = isinstance(error, Conflict) or getattr(cause, "severity_en", "") == "ERROR"
        verdict_, delivery.why = _judged(delivery, cause, evidence, at_least=at_least, answers=answers)
        if verdict_ is Verdict.COUNT:
            delivery.outcome, delivery.attempts = _counted(delivery, cause, random)
        else:
            delivery.outcome = RetryLater(_ASIDE_SECONDS * (0.5 + random() / 2), "put aside")
        failures = 0
    return [replace(part, failures=failures)]


def smaller(
    part: Part,
    cause: BaseException | None,
    random: Callable[[], float],
    evidence: Evidence | None = None,
) -> list[Part]:
    """How to run a failed batch again, so that the message at fault is found and all others are kept.

    A message that is alone in it is the one: its verdict becomes its outcome.
    """
    if len(part.batch.deliveries) == 1:
        [delivery] = part.batch.deliveries
        delivery.outcome, delivery.attempts = verdict(delivery, cause or Conflict("unknown"), random, evidence)
        return [Part(part.batch, use_savepoints=True)]
    if isinstance(cause, HandlerTimeout):
        return _around(part, cause, random, evidence)
    if part.use_savepoints or len(part.batch.deliveries) > SAVEPOINTS_MAX:
        return part.halves()
    return [Part(part.batch, use_savepoints=True)]


def _around(part: Part, slow: HandlerTimeout, random: Callable[[], float], evidence: Evidence | None) -> list[Part]:
    """How to run a batch again without the call that took too long, so that the limit is not waited for twice."""
    if len(slow.deliveries) > 1:  # one of those that a batch handler was given: they are called one by one
        for each in slow.deliveries:
            each.alone = True
        return [Part(part.batch, part.use_savepoints)]
    [delivery] = slow.deliveries
    delivery.outcome, delivery.attempts = verdict(delivery, slow, random, evidence)
    head, rest = part.batch.split(part.batch.deliveries.index(delivery))
    parts: list[Part] = []
    if len(rest.deliveries) > 1:
        rest, tail = rest.split(1)
        parts.append(Part(tail, part.use_savepoints))
    parts.append(Part(rest, use_savepoints=True))
    return [*parts, Part(head, part.use_savepoints)] if head.deliveries else parts


def verdict(
    delivery: Delivery,
    error: BaseException,
    random: Callable[[], float],
    evidence: Evidence | None = None,
    succeeded: bool = False,
) -> tuple[RetryLater | Dead, int]:
    """What a message's failure by itself means for it, and how many attempts it has now had.

    succeeded: whether other messages of its handler went through in the same transaction, before it.
    """
    if isinstance(error, Reject):
        return Dead(Reason.REJECTED, text_of(error), type(error).__name__, _trace(error)), delivery.attempts + 1
    if isinstance(error, Unreadable):
        return Dead(Reason(error.reason), text_of(error)), delivery.attempts
    verdict_, delivery.why = _judged(delivery, error, evidence, succeeded)
    if verdict_ is Verdict.COUNT:
        return _counted(delivery, error, random)
    if isinstance(error, HandlerTimeout):
        return RetryLater(_ASIDE_SECONDS * (0.5 + random() / 2), "put aside"), delivery.attempts
    delivery.again += 1
    pause = delivery.handler.retry.pause_seconds(delivery.again, random())
    return RetryLater(max(_AGAIN_SECONDS_MIN, pause), type(error).__name__), delivery.attempts


def _judged(
    delivery: Delivery,
    error: BaseException,
    evidence: Evidence | None,
    succeeded: bool = False,
    at_least: Meaning | None = None,
    answers: bool = True,
) -> tuple[Verdict, Why]:
    """Whether a failure of a message by itself counts, and what to show while the message waits.

    at_least: what ended the transaction, where the error itself may be of a socket or of nothing in the database.
    answers: whether the connection still answered after the error.
    """
    handler, place = delivery.handler.name, delivery.handler.place
    since = delivery.why.since if delivery.why is not None else time.time()
    if isinstance(error, RunAgain):
        return Verdict.WAIT, Why(told(error, place), since, systemic=False)
    may_be = _may_be(error)
    if at_least is not None and may_be in (Meaning.CODE, Meaning.MESSAGE):
        may_be = at_least
    others = Others.UNKNOWN
    if evidence is not None:
        if delivery.mark < 0:
            delivery.mark = evidence.mark(handler)
        kind = kind_of(error)
        evidence.failed(handler, kind, delivery.partition, delivery.record.offset)
        others = evidence.others(handler, kind, delivery.mark)
        if succeeded and may_be is Meaning.MESSAGE:
            others = Others.SUCCEED
    found = judge(may_be, answers=answers, alone=True, others=others)
    if found is Verdict.COUNT and may_be in _PASSING and evidence is not None:
        delivery.mark = evidence.mark(handler)  # the next attempt counts only if others go through after this one
    if found is Verdict.COUNT and others is Others.UNKNOWN and may_be is Meaning.MESSAGE and evidence is not None:
        # Before it becomes a dead letter, the rest of its batch has its turn: they may all fail alike.
        is_last = delivery.handler.retry.delay_seconds(error, delivery.attempts + 1, 0.0) is None
        if is_last and not delivery.again:
            found = Verdict.WAIT
    systemic = found is not Verdict.COUNT and others is not Others.SUCCEED
    return found, Why(told(error, place), since, systemic)


_PASSING = {Meaning.CONFLICT, Meaning.LOCKED, Meaning.OUTAGE}  # usually over by themselves


def _may_be(error: BaseException) -> Meaning:
    if isinstance(error, HandlerTimeout) and error.in_statement:
        return Meaning.CONFLICT  # a slow database, or a slow statement of this message
    return meaning_of(error)


def _counted(delivery: Delivery, error: BaseException, random: Callable[[], float]) -> tuple[RetryLater | Dead, int]:
    """One more attempt of the message, and what its handler's policy says to that."""
    attempts = delivery.attempts + 1
    kind = sqlstate_of(error) or type(error).__name__
    text = f"{type(error).__name__}: {text_of(error)}"
    delay = delivery.handler.retry.delay_seconds(error, attempts, random())
    if delay is None:
        return Dead(Reason.FAILED, text, kind, _trace(error, delivery.handler.place)), attempts
    return RetryLater(delay, text), attempts


def kind_of(error: BaseException) -> str:
    """Equal for failures that are alike: the SQLSTATE and the schema objects, or the exception's class."""
    return f"{sqlstate_of(error) or type(error).__name__} {names(error)}"


def _trace(error: BaseException, handler_place: str = "") -> str:
    """What is kept of a failure's place with a dead letter: kind, place, schema objects and frames."""
    return "\n".join([told(error, handler_place), *frames(error)])


def is_uncounted(error: BaseException) -> bool:
    """Whether a failure alone says nothing against its message: without evidence, no attempt is counted."""
    if isinstance(error, RunAgain):
        return True
    return judge(_may_be(error), answers=True, alone=True, others=Others.UNKNOWN) is Verdict.WAIT


def text_of(error: BaseException) -> str:
    """The text of an exception, also of one that has none to give. PostgreSQL's text knows no NUL.

    A database's own is told without the values that it quotes; what a handler says is the handler's.
    """
    try:
        found = redacted_message(error)
        return (str(error) if found is None else found).replace("\0", "?").encode("utf-8", "replace").decode()
    except Exception:
        return "(an exception whose text cannot be told)"


def identify(deliveries: Iterable[Delivery], logs: Mapping[Partition, Position] = {}) -> set[str]:
    """Give every delivery its id and fingerprint; those that cannot be identified become dead letters.

    logs: the positions of the partitions, for the salt of ids that are made of offsets.
    Returns the topics of messages that were identified by their offset for want of anything better.
    """
    weak: set[str] = set()
    record = None
    print_of_record = 0
    for delivery in deliveries:
        handler = delivery.handler
        if delivery.record is not record:
            record = delivery.record
            print_of_record = fingerprint(record.value)
        delivery.fingerprint = print_of_record
        try:
            delivery.id, by_offset = _id_of(delivery, handler, logs)
            if by_offset:
                weak.add(record.topic)
            if handler.fingerprint is not BYTES and handler.idempotent:
                delivery.fingerprint = fingerprint_of(delivery)
        except Unreadable as error:
            if not delivery.id:
                delivery.id = _by_offset(delivery, logs)
            if handler.idempotent:
                delivery.outcome = Dead(Reason(error.reason), str(error))
    return weak


def _by_offset(delivery: Delivery, logs: Mapping[Partition, Position]) -> bytes:
    at = logs.get(delivery.partition)
    return offset_id(delivery.record, at.salt if at is not None else None)


def _id_of(delivery: Delivery, handler: Handler, logs: Mapping[Partition, Position]) -> tuple[bytes, bool]:
    """The id, and whether it is the offset's because the message has none."""
    record = delivery.record
    found: bytes | None
    by_offset = False
    if isinstance(record, LogRecord) and record.fault:
        raise Unreadable(Reason.BAD_HEADER, record.fault)
    match handler.rule:
        case DefaultId():
            found = from_headers(record, "message-id")
            if found is None:
                found = from_event(record)
            if found is None:
                found, by_offset = _by_offset(delivery, logs), handler.idempotent
        case OffsetId():
            found = _by_offset(delivery, logs)
        case HeaderId(name):
            found = from_headers(record, name)
            if found is None:
                raise Unreadable(Reason.NO_MESSAGE_ID, f"no {name!r} header")
        case FieldId() | CallableId() as rule:
            value = decoded(delivery)
            try:
                found = from_value(rule, value)
            except Unreadable:
                if value is not None or record.value is not None:
                    raise
                found, by_offset = _by_offset(delivery, logs), True  # a deletion, which has no fields
    if record.value is None and not handler.takes_none:
        delivery.id = found
        raise Unreadable(Reason.NO_VALUE, "a null value, and the handler does not take None")
    return found, by_offset


def fingerprint_of(delivery: Delivery) -> int:
    """The fingerprint under the handler's rule. Raises Unreadable where it needs a value that cannot be decoded."""
    rule = delivery.handler.fingerprint
    if rule is BYTES:
        return fingerprint(delivery.record.value)
    return of_value(rule, decoded(delivery) if rule.of_value is not None else None)


def decoded(delivery: Delivery) -> Any:
    """The value as the handler declares it, decoded at most once. Raises Unreadable."""
    if delivery.value is UNDECODED:
        raw = delivery.record.value
        if raw is None:
            if not delivery.handler.takes_none:
                raise Unreadable(Reason.NO_VALUE, "a null value, and the handler does not take None")
            delivery.value = None
        else:
            try:
                delivery.value = delivery.handler.decoder(raw)
            except Exception as error:  # whatever a type's own code raises: these bytes are not of that type
                delivery.value = read_again(delivery.handler.decoder, raw, error)
    return delivery.value


def unreadable(delivery: Delivery) -> Dead | None:
    """The outcome of a message that cannot be decoded, without a call of its handler; None if it can be."""
    try:
        decoded(delivery)
    except Unreadable as error:
        return Dead(Reason(error.reason), text_of(error))
    finally:
        delivery.value = UNDECODED
    return None


def handed_over(delivery: Delivery) -> Any:
    """The value for one call of the handler, which may change it: another call gets one that is decoded anew."""
    value = decoded(delivery)
    delivery.value = UNDECODED
    return value


def _distinct(
    deliveries: Sequence[Delivery], lane: Scheduler, done: BatchResult
) -> tuple[list[Delivery], list[Delivery]]:
    """The deliveries to claim, the first of each id, and those of the same ids with other payloads.

    The others end here, as duplicates, or wait. A rival's fate depends on what the claim of its id met: of two payloads, the
    ledger may hold the second.
    """
    first: dict[tuple[int, bytes], Delivery] = {}
    rivals: list[Delivery] = []
    if known := [each for each in deliveries if type(each.outcome) is Duplicate]:  # to Redis: there may be many
        done.outcomes |= {each: each.outcome for each in known if each.outcome is not None}
        deliveries = [each for each in deliveries if type(each.outcome) is not Duplicate]
    if not lane.delayed and all([each.outcome is None and each.handler.idempotent for each in deliveries]):
        # As nearly always. Of two of one id the first stays, being the last to be put there.
        keys = [(each.handler.number, each.id) for each in deliveries]
        first = dict(zip(reversed(keys), reversed(deliveries), strict=True))
        if len(first) == len(keys):
            return list(deliveries), rivals
        claims: list[Delivery] = []
        for key, delivery in zip(keys, deliveries, strict=True):
            if first[key] is delivery:
                claims.append(delivery)
            else:
                _tell_apart(first[key], delivery, done, rivals)
        return claims, rivals
    for delivery in deliveries:
        match delivery.outcome:
            case None if lane.is_blocked(delivery):
                _wait_behind(delivery, done)
            case None | Dead() if delivery.handler.idempotent:
                key = (delivery.handler.number, delivery.id)
                earlier = first.setdefault(key, delivery)
                if earlier is not delivery:
                    _tell_apart(earlier, delivery, done, rivals)
            case RetryLater(delay):
                done.outcomes[delivery] = delivery.outcome
                done.parked[delivery] = delay
            case Dead() | Skipped():
                done.outcomes[delivery] = delivery.outcome
            case None | Applied() | Duplicate():
                raise AssertionError("a handler without a ledger row is settled before the transaction")
    return list(first.values()), rivals


def _tell_apart(first: Delivery, second: Delivery, done: BatchResult, rivals: list[Delivery]) -> None:
    """Two of one id in a batch: a duplicate, or two payloads."""
    if first.fingerprint == second.fingerprint:
        done.outcomes[second] = DUPLICATE[Cause.BATCH]
    else:
        rivals.append(second)


async def _by_rules(
    session: Session, standing: dict[Delivery, ExistingClaim], topics: Mapping[str, int]
) -> dict[Delivery, ExistingClaim]:
    """What stands, with clashes only where the handlers' rules see one.

    A handler that compares nothing has none. Rows from before a handler got its rule have the fingerprint of the bytes:
    the same bytes are the same message under any rule.
    """
    asked: dict[Delivery, Delivery] = {}
    for each in [each for each, found in standing.items() if found.clashes]:
        rule = each.handler.fingerprint
        if not rule.compares:
            found = standing[each]._replace(clashes=False)
            standing[each] = REDELIVERED if found == REDELIVERED else found
        elif rule is not BYTES:
            asked[by_bytes(each)] = each
    if asked:
        for twin, found in (await session.claimed(list(asked), topics)).items():
            if not found.clashes:
                standing[asked[twin]] = found
    return standing


def by_bytes(delivery: Delivery) -> Delivery:
    """The same message with the fingerprint that it has in rows from before its handler's rule."""
    twin = Delivery(delivery.handler, delivery.record)
    twin.id, twin.fingerprint = delivery.id, fingerprint(delivery.record.value)
    return twin


def _compare(rivals: Sequence[Delivery], fresh: Sequence[Delivery], done: BatchResult) -> None:
    """Say of conflicts with a message of the same batch whether the decoded values are equal."""
    firsts = {(each.handler, each.id): each for each in fresh}
    for each in rivals:
        first = firsts.get((each.handler, each.id))
        if first is not None and done.outcomes.get(each) == CONFLICT:
            done.outcomes[each] = conflict_of(are_equal(first, each))


def are_equal(one: Delivery, other: Delivery) -> bool | None:
    """Whether the decoded values of two deliveries are equal; None where that cannot be told."""
    try:
        return canonical(decoded(one)) == canonical(decoded(other))
    except Exception:  # unreadable, or of a type that cannot be compared
        return None


def conflict_of(is_equal: bool | None) -> Dead:
    """The verdict on an id that was used again."""
    if is_equal is None:
        return CONFLICT
    told = 'equal: fingerprint="value" takes them as one message' if is_equal else "different"
    return Dead(Reason.ID_CONFLICT, f"{CONFLICT.error}; the decoded values are {told}")


def _sort_out(
    claims: Sequence[Delivery], standing: Mapping[Delivery, ExistingClaim], lane: Scheduler, done: BatchResult
) -> list[Delivery]:
    """Those whose claim was won. The others are duplicates, or an id used again with another payload."""
    fresh: list[Delivery] = []
    for delivery in claims:
        earlier = standing.get(delivery)
        if earlier is REDELIVERED:
            done.outcomes[delivery] = DUPLICATE[Cause.LEDGER]
        elif earlier is None:
            fresh.append(delivery)
            if delivery.outcome is not None:
                done.outcomes[delivery] = delivery.outcome  # a dead letter before its handler ran
        elif earlier.clashes:
            done.outcomes[delivery] = CONFLICT
        else:
            done.outcomes[delivery] = DUPLICATE[Cause.DEAD_LETTER if earlier.dead else Cause.LEDGER]
            if earlier.dead and earlier.same_record:
                lane.mark_possibly_held(delivery)  # by a COMMIT whose answer was lost, maybe: then it holds its chain
    return fresh


async def _refuse_too_old(session: Session, fresh: Sequence[Delivery], done: BatchResult) -> None:
    """Make dead letters of what was claimed only because the ledger no longer remembers that far."""
    for delivery in await session.too_old([each for each in fresh if each.outcome is None]):
        at = delivery.record.timestamp
        verdict = TOO_OLD if is_time(at) else replace(TOO_OLD, error=f"{TOO_OLD.error} ({what_is_wrong(at)})")
        done.outcomes[delivery] = delivery.outcome = verdict


async def _wait_for_letters(session: Session, lane: Scheduler, suspects: Sequence[Delivery], done: BatchResult) -> None:
    """Sort out what dead letters hold back. postgres/dead_letters.py walks through the races."""
    for delivery, hold in (await session.holds(suspects)).items():
        match hold:
            case KeyHold.HELD:
                done.outcomes[delivery] = HELD_BACK
            case KeyHold.BUSY:
                done.outcomes[delivery] = BUSY
                done.parked[delivery] = BUSY.delay_seconds
            case KeyHold.FREE:
                lane.mark_not_held(delivery)


def _within(limit: DeadShare, fresh: Sequence[Delivery], outcomes: Mapping[Delivery, Outcome]) -> None:
    """Raise TooManyDeadLetters beyond the limit."""
    for name, (messages, reasons) in shares(fresh, outcomes).items():
        limit.check(name, messages, reasons)


def shares(applied: Iterable[Delivery], outcomes: Mapping[Delivery, Outcome]) -> dict[str, tuple[int, list[str]]]:
    """For each handler: how many messages came to an end, and for what those died that did. What only waits has none.

    Duplicates are among them: read again from the beginning, a topic is nothing but these and its old conflicts.
    """
    applied = [each for each in applied if each not in outcomes] if outcomes else applied
    counts: dict[str, int] = {}
    reasons: dict[str, list[str]] = {}
    for handler, count in Counter([each.handler for each in applied]).items():
        counts[handler.name] = count
    for handler, count in Counter(
        [each.handler for each, outcome in outcomes.items() if type(outcome) is Duplicate]
    ).items():
        counts[handler.name] = counts.get(handler.name, 0) + count
    for delivery, outcome in outcomes.items():
        if type(outcome) is Dead and outcome.reason is not Reason.BEHIND:
            counts[delivery.handler.name] = counts.get(delivery.handler.name, 0) + 1
            reasons.setdefault(delivery.handler.name, []).append(_reason(outcome))
    return {name: (count, reasons.get(name, [])) for name, count in counts.items()}


def _reason(verdict: Dead) -> str:
    """Why a message died, with the place in the handler's code, or the field that does not fit; without values."""
    if verdict.trace:
        return f"{verdict.reason.value}: {verdict.trace.partition(chr(10))[0]}"
    return f"{verdict.reason.value}: {verdict.error}" if verdict.reason is Reason.UNREADABLE else verdict.reason.value


def _attempts(delivery: Delivery, done: BatchResult) -> int:
    return done.attempts.get(delivery, delivery.attempts)


def _wait_behind(delivery: Delivery, done: BatchResult) -> None:
    done.outcomes[delivery] = BEHIND
    done.parked[delivery] = 0.0


def _count(names: LedgerIds, done: BatchResult) -> dict[tuple[int, int, int, str], int]:
    """How many messages ended how, by handler, topic and partition: rows that only the owner of a partition updates."""
    counts: dict[tuple[int, int, int, str], int] = {}
    start, size = 0, len(done.applied)
    while start < size:  # runs, because a batch holds long ones of a handler and partition
        first = done.applied[start]
        handler, topic, partition = first.handler, first.record.topic, first.record.partition
        end = start + 1
        while (
            end < size
            and (each := done.applied[end]).handler is handler
            and (record := each.record).partition == partition
            and record.topic == topic
        ):
            end += 1
        if handler.idempotent:
            key = (handler.number, names.topics[topic], partition, "kept")
            counts[key] = counts.get(key, 0) + end - start
        start = end
    for delivery, outcome in done.outcomes.items():
        match outcome:
            case Duplicate():
                label = outcome.label
            case Dead():
                label = "dead_lettered"
            case Skipped():
                label = "skipped"
            case Applied() | RetryLater():
                continue
        key = (delivery.handler.number, names.topics[delivery.record.topic], delivery.record.partition, label)
        counts[key] = counts.get(key, 0) + 1
    return counts


class _Run:
    """Calls the handlers of one transaction, and finds out what became of every message."""

    def __init__(
        self,
        session: Session,
        done: BatchResult,
        use_savepoints: bool,
        random: Callable[[], float],
        calls: CallTracker | None = None,
        evidence: Evidence | None = None,
    ) -> None:
        self.calls = calls
        self.evidence = evidence
        self.session = session
        self.scope = Scope(session.connection, session.columns)
        self.done = done
        self.use_savepoints = use_savepoints
        self.random = random
        self.blocked: set[Hashable] = set()  # units whose message failed: later ones wait behind it
        self.held: set[Hashable] = set()  # units whose message has failed for good: later ones are kept as letters too
        self.went_through: set[str] = set()  # handlers of messages that ran between savepoints and did not fail
        self.started = False
        self.now = time.monotonic()
        self.until = self.now + session.batch_seconds_max

    async def handlers(self, fresh: Sequence[Delivery]) -> None:
        """Run every fresh message, in the order of the batch; batch handlers and concurrent ones by themselves."""
        by_handler: dict[Handler | None, list[Delivery]] = {}
        for delivery in fresh:
            if delivery.outcome is None and delivery not in self.done.outcomes:
                by_handler.setdefault(self._caller(delivery.handler), []).append(delivery)
        for handler, deliveries in by_handler.items():
            if handler is not None and handler.batch is not None:
                readable = [each for each in deliveries if self._readable(each)]
                for chunk in _chunks(readable, handler.batch):
                    if self._is_late():
                        for delivery in chunk:
                            self._leave(delivery)
                    else:
                        await self._call_batch(handler, chunk)
            elif handler is not None:
                await in_chains(deliveries, handler.concurrency, self._one)
            else:
                task = asyncio.current_task()
                for number, delivery in enumerate(deliveries):
                    if number % _CALLS_AT_A_TIME == 0:
                        await asyncio.sleep(0)  # handlers that only defer never wait: let the other lanes' answers in
                    if (rest := self._begin(delivery, task)) is not None:
                        await rest

    def _caller(self, handler: Handler) -> Handler | None:
        """The handler whose messages are called together; None for those that are called in batch order."""
        return None if handler.batch is None and (handler.concurrency == 1 or self.use_savepoints) else handler

    async def _one(self, delivery: Delivery, task: asyncio.Task[Any] | None) -> None:
        if (rest := self._begin(delivery, task)) is not None:
            await rest

    def _begin(self, delivery: Delivery, task: asyncio.Task[Any] | None) -> Awaitable[None] | None:
        """Begin with a message. Returns what is left to await; nothing when its handler has ended without waiting for anything."""
        if self._is_late():
            self._leave(delivery)
            return None
        if self.blocked and delivery.ordering_key() in self.blocked:
            _wait_behind(delivery, self.done)
            return None
        if self.held and delivery.ordering_key() in self.held:
            self.done.outcomes[delivery] = HELD_BACK
            return None
        tx = Tx(self.scope, delivery, task)
        if self.use_savepoints:
            return self._run_alone(delivery, tx)
        try:
            argument = _argument(delivery)
        except Exception as error:
            return self._failed(delivery, tx, error)
        call = start_call(delivery.handler, argument, tx, self.calls)
        if call is None and tx.error is None and tx.close():
            return None  # nothing was sent, so nothing but its deferred writes is left of it
        return self._go_on(delivery, tx, call, self.now)

    async def _run_alone(self, delivery: Delivery, tx: Tx) -> None:
        """Run a message between savepoints."""
        try:
            argument = _argument(delivery)
            await self._call(
                delivery.handler, lambda: start_call(delivery.handler, argument, tx, self.calls), tx, [delivery]
            )
            self.went_through.add(delivery.handler.name)
        except Exception as error:
            await self._failed(delivery, tx, error)

    async def _go_on(self, delivery: Delivery, tx: Tx, call: Awaitable[object] | None, since: float) -> None:
        """Go on with a message whose handler has begun."""
        try:
            await self._call(delivery.handler, lambda: call, tx, [delivery], since)
        except Exception as error:
            await self._failed(delivery, tx, error)

    def _is_late(self) -> bool:
        """Whether to leave the rest for the next batch, since this one has taken its time. Never before its first call.

        Slow handlers keep the transaction open and the connection idle: what is done must be committed before
        PostgreSQL ends both, or the same batch would run again for ever.
        """
        self.now = time.monotonic()
        if not self.started or self.now < self.until:
            self.started = True
            return False
        return True

    def _leave(self, delivery: Delivery) -> None:
        self.done.outcomes[delivery] = NEXT_BATCH
        self.done.parked[delivery] = 0.0

    async def _call_batch(self, handler: Handler, deliveries: list[Delivery]) -> None:
        """One call for many messages. One that fails is called again with halves, down to the message at fault."""
        if self.blocked:
            behind = [each for each in deliveries if each.ordering_key() in self.blocked]
            for each in behind:
                _wait_behind(each, self.done)
            deliveries = [each for each in deliveries if each not in behind]
        if self.held:
            for each in deliveries:
                if each.ordering_key() in self.held:
                    self.done.outcomes[each] = HELD_BACK
            deliveries = [each for each in deliveries if each not in self.done.outcomes]
        if not deliveries:
            return
        tx = Tx(self.scope, deliveries, asyncio.current_task())
        try:
            arguments = [_argument(each) for each in deliveries]
            await self._call(handler, lambda: start_call(handler, arguments, tx, self.calls), tx, deliveries)
        except Exception as error:
            if len(deliveries) == 1:
                await self._failed(deliveries[0], tx, error)
                return
            self._check_fault(tx, error)
            if isinstance(error, HandlerTimeout):
                for each in deliveries:
                    await self._call_batch(handler, [each])
                return
            middle = len(deliveries) // 2
            await self._call_batch(handler, deliveries[:middle])
            await self._call_batch(handler, deliveries[middle:])

    async def _call(
        self,
        handler: Handler,
        start: Callable[[], Awaitable[object] | None],
        tx: Tx,
        deliveries: Sequence[Delivery],
        since: float | None = None,
    ) -> None:
        """Call the handler, and raise if what it did cannot be stored, whether or not it says so.

        start: begins the call, and returns what is left to await of it. since: when it was begun, if it was before.
        """
        name = None
        if self.use_savepoints:
            await self.scope.flush()
            name = savepoint_name()
            await self.session.connection.execute(f"savepoint {name}")
        try:
            try:
                await finish_call(handler, start(), tx, deliveries, self.calls, since)
            except BaseException:
                if not tx.close():
                    with suppress(TransactionMisuse):
                        await tx.end(failed=True)
                raise
            if not tx.close():
                await tx.end()
            if tx.error is not None:
                raise tx.error  # swallowed by the handler: PostgreSQL would store nothing of it
            if not self.session.connection.is_in_transaction():
                raise TransactionMisuse("the handler's statements ended the transaction")
            if name is not None:
                await self.scope.flush()
        except Exception:
            tx.discard()
            if name is not None and self.session.is_usable:
                await self.session.connection.execute(f"rollback to savepoint {name}")
                self.scope.undone()
                self.scope.flush_error, tx.touched = None, False
            raise
        if name is not None:
            await self.session.connection.execute(f"release savepoint {name}")

    def _check_fault(self, tx: Tx, error: BaseException) -> None:
        """Raise when the transaction, and not only this message, has failed."""
        if isinstance(error, HandlerTimeout):
            if tx.touched or self.scope.flush_error is not None or not self.session.is_usable:
                raise TransactionPoisoned from error
            return
        spoiled = self.scope.flush_error is not None or tx.touched or not self.session.connection.is_in_transaction()
        for cause in (self.scope.flush_error, tx.error, error):
            if cause is None:
                continue
            may_be = meaning_of(cause)
            # A conflict and an outage end the whole transaction, whoever met them first.
            alone = not spoiled and may_be not in (Meaning.CONFLICT, Meaning.LOCKED, Meaning.OUTAGE)
            match judge(may_be, answers=self.session.is_usable, alone=alone, others=Others.UNKNOWN):
                case Verdict.AGAIN:
                    raise Conflict(text_of(cause)) from cause
                case Verdict.OUTAGE:
                    self.session.close()
                    raise Outage(text_of(cause)) from cause
                case _:
                    pass
        if spoiled:
            raise TransactionPoisoned from error

    async def _failed(self, delivery: Delivery, tx: Tx, error: Exception) -> None:
        self._check_fault(tx, error)
        succeeded = delivery.handler.name in self.went_through
        outcome, attempts = verdict(delivery, error, self.random, self.evidence, succeeded)
        self.done.outcomes[delivery] = outcome
        self.done.attempts[delivery] = attempts
        self.done.errors[delivery] = error
        if isinstance(outcome, RetryLater):
            self.done.parked[delivery] = outcome.delay_seconds
            self.blocked.add(delivery.ordering_key())
        elif holds(outcome) and delivery.ordering_key_hash() is not None:
            self.held.add(delivery.ordering_key())

    def _readable(self, delivery: Delivery) -> bool:
        try:
            decoded(delivery)
        except Unreadable as error:
            self.done.outcomes[delivery], self.done.attempts[delivery] = verdict(delivery, error, self.random)
            self.done.errors[delivery] = error
            return False
        return True


def _chunks(deliveries: Sequence[Delivery], most: int) -> Iterator[list[Delivery]]:
    """What a batch handler is given in one call, in order."""
    chunk: list[Delivery] = []
    for each in deliveries:
        if chunk and (len(chunk) == most or each.alone or chunk[-1].alone):
            yield chunk
            chunk = []
        chunk.append(each)
    if chunk:
        yield chunk


async def in_chains(
    deliveries: Iterable[Delivery],
    limit: int,
    run_one: Callable[[Delivery, asyncio.Task[Any] | None], Coroutine[Any, Any, None]],
) -> None:
    """Run at most `limit` messages at a time, those of one unit one after the other. The first exception ends all."""
    chains: dict[Hashable, list[Delivery]] = {}
    for delivery in deliveries:
        chains.setdefault(delivery.ordering_key(), []).append(delivery)
    waiting = iter(chains.values())

    async def work() -> None:
        task = asyncio.current_task()
        for chain in waiting:
            for delivery in chain:
                await run_one(delivery, task)

    tasks = [asyncio.create_task(work()) for _ in range(min(limit, len(chains)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _argument(delivery: Delivery) -> Any:
    return _message(delivery) if delivery.handler.wants_message else handed_over(delivery)


def _message(delivery: Delivery) -> Message[Any]:
    record = delivery.record
    return Message(
        id=delivery.id.hex(),
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=record.key,
        headers=tuple(record.headers),
        timestamp=record.timestamp,
        value=handed_over(delivery),
    )


async def observe(
    deliveries: Iterable[Delivery], random: Callable[[], float], calls: CallTracker | None = None
) -> list[tuple[Delivery, BaseException]]:
    """Run the handlers that opted out, before any transaction. Returns what failed.

    Their messages end as skipped. One that fails is retried by its policy and then a dead letter, like any other; a
    batch that fails as a whole is called again message by message.
    """
    errors: list[tuple[Delivery, BaseException]] = []
    blocked: set[Hashable] = set()  # units whose message failed: later ones wait behind it
    by_handler: dict[Handler, list[Delivery]] = {}
    for delivery in deliveries:
        if not delivery.handler.idempotent and delivery.outcome is None:
            by_handler.setdefault(delivery.handler, []).append(delivery)

    async def one(delivery: Delivery, _: object) -> None:
        if blocked and delivery.ordering_key() in blocked:
            delivery.outcome = BEHIND
            return
        try:
            await _observe(delivery.handler, [delivery], calls)
            delivery.outcome = SKIPPED
        except Exception as error:
            delivery.outcome, delivery.attempts = verdict(delivery, error, random)
            errors.append((delivery, error))
            if isinstance(delivery.outcome, RetryLater):
                blocked.add(delivery.ordering_key())

    for handler, wanted in by_handler.items():
        if handler.batch is None:
            await in_chains(wanted, handler.concurrency, one)
            continue
        for start in range(0, len(wanted), handler.batch):
            chunk = wanted[start : start + handler.batch]
            try:
                await _observe(handler, chunk, calls)
            except Exception:
                await in_chains(chunk, 1, one)
            else:
                for delivery in chunk:
                    delivery.outcome = SKIPPED
    return errors


async def _observe(handler: Handler, deliveries: Sequence[Delivery], calls: CallTracker | None) -> None:
    for delivery in deliveries:
        if isinstance(delivery.record, LogRecord) and delivery.record.fault:
            raise Unreadable(Reason.BAD_HEADER, delivery.record.fault)
    values = [_argument(each) for each in deliveries]
    call = start_call(handler, values if handler.batch is not None else values[0], None, calls)
    await finish_call(handler, call, None, deliveries, calls)
