"""`consumer republish`: copy records to another topic with their message ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from consumer.cli import replay_run
from consumer.cli.framework import AppPath, cli, command
from consumer.cli.replay_options import SETTINGS, AnswerFlags, RangeFlags, Resume, Topics
from consumer.replay.republish_run import RepublishOptions
from consumer.settings import Settings


@dataclass(frozen=True, kw_only=True)
class RepublishFlags(RangeFlags):
    """Flags of `consumer republish`."""

    to: Annotated[str, typer.Option("--to", metavar="TOPIC", help="the topic to copy to")]
    resume: Resume = False

    def engine_options(self) -> RepublishOptions:
        """Return the options of the republication itself."""
        return RepublishOptions(
            start=self.start,
            end=self.until,
            partitions=tuple(self.partitions or ()),
            key=self.key,
            target=self.to,
        )


@command(cli, "republish", SETTINGS)
def republish_command(
    app: AppPath, topics: Topics, settings: Settings, options: RepublishFlags, answer: AnswerFlags
) -> Any:
    """Copy records to another topic with their message ids.

    A consumer of both topics applies each message once.

    \b
    Examples:
      consumer republish shop:app payments --to payments2
      consumer republish shop:app payments --to payments2
          --from 24h --until position
    """
    return replay_run.start(app, settings, topics, options.engine_options(), answer, options.resume)
