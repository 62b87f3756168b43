"""The page's services as child processes, which the page can stop.

PostgreSQL, Valkey, a broker and `consumer run`. Knows processes and the worker's log; knows no order. Limitations: if a
worker is killed, and the line of its log is lost, it is unknown why it stopped a message.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from consumer import Settings
from consumer.kafka.admin import create_topic
from consumer.local_servers import LocalServer, Postgres, Tansu, Valkey, die_with_parent
from consumer.postgres import migrate
from consumer.postgres.connection import connect
from consumer.settings import load
from handlers.shop.application import SANDBOX_TOPIC, TOPIC
from handlers.shop.view import Place

PARTITIONS = 3
_STOP_SECONDS = 10.0
_READ_SECONDS = 15.0
_CAUSES_KEPT = 10_000


class Worker:
    """`consumer run` as a child process: a supervisor with one worker process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._listener: asyncio.Task[None] | None = None
        self._causes: dict[str, OrderedDict[Place, str]] = {}
        self._pid = 0
        self._opened = asyncio.Event()

    @property
    def pid(self) -> int:
        """The worker process, under its supervisor; 0 when there is none."""
        if self._pid and not _lives(self._pid):
            self._pid = 0
        return self._pid

    def causes(self, topic: str) -> Mapping[Place, str]:
        """Why messages were stopped, by partition and offset.

        As far as it is in the log of workers.
        """
        return self._causes.get(topic, {})

    async def start(self) -> None:
        """Start it, if it does not run."""
        if self._process is not None and self._process.returncode is None:
            return
        await self.stop()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "consumer", "run", "handlers.shop.application:app"),
            env=self._settings.child_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us, who then end it in order
            preexec_fn=die_with_parent,
        )
        self._listener = asyncio.create_task(self._listen(self._process))

    async def until_it_reads(self) -> None:
        """Wait a while until the worker has its partitions.

        Without them, taps are only accepted, and the page says so.
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self._opened.wait(), _READ_SECONDS)

    def kill(self) -> None:
        """SIGKILL to the worker process; its supervisor starts another."""
        with suppress(ProcessLookupError):
            if self.pid:
                os.kill(self.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """End the supervisor and the worker, in order."""
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
            except TimeoutError:
                self.kill()
                self._process.kill()
                await self._process.wait()
        if self._listener is not None:
            await asyncio.gather(self._listener, return_exceptions=True)
        self._process, self._listener, self._pid = None, None, 0

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        """Read the worker's log to the end, so the worker never blocks."""
        assert process.stderr is not None
        async for line in process.stderr:
            try:
                entry = json.loads(line)
                if entry["event"] == "worker process started":
                    self._pid = entry["worker_pid"]
                elif entry["event"] == "partitions opened":
                    self._opened.set()
                elif entry["event"] == "duplicate":
                    causes = self._causes.setdefault(entry["topic"], OrderedDict())
                    causes[entry["partition"], entry["offset"]] = entry["cause"]
                    if len(causes) > _CAUSES_KEPT:
                        causes.popitem(last=False)
            except (ValueError, KeyError, TypeError):
                continue  # not a line of ours


class Running:
    """The services by name.

    People stop and start them from the page.
    """

    def __init__(self, postgres: Postgres, valkey: Valkey, tansu: Tansu, settings: Settings) -> None:
        self.postgres = postgres
        self.valkey = valkey
        self.tansu = tansu
        self.settings = settings
        self.worker = Worker(settings)
        self._frozen = False
        self._one_at_a_time = asyncio.Lock()

    async def stop(self, name: str) -> None:
        """Stop kafka, postgresql, redis or worker, unless it is stopped already."""
        async with self._one_at_a_time:
            match name:
                case "kafka":
                    # Held, not ended: its log is in its memory, and would be gone.
                    os.kill(self.tansu.pid, signal.SIGSTOP)
                    self._frozen = True
                case "postgresql":
                    await asyncio.to_thread(_end, self.postgres, signal.SIGQUIT)  # without a shutdown: it recovers
                case "redis":
                    await asyncio.to_thread(_end, self.valkey, signal.SIGKILL)  # all tokens and marks are lost
                case "worker":
                    await self.worker.stop()

    async def start(self, name: str) -> None:
        """Start it again. Raises EmbeddedUnavailable when it does not come back."""
        async with self._one_at_a_time:
            match name:
                case "kafka":
                    self.thaw()
                case "postgresql":
                    await _again(self.postgres)
                case "redis":
                    await _again(self.valkey)
                case "worker":
                    await self.worker.start()

    def thaw(self) -> None:
        """Let the broker go on, if it was stopped from here."""
        with suppress(ProcessLookupError):
            if self._frozen:
                os.kill(self.tansu.pid, signal.SIGCONT)
        self._frozen = False

    def kafka_runs(self) -> bool:
        """Whether the broker is there and was not stopped from here."""
        return not self._frozen and self.tansu.process is not None and self.tansu.process.poll() is None

    def redis_runs(self) -> bool:
        """Whether the process of Valkey is there."""
        return self.valkey.process is not None and self.valkey.process.poll() is None


@asynccontextmanager
async def running() -> AsyncIterator[Running]:
    """Start everything; end it and remove its directories at the end.

    Raises EmbeddedUnavailable. Call it in the main thread: the servers end with the thread that has started them.
    """
    async with AsyncExitStack() as stack:
        for name in [variable for variable in os.environ if variable.startswith("CONSUMER_")]:
            del os.environ[name]  # settings for other servers than these
        postgres, valkey, tansu = (stack.enter_context(server()) for server in (Postgres, Valkey, Tansu))
        settings = load(
            kafka_bootstrap_servers=tansu.bootstrap_servers,
            postgres_dsn=postgres.dsn(),
            redis_url=valkey.url,
            kafka_session_timeout_seconds=6,
            # One message a transaction, so that each meets the pre-check and the ledger by itself, to be watched.
            batch_messages_max=1,
            lanes_max=1,
            grace_seconds=5,
            restarts_max=1000,  # people kill it here
            log_level="debug",
            log_format="json",
        )
        connection = await connect(settings)
        try:
            await migrate.migrate(connection, Path(__file__).with_name("schema.sql").read_text("utf-8"))
        finally:
            connection.terminate()
        for topic in (TOPIC, SANDBOX_TOPIC):
            await create_topic(settings, topic, PARTITIONS)
        services = Running(postgres, valkey, tansu, settings)
        try:
            await services.worker.start()
            await services.worker.until_it_reads()
            yield services
        finally:
            services.thaw()
            await services.worker.stop()


def _end(server: LocalServer, number: signal.Signals) -> None:
    if server.process is not None and server.process.poll() is None:
        server.process.send_signal(number)
        server.process.wait(_STOP_SECONDS)


async def _again(server: LocalServer) -> None:
    if server.process is None or server.process.poll() is not None:
        server.run()  # in this thread, whose end is its end
        await asyncio.to_thread(server.wait)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
