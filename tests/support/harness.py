"""What tests on real services share: producing, running workers, waiting.

Waiting is always for a condition, with a deadline that fails the test by naming what was waited for.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import prefork
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from connections import connection

from consumer import App, Settings
from consumer.admin.counts import handler_counts
from consumer.admin.dead_letters import dead_letters
from consumer.admin.partitions import partition_lags
from consumer.core.message import Partition
from consumer.kafka.consumer import KafkaConsumer
from consumer.postgres import grants, migrate
from consumer.worker.worker import Worker

ROOT = Path(__file__).resolve().parent.parent.parent

TABLES = """
create table effects (id text not null, account int not null, amount bigint not null);   -- no key: doubles must show
create table accounts (id int primary key, balance bigint not null default 0);
insert into accounts select generate_series(0, 99);
"""


def settings_for(dsn: str, kafka: str, redis_url: str | None = None, **more: Any) -> Settings:
    """Settings of a test: quick timers, and nothing from the environment."""
    quick: dict[str, Any] = {
        "kafka_bootstrap_servers": kafka,
        "postgres_dsn": dsn,
        "redis_url": redis_url,
        "kafka_session_timeout_seconds": 6,
        "kafka_heartbeat_seconds": 0.2,
        "kafka_commit_interval_seconds": 0.2,
        "wait_seconds": 10,
        "log_level": "debug",
        "log_format": "json",
    }
    return Settings(**{**quick, **more})


# The role as which everything that a test runs connects: what `consumer migrate --grants` prints is all it may do with
# our tables. Its name needs its quotes. With the test's own tables it may do what handlers may.
WORKER, WORKER_PASSWORD = "test-worker", "worker-secret-5b1e"
WORKER_RIGHTS = f"""
do $$ begin create role "{WORKER}" login password '{WORKER_PASSWORD}'; exception when duplicate_object then null; end $$;
do $$ declare each name; begin
    for each in select nspname from pg_namespace where nspname !~ '^(pg_.*|information_schema|consumer)$' loop
        execute format('grant usage, create on schema %I to "{WORKER}"', each);
        execute format('grant all on all tables in schema %I to "{WORKER}"', each);
        execute format('grant all on all sequences in schema %I to "{WORKER}"', each);
    end loop;
end $$;
alter default privileges in schema public grant all on tables to "{WORKER}";
alter default privileges in schema public grant all on sequences to "{WORKER}";
"""


def as_worker(dsn: str) -> str:
    """The same database, as the role of the workers."""
    return f"postgresql://{WORKER}:{WORKER_PASSWORD}@{dsn.rsplit('@', 1)[1]}"


async def migrated(dsn: str, tables: str = TABLES) -> None:
    """Create the tables of ledger and test, and a role for workers."""
    connection = await asyncpg.connect(dsn)
    try:
        await migrate.migrate(connection, tables)
        await connection.execute(WORKER_RIGHTS)
        await connection.execute(grants.as_sql(WORKER, grants.For.WORKER))
    finally:
        await connection.close()


async def query(dsn: str, sql: str, *args: Any) -> list[tuple[Any, ...]]:
    """Rows of a query, as tuples."""
    async with connection(dsn) as database:
        return [tuple(row) for row in await database.fetch(sql, *args)]


async def execute(dsn: str, script: str) -> None:
    """Run several statements, which take no arguments."""
    async with connection(dsn) as database:
        await database.execute(script)


async def value(dsn: str, sql: str, *args: Any) -> Any:
    """The first column of the first row."""
    return (await query(dsn, sql, *args))[0][0]


async def until(what: str, condition: Callable[[], Awaitable[Any]], seconds: float = 30) -> Any:
    """Wait until the condition is true, and return its value.

    Fails with `what` after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        begun = time.monotonic()
        value = await condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        # The longer it takes to look, the less often: what is waited for needs the CPU.
        await asyncio.sleep(max(0.05, min(2 * (time.monotonic() - begun), 0.5)))


class Sent:
    """A message to produce."""

    def __init__(
        self,
        body: object,
        id: str | bytes | UUID | None = None,
        key: str | None = None,
        partition: int | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
        timestamp: int | None = None,
    ) -> None:
        self.value = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = [] if id is None else [("message-id", id if isinstance(id, bytes) else str(id).encode())]
        self.headers = [*given, *headers]
        self.key = None if key is None else key.encode()
        self.partition = partition
        self.timestamp = timestamp


