"""What disturbs a live system during its checks.

Kills, pauses, rebalances, operators, and changes of topic, ledger and App. One disturbance after the other, at random.
None of them makes the state wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import asyncpg
import prefork
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from chaos.rig import Consumers
from harness import ROOT, Command

from consumer import Settings
from verdicts_live.producing import Producing

APP = "verdicts_live.application:app"
# Generations of about a second, so that each purge turns the ledger.
_SHORT = {"CONSUMER_LEDGER_GENERATION_HOURS": "0.0003", "CONSUMER_LEDGER_RETENTION_HOURS": "0.001"}


class Workers(Consumers):
    """`consumer run` of the campaign's application, several times.

    The first with two workers, later ones with one.
    """

    def start(self, application: str = APP) -> Command:
        number = len(self.running) + len(self.ended)
        directory = self._directory / f"consumer-{number}"
        directory.mkdir(parents=True)
        command = Command(
            ["run", application, "--workers", "1" if number else "2"],
            self._settings,
            directory,
            dict(self._environment),
        )
        self.running.append(command)
        return command


class Unrest:
    """A disturbing task: `run` until it is cancelled.

    done: by kind. version: of the application that checks use. failed: commands.
    """

    def __init__(
        self, workers: Workers, producing: Producing, settings: Settings, environment: dict[str, str], dsn: str, directory: Path, chance: random.Random
    ) -> None:  # fmt: skip
        self._workers = workers
        self._producing = producing
        self._settings = settings
        self.environment = environment  # the workers' too: what starts later has what is changed here
        self._dsn = dsn
        self._directory = directory
        self._chance = chance
        self.done: Counter[str] = Counter()
        self.failed: list[str] = []
        self.version = 1
        self.forbidden: set[str] = set()  # kinds that do not happen (any more)
        self.busy = asyncio.Lock()  # held by a disturbance while it happens

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._chance.uniform(0.2, 2.0))
            kinds = [kind for kind in self._KINDS if kind not in self.forbidden]
            await self.act(self._chance.choices(kinds, [self._WEIGHTS.get(kind, 4) for kind in kinds])[0])

    async def act(self, kind: str) -> None:
        """Cause one disturbance.

        What fails is kept in `failed`: a disturbance that did not happen is no evidence.
        """
        try:
            async with self.busy, asyncio.timeout(120):
                if kind not in self.forbidden and await self._KINDS[kind](self) is not False:
                    self.done[kind] += 1
        except Exception as error:
            self.failed.append(f"{kind}: {type(error).__name__}: {error}")

    # -- workers ----------------------------------------------------------------------------------------------------

    async def _kill_worker(self) -> bool | None:
        if not (pids := self._workers.pids()):
            return False
        with suppress(ProcessLookupError):
            os.kill(self._chance.choice(pids), signal.SIGKILL)
        return None

    async def _pause_worker(self) -> bool | None:
        if not (pids := self._workers.pids()):
            return False
        pid = self._chance.choice(pids)
        self._workers.paused.add(pid)
        try:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(self._chance.uniform(0.5, 5.0))
        finally:
            self._workers.paused.discard(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        return None

    async def _kill_supervisor(self) -> bool | None:
        self._workers.kill(self._chance.choice(self._workers.running))
        if not self._workers.running:
            self._workers.start()
        return None

    async def _join(self) -> bool | None:
        if len(self._workers.running) > 2:
            return False
        await self._workers.opened(self._workers.start())
        return None

    async def _leave(self) -> bool | None:
        if len(self._workers.running) < 2:
            return False
        await self._workers.stop(self._chance.choice(self._workers.running))
        return None

    # -- operators --------------------------------------------------------------------------------------------------

    async def _retry_letters(self) -> bool | None:
        return await self._command("dlq", "retry", APP, "--all", "--yes")

    async def _discard_letters(self) -> bool | None:
        numbers = [str(row[0]) for row in await self._letters("convert_from(d.key, 'utf8') like 'void-%'", 5)]
        return await self._command("dlq", "discard", APP, *numbers, "--why", "no such order", "--yes") if numbers else False  # fmt: skip

    async def _edit_letter(self) -> bool | None:
        letters = await self._letters("h.name = 'book' and d.reason in ('failed', 'unreadable')", 1)
        if not letters:
            return False
        number, key = letters[0]
        path = self._directory / f"edited-{number}.json"
        path.write_text(json.dumps({"key": key, "amount": number}))
        return await self._command("dlq", "retry", APP, str(number), "--value", str(path), "--same-id", "--yes")

    async def _letters(self, condition: str, most: int) -> list[Any]:
        connection = await asyncpg.connect(self._dsn)
        try:
            return list(
                await connection.fetch(
                    f"""select d.dead_letter, convert_from(d.key, 'utf8') from consumer.dead_letters d
                        join consumer.handlers h using (handler)
                        where d.state = 'dead' and {condition} order by random() limit $1""",
                    most,
                )
            )
        finally:
            await connection.close()

    async def _rewind(self) -> bool | None:
        topic, chance = self._producing.orders, self._chance
        partition = chance.randrange(self._producing.partitions[topic])
        connection = await asyncpg.connect(self._dsn)
        try:
            position = await connection.fetchval(
                "select next_offset from consumer.positions where (topic, partition) = ($1, $2)", topic, partition
            )
        finally:
            await connection.close()
        if not position:
            return False
        to = str(chance.randrange(position))
        return await self._command("positions", APP, "--topic", topic, "--partition", str(partition), "--move-to", to)

    async def _apply(self) -> bool | None:
        return await self._command("replay", APP, self._producing.orders, "--apply", "--until", "position")

    # -- topic, ledger and App --------------------------------------------------------------------------------------

    async def _turn(self) -> bool | None:
        """The ledger turns to a next generation, and forgets none."""
        return await self._command("purge", "--older-than", "1", "--force", **_SHORT)

    async def _forget(self) -> bool | None:
        """The ledger forgets what is older than some seconds."""
        hours = str(round(self._chance.uniform(5, 20) / 3600, 5))
        return await self._command("purge", "--older-than", hours, "--force", **_SHORT)

    async def _add_partition(self) -> bool | None:
        topic, admin = self._producing.orders, AIOKafkaAdminClient(bootstrap_servers=self._producing.servers)
        count = self._producing.partitions[topic] + len(self._producing.added)
        if count > 5:
            return False
        await admin.start()
        try:
            await admin.create_partitions({topic: NewPartitions(count + 1)})
        finally:
            await admin.close()
        self._producing.added.append(count)
        return None

    async def _add_handler(self) -> bool | None:
        """Deploy the next version, and declare its new handler's beginning.

        The new handler need not settle what was before.
        """
        if self.version == 2:
            return False
        while self._workers.running:
            await self._workers.stop(self._workers.running[0])
        self.environment["LIVE_VERSION"] = "2"
        await self._workers.opened(self._workers.start())
        await self._command("positions", APP, "--handler", "late", "--begin-here")
        self.version = 2
        return None

    async def _command(self, *arguments: str, **environment: str) -> bool | None:
        """Run a command as an operator types it.

        Of the repaired application. False where there was nothing to do.
        """
        path = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'support'}"
        own = {**self._settings.dump(), **self.environment, "LIVE_MENDED": "1", **environment, "PYTHONPATH": path}
        answer = await prefork.answer(["-m", "consumer", *arguments, "--json"], {**os.environ, **own})
        text = answer.stderr
        if "is settled" in text or "not open" in text or "no letter" in text:
            return False
        if answer.returncode not in (0, 1):
            raise RuntimeError(f"{' '.join(arguments[:2])}: exit code {answer.returncode}: {text[-400:]}")
        return None

    _KINDS: ClassVar[dict[str, Callable[[Unrest], Awaitable[bool | None]]]] = {
        "kill a worker": _kill_worker,
        "pause a worker": _pause_worker,
        "kill a supervisor": _kill_supervisor,
        "a worker joins": _join,
        "a worker leaves": _leave,
        "retry letters": _retry_letters,
        "discard letters": _discard_letters,
        "edit a letter": _edit_letter,
        "rewind a position": _rewind,
        "replay --apply": _apply,
        "the ledger turns": _turn,
        "the ledger forgets": _forget,
        "add a partition": _add_partition,
        "add a handler": _add_handler,
    }
    _WEIGHTS: ClassVar[dict[str, int]] = {
        "kill a worker": 8, "pause a worker": 6, "the ledger forgets": 1, "add a partition": 2, "add a handler": 1,
        "replay --apply": 2, "kill a supervisor": 2,
    }  # fmt: skip
