"""The oracle finds no difference in the framework, and finds planted ones."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import prefork
import pytest
from harness import ROOT

from consumer.local_servers import Postgres
from oracle.case import Case, Defer, Handler, Message, Table, pasted
from oracle.check import Verdict, check
from oracle.databases import Databases
from oracle.directed import DIRECTED
from oracle.generate import draw
from oracle.mutants import MUTANTS, broken
from oracle.session import Summary, minimal, search


class Oracle:
    """What a pasted counterexample needs."""

    def __init__(self, databases: Databases) -> None:
        self.databases = databases

    async def check(self, case: Case) -> Verdict:
        """Run a case on both sides."""
        return await check(self.databases, case)

    async def expect_equal(self, case: Case) -> Verdict:
        """Fail if the batch leaves something else than its messages alone."""
        verdict = await self.check(case)
        assert not verdict.invalid, verdict.invalid
        assert not verdict.undecided
        assert verdict.difference is None, str(verdict.difference)
        return verdict


@pytest.fixture
async def oracle(postgres: Postgres) -> AsyncIterator[Oracle]:
    async with Databases(postgres.dsn()) as databases:
        yield Oracle(databases)


PAYMENTS = Case(
    tables=(
        Table("t0", ("k int primary key", "n bigint not null default 0"), ("insert into t0 (k) values (1), (2)",)),
        Table("l0", ("k int", "n bigint")),
    ),
    handlers=(
        Handler(
            (
                Defer("insert into l0 values ($1, $2)", ("k", "n")),
                Defer("update t0 set n = n + $2 where k = $1", ("k", "n")),
            )
        ),
    ),
    messages=tuple(Message(f"key{n % 5}", n + 1, {"k": n % 2 + 1, "n": n}) for n in range(40)),
)


async def test_the_reference_workload_is_equal_and_grouped(oracle: Oracle) -> None:
    verdict = await oracle.expect_equal(PAYMENTS)
    assert verdict.seen is not None
    assert verdict.seen.rows_rewritten >= 40
    assert verdict.seen.executions < 10


def test_a_seed_draws_the_same_case_every_time() -> None:
    assert repr(draw(5)) == repr(draw(5))
    assert repr(draw(5)) != repr(draw(6))


def test_a_case_prints_as_python_that_makes_it_again() -> None:
    import datetime
    import ipaddress
    from uuid import UUID

    from oracle import case as vocabulary
    from oracle import values

    names = {**vars(vocabulary), **vars(values), "datetime": datetime, "UUID": UUID, "Decimal": Decimal}
    names["ipaddress"] = ipaddress
    for seed in range(200):
        assert repr(eval(repr(draw(seed)), names)) == repr(draw(seed))


ORACLE_SECONDS = 15  # `make oracle` runs longer


@pytest.mark.timeout(400)
async def test_a_short_run_of_random_applications_is_equal(
    oracle: Oracle, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    """Other seeds every day; the first one is printed."""
    seed = datetime.now(UTC).date().toordinal() * 100_000
    record_property("seed", seed)
    with capsys.disabled():
        print(f"\nmake oracle ARGS='--seed {seed} --seconds {ORACLE_SECONDS}'")
    summary = Summary(seed)
    await search(oracle.databases, summary, seconds=ORACLE_SECONDS, shrink_seconds=60)
    assert not summary.counterexamples, "\n\n".join(counterexample.test for counterexample in summary.counterexamples)
    assert summary.cases > 3
    assert summary.invalid <= summary.cases // 4


@pytest.mark.parametrize("name", MUTANTS)
async def test_a_broken_framework_is_found(oracle: Oracle, name: str) -> None:
    """The whole framework passes the case; the mutant fails it as described."""
    case, kind, lines = DIRECTED[name]
    await oracle.expect_equal(case)
    with broken(name):
        verdict = await oracle.check(case)
    assert verdict.difference is not None
    assert verdict.difference.kind == kind, str(verdict.difference)
    assert [line for line in lines if line not in str(verdict.difference)] == [], str(verdict.difference)
    await oracle.expect_equal(case)


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_changes_something_and_takes_it_back(name: str) -> None:
    with broken(name) as changes:
        assert changes
        changed = [getattr(owner, attribute) for owner, attribute, _ in changes]
    for (owner, attribute, original), now in zip(changes, changed, strict=True):
        assert getattr(owner, attribute) is original
        assert now is not original


async def test_one_message_in_each_transaction_differs_in_nothing(oracle: Oracle) -> None:
    """Nor does the oracle find differences that are its own."""
    summary = Summary(1)
    await search(oracle.databases, summary, seconds=60, cases=12, shrink_seconds=0, alone=True)
    assert not summary.counterexamples, summary.counterexamples


@pytest.mark.timeout(300)
async def test_a_counterexample_is_made_small(oracle: Oracle) -> None:
    padded = replace(PAYMENTS, messages=PAYMENTS.messages[:16], batch=20, ddl=("create table unused ()",))
    with broken("rows-met-twice"):
        verdict = await oracle.check(padded)
        assert verdict.difference is not None
        small, difference = await minimal(oracle.databases, padded, verdict.difference, 120)
    assert difference.kind == "table"
    assert len(small.messages) < 12
    assert len(small.tables) == 1
    assert len(small.handlers[0].steps) == 1
    assert not small.ddl
    assert "await oracle.expect_equal(Case(" in pasted(small, difference)


@pytest.mark.parametrize(
    "arguments", [["--seconds", "0"], ["--stop-at", "0"], ["--code", "nowhere"], ["--mutant", "x"]]
)
def test_the_command_refuses_what_it_cannot_do(arguments: list[str]) -> None:
    path = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'support'}"
    result = prefork.run(["-m", "oracle", *arguments], ROOT, {**os.environ, "PYTHONPATH": path}, 60)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
