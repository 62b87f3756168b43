"""The campaign of checks and rebuilds beside running workers.

A short one, one with a planted fault, and what its parts promise.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from consumer.local_servers import Postgres, Valkey
from verdicts_live.life import Life, Servers
from verdicts_live.verdicts import Answer, Tally


@pytest.fixture
def servers(kafka: Any, postgres: Postgres, valkey: Valkey) -> Servers:
    return Servers(kafka.bootstrap_servers, postgres.dsn, valkey.url)


@pytest.mark.timeout(600)
async def test_verdicts_beside_workers_that_are_killed_are_right(servers: Servers, tmp_path: Path) -> None:
    tally = Tally()
    async with Life(servers, 7, tmp_path) as life:
        life.producing.most = 150
        await life.begin(disturbed=False)
        for disturbance in ("kill a worker", "rewind a position", "add a partition"):
            await life.unrest.act(disturbance)
            for _ in range(2):
                tally.add(*await life.check(), "")
        tally.add(*await life.rebuild(), "")
        for answer, seen in await life.settle():
            assert answer.code == 0, answer
            tally.add(answer, seen, "")
    assert not life.unrest.failed and life.unrest.done["kill a worker"] == 1
    assert not tally.wrong and (tally.count("check"), tally.count("rebuild")) == (7, 2)


@pytest.mark.timeout(600)
async def test_a_fault_that_is_planted_beside_workers_is_noticed(servers: Servers, tmp_path: Path) -> None:
    tally = Tally()
    async with Life(servers, 8, tmp_path, faults=True) as life:
        life.producing.most = 150
        await life.begin(disturbed=False)
        await life.plant("lost effect")
        assert life.planted is not None
        for answer, seen in await life.settle():
            tally.add(answer, seen, life.planted.kind)
    assert not tally.wrong and tally.noticed == Counter(["lost effect: exit 1"])
    assert tally.codes["check", "0, fault planted"] == 1, "a check believes the ledger"


@pytest.mark.parametrize(
    ("answer", "seen", "wrong"),
    [
        (Answer("check plain", 0), None, False),
        (Answer("check plain", 1, ("missing",)), None, True),
        (Answer("check plain", 1, ("missing",), behind=True), None, False),
        (Answer("rebuild", 2, ("failed",)), None, False),
        (Answer("rebuild", 0), True, True),
        (Answer("check plain", 1, ("missing",), behind=True), True, True),
        (Answer("rebuild", 1, ("differences",)), True, False),
        (Answer("rebuild", 1, ("differences",)), False, True),
    ],
    ids=lambda answer: None if not isinstance(answer, Answer) else f"{answer.what}-{answer.code}{'-behind' if answer.behind else ''}",
)  # fmt: skip
def test_the_tally_knows_wrong_verdicts(answer: Answer, seen: bool | None, wrong: bool) -> None:
    tally = Tally()
    tally.add(answer, seen, "fault" if seen is not None else "")
    assert bool(tally.wrong) is wrong
