"""Worker processes are killed, added, drained and given up.

Real processes, real signals.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import uuid
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.structs import TopicPartition
from harness import Command, Place, Sent, consume_all, counts, drained, new_topic, query, until, value
from worker_app import BLOCKS, DIES, HANGS, SLOW
from worker_service import Service, message

from consumer import App, Tx
from consumer.core.identity import message_id
from consumer.worker.health import Stalled
from consumer.worker.worker import Worker


async def effects_are(place: Place, expected: dict[str, tuple[int, int]]) -> None:
    """Check each effect of both handlers once, and every balance."""
    rows = await query(place.dsn, "select id, count(*) from effects group by id")
    assert {row[0] for row in rows} == {f"{name} {id}" for name in ("settle", "record") for id in expected}
    assert [row for row in rows if row[1] != 1] == []
    balances: dict[int, int] = {}
    for account, amount in expected.values():
        balances[account] = balances.get(account, 0) + amount
    stored = dict(await query(place.dsn, "select id, balance from accounts where balance <> 0"))
    assert stored == {account: balance for account, balance in balances.items() if balance}


async def test_thirty_thousand_messages_with_a_worker_killed_and_one_added(place: Place, tmp_path: Path) -> None:
    """8 partitions, 3 workers, 10 % duplicates across partitions and runs."""
    topic = await place.topic(8)
    service = Service(place, topic, tmp_path)
    chance = random.Random(30_000)
    expected = {f"p{n}": (chance.randrange(100), chance.randrange(1, 1000)) for n in range(27_000)}
    stream = [message(name, *payment, partition=payment[0] % 8) for name, payment in expected.items()]
    again = [
        message(name, *expected[name], partition=chance.randrange(8)) for name in chance.sample(sorted(expected), 3000)
    ]
    for repeated in again[:2000]:  # these in the same run, the others in another one
        stream.insert(chance.randrange(len(stream)), repeated)
    # A repetition may come before what it repeats: they are equal.

    async with service.run(3) as command:
        await service.opened(command, 8, workers=3)
        half = len(stream) // 2
        await place.send(topic, *stream[: half // 2])
        sending = asyncio.create_task(place.send(topic, *stream[half // 2 : half]))
        victim = sorted(command.worker_pids().values())[1]

        async def in_hand() -> bool:
            return any(event["event"] == "fetched" and event["pid"] == victim for event in command.events())

        await until("the victim to have read something", in_hand)
        os.kill(victim, signal.SIGKILL)
        await sending
        async with service.run(1, "another") as another:
            last = len(stream) * 3 // 4
            sending = asyncio.create_task(place.send(topic, *stream[half:last]))
            await service.opened(another, 1)
            await sending
            await place.send(topic, *stream[last:])  # to all partitions, of which the added one has some
            await service.settled()
            assert any(event["event"] == "fetched" for event in another.events())  # the added one took its part
            await service.stop(another)
        assert any(event.get("killed_by") == "SIGKILL" for event in command.events())
        await service.stop(command)
    await effects_are(place, expected)

    async with service.run(2, "second"):
        await place.send(topic, *again[2000:])
        await service.settled()
    await effects_are(place, expected)
    for handler in (await counts(service.app, place.dsn)).values():
        assert handler["applied"] == 27_000
        # At least: what was settled above a message that had to wait is delivered again to the next owner, and counted.
        assert sum(handler["duplicates"].values()) >= 3000
        assert handler["dead_lettered"] == 0


async def test_a_killed_workers_partitions_move_at_once(place: Place, tmp_path: Path) -> None:
    """The session timeout is two minutes here, and no restart helps."""
    topic = await place.topic(4)
    service = Service(place, topic, tmp_path, kafka_session_timeout_seconds=120, restarts_max=3)
    async with service.run(2) as command:
        await service.opened(command, 4, workers=2)
        victim = command.worker_pids()[0]
        os.kill(victim, signal.SIGKILL)
        await place.send(topic, *[message(f"m{n}", n, partition=n % 4) for n in range(40)])
        await service.settled(20)
        await service.stop(command)
    await effects_are(place, {f"m{n}": (n, 1) for n in range(40)})


async def group_members(servers: str, group: str) -> int:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        [response] = await admin.describe_consumer_groups([group])
        return sum(len(group[5]) for group in response.groups)
    finally:
        await admin.close()


async def test_sigterm_drains_and_leaves_the_group(place: Place, tmp_path: Path) -> None:
    topic = await place.topic(2)
    service = Service(place, topic, tmp_path, batch_messages_max=4, kafka_session_timeout_seconds=120)
    async with service.run(2) as command:
        await service.opened(command, 2, workers=2)
        await place.send(topic, *[message(f"m{n}", SLOW, partition=n % 2) for n in range(40)])

        async def some() -> bool:
            return bool(await value(place.dsn, "select count(*) from effects"))

        await until("the first effects", some)
        await service.stop(command)
        assert await group_members(place.kafka, service.name) == 0
        assert any(event["event"].startswith("stopping") for event in command.events())
    done = await value(place.dsn, "select count(*) from effects")
    assert 0 < done < 80  # it did not wait for all there was
    assert done == await value(place.dsn, "select count(*) from consumer.ledger")  # and left nothing half done
    async with service.run(2, "again") as command:
        await service.settled()
        await service.stop(command)
    assert await value(place.dsn, "select count(*) from effects") == 80


async def hanging(service: Service, command: Command) -> None:
    """A worker with a message in hand that never ends."""
    await service.opened(command, 1)
    await service.place.send(service.topic, message("m", HANGS))

    open_transactions = """select count(*) from pg_stat_activity
                           where datname = current_database() and state = 'idle in transaction'"""

    async def in_hand() -> bool:
        return bool(await value(service.place.dsn, open_transactions))

    await until("the message to be in hand", in_hand)


async def test_a_second_signal_ends_at_once(place: Place, tmp_path: Path) -> None:
    service = Service(place, await place.topic(), tmp_path, grace_seconds=600)
    async with service.run() as command:
        await hanging(service, command)
        command.process.send_signal(signal.SIGTERM)

        async def heard() -> bool:
            return any(event["event"].startswith("stopping") for event in command.events())

        await until("the first signal to be heard", heard)
        command.process.send_signal(signal.SIGINT)
        assert await command.wait() == 128 + signal.SIGINT
    assert await value(place.dsn, "select count(*) from consumer.ledger") == 0


async def test_a_drain_ends_with_its_grace_and_undoes_what_was_open(place: Place, tmp_path: Path) -> None:
    service = Service(place, await place.topic(), tmp_path, grace_seconds=1)
    async with service.run() as command:
        await hanging(service, command)
        command.process.send_signal(signal.SIGTERM)
        await command.wait()
        assert any("drain took too long" in event["event"] for event in command.events())
    assert await value(place.dsn, "select count(*) from consumer.ledger") == 0
    assert await value(place.dsn, "select next_offset from consumer.positions") == 0


async def test_restarts_that_do_not_help_end_all_workers_with_exit_code_1(place: Place, tmp_path: Path) -> None:
    topic = await place.topic(2)
    service = Service(place, topic, tmp_path, restarts_max=1)
    async with service.run(2) as command:
        await service.opened(command, 2, workers=2)
        await place.send(topic, message("good", 1, partition=0), message("bad", DIES, partition=1))
        assert await command.wait(60) == 1
        events = [event["event"] for event in command.events()]
        assert "worker ended; starting another" in events
        assert "giving up: the other workers are ended" in events
    assert await value(place.dsn, "select count(*) from consumer.ledger where id = $1", uuid_of("bad")) == 0
    for pid in command.worker_pids().values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def uuid_of(name: str) -> uuid.UUID:
    return uuid.UUID(bytes=message_id(name.encode()))


async def test_a_worker_whose_event_loop_is_blocked_is_ended(place: Place, tmp_path: Path) -> None:
    topic = await place.topic(2)
    service = Service(place, topic, tmp_path, watchdog_seconds=1, restarts_max=1)
    async with service.run() as command:
        await service.opened(command, 2)
        await place.send(topic, message("bad", BLOCKS))
        assert await command.wait(60) == 1
        assert any("sends no heartbeat" in event["event"] for event in command.events())


async def test_workers_whose_parent_was_killed_drain_and_end(place: Place, tmp_path: Path) -> None:
    service = Service(place, await place.topic(2), tmp_path)
    async with service.run(2) as command:
        await service.opened(command, 2, workers=2)
        pids = list(command.worker_pids().values())
        command.process.kill()

        async def gone() -> bool:
            return not any(Path(f"/proc/{pid}").exists() for pid in pids)

        await until("the workers to end", gone)
        assert await group_members(place.kafka, service.name) == 0


async def test_a_worker_that_is_alive_but_does_not_fetch_is_found_out(place: Place) -> None:
    """Fetching is stopped behind the worker's back, as a client's bug would."""
    topic = await place.topic()
    app = App(f"stalled-{uuid.uuid4().hex[:8]}")

    @app.handler(topic)
    async def settle(body: bytes, tx: Tx) -> None:
        await tx.execute("insert into effects values ('x', 0, 0)")

    worker = Worker(app, place.settings(watchdog_seconds=1))
    task = asyncio.create_task(worker.run())
    await place.send(topic, Sent({}, id="1"))
    await drained(app, place.settings())
    worker.source.consumer.pause(TopicPartition(topic, 0))
    await place.send(topic, Sent({}, id="2"))
    with pytest.raises(Stalled):
        await asyncio.wait_for(task, 30)
    await consume_all(app, place.settings())
    assert await value(place.dsn, "select count(*) from effects") == 2


async def test_a_topic_that_does_not_exist_yet_is_consumed_when_it_does(place: Place, tmp_path: Path) -> None:
    topic = f"later-{uuid.uuid4().hex[:8]}"
    service = Service(place, topic, tmp_path)
    async with service.run() as command:

        async def is_logged() -> bool:
            return any("does not exist yet" in event["event"] for event in command.events())

        await until("the warning", is_logged)
        await new_topic(place.kafka, 1, topic)
        await place.send(topic, message("m", 1))
        await service.settled()
        await service.stop(command)
    await effects_are(place, {"m": (1, 1)})
