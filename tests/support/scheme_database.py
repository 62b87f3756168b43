"""Connections for tests of the schemes: they record or change statements."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

Connect = Callable[[], Awaitable[asyncpg.Connection]]  # makes another connection to the test's database


class RecordedDatabase:
    """Passes statements on to a connection."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.statements: list[str] = []

    async def fetch(self, sql: str, /, *args: Any) -> list[Any]:
        self.statements.append(sql)
        return await self.connection.fetch(sql, *args)

    async def fetchval(self, sql: str, /, *args: Any) -> Any:
        self.statements.append(sql)
        return await self.connection.fetchval(sql, *args)
