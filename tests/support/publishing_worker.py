"""A publishing worker that ends or stops itself at a step.

`publishing_worker.py TOPIC OUT APP STEP NTH [stop]`. Settings come from the environment. The steps are those of
crash_worker.py and of the relay.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import prefork
from crash_worker import CrashAt, after_sending, stop_itself
from harness import ROOT
from replacing import replace

from consumer import App, Message, Settings, Tx
from consumer.logs import configure
from consumer.postgres.session import Session
from consumer.settings import load
from consumer.worker.worker import Worker


def app_of(topic: str, out: str, name: str) -> App:
    """Forward every message, with an effect."""
    app = App(name, publishes=[out])

    @app.handler(topic)
    async def forward(message: Message[dict[str, Any]], tx: Tx) -> None:
        tx.defer("insert into effects values ($1, 1, 1)", str(message.value["n"]))
        tx.publish(out, message.value, key=message.key)

    return app


def started(
    settings: Settings, topic: str, out: str, app: str, step: str, nth: int, log: Path, *more: str
) -> prefork.Process:
    """Start it as a process that logs to a file."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
    script = str(Path(__file__))
    with log.open("ab") as stderr:
        program = [script, topic, out, app, step, str(nth), *more]
        return prefork.start(program, {**clean, **settings.dump(), "PYTHONPATH": str(ROOT)}, stderr, stdout=stderr)


def main() -> None:
    topic, out, name, wanted, nth = sys.argv[1:6]
    step = CrashAt(wanted, int(nth), stop_itself if "stop" in sys.argv[6:] else lambda: os._exit(137))
    replace(Session, "commit", after_sending(step))
    settings = load()
    configure("debug", "json")
    asyncio.run(Worker(app_of(topic, out, name), settings, on_step=step).run())


if __name__ == "__main__":
    main()
