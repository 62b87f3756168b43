"""The supervisor never waits without a bound.

Not for forked processes that hold pipes, full pipes, or workers that do not react.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Command, Place, Sent, query, running_program, until, value

APP = """
import asyncio, os, pathlib, signal, subprocess, sys, time
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
import logging, multiprocessing
from consumer import App, Tx

{setup}
app = App({name!r}, lifespan=lifespan)

@app.handler({topic!r})
async def settle(payment: dict, tx: Tx) -> None:
    logging.getLogger("shop").info("settling", extra={{"payment": payment["id"]}})
    tx.defer("insert into effects values ($1, 1, 1)", payment["id"])
    {act}
"""
POOL = """
@asynccontextmanager
async def lifespan(app):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        pool.submit(time.sleep, 0).result()
        pathlib.Path("children").write_text(" ".join(map(str, pool._processes)))
        yield {}
"""
# The supervisor enters the lifespan too, to check it, so what these start is started in workers only.
CHILD = """
@asynccontextmanager
async def lifespan(app):
    if "CONSUMER_WORKER" not in os.environ:
        yield {}
        return
    child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
    pathlib.Path("children").write_text(str(child.pid))
    yield {}
"""
DEAF = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
@asynccontextmanager
async def lifespan(app):
    if "CONSUMER_WORKER" not in os.environ:
        yield {}
        return
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.setsid()  # it leaves the process group, and keeps the pipes
        time.sleep(60)
        os._exit(0)
    pathlib.Path("children").write_text("")
    yield {}
    time.sleep(600)
"""


class Service:
    def __init__(
        self, place: Place, topic: str, directory: Path, setup: str, act: str = "pass", **settings: Any
    ) -> None:
        self.place, self.topic, self.directory = place, topic, directory
        self.module = f"app_{uuid.uuid4().hex[:8]}"
        text = APP.format(name=f"app-{uuid.uuid4().hex[:8]}", topic=topic, setup=setup, act=act)
        (directory / f"{self.module}.py").write_text(text)
        self.settings = place.settings(grace_seconds=2, **settings)

    def run(self) -> Any:
        environment = {"PYTHONPATH": f"{self.directory}:{ROOT}"}
        return running_program(["run", f"{self.module}:app"], self.settings, self.directory / "run", **environment)

    def children(self) -> list[int]:
        file = self.directory / "run" / "children"
        return [int(number) for number in file.read_text().split()] if file.exists() else []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def settled(place: Place, number: int) -> None:
    async def all_there() -> bool:
        return bool(await value(place.dsn, "select count(*) from effects") == number)

    await until(f"{number} effects", all_there, 90)


def has(command: Command, text: str) -> Callable[[], Any]:
    async def is_logged() -> bool:
        return any(text in str(event["event"]) for event in command.events())

    return is_logged


@pytest.mark.parametrize("setup", [POOL, CHILD, DEAF], ids=["process pool", "deaf child", "forked, without its group"])
async def test_killed_worker_is_replaced_and_sigterm_ends_all(place: Place, tmp_path: Path, setup: str) -> None:
    topic = await place.topic()
    service = Service(place, topic, tmp_path, setup)
    async with service.run() as command:
        await place.send(topic, Sent({"id": "a"}, id="a"))
        await settled(place, 1)
        before = service.children()
        os.kill(command.worker_pids()[0], signal.SIGKILL)
        await until("the worker's end to be noticed", has(command, "worker ended; starting another"), 30)
        await place.send(topic, Sent({"id": "b"}, id="b"))
        await settled(place, 2)
        command.process.send_signal(signal.SIGTERM)
        await command.wait(40)
        children = {*before, *service.children()}

        async def gone() -> bool:
            return not any(map(is_alive, children))

        await until("the workers' own processes to end", gone)


async def test_the_applications_log_lines_come_from_workers(place: Place, tmp_path: Path) -> None:
    topic = await place.topic()
    service = Service(place, topic, tmp_path, POOL)
    async with service.run() as command:
        await place.send(topic, Sent({"id": "a"}, id="a"))
        await settled(place, 1)
        [line] = [event for event in command.events() if event["event"] == "settling"]
        assert (line["logger"], line["level"], line["payment"]) == ("shop", "info", "a")
        command.process.send_signal(signal.SIGTERM)
        assert await command.wait(40) in (0, 1)


async def test_worker_that_reads_no_orders_is_ended(place: Place, tmp_path: Path) -> None:
    """Its event loop is stopped, so it neither drains nor beats."""
    topic = await place.topic()
    service = Service(place, topic, tmp_path, POOL)
    async with service.run() as command:
        await place.send(topic, Sent({"id": "a"}, id="a"))
        await settled(place, 1)
        os.kill(command.worker_pids()[0], signal.SIGSTOP)
        command.process.send_signal(signal.SIGTERM)
        assert await command.wait(40) == 1


LOG_CONFIG = """
handlers = {all = {class = "logging.StreamHandler"}}
root = {handlers = ["all"], level = "INFO"}
"""


@pytest.mark.parametrize("log_config", [None, "logs.toml"], ids=["our handler", "a handler of --log-config"])
def test_log_without_a_reader_does_not_keep_the_supervisor(
    place: Place, tmp_path: Path, log_config: str | None
) -> None:
    """Standard error is a full pipe, and SIGTERM ends the supervisor."""
    (tmp_path / "logs.toml").write_text(LOG_CONFIG)
    service = Service(place, "nowhere", tmp_path, POOL, log_config=log_config)
    read, write = os.pipe()
    environment = {**os.environ, **service.settings.dump(), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "consumer", "run", f"{service.module}:app"], cwd=tmp_path, env=environment, stderr=write
    )
    try:
        os.set_blocking(read, False)
        deadline = time.monotonic() + 60
        seen = b""
        while b"worker process started" not in seen:
            assert time.monotonic() < deadline, seen
            try:
                seen += os.read(read, 65536)
            except BlockingIOError:
                time.sleep(0.05)
        os.set_blocking(write, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(write, b"x" * 4096)
        os.set_blocking(write, True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) is not None
    finally:
        process.kill()
        process.wait()
        os.close(read)
        os.close(write)


async def test_two_signals_end_at_once_although_a_fork_holds_the_pipe(place: Place, tmp_path: Path) -> None:
    topic = await place.topic()
    service = Service(place, topic, tmp_path, DEAF)
    async with service.run() as command:
        await place.send(topic, Sent({"id": "a"}, id="a"))
        await settled(place, 1)
        command.process.send_signal(signal.SIGTERM)
        await until("the first signal to be heard", has(command, "stopping"))
        command.process.send_signal(signal.SIGTERM)
        assert await command.wait(20) == 128 + signal.SIGTERM
    assert await query(place.dsn, "select count(*) from effects") == [(1,)]
