"""Decides what runs after a failed transaction.

It also decides what becomes of a message that fails by itself. Pure: an error is given as `ErrorFacts`. It changes the
outcome, attempts and marks of the messages at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from consumer.core.delivery import Batch, Delivery
from consumer.core.errors import Reject, RunAgain, Unreadable
from consumer.core.evidence import Evidence, FailureCause, FailureVerdict, Others, judge
from consumer.core.outcome import Dead, Reason, RetryLater
from consumer.core.sqlstate import Meaning

FAILURES_MAX = 4  # in a row, of a part of a batch, before it is cut
SAVEPOINTS_MAX = 64  # more subtransactions than this in one transaction slow the whole server down
PUT_ASIDE = "put aside"  # the text of a message that is delayed without counting an attempt
_DELAY_SECONDS = 10.0
_PAUSE_SECONDS_MIN = 0.05  # of a message that is never given up, whatever its policy says
_PASSING = {Meaning.CONFLICT, Meaning.LOCKED, Meaning.OUTAGE}  # usually over by themselves


class TransactionPoisoned(Exception):
    """Some message has spoiled the transaction, unknown which.

    The batch runs again in smaller parts, or between savepoints.
    """


@dataclass(frozen=True, slots=True)
class Part:
    """A batch, or a part of one, for one transaction.

    use_savepoints: run every message between savepoints. failures: how often in a row it has failed as it is.
    """

    batch: Batch
    use_savepoints: bool = False
    failures: int = 0

    def halves(self) -> list[Part]:
        """Return two parts to run instead, the first one last."""
        head, tail = self.batch.split()
        return [Part(tail, self.use_savepoints), Part(head, self.use_savepoints)]


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """What is known about an error, without values from the database.

    Attributes:
        meaning: what the error's class allows it to be.
        kind: equal for failures that are alike.
        code: the SQLSTATE, or the exception's class.
        text: what it says.
        summary: kind, place and schema objects, in one line.
        trace: the summary and the frames.
        at: Unix seconds.
        timed_out: the messages of a call that took too long; empty for any other error.
    """

    error: BaseException
    meaning: Meaning
    kind: str
    code: str
    text: str
    summary: str
    trace: str
    at: float
    timed_out: Sequence[Delivery] = ()


# -- what runs next -------------------------------------------------------------------------------------------------


def run_again(
    part: Part,
    facts: ErrorFacts,
    random: Callable[[], float],
    evidence: Evidence | None = None,
    *,
    at_least: Meaning,
    answers: bool,
) -> list[Part]:
    """Return what runs after a conflict or an outage.

    The same part, or its halves when it keeps failing. A message that keeps failing alone is delayed, so that it does
    not hold up the others; evidence decides whether that counts as an attempt. at_least, answers: see `_judged`.
    """
    failures = part.failures + 1
    if failures < FAILURES_MAX:
        return [replace(part, failures=failures)]
    if len(part.batch.deliveries) > 1:
        return part.halves()
    if part.batch.deliveries and part.batch.deliveries[0].outcome is None:
        [delivery] = part.batch.deliveries
        verdict, delivery.failure_cause = _judged(delivery, facts, evidence, at_least=at_least, answers=answers)
        if verdict is FailureVerdict.COUNT:
            delivery.outcome, delivery.attempts = _counted(delivery, facts, random)
        else:
            delivery.outcome = _delay_uncounted(random)
        failures = 0
    return [replace(part, failures=failures)]


def run_smaller(
    part: Part, facts: ErrorFacts, random: Callable[[], float], evidence: Evidence | None = None
) -> list[Part]:
    """Return what runs after a poisoned transaction, to find its message.

    A message that is alone in the part is at fault: what `decide` says becomes its outcome.
    """
    if len(part.batch.deliveries) == 1:
        [delivery] = part.batch.deliveries
        delivery.outcome, delivery.attempts = decide(delivery, facts, random, evidence)
        return [Part(part.batch, use_savepoints=True)]
    if facts.timed_out:
        return _run_around(part, facts, random, evidence)
    if part.use_savepoints or len(part.batch.deliveries) > SAVEPOINTS_MAX:
        return part.halves()
    return [Part(part.batch, use_savepoints=True)]


def _run_around(part: Part, facts: ErrorFacts, random: Callable[[], float], evidence: Evidence | None) -> list[Part]:
    """Return parts around a slow call, whose limit must not pass twice."""
    if len(facts.timed_out) > 1:  # one of those that a batch handler was given: they are called one by one
        for delivery in facts.timed_out:
            delivery.call_alone = True
        return [Part(part.batch, part.use_savepoints)]
    [delivery] = facts.timed_out
    delivery.outcome, delivery.attempts = decide(delivery, facts, random, evidence)
    head, rest = part.batch.split(part.batch.deliveries.index(delivery))
    parts: list[Part] = []
    if len(rest.deliveries) > 1:
        rest, tail = rest.split(1)
        parts.append(Part(tail, part.use_savepoints))
    parts.append(Part(rest, use_savepoints=True))
    return [*parts, Part(head, part.use_savepoints)] if head.deliveries else parts


# -- what a message that fails by itself becomes ----------------------------------------------------------------------


def decide(
    delivery: Delivery,
    facts: ErrorFacts,
    random: Callable[[], float],
    evidence: Evidence | None = None,
    succeeded: bool = False,
) -> tuple[RetryLater | Dead, int]:
    """Return outcome and attempts of a message that failed by itself.

    succeeded: whether other messages of its handler went through in the same transaction, before it.
    """
    error = facts.error
    if isinstance(error, Reject):
        return Dead(Reason.REJECTED, facts.text, type(error).__name__, facts.trace), delivery.attempts + 1
    if isinstance(error, Unreadable):
        return Dead(Reason(error.reason), facts.text), delivery.attempts
    verdict, delivery.failure_cause = _judged(delivery, facts, evidence, succeeded)
    if verdict is FailureVerdict.COUNT:
        return _counted(delivery, facts, random)
    if facts.timed_out:
        return _delay_uncounted(random), delivery.attempts
    delivery.reruns += 1
    pause = delivery.handler.retry.pause_seconds(delivery.reruns, random())
    return RetryLater(max(_PAUSE_SECONDS_MIN, pause), type(error).__name__), delivery.attempts


def _judged(
    delivery: Delivery,
    facts: ErrorFacts,
    evidence: Evidence | None,
    succeeded: bool = False,
    at_least: Meaning | None = None,
    answers: bool = True,
) -> tuple[FailureVerdict, FailureCause]:
    """Return whether a message's own failure counts, and why it waits.

    at_least: what ended the transaction, where the error itself may be of a socket or of nothing in the database.
    answers: whether the connection still answered after the error.
    """
    handler = delivery.handler.name
    since = delivery.failure_cause.since if delivery.failure_cause is not None else facts.at
    if isinstance(facts.error, RunAgain):
        return FailureVerdict.WAIT, FailureCause(facts.summary, since, systemic=False)
    meaning = facts.meaning
    if at_least is not None and meaning in (Meaning.CODE, Meaning.MESSAGE):
        meaning = at_least
    others = Others.UNKNOWN
    if evidence is not None:
        if delivery.success_mark < 0:
            delivery.success_mark = evidence.mark(handler)
        evidence.failed(handler, facts.kind, delivery.partition, delivery.record.offset)
        others = evidence.others(handler, facts.kind, delivery.success_mark)
        if succeeded and meaning is Meaning.MESSAGE:
            others = Others.SUCCEED
    verdict = judge(meaning, answers=answers, alone=True, others=others)
    if verdict is FailureVerdict.COUNT and meaning in _PASSING and evidence is not None:
        delivery.success_mark = evidence.mark(
            handler
        )  # the next attempt counts only if others go through after this one
    if (
        verdict is FailureVerdict.COUNT
        and others is Others.UNKNOWN
        and meaning is Meaning.MESSAGE
        and evidence is not None
    ):
        # Before it becomes a dead letter, the rest of its batch has its turn: they may all fail alike.
        is_last = delivery.handler.retry.delay_seconds(facts.error, delivery.attempts + 1, 0.0) is None
        if is_last and not delivery.reruns:
            verdict = FailureVerdict.WAIT
    systemic = verdict is not FailureVerdict.COUNT and others is not Others.SUCCEED
    return verdict, FailureCause(facts.summary, since, systemic)


def _counted(delivery: Delivery, facts: ErrorFacts, random: Callable[[], float]) -> tuple[RetryLater | Dead, int]:
    """Return the retry policy's answer to one more attempt, and their number."""
    attempts = delivery.attempts + 1
    text = f"{type(facts.error).__name__}: {facts.text}"
    delay = delivery.handler.retry.delay_seconds(facts.error, attempts, random())
    if delay is None:
        unknown = delivery.handler.effect is not None and delivery.reply is None
        return Dead(Reason.EFFECT_UNKNOWN if unknown else Reason.FAILED, text, facts.code, facts.trace), attempts
    return RetryLater(delay, text), attempts


def _delay_uncounted(random: Callable[[], float]) -> RetryLater:
    return RetryLater(_DELAY_SECONDS * (0.5 + random() / 2), PUT_ASIDE)
