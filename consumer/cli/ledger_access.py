"""Connections to the ledger for commands."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from consumer.postgres.connection import connect, database_epoch, translated_errors, wait_for
from consumer.settings import Settings


async def connected(settings: Settings) -> Any:
    """Connect, and wait for PostgreSQL as long as --wait allows."""
    return await wait_for(lambda left: connect(settings, left), settings.wait_seconds)


async def with_ledger(settings: Settings, ask: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
    """Call `ask` with a connection to a ledger of this version.

    Raises Misconfigured, ServiceUnavailable.
    """
    connection = await connected(settings)
    try:
        with translated_errors(settings):
            await database_epoch(connection, settings)
        return await ask(connection)  # its errors may be Kafka's: they are not taken for PostgreSQL's
    finally:
        connection.terminate()
