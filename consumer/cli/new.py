"""`consumer new`: write a small service into a new folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consumer.cli.framework import AsJson, cli, command
from consumer.cli.output import line, print_json
from consumer.new_service import writing


@command(cli, "new")
def new(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="of the service: its folder, package, Kafka group and database", show_default=False
        ),
    ],
    as_json: AsJson = False,
) -> int:
    """Write a small service into a new folder.

    A package with an App, models and a handler; tables; tests that pass; docker-compose.yml with Kafka, PostgreSQL and
    Valkey; a Dockerfile, .env, and a README with the commands to run. It contacts no service, and writes into no folder that
    has files.
    """
    here = Path.cwd()
    files = writing.write(name, here)
    app = f"{name}.handlers:app"
    if as_json:
        print_json({"name": name, "app": app, "directory": str(here / name), "files": files})
        return 0
    for file in files:
        line(f"{name}/{file}")
    line(f"the App is {app}; {name}/README.md has the commands to test and run it")
    return 0
