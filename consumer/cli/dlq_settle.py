"""`consumer dlq retry` and `dlq discard`: check the arguments; settle_run.py settles.

Exit codes: 0 all that was asked for is settled, 1 something is not, 2 bad input or a service does not answer, 130 and 143 a
signal.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from consumer.admin.settle_dead_letters import SettleOptions
from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.dlq import FilterFlags
from consumer.cli.framework import POSTGRES, AppPath, AsJson, DryRun, command, dlq
from consumer.cli.operators import NeededWhy, Operator, Why, acted_by
from consumer.cli.per_shard import ShardName
from consumer.cli.settle_run import Answering, settle_all
from consumer.core.errors import Misconfigured
from consumer.core.suggestions import suggestion
from consumer.dead_letters.edits import Edit, edit_of
from consumer.dead_letters.retry import Filters
from consumer.settings import Settings
from consumer.sharding.shards import settings_of

All = Annotated[bool, typer.Option("--all", help="all open dead letters of the App", rich_help_panel="Filters")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]
Letters = Annotated[
    list[int] | None,
    typer.Argument(metavar="[LETTER]...", min=1, max=2**63 - 1, help="numbers, as `consumer dlq list` shows them", show_default=False),
]  # fmt: skip


@command(dlq, "retry", (*POSTGRES, "schema_registry_", "dead_letter_topic", "wait_", "log_"))
def dlq_retry(
    app: AppPath,
    settings: Settings,
    only: FilterFlags,
    letters: Letters = None,
    everything: All = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    value: Annotated[
        str | None,
        typer.Option(
            "--value", metavar="FILE", help="run ONE dead letter with this payload instead (- is standard input)"
        ),
    ] = None,
    same_id: Annotated[
        bool, typer.Option("--same-id", help="with --value: it is the same intent, under the same message id")
    ] = False,
    new_id: Annotated[
        str | None,
        typer.Option(
            "--new-id",
            metavar="ID",
            help="with --value: it is another intent, under this message id (auto: one made from the dead letter)",
        ),
    ] = None,
    why: Why = None,
    operator: Operator = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Run the handlers of dead letters again.

    Runs here, in batches, and then what waits behind them. A message keeps its id, so its effects count once, even if it is also retried elsewhere or comes
    again from Kafka. One that fails again stays a dead letter with one attempt more, and those behind it go on waiting.
    Filters and --all leave out dead letters whose messages may have been applied already (too_old), unless --reason too_old
    names them.

    \b
    Examples:
      consumer dlq retry shop:app 17
      consumer dlq retry shop:app --group 5f2a90c1de --yes
          all with one kind of error
      consumer dlq retry shop:app --handler settle --older-than 1h --dry-run
      consumer dlq retry shop:app 17 --value mended.json --same-id
    """  # fmt: skip
    edit = _edit(letters, value, same_id, new_id)
    filters = only.filters(letters)
    _check_selected(filters, everything)
    loaded, on = _app_and_database(app, settings, shard)
    by = acted_by(operator, why)
    return settle_all(loaded, on, filters, SettleOptions(edit=edit), Answering(by, yes, dry_run, as_json))


@command(dlq, "discard", (*POSTGRES, "dead_letter_topic", "wait_", "log_"))
def dlq_discard(
    app: AppPath,
    settings: Settings,
    only: FilterFlags,
    letters: Letters = None,
    why: NeededWhy = None,
    everything: All = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    operator: Operator = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Settle dead letters without applying them.

    Their messages are never applied. Those that wait behind them run, here. The dead letter stays as a record, with who
    discarded it and why; a message that comes again under its id is a duplicate.
    """
    by = acted_by(operator, why, needs_why=True)
    filters = only.filters(letters)
    _check_selected(filters, everything)
    loaded, on = _app_and_database(app, settings, shard)
    return settle_all(loaded, on, filters, SettleOptions(why=by.why), Answering(by, yes, dry_run, as_json))


def _app_and_database(path: str, settings: Settings, shard: str | None) -> tuple[App, Settings]:
    """Return the App, and the settings of the selected database."""
    app = load_app(path)
    by_shard = settings_of(app, settings)
    if app.shards and shard is None:
        raise Misconfigured(
            f"--shard: each shard of App {app.name!r} has its own dead letters; choose one of {', '.join(by_shard)}"
        )
    if shard is not None and shard not in app.shards:
        raise Misconfigured(f"--shard {shard[:40]!r}: not known to App {app.name!r}; {suggestion(shard, app.shards)}")
    return app, by_shard[shard or ""]


def _check_selected(filters: Filters, everything: bool) -> None:
    """Raise Misconfigured unless dead letters are selected in exactly one way."""
    is_filtered = filters != Filters(filters.dead_letters)
    if [filters.dead_letters is not None, is_filtered, everything].count(True) != 1:
        raise Misconfigured(
            "LETTER: dead letters are not selected in exactly one way; name them by number, or by filters (--handler, "
            "--reason, --group …), or say --all: one of the three"
        )


def _edit(letters: list[int] | None, value: str | None, same_id: bool, new_id: str | None) -> Edit | None:
    if value is None:
        if same_id or new_id is not None:
            raise Misconfigured("--same-id and --new-id: no effect alone; they go with --value FILE")
        return None
    if letters is None or len(letters) != 1:
        raise Misconfigured("--value: one payload is for one dead letter; it goes with exactly one LETTER")
    if same_id == (new_id is not None):
        raise Misconfigured(
            "--value: the id is not clear; choose --same-id (the same intent, mended: it stays one message, under its id) or "
            "--new-id ID (another intent: the dead letter is discarded, and this one is applied once, under that id)"
        )
    if new_id == "":
        raise Misconfigured("--new-id: an empty id; give one, or auto")
    try:
        payload = sys.stdin.buffer.read() if value == "-" else Path(value).read_bytes()
    except OSError as error:
        raise Misconfigured(f"--value {value}: {error.strerror or error}; name a file that can be read") from None
    return edit_of(letters[0], payload, new_id)
