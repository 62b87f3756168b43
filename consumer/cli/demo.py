"""`consumer demo`: duplicates and a killed worker, on its own servers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from consumer.cli.framework import AsJson, cli, command


@command(cli, "demo")
def demo(
    payments: Annotated[int, typer.Option("--payments", min=100, max=1_000_000, help="messages to produce")] = 20_000,
    workers: Annotated[int, typer.Option("--workers", metavar="NUMBER", min=2, max=8, help="worker processes")] = 2,
    as_json: AsJson = False,
) -> Any:
    """Produce duplicates, kill a worker, and show that every balance is right.

    Starts an embedded broker, PostgreSQL and Valkey of its own, and removes them at the end.
    """
    from consumer.demo import Demo  # its servers are an extra

    return Demo(payments, workers, as_json=as_json).run()
