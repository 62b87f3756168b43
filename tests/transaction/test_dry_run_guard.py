"""Dry runs refuse what handlers do outside the database.

A check calls no handler; a rebuild and --call-handlers do.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from harness import Place, Result, Sent, consume_all, consumer, is_one_line, query, value

from consumer import App, Message, Misconfigured, Tx, is_dry_run, verify

INSERT = "insert into effects values ($1, $2, $3)"
SOURCE = """
from consumer import App, Tx
{imports}
app = App({name!r}{more})

@app.handler({topic!r}, name="settle")
async def settle(payment: dict, tx: Tx) -> None:
    tx.defer("insert into effects values ($1, $2, $3)", payment["id"], 1, 1)
    import pathlib
    if pathlib.Path("outside").exists():
        {act}
"""


class Gateway:
    """A server outside, which counts connections."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.socket.getsockname()[1]
        self.connections = 0
        self.open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                self.connections += 1
                self.open.append(connection)
                connection.sendall(b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n")

    def close(self) -> None:
        for connection in [*self.open, self.socket]:
            connection.close()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.close()


def sent(number: int) -> list[Sent]:
    return [Sent({"id": f"p{n}"}, id=f"p{n}", key=str(n)) for n in range(number)]


async def one_in_a_process(command: str) -> None:
    process = await asyncio.create_subprocess_exec(command)
    await process.wait()


def in_a_thread(call: Callable[[], object]) -> None:
    def quiet() -> None:
        with suppress(Exception):  # pytest would make a failure of a thread's exception
            call()

    thread = threading.Thread(target=quiet)
    thread.start()
    thread.join()


async def in_a_task(call: Callable[[], Awaitable[object]]) -> None:
    await asyncio.create_task(call())  # type: ignore[arg-type]


def connect(port: int) -> None:
    socket.create_connection(("127.0.0.1", port)).close()


async def connect_async(port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()


def datagram(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.sendto(b"x", ("127.0.0.1", port))


def forked() -> None:
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)


async def swallowing(port: int) -> None:
    with suppress(Exception):
        await connect_async(port)


_pool = ThreadPoolExecutor(1)

# Each does something outside: a connection to the port, a datagram, or a process.
WAYS: dict[str, Callable[[int], Any]] = {
    "connect": connect,
    "open_connection": connect_async,
    "http": lambda port: urllib.request.urlopen(f"http://127.0.0.1:{port}/").read(),
    "datagram": datagram,
    "datagram endpoint": lambda port: asyncio.get_running_loop().create_datagram_endpoint(
        asyncio.DatagramProtocol, remote_addr=("127.0.0.1", port)
    ),
    "unix socket": lambda _: asyncio.open_unix_connection("/nonexistent/gateway.sock"),
    "to_thread": lambda port: asyncio.to_thread(connect, port),
    "run_in_executor": lambda port: asyncio.get_running_loop().run_in_executor(None, connect, port),
    "executor of the module": lambda port: asyncio.wrap_future(_pool.submit(connect, port)),
    "thread": lambda port: in_a_thread(lambda: connect(port)),
    "thread of a thread": lambda port: in_a_thread(lambda: in_a_thread(lambda: connect(port))),
    "task": lambda port: in_a_task(lambda: connect_async(port)),
    "task that is left behind": lambda port: asyncio.get_running_loop().create_task(connect_async(port)) and None,
    "swallowed": swallowing,
    "subprocess": lambda _: subprocess.run(["true"], check=False),
    "asyncio subprocess": lambda _: one_in_a_process("true"),
    "system": lambda _: os.system("true"),
    "posix_spawn": lambda _: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
    "spawned process": lambda _: multiprocessing.get_context("spawn").Process(target=print).start(),
    "fork": lambda _: forked(),
}


def app_that(topic: str, way: Callable[[], Any], lifespan: Any = None) -> App:
    app = App(f"app-{uuid.uuid4().hex[:8]}", lifespan=lifespan)

    @app.handler(topic, name="settle")
    async def settle(payment: dict[str, Any], tx: Tx) -> None:
        tx.defer(INSERT, payment["id"], 1, 1)
        result = way()
        if asyncio.isfuture(result) or asyncio.iscoroutine(result):
            await result

    return app


@pytest.mark.parametrize("way", WAYS)
async def test_rebuild_with_a_handler_that_goes_outside_is_refused(place: Place, gateway: Gateway, way: str) -> None:
    topic = await place.topic()
    is_live = False
    app = app_that(topic, lambda: WAYS[way](gateway.port) if is_live else None)
    await place.send(topic, *sent(3))
    await consume_all(app, place.settings())
    is_live = True
    before = gateway.connections
    with pytest.raises(Misconfigured, match=r"^handler 'settle': .* dry run.*--allow-outside") as refusal:
        await verify(app, topic, settings=place.settings(), rebuild=True)
    assert str(gateway.port) not in str(refusal.value)
    assert gateway.connections == before
    assert await value(place.dsn, "select count(*) from effects") == 3


async def test_rebuild_with_outside_allowed_calls_and_says_so(place: Place, gateway: Gateway) -> None:
    topic = await place.topic()
    app = app_that(topic, lambda: connect_async(gateway.port))
    await place.send(topic, *sent(3))
    await consume_all(app, place.settings())
    before = gateway.connections
    findings = await verify(app, topic, settings=place.settings(), rebuild=True, allow_outside=True)
    assert findings.ok and gateway.connections > before
    assert any("calls of settle" in note and "allowed" in note for note in findings.notes)


async def test_check_calls_no_handler_unless_asked(place: Place, gateway: Gateway) -> None:
    topic = await place.topic()
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    entered = 0

    @asynccontextmanager
    async def lifespan(_: App) -> AsyncIterator[dict[str, object]]:
        nonlocal entered
        entered += 1
        yield {}

    app = app_that(topic, count, lifespan)
    await place.send(topic, *sent(5))
    findings = await verify(app, topic, settings=place.settings())
    assert (findings.total("missing"), calls, entered) == (5, 0, 0)
    assert any("no handler was called" in note and "--call-handlers" in note for note in findings.notes)
    findings = await verify(app, topic, settings=place.settings(), call_handlers=True)
    assert (findings.total("missing"), calls, entered) == (5, 5, 1)
    assert any("5 would be applied" in note for note in findings.notes)
    assert await value(place.dsn, "select count(*) from effects") == 0


async def test_call_handlers_refuses_what_goes_outside(place: Place, gateway: Gateway) -> None:
    topic = await place.topic()
    app = app_that(topic, lambda: connect_async(gateway.port))
    await place.send(topic, *sent(2))
    with pytest.raises(Misconfigured, match=r"handler .settle.: connects to 127\.0\.0\.1"):
        await verify(app, topic, settings=place.settings(), call_handlers=True)
    assert gateway.connections == 0


async def test_lifespan_that_connects_is_refused_by_name(place: Place, gateway: Gateway) -> None:
    """Later sends on that connection look like the framework's own."""
    topic = await place.topic()

    @asynccontextmanager
    async def lifespan(_: App) -> AsyncIterator[dict[str, object]]:
        writer = (await asyncio.open_connection("127.0.0.1", gateway.port))[1]
        yield {"writer": writer}
        writer.close()

    app = app_that(topic, lambda: None, lifespan)
    await place.send(topic, *sent(2))
    await consume_all(app, place.settings())
    before = gateway.connections
    with pytest.raises(Misconfigured, match=r"^the lifespan of App .* connects to 127\.0\.0\.1"):
        await verify(app, topic, settings=place.settings(), rebuild=True)
    assert gateway.connections == before


async def test_lifespan_pool_of_the_same_database_is_outside(place: Place) -> None:
    topic = await place.topic()

    @asynccontextmanager
    async def lifespan(_: App) -> AsyncIterator[dict[str, object]]:
        async with asyncpg.create_pool(place.worker_dsn, min_size=0) as pool:
            yield {"pool": pool}

    app = App(f"app-{uuid.uuid4().hex[:8]}", lifespan=lifespan)

    @app.handler(topic)
    async def settle(payment: dict[str, Any], tx: Tx, pool: asyncpg.Pool) -> None:
        await pool.execute(INSERT, payment["id"], 2, 2)

    await place.send(topic, *sent(2))
    await consume_all(app, place.settings())
    with pytest.raises(Misconfigured, match="handler 'settle': connects to"):
        await verify(app, topic, settings=place.settings(), rebuild=True)
    assert await value(place.dsn, "select count(*) from effects") == 2


async def test_handlers_can_ask_whether_this_is_a_dry_run(place: Place, gateway: Gateway) -> None:
    topic = await place.topic()
    seen: list[tuple[bool, ...]] = []

    @asynccontextmanager
    async def lifespan(_: App) -> AsyncIterator[dict[str, object]]:
        seen.append((is_dry_run(),))
        yield {}

    app = App(f"app-{uuid.uuid4().hex[:8]}", lifespan=lifespan)

    @app.handler(topic, name="settle")
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        tx.defer(INSERT, message.value["id"], 1, 1)
        in_thread = await asyncio.to_thread(is_dry_run)
        seen.append((message.dry_run, tx.dry_run, is_dry_run(), in_thread))
        if not tx.dry_run:
            await connect_async(gateway.port)

    @app.handler(topic, name="book", batch=10)
    async def book(messages: list[Message[dict[str, Any]]], tx: Tx) -> None:
        seen.append((*[message.dry_run for message in messages], tx.dry_run))
        for message in messages:
            tx.defer(INSERT, message.value["id"], 2, 1)  # a handler that writes nothing proves nothing in a rebuild

    await place.send(topic, *sent(1))
    await consume_all(app, place.settings())
    assert {flag for flags in seen for flag in flags} == {False}
    seen.clear()
    findings = await verify(app, topic, settings=place.settings(), rebuild=True)
    assert findings.ok, findings.problems()
    assert seen[0] == (True,) and {flag for flags in seen for flag in flags} == {True}
    assert not is_dry_run()


async def test_statement_that_is_cancelled_in_a_dry_run_is_no_outside_effect(place: Place) -> None:
    """asyncpg opens a connection of its own to cancel a statement."""
    topic = await place.topic()

    async def impatient(tx: Tx) -> None:
        async with tx.savepoint():
            with suppress(TimeoutError):
                await asyncio.wait_for(tx.execute("select pg_sleep(30)"), 0.1)

    app = App(f"app-{uuid.uuid4().hex[:8]}")

    @app.handler(topic)
    async def settle(payment: dict[str, Any], tx: Tx) -> None:
        tx.defer(INSERT, payment["id"], 1, 1)
        with suppress(asyncpg.PostgresError):
            await impatient(tx)

    await place.send(topic, *sent(1))
    findings = await verify(app, topic, settings=place.settings(), call_handlers=True)
    assert findings.total("missing") == 1


async def test_other_tasks_and_threads_of_the_process_go_on(place: Place, gateway: Gateway) -> None:
    """What other tasks of the process do is not the dry run's."""
    topic = await place.topic()
    app = app_that(topic, lambda: None)
    await place.send(topic, *sent(20))
    await consume_all(app, place.settings())
    ended = threading.Event()

    def elsewhere() -> None:
        while not ended.wait(0.01):
            connect(gateway.port)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    try:
        findings = await verify(app, topic, settings=place.settings(), rebuild=True)
    finally:
        ended.set()
        thread.join()
    assert findings.ok and gateway.connections > 0


class Shop:
    """An application in a directory, for `consumer replay` in it."""

    def __init__(self, place: Place, topic: str, directory: Path, **parts: str) -> None:
        self.place, self.topic, self.directory = place, topic, directory
        self.module = f"dry_{uuid.uuid4().hex[:8]}"
        self.parts = {"imports": "", "more": "", "act": "pass", "name": f"dry-{uuid.uuid4().hex[:8]}"} | parts
        (directory / f"{self.module}.py").write_text(SOURCE.format(topic=topic, **self.parts))

    def replay(self, *arguments: str) -> Result:
        return self.command("replay", *arguments)

    def rebuild(self, *arguments: str) -> Result:
        return self.command("rebuild", *arguments)

    def command(self, name: str, *arguments: str) -> Result:
        environment = {
            "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": self.place.kafka,
            "CONSUMER_POSTGRES_DSN": self.place.worker_dsn,
            "XDG_STATE_HOME": str(self.directory / "state"),
        }
        return consumer(self.directory, name, f"{self.module}:app", self.topic, *arguments, **environment)

    def go_outside(self) -> None:
        (self.directory / "outside").touch()


ACTS = {
    "open_connection": "import asyncio; await asyncio.open_connection('127.0.0.1', {port})",
    "connect": "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "process": "import asyncio; await asyncio.create_subprocess_exec('true')",
    "shell": "import asyncio; await asyncio.create_subprocess_shell('true')",
    "spawned process": "import multiprocessing; multiprocessing.get_context('spawn').Process(target=print).start()",
    "datagram": "import asyncio; await asyncio.get_running_loop().create_datagram_endpoint("
    "asyncio.DatagramProtocol, remote_addr=('127.0.0.1', {port}))",
    "sock_connect": "import asyncio, socket; s = socket.socket(); s.setblocking(False); "
    "await asyncio.get_running_loop().sock_connect(s, ('127.0.0.1', {port}))",
    "queue to a thread": "work.put({port}); work.join()",
}
_QUEUE = """
import queue, socket, threading
work = queue.Queue()
def deliver():
    while True:
        port = work.get()
        try:
            socket.create_connection(('127.0.0.1', port))
        except Exception:
            pass
        work.task_done()
threading.Thread(target=deliver, daemon=True).start()
"""


@pytest.mark.parametrize("act", ACTS)
async def test_the_commands_own_loop_refuses_too(place: Place, gateway: Gateway, tmp_path: Path, act: str) -> None:
    topic = await place.topic()
    shop = Shop(
        place, topic, tmp_path, act=ACTS[act].format(port=gateway.port), imports=_QUEUE if "work" in ACTS[act] else ""
    )
    await place.send(topic, *sent(3))
    shop.go_outside()
    is_one_line(shop.replay("--call-handlers"), "dry run, which may have no outside effects")
    assert gateway.connections == 0
    assert await query(place.dsn, "select * from effects") == []


async def test_rebuild_says_how_many_calls_it_makes_before_it_starts(place: Place, tmp_path: Path) -> None:
    topic = await place.topic()
    shop = Shop(place, topic, tmp_path)
    await place.send(topic, *sent(7))
    applied = shop.replay("--apply")
    assert applied.returncode == 0, applied.stderr
    findings = shop.rebuild()
    assert "makes up to 7 calls of settle" in findings.stderr
    is_one_line(shop.replay("--apply", "--call-handlers"), "--call-handlers: not with --apply")
    is_one_line(shop.replay("--allow-outside"), "--allow-outside: no effect alone")


async def test_import_that_leaves_a_connection_open_is_refused(place: Place, gateway: Gateway, tmp_path: Path) -> None:
    topic = await place.topic()
    imports = f"import socket; out = socket.create_connection(('127.0.0.1', {gateway.port}))"
    shop = Shop(place, topic, tmp_path, imports=imports, act="out.sendall(b'x')")
    await place.send(topic, *sent(1))
    is_one_line(shop.replay("--call-handlers"), "its import opens a connection to 127.0.0.1")
    assert shop.replay().returncode == 1  # the check calls nothing


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are listed elsewhere")
def test_opened_connections_names_peers_without_ports(gateway: Gateway) -> None:
    from consumer.transaction import dry_run_guard

    before = dry_run_guard.opened_connections()
    with socket.create_connection(("127.0.0.1", gateway.port)):
        opened = dry_run_guard.opened_connections() - before
    assert {peer for _, peer in opened} == {"127.0.0.1 (AF_INET)"}
