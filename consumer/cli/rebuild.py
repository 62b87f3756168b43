"""`consumer rebuild`: compare the handlers' tables with what the topics say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from consumer.cli import replay_run
from consumer.cli.framework import AppPath, cli, command
from consumer.cli.replay_options import SETTINGS, AllowOutside, AnswerFlags, Handlers, Topics, base_sql
from consumer.replay.rebuild_run import RebuildOptions
from consumer.settings import Settings


@dataclass(frozen=True, kw_only=True)
class RebuildFlags:
    """Flags of `consumer rebuild`."""

    handlers: Handlers = None
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", help="do not compare this column, or TABLE.COLUMN (may be repeated)"),
    ] = None
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", help="compare this column although it is usually left out (may be repeated)"),
    ] = None
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="FILE", help="SQL that creates the state before the first message"),
    ] = None
    trace: Annotated[bool, typer.Option("--trace/--no-trace", help="find the messages behind the differences")] = True
    allow_outside: AllowOutside = False

    def engine_options(self) -> RebuildOptions:
        """Return the options of the rebuild.

        Raises Misconfigured if --base cannot be read.
        """
        return RebuildOptions(
            handlers=tuple(self.handlers or ()),
            ignore=tuple(self.ignore or ()),
            compare=tuple(self.compare or ()),
            base=base_sql(self.base),
            trace=self.trace,
            allow_outside=self.allow_outside,
        )


@command(cli, "rebuild", SETTINGS)
def rebuild_command(
    app: AppPath, topics: Topics, settings: Settings, options: RebuildFlags, answer: AnswerFlags
) -> Any:
    """Rebuild tables from their topics, and compare them with the real ones.

    Runs the handlers on empty copies of their tables, with every message up to the positions. What the handlers write is
    rolled back, and connections that they open are refused.

    Exit code 0: no difference. 1: differences. 2: the result is inconclusive.

    \b
    Examples:
      consumer rebuild shop:app payments refunds
      consumer rebuild shop:app payments --ignore accounts.updated_at --json
    """
    return replay_run.start(app, settings, topics, options.engine_options(), answer)
