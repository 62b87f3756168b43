"""`consumer dlq erase`: remove the messages of dead letters for good."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from consumer.admin import erase_dead_letters, name_filters
from consumer.admin.erase_dead_letters import Erased
from consumer.admin.ledger_access import with_ledger
from consumer.cli.dlq import FilterFlags
from consumer.cli.dlq_settle import All, Letters, Yes
from consumer.cli.framework import POSTGRES, AppOrName, AsJson, DryRun, command, dlq
from consumer.cli.operators import NeededWhy, Operator, acted_by
from consumer.cli.output import line, print_json
from consumer.cli.per_shard import NamedApp, ShardName, named_app, over
from consumer.cli.settle_run import confirm
from consumer.core.audit import ActedBy
from consumer.core.errors import Misconfigured
from consumer.dead_letters.retry import Filters
from consumer.postgres.protocol import Connection
from consumer.replay.options import key_bytes
from consumer.settings import Settings


@command(dlq, "erase", (*POSTGRES, "wait_"))
def dlq_erase(
    app: AppOrName,
    settings: Settings,
    only: FilterFlags,
    letters: Letters = None,
    key: Annotated[str | None, typer.Option("--key", help="only of messages with this key")] = None,
    why: NeededWhy = None,
    everything: All = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    operator: Operator = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Erase key, payload and headers of dead letters for good.

    Their errors and edits go too, which may quote them. Dead letters of every state are selected. The rows stay, with their ids and order: one that
    is open still holds its key, can be discarded, and cannot be retried. What it does not reach: docs/how-to/privacy.md.
    """  # fmt: skip
    by = acted_by(operator, why, needs_why=True)
    filters = only.filters(letters)
    is_filtered = filters != Filters(filters.dead_letters) or key is not None
    if [filters.dead_letters is not None, is_filtered, everything].count(True) != 1:
        raise Misconfigured(
            "LETTER: dead letters are not selected in exactly one way; name them by number, or by filters (--key, "
            "--older-than, --handler …), or say --all: one of the three"
        )
    named = named_app(app)
    if named.app is not None and named.app.shards and shard is None and filters.dead_letters is not None:
        raise Misconfigured("--shard: each shard numbers its dead letters itself; select one with --shard NAME")
    return over(
        named.app, shard, settings, as_json, lambda on: _erase(named, filters, key, by, on, yes, dry_run, as_json)
    )


async def _erase(
    named: NamedApp,
    filters: Filters,
    key: str | None,
    by: ActedBy,
    settings: Settings,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    async def act(connection: Connection) -> Erased:
        await named.check(connection)
        await name_filters.check(
            connection,
            named.name,
            filters.handler,
            filters.topic,
            filters.group,
            handlers=named.handlers,
            topics=named.topics,
        )
        selection = await erase_dead_letters.select(connection, named.name, filters, key_bytes(key))
        if dry_run or not selection.numbers:
            return Erased(len(selection.numbers), 0, selection.open)
        if not yes:
            confirm(selection.question)
        return await erase_dead_letters.erase(connection, selection, by)

    result = await with_ledger(settings, act)
    if as_json:
        print_json(result.as_dict(dry_run=dry_run))
    elif dry_run:
        line(f"{result.asked:,} dead letters would be erased, {result.open:,} of them open")
    else:
        line(f"{result.erased:,} dead letters were erased, {result.open:,} of them open")
    return 0
