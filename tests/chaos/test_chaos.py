"""The chaos harness itself: a short run, and every mutant caught.

A short random run, twenty-eight broken consumers, and the promises of the harness's parts.
"""

from __future__ import annotations

import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from harness import ROOT, Place, Sent, consume_all, drained, working

from chaos.__main__ import described
from chaos.directed import SCENARIOS, Stage, play_all
from chaos.mutants import MUTANTS
from chaos.rig import Rig
from chaos.run import Run
from chaos.schedule import KINDS, Ways, draw
from chaos.workload import plan
from consumer import App, Tx
from consumer.core.delivery import Delivery
from consumer.core.outcome import DUPLICATE, Cause, Dead, Outcome, Reason
from consumer.transaction.result import ended_by_handler


def test_a_schedule_is_a_function_of_its_seed() -> None:
    assert draw(7, 20) == draw(7, 20)
    assert draw(7, 20) != draw(8, 20)
    drawn: Counter[str] = Counter()
    for seed in range(200):
        faults = draw(seed, 20)
        drawn.update(fault.kind for fault in faults)
        assert {"kill worker", "commit cut after"} <= {fault.kind for fault in faults}
        for resource in KINDS:
            mine = [fault for fault in faults if fault.resource == resource]
            assert all(a.at + a.seconds <= b.at for a, b in zip(mine, mine[1:], strict=False)), "two at a time"
    assert set(drawn) == {kind for kinds in KINDS.values() for kind in kinds}


def test_workload_is_a_function_of_the_seed_and_has_its_shares() -> None:
    bursts = list(islice(plan(3, 4), 300))
    assert bursts == list(islice(plan(3, 4), 300))
    kinds = Counter(message.kind for burst in bursts for message in burst.messages)
    share = {kind: count / kinds.total() for kind, count in kinds.items()}
    assert 0.08 < share["duplicate"] < 0.12
    assert 0.005 < share["clash"] < 0.02
    assert 0.01 < share["unreadable"] + share["raises"] < 0.025
    assert 0.01 < share["null"] < 0.03
    assert {burst.ending for burst in bursts} == {"", "commit", "abort"}
    keys = Counter(message.key for burst in bursts for message in burst.messages).most_common()
    assert keys[0][1] > 10 * keys[-1][1]


def test_scenarios_exist_for_every_mutant() -> None:
    assert list(MUTANTS) == [f"M{n}" for n in range(1, 29)] == [scenario.mutant for scenario in SCENARIOS]
    assert f"catch {len(MUTANTS)} consumers" in (ROOT / "README.md").read_text()


_ALSO_WITHOUT = ("M1", "M4", "M6", "M7", "M9", "M10", "M12", *(f"M{n}" for n in (*range(14, 24), 25, 27, 28)))


@pytest.mark.timeout(900)
async def test_each_broken_consumer_is_caught_and_the_real_one_is_not(
    kafka: Any, postgres: Any, valkey: Any, tmp_path: Path
) -> None:
    def stage() -> Stage:
        return Stage(kafka.bootstrap_servers, postgres, valkey, tmp_path)

    plays = [(scenario, scenario.mutant) for scenario in SCENARIOS]
    plays += [(scenario, "") for scenario in SCENARIOS if scenario.mutant in _ALSO_WITHOUT]
    results = await play_all(stage, plays)
    wrong = []
    for (scenario, name), violations in zip(plays, results, strict=True):
        if isinstance(violations, BaseException):
            wrong.append(f"{name or 'the real consumer'} in {scenario.mutant}: {violations}")
        elif name and not scenario.caught_by & set(violations):
            wrong.append(f"{name} was not caught: {violations}")
        elif not name and violations:
            wrong.append(f"the real consumer fails the scenario of {scenario.mutant}: {violations}")
    assert not wrong, "\n".join(wrong)


async def test_position_lost_in_a_failover_is_not_taken_from_kafka(place: Place) -> None:
    """Found by the model (chaos/model.py).

    The position's row was in the lost tail, and Kafka's commit was not.
    """
    topic = await place.topic()
    app = App(f"lost-{uuid4().hex[:8]}")

    @app.handler(topic)
    async def settle(payment: dict[str, str], tx: Tx) -> None:
        tx.defer("insert into effects values ($1, 1, 1)", payment["id"])

    settings = place.settings(redis_url=None)
    await place.send(topic, *[Sent({"id": str(n)}, id=f"id-{n}") for n in range(10)])
    await consume_all(app, settings)
    back = "delete from effects; delete from consumer.ledger; delete from consumer.outcomes; delete from consumer.positions"
    connection = await asyncpg.connect(place.dsn)
    try:
        await connection.execute(
            f"{back}; update consumer.installation set nonce = gen_random_uuid()"
        )  # and another epoch
        await consume_all(app, settings)
        assert len(await place.effects()) == 10
    finally:
        await connection.close()


async def test_worker_that_opens_partitions_without_postgresql_can_be_stopped(place: Place) -> None:
    """Found by a random run.

    The worker asked for a connection again and again, got none at once, and let nothing else run.
    """
    topic = await place.topic()
    app = App(f"stops-{uuid4().hex[:8]}")

    @app.handler(topic)
    async def settle(payment: dict[str, str], tx: Tx) -> None:
        tx.defer("insert into effects values ($1, 1, 1)", payment["id"])

    settings = place.settings(redis_url=None)
    await place.send(topic, Sent({"id": "1"}, id="1"))
    async with working(app, settings) as worker:
        await drained(app, settings)
        [shard] = worker.shards
        assert shard.control is not None
        shard.control.close()
        worker.partitions.reopen(shard, shard.scheduler.partitions)
        worker.stop()
    assert len(await place.effects()) == 1


def test_duplicates_count_as_messages_for_the_dead_letter_limit() -> None:
    """Found by a random run, when it read everything again.

    Old conflicts were all that counted, and the worker stopped.
    """
    handler: Any = type("Named", (), {"name": "book"})()
    record: Any = None
    conflict, *others = [Delivery(handler, record) for _ in range(3)]
    outcomes: dict[Delivery, Outcome] = {
        conflict: Dead(Reason.ID_CONFLICT, ""),
        **dict.fromkeys(others, DUPLICATE[Cause.LEDGER]),
    }
    assert ended_by_handler([], outcomes) == {"book": (3, ["id_conflict"])}


@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore")  # the client's, of connections that it did not get to close
async def test_a_short_random_run_violates_nothing() -> None:
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    async with Rig() as rig:
        outcome = await Run(rig, seed=5, seconds=5, workers=1, ways=Ways(stages=True)).run()
    assert outcome.good, described(outcome)
