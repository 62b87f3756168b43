"""Injects the faults of a schedule and records what happened.

A fault that did not happen is recorded, too: the run then does not count.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from harness import WORKER
from proxy import OFFSET_COMMIT, PRODUCE, Cut, Label, Proxy, Way

from chaos.operators import Operators
from chaos.rig import PARTITIONS, Consumers, Rig, kill_tree, started_again
from chaos.schedule import OPERATORS, Fault

_CUTS: dict[str, Cut] = {"commit cut before": "before", "commit cut after": "after", "commit cut during": "during"}
_SECONDS_MAX = 90.0  # for a fault to happen
_COMMAND_SECONDS_MAX = 240.0  # and for an operator's command, which waits for servers that are away


@dataclass
class Fired:
    """A fault as it happened.

    When it really began, and what was seen of it. error: why it did not happen.
    """

    fault: Fault
    at: float
    seen: str = ""
    error: str = ""


class Nemesis:
    """Causes the faults: one after another on a resource, resources in parallel.

    `outcome` has what happened.
    """

    def __init__(
        self, rig: Rig, consumers: Consumers, seed: int, database: str, app: str, topic: str, operators: Operators
    ) -> None:
        self._operators = operators
        self._rig = rig
        self._consumers = consumers
        self._chance = random.Random(f"{seed}:nemesis")
        self._database = database
        self._app = app
        self._topic = topic
        self._begun = 0.0
        self.unknown_commits = 0
        self.failovers = 0
        self.outcome: list[Fired] = []

    async def run(self, faults: list[Fault]) -> None:
        """Cause all faults, however late.

        Returns when each has happened and is over.
        """
        self._begun = time.monotonic()
        resources = dict.fromkeys(fault.resource for fault in faults)
        async with asyncio.TaskGroup() as group:
            for resource in resources:
                group.create_task(self._cause_in_turn([fault for fault in faults if fault.resource == resource]))

    async def _cause_in_turn(self, faults: list[Fault]) -> None:
        for fault in faults:
            await asyncio.sleep(max(0.0, self._begun + fault.at - time.monotonic()))
            fired = Fired(fault, round(time.monotonic() - self._begun, 1))
            self.outcome.append(fired)
            try:
                async with asyncio.timeout(_COMMAND_SECONDS_MAX if fault.resource == "operators" else _SECONDS_MAX):
                    fired.seen = await self._KINDS[fault.kind](self, fault)
            except Exception as error:
                fired.error = f"{type(error).__name__}: {error}"

    # -- workers ----------------------------------------------------------------------------------------------------

    async def _one_pid(self) -> int:
        while not (pids := self._consumers.pids()):
            await asyncio.sleep(0.05)
        return self._chance.choice(pids)

    async def _signal_one(self, number: signal.Signals) -> int:
        while True:
            pid = await self._one_pid()
            with suppress(ProcessLookupError):  # it has ended by itself a moment ago
                os.kill(pid, number)
                return pid

    async def _kill_worker(self, fault: Fault) -> str:
        return f"pid {await self._signal_one(signal.SIGKILL)}"

    async def _pause_worker(self, fault: Fault) -> str:
        pid = await self._signal_one(signal.SIGSTOP)
        self._consumers.paused.add(pid)
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            self._consumers.paused.discard(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        return f"pid {pid} for {fault.seconds:g} s"

    async def _kill_supervisor(self, fault: Fault) -> str:
        command = self._chance.choice(self._consumers.running)
        again = self._consumers.application(command)
        self._consumers.kill(command)
        await asyncio.sleep(fault.seconds)
        self._consumers.start(again)
        return f"pid {command.process.pid}"

    async def _leave_and_join(self, fault: Fault) -> str:
        command = self._chance.choice(self._consumers.running)
        again = self._consumers.application(command)
        code = await self._consumers.stop(command)
        await asyncio.sleep(fault.seconds)
        self._consumers.start(again)
        return f"exit code {code}"

    async def _join_and_leave(self, fault: Fault) -> str:
        command = self._consumers.start()
        await self._consumers.opened(command)
        await asyncio.sleep(fault.seconds)
        return f"exit code {await self._consumers.stop(command)}"

    async def _rewind(self, fault: Fault) -> str:
        """Rewind the group's offsets with a tool like Kafka's own.

        The tool requires an empty group, so it has no effect; that is what the fault shows.
        """
        again = [self._consumers.application(command) for command in self._consumers.running]
        for command in list(self._consumers.running):
            await self._consumers.stop(command)
        servers = self._rig.bootstrap_servers
        while True:
            client = AIOKafkaConsumer(bootstrap_servers=servers, group_id=self._app, enable_auto_commit=False)
            try:
                async with asyncio.timeout(8):
                    await client.start()
                    wanted = [TopicPartition(self._topic, n) for n in range(PARTITIONS)]
                    client.assign(wanted)
                    before = [await client.committed(partition) or 0 for partition in wanted]
                    await client.commit(
                        dict(zip(wanted, [offset // (1 + fault.size) for offset in before], strict=True))
                    )
                break
            except Exception:
                await asyncio.sleep(0.3)
            finally:
                with suppress(Exception):
                    await asyncio.wait_for(client.stop(), 3)
        for application in again:
            self._consumers.start(application)
        return f"from {before} to 1/{1 + fault.size}"

    # -- postgresql -------------------------------------------------------------------------------------------------

    async def _cut_commits(self, fault: Fault) -> str:
        proxy, cut = self._rig.postgres_proxy, _CUTS[fault.kind]
        before = proxy.fired["commit", cut]
        proxy.on("commit", cut, times=fault.size)
        while proxy.fired["commit", cut] < before + fault.size:
            await asyncio.sleep(0.02)
        self.unknown_commits += fault.size
        return f"{fault.size} cut"

    async def _end_backends(self, fault: Fault) -> str:
        while True:
            connection = await self._to_primary()
            try:
                ended = await connection.fetchval(
                    """select count(*) from (select pg_terminate_backend(pid) from pg_stat_activity
                       where usename = $1 and datname = $2 limit $3) as ended""",
                    WORKER,
                    self._database,
                    2 * fault.size,
                )
            finally:
                await connection.close()
            if ended:
                return f"{ended} ended"
            await asyncio.sleep(0.05)

    async def _to_primary(self) -> asyncpg.Connection:
        while True:
            try:
                return await asyncpg.connect(self._rig.primary.dsn(self._database), timeout=5)
            except (OSError, TimeoutError, asyncpg.PostgresError):
                await asyncio.sleep(0.1)

    async def _kill_postgres(self, fault: Fault) -> str:
        kill_tree(self._rig.primary)
        await asyncio.sleep(fault.seconds)
        await started_again(self._rig.primary)
        return f"away for {fault.seconds:g} s and its recovery"

    async def _fail_over(self, fault: Fault) -> str:
        """Cut off the standby, let the primary go on, then kill it.

        What the primary did alone is lost.
        """
        self._rig.replication.black_hole()
        done, at_cut = await self._done()
        until = time.monotonic() + fault.seconds
        while (now := (await self._done())[0]) <= done or time.monotonic() < until:
            await asyncio.sleep(0.05)
        kill_tree(self._rig.primary)
        self.failovers += 1
        self._rig.postgres_proxy.reset()
        await self._rig.promote()
        self._rig.postgres_proxy.reset()
        return f"at least {now - done} positions' worth of work lost after {at_cut}"

    async def _done(self) -> tuple[int, str]:
        connection = await self._to_primary()
        try:
            [(done, position)] = await connection.fetch(
                """select coalesce(sum(next_offset), 0)::bigint, pg_current_wal_lsn()::text
                   from consumer.positions where app = $1""",
                self._app,
            )
            return done, position
        finally:
            await connection.close()

    # -- operators --------------------------------------------------------------------------------------------------

    async def _operate(self, fault: Fault) -> str:
        connection = await self._to_primary()
        try:
            return await self._operators.act(fault, connection)
        finally:
            connection.terminate()

    # -- proxies ----------------------------------------------------------------------------------------------------

    def _proxy(self, fault: Fault) -> Proxy:
        return {
            "postgres": self._rig.postgres_proxy,
            "kafka": self._rig.kafka_proxy,
            "redis": self._rig.redis_proxy,
        }[fault.resource]

    async def _reset(self, fault: Fault) -> str:
        proxy = self._proxy(fault)
        while not (count := proxy.connections):
            await asyncio.sleep(0.02)
        proxy.reset()
        return f"{count} connections"

    async def _silence(self, fault: Fault) -> str:
        proxy = self._proxy(fault)
        ways: list[Way] = ["both", "up", "down"]
        way = self._chance.choice(ways)
        proxy.black_hole(way)
        await asyncio.sleep(fault.seconds)
        proxy.heal()
        return f"{way}, {fault.seconds:g} s"

    async def _slow(self, fault: Fault) -> str:
        proxy = self._proxy(fault)
        proxy.latency_seconds = 0.02 * fault.size
        await asyncio.sleep(fault.seconds)
        proxy.heal()
        return f"{20 * fault.size} ms a piece, {fault.seconds:g} s"

    # -- kafka and redis --------------------------------------------------------------------------------------------

    async def _kill_kafka(self, fault: Fault) -> str:
        self._rig.kafka.kill()
        await asyncio.sleep(fault.seconds)
        await started_again(self._rig.kafka)
        return f"away for {fault.seconds:g} s and its start"

    async def _cut_offset_commits(self, fault: Fault) -> str:
        return await self._cut_answers(OFFSET_COMMIT, fault.size)

    async def _cut_acknowledgements(self, fault: Fault) -> str:
        """Cut answers to produce requests.

        Kafka has the records, and neither the relays nor the producer of the run know it.
        """
        return await self._cut_answers(PRODUCE, 3 * fault.size)

    async def _cut_answers(self, request: Label, times: int) -> str:
        proxy = self._rig.kafka_proxy
        before = proxy.fired[request, "after"]
        proxy.on(request, "after", times=times)
        while proxy.fired[request, "after"] < before + times:
            await asyncio.sleep(0.02)
        return f"{times} cut"

    async def _turn_the_outbox(self, fault: Fault) -> str:
        """Open another generation, and drop published ones, under load."""
        seen: list[str] = []
        while seen[-1:] != ["dropped"] and len(seen) < 40:
            connection = await self._to_primary()
            try:
                with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    async with asyncio.timeout(10):
                        seen.append(await connection.fetchval("select consumer.turn_outbox(0, 1)"))
                        seen.append(await connection.fetchval("select consumer.drop_outbox(0)"))
            finally:
                connection.terminate()
            await asyncio.sleep(0.1)
        return ", ".join(f"{seen.count(what)} {what}" for what in dict.fromkeys(seen))

    async def _empty_redis(self, fault: Fault) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._rig.valkey.port)
        try:
            writer.write(b"DBSIZE\r\nFLUSHALL\r\n")
            keys = await asyncio.wait_for(reader.readline(), 5)
            answer = await asyncio.wait_for(reader.readline(), 5)
        finally:
            writer.close()
        assert answer.startswith(b"+OK"), answer
        return f"{int(keys[1:])} keys"

    async def _kill_redis(self, fault: Fault) -> str:
        self._rig.valkey.kill()
        await asyncio.sleep(fault.seconds)
        await started_again(self._rig.valkey)
        return f"away for {fault.seconds:g} s"

    async def _freeze_redis(self, fault: Fault) -> str:
        os.kill(self._rig.valkey.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            os.kill(self._rig.valkey.pid, signal.SIGCONT)
        return f"{fault.seconds:g} s"

    _KINDS: ClassVar[dict[str, Callable[[Nemesis, Fault], Awaitable[str]]]] = {
        "kill worker": _kill_worker,
        "pause worker": _pause_worker,
        "kill supervisor": _kill_supervisor,
        "leave and join": _leave_and_join,
        "join and leave": _join_and_leave,
        "rewind the group's offsets": _rewind,
        "commit cut before": _cut_commits,
        "commit cut after": _cut_commits,
        "commit cut during": _cut_commits,
        "end backends": _end_backends,
        "reset postgres": _reset,
        "silence postgres": _silence,
        "slow postgres": _slow,
        "kill postgres": _kill_postgres,
        "fail over": _fail_over,
        "kill kafka": _kill_kafka,
        "reset kafka": _reset,
        "silence kafka": _silence,
        "slow kafka": _slow,
        "cut offset commits": _cut_offset_commits,
        "empty redis": _empty_redis,
        "kill redis": _kill_redis,
        "freeze redis": _freeze_redis,
        "silence redis": _silence,
        "cut acknowledgements": _cut_acknowledgements,
        "turn the outbox": _turn_the_outbox,
        **dict.fromkeys(OPERATORS, _operate),
    }
