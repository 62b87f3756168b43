"""Commands over the shards of an App: the same answer from each database, one after the other.

Knows the terminal; what is asked is the command's own. Without shards the command is asked once, as if this were not here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

import typer

from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.framework import Refused
from consumer.cli.output import collecting, out, print_json
from consumer.core.errors import ConsumerError, Misconfigured
from consumer.core.suggestions import UnknownName, suggestion
from consumer.kafka.errors import KafkaError
from consumer.settings import Settings
from consumer.sharding import shards

ShardsOf = Annotated[
    str | None,
    typer.Option(
        "--shards", metavar="APP", help="the databases of this App's shards, instead of CONSUMER_POSTGRES_DSN"
    ),
]
ShardName = Annotated[
    str | None, typer.Option("--shard", metavar="NAME", help="only this shard, of an App that has shards")
]
Run = Callable[[Settings], Awaitable[int]]


async def over(app: App | str | None, shard: str | None, settings: Settings, as_json: bool, run: Run) -> int:
    """Run a command on each shard, or on the one that is named. Returns the worst exit code.

    One that fails does not keep the others from being asked, nor their answers from being printed. Raises Misconfigured at the end,
    with what each said; at once for a shard that is none. A name that one shard knows need not be known to the others.
    """
    if isinstance(app, str):
        app = load_app(app)
        if not app.shards:
            raise Misconfigured(f"--shards: App {app.name!r} has no shards: leave it out")
    if app is None or not app.shards:
        if shard is not None:
            of = "name the App with --shards APP" if app is None else f"App {app.name!r} has no shards"
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
