"""What runs after a failed transaction, and what a failed message becomes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer import App, Reject, Retry, RunAgain
from consumer.core.delivery import Batch, Delivery
from consumer.core.errors import Unreadable
from consumer.core.message import LogRecord
from consumer.core.outcome import Dead, Reason, RetryLater
from consumer.core.sqlstate import Meaning
from consumer.transaction.isolate import (
    FAILURES_MAX,
    PUT_ASIDE,
    SAVEPOINTS_MAX,
    ErrorFacts,
    Part,
    decide,
    run_again,
    run_smaller,
)

pytestmark = pytest.mark.unit

app = App("isolation")


@app.handler("orders", retry=Retry(attempts=2))
async def handle(payload: bytes) -> None: ...


def delivery(offset: int = 0) -> Delivery:
    return Delivery(app.handlers["handle"], LogRecord("orders", 0, offset, 0, None, b"", ()))


def part_of(count: int, *, use_savepoints: bool = False, failures: int = 0) -> Part:
    return Part(Batch([delivery(offset) for offset in range(count)], {}, {}), use_savepoints, failures)


def facts(
    error: BaseException, meaning: Meaning = Meaning.CODE, timed_out: Sequence[Delivery] = (), at: float = 5.0
) -> ErrorFacts:
    name = type(error).__name__
    return ErrorFacts(error, meaning, name, name, str(error), f"{name} at handlers.py:1", "the trace", at, timed_out)


def half() -> float:
    return 0.5


def offsets(parts: Sequence[Part]) -> list[list[int]]:
    return [[delivery.record.offset for delivery in part.batch.deliveries] for part in reversed(parts)]


@given(st.integers(2, 300), st.booleans(), st.integers(0, FAILURES_MAX - 1), st.sampled_from(["again", "smaller"]))
def test_parts_hold_every_message_once_and_in_order(
    count: int, use_savepoints: bool, failures: int, reaction: str
) -> None:
    part = part_of(count, use_savepoints=use_savepoints, failures=failures)
    if reaction == "again":
        parts = run_again(part, facts(OSError()), half, at_least=Meaning.OUTAGE, answers=False)
    else:
        parts = run_smaller(part, facts(ValueError()), half)
    assert [offset for ran in offsets(parts) for offset in ran] == list(range(count))
    assert all(delivery.outcome is None for delivery in part.batch.deliveries)


@given(st.integers(2, 100), st.data())
def test_slow_call_runs_apart_and_is_not_waited_for_again(count: int, data: st.DataObject) -> None:
    part = part_of(count)
    slow = part.batch.deliveries[data.draw(st.integers(0, count - 1))]
    parts = run_smaller(part, facts(TimeoutError("slow"), timed_out=[slow]), half)
    assert [offset for ran in offsets(parts) for offset in ran] == list(range(count))
    assert [slow.record.offset] in offsets(parts)
    assert [delivery for delivery in part.batch.deliveries if delivery.outcome is not None] == [slow]


def test_a_slow_call_for_many_messages_is_repeated_one_by_one() -> None:
    part = part_of(5)
    slow = part.batch.deliveries[1:3]
    parts = run_smaller(part, facts(TimeoutError(), timed_out=slow), half)
    assert offsets(parts) == [[0, 1, 2, 3, 4]]
    assert [delivery.call_alone for delivery in part.batch.deliveries] == [False, True, True, False, False]


def test_savepoints_are_tried_before_halves_up_to_their_number() -> None:
    assert run_smaller(part_of(SAVEPOINTS_MAX), facts(ValueError()), half)[0].use_savepoints
    assert [part.use_savepoints for part in run_smaller(part_of(SAVEPOINTS_MAX + 1), facts(ValueError()), half)] == [
        False,
        False,
    ]
    assert len(run_smaller(part_of(4, use_savepoints=True), facts(ValueError()), half)) == 2


def test_a_message_that_is_alone_is_at_fault() -> None:
    part = part_of(1)
    assert run_smaller(part, facts(ValueError("no")), half) == [Part(part.batch, use_savepoints=True)]
    [message] = part.batch.deliveries
    assert isinstance(message.outcome, RetryLater) and message.attempts == 1


def test_part_that_keeps_failing_alone_waits_and_counts_no_attempt() -> None:
    part = part_of(1, failures=FAILURES_MAX - 1)
    [after] = run_again(part, facts(OSError(), at=7.0), half, at_least=Meaning.OUTAGE, answers=False)
    [message] = part.batch.deliveries
    assert (message.outcome, message.attempts, after.failures) == (RetryLater(7.5, PUT_ASIDE), 0, 0)
    assert message.failure_cause is not None and message.failure_cause.since == 7.0


def test_attempts_end_in_a_dead_letter_by_the_policy() -> None:
    message = delivery()
    first, message.attempts = decide(message, facts(ValueError("no")), half)
    second, message.attempts = decide(message, facts(ValueError("no")), half)
    assert isinstance(first, RetryLater)
    assert second == Dead(Reason.FAILED, "ValueError: no", "ValueError", "the trace") and message.attempts == 2


@pytest.mark.parametrize(
    ("error", "outcome", "attempts"),
    [
        (Reject("never"), Dead(Reason.REJECTED, "never", "Reject", "the trace"), 1),
        (Unreadable(Reason.UNREADABLE, "no JSON"), Dead(Reason.UNREADABLE, "no JSON"), 0),
        (RunAgain("not yet"), None, 0),
    ],
    ids=["rejected", "unreadable", "run again"],
)
def test_errors_that_no_policy_decides(error: Exception, outcome: Dead | None, attempts: int) -> None:
    decided, counted = decide(delivery(), facts(error), half)
    assert counted == attempts
    assert decided == outcome if outcome is not None else isinstance(decided, RetryLater)


def test_a_message_keeps_the_time_since_which_it_waits() -> None:
    message = delivery()
    decide(message, facts(RunAgain("not yet"), at=1.0), half)
    decide(message, facts(RunAgain("not yet"), at=9.0), half)
    assert message.failure_cause is not None and message.failure_cause.since == 1.0
