"""One App over two PostgreSQL servers: each effect once.

A route that changes is refused.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import prefork
import pytest
from harness import (
    ROOT,
    TABLES,
    Result,
    Sent,
    as_worker,
    consumer,
    counts,
    is_one_line,
    migrated,
    new_topic,
    produce,
    query,
    running,
    settings_for,
    until,
    value,
)
from services import Kafka
from shard_app import MOVES, NAMES, app_of, by_crc

from consumer import App, Misconfigured, RegistrationError, Settings
from consumer.core.shard_route import RouteFault
from consumer.local_servers import Postgres
from consumer.schemes import insert_once
from consumer.worker.worker import Worker

PAID = TABLES + "create table paid (n bigint generated always as identity, id text not null, amount int not null);"
KEYS = [f"account-{n}" for n in range(40)]


@pytest.fixture(scope="module")
def west() -> Iterator[Postgres]:
    """A second server, which tests stop and start."""
    with Postgres({"fsync": "off"}) as server:
        yield server


class Shards:
    """Two databases on two servers, with a topic and an App name."""

    def __init__(self, kafka: str, east: str, west: str, topic: str) -> None:
        self.kafka, self.dsns, self.topic = kafka, {"east": east, "west": west}, topic
        self.name = f"shards-{uuid4().hex[:8]}"

    def app(self, route: str = "by_crc", **swapped: str) -> App:
        dsns = {name: as_worker(dsn) for name, dsn in self.dsns.items()} | swapped
        return app_of(self.name, self.topic, route, dsns["east"], dsns["west"])

    def settings(self, **more: Any) -> Settings:
        return settings_for("", self.kafka, None, **more)

    def environment(self, route: str = "by_crc") -> dict[str, str]:
        dsns = {f"TEST_{name.upper()}": as_worker(dsn) for name, dsn in self.dsns.items()}
        return dsns | {"TEST_APP": self.name, "TEST_TOPIC": self.topic, "TEST_ROUTE": route}

    def command(self, cwd: Path, *arguments: str, route: str = "by_crc", **more: str) -> Result:
        clean = {name: text for name, text in self.settings().dump().items() if text and "POSTGRES_DSN" not in name}
        path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")])}
        return consumer(cwd, *arguments, **{**clean, **self.environment(route), **path, **more})

    async def send(self, *messages: Sent) -> None:
        await produce(self.kafka, self.topic, messages)

    async def paid(self, shard: str) -> list[tuple[str, int]]:
        """Ids and amounts, in the order in which they were applied."""
        return [(row[0], row[1]) for row in await query(self.dsns[shard], "select id, amount from paid order by n")]

    async def all_paid(self) -> list[str]:
        return sorted([payment[0] for name in NAMES for payment in await self.paid(name)])


async def another_database(server: Postgres) -> str:
    name = f"shard_{uuid4().hex[:12]}"
    connection = await asyncpg.connect(server.dsn())
    try:
        await connection.execute(f"create database {name}")
    finally:
        await connection.close()
    await migrated(server.dsn(name), PAID)
    return server.dsn(name)


@pytest.fixture
async def shards(kafka: Kafka, postgres: Postgres, west: Postgres) -> AsyncIterator[Shards]:
    east_dsn, west_dsn = await another_database(postgres), await another_database(west)
    # Another application was here before: handlers and topics have other numbers than in the other shard.
    await query(west_dsn, "insert into consumer.handlers (app, name) values ('other', 'x'), ('other', 'settle')")
    await query(west_dsn, "insert into consumer.topics (name) values ('other')")
    topic = await new_topic(kafka.bootstrap_servers, 3)
    yield Shards(kafka.bootstrap_servers, east_dsn, west_dsn, topic)


def payment(key: str | None, n: int, id: str | None = None) -> Sent:
    id = id or f"{key}/{n}"
    return Sent({"id": id, "amount": n}, id=id, key=key)


class Working:
    """A worker in this process, and how it ended."""

    def __init__(self, app: App, settings: Settings) -> None:
        self.worker = Worker(app, settings)

    async def __aenter__(self) -> asyncio.Task[None]:
        self.task = asyncio.create_task(self.worker.run())
        return self.task

    async def __aexit__(self, *_: object) -> None:
        self.worker.stop()
        await asyncio.wait([self.task], timeout=40)
        assert self.task.done()


async def expect(shards: Shards, messages: list[Sent]) -> None:
    """Check each message once, in its shard and its key's order."""
    wanted: dict[str, dict[str, list[int]]] = {name: {} for name in NAMES}
    for message in messages:
        body = json.loads(message.value or b"")
        key, n = body["id"].split("/")
        numbers = wanted[by_crc(key.encode())].setdefault(key, [])
        if n not in map(str, numbers):
            numbers.append(int(n))
    for name in NAMES:
        paid: dict[str, list[int]] = {}
        for id, n in await shards.paid(name):
            paid.setdefault(id.split("/")[0], []).append(n)
        assert paid == wanted[name]
        by_handler = await counts(shards.app(), shards.dsns[name])
        once_each = sum(map(len, wanted[name].values()))
        assert {handler: by_handler[handler]["applied"] for handler in by_handler} == {
            "settle": once_each,
            "record": once_each,
        }
        recorded = await query(shards.dsns[name], "select id from effects")
        assert len(recorded) == sum(map(len, wanted[name].values())) == len(set(recorded))


