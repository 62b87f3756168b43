"""The servers of the chaos runs, a proxy before each, and workers.

Kafka names only the proxy's port to its clients, so none of their traffic bypasses it. PostgreSQL has a standby that is
fed through a proxy of its own, so that its tail can be lost. nemesis.py decides about faults.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import asyncpg
from harness import WORKER, WORKER_PASSWORD, Command, as_worker, migrated, settings_for, until
from pair import Standby
from pooler import Pooler
from proxy import Proxy
from services import Kafka

from chaos.application import TABLES
from consumer import Settings
from consumer.local_servers import EmbeddedUnavailable, LocalServer, Postgres, Valkey, free_port

PARTITIONS = 4
_MORE_OF_KAFKA = "transaction.abort.timed.out.transaction.cleanup.interval.ms=500\n"


class ProxiedKafka(Kafka):
    """Kafka that tells its clients the proxy's port."""

    def prepare(self) -> None:
        super().prepare()
        self.advertised = free_port()

    def command(self) -> Sequence[str | Path]:
        command = super().command()
        properties = self.directory / "server.properties"
        before, separator, after = properties.read_text().partition("advertised.listeners=PLAINTEXT://127.0.0.1:")
        assert separator
        properties.write_text(f"{before}{separator}{self.advertised}{after[len(str(self.port)) :]}{_MORE_OF_KAFKA}")
        return command


class ProxiedPooler(Pooler):
    """PgBouncer in transaction mode, whose server is the proxy."""

    def __init__(self, server: Postgres, port: int) -> None:
        super().__init__(server, connections=30)
        self._target = port

    def prepare(self) -> None:
        super().prepare()
        with (self.directory / "users").open("a") as users:
            users.write(f'"{WORKER}" "{WORKER_PASSWORD}"\n')


async def _keep(pooler: Pooler) -> None:
    """Restart the pooler whenever it ends, as a service manager does.

    Version 1.18 ends itself for some cancel requests.
    """
    while True:
        assert pooler.process is not None
        await asyncio.to_thread(pooler.process.wait)
        await asyncio.to_thread(pooler.run)
        await asyncio.to_thread(pooler.wait)


