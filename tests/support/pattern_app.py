"""The App of `consumer run pattern_app:app`: a handler of a pattern.

Name and prefix of the topics come from the environment. New topics are noticed within a second, not ten.
"""

from __future__ import annotations

import os
import re
from typing import Any

from consumer import App, Message, Tx
from consumer.kafka import consumer

consumer.METADATA_SECONDS = 1
INSERT = "insert into effects values ($1, 1, 1)"
PREFIX = os.environ.get("TEST_PREFIX", "pattern-app")


def pattern_app(prefix: str, name: str, *handlers: str) -> App:
    """An App whose handlers write from which topic a message came.

    They match PREFIX.eu and PREFIX.us.
    """
    app = App(name)

    def add(handler: str) -> None:
        @app.handler(topics=re.compile(rf"{prefix}\.(eu|us)"), name=handler)
        async def handle(message: Message[dict[str, Any]], tx: Tx) -> None:
            tx.defer(INSERT, f"{handler}{message.topic.removeprefix(prefix)} {message.value['id']}")

    for handler in handlers:
        add(handler)
    return app


app = pattern_app(PREFIX, os.environ.get("TEST_APP", "pattern-app"), "settle")
both = pattern_app(PREFIX, app.name, "settle", "record")  # a later version
