"""The worker that starts early is used, or ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from harness import ROOT, Place, Sent, running_program, until, value

# The process that checks the App notes which processes it has started by then.
NOTE = """
import os, pathlib, sys, time
from consumer import App, Tx
if "CONSUMER_WORKER" not in os.environ:
    noted = pathlib.Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    pathlib.Path("new").write_text(noted)
    os.rename("new", "children")
"""
HANDLER = """
app = App({name!r})
@app.handler({topic!r})
async def settle(payment: dict, tx: Tx) -> None:
    assert len(os.environ["LARGE"]) == {large}
    tx.defer("insert into effects values ($1, 1, 1)", payment["id"])
"""
LARGE = 120_000  # more than a pipe holds


async def noted(directory: Path) -> list[int]:
    async def is_noted() -> bool:
        return (directory / "children").exists()

    await until("the App to be imported", is_noted)
    return [int(number) for number in (directory / "children").read_text().split()]


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, None], ids=str)
async def test_interpreter_ends_with_the_command(tmp_path: Path, ended_by: signal.Signals | None) -> None:
    (tmp_path / "x.py").write_text(NOTE + ("time.sleep(600)" if ended_by else "raise OSError('away')"))
    process = subprocess.Popen(
        [sys.executable, "-m", "consumer", "run", "x:app", "--postgres-dsn", "postgresql://127.0.0.1:1/x"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert len(await noted(tmp_path)) == 1
        if ended_by:
            process.send_signal(ended_by)
        errors = process.communicate(timeout=60)[1]  # to its end: what holds the pipe has ended, too
        says = {
            signal.SIGINT: "interrupted",
            signal.SIGTERM: "terminated",
            None: "'x': cannot be imported; OSError: away",
        }
        codes = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL, None: 2}
        assert process.returncode == codes[ended_by]
        assert errors.startswith(f"consumer: {says[ended_by]}" if ended_by in says else "")
        assert errors.count("\n") == (ended_by in says)
    finally:
        process.kill()
        process.wait()


async def test_first_worker_is_the_interpreter_that_was_started_early(place: Place, tmp_path: Path) -> None:
    """Its environment comes through the pipe, however large it is."""
    topic = await place.topic()
    text = HANDLER.format(name=f"app-{uuid.uuid4().hex[:8]}", topic=topic, large=LARGE)
    (tmp_path / "early.py").write_text(NOTE + text)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "LARGE": "x" * LARGE}
    directory = tmp_path / "run"
    await place.send(topic, Sent({"id": "a"}, id="a"))
    async with running_program(["run", "early:app"], place.settings(), directory, **environment) as command:

        async def is_settled() -> bool:
            return bool(await value(place.dsn, "select count(*) from effects") == 1)

        await until("the effect", is_settled, 90)
        assert [command.worker_pids()[0]] == await noted(directory)
        command.process.send_signal(signal.SIGTERM)
        assert await command.wait(40) == 0
