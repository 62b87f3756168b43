"""I16: secrets and the contents of messages appear only where they belong.

Real processes, at the level of most words, with everything failing that can quote what it was given. Passwords belong in the
environment alone; bytes of messages in the dead letters' bytes, and in the answer of `dlq show`; a handler's own words in the dead
letters' error, and in the answers of `dlq`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import uuid
from pathlib import Path
from typing import Any

import asyncpg
import redis.asyncio as redis
from harness import ROOT, WORKER_PASSWORD, Place, Sent, consumer, migrated, query, running_program, until, value
from services import Kafka

from consumer.local_servers import Valkey

VALUE, KEY, HEADER, ID, OWN_WORDS = (f"canary{word}" for word in ("value1a", "key2b", "header3c", "id4d", "words5e"))
REDIS_PASSWORD = "canaryredis6f"
OF_MESSAGES = {VALUE, KEY, HEADER, ID}
TABLES = """
create table effects (id text not null, account int not null, amount bigint not null);
create table people (email text primary key, age int check (age > 0));
create table children (email text references people deferrable initially deferred);
"""
DOINGS = (
    "raise", "unique", "unique deferred", "check", "foreign", "cast", "argument", "swallowed", "future", "thread",
    "finalizer", "task",
)  # fmt: skip
# Where they belong, by column.
BELONGS = {
    ("dead_letters", "key"): {KEY},
    ("dead_letters", "value"): {VALUE, OWN_WORDS},
    ("dead_letters", "header_keys"): {HEADER},
    ("dead_letters", "header_values"): {HEADER, ID},
    ("dead_letters", "error"): {OWN_WORDS},
}


def seen(text: str, secrets: set[str]) -> set[str]:
    return {secret for secret in secrets if secret in text}


async def test_canaries_stay_where_they_belong(place: Place, kafka: Kafka, valkey: Valkey, tmp_path: Path) -> None:
    topic, name = await place.topic(2), f"canary-{uuid.uuid4().hex[:8]}"
    connection = await asyncpg.connect(place.dsn)
    await connection.execute("drop table effects, accounts")
    await connection.close()
    await migrated(place.dsn, TABLES)
    user = f"user-{uuid.uuid4().hex[:8]}"
    async with redis.Redis.from_url(valkey.url) as client:
        await client.execute_command("ACL", "SETUSER", user, "on", f">{REDIS_PASSWORD}", "~*", "+@all")
    settings = place.settings(
        kafka_bootstrap_servers=kafka.sasl_servers,
        kafka_security_protocol="SASL_PLAINTEXT",
        kafka_sasl_username="carol",
        kafka_sasl_password=kafka.canary,
        redis_url=f"redis://{user}:{REDIS_PASSWORD}@127.0.0.1:{valkey.port}/0",
        wait_seconds=20,
    )
    secrets = {WORKER_PASSWORD, REDIS_PASSWORD, kafka.canary}
    everywhere = secrets | OF_MESSAGES | {OWN_WORDS}

    def message(n: int, do: str) -> Sent:
        body = {"do": do, "text": f"{VALUE}-{n}"}
        return Sent(body, id=f"{ID}-{n}", key=f"{KEY}-{n}", partition=n % 2, headers=[(HEADER, HEADER.encode())])

    sent = [message(n, do) for n, do in enumerate(DOINGS)]
    unreadable = Sent(f'{{"do": "{VALUE}'.encode(), id=f"{ID}-u", key=KEY, partition=0, headers=[(HEADER, b"x")])
    conflict = Sent({"do": "nothing", "text": VALUE}, id=f"{ID}-0", key=f"{KEY}-0", partition=0)
    await place.send(topic, *sent, unreadable, conflict)

    texts: dict[str, str] = {}
    numbers = itertools.count()
    environment = {"TEST_APP": name, "TEST_TOPIC": topic, "TEST_OWN_WORDS": OWN_WORDS}

    async def said(*arguments: str, code: int | None = 0, given: Any = settings) -> str:
        """What a command prints, on both streams."""
        number = next(numbers)
        cwd = tmp_path / str(number)
        cwd.mkdir()
        path = os.pathsep.join(map(str, [ROOT, ROOT / "tests" / "support"]))
        result = await asyncio.to_thread(consumer, cwd, *arguments, **given.dump(), **environment, PYTHONPATH=path)
        assert code is None or result.returncode == code, (arguments, result.stderr[-2000:])
        texts[f"{arguments[0]} {arguments[1].removeprefix(ID)} #{number}"] = result.stdout + result.stderr
        return result.stdout

    command = ["run", "canary_app:app", "--workers", "2"]
    async with running_program(command, settings, tmp_path / "run", **environment) as run:

        async def settled() -> bool:
            rows = await query(place.dsn, "select sum(next_offset) from consumer.positions where app = $1", name)
            return bool(rows[0][0] == len(DOINGS) + 2)

        await until("everything to be settled", settled, 60)
        pids = [run.process.pid, *run.worker_pids().values()]
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in pids]
        assert len(lines) == 3
        texts["the list of processes"] = "\n".join(lines)
        run.process.send_signal(signal.SIGTERM)
        assert await run.wait() == 0
        texts["run"] = run.errors + (run.process.stdout.read() if run.process.stdout else "")
    assert "dead letter" in texts["run"] and "an error that ended a thread" in texts["run"]
    assert "an error that could not be raised" in texts["run"] and "an error that was not awaited" in texts["run"]

    # Every answer that reports.
    for arguments in (
        ["status", "canary_app:app", "--json"],
        ["status", "canary_app:app"],
        ["show", "canary_app:app", f"{ID}-0"],
        ["positions", "canary_app:app", "--json"],
        ["replay", "canary_app:app", topic, "--json", "--report", str(tmp_path / "page.html")],
        ["replay", "canary_app:app", topic],
    ):
        await said(*arguments, code=None)
    texts["the page"] = (tmp_path / "page.html").read_text()
    id_of_a_letter = await value(place.dsn, "select dead_letter from consumer.dead_letters order by 1 limit 1")
    listed = [await said("dlq", "list", "canary_app:app", *more) for more in ([], ["--json"])]
    shown = [await said("dlq", "show", "canary_app:app", str(id_of_a_letter), *more) for more in ([], ["--json"])]

    # And what goes wrong before there is any.
    wrong = settings.model_dump() | {"wait_seconds": 0.5}
    odd_ones: list[dict[str, Any]] = [
        {"postgres_dsn": place.worker_dsn.replace(WORKER_PASSWORD, f"{WORKER_PASSWORD}x")},
        {"postgres_dsn": place.worker_dsn.replace(f":{place.dsn.rsplit(':', 1)[1].split('/')[0]}/", ":1/")},
        {"postgres_dsn": f"postgresql://u:{WORKER_PASSWORD}@{WORKER_PASSWORD}@127.0.0.1/x?sslmode=require"},
        {"postgres_dsn": f"postgresql://u:p{WORKER_PASSWORD}/x@127.0.0.1:notaport/x"},
        {"postgres_dsn": f"postgresql://u:{WORKER_PASSWORD}@elsewhere.example/x?sslmode=require"},
        {"kafka_sasl_password": f"{kafka.canary}x"},
        {"kafka_bootstrap_servers": "127.0.0.1:1"},
        {"redis_url": f"redis://{user}:{REDIS_PASSWORD}x@127.0.0.1:{valkey.port}/0"},
        {"redis_url": f"redis://{user}:{REDIS_PASSWORD}@elsewhere.example/0"},
        {"redis_url": f"redis://{user}:{REDIS_PASSWORD}@127.0.0.1:x/0?{REDIS_PASSWORD}=1"},
    ]
    starts = [said("run", "canary_app:app", code=2, given=type(settings)(**{**wrong, **odd})) for odd in odd_ones]
    await asyncio.gather(*starts)

    for what, text in texts.items():
        allowed: set[str] = set()
        if what.startswith("dlq list"):
            allowed = {OWN_WORDS}
        elif what.startswith("dlq show"):
            allowed = OF_MESSAGES | {OWN_WORDS}
        assert seen(text, everywhere) <= allowed, (
            what,
            [line for line in text.splitlines() if seen(line, everywhere - allowed)],
        )
    assert all(seen(text, {VALUE}) for text in shown) and all(
        seen(text, {OWN_WORDS}) for text in listed
    )  # it can be seen

    # Our tables, column by column.
    columns = await query(
        place.dsn,
        """select table_name, column_name from information_schema.columns where table_schema = 'consumer'
           and data_type in ('text', 'bytea', 'ARRAY', 'json', 'jsonb', 'character varying')""",
    )
    assert ("dead_letters", "value") in columns
    held = set()
    for table, column in columns:
        values = await query(place.dsn, f'select "{column}" from consumer."{table}"')
        text = " ".join(_text(row[0]) for row in values)
        assert seen(text, everywhere) <= BELONGS.get((table, column), set()), (table, column)
        held |= seen(text, everywhere)
    assert held == OF_MESSAGES | {OWN_WORDS}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
