"""`consumer purge`: what of the ledger would go, what holds it back, and, without --dry-run, its going.

Knows the terminal; decides nothing (core/retention.py and retention/task.py do).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from consumer.cli.framework import AsJson, MaybeApp, Refused, cli, command
from consumer.cli.ledger_access import connected
from consumer.cli.output import err, out, print_json
from consumer.cli.per_shard import ShardName, app_or_none, over
from consumer.core.errors import Misconfigured
from consumer.core.message import Partition
from consumer.core.retention import HOUR, LedgerState, RotateGeneration, Step, Wait, contradictions, wanted
from consumer.core.suggestions import UnknownName, suggestion
from consumer.kafka.consumer import KafkaConsumer
from consumer.postgres import generations
from consumer.postgres.connection import database_epoch, translated_errors
from consumer.postgres.handlers import topic_numbers
from consumer.retention import task
from consumer.settings import Settings


@command(cli, "purge", ("kafka_", "postgres_", "allow_insecure", "ledger_", "wait_", "log_"))
def purge_command(
    settings: Settings,
    app: MaybeApp = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            "--older-than", metavar="HOURS", help="keep rows for so long, instead of CONSUMER_LEDGER_RETENTION_HOURS"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="tell what would be done, and change nothing")] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="drop what the log can still deliver, and what another application wants: if it is delivered again, it becomes a dead letter (too_old)",
        ),
    ] = False,
    retired: Annotated[
        str | None,
        typer.Option("--retired", metavar="NAME", help="ignore the retention declared by this decommissioned App"),
    ] = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Drop what of the ledger is older than its retention: whole generations, and no batch is held up.

    Workers do the same in the background when CONSUMER_LEDGER_RETENTION_HOURS is set. A generation goes when its youngest
    row is older than the retention, no log holds a record of its time, and no application wants it for longer. Dead letters
    stay. A message of that time that comes again is never applied: it becomes a dead letter (too_old).
    Exit code 1 when something that is due was held back.
    """
    hours = older_than if older_than is not None else settings.ledger_retention_hours
    if hours is None:
        raise Misconfigured(
            "nothing says how long rows are needed: set CONSUMER_LEDGER_RETENTION_HOURS, or give --older-than HOURS"
        )
    own = settings.ledger_retention_hours
    if not hours >= 0 or (own is not None and hours < own and not force):
        raise Misconfigured(
            f"--older-than {hours:g} is less than CONSUMER_LEDGER_RETENTION_HOURS={own:g}: give one of them, or --force"
            if own is not None and hours >= 0
            else f"--older-than {hours:g}: a number of hours"
        )
    return over(
        app_or_none(app), shard, settings, as_json, lambda each: _purge(each, hours, dry_run, force, retired, as_json)
    )