def children(pid: int) -> list[int]:
    """The children of a process, without zombies."""
    pids = []
    with suppress(OSError):
        for part in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with suppress(OSError):
                if Path(f"/proc/{part}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    pids.append(int(part))
    return pids


def kill_tree(server: LocalServer) -> None:
    """SIGKILL a server and its child processes, as a power cut would."""
    for pid in children(server.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.kill()


async def started_again(server: LocalServer) -> None:
    """Start again after `kill`: the same data on the same port.

    Tried again while the port or the shared memory is still taken.
    """
    for attempt in range(20):
        server.run()
        try:
            await asyncio.to_thread(server.wait)
            return
        except EmbeddedUnavailable:
            if attempt == 19:
                raise
            await asyncio.sleep(0.2)


class Rig:
    """The servers, shared by all runs of a session.

    A run gets its own database, topic and application.
    """

    def __init__(self) -> None:
        self.kafka = ProxiedKafka()
        self.valkey = Valkey()
        self.primary = Postgres({"fsync": "off", "max_connections": "120"})
        self.standby: Standby | None = None
        self.pooler: ProxiedPooler | None = None
        self._keeping: asyncio.Task[None] | None = None
        self.directory = Path(tempfile.mkdtemp(prefix="consumer-chaos-"))

    async def __aenter__(self) -> Rig:
        try:
            for server in (self.kafka, self.valkey, self.primary):
                server.start()
            self.kafka_proxy = Proxy(self.kafka.port, "kafka", self.kafka.advertised)
            self.redis_proxy = Proxy(self.valkey.port, "redis")
            self.postgres_proxy = Proxy(self.primary.port, "postgres")
            self.replication = Proxy(self.primary.port)
            for proxy in self.proxies:
                await proxy.accept()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
        for proxy in self.proxies:
            await proxy.__aexit__()
        for server in (self.pooler, self.standby, self.primary, self.valkey, self.kafka):
            if server is not None:
                server.stop()
        with suppress(OSError):
            self.directory.rmdir()

    @property
    def proxies(self) -> list[Proxy]:
        names = ("kafka_proxy", "redis_proxy", "postgres_proxy", "replication")
        return [proxy for name in names if (proxy := getattr(self, name, None)) is not None]

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self.kafka_proxy.port}"

    async def with_standby(self) -> None:
        """A standby that follows the present primary, if there is none."""
        if self.standby is None:
            self.standby = Standby(self.primary, self.replication.port, self.primary._options)
            await asyncio.to_thread(self.standby.start)  # its first copy comes through a proxy of this loop

            async def streams() -> bool:
                connection = await asyncpg.connect(self.primary.dsn())
                try:
                    return bool(await connection.fetchval("select count(*) from pg_stat_replication"))
                finally:
                    await connection.close()

            await until("the standby to stream", streams)

    async def with_pooler(self) -> None:
        """PgBouncer before PostgreSQL's proxy, so that faults and failovers happen behind it."""
        if self.pooler is None:
            self.pooler = ProxiedPooler(self.primary, self.postgres_proxy.port)
            await asyncio.to_thread(self.pooler.start)
            self._keeping = asyncio.create_task(_keep(self.pooler))

    async def promote(self) -> None:
        """Make the standby the primary.

        The old primary must be dead.
        """
        standby, old = self.standby, self.primary
        assert standby is not None
        connection = await asyncpg.connect(standby.dsn())
        try:
            await connection.execute("select pg_promote(true, 60)")
        finally:
            await connection.close()
        self.primary, self.standby = standby, None
        self.postgres_proxy.point(standby.port)
        self.replication.reset()  # with what it has held back
        self.replication.heal()
        self.replication.point(standby.port)
        await asyncio.to_thread(old.stop)

    async def heal(self) -> None:
        """No faults any more, whatever there was."""
        for proxy in self.proxies:
            proxy.off()
            proxy.heal()
            await proxy.accept()

    async def database(self) -> str:
        """Create a database with all tables; return its name.

        Its address changes with a failover.
        """
        name = f"chaos_{uuid4().hex[:12]}"
        connection = await asyncpg.connect(self.primary.dsn())
        try:
            await connection.execute(f"create database {name}")
        finally:
            await connection.close()
        await migrated(self.primary.dsn(name), TABLES)
        return name

    def settings(self, database: str, pooler: bool = False, **more: object) -> Settings:
        """The settings of workers.

        Everything goes through the proxies, with quick timers, and a session timeout that a pause exceeds.
        """
        port = self.postgres_proxy.port
        if pooler:
            assert self.pooler is not None
            port = self.pooler.port
        proxied = as_worker(self.primary.dsn(database)).replace(f":{self.primary.port}/", f":{port}/")
        quick = {
            "kafka_session_timeout_seconds": 3,
            "kafka_heartbeat_seconds": 0.3,
            "kafka_commit_interval_seconds": 0.3,
            "postgres_lock_timeout_seconds": 2,
            "postgres_idle_in_transaction_timeout_seconds": 4,
            "batch_messages_max": 25,
            "postgres_pooler": pooler,
            "grace_seconds": 15,
            "watchdog_seconds": 60,
            "wait_seconds": 120,  # a `consumer run` that is started in an outage
            "restarts_max": 50,
        }
        url = f"redis://127.0.0.1:{self.redis_proxy.port}/0"
        return settings_for(proxied, self.bootstrap_servers, url, **{**quick, **more})


APPLICATION, NEXT_APPLICATION = "chaos.application:app", "chaos.downstream:app"


class Consumers:
    """`consumer run` as processes, several at a time.

    Keeps the logs of those that have ended.
    """

    def __init__(
        self, settings: Settings, directory: Path, environment: dict[str, str], workers: int = 2, versions: bool = False
    ) -> None:
        self._versions = versions
        self._settings = settings
        self._directory = directory
        self._environment = environment
        self._workers = workers
        self._applications: dict[int, str] = {}  # by pid
        self.running: list[Command] = []
        self.ended: list[Command] = []
        self.paused: set[int] = set()

    def start(self, application: str = APPLICATION) -> Command:
        """Start another `consumer run`.

        The first has all its workers, later ones have one. With versions, every other one is of the next version.
        """
        before = list(self._applications.values()).count(application)
        workers = 1 if before or application != APPLICATION else self._workers
        directory = self._directory / f"consumer-{len(self.running) + len(self.ended)}"
        directory.mkdir(parents=True)
        arguments = ["run", application, "--workers", str(workers)]
        version = "2" if self._versions and before % 2 else "1"
        command = Command(arguments, self._settings, directory, {**self._environment, "CHAOS_VERSION": version})
        self._applications[command.process.pid] = application
        self.running.append(command)
        return command

    def application(self, command: Command) -> str:
        """What a command runs."""
        return self._applications[command.process.pid]

    def pids(self) -> list[int]:
        """The running, unpaused worker processes, in a deterministic order."""
        pids = []
        for command in self.running:
            alive = set(children(command.process.pid))
            pids += [pid for _, pid in sorted(command.worker_pids().items()) if pid in alive and pid not in self.paused]
        return pids

    async def opened(self, command: Command) -> None:
        """Wait until one of its workers opens partitions, or it ends."""

        async def has() -> bool:
            return command.process.poll() is not None or any("opened" in event["event"] for event in command.events())

        await until("partitions to be opened", has, 150)

    async def stop(self, command: Command, seconds: float = 60) -> int:
        """SIGTERM, and its exit code."""
        command.process.send_signal(signal.SIGTERM)
        code = await command.wait(seconds)
        self._put_away(command)
        return code

    def kill(self, command: Command) -> None:
        """SIGKILL to the supervisor only: its workers notice."""
        command.process.kill()
        command.process.wait()
        self._put_away(command)

    def _put_away(self, command: Command) -> None:
        self.running.remove(command)
        self.ended.append(command)
        if command.process.stdout is not None:
            command.process.stdout.close()

    def end(self) -> None:
        """End everything that is left, at once."""
        for pid in self.paused:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for command in self.running:
            command.end()

    @property
    def logs(self) -> list[Path]:
        return sorted(self._directory.glob("consumer-*/stderr.log"))
