"""Refuses outside effects in dry runs, whose transactions are undone.

Knows contexts, threads, the event loop and Python's audit events; knows no handler's code and no driver. A context
variable says whose code runs; tasks, threads and executor calls inherit it. What runs under a handler's or a lifespan's
name may not connect, send to an address or start a process. Limitations: files; clients written in C that connect in
threads of their own (`unseen_clients` names those that are loaded); connections that were opened while the application
was imported, except that `opened_connections` finds them where /proc or /dev/fd is there.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any

from consumer.core.errors import ConsumerError
from consumer.core.handler import Call, Handler
from consumer.core.message import as_dry_run

_OURS = ""  # the framework's own code
# Whose code runs, in words; None where no dry run has set it, as in a thread that was started before.
_running: ContextVar[str | None] = ContextVar("consumer_dry_run", default=None)

_PROCESS_EVENTS = {
    "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn",
}  # fmt: skip
_ADDRESS_EVENTS = {"socket.connect", "socket.sendto", "socket.sendmsg"}
# uvloop connects and spawns in C, without audit events, so the loop's own methods are guarded too.
_LOOP_CONNECTS = (
    "create_connection",
    "create_unix_connection",
    "create_datagram_endpoint",
    "sock_connect",
    "sock_sendto",
)
_LOOP_SPAWNS = ("subprocess_exec", "subprocess_shell")
_LOOP_WATCHES = ("add_reader", "add_writer")  # clients that connect in C and wait in Python, as psycopg does
# Clients that connect in C, in threads that Python does not see.
_UNSEEN = (
    "MySQLdb", "confluent_kafka", "grpc", "oracledb", "psycopg2", "pycurl", "pymongoarrow", "pymssql", "pyodbc", "zmq",
)  # fmt: skip


class OutsideRefused(ConsumerError):
    """Raised where a dry run connects, sends or starts a process."""


def is_dry_run() -> bool:
    """Return whether this code runs in a dry run, which is undone.

    True in handlers, lifespans and what they start while `consumer replay --call-handlers` or `consumer rebuild` runs
    them.
    """
    return bool(_running.get())


@contextmanager
def running_as(subject: str) -> Iterator[None]:
    """Run the block as dry-run code of `subject`: "handler 'settle'", for example."""
    token = _running.set(subject)
    try:
        yield
    finally:
        _running.reset(token)


def around(handler: Handler) -> Call:
    """The handler's call, as a dry run makes it."""
    inner, subject = handler.call, f"handler {handler.name!r}"
    assert inner is not None

    async def call(value: Any, message: Any, tx: Any) -> object:
        dry_message = as_dry_run(message) if handler.wants_message else message
        if _guard is not None and _guard.refused:  # the cancellation is on its way
            raise OutsideRefused(_guard.refused)
        token = _running.set(subject)
        try:
            return await inner(dry_message if value is message else value, dry_message, tx)
        finally:
            _running.reset(token)

    return call


def unseen_clients() -> list[str]:
    """Loaded client libraries whose connections no dry run can refuse."""
    return [name for name in _UNSEEN if name in sys.modules]


def opened_connections() -> set[tuple[int, str]]:
    """Return the connected sockets of this process: descriptor and peer.

    Empty where the system does not list descriptors.
    """
    connections: set[tuple[int, str]] = set()
    for place in (Path("/proc/self/fd"), Path("/dev/fd")):
        with suppress(OSError):
            for descriptor in place.iterdir():
                if (peer := _peer(int(descriptor.name))) is not None:
                    connections.add((int(descriptor.name), peer))
            return connections
    return connections


def _peer(descriptor: Any) -> str | None:
    """Return the address that a descriptor is connected to; else None."""
    with suppress(OSError, TypeError, ValueError):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        with socket.socket(fileno=os.dup(number)) as copy:
            if address := copy.getpeername():
                return _place(copy.family, address)
    return None


def _place(family: int, address: Any) -> str:
    """Return a peer's host and address family, without port or payload."""
    if isinstance(address, tuple) and address and isinstance(address[0], str):
        return f"{address[0]} ({socket.AddressFamily(family).name})"
    with suppress(ValueError):
        return f"a local socket ({socket.AddressFamily(family).name})"
    return "another process"