async def produce(kafka: str, topic: str, messages: Iterable[Sent]) -> None:
    """Produce and wait until all are acknowledged."""
    producer = AIOKafkaProducer(bootstrap_servers=kafka, linger_ms=5)
    await producer.start()
    try:
        futures = [
            await producer.send(
                topic,
                message.value,
                key=message.key,
                partition=message.partition,
                headers=message.headers,
                timestamp_ms=message.timestamp,
            )
            for message in messages
        ]
        await asyncio.gather(*futures)
    finally:
        await producer.stop()


@asynccontextmanager
async def working(app: App, settings: Settings, **options: Any) -> AsyncIterator[Worker]:
    """Run a worker in this process; at the end, raise its failure."""
    worker = Worker(app, settings, **options)
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        await asyncio.wait_for(task, 40)


def buffered(worker: Worker) -> tuple[int, int]:
    """Messages and bytes that wait in a worker to be taken."""
    waiting = [shard.scheduler.fetched for shard in worker.shards]
    return sum(messages for messages, _ in waiting), sum(size for _, size in waiting)


def fetched(worker: Worker) -> int:
    """How many partitions a worker reads or has paused."""
    table = worker.partitions.table
    return sum(table.may_be_read(partition) for partition in table.partitions())


async def drained(app: App, settings: Settings, seconds: float = 30, *, open_transaction: bool = False) -> None:
    """Wait until everything produced is settled, and no transaction is open.

    With `open_transaction` wait for what is before it only: what comes behind it cannot be read yet.
    """
    source = KafkaConsumer(settings, None)
    await source.start(10)
    database: Any = None
    try:

        async def no_lag() -> bool:
            nonlocal database
            if database is None or database.is_closed():
                database = await asyncpg.connect(settings.dsn, statement_cache_size=0)  # it may be a pooler
            lags, missing = await partition_lags(database, source, app)
            if missing or any(lag["lag"] != 0 for lag in lags):
                return False
            if open_transaction:
                return True
            partitions = [Partition(lag["topic"], lag["partition"]) for lag in lags]
            ends = await source.log.ends(partitions, uncommitted=True)  # an aborted transaction ends a little later
            return all(lag["end"] == ends[partition] for lag, partition in zip(lags, partitions, strict=True))

        await until("no lag", no_lag, seconds)
    finally:
        if database is not None:
            await database.close()
        await source.stop(5)


async def consume_all(app: App, settings: Settings, seconds: float = 30, **options: Any) -> None:
    """Run a worker until everything produced so far is settled."""
    async with working(app, settings, **options):
        await drained(app, settings, seconds)


async def counts(app: App, dsn: str) -> dict[str, dict[str, Any]]:
    """As `consumer status` counts."""
    async with connection(dsn) as database:
        return await handler_counts(database, app)


async def letters(dsn: str) -> list[dict[str, Any]]:
    """The dead letters, oldest first."""
    async with connection(dsn) as database:
        return (await dead_letters(database, None, None, None, None, 1000))[::-1]


class Place:
    """The services of one test: its own database and topics.

    dsn: the address for the owner of the database, for set-up and assertions. worker_dsn: the address for workers and commands.
    """

    def __init__(self, kafka: str, dsn: str, redis_url: str) -> None:
        self.kafka = kafka
        self.dsn = dsn
        self.worker_dsn = as_worker(dsn)
        self.redis_url = redis_url

    def settings(self, **more: Any) -> Settings:
        return settings_for(self.worker_dsn, self.kafka, more.pop("redis_url", self.redis_url), **more)

    async def topic(self, partitions: int = 1, **configs: str) -> str:
        return await new_topic(self.kafka, partitions, **configs)

    async def send(self, topic: str, *messages: Sent) -> None:
        await produce(self.kafka, topic, messages)

    async def effects(self) -> list[tuple[Any, ...]]:
        return await query(self.dsn, "select id, account, amount from effects order by id")

    async def reasons(self) -> list[str]:
        dead_letters = sorted(
            await letters(self.dsn), key=lambda letter: (letter["topic"], letter["partition"], letter["offset"])
        )
        return [letter["reason"] for letter in dead_letters]


