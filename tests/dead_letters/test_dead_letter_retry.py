"""A retry changes ledger, dead letter and chain only where it settles.

On real PostgreSQL, compared by rows. Without Kafka: a retry reads no log.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from harness import query, until, value
from retry_desk import Desk

from consumer.core.identity import message_id
from consumer.core.outcome import Reason
from consumer.dead_letters.edits import edit_of
from consumer.dead_letters.retry import Filters
from consumer.postgres import claims

UNCHANGED = ["again", "right", "missing", "conflict", "clean again", "clean missing"]
DEAD = {reason.value for reason in Reason}


@pytest.fixture
async def desk(database: str) -> Desk:
    desk = Desk(database)
    await desk.open()
    return desk


async def check_nothing_changed(desk: Desk, number: int, before: list[object], outcome: str) -> None:
    """Check that ledger and chains are unchanged, and the dead letter too.

    A dead letter that failed again may have one attempt more.
    """
    after = await desk.rows()
    assert after[0] == before[0], outcome
    assert after[2:] == before[2:], outcome
    if outcome not in DEAD:
        assert after[1] == before[1], outcome
    assert await desk.done() == []


@pytest.mark.parametrize("fault", [*UNCHANGED, "fails", "rejected"])
@pytest.mark.parametrize("path", ["plain", "new id", "same id", "stand-in", "field", "no ledger row", "many"])
async def test_retry_that_does_not_apply_leaves_the_ledger_unchanged(desk: Desk, path: str, fault: str) -> None:
    handler = {"many": "many", "field": "field"}.get(path, "settle")
    unreadable: dict[str, Any] = (
        {"reason": "unreadable", "stored_id": b"s" * 16} if path in ("stand-in", "field") else {}
    )
    number = await desk.letter("a", key="k", handler=handler, in_ledger=path != "no ledger row", **unreadable)
    edit = {
        "new id": edit_of(number, b'{"id": "a"}', "another"),
        "same id": edit_of(number, b'{"id": "a"}', None),
    }.get(path)
    desk.faults["a"] = fault
    before = await desk.rows()
    for _ in range(2):
        [outcome] = await desk.outcomes(number, edit=edit)
        assert outcome not in ("applied", "duplicate")
        if edit is None and fault == "rejected":
            assert outcome == "rejected"
            return  # a verdict: it leaves its chain, and holds nothing back any more
        await check_nothing_changed(desk, number, before, outcome)
        before = await desk.rows()
    desk.faults.clear()
    assert await desk.outcomes(number, edit=edit) == ["applied"]
    assert await desk.done() == ["a"]
    id = UUID(bytes=message_id(b"another" if path == "new id" else b"a"))
    assert await value(desk.dsn, "select applied_at is not null from consumer.ledger where id = $1", id)
    state = await value(desk.dsn, "select state from consumer.dead_letters")
    assert state == ("discarded" if path == "new id" else "applied")


async def test_failed_retry_of_an_opted_out_handler_counts_one_attempt(desk: Desk) -> None:
    number = await desk.letter("a", handler="watch", in_ledger=False)
    desk.faults["a"] = "fails"
    for attempts in (2, 3):
        assert await desk.outcomes(number) == ["failed"]
        assert await value(desk.dsn, "select attempts from consumer.dead_letters") == attempts
    desk.faults.clear()
    assert await desk.outcomes(number) == ["applied"]


async def test_retry_of_dead_letters_of_one_id_applies_it_once_or_keeps_both(desk: Desk) -> None:
    """Two unreadable messages turn out to have one id.

    One that fails must not settle the other.
    """
    one, other = [
        await desk.letter("a", handler="field", reason="unreadable", stored_id=byte * 16) for byte in (b"1", b"2")
    ]
    before = await desk.rows()
    desk.faults["a"] = "again"
    assert await desk.outcomes(one, other) == ["postponed", "postponed"]
    assert await desk.rows() == before
    desk.faults["a"] = "fails"
    assert await desk.outcomes(one, other) == ["failed", "failed"]
    assert (await desk.rows())[0] == before[0]
    desk.faults.clear()
    assert await desk.outcomes(one, other) == ["applied", "duplicate"]
    assert await desk.done() == ["a"]


async def test_retry_under_the_id_of_another_dead_letter_settles_nothing(desk: Desk) -> None:
    held = await desk.letter("a", handler="field")
    twin = await desk.letter("a", handler="field", reason="unreadable", stored_id=b"2" * 16)
    before = await desk.rows()
    [done] = await desk.retry(twin)
    assert (done.outcome, await desk.rows(), await desk.done()) == ("other_letter", before, [])
    assert await desk.outcomes(held, twin) == ["applied", "duplicate"]
    assert await desk.done() == ["a"]


async def test_retry_of_a_batch_changes_only_applied_dead_letters(desk: Desk) -> None:
    faults = ["", "again", "fails", "clean again", "clean fails", "", "missing", "rejected", "", "conflict"]
    numbers = []
    for n, fault in enumerate(faults):
        desk.faults[f"x{n}"] = fault
        numbers.append(await desk.letter(f"x{n}", key=f"k{n}"))
        await desk.letter(f"x{n}-behind", key=f"k{n}", state="waiting", reason="behind")
    before = await desk.rows()
    outcomes = {result.dead_letter: result.outcome for result in await desk.retry(*numbers)}
    applied = [n for n, fault in enumerate(faults) if not fault]
    assert [outcomes[numbers[n]] for n in applied] == ["applied"] * 3
    assert (outcomes[numbers[1]], outcomes[numbers[2]], outcomes[numbers[7]]) == ("postponed", "failed", "rejected")
    behind = [*applied, 7]  # rejected is a verdict about that message alone: those behind it go on
    assert sorted(await desk.done()) == sorted([*(f"x{n}" for n in applied), *(f"x{n}-behind" for n in behind)])
    after = await desk.rows()
    changed = {before[0][i][1] for i in range(len(before[0])) if before[0][i] != after[0][i]}
    wanted = [*(f"x{n}" for n in applied), *(f"x{n}-behind" for n in behind)]
    assert changed == {UUID(bytes=message_id(id.encode())) for id in wanted}
    assert len(after[2]) == len(faults) - len(behind)


async def test_retry_that_loses_its_connection_goes_on_with_others(desk: Desk) -> None:
    desk.faults["b"] = "lost"
    numbers = [await desk.letter(id, key=id) for id in ("a", "b", "c")]
    outcomes = {result.dead_letter: result.outcome for result in await desk.retry(*numbers)}
    assert outcomes[numbers[1]] not in ("applied", "duplicate")
    assert sorted(await desk.done()) == ["a", "c"]
    assert await query(desk.dsn, "select count(*) from consumer.ledger where applied_at is null") == [(1,)]
    desk.faults.clear()
    assert await desk.outcomes(numbers[1]) == ["applied"]


async def test_retry_that_is_cancelled_changes_nothing(desk: Desk) -> None:
    number = await desk.letter("a", key="k")
    before = await desk.rows()
    blocker = await asyncpg.connect(desk.dsn)
    await blocker.execute("begin; lock table done")
    task = asyncio.create_task(desk.retry(number))
    waits = (
        "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and query like 'insert into done%')"
    )
    await until("the handler to wait", lambda: value(desk.dsn, waits))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await blocker.close()
    assert await desk.rows() == before
    assert await desk.outcomes(number) == ["applied"]
    assert await desk.done() == ["a"]


async def turned(desk: Desk) -> None:
    """Give the ledger another generation."""
    while await value(desk.dsn, "select consumer.turn((select version from consumer.ledger_state))") != "turned":
        pass


async def forgotten(desk: Desk) -> None:
    """Drop the older generations of the ledger; dead letters stay."""
    await turned(desk)
    version = "(select version from consumer.ledger_state)"
    for (number,) in await query(
        desk.dsn, "select number from consumer.generations where closed_at is not null order by 1"
    ):
        while await value(desk.dsn, f"select consumer.forget({version}, $1)", number) != "forgotten":
            pass
        await query(desk.dsn, "select consumer.drop_generation($1)", number)


async def test_retry_after_the_ledger_turned_applies_each_dead_letter_once(desk: Desk) -> None:
    """The ledger turns after connecting, so the claim finds another version."""
    plain = await desk.letter("a", key="k")
    gone = await desk.letter("b", in_ledger=False)
    unreadable = await desk.letter("c", reason="unreadable", stored_id=b"3" * 16)
    retrier = await desk.retrier()
    try:
        await turned(desk)
        outcomes = [done.outcome async for done in retrier.retry([plain, gone, unreadable])]
        assert outcomes == ["applied"] * 3
        await forgotten(desk)
        edited = await desk.letter("d")
        assert [done.outcome async for done in retrier.retry(edited, edit_of(edited, b'{"id": "d"}', "new"))] == [
            "applied"
        ]
    finally:
        retrier.close()
    assert await desk.done() == ["a", "b", "c", "d"]


async def test_bulk_retry_leaves_out_what_may_have_been_applied(desk: Desk) -> None:
    unsure = await desk.letter("old", reason="too_old")
    sure = await desk.letter("new", reason="rejected")
    retrier = await desk.retrier()
    try:
        assert list(await retrier.select(Filters(), waiting=False)) == [sure]
        assert await retrier.unsure(Filters()) == 1
        assert list(await retrier.select(Filters(reason="too_old"), waiting=False)) == [unsure]
    finally:
        retrier.close()
    before = await desk.rows()
    assert await desk.outcomes(unsure) == ["unsure"]
    assert await desk.rows() == before
    assert await desk.outcomes(unsure, unsure=True) == ["applied"]


async def test_retry_whose_ledger_row_was_dropped_is_unsure_when_its_time_is(desk: Desk) -> None:
    """A claim is unsure where the ledger may have forgotten the id."""
    desk.settings = desk.settings.model_copy(update={"ledger_clock_skew_hours": 0.0})
    numbers = [
        await desk.letter("a", reason="id_conflict", in_ledger=False),
        await desk.letter("b", handler="field", reason="unreadable", stored_id=b"2" * 16),
    ]
    await forgotten(desk)
    before = await desk.rows()
    assert await desk.outcomes(*numbers) == ["unsure", "unsure"]
    assert await desk.rows() == before and await desk.done() == []
    young = await desk.letter("c", reason="id_conflict", in_ledger=False)
    assert await desk.outcomes(young) == ["applied"]


async def test_edit_of_an_unreadable_dead_letter_takes_the_id_of_its_new_payload(desk: Desk) -> None:
    number = await desk.letter(
        "x", handler="field", reason="unreadable", stored_id=b"s" * 16, value=b"{broken", headers=()
    )
    edit = edit_of(number, json.dumps({"id": "given"}).encode(), None)
    assert await desk.outcomes(number, edit=edit) == ["applied"]
    assert await value(
        desk.dsn,
        "select applied_at is not null from consumer.ledger where id = $1",
        UUID(bytes=message_id(b"given")),
    )
    # Sent again by its producer, in words that can be read: a duplicate.
    again = await desk.letter("given", handler="field", reason="failed", in_ledger=False)
    assert await desk.outcomes(again) == ["duplicate"]
    broken = await desk.letter(
        "y", handler="field", reason="unreadable", stored_id=b"t" * 16, value=b"{broken", headers=()
    )
    before = await desk.rows()
    assert await desk.outcomes(broken, edit=edit_of(broken, b"{worse", None)) == ["unreadable"]
    assert await desk.rows() == before


async def test_chain_runs_in_order_and_stops_where_one_fails(desk: Desk) -> None:
    await desk.many(1300, key="k")
    [first] = [
        row[0] for row in await query(desk.dsn, "select dead_letter from consumer.dead_letters where state = 'dead'")
    ]
    desk.faults["m1100"] = "fails"
    results = await desk.retry(first)
    assert [result.outcome for result in results] == ["applied"] * 1100 + ["failed"]
    assert [result.behind for result in results] == [False] + [True] * 1100
    assert await desk.done() == [f"m{n}" for n in range(1100)]
    assert await query(desk.dsn, "select state, count(*) from consumer.dead_letters group by 1 order by 1") == [
        ("applied", 1100), ("dead", 1), ("waiting", 199),
    ]  # fmt: skip
    desk.faults = {"m1200": "again"}
    retrier = await desk.retrier()
    try:
        numbers = await retrier.select(Filters(), waiting=False)
        assert len(numbers) == 1
        results = [done async for done in retrier.retry(numbers)]
    finally:
        retrier.close()
    assert [result.outcome for result in results] == ["applied"] * 100 + ["postponed"]
    desk.faults.clear()
    number = await value(
        desk.dsn, "select min(dead_letter) from consumer.dead_letters where state in ('dead', 'waiting')"
    )
    await desk.retry(number)
    assert await desk.done() == [f"m{n}" for n in range(1300)]
    assert await value(desk.dsn, "select count(*) from consumer.held") == 0


async def test_two_operators_in_batches_settle_each_dead_letter_once(desk: Desk) -> None:
    await desk.many(4000)
    other = Desk(desk.dsn)
    other.name, other.app, other.faults = desk.name, desk.app, desk.faults
    desk.faults["m7"] = "fails"

    async def operate(at: Desk) -> list[str]:
        retrier = await at.retrier()
        try:
            return [done.outcome async for done in retrier.retry(await retrier.select(Filters(), waiting=False))]
        finally:
            retrier.close()

    one, two = await asyncio.gather(operate(desk), operate(other))
    assert one.count("applied") + two.count("applied") == 3999
    assert sorted(await desk.done()) == sorted(f"m{n}" for n in range(4000) if n != 7)
    assert await query(
        desk.dsn, "select count(*), count(distinct dead_letter) from consumer.audit where result = 'applied'"
    ) == [(3999, 3999)]


async def test_stopping_leaves_the_rest_untouched(desk: Desk) -> None:
    await desk.many(1500)
    retrier = await desk.retrier()
    try:
        seen = 0
        retrier.stopping = lambda: seen >= 500
        async for _ in retrier.retry(await retrier.select(Filters(), waiting=False)):
            seen += 1
    finally:
        retrier.close()
    assert len(await desk.done()) == seen == 500
    assert await query(desk.dsn, "select count(*) from consumer.dead_letters where state = 'dead'") == [(1000,)]


async def test_handler_whose_claim_was_kept_would_be_noticed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that keeps its claim is caught by this file's check."""

    async def keep(connection: object, keys: object) -> None: ...

    monkeypatch.setattr(claims, "mark_dead_again", keep)
    number = await desk.letter("a", key="k")
    desk.faults["a"] = "clean again"
    before = await desk.rows()
    [outcome] = await desk.outcomes(number)
    with pytest.raises(AssertionError):
        await check_nothing_changed(desk, number, before, outcome)


async def test_discard_names_only_the_chains_in_which_dead_letters_wait(desk: Desk) -> None:
    alone = await desk.letter("alone", key="k1")
    first = await desk.letter("first", key="k2")
    behind = await desk.letter("behind", key="k2", reason="behind", state="waiting")
    retrier = await desk.retrier()
    try:
        results, chains = await retrier.discard([alone, first], "not wanted")
        assert [result.outcome for result in results] == ["discarded", "discarded"]
        assert len(chains) == 1  # with 300,000 dead letters of as many keys nothing is kept in memory
        assert [(result.dead_letter, result.outcome) async for result in retrier.release(chains)] == [
            (behind, "applied")
        ]
    finally:
        retrier.close()
    assert await desk.done() == ["behind"]
    assert await query(desk.dsn, "select count(*) from consumer.held") == [(0,)]
