"""`consumer run` as a process, with the App of worker_app."""

from __future__ import annotations

import signal
import uuid
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from harness import Command, Place, Sent, drained, running, running_program, until
from payments_app import payment

from consumer import App, Tx

RUN = ["run", "worker_app:app"]


class Service:
    """`consumer run worker_app:app` on a topic of its own."""

    def __init__(self, place: Place, topic: str, directory: Path, **settings: Any) -> None:
        self.place = place
        self.topic = topic
        self.name = f"workers-{uuid.uuid4().hex[:8]}"
        self.settings = place.settings(**settings)
        self.directory = directory

    def run(self, workers: int = 1, name: str = "run") -> AbstractAsyncContextManager[Command]:
        environment = {"TEST_APP": self.name, "TEST_TOPIC": self.topic}
        command = [*RUN, "--workers", str(workers)]
        return running(command, self.settings, self.directory / name, **environment)

    def run_with(self, *arguments: str, **environment: str) -> AbstractAsyncContextManager[Command]:
        """Run a program, no fork, with more arguments and variables."""
        environment = {"TEST_APP": self.name, "TEST_TOPIC": self.topic, **environment}
        return running_program([*RUN, *arguments], self.settings, self.directory / "run", **environment)

    @property
    def app(self) -> App:
        """The same app, for counting."""
        app = App(self.name)

        @app.handler(self.topic)
        async def settle(body: bytes, tx: Tx) -> None: ...

        @app.handler(self.topic)
        async def record(body: bytes, tx: Tx) -> None: ...

        return app

    async def settled(self, seconds: float = 60) -> None:
        await drained(self.app, self.settings, seconds)

    async def opened(self, command: Command, partitions: int, workers: int = 1) -> None:
        """Wait until so many workers have partitions, together so many."""

        async def all_open() -> bool:
            newest: dict[int, int] = {}
            for event in command.events():
                if event["event"] == "partitions opened":
                    newest[event["pid"]] = event["count"]
                elif event["event"] == "partitions revoked":
                    newest.pop(event["pid"], None)
            return len(newest) >= workers and sum(newest.values()) >= partitions

        await until(f"{partitions} partitions to be opened", all_open)

    async def stop(self, command: Command, code: int = 0) -> None:
        command.process.send_signal(signal.SIGTERM)
        assert await command.wait() == code, command.errors[-2000:]


def message(name: str, account: int, amount: int = 1, partition: int | None = None) -> Sent:
    return payment(name, account, amount, partition=partition)
