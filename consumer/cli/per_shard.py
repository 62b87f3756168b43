"""Run a command on each shard of an App in turn.

Without shards the command runs once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NamedTuple

import typer

from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.framework import Refused
from consumer.cli.output import collecting, line, print_json
from consumer.core.errors import ConsumerError, Misconfigured
from consumer.core.suggestions import UnknownName, check_known, suggestion
from consumer.kafka.errors import KafkaError
from consumer.postgres.handlers import apps
from consumer.settings import Settings
from consumer.sharding import shards

ShardName = Annotated[
    str | None, typer.Option("--shard", metavar="NAME", help="only this shard, of an App that has shards")
]
Run = Callable[[Settings], Awaitable[int]]


async def over(app: App | None, shard: str | None, settings: Settings, as_json: bool, run: Run) -> int:
    """Run a command on each shard, or on one.

    Returns the worst exit code. A shard that fails does not prevent the answers of the others. Raises Misconfigured at once
    for an unknown shard, and at the end with the errors of all shards. A filter must be known to at least one shard.
    """
    if app is None or not app.shards:
        if shard is not None:
            raise Misconfigured(
                f"--shard {shard}: no App is given; give it as the first argument, as module:attribute"
                if app is None
                else f"--shard {shard}: App {app.name!r} has no shards; leave out --shard"
            )
        return await run(settings)
    by_shard = shards.settings_of(app, settings)
    if shard is not None and shard not in by_shard:
        raise Misconfigured(f"--shard {shard[:40]!r}: not known to App {app.name!r}; {suggestion(shard, by_shard)}")
    selected = [shard] if shard is not None else list(by_shard)
    results = _Results()
    for name in selected:
        if not as_json:
            line(f"shard {name}:")
        await results.add(name, run(by_shard[name]), as_json)
    if len(results.unknown) == len(selected):
        raise results.unknown[selected[0]]
    if as_json:
        print_json({"shards": results.answers, "failed": results.faults})
    if results.faults:
        answered = f" (done: {', '.join(results.answers)})" if results.answers else ""
        faults = "; ".join(f"shard {name}: {text}" for name, text in results.faults.items())
        raise Misconfigured(faults + answered)
    return results.code


class _Results:
    """What the shards answered."""

    def __init__(self) -> None:
        self.code = 0
        self.answers: dict[str, object] = {}
        self.faults: dict[str, str] = {}
        self.unknown: dict[str, UnknownName] = {}

    async def add(self, shard: str, answer: Awaitable[int], as_json: bool) -> None:
        try:
            with collecting() as collected:
                self.code = max(self.code, await answer)
            self.answers[shard] = collected[0] if collected else None
        except UnknownName as error:
            self.unknown[shard] = error
            self.answers[shard] = []
        except (ConsumerError, KafkaError, TimeoutError, OSError) as error:
            self.faults[shard] = str(error) or type(error).__name__
        except Refused as refused:  # by one shard, which says nothing of the others
            self.code = max(self.code, 1)
            if not as_json:
                line(str(refused))


class NamedApp(NamedTuple):
    """The App that a command asks about.

    app: None if only its name in the ledger is given.
    """

    name: str
    app: App | None = None

    @property
    def handlers(self) -> tuple[str, ...]:
        return tuple(self.app.handlers) if self.app is not None else ()

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(self.app.topics) if self.app is not None else ()

    async def check(self, connection: Any) -> None:
        """Raise UnknownName for a bare name that the ledger does not hold."""
        if self.app is None:
            check_known("APP", self.name, await apps(connection), "this database")


def named_app(text: str) -> NamedApp:
    """Return the App of an argument APP.

    Text without a colon is its name. Raises Misconfigured.
    """
    if ":" not in text:
        return NamedApp(text)
    app = load_app(text)
    return NamedApp(app.name, app)


def app_or_none(path: str | None) -> App | None:
    """Load the App of an optional argument APP. Raises Misconfigured."""
    return None if path is None else load_app(path)
