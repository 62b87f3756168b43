"""`consumer replay`: check topics against the ledger, or apply what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from consumer.cli import replay_run
from consumer.cli.framework import AppPath, cli, command
from consumer.cli.operators import Operator, Why, acted_by
from consumer.cli.replay_options import (
    RANGE,
    SETTINGS,
    AllowOutside,
    AnswerFlags,
    Handlers,
    RangeFlags,
    Resume,
    Topics,
    base_sql,
)
from consumer.core.errors import Misconfigured
from consumer.replay.options import Options
from consumer.replay.outgoing_run import OutgoingOptions
from consumer.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ReplayFlags(RangeFlags):
    """Flags of `consumer replay`."""

    message_id: Annotated[
        str | None,
        typer.Option(
            "--message-id", help="only the message with this id, as its producer sent it", rich_help_panel=RANGE
        ),
    ] = None
    handlers: Handlers = None
    apply: Annotated[
        bool, typer.Option("--apply", help="apply what is missing, once, as a worker would; workers may be running")
    ] = False
    assume_unapplied: Annotated[
        bool,
        typer.Option(
            "--assume-unapplied",
            help="treat messages older than the ledger as missing where the check is inconclusive",
        ),
    ] = False
    call_handlers: Annotated[
        bool,
        typer.Option("--call-handlers", help="also call the handlers of missing messages, and undo what they write"),
    ] = False
    outgoing: Annotated[
        bool,
        typer.Option(
            "--outgoing",
            help="compare what the handlers publish with the output topics; they run as in a rebuild, and nothing is kept",
        ),
    ] = False
    base: Annotated[
        Path | None,
        typer.Option(
            "--base", metavar="FILE", help="with --outgoing: SQL that creates the state before the first message"
        ),
    ] = None
    allow_outside: AllowOutside = False
    resume: Resume = False
    why: Why = None
    operator: Operator = None

    def engine_options(self) -> Options | OutgoingOptions:
        """Return the options of the replay itself. Raises Misconfigured."""
        options = Options(
            mode="apply" if self.apply else "check",
            start=self.start,
            end=self.until,
            partitions=tuple(self.partitions or ()),
            key=self.key,
            message_id=self.message_id,
            handlers=tuple(self.handlers or ()),
            assume_unapplied=self.assume_unapplied,
            call_handlers=self.call_handlers,
            allow_outside=self.allow_outside,
        )
        if self.outgoing:
            if self.resume or options != Options(allow_outside=self.allow_outside):
                raise Misconfigured(
                    "--outgoing: it compares the whole of the topics; only --base, --allow-outside, --report and --json go with it"
                )
            return OutgoingOptions(base=base_sql(self.base), allow_outside=self.allow_outside)
        if self.base is not None:
            raise Misconfigured("--base: it goes with --outgoing, and with `consumer rebuild`; leave it out")
        return options


@command(cli, "replay", SETTINGS)
def replay_command(app: AppPath, topics: Topics, settings: Settings, options: ReplayFlags, answer: AnswerFlags) -> Any:
    """Read topics again and prove that nothing is missing or repeated.

    Every message passes through the worker's own code in transactions that are rolled back, and PostgreSQL counts what they
    write. Running workers are not disturbed: no group is joined, no offset is committed. Handlers run only with --apply or
    --call-handlers; the latter refuses connections that handlers open.

    Exit code 0: nothing missing, nothing written. 1: something is. 2: the result is inconclusive.

    With --outgoing all handlers run, and what they publish is compared with the output topics.

    \b
    Examples:
      consumer replay shop:app payments
          check everything that the log holds
      consumer replay shop:app payments --from 24h --until position --json
      consumer replay shop:app payments --apply
          repair what is missing
      consumer replay shop:app payments --apply --handler NEW
          fill a new handler from the topic's history
      consumer replay shop:app payments --outgoing
          prove that the output topics have what the handlers publish
    """
    return replay_run.start(
        app,
        settings,
        topics,
        options.engine_options(),
        answer,
        options.resume,
        acted_by(options.operator, options.why),
    )