class Guard:
    """Refuses outside effects of a dry run; the first refusal cancels it.

    alone: the process is the dry run's own, so that an unknown thread is the application's.
    """

    def __init__(self, *, alone: bool) -> None:
        self.refused = ""
        self._alone = alone
        self._main = threading.main_thread()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._threads: weakref.WeakKeyDictionary[threading.Thread, str] = weakref.WeakKeyDictionary()

    def end(self) -> None:
        """Stop refusing, and take back the cancellation of a refusal."""
        if self.refused and self._task is not None:
            while self._task.cancelling():
                self._task.uncancel()
        self._task = None

    def audit(self, event: str, args: Sequence[Any]) -> None:
        """Judge an audit event. Raises OutsideRefused."""
        if event in _PROCESS_EVENTS:
            self.check("starts a process")
        elif event in _ADDRESS_EVENTS and args[1] is not None:  # sendmsg without one: on a stream that is connected
            self.check(f"connects to {_place(args[0].family, args[1])}")

    def note_thread(self, thread: threading.Thread) -> None:
        """Remember for whom a thread is started.

        A pool's thread works for those who submit, who pass their context.
        """
        target = getattr(thread, "_target", None)
        is_pooled = getattr(target, "__module__", "") == "concurrent.futures.thread"
        if not is_pooled and (subject := self._subject()):
            self._threads[thread] = subject

    def _subject(self) -> str:
        """Whose code runs; empty for our own."""
        if subject := _running.get():
            return subject
        thread = threading.current_thread()
        if subject := self._threads.get(thread):
            return subject
        if self._alone and _running.get() is None and thread is not self._main:
            return f"the application (thread {thread.name!r})"
        return _OURS

    def check(self, what: str) -> None:
        """Raise OutsideRefused when it is not our own code that does this."""
        subject = self._subject()
        if not subject or _is_cancelling_a_statement():
            return
        if not self.refused:
            self.refused = (
                f"{subject}: {what} in a dry run, which may have no outside effects; leave that out where "
                "consumer.is_dry_run() is true, or allow it with --allow-outside (verify: allow_outside=True)"
            )
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._cancel)
        raise OutsideRefused(self.refused)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


def _is_cancelling_a_statement() -> bool:
    """Return whether asyncpg opens a connection to cancel a statement.

    That is harmless, and the statement may be our own.
    """
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code.co_name == "_cancel" and str(frame.f_globals.get("__name__")).startswith("asyncpg."):
            return True
    return False


_guard: Guard | None = None
_is_hooked = False


def _audit(event: str, args: Sequence[Any]) -> None:
    if _guard is not None and (event in _ADDRESS_EVENTS or event in _PROCESS_EVENTS):
        _guard.audit(event, args)


@contextmanager
def guarded(*, alone: bool) -> Iterator[Guard]:
    """Refuse outside effects of dry-run code in the block.

    Once at a time in a process.
    """
    global _guard, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_audit)  # it stays for the life of the process
        _is_hooked = True
    before, _guard = _guard, Guard(alone=alone)
    token = _running.set(_OURS)
    try:
        with _loop_guarded(_guard), _threads_guarded(_guard):
            yield _guard
    finally:
        _running.reset(token)
        _guard.end()
        _guard = before


@contextmanager
def _loop_guarded(guard: Guard) -> Iterator[None]:
    """Have the running loop ask before it connects or spawns."""
    loop: Any = asyncio.get_running_loop()

    def asks(original: Callable[..., Any], describe: Callable[[tuple[Any, ...]], str | None]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(*args: Any, **options: Any) -> Any:
            if (what := describe((*args, *options.values()))) is not None:
                guard.check(what)
            return original(*args, **options)

        return method

    replaced: list[str] = []
    for names, describe in (
        (_LOOP_CONNECTS, _connects),
        (_LOOP_SPAWNS, lambda _: "starts a process"),
        (_LOOP_WATCHES, lambda args: (peer := _peer(args[0])) and f"connects to {peer}"),
    ):
        for name in names:
            if hasattr(loop, name):
                setattr(loop, name, asks(getattr(loop, name), describe))
                replaced.append(name)
    try:
        yield
    finally:
        for name in replaced:
            delattr(loop, name)


def _connects(args: Sequence[Any]) -> str:
    """Say what a connecting method of the loop does.

    Its first plain text after the protocol is the host.
    """
    for argument in args[1:]:
        if isinstance(argument, str):
            return "connects to a local socket (AF_UNIX)" if "/" in argument else f"connects to {argument}"
        if isinstance(argument, tuple) and argument and isinstance(argument[0], str):
            return f"connects to {argument[0]}"
    return "opens a connection"


@contextmanager
def _threads_guarded(guard: Guard) -> Iterator[None]:
    """Track for whom threads, pools and `multiprocessing` work."""
    submit: Any = ThreadPoolExecutor.submit
    start = threading.Thread.start

    @functools.wraps(submit)
    def submitted(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        if _running.get():
            return submit(self, copy_context().run, fn, *args, **options)
        return submit(self, fn, *args, **options)

    @functools.wraps(start)
    def started(self: threading.Thread) -> None:
        guard.note_thread(self)
        start(self)

    def spawned(*args: Any) -> Any:  # which has no audit event
        guard.check("starts a process")
        return fork_exec(*args)

    with ExitStack() as stack:
        _replaced(stack, ThreadPoolExecutor, "submit", submitted)
        _replaced(stack, threading.Thread, "start", started)
        with suppress(ImportError):  # Windows
            fork_exec = importlib.import_module("_posixsubprocess").fork_exec
            _replaced(stack, sys.modules["_posixsubprocess"], "fork_exec", spawned)
        yield


def _replaced(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