# What the interpreter, typer and rich read before a command begins: it cannot be set for a fork.
AT_START = re.compile(r"PYTHON(?!PATH)|COLUMNS|LINES|TERM|NO_COLOR|FORCE_COLOR|LANG|LC_|COV_")


class Command:
    """A `consumer` command as a process, with its log lines.

    It is a fork, unless a test looks at what only a new program has: its command line and first environment.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        settings: Settings,
        cwd: Path,
        environment: Mapping[str, str] = {},
        forked: bool = True,
    ) -> None:
        clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
        self._log = cwd / "stderr.log"
        program = ["-m", "consumer", *arguments]
        every = {
            **clean,
            **settings.dump(),
            "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "support", cwd])),
            **environment,
        }
        self.process: subprocess.Popen[str] | prefork.Process
        with self._log.open("wb") as stderr:
            if forked and not any(AT_START.match(name) for name in environment):
                self.process = prefork.start(program, every, stderr, cwd=cwd)
            else:
                self.process = subprocess.Popen(
                    [sys.executable, *program],
                    cwd=cwd,
                    env=every,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                )

    def events(self) -> list[dict[str, Any]]:
        """What was logged so far, as JSON lines."""
        events = []
        for line in self._log.read_text("utf-8").splitlines():
            if line.startswith("{"):
                events.append(json.loads(line))
        return events

    def worker_pids(self) -> dict[int, int]:
        """Slot -> pid of the newest worker process in it."""
        return {event["worker"]: event["worker_pid"] for event in self.events() if "worker_pid" in event}

    @property
    def errors(self) -> str:
        return self._log.read_text("utf-8")

    async def wait(self, seconds: float = 40) -> int:
        """Its exit code."""
        await until("the command to end", self._ended, seconds)
        assert self.process.returncode is not None
        return self.process.returncode

    async def _ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        """Kill the command and its workers."""
        if self.process.poll() is None:
            for pid in self.worker_pids().values():
                try:
                    os.kill(pid, 9)
                except ProcessLookupError:
                    pass
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@asynccontextmanager
async def running(
    arguments: Sequence[str], settings: Settings, cwd: Path, **environment: str
) -> AsyncIterator[Command]:
    """Run a command, and end it at the end of the block."""
    cwd.mkdir(exist_ok=True)
    command = Command(arguments, settings, cwd, environment)
    try:
        yield command
    finally:
        command.end()


@asynccontextmanager
async def running_program(
    arguments: Sequence[str], settings: Settings, cwd: Path, **environment: str
) -> AsyncIterator[Command]:
    """Run a command that is no fork, as `running` does."""
    cwd.mkdir(exist_ok=True)
    command = Command(arguments, settings, cwd, environment, forked=False)
    try:
        yield command
    finally:
        command.end()


Result = subprocess.CompletedProcess[str]


def consumer(cwd: Path, *arguments: str, **environment: str) -> Result:
    """`consumer …` with nothing from this process's own settings."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
    every = {**clean, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "TERM": "dumb", **environment}
    if not any(AT_START.match(name) for name in environment):
        return prefork.run(["-m", "consumer", *arguments], cwd, every, 60)
    return subprocess.run(
        [sys.executable, "-m", "consumer", *arguments],
        cwd=cwd,
        env=every,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def is_one_line(result: Result, *says: str, code: int = 2) -> None:
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("consumer: ")
    assert "Traceback" not in result.stderr + result.stdout
    for expected in says:
        assert expected in lines[0]


async def new_topic(kafka: str, partitions: int = 1, name: str | None = None, **configs: str) -> str:
    """A topic of this test's own, ready to be produced to."""
    topic = name or f"t-{uuid4().hex[:12]}"
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, partitions, 1, topic_configs=configs)])

        async def led() -> bool:
            descriptions = await admin.describe_topics([topic])
            return len(descriptions[0]["partitions"]) == partitions and all(
                p["leader"] >= 0 for p in descriptions[0]["partitions"]
            )

        await until("the topic to have leaders", led)
    finally:
        await admin.close()
    return topic


async def delete_topic(kafka: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        await admin.delete_topics([topic])
    finally:
        await admin.close()
