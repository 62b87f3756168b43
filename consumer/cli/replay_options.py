"""Flags that `replay`, `rebuild` and `republish` share, by heading."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from consumer.cli.framework import AsJson
from consumer.core.errors import Misconfigured

RANGE, ANSWER = "Range", "Answer"
SETTINGS = ("kafka_", "postgres_", "allow_insecure", "redis_", "precheck_window", "schema_registry_", "lanes_max", "batch_messages", "parked_", "wait_", "log_")  # fmt: skip

Topics = Annotated[
    list[str], typer.Argument(metavar="TOPIC...", help="topics that the App has handlers of", show_default=False)
]
AllowOutside = Annotated[
    bool,
    typer.Option(
        "--allow-outside",
        help="let handlers and the lifespan connect elsewhere (mail, HTTP, other databases)",
    ),
]
Handlers = Annotated[
    list[str] | None,
    typer.Option("--handler", metavar="NAME", help="only for this handler (may be repeated)", rich_help_panel=RANGE),
]
Resume = Annotated[bool, typer.Option("--resume", help="continue the same run after an interruption")]


@dataclass(frozen=True, kw_only=True)
class RangeFlags:
    """Which records to read."""

    start: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="BOUND",
            help="earliest, position, an offset, a time (2026-11-25T10:00Z; UTC without a zone), or 24h for a day ago",
            rich_help_panel=RANGE,
        ),
    ] = "earliest"
    until: Annotated[
        str,
        typer.Option(
            "--until",
            metavar="BOUND",
            help="where to stop, exclusive: latest, position, an offset, a time, or 10m ago",
            rich_help_panel=RANGE,
        ),
    ] = "latest"
    partitions: Annotated[
        list[int] | None,
        typer.Option("--partition", min=0, help="only this partition (may be repeated)", rich_help_panel=RANGE),
    ] = None
    key: Annotated[str | None, typer.Option("--key", help="only messages with this key", rich_help_panel=RANGE)] = None


@dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """How to print the answer."""

    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="write the answer as an HTML page", rich_help_panel=ANSWER),
    ] = None
    metrics: Annotated[
        Path | None,
        typer.Option(
            "--metrics",
            metavar="FILE",
            help="write the verdict for the textfile collector of Prometheus' node exporter (FILE.prom)",
            rich_help_panel=ANSWER,
        ),
    ] = None
    as_json: AsJson = False


def base_sql(path: Path | None) -> str | None:
    """Return the text of --base. Raises Misconfigured if it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Misconfigured(
            f"--base {path}: {getattr(error, 'strerror', None) or error}; name a text file that can be read"
        ) from None
