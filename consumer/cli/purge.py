"""`consumer purge`: print which old generations of the ledger are dropped.

admin/purge.py decides and acts.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any

import typer
from rich.table import Table

from consumer.admin.purge import PurgeOptions, purge
from consumer.admin.purge_plan import hours_to_keep
from consumer.cli.framework import AsJson, DryRun, MaybeApp, Refused, cli, command
from consumer.cli.operators import Operator, Why, acted_by
from consumer.cli.output import err, line, names, numbers, print_json, show
from consumer.cli.per_shard import ShardName, app_or_none, over
from consumer.settings import Settings


@command(cli, "purge", ("kafka_", "postgres_", "allow_insecure", "ledger_", "wait_", "log_"))
def purge_command(
    settings: Settings,
    app: MaybeApp = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than",
            metavar="AGE",
            help="keep rows for so long, instead of CONSUMER_LEDGER_RETENTION_HOURS: 24h, 7d, or a number of hours",
        ),
    ] = None,
    dry_run: DryRun = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="also drop what the log can still deliver, and what another App needs: a message that comes again then becomes "
            "a dead letter (too_old)",
        ),
    ] = False,
    retired: Annotated[
        str | None,
        typer.Option("--retired", metavar="NAME", help="ignore the retention declared by this decommissioned App"),
    ] = None,
    why: Why = None,
    operator: Operator = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Drop generations of the ledger that are older than the retention.

    No batch waits for it. Workers do the same in the background when CONSUMER_LEDGER_RETENTION_HOURS is set. A generation is
    dropped when its youngest row is older than the retention, no log holds a record of its time, and no App needs it for
    longer. Dead letters stay. A message of that time that comes again is never applied: it becomes a dead letter (too_old).

    Exit code 1 when something that is due was held back.
    """
    hours = hours_to_keep(older_than, settings.ledger_retention_hours, force)
    options = PurgeOptions(hours=hours, dry_run=dry_run, force=force, retired=retired, by=acted_by(operator, why))
    return over(app_or_none(app), shard, settings, as_json, lambda on: _purge(on, options, as_json))


async def _purge(settings: Settings, options: PurgeOptions, as_json: bool) -> int:
    is_shown = err.is_terminal and not as_json and not options.dry_run
    with err.status("looking") if is_shown else nullcontext() as status:
        steps = 0

        def on_step(what: str, generation: int | None) -> None:
            nonlocal steps
            steps += 1
            if status is not None:
                number = "" if generation is None else f" generation {generation}"
                status.update(f"{what}{number} ({steps} steps)")

        answer, refusal = await purge(settings, options, on_step)
    if as_json:
        print_json(answer)
    else:
        print_answer(answer)
    if refusal is not None:
        raise Refused(refusal)
    return 0


def print_answer(answer: dict[str, Any]) -> None:
    drops = "would drop" if answer["dry_run"] else "drop"
    table = Table(*numbers("generation"), *names("from", "to"), *numbers("rows, about"), *names(drops), "because")
    for generation in answer["generations"]:
        table.add_row(
            str(generation["number"]),
            generation["opened_at"],
            generation["closed_at"] or "-",
            f"{generation['rows']:,}",
            "yes" if generation["drop"] else "no",
            generation["why"],
        )
    show(table, "generations of the ledger")
    for text in [*answer["objections"], *answer["warnings"]]:
        line(text)
    for step in answer["done"]:
        line(step["done"] if step["generation"] is None else f"{step['done']} generation {step['generation']}")
    horizon = answer["horizon"]
    line(f"what is older than {horizon} is too old to judge" if horizon else "nothing was ever dropped")
