"""A connection to the test's own database, and clients of Valkey.

Valkey is shared; each test has a prefix of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import settings
from redis.asyncio import Redis
from scheme_database import Connect

from consumer.local_servers import Valkey

# As in tests/core: every run draws the same examples, and none is late on a busy machine.
settings.register_profile("schemes", derandomize=True, database=None, deadline=None, max_examples=200)
settings.load_profile("schemes")


@pytest.fixture
async def connect(database: str) -> AsyncIterator[Connect]:
    """Makes connections to one empty database; they are closed at the end."""
    async with AsyncExitStack() as stack:

        async def one() -> asyncpg.Connection:
            connection = await asyncpg.connect(database)
            stack.push_async_callback(connection.close)
            return connection

        yield one


@pytest.fixture
async def connection(connect: Connect) -> asyncpg.Connection:
    return await connect()


@pytest.fixture(params=[False, True], ids=["bytes", "decoded"])
async def redis(valkey: Valkey, request: pytest.FixtureRequest) -> AsyncIterator[Redis]:
    """As applications have it: answers as bytes, and as text."""
    async with Redis.from_url(valkey.url, decode_responses=request.param) as client:
        yield client


@pytest.fixture
async def own_redis(own_valkey: Valkey) -> AsyncIterator[Redis]:
    """A client of a Valkey that the test may disturb.

    Stop, freeze, fill or empty.
    """
    async with Redis.from_url(own_valkey.url) as client:
        yield client


@pytest.fixture
def prefix() -> str:
    return f"test:{uuid4().hex}:"
