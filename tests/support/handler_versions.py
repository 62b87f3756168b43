"""Versions of an App that differ in their handlers."""

from __future__ import annotations

from typing import Any

from consumer import App, Tx

BOTH = "worker_app:app"  # with the handlers settle and record
ONE = "worker_app:alone"  # with settle alone
RENAMED = "worker_app:renamed"  # with pay, which was settle


def app_with(name: str, topic: str, *handlers: str) -> App:
    """A version of an App, whose handlers write to their own tables."""
    app = App(name)

    def add(handler: str) -> None:
        @app.handler(topic, name=handler)
        async def handle(body: dict[str, Any], tx: Tx) -> None:
            tx.defer("insert into effects values ($1, 1, 1)", f"{handler} {body['id']}")

    for handler in handlers:
        add(handler)
    return app
