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
from consumer.cli.output import collecting, out, print_json
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
    """Run a command on each shard or on one.

    Returns the worst exit code. A shard that fails does not prevent the answers of the others. Raises Misconfigured at the end with the errors of all
    shards, and at once for an unknown shard. A filter must be known to one shard at least.
    """
    if app is None or not app.shards:
        if shard is not None:
            of = (
                "give the App as the first argument, as module:attribute"
                if app is None
                else f"App {app.name!r} has no shards"
            )
            raise Misconfigured(f"--shard {shard}: {of}")
        return await run(settings)
    found = shards.settings_of(app, settings)
    if shard is not None and shard not in found:
        raise Misconfigured(f"--shard {shard[:40]!r}: not known to App {app.name!r}; {suggestion(shard, found)}")
    wanted = [shard] if shard is not None else list(found)
    code = 0
    answers: dict[str, object] = {}
    faults: dict[str, str] = {}
    unknown: dict[str, UnknownName] = {}
    for name in wanted:
        if not as_json:
            out.print(f"shard {name}:", markup=False, highlight=False)
        try:
            with collecting() as collected:
                code = max(code, await run(found[name]))
            answers[name] = collected[0] if collected else None
        except UnknownName as error:
            unknown[name] = error
            answers[name] = []
        except (ConsumerError, KafkaError, TimeoutError, OSError) as error:
            faults[name] = str(error) or type(error).__name__
        except Refused as refused:  # by one, which says nothing of the others
            code = max(code, 1)
            if not as_json:
                out.print(str(refused), markup=False, highlight=False)
    if len(unknown) == len(wanted):
        raise unknown[wanted[0]]
    if as_json:
        print_json({"shards": answers, "failed": faults})
    if faults:
        done = f" (done: {', '.join(answers)})" if answers else ""
        raise Misconfigured("; ".join(f"shard {name}: {text}" for name, text in faults.items()) + done)
    return code


class NamedApp(NamedTuple):
    """The App that a command asks about.

    app: None where only its name in the ledger is given.
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
