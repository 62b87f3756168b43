"""Workers that freeze and return, and members that come and go.

Real processes, real signals.
"""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import prefork
import pytest
from crash_worker import app_of
from harness import ROOT, Place, Sent, drained, query, until, value, working

from consumer import App, Tx
from consumer.worker.worker import Worker

# Those between which what the zombie holds is different: nothing, a transaction, locks, an answer to come, marks and offsets to write.
STEPS = ["fetched", "begun", "claimed", "before_commit", "commit_sent", "committed", "before_offset_commit"]


class Zombie:
    """A worker process that stops itself at a step.

    It has an App and a topic of its own.
    """

    def __init__(self, place: Place, topic: str, step: str, directory: Path) -> None:
        self.step, self.topic = step, topic
        # Its session ends after 2 s, and so does a transaction that it has left open.
        self.settings = place.settings(
            kafka_session_timeout_seconds=2,
            postgres_idle_in_transaction_timeout_seconds=2,
            postgres_lock_timeout_seconds=1,
            batch_messages_max=15,
        )
        self.app = app_of(topic, f"zombie-{uuid.uuid4().hex[:8]}")
        self.log = directory / step
        clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
        with self.log.open("wb") as stderr:
            self.process = prefork.start(
                [ROOT / "tests" / "support" / "crash_worker.py", topic, self.app.name, step, "1", "stop"],
                {**clean, **self.settings.dump(), "PYTHONPATH": str(ROOT)},
                stderr,
                stdout=stderr,
            )

    async def stopped(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def messages(self, start: int) -> list[Sent]:
        payments = []
        for n in range(start, start + 40):
            name = f"{self.step}-{n}"
            payment = Sent({"id": name, "account": n % 10, "amount": 1}, id=f"{self.topic}-{n}", key=str(n % 10))
            payments += [payment, payment] if n % 4 == 0 else [payment]
        return payments

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


async def test_zombie_at_any_step_delays_its_successor_and_doubles_nothing(place: Place, tmp_path: Path) -> None:
    zombies: list[Zombie] = []
    try:
        for step in STEPS:
            topic = await place.topic()
            zombies.append(Zombie(place, topic, step, tmp_path))
            await place.send(topic, *zombies[-1].messages(0))
        for zombie in zombies:
            await until(f"the worker to stop at {zombie.step}", zombie.stopped, 60)
        async with AsyncExitStack() as successors:
            for zombie in zombies:
                await successors.enter_async_context(working(zombie.app, zombie.settings))
            # Without a limit to how long a silent transaction lives, this would wait for ever.
            await asyncio.gather(*[drained(zombie.app, zombie.settings, 60) for zombie in zombies])
            for zombie in zombies:
                assert await zombie.stopped()
                size = zombie.log.stat().st_size
                zombie.process.send_signal(signal.SIGCONT)
                await place.send(zombie.topic, *zombie.messages(40))

                async def goes_on(log: Path = zombie.log, size: int = size) -> bool:
                    return log.stat().st_size > size

                await until(f"the zombie of {zombie.step} to go on", goes_on)
            await asyncio.gather(*[drained(zombie.app, zombie.settings, 60) for zombie in zombies])
    finally:
        for zombie in zombies:
            zombie.end()
    expected = {f"{name} {step}-{n}" for name in ("settle", "record") for step in STEPS for n in range(80)}
    assert {row[0] for row in await query(place.dsn, "select distinct id from effects")} == expected
    assert await value(place.dsn, "select count(*) from effects") == len(expected)
    assert await value(place.dsn, "select sum(balance) from accounts") == 80 * len(STEPS)


class Step(msgspec.Struct):
    key: str
    n: int


def ordered(topic: str, name: str) -> App:
    app = App(name)

    @app.handler(topic)
    async def append(step: Step, tx: Tx) -> None:
        await tx.execute("insert into steps (key, n) values ($1, $2)", step.key, step.n)

    return app


@pytest.mark.timeout(600)
async def test_members_that_come_and_go_keep_every_keys_order_and_double_nothing(place: Place) -> None:
    """Members join and leave in turn while messages flow.

    Half of them leave in the middle of a batch.
    """
    await query(place.dsn, "create table steps (place bigserial, key text not null, n int not null)")
    topic = await place.topic(4)
    name = f"flap-{uuid.uuid4().hex[:8]}"
    settings = place.settings(batch_messages_max=20)
    keys, sent = 24, 0

    async def send(count: int) -> None:
        nonlocal sent
        await place.send(
            topic,
            *[Sent({"key": f"k{key}", "n": sent + n}, id=f"{key}-{sent + n}", key=f"k{key}", partition=key % 4)
              for n in range(count) for key in range(keys)],
        )  # fmt: skip
        sent += count

    async def progress(least: int) -> None:
        async def there() -> bool:
            return int(await value(place.dsn, "select count(*) from steps")) >= least

        await until("progress", there, 120)

    async with working(ordered(topic, name), settings):
        for n in range(5):
            sending = asyncio.create_task(send(40))
            opened: list[int] = []

            def note(report: Mapping[str, Any], opened: list[int] = opened) -> None:
                if report.get("opened"):
                    opened.append(report["opened"])

            other = Worker(ordered(topic, name), settings, report=note)
            task = asyncio.create_task(other.run())

            async def has_some(opened: list[int] = opened, task: asyncio.Task[None] = task) -> bool:
                if task.done():
                    task.result()
                return bool(opened)

            await until("the other one to have partitions", has_some, 120)
            await progress(n * 40 * keys + 1)
            if n % 2:
                other.stop()
                await task
            else:  # no farewell: its connections are cut, as if its process had died
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await sending
        await drained(ordered(topic, name), settings, 60)
    rows = await query(place.dsn, "select key, array_agg(n order by place) from steps group by key")
    assert len(rows) == keys
    for key, numbers in rows:
        assert numbers == list(range(sent)), key


async def test_a_member_without_partitions_takes_over(place: Place) -> None:
    topic = await place.topic()
    name = f"idle-{uuid.uuid4().hex[:8]}"
    await query(place.dsn, "create table steps (place bigserial, key text not null, n int not null)")
    settings = place.settings()
    async with AsyncExitStack() as first:
        await first.enter_async_context(working(ordered(topic, name), settings))
        await place.send(topic, Sent({"key": "a", "n": 0}, id="0"))
        await drained(ordered(topic, name), settings)
        members: list[str] = []
        async with working(
            ordered(topic, name), settings, report=lambda report: members.append(report.get("member") or "")
        ):

            async def joined() -> bool:
                return any(members)

            await until("the second to be a member", joined)
            await first.aclose()
            await place.send(topic, Sent({"key": "a", "n": 1}, id="1"))
            await drained(ordered(topic, name), settings)
    assert await query(place.dsn, "select n from steps order by place") == [(0,), (1,)]
