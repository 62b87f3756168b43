"""One life of a system, with checks and rebuilds in turn.

A database, two topics, workers, producers and disturbances. The truth comes from SQL at the end: each message that was
produced has its effects once, or is a dead letter.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from harness import as_worker, drained, migrated, new_topic, query, settings_for, until, value

from consumer.core.errors import CannotTell, Misconfigured
from consumer.replay.options import Options, Progress
from consumer.replay.rebuild_run import RebuildOptions, run_rebuild
from consumer.replay.verify import replay
from verdicts_live import planting, verdicts
from verdicts_live.application import TABLES, build
from verdicts_live.producing import Producing
from verdicts_live.unrest import Unrest, Workers

_PARTITIONS = {"orders": 3, "cancellations": 2}
# Effects that are there twice, although each handler applies an id once.
_DOUBLED = "select count(*) from (select from effects group by handler, id having count(*) > 1) d"


@dataclass(frozen=True)
class Servers:
    """Where the services are.

    A life creates its own database and topics.
    """

    kafka: str
    postgres: Callable[[str], str]  # a database's name to its address
    redis: str


class Life:
    """Use as `async with`, and call `answer` repeatedly; `settle` at the end."""

    def __init__(self, servers: Servers, seed: int, directory: Path, *, faults: bool = False) -> None:
        self.seed = seed
        self.chance = random.Random(f"{seed}:live")
        self.name = f"live-{seed}-{uuid4().hex[:6]}"
        self.planted: planting.Planted | None = None
        self._servers = servers
        self._directory = directory / self.name
        self._faults = faults
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Life:
        self._directory.mkdir(parents=True)
        servers, name = self._servers, self.name
        database = name.replace("-", "_")
        await query(servers.postgres("postgres"), f"create database {database}")
        self.dsn = servers.postgres(database)
        await migrated(self.dsn, TABLES)
        self.topics = (f"{name}-orders", f"{name}-cancellations")
        for topic, partitions in zip(self.topics, _PARTITIONS.values(), strict=True):
            await new_topic(servers.kafka, partitions, topic)
        self.settings = settings_for(
            as_worker(self.dsn), servers.kafka, servers.redis,
            kafka_session_timeout_seconds=3, kafka_heartbeat_seconds=0.3, kafka_commit_interval_seconds=0.3,
            postgres_lock_timeout_seconds=2, postgres_idle_in_transaction_timeout_seconds=4, batch_messages_max=200,
            grace_seconds=15, watchdog_seconds=60, wait_seconds=60, restarts_max=100, log_level="info",
            ledger_clock_skew_hours=0.0003,
        )  # fmt: skip
        environment = {"LIVE_APP": name, "LIVE_ORDERS": self.topics[0], "LIVE_CANCELLATIONS": self.topics[1], "LIVE_VERSION": "1"}  # fmt: skip
        self.producing = Producing(
            servers.kafka, *self.topics, random.Random(f"{self.seed}:producing"),
            dict(zip(self.topics, _PARTITIONS.values(), strict=True)),
        )  # fmt: skip
        self.workers = Workers(self.settings, self._directory, environment)
        owner = settings_for(self.dsn, servers.kafka, servers.redis, wait_seconds=30, ledger_clock_skew_hours=0.0003)
        self.unrest = Unrest(self.workers, self.producing, owner, environment, self.dsn, self._directory, random.Random(f"{self.seed}:unrest"))  # fmt: skip
        # What the ledger has dropped is unknown to a check: one life in four, so that the others have more certain verdicts. Not with
        # producers whose clocks are behind: their messages become dead letters (too_old), by design.
        if self._faults or self.chance.random() < 0.75:
            self.unrest.forbidden.add("the ledger forgets")
        else:
            self.producing.skews_ms = (0,)
            self.producing.repeats_seconds = 3  # the ledger remembers for five seconds at least (unrest.py)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.workers.end()
        with suppress(Exception):
            await query(self._servers.postgres("postgres"), f"drop database {self.name.replace('-', '_')} with (force)")
        shutil.rmtree(self._directory, ignore_errors=True)

    async def begin(self, *, disturbed: bool = True) -> None:
        """Start workers and producers, and wait for the first effects."""
        self.workers.start()
        self._tasks.append(asyncio.create_task(self.producing.run()))

        async def works() -> bool:
            return int(await value(self.dsn, "select count(*) from effects where handler = 'cancel'")) > 2

        await until("the workers to apply messages", works, 120)
        if disturbed:
            self._tasks.append(asyncio.create_task(self.unrest.run()))

    async def plant(self, kind: str | None = None) -> None:
        """Plant a fault, of a random kind by default.

        From then on nothing is delivered again that may repair it.
        """
        self.unrest.forbidden |= {"rewind a position", "replay --apply", "the ledger forgets"}
        kind = kind or self.chance.choice(planting.KINDS)
        async with self.unrest.busy:
            recent = [order[3] for order in self.producing.recent]
            self.planted = await planting.plant(kind, self.dsn, self.name, recent, self.chance)

    # -- answers ----------------------------------------------------------------------------------------------------

    async def check(self) -> tuple[verdicts.Answer, bool | None]:
        """One check, and whether it must notice what is planted.

        None: nothing is planted.
        """
        options, redis = self._draw()
        shown = ", ".join(f"{key}={_short(value)}" for key, value in options.items())
        what = f"check {shown or 'plain'}{'' if redis else ', without Redis'}"
        seen = None if self.planted is None else self.planted.seen_by(options)
        return await self._answer(what, Options(**options), redis), seen

    async def rebuild(self) -> tuple[verdicts.Answer, bool | None]:
        """One rebuild, and whether it must notice what is planted.

        None: nothing is planted.
        """
        seen = None if self.planted is None else self.planted.seen_by(None)
        return await self._answer("rebuild", RebuildOptions(), True), seen

    def _draw(self) -> tuple[dict[str, Any], bool]:
        """The options of a check, and whether it asks Redis."""
        chance, redis = self.chance, self.chance.random() < 0.6
        ago = (datetime.now(UTC) - timedelta(seconds=chance.uniform(0.5, 8))).isoformat()
        handlers = ["book", "audit", "tally"]
        kinds: list[dict[str, Any]] = [
            {},
            {"end": "position"},
            {"end": ago},
            {"start": ago, "end": "position"},
            {"partitions": (chance.randrange(2),), "end": chance.choice(["position", "latest"])},
            {"handlers": (chance.choice(handlers),), "end": "position"},
            {"call_handlers": True},
        ]
        return chance.choices(kinds, [4, 6, 3, 2, 2, 2, 1])[0], redis

    async def _answer(self, what: str, options: Options | RebuildOptions, redis: bool) -> verdicts.Answer:
        for task in self._tasks:
            if task.done():
                await task  # raises why it has ended: without producers the campaign would show nothing
        app = build(self.name, *self.topics, mended=True, version=self.unrest.version)
        settings = self.settings if redis else self.settings.model_copy(update={"redis_url": None})
        topics = self.topics[:1] if set(options.handlers) & {"book", "tally"} else self.topics
        begun = time.monotonic()
        try:
            if isinstance(options, RebuildOptions):
                findings = await run_rebuild(app, settings, topics, options, Progress())
            else:
                findings = await replay(app, settings, topics, options, Progress())
        except (CannotTell, Misconfigured) as error:
            if (current := asyncio.current_task()) is not None and current.cancelling():
                raise asyncio.CancelledError from None  # a replay that is cancelled says that it cannot tell
            return verdicts.of_error(what, error, time.monotonic() - begun)
        return verdicts.of_findings(what, findings, time.monotonic() - begun)

    # -- the end ----------------------------------------------------------------------------------------------------

    async def settle(self) -> list[tuple[verdicts.Answer, bool | None]]:
        """Let everything come to rest, and check and rebuild once more.

        Asserts the truth by SQL.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if not self.workers.running:
            self.workers.start()
        app = build(self.name, *self.topics, mended=True, version=self.unrest.version)
        await drained(app, self.settings, 180)
        if self.planted is None:
            assert await value(self.dsn, _DOUBLED) == 0, (
                "effects are doubled: the state is not right, so the campaign proves nothing"
            )
        seen = None if self.planted is None else self.planted.seen_by({})
        last = await self._answer("check at rest", Options(), True), seen
        return [last, await self.rebuild()]


def _short(option: object) -> str:
    """An option without what differs each time."""
    return "TIME" if isinstance(option, str) and option[:2] == "20" else str(option)
