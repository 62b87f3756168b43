"""The judge itself: short runs, directed cases, broken verdicts.

A short run finds none that is wrong, directed cases are answered exactly, and broken verdicts are caught.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import prefork
import pytest
from harness import ROOT
from services import Kafka

from consumer.local_servers import Postgres
from verdicts.directed import CAUGHT, DIRECTED
from verdicts.drawing import FAULTS, draw
from verdicts.handlers import Call, Life, Place
from verdicts.judging import judge
from verdicts.mutants import MUTANTS, broken
from verdicts.orders import possible_orders
from verdicts.servers import Servers
from verdicts.session import Summary, judge_all
from verdicts.settling import Settled

SECONDS = 10  # `make verdicts` runs longer


@pytest.fixture
async def servers(kafka: Kafka, postgres: Postgres) -> AsyncIterator[Servers]:
    async with Servers(kafka.bootstrap_servers, postgres.dsn()) as servers:
        yield servers


def test_a_seed_draws_the_same_case_every_time_and_every_kind_of_fault() -> None:
    assert repr(draw(5)) == repr(draw(5)) != repr(draw(6))
    assert {draw(seed).fault.kind for seed in range(400)} == {"none", *FAULTS}


def test_calls_of_overlapping_transactions_may_have_come_in_other_orders() -> None:
    case = dataclasses.replace(draw(5), workers=2)
    calls = [
        (Place(handler, "t", 0, offset), Call(turn, 0, 0))
        for turn, (handler, offset) in enumerate([("a", 0), ("a", 1), ("b", 0)])
    ]
    times = {place: float(place.handler == "b") for place, _ in calls}
    done = Settled(case, "", ["t"], Life(case), applied=calls, by_ledger=calls, times=times)
    orders = {tuple(call.turn for _, call in order) for order in possible_orders(done)}
    assert orders == {(0, 1, 2), (0, 2, 1), (2, 0, 1)}
    done.case = dataclasses.replace(case, workers=1, lanes=1)
    assert len(list(possible_orders(done))) == 1


@pytest.mark.timeout(300)
async def test_a_short_run_finds_no_wrong_verdict(
    servers: Servers, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Other seeds every day; the first one is printed."""
    seed = datetime.now(UTC).date().toordinal() * 100_000
    with capsys.disabled():
        print(f"\nmake verdicts ARGS='--seed {seed} --seconds {SECONDS}'")
    caplog.set_level(logging.CRITICAL, "consumer")
    summary = Summary(seed)
    await judge_all(servers, summary, seconds=SECONDS)
    assert not summary.wrong, "\n\n".join("\n".join(judged.lines()) for judged in summary.wrong)
    assert summary.cases


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", DIRECTED)
async def test_a_directed_case_gets_exactly_the_right_answers(servers: Servers, name: str) -> None:
    case, check, rebuild = DIRECTED[name]
    judged = await judge(servers, case)
    assert not judged.undecided
    assert [answer.code for answer in judged.answers] == [check, rebuild], "\n".join(judged.lines())
    assert not judged.is_wrong


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", MUTANTS)
async def test_a_broken_verdict_is_caught(servers: Servers, mutant: str) -> None:
    name, mode, code = CAUGHT[mutant]
    with broken(mutant):
        judged = await judge(servers, DIRECTED[name][0])
    assert [(answer.mode, answer.code) for answer in judged.answers if answer.wrong] == [(mode, code)], "\n".join(
        judged.lines()
    )


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--stop-at", "-1"], ["--mutant", "x"]])
def test_the_command_refuses_what_cannot_be(arguments: list[str]) -> None:
    path = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'support'}"
    result = prefork.run(["-m", "verdicts", *arguments], ROOT, {**os.environ, "PYTHONPATH": path}, 60)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
