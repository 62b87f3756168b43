"""`consumer asyncapi`: describe the topics of an App for other teams."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from consumer.admin.asyncapi import document
from consumer.app_loader import load_app
from consumer.cli.framework import AppPath, cli, command


@command(cli, "asyncapi")
def asyncapi(
    app: AppPath,
    api_version: Annotated[
        str, typer.Option("--api-version", metavar="VERSION", help="version of the interface, as you count it")
    ] = "1.0.0",
) -> int:
    """Print an AsyncAPI 3.0 document of an App, as JSON.

    Channels are its topics; operations its handlers (receive) and the topics
    of publishes= (send). Payloads are JSON Schemas of the types that handlers
    declare, headers those that identify a message, descriptions the handlers'
    docstrings. Asks no service and needs no settings.

    \b
    Examples:
      consumer asyncapi shop:app > asyncapi.json
      consumer asyncapi shop:app --api-version 2.1.0 > asyncapi.json
    """
    print(json.dumps(document(load_app(app), api_version), indent=2, ensure_ascii=False))
    return 0
