"""`consumer` commands about a test's App, from a module they can load."""

from __future__ import annotations

import asyncio
import json
import shlex
from typing import Any

from harness import ROOT, Place, Result, consumer

from consumer import App

PATH = "worker_app:alone"  # the App with the one handler `settle`, of the name and topic that the environment says


async def command(place: Place, app: App, *arguments: str) -> Result:
    """A `consumer` command about this App."""
    environment = {
        "TEST_APP": app.name,
        "TEST_TOPIC": app.topics[0],
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'support'}",
    }
    settings = place.settings(log_level="warning").dump()
    return await asyncio.to_thread(consumer, ROOT / "tests" / "support", *arguments, **settings, **environment)


async def run_as_printed(place: Place, app: App, line: str) -> Result:
    """Run a command just as it was printed."""
    program, *arguments = shlex.split(line)
    assert program == "consumer"
    return await command(place, app, *arguments)


async def status(place: Place, app: App, path: str = PATH) -> tuple[int, dict[str, Any]]:
    """Exit code and answer of `consumer status --json`."""
    result = await command(place, app, "status", path, "--json")
    return result.returncode, json.loads(result.stdout)


async def stopped_partitions(place: Place, app: App) -> dict[int, dict[str, Any]]:
    """What `consumer status` says of stopped partitions; its exit code must agree."""
    code, answer = await status(place, app)
    stopped = {row["partition"]: row["stopped"] for row in answer["partitions"] if row["stopped"]}
    assert code == (1 if stopped else 0), answer
    return stopped
