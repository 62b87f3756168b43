"""Keeps the tests' own connections for as long as their database.

A connection costs 6 ms of CPU time on both sides, a short query 0.5 ms, and tests look at their tables thousands of times.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

_kept: dict[str, tuple[asyncio.AbstractEventLoop, Any]] = {}


@asynccontextmanager
async def keeping_connections(dsn: str) -> AsyncIterator[None]:
    """Keep the connections of `connection` to this database meanwhile."""
    # Tables change meanwhile, so no statement is prepared for later.
    pool = asyncpg.create_pool(dsn, min_size=0, max_size=20, max_inactive_connection_lifetime=0, statement_cache_size=0)
    async with pool:
        _kept[dsn] = asyncio.get_running_loop(), pool
        try:
            yield
        finally:
            del _kept[dsn]


@asynccontextmanager
async def connection(dsn: str) -> AsyncIterator[Any]:
    """A kept connection, without state of a session, or a new one."""
    loop, pool = _kept.get(dsn, (None, None))
    if pool is not None and loop is asyncio.get_running_loop():
        async with pool.acquire() as kept:
            yield kept
        return
    own = await asyncpg.connect(dsn)
    try:
        yield own
    finally:
        await own.close()
