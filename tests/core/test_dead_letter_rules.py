"""Chains, kinds, ages and the share of dead letters."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.dead_letters import (
    DeadLetterState,
    age_seconds,
    blocks_key,
    group_of,
    next_state,
    normalized,
    ordering_key_hash,
)
from consumer.core.errors import Misconfigured
from consumer.core.message import LogRecord
from consumer.core.outcome import DUPLICATE, Cause, Dead, Reason, RetryLater
from consumer.transaction.dead_letter_rate import DEAD_LETTERS_MIN, WINDOW, DeadLetterRateLimit, TooManyDeadLetters

pytestmark = pytest.mark.unit

# What a message would do whenever it is run: go through, fail n times and then go through, or be rejected.
BEHAVIOURS = st.one_of(st.just("good"), st.just("rejected"), st.integers(1, 3))


@given(st.lists(BEHAVIOURS, max_size=12), st.data())
def test_messages_of_one_key_are_applied_in_log_order_despite_retries(messages: list[Any], data: st.DataObject) -> None:
    """A worker and an operator together keep the order of a key.

    The worker delivers one message after the other; the operator retries or discards in between, by the rules of the core.
    """
    left = [message if isinstance(message, int) else 0 for message in messages]
    letters: dict[int, DeadLetterState] = {}
    chain: list[int] = []  # numbers of messages, in the order of the log
    applied: list[int] = []
    discarded: set[int] = set()

    def run(number: int) -> Dead | None:
        if messages[number] == "rejected":
            return Dead(Reason.REJECTED, "")
        if left[number]:
            left[number] -= 1
            return Dead(Reason.FAILED, "")
        applied.append(number)
        return None

    def settle(number: int) -> bool:
        after = next_state(run(number))
        letters[number] = after.state
        if not after.keeps_key_blocked and number in chain:
            chain.remove(number)
        if after.keeps_key_blocked and number not in chain:
            chain.append(number)
        return after.releases_next

    def operate() -> None:
        if not chain:
            return
        first = chain[0]
        if data.draw(st.booleans()):
            goes_on = settle(first)
        else:
            letters[first], goes_on = DeadLetterState.DISCARDED, True
            discarded.add(first)
            chain.remove(first)
        while goes_on and chain and letters[chain[0]] is DeadLetterState.WAITING:
            goes_on = settle(chain[0])

    for number in range(len(messages)):
        if chain:
            letters[number] = DeadLetterState.WAITING
            chain.append(number)
        else:
            settle(number)
        if data.draw(st.booleans()):
            operate()
    while chain:
        before = (len(chain), sum(left))
        operate()
        assert (len(chain), sum(left)) < before  # it comes to an end
    assert applied == sorted(applied)
    rejected = {n for n, message in enumerate(messages) if message == "rejected"} - discarded
    assert sorted([*applied, *rejected, *discarded]) == list(range(len(messages)))
    assert all(letters[n] is DeadLetterState.DEAD for n in rejected)


def test_only_repeated_failures_and_unknown_effects_hold_back_what_follows() -> None:
    blocking = {Reason.FAILED, Reason.EFFECT_UNKNOWN, Reason.BEHIND}
    assert {reason for reason in Reason if blocks_key(Dead(reason, ""))} == blocking
    assert next_state(None) == next_state(DUPLICATE[Cause.LEDGER]) == (DeadLetterState.APPLIED, False, True)
    assert next_state(RetryLater(1, "")) == (DeadLetterState.DEAD, True, False)


def record(topic: str, partition: int, key: bytes | None) -> LogRecord:
    return LogRecord(topic, partition, 0, 0, key, b"", ())


@given(st.lists(st.tuples(st.sampled_from(["a", "a:1", "b"]), st.integers(0, 12), st.binary(max_size=3)), unique=True))
def test_a_chain_is_of_one_key_of_one_partition(places: list[tuple[str, int, bytes]]) -> None:
    chains = [ordering_key_hash("key", record(*place)) for place in places]
    assert len(set(chains)) == len(places)
    partitions = {(topic, number) for topic, number, _ in places}
    assert len({ordering_key_hash("partition", record(*place)) for place in places}) == len(partitions)
    assert not {ordering_key_hash("partition", record(*place)) for place in places} & set(chains)
    assert all(chain is not None and len(chain) == 16 for chain in chains)


def test_unordered_message_holds_back_nothing() -> None:
    assert ordering_key_hash("none", record("t", 0, b"k")) is None
    assert ordering_key_hash("key", record("t", 0, None)) is None
    assert ordering_key_hash("key", record("t", 0, b"")) is not None  # an empty key is a key
    assert ordering_key_hash("partition", record("t", 0, None)) is not None


ALIKE = [
    ("account 17 has 3.50 and not 4", "account 99 has 1,200.00 and not 12"),
    ("no such id 0b0f8f6e-1111-4c4c-9d9d-aaaabbbbcccc", "no such id 7e7e7e7e-2222-4c4c-9d9d-aaaabbbb0000"),
    ("Key (id)=('abc') is there", "Key (id)=('x y z') is there"),
    ('unknown field "naem"', 'unknown field "agge"'),
    ("at 0xdeadbeef", "at 0x7f00"),
    ("a\n  b", "a b"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_errors_that_differ_in_values_are_of_one_kind(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)
    assert group_of("h", "failed", "ValueError", one) == group_of("h", "failed", "ValueError", other)


def test_errors_that_differ_in_more_are_not() -> None:
    first = group_of("h", "failed", "ValueError", "no such account")
    assert first != group_of("h", "failed", "KeyError", "no such account")
    assert first != group_of("g", "failed", "ValueError", "no such account")
    assert first != group_of("h", "rejected", "ValueError", "no such account")
    assert first != group_of("h", "failed", "ValueError", "no such payment")


@given(st.text(), st.text(), st.text(), st.text())
def test_any_text_has_a_kind(handler: str, reason: str, kind: str, error: str) -> None:
    group = group_of(handler, reason, kind, error)
    assert len(group) == 10
    assert int(group, 16) >= 0


def test_ages_are_read_in_seconds_minutes_hours_days_and_weeks() -> None:
    assert [age_seconds(text, "--x") for text in ("90s", "10m", "24h", "7d", "2w")] == [90, 600, 86400, 604800, 1209600]
    for bad in ("", "h", "1", "-1h", "1.5h", "1 h", "1y", "\uff11h", "9999999999h"):
        with pytest.raises(Misconfigured, match="--older-than"):
            age_seconds(bad, "--older-than")


# -- the share --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=20), st.floats(0.01, 0.99))
def test_the_share_is_of_the_last_thousand_or_a_batch_more(batches: list[tuple[int, int]], limit: float) -> None:
    """The share equals a plain recount of the newest batches."""
    share = DeadLetterRateLimit(limit)
    done: list[tuple[int, int]] = []
    for good, bad in batches:
        recent: list[tuple[int, int]] = []
        for counts in reversed(done):
            if sum(g + b for g, b in recent) >= WINDOW:
                break
            recent.append(counts)
        dead = bad + sum(b for _, b in recent)
        total = good + bad + sum(g + b for g, b in recent)
        too_many = bad > 0 and dead >= DEAD_LETTERS_MIN and dead > limit * total
        reasons = ["failed"] * bad
        if too_many:
            with pytest.raises(TooManyDeadLetters, match="'h'"):
                share.check("h", good + bad, reasons)
            return
        share.check("h", good + bad, reasons)
        if good + bad:
            share.settled("h", good + bad, reasons)
            done.append((good, bad))


def test_few_bad_messages_are_accepted_except_with_a_limit_of_0() -> None:
    DeadLetterRateLimit(0.5).check("h", DEAD_LETTERS_MIN - 1, ["failed"] * (DEAD_LETTERS_MIN - 1))
    with pytest.raises(TooManyDeadLetters, match="50 dead letters of its last 50"):
        DeadLetterRateLimit(0.5).check("h", DEAD_LETTERS_MIN, ["failed"] * DEAD_LETTERS_MIN)
    with pytest.raises(TooManyDeadLetters):
        DeadLetterRateLimit(0).check("h", 1000, ["rejected"])
    DeadLetterRateLimit(1).check("h", 10**6, ["failed"] * 10**6)
    DeadLetterRateLimit(0).check("h", 1000, [])


def test_handlers_are_counted_apart_and_the_commonest_reason_is_named() -> None:
    share = DeadLetterRateLimit(0.5)
    share.settled("good", 10_000, [])
    mixed = list(Counter({"failed": 20, "unreadable": 60}).elements())
    with pytest.raises(TooManyDeadLetters, match="'unreadable': 60"):
        share.check("bad", 100, mixed)
    share.check("good", 100, mixed)
