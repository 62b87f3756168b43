"""A worker inside a web application consumes and drains at SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import documents
import pytest
from harness import ROOT, Place, Sent, settings_for, until, value

from consumer import App, Misconfigured, Settings, Tx
from consumer.worker import embedded
from consumer.worker.worker import Worker


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


async def test_a_web_application_consumes_and_drains_at_sigterm(place: Place, tmp_path: Path) -> None:
    topic, port = await place.topic(), free_port()
    clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
    path = os.pathsep.join(map(str, [ROOT, ROOT / "tests" / "support"]))
    named = {"TEST_TOPIC": topic, "TEST_APP": f"web-{uuid.uuid4().hex[:8]}", "PYTHONPATH": path}
    output = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "web_app:web", "--port", str(port)],
        env={**clean, **place.settings().dump(), **named}, stdout=output, stderr=output,
    )  # fmt: skip

    async def answer() -> str | None:
        def ask() -> str | None:
            try:
                with urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as response:
                    return str(response.read().decode())
            except OSError:  # not there yet, or 503
                return None

        assert process.poll() is None, (tmp_path / "log").read_text()
        return await asyncio.to_thread(ask)

    async def is_written(id: str) -> Any:
        return await value(place.dsn, "select count(*) from effects where id = $1", id)

    try:
        assert '"worker":"consuming"' in await until("the web application to be ready", answer, 60)
        await place.send(topic, Sent({"id": "a"}, id="a"))
        await until("the first message", lambda: is_written("a"), 60)
        await place.send(topic, Sent({"id": "slow"}, id="slow"))
        await until("the second message to run", lambda: is_written("started"), 60)
        assert not await is_written("slow")
        process.send_signal(signal.SIGTERM)

        async def ended() -> bool:
            return process.poll() is not None

        await until("its end", ended, 60)
    finally:
        process.kill()
        process.wait()
        output.close()
    text = (tmp_path / "log").read_text()
    assert await is_written("slow") == 1, text
    assert "Application shutdown complete" in text and "Traceback" not in text
    assert "partitions opened" not in text  # info of `consumer`, for which the host has no handler
    assert await value(place.dsn, "select next_offset from consumer.positions") == 2


async def test_programs_of_the_page_consume_and_check(place: Place, tmp_path: Path) -> None:
    topic = await place.topic()
    for block in documents.blocks(ROOT / "docs/how-to/embed.md"):
        if block.file:
            code = block.code.replace('"payments"', repr(topic)).replace('"billing"', repr(f"own-{topic[-8:]}"))
            (tmp_path / block.file).write_text(code)
    clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
    environment = {**clean, **place.settings().dump(), "PYTHONPATH": str(ROOT)}

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, name]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    await place.send(topic, *(Sent({"account": 1, "amount": 5}, id=f"p{n}", key="1") for n in range(3)))

    async def is_paid() -> Any:
        assert service.poll() is None, service.communicate()
        return await value(place.dsn, "select balance = 15 from accounts where id = 1")

    service = start("service.py")
    try:
        await until("the payments", is_paid, 90)
        service.send_signal(signal.SIGTERM)
        _, errors = await asyncio.to_thread(service.communicate, timeout=60)
        assert service.returncode == 0, errors
    finally:
        service.kill()
    check = start("check.py")
    answer, errors = await asyncio.to_thread(check.communicate, timeout=60)
    assert check.returncode == 0 and answer.startswith("Nothing is missing"), answer + errors


def logging_of_the_host() -> list[object]:
    """What `consumer run` sets and `app.worker` leaves alone."""
    loggers = [logging.getLogger(name) for name in ("", "consumer", "aiokafka", "asyncio", "asyncpg", "redis")]
    state: list[object] = [(logger.level, [*logger.handlers], logger.propagate, logger.disabled) for logger in loggers]
    handler = asyncio.get_running_loop().get_exception_handler()
    return [*state, threading.excepthook, sys.unraisablehook, handler]


async def test_a_worker_that_fails_shows_it_and_leaves_the_program_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ready(*_: object) -> None: ...

    async def fails(_: Worker) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(embedded, "check_ready", ready)
    monkeypatch.setattr(Worker, "run", fails)
    of_the_host = logging_of_the_host()
    async with App("web").worker(settings_for("postgresql://user@127.0.0.1:1/none", "127.0.0.1:1", None)) as worker:
        assert worker.health.state == "starting" and not worker.health.ready

        async def failed() -> bool:
            return worker.health.state == "failed"

        await until("the worker to fail", failed)
        assert worker.health.error is not None and worker.health.error.startswith("KeyError at test_embedded.py:")
        assert "secret" not in worker.health.error
        assert logging_of_the_host() == of_the_host


async def test_settings_that_are_none_are_refused_with_one_line() -> None:
    given: Any = {"wait_seconds": 0}
    with pytest.raises(Misconfigured, match=r"app.worker\(\): a dict; give Settings"):
        async with App("web").worker(given):
            pytest.fail("it has started")
    with pytest.raises(Misconfigured, match=r"^Settings: no setting 'kafka_server'") as raised:
        Settings(kafka_server="localhost")
    assert "\n" not in str(raised.value)
    with pytest.raises(Misconfigured, match=r"^CONSUMER_LANES_MAX: Input should be a valid integer"):
        Settings(lanes_max="many")


async def test_a_service_that_is_missing_is_an_error_at_the_start(place: Place) -> None:
    app = App("web")

    @app.handler("payments")
    async def settle(body: dict[str, Any], tx: Tx) -> None: ...

    settings = place.settings(postgres_dsn="postgresql://user@127.0.0.1:1/none", wait_seconds=0)
    with pytest.raises(Misconfigured, match="PostgreSQL at 127"):
        async with app.worker(settings):
            pytest.fail("it has started")
