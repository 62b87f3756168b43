"""Starts, restarts and ends the worker processes; consumes nothing itself.

Handles processes, pipes and signals; worker/restart_policy.py decides what to do after an exit. A worker that dies is
removed from its group at once, so that its partitions do not wait for the session timeout. Every wait has a bound:
processes that a worker has forked may hold its pipes for ever. Limitations: sees whether a worker's event loop runs,
not whether the worker makes progress.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, assert_never

from consumer.kafka.admin import leave_group
from consumer.logs import describe, event
from consumer.metrics.fleet import Fleet
from consumer.settings import Settings
from consumer.worker import interpreter
from consumer.worker.restart_policy import EXIT_MISCONFIGURED, GiveUp, RestartAfter, Restarts, reason_of

_LEAVE_SECONDS = 5.0
_AFTER_GRACE_SECONDS = 2.0
_LAST_REPORTS_SECONDS = 1.0  # to read a dead worker's last reports
_REPORT_BYTES_MAX = 4 << 20  # of a line; workers send less
_KILLED_SECONDS = 5.0  # a killed process is gone by then, or the kernel does not let go of it


@dataclass(slots=True, eq=False)
class _Child:
    """One running worker process.

    number: counts the processes of this supervisor. ended: its exit code, once it and its process group are gone. is_silent: it
    was ended because it sent no heartbeat.
    """

    slot: int
    number: int
    process: subprocess.Popen[bytes]
    orders: asyncio.WriteTransport
    started_at: float
    beat_at: float
    ended: asyncio.Future[int]
    member: str = ""
    is_silent: bool = False
    readers: list[asyncio.Task[None]] = field(default_factory=list)

    def kill(self) -> None:
        """Kill the process, unless it was waited for.

        race: the process id of a process that was waited for may be another process's.
        """
        if not self.ended.done():
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)

    async def code(self) -> int:
        """Return a killed process's exit code; SIGKILL's if it survives."""
        done, _ = await asyncio.wait({self.ended}, timeout=_KILLED_SECONDS)
        if not done:
            event(
                logging.ERROR, "worker cannot be ended: it is given up", worker=self.slot, worker_pid=self.process.pid
            )
            return -signal.SIGKILL
        return self.ended.result()


class Supervisor:
    """Runs the worker processes of one App.

    `run` returns the exit code: 0 after a clean stop, 1 when restarts did not help, 2 for a configuration that cannot
    work.
    """

    def __init__(self, path: str, settings: Settings, fleet: Fleet) -> None:
        self._fleet = fleet
        self._path = path
        self._group = fleet.app
        self._workers = len(fleet.slots)
        self._settings = settings
        self._children: dict[int, _Child] = {}
        self._prepared: dict[int, _Child] = {}
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()
        self._code = 0

    async def prepare(self) -> None:
        """Start processes that import a worker's modules, then wait for `run`."""
        for slot in range(min(self._workers, os.cpu_count() or 1)):
            self._prepared[slot] = await self._start(slot)

    async def give_up(self) -> None:
        """Kill the prepared processes."""
        for child in self._prepared.values():
            child.kill()
        for child in self._prepared.values():
            await child.code()
            await self._last_reports(child)

    async def run(self) -> int:
        """Run the workers until a signal, or until restarts do not help."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        slots = [asyncio.create_task(self._run_slot(slot)) for slot in range(self._workers)]
        try:
            await asyncio.gather(*slots)
        finally:
            for child in self._children.values():
                child.kill()
        return self._code

    def _signalled(self, number: int) -> None:
        if self._stopping.is_set():
            event(logging.WARNING, "second signal: ending the workers at once")
            self._code = 128 + number
            self._at_once.set()
            return
        event(logging.INFO, "stopping: workers drain", signal=signal.Signals(number).name, again="ends them at once")
        self._stop()

    def _stop(self) -> None:
        self._fleet.is_stopping = True
        self._stopping.set()

    async def _run_slot(self, slot: int) -> None:
        """Run a worker in a slot and replace it, until the stop."""
        restarts = Restarts(in_a_row_max=self._settings.restarts_max)
        while not self._stopping.is_set():
            child = self._prepared.pop(slot, None) or await self._start(slot)
            self._begin(child)
            code = await self._until_it_ends(child)
            await self._last_reports(child)
            reason = "no_heartbeat" if child.is_silent else reason_of(code)
            self._fleet.ended(slot, child.number, None if self._stopping.is_set() else reason)
            await self._remove_from_group(child, code)
            if self._stopping.is_set():
                self._code = self._code or (1 if code > 0 else 0)
                return
            match restarts.ended(time.monotonic() - child.started_at, code):
                case RestartAfter(seconds):
                    event(
                        logging.WARNING,
                        "worker ended; starting another",
                        worker=slot,
                        **_exit_fields(code),
                        after_seconds=seconds,
                    )
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), seconds)
                case GiveUp(why):
                    event(
                        logging.ERROR,
                        "giving up: the other workers are ended",
                        worker=slot,
                        why=why,
                        **_exit_fields(code),
                    )
                    self._code = EXIT_MISCONFIGURED if code == EXIT_MISCONFIGURED else 1
                    self._fleet.given_up(slot)
                    self._stop()
                case decision:
                    assert_never(decision)

    async def _start(self, slot: int) -> _Child:
        process, reports = interpreter.taken_early() or interpreter.start()
        environment = self._settings.child_environment() | {"CONSUMER_WORKER": str(slot)}
        assert process.stdin is not None
        orders, _ = await asyncio.get_running_loop().connect_write_pipe(asyncio.BaseProtocol, process.stdin)
        orders.write(interpreter.assignment(self._path, environment))
        now = time.monotonic()
        number = self._fleet.started(slot, process.pid)
        child = self._children[slot] = _Child(slot, number, process, orders, now, now, _when_ended(process))
        child.readers.append(asyncio.create_task(self._listen(child, reports)))
        return child

    def _begin(self, child: _Child) -> None:
        child.started_at = child.beat_at = time.monotonic()
        self._order(child, b"begin\n")
        event(logging.INFO, "worker process started", worker=child.slot, worker_pid=child.process.pid)

    def _order(self, child: _Child, order: bytes) -> None:
        if not child.orders.is_closing():  # it is dead
            child.orders.write(order)

    async def _listen(self, child: _Child, descriptor: int) -> None:
        reader = asyncio.StreamReader(_REPORT_BYTES_MAX)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0)
        )
        try:
            while line := await reader.readline():
                child.beat_at = time.monotonic()
                with suppress(ValueError, AttributeError):  # cut off, as its process was killed
                    fields = json.loads(line)
                    child.member = fields.get("member") or child.member
                    self._fleet.report(child.slot, child.number, fields)
        finally:
            transport.close()

    async def _until_it_ends(self, child: _Child) -> int:
        """Wait for a process to end, and pass on the stop.

        It is killed when it does not stop in time, or sends no heartbeat.
        """
        ended: asyncio.Future[Any] = child.ended
        stopping = asyncio.create_task(self._stopping.wait())
        at_once = asyncio.create_task(self._at_once.wait())
        patience = max(self._settings.watchdog_seconds, 10.0)
        try:
            while not stopping.done():
                await asyncio.wait({ended, stopping}, timeout=1, return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    return child.ended.result()
                if time.monotonic() - child.beat_at > patience:
                    event(
                        logging.ERROR,
                        "worker sends no heartbeat: its event loop is blocked or stopped; ending it",
                        worker=child.slot,
                    )
                    child.is_silent = True
                    child.kill()
                    return await child.code()
            self._order(child, b"drain\n")
            seconds = self._settings.grace_seconds + _AFTER_GRACE_SECONDS
            await asyncio.wait({ended, at_once}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                if not at_once.done():
                    event(logging.ERROR, "worker did not drain in time: ending it", worker=child.slot)
                    self._code = self._code or 1
                child.kill()
            return await child.code()
        finally:
            stopping.cancel()
            at_once.cancel()

    async def _remove_from_group(self, child: _Child, code: int) -> None:
        """Remove a dead worker from the group.

        A worker that left by itself is not in it any more, which does no harm.
        """
        self._children.pop(child.slot, None)
        if code == 0 or not child.member:
            return
        try:
            async with asyncio.timeout(_LEAVE_SECONDS):
                await leave_group(self._settings, self._group, child.member)
        except Exception as error:  # Kafka is away: the session timeout removes it
            event(logging.WARNING, "could not take the dead worker out of its group", error=describe(error))
        else:
            event(logging.INFO, "dead worker taken out of its group", worker=child.slot)

    async def _last_reports(self, child: _Child) -> None:
        """Read a dead worker's last reports, and close its pipes.

        A process that the worker has forked may still hold them.
        """
        child.orders.abort()
        if child.readers:
            await asyncio.wait(child.readers, timeout=_LAST_REPORTS_SECONDS)
        for reader in child.readers:
            reader.cancel()
        await asyncio.gather(*child.readers, return_exceptions=True)


def _when_ended(process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """Return a process's exit code, after killing its process group."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def set_code(code: int) -> None:
        if not ended.done():
            ended.set_result(code)

    def wait() -> None:
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            # race: until the process is waited for, no other process can get its id, nor its group's.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(set_code, code)

    threading.Thread(target=wait, name=f"wait-{process.pid}", daemon=True).start()
    return ended


def _exit_fields(code: int) -> dict[str, object]:
    if code < 0:
        with suppress(ValueError):
            return {"killed_by": signal.Signals(-code).name}
    return {"exit_code": code}
