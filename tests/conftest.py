"""Real services, started once a run, and a database for each test.

The services listen on free ports.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from connections import keeping_connections
from harness import Place, execute, migrated, query
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from memory import put_temporary_files_in_memory
from services import Kafka
from shop_browser import Browser
from worker_log import WorkerLog

from consumer.local_servers import Postgres, Valkey

# Bytecode is kept even where the environment says no: each of the processes of the tests would compile every module.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

_IN_MEMORY = put_temporary_files_in_memory()

# Where SIGINT is ignored (`make test &` in a script), children would ignore it too, and tests could press no Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# A copy of a database is another one: with an epoch, and with beginnings of its own.
_AS_IF_MIGRATED_NOW = """
with installation as (update consumer.installation set made_at = now(), nonce = gen_random_uuid()),
     outbox as (update consumer.outbox_generations set opened_at = now())
update consumer.generations set opened_at = now()
"""

# Every run draws the same examples: a red test here is red for everybody.
hypothesis_settings.register_profile(
    "core",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=int(os.environ.get("CORE_EXAMPLES", "200")),
    suppress_health_check=[HealthCheck.too_slow],
)
hypothesis_settings.load_profile("core")


_LONG_FILES = [line for line in (Path(__file__).parent / "long_files.txt").read_text().splitlines() if line[0] != "#"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file without a pure test, if only those are wanted.

    Each process of a run collects all files.
    """
    if config.option.markexpr != "unit" or collection_path.suffix != ".py":
        return None
    return None if "pytest.mark.unit" in collection_path.read_text("utf-8") else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest files, if processes share the work."""
    if hasattr(config, "workerinput"):
        tests = Counter(item.path for item in items)
        places = {config.rootpath / "tests" / file: place for place, file in enumerate(_LONG_FILES)}
        items.sort(key=lambda item: (places.get(item.path, len(places)), -tests[item.path]))


def pytest_unconfigure() -> None:
    if _IN_MEMORY is not None:
        shutil.rmtree(_IN_MEMORY, ignore_errors=True)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what stays until the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _levels_of_loggers() -> Iterator[None]:
    """Restore the levels of loggers after each test."""
    loggers = [logging.getLogger(name) for name in ("", "consumer", "aiokafka", "asyncio")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    with Kafka() as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    # Processes are killed here, machines are not: without fsync the same guarantees hold, and the disk is left alone.
    # Tests connect thousands of times: a login is hashed once, not 4,096 times on both sides.
    with Postgres({"fsync": "off", "scram_iterations": "1"}) as server:
        user = urlsplit(server.dsn())
        asyncio.run(execute(server.dsn(), f"alter role {user.username} password '{user.password}'"))
        yield server


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


@pytest.fixture
def redis_url(valkey: Valkey) -> str:
    """The shared Valkey.

    Marks of one test mean nothing to another, since each database has an epoch of its own.
    """
    return valkey.url


@pytest.fixture
def own_valkey() -> Iterator[Valkey]:
    """A Valkey that the test may stop, freeze or fill."""
    with Valkey() as server:
        yield server


@asynccontextmanager
async def _database(postgres: Postgres, options: str = "") -> AsyncIterator[str]:
    """A database of one test, and its address.

    It is dropped at the end, because autovacuum visits every database of a server.
    """
    name = f"test_{uuid4().hex[:12]}"
    server = await asyncpg.connect(postgres.dsn())
    try:
        await server.execute(f"create database {name} {options}")
        async with keeping_connections(postgres.dsn(name)):
            yield postgres.dsn(name)
        await server.execute(f"drop database if exists {name} with (force)")
    finally:
        await server.close()


@pytest.fixture
async def database(postgres: Postgres) -> AsyncIterator[str]:
    """The address of an empty database."""
    async with _database(postgres) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def migrated_template(postgres: Postgres) -> str:
    """A database with the ledger and the tables of harness.TABLES.

    Returns its name.
    """

    async def create() -> None:
        server = await asyncpg.connect(postgres.dsn())
        await server.execute("create database migrated_template")
        await server.close()
        await migrated(postgres.dsn("migrated_template"))

    asyncio.run(create())
    return "migrated_template"


@pytest.fixture
async def place(kafka: Kafka, postgres: Postgres, migrated_template: str, redis_url: str) -> AsyncIterator[Place]:
    """The services, with the ledger and the tables of harness.TABLES."""
    async with _database(postgres, f"template {migrated_template} strategy file_copy") as dsn:
        await query(dsn, _AS_IF_MIGRATED_NOW)
        yield Place(kafka.bootstrap_servers, dsn, redis_url)


@pytest.fixture
def worker_log(caplog: pytest.LogCaptureFixture) -> Iterator[WorkerLog]:
    with caplog.at_level(logging.INFO, logger="consumer"):
        yield WorkerLog(caplog)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, started once a run."""
    started_browser = Browser()
    try:
        yield started_browser
    finally:
        started_browser.close()
