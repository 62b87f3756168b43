"""`consumer show`: what became of one message."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from consumer.admin.ledger_access import with_ledger
from consumer.admin.messages import find_message
from consumer.cli.framework import POSTGRES, AppOrName, AsJson, cli, command
from consumer.cli.output import line, print_json
from consumer.cli.per_shard import NamedApp, ShardName, named_app, over
from consumer.core.errors import Misconfigured
from consumer.postgres.protocol import Connection
from consumer.settings import Settings


@command(cli, "show", (*POSTGRES, "wait_"))
def show(
    app: AppOrName,
    message_id: Annotated[
        str,
        typer.Argument(
            metavar="MESSAGE_ID",
            help="the id as its producer sent it (after -- when it begins with a dash)",
            show_default=False,
        ),
    ],
    settings: Settings,
    hexadecimal: Annotated[bool, typer.Option("--hex", help="MESSAGE_ID is the id's bytes in hexadecimal")] = False,
    source: Annotated[str | None, typer.Option("--source", help="the source, for the id of a CloudEvent")] = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Show when, from where and by which handler a message was applied.

    Also the calls of other systems for it, with their idempotency keys.

    Exit code 1 when the App does not know the id.
    """
    id: str | bytes = message_id
    if hexadecimal:
        try:
            id = bytes.fromhex(message_id)
        except ValueError:
            raise Misconfigured(f"--hex {message_id}: not hexadecimal; write two digits for each byte") from None
    return _show_in_shards(named_app(app), shard, id, source, settings, as_json)


async def _show_in_shards(
    app: NamedApp, shard: str | None, id: str | bytes, source: str | None, settings: Settings, as_json: bool
) -> int:
    codes: list[int] = []

    async def run(on: Settings) -> int:
        codes.append(await _show(app, id, source, on, as_json))
        return 0

    await over(app.app, shard, settings, as_json, run)
    return min(codes)  # an id that one shard knows is known


async def _show(app: NamedApp, id: str | bytes, source: str | None, settings: Settings, as_json: bool) -> int:
    async def ask(connection: Connection) -> dict[str, Any]:
        await app.check(connection)
        return await find_message(connection, app.name, id, source)

    answer = await with_ledger(settings, ask)
    if as_json:
        print_json(answer)
    elif not answer["handlers"] and not answer["effects"]:
        line(f"unknown: no handler of {app.name!r} has applied this id, and it is no dead letter")
    else:
        for handler in answer["handlers"]:
            place = f"{handler['topic']}:{handler['partition']}:{handler['offset']}"
            text = f"{handler['state']} by {handler['app']}/{handler['handler']} at {handler['at']} from {place}"
            if handler["letter"]:
                text += f" ({handler['reason']}; consumer dlq show APP {handler['letter']})"
            line(text)
        for call in answer["effects"]:
            result = f"result known since {call['result_at']}" if call["result_at"] else "its result is not known"
            line(
                f"called by {app.name}/{call['handler']} with idempotency key {call['key']}: {call['calls']} since "
                f"{call['first_call_at']}; {result}"
            )
    return 0 if answer["handlers"] or answer["effects"] else 1