async def _purge(
    settings: Settings, hours: float, dry_run: bool, force: bool, retired: str | None, as_json: bool
) -> int:
    connection = await connected(settings)
    source = KafkaConsumer(settings, None)
    try:
        with translated_errors(settings):
            await database_epoch(connection, settings)
            voices = await generations.declared(connection)
            if retired is not None:
                if retired not in voices:
                    raise UnknownName(
                        f"--retired {retired[:80]!r}: no application of that name has rows here; {suggestion(retired, voices)}"
                    )
                if not dry_run:
                    await generations.declare(connection, retired, 0)
                voices[retired] = 0
            topics = sorted(await topic_numbers(connection))
        _, longer = wanted(hours, voices)
        policy = task.policy_of(settings, hours)
        policy = policy._replace(
            generation=max(policy.generation, 1 / HOUR)
        )  # --older-than 0: what is not of this second
        await source.start(settings.wait_seconds)
        errors, warnings = contradictions(policy, None, await task.logs_of(settings, topics))
        if longer:
            errors.append(
                f"{', '.join(longer)} {'wants' if len(longer) == 1 else 'want'} rows for longer than {hours:g} hours, or did not say: "
                "set CONSUMER_LEDGER_RETENTION_HOURS there and start it, or --retired NAME if it is decommissioned"
            )
        if errors and not force and not dry_run:
            raise Misconfigured("; ".join(errors) + " (or --force)")

        async def held(at: float) -> Sequence[Partition]:
            return await task.reaching(source, topics, at, settings.ledger_clock_skew_hours)

        async def not_held(at: float) -> Sequence[Partition]:
            return ()

        done: list[dict[str, Any]] = []
        with translated_errors(settings):
            before = await generations.look(connection)
            rows = await generations.estimated_rows(connection)
        plan = [await _told(before, each, hours, held) for each in before.generations]
        if dry_run:
            stopped = None
        else:
            watching = err.status("looking") if err.is_terminal and not as_json else nullcontext()
            with watching as status:

                def told(what: str, step: Step) -> None:
                    number = getattr(step, "number", None)
                    done.append({"done": what, "generation": number})
                    if status is not None:
                        status.update(f"{what}{'' if number is None else f' generation {number}'} ({len(done)} steps)")

                with translated_errors(settings):
                    stopped = await task.keep_up(connection, policy, not_held if force else held, told)
        with translated_errors(settings):
            after = await generations.look(connection)
    finally:
        await source.stop(5)
        connection.terminate()
    found = {
        "dry_run": dry_run,
        "retention_hours": policy.retention,
        "generation_hours": policy.generation,
        "generations": [{**each, "rows": rows.get(each["number"], 0)} for each in plan],
        "done": done,
        "dropped": [each["generation"] for each in done if each["done"] == "dropped"],
        "horizon": _time(after.horizon),
        "objections": errors,
        "warnings": warnings,
        "held_back_by": [f"{each.topic}:{each.partition}" for each in stopped.partitions] if stopped else [],
        "unfinished": bool(stopped and not isinstance(stopped.step, Wait)),
    }
    _print(found, as_json)
    if stopped is not None and stopped.partitions:
        first = stopped.partitions[0]
        raise Refused(
            f"the log of {first.topic}:{first.partition}{' and others' if len(stopped.partitions) > 1 else ''} still holds records of "
            "the generation's time, which may be delivered again: wait until they are gone, or --force"
        )
    if stopped is not None and stopped.waits:
        what = "a turn" if isinstance(stopped.step, RotateGeneration) else "a drop"
        raise Refused(f"{what} waits for a transaction or a reader that does not end: run it again (nothing is lost)")
    return 0


async def _told(state: LedgerState, each: Any, hours: float, held: Any) -> dict[str, Any]:
    """A generation, whether it is due, and why not."""
    drops, why = False, ""
    if each.forgotten:
        drops, why = True, "forgotten: its table goes as soon as nobody reads it"
    elif each.closed_at is None:
        why = "claims go into it"
    elif each.closed_at + hours * HOUR > state.now:
        why = f"closed {(state.now - each.closed_at) / HOUR:,.2f} hours ago, and kept for {hours:g}"
    elif partitions := await held(each.closed_at):
        why = f"the log of {partitions[0].topic}:{partitions[0].partition} still holds records of its time"
    else:
        drops, why = True, f"closed {(state.now - each.closed_at) / HOUR:,.2f} hours ago, more than {hours:g}"
    return {
        "number": each.number,
        "opened_at": _time(each.opened_at),
        "closed_at": _time(each.closed_at),
        "drop": drops,
        "why": why,
    }


def _print(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    drops = "would go" if found["dry_run"] else "was to go"
    table = Table(
        "generation", "from", "to", Column("rows, about", justify="right"), drops, "because",
        title="the ledger", title_justify="left",
    )  # fmt: skip
    for each in found["generations"]:
        table.add_row(
            str(each["number"]),
            each["opened_at"],
            each["closed_at"] or "-",
            f"{each['rows']:,}",
            "yes" if each["drop"] else "no",
            each["why"],
        )
    out.print(table)
    for each in [*found["objections"], *found["warnings"]]:
        out.print(each, markup=False, highlight=False, soft_wrap=True)
    for each in found["done"]:
        number = "" if each["generation"] is None else f" generation {each['generation']}"
        out.print(f"{each['done']}{number}", markup=False, highlight=False)
    horizon = found["horizon"]
    text = f"what is older than {horizon} is too old to judge" if horizon else "nothing was ever dropped"
    out.print(text, markup=False, highlight=False)


def _time(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
