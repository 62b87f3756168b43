"""The methods of an asyncpg connection that are used, as a type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol


class Connection(Protocol):
    """An asyncpg connection, one of its pool, or a test's fake."""

    async def execute(self, query: str, /, *args: Any) -> str: ...

    async def executemany(self, command: str, args: Iterable[Sequence[Any]], /) -> Any: ...

    async def fetch(self, query: str, /, *args: Any) -> list[Any]: ...

    async def fetchrow(self, query: str, /, *args: Any) -> Any: ...

    async def fetchval(self, query: str, /, *args: Any) -> Any: ...

    def transaction(self, *, isolation: Any = None, readonly: bool = False) -> AbstractAsyncContextManager[Any]: ...

    def is_closed(self) -> bool: ...