async def settled(shards: Shards, count: int, *names: str) -> None:
    async def all_there() -> bool:
        return sum([len(await shards.paid(name)) for name in names or NAMES]) >= count

    await until(f"{count} payments in {names or NAMES}", all_there, 60)


async def test_workers_killed_between_commits_of_two_servers_double_nothing(shards: Shards, tmp_path: Path) -> None:
    stream = [payment(key, n) for n in range(25) for key in KEYS]
    stream += stream[100:200]  # produced again, with the same keys
    await shards.send(*stream)
    settings = shards.settings(batch_messages_max=100)
    environment = {
        **{name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")},
        **{name: text for name, text in settings.dump().items() if text},
        **shards.environment(),
        "PYTHONPATH": str(ROOT),
    }
    partial = []

    async def some_paid() -> list[int] | None:
        paid = [len(await shards.paid(name)) for name in NAMES]
        return paid if any(paid) else None

    for step, nth in (("before_commit", 2), ("before_commit", 3), ("committed", 4)):
        # First dead after one COMMIT was sent, and before the next: that of the other shard, or the second of the same one.
        with (tmp_path / "log").open("ab") as log:
            program = [ROOT / "tests" / "support" / "shard_app.py", step, str(nth)]
            worker = prefork.start(program, environment, log, stdout=log)
        assert await asyncio.to_thread(worker.wait, 60) == -signal.SIGKILL
        partial.append(await until("a COMMIT that was sent", some_paid))
    assert 0 in partial[0]  # one shard has committed, the other one not yet
    async with running(
        ["run", "shard_app:app", "-w", "2"], settings.at(""), tmp_path / "run", **shards.environment()
    ) as command:
        await settled(shards, len(KEYS) * 25)
        command.process.terminate()
        assert await command.wait() == 0
    await expect(shards, stream)

    status = shards.command(tmp_path, "status", "shard_app:app", "--json")
    by_shard = json.loads(status.stdout)["shards"]
    assert {name: by_shard[name]["handlers"]["settle"]["applied"] for name in NAMES} == {
        name: len(await shards.paid(name)) for name in NAMES
    }
    known = shards.command(tmp_path, "show", "shard_app:app", stream[0].headers[0][1].decode(), "--json")
    states = [answer["handlers"] for answer in json.loads(known.stdout)["shards"].values()]
    assert sorted(map(len, states)) == [0, 2] and known.returncode == 0


async def test_while_one_server_is_down_the_other_ones_messages_go_on(shards: Shards, west: Postgres) -> None:
    """Far more of them than the buffer holds, and over a rebalance."""
    stream = [payment(key, n) for n in range(30) for key in KEYS]
    east = sum(by_crc(key.encode()) == "east" for key in KEYS)
    settings = shards.settings(buffer_messages_max=80, batch_messages_max=20, kafka_partition_fetch_bytes_max=2000)
    async with Working(shards.app(), settings) as first:
        await shards.send(*stream[: 10 * len(KEYS)])
        await settled(shards, 10 * len(KEYS))
        west.kill()
        try:
            await shards.send(*stream[10 * len(KEYS) :])
            await settled(shards, 30 * east, "east")
            async with Working(shards.app(), settings) as second:  # it waits for the server, and delays no other shard
                await asyncio.sleep(0)
                west.run()
                west.wait()
                await settled(shards, 30 * len(KEYS))
                assert not first.done() and not second.done()
        finally:
            if west.process is not None and west.process.poll() is not None:
                west.run()
                west.wait()
    await expect(shards, stream)


async def test_one_shard_is_paused_and_the_other_ones_messages_go_on(shards: Shards, tmp_path: Path) -> None:
    """The log is read again for the shard that was paused."""
    settings = shards.settings(buffer_messages_max=80, batch_messages_max=20, kafka_partition_fetch_bytes_max=2000)
    working = Working(shards.app(), settings)
    async with working:
        stream = [payment(key, n) for n in range(8) for key in KEYS]
        await shards.send(*stream[: len(KEYS)])
        await settled(shards, len(KEYS))
        paused = await asyncio.to_thread(shards.command, tmp_path, "pause", "shard_app:app", "--shard", "west", "--why", "x")  # fmt: skip
        assert paused.returncode == 0, paused.stderr
        [_, west_shard] = working.worker.shards

        async def obeyed() -> bool:
            return len(west_shard.paused) == 3

        await until("the worker to obey", obeyed)
        before = await shards.paid("west")
        await shards.send(*stream[len(KEYS) :])
        await settled(shards, 8 * sum(by_crc(key.encode()) == "east" for key in KEYS), "east")
        assert await shards.paid("west") == before
        resumed = await asyncio.to_thread(shards.command, tmp_path, "resume", "shard_app:app", "--why", "x")
        assert resumed.returncode == 0, resumed.stderr
        await settled(shards, len(stream))
    await expect(shards, stream)


async def test_a_route_that_has_changed_is_refused_at_start(shards: Shards, west: Postgres, tmp_path: Path) -> None:
    async with Working(shards.app(), shards.settings()):
        await shards.send(*(payment(key, 0) for key in KEYS))
        await settled(shards, len(KEYS))
    before = await shards.all_paid()
    for route in ("the_other_way", "by_hash"):
        refused = shards.command(tmp_path, "run", "shard_app:app", route=route)
        is_one_line(refused, "the route of App", "has changed", "consumer migrate APP --new-route")
    swapped = {"TEST_EAST": as_worker(shards.dsns["west"]), "TEST_WEST": as_worker(shards.dsns["east"])}
    is_one_line(shards.command(tmp_path, "run", "shard_app:app", **swapped), "it is shard 'west'", "swap them back")
    same = {"TEST_WEST": as_worker(shards.dsns["east"])}
    is_one_line(shards.command(tmp_path, "run", "shard_app:app", **same), "'east' and 'west'", "one database")
    is_one_line(shards.command(tmp_path, "run", "shard_app:app", TEST_EAST=""), "shard 'east'", "TEST_EAST is not set")
    alone = App(shards.name)
    alone.handler(shards.topic)(shards.app().handlers["settle"].function)
    with pytest.raises(Misconfigured, match="is shard 'east' of App"):
        await Worker(alone, settings_for(as_worker(shards.dsns["east"]), shards.kafka)).run()
    north = await another_database(west)
    three = App(
        shards.name,
        shards={name: as_worker(dsn) for name, dsn in [*shards.dsns.items(), ("north", north)]},
        route=by_crc,
    )
    three.handler(shards.topic)(shards.app().handlers["settle"].function)
    with pytest.raises(Misconfigured, match="has the shards east, north, west, and had east, west"):
        await Worker(three, shards.settings()).run()
    assert await shards.all_paid() == before

    declared = shards.command(
        tmp_path,
        *("migrate", "shard_app:app", "--new-route"),
        route="the_other_way",
        **{f"TEST_{name.upper()}": dsn for name, dsn in shards.dsns.items()},
    )
    assert declared.returncode == 0, declared.stderr
    assert "shard east:" in declared.stdout
    async with Working(shards.app("the_other_way"), shards.settings()):
        await shards.send(payment("new", 0))
        await settled(shards, len(KEYS) + 1)


async def test_key_that_moved_to_another_shard_is_caught_before_it_is_applied(shards: Shards, tmp_path: Path) -> None:
    """No probe knows the key: asking the other shard finds it."""
    async with Working(shards.app(), shards.settings()):
        await shards.send(payment(MOVES, 0), *(payment(key, 0) for key in KEYS))
        await settled(shards, len(KEYS) + 1)
    before = await shards.all_paid()
    for dsn in shards.dsns.values():
        await query(dsn, "delete from consumer.route_probes where key = $1", MOVES.encode())
    for partition in range(3):
        move = ["--topic", shards.topic, "--partition", str(partition), "--move-to", "earliest"]
        moved = shards.command(tmp_path, "positions", "shard_app:app", *move)
        assert moved.returncode == 0 and moved.stdout.count("moved from") == 2, moved.stderr
    with pytest.raises(RouteFault, match=r"bytes.* stands in shard .*settle|bytes.* stands in shard .*record"):
        await asyncio.wait_for(Worker(shards.app("one_key_moved"), shards.settings()).run(), 40)
    assert await shards.all_paid() == before
    for dsn in shards.dsns.values():  # what the wrong route answered does not speak against the old one
        assert await value(dsn, "select count(*) from consumer.route_probes where key = $1", MOVES.encode()) == 0
    async with Working(shards.app(), shards.settings()):  # the old route put back: everything is known, and goes on
        await shards.send(payment(MOVES, 1))
        await settled(shards, len(before) + 1)


@pytest.mark.parametrize(
    ("route", "says"),
    [("by_chance", "answered"), ("raises", "raises ValueError"), ("unknown", "answers a str")],
)
async def test_unreliable_route_stops_the_worker_and_loses_nothing(shards: Shards, route: str, says: str) -> None:
    await shards.send(payment(KEYS[0], 0))
    for n in range(30):  # by chance it may answer alike a few times
        await shards.send(payment("trap", n))
    with pytest.raises(RouteFault, match=says):
        await asyncio.wait_for(Worker(shards.app(route), shards.settings()).run(), 40)
    early = {id for id in await shards.all_paid() if id.startswith("trap")}
    assert route == "by_chance" or not early
    async with Working(shards.app(), shards.settings()):
        await settled(shards, 31)
    assert len(await shards.all_paid()) == 31


async def test_the_limit_one_id_under_keys_of_two_shards_is_applied_in_both(shards: Shards) -> None:
    """No transaction spans two databases: the key must carry the shard."""
    here, there = (next(key for key in KEYS if by_crc(key.encode()) == name) for name in NAMES)
    async with Working(shards.app(), shards.settings()):
        await shards.send(
            payment(here, 0, id="one-tap"), payment(here, 0, id="one-tap"), payment(there, 0, id="one-tap")
        )
        await settled(shards, 2)
    assert await shards.all_paid() == ["one-tap", "one-tap"]
    new = []
    for dsn in shards.dsns.values():
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute("create table invoices (number text primary key)")
            new += [await insert_once(connection, "invoices", {"number": "A7"}, "number") for _ in range(2)]
        finally:
            await connection.close()
    assert new == [True, False, True, False]  # unique in its own database only


def test_shards_that_cannot_work_are_refused_where_they_are_written(tmp_path: Path) -> None:
    two = {"east": "env:EAST", "west": "env:WEST"}
    for given, says in [
        ({"shards": two}, "go together"),
        ({"route": by_crc}, "go together"),
        ({"shards": {"east": "env:EAST"}, "route": by_crc}, "at least two"),
        ({"shards": ["east", "west"], "route": by_crc}, "a mapping"),
        ({"shards": {"east": "env:EAST", "we st": "x"}, "route": by_crc}, "cannot name a shard"),
        ({"shards": {"east": "env:", "west": "x"}, "route": by_crc}, "no address for 'east'"),
        ({"shards": two, "route": "by_crc"}, "plain function"),
    ]:
        with pytest.raises(RegistrationError, match=says):
            App("billing", **given)  # type: ignore[arg-type]


async def test_commands_name_the_shard_or_say_what_to_do(shards: Shards, tmp_path: Path) -> None:
    path = "shard_app:app"
    is_one_line(shards.command(tmp_path, "status", path, "--shard", "north"), "it has: east, west")
    is_one_line(shards.command(tmp_path, "dlq", "show", path, "1"), "--shard NAME")
    is_one_line(shards.command(tmp_path, "show", "app", "x", "--shard", "east"), "module:attribute")
    is_one_line(shards.command(tmp_path, "replay", path, shards.topic), "has shards", "consumer positions")
    is_one_line(shards.command(tmp_path, "migrate", "--new-route"), "goes with APP")
    listed = shards.command(tmp_path, "dlq", "list", path, "--json")
    assert json.loads(listed.stdout) == {"shards": {"east": [], "west": []}, "failed": {}}
    owners = {f"TEST_{name.upper()}": dsn for name, dsn in shards.dsns.items()}
    checked = shards.command(tmp_path, "migrate", path, "--check", **owners)
    assert checked.returncode == 0 and checked.stdout.count("up to date") == 2
    one = shards.command(
        tmp_path,
        "migrate",
        path,
        "--check",
        **{**owners, "TEST_WEST": "postgresql://127.0.0.1:1/x"},
        CONSUMER_WAIT_SECONDS="0",
    )
    assert one.returncode == 2 and "shard west:" in one.stderr and "done: east" in one.stderr
    assert await value(shards.dsns["east"], "select count(*) from consumer.shards") == 0


async def test_commands_print_the_other_shards_answers_when_one_is_away(shards: Shards, tmp_path: Path) -> None:
    path = "shard_app:app"
    away = {"TEST_WEST": "postgresql://127.0.0.1:1/x", "CONSUMER_WAIT_SECONDS": "1"}
    for arguments in (["status", path], ["dlq", "list", path], ["show", path, "x"]):
        half = shards.command(tmp_path, *arguments, "--json", **away)
        is_one_line(half, "shard west:", "done: east")
        answer = json.loads(half.stdout)
        assert set(answer["shards"]) == {"east"} and set(answer["failed"]) == {"west"}
    is_one_line(shards.command(tmp_path, "dlq", "list", path, "--group", "0123456789"), "--group")
