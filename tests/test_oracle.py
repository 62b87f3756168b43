"""The oracle finds no difference between a batch and one message at a time, and finds those that are planted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal

import pytest
from oracle.case import Case, Defer, Handler, Message, Table
from oracle.check import Verdict, check
from oracle.databases import Databases
from oracle.generate import draw

from consumer.embedded import Postgres


class Oracle:
    """What a pasted counterexample needs."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    async def check(self, case: Case) -> Verdict:
        """Run a case on both sides."""
        return await check(self._databases, case)

    async def expect_equal(self, case: Case) -> Verdict:
        """Fail when the batch leaves something else than its messages one at a time."""
        verdict = await self.check(case)
        assert not verdict.invalid, verdict.invalid
        assert not verdict.undecided
        assert verdict.found is None, str(verdict.found)
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
