"""After a hard exit at any step, every effect is there once.

The steps are those of worker/worker.py.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from pathlib import Path
from typing import Any

import prefork
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from crash_worker import app_of
from harness import (
    ROOT,
    Sent,
    as_worker,
    consume_all,
    counts,
    migrated,
    new_topic,
    produce,
    query,
    settings_for,
    until,
    value,
)

from consumer import Settings

IN_THE_FLOW = [
    "fetched", "prechecked", "begun", "claimed", "handled", "before_commit", "committed", "marked",
    "before_offset_commit", "after_offset_commit",
]  # fmt: skip


def messages(start: int = 0) -> list[Sent]:
    """Forty payments, every fourth of them twice."""
    payments = []
    for n in range(start, start + 40):
        payment = Sent({"id": str(n), "account": n % 10, "amount": n}, id=f"id-{n}", key=str(n % 10))
        payments += [payment, payment] if n % 4 == 0 else [payment]
    return payments


def crashing(settings: Settings, topic: str, app: str, step: str, nth: int, log: Path) -> prefork.Process:
    clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
    with log.open("ab") as stderr:
        program = [ROOT / "tests" / "support" / "crash_worker.py", topic, app, step, str(nth)]
        environment = {**clean, **settings.dump(), "PYTHONPATH": str(ROOT)}
        return prefork.start(program, environment, stderr, stdout=stderr)


async def ended(process: prefork.Process) -> int:
    async def gone() -> bool:
        return process.poll() is not None

    try:
        await until("the worker to crash", gone)
    finally:
        process.kill()
    return process.wait()


async def is_committed(servers: str, group: str) -> bool:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        return bool(await admin.list_consumer_group_offsets(group))
    finally:
        await admin.close()


async def each_effect_is_there_once(dsn: str, up_to: int) -> None:
    rows = await query(dsn, "select id, count(*) from effects group by id")
    assert {row[0] for row in rows} == {f"{name} {n}" for name in ("settle", "record") for n in range(up_to)}
    assert [row for row in rows if row[1] != 1] == []
    assert await value(dsn, "select sum(balance) from accounts") == sum(range(up_to))


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("step", IN_THE_FLOW)
async def test_a_crash_loses_nothing_and_doubles_nothing(
    kafka: Any, database: str, redis_url: str, tmp_path: Path, step: str, nth: int
) -> None:
    await migrated(database)
    topic = await new_topic(kafka.bootstrap_servers, 2)
    settings = settings_for(
        as_worker(database), kafka.bootstrap_servers, redis_url, batch_messages_max=15, kafka_session_timeout_seconds=2
    )
    app = app_of(topic, f"crash-{uuid.uuid4().hex[:8]}")
    await produce(kafka.bootstrap_servers, topic, messages())
    process = crashing(settings, topic, app.name, step, nth, tmp_path / "log")
    if nth > 1:  # a second round of messages, so that every step comes again

        async def through() -> bool:
            return process.poll() is not None or await is_committed(kafka.bootstrap_servers, app.name)

        await until("the first round's offsets to be committed", through)
        await produce(kafka.bootstrap_servers, topic, messages(40))
    assert await ended(process) == 137
    await consume_all(app, settings)
    await each_effect_is_there_once(database, 40 * nth)
    counted = await counts(app, database)
    assert {name: handler["applied"] for name, handler in counted.items()} == {"settle": 40 * nth, "record": 40 * nth}


async def test_crash_while_partitions_are_revoked_doubles_nothing(
    kafka: Any, database: str, redis_url: str, tmp_path: Path
) -> None:
    await migrated(database)
    topic = await new_topic(kafka.bootstrap_servers, 4)
    settings = settings_for(
        as_worker(database), kafka.bootstrap_servers, redis_url, batch_messages_max=5, kafka_session_timeout_seconds=2
    )
    app = app_of(topic, f"crash-{uuid.uuid4().hex[:8]}")
    process = crashing(settings, topic, app.name, "revoked", 1, tmp_path / "log")

    async def opened() -> bool:
        return b"partitions opened" in (tmp_path / "log").read_bytes()

    await until("the first worker to have partitions", opened)
    await produce(kafka.bootstrap_servers, topic, messages())
    other = asyncio.create_task(consume_all(app, settings))  # joining takes the partitions away from the first one
    assert await ended(process) == 137
    await other
    await each_effect_is_there_once(database, 40)
