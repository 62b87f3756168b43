"""The wait for PostgreSQL, and the labels of servers."""

from __future__ import annotations

import asyncio
import math

import pytest

from consumer.core.errors import Misconfigured, ServiceUnavailable
from consumer.postgres.connection import ATTEMPT_SECONDS, dsn_label, wait_for
from consumer.postgres.errors import NotPrimary, Outage

pytestmark = pytest.mark.unit


class Server:
    """Fails a number of times, then answers; records each timeout."""

    def __init__(self, *outages: Exception) -> None:
        self.outages = list(outages)
        self.given: list[float] = []

    async def attempt(self, seconds: float) -> str:
        self.given.append(seconds)
        if self.outages:
            raise self.outages.pop(0)
        return "connected"


async def test_wait_for_a_server_that_answers_attempts_once() -> None:
    server = Server()
    assert await wait_for(server.attempt, 0) == "connected"
    assert server.given == [0.5]  # even without time to wait there is one attempt


async def test_wait_for_a_server_that_comes_back_attempts_again() -> None:
    server, pauses, seen = Server(Outage("one"), NotPrimary("two")), [], []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    def after(outage: Outage) -> float:
        seen.append(str(outage))
        return len(seen) / 100

    assert await wait_for(server.attempt, math.inf, after=after, sleep=sleep) == "connected"
    assert (seen, pauses) == (["one", "two"], [0.01, 0.02])
    assert server.given == [ATTEMPT_SECONDS] * 3


async def test_wait_for_a_server_that_stays_away_raises_after_the_limit() -> None:
    server = Server(*[Outage("refused")] * 100)
    with pytest.raises(ServiceUnavailable, match=r"^refused \(waited 0\.3 s\)$"):
        await wait_for(server.attempt, 0.3, after=lambda outage: 0.1)
    assert 2 <= len(server.given) <= 4


async def test_wait_for_a_wrong_setting_does_not_wait() -> None:
    server = Server(Misconfigured("password"), Outage("never reached"))
    with pytest.raises(Misconfigured, match="password"):
        await wait_for(server.attempt, 60)
    assert len(server.given) == 1


async def test_wait_for_is_cancelled_at_once() -> None:
    task = asyncio.create_task(wait_for(Server(*[Outage("refused")] * 100).attempt, 60))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("dsn", "label"),
    [
        ("postgresql://me:secret@db.example:6432/shop", "PostgreSQL at db.example:6432/shop"),
        ("postgresql://me:secret@/shop?host=db.example&port=6432", "PostgreSQL at db.example:6432/shop"),
        ("postgresql:///?dbname=shop", "PostgreSQL at the local socket/shop"),
        ("postgresql://db.example", "PostgreSQL at db.example"),
        ("postgresql://me:sec]ret@[db/shop", "PostgreSQL"),
    ],
)
def test_a_label_names_server_and_database_without_the_password(dsn: str, label: str) -> None:
    assert dsn_label(dsn) == label
