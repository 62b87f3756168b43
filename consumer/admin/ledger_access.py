"""Connections to the ledger for commands."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from consumer.postgres.connection import connect, database_epoch, translated_errors, wait_for
from consumer.postgres.protocol import Connection
from consumer.settings import Settings

T = TypeVar("T")


async def connected(settings: Settings) -> Any:
    """Connect, and wait for PostgreSQL as long as --wait allows.

    The caller ends the connection. Raises Misconfigured, ServiceUnavailable.
    """
    return await wait_for(lambda left: connect(settings, left), settings.wait_seconds)


async def with_ledger(settings: Settings, ask: Callable[[Connection], Awaitable[T]]) -> T:
    """Call `ask` with a connection to a ledger of this version.

    Raises Misconfigured, ServiceUnavailable.
    """
    connection = await connected(settings)
    try:
        with translated_errors(settings):
            await database_epoch(connection, settings)
        return await ask(connection)  # outside of translated_errors: its errors may be Kafka's
    finally:
        connection.terminate()
