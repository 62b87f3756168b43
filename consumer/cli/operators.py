"""Who acts, and why: the flags of commands that are recorded."""

from __future__ import annotations

from typing import Annotated

import typer

from consumer.admin.operators import system_user
from consumer.core.audit import ActedBy
from consumer.core.errors import Misconfigured

_RECORD = "Record"
Operator = Annotated[
    str | None,
    typer.Option(
        "--operator", help="who does it, for the record (default: the user of the system)", rich_help_panel=_RECORD
    ),
]
Why = Annotated[
    str | None, typer.Option("--why", metavar="TEXT", help="the reason, for the record", rich_help_panel=_RECORD)
]
NeededWhy = Annotated[
    str | None,
    typer.Option("--why", metavar="TEXT", help="the reason, for the record (required)", rich_help_panel=_RECORD),
]


def acted_by(operator: str | None, why: str | None, *, needs_why: bool = False) -> ActedBy:
    """Return who acts. Raises Misconfigured without a reason where one is needed."""
    reason = (why or "").strip()
    if needs_why and not reason:
        raise Misconfigured("--why: no reason is given; say --why TEXT, which is kept on record")
    return ActedBy((operator or "").strip() or system_user(), reason)
