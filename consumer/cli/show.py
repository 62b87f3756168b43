"""`consumer show`: what became of one message."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from consumer.admin import report
from consumer.cli.framework import POSTGRES, AppOrName, AsJson, cli, command
from consumer.cli.ledger_access import with_ledger
from consumer.cli.output import out, print_json
from consumer.cli.per_shard import NamedApp, ShardName, named_app, over
from consumer.core.errors import Misconfigured
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
    """Show when, from where and by which handler of the App a message was applied.

    Exit code 1 when the id is unknown.
    """
    wanted: str | bytes = message_id
    if hexadecimal:
        try:
            wanted = bytes.fromhex(message_id)
        except ValueError:
            raise Misconfigured(f"--hex {message_id}: not hexadecimal") from None
    return _show_in(named_app(app), shard, wanted, source, settings, as_json)


async def _show_in(
    app: NamedApp, shard: str | None, wanted: str | bytes, source: str | None, settings: Settings, as_json: bool
) -> int:
    codes: list[int] = []

    async def run(on: Settings) -> int:
        codes.append(await _show(app, wanted, source, on, as_json))
        return 0

    await over(app.app, shard, settings, as_json, run)
    return min(codes)  # known to one of them is known


async def _show(app: NamedApp, wanted: str | bytes, source: str | None, settings: Settings, as_json: bool) -> int:
    async def ask(connection: Any) -> dict[str, Any]:
        await app.check(connection)
        return await report.find_message(connection, app.name, wanted, source)

    found = await with_ledger(settings, ask)
    if as_json:
        print_json(found)
        return 0 if found["handlers"] else 1
    if not found["handlers"]:
        out.print(f"unknown: no handler of {app.name!r} has applied this id, and it is no dead letter", markup=False)
        return 1
    for each in found["handlers"]:
        line = f"{each['state']} by {each['app']}/{each['handler']} at {each['at']} from {each['topic']}:{each['partition']}:{each['offset']}"
        if each["letter"]:
            line += f" ({each['reason']}; consumer dlq show APP {each['letter']})"
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0
