"""`consumer show`: what became of one message."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from consumer.admin import report
from consumer.cli.framework import POSTGRES, AsJson, cli, command
from consumer.cli.ledger_access import with_ledger
from consumer.cli.output import out, print_json
from consumer.cli.per_shard import ShardName, ShardsOf, over
from consumer.core.errors import Misconfigured
from consumer.settings import Settings


@command(cli, "show", (*POSTGRES, "wait_"))
def show(
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
    shards_of: ShardsOf = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """What became of a message: when, from where, by which handler; exit 1 when it is unknown."""
    wanted: str | bytes = message_id
    if hexadecimal:
        try:
            wanted = bytes.fromhex(message_id)
        except ValueError:
            raise Misconfigured(f"--hex {message_id}: not hexadecimal") from None
    return _show_in(shards_of, shard, wanted, source, settings, as_json)


async def _show_in(
    path: str | None, shard: str | None, wanted: str | bytes, source: str | None, settings: Settings, as_json: bool
) -> int:
    codes: list[int] = []

    async def run(on: Settings) -> int:
        codes.append(await _show(wanted, source, on, as_json))
        return 0

    await over(path, shard, settings, as_json, run)
    return min(codes)  # known to one of them is known


async def _show(wanted: str | bytes, source: str | None, settings: Settings, as_json: bool) -> int:
    found = await with_ledger(settings, lambda connection: report.find_message(connection, wanted, source))
    if as_json:
        print_json(found)
        return 0 if found["handlers"] else 1
    if not found["handlers"]:
        out.print("unknown: no handler has applied this id, and it is no dead letter", markup=False)
        return 1
    for each in found["handlers"]:
        line = f"{each['state']} by {each['app']}/{each['handler']} at {each['at']} from {each['topic']}:{each['partition']}:{each['offset']}"
        if each["letter"]:
            line += f" ({each['reason']}; consumer dlq show {each['letter']})"
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0
