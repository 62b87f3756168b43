"""A token is used until its expiry, in any unit and type."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from consumer.kafka.oauth import NoToken, TokenCache

pytestmark = pytest.mark.unit

NOW = 1_800_000_000.0


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


@pytest.mark.parametrize(
    "expiry",
    [
        NOW + 900,
        int(NOW + 900),
        (NOW + 900) * 1000,
        int((NOW + 900) * 1000),  # Amazon's signer for MSK
        datetime.fromtimestamp(NOW + 900, UTC),
        datetime.fromtimestamp(NOW + 900, timezone(timedelta(hours=5))),
        datetime.fromtimestamp(NOW + 900, UTC).replace(tzinfo=None),
        iso(NOW + 900),
        str(NOW + 900),
        str(int(NOW + 900) * 1000),
    ],
    ids=lambda value: type(value).__name__,  # no times and addresses: both workers must collect the same names
)
async def test_expiry_of_a_token_in_any_unit_ends_its_use_shortly_before(expiry: Any) -> None:
    now = NOW
    asked = 0

    def provider() -> tuple[str, Any]:
        nonlocal asked
        asked += 1
        return f"token{asked}", expiry if asked == 1 else None

    bearer = TokenCache(provider, lambda: now)
    assert await bearer.token() == "token1"
    now = NOW + 800
    assert await bearer.token() == "token1"
    now = NOW + 890
    assert await bearer.token() == "token2"


@pytest.mark.parametrize("expiry", [None, 0, 0.0])
async def test_token_without_an_expiry_is_used_once(expiry: Any) -> None:
    given = iter(["one", "two"])
    bearer = TokenCache(lambda: (next(given), expiry), lambda: NOW)
    assert [await bearer.token(), await bearer.token()] == ["one", "two"]


@pytest.mark.parametrize(
    ("expiry", "says"),
    [
        (NOW - 1, "expired already"),
        ((NOW - 1) * 1000, "expired already"),
        (datetime(2020, 1, 1, tzinfo=UTC), "expired already"),
        (iso(NOW - 60), "expired already"),
        (900, "lifetime must be added"),
        (900_000, "lifetime must be added"),
        ((NOW + 900) * 1_000_000, "no time since 1970"),
        (float("inf"), "must return"),
        (float("nan"), "must return"),
        (-1, "must return"),
        (True, "must return"),
        ("soon", "must return"),
        (object(), "must return"),
    ],
    ids=lambda value: type(value).__name__,  # no times and addresses: both workers must collect the same names
)
async def test_token_with_an_impossible_expiry_is_refused_in_one_line(expiry: Any, says: str) -> None:
    with pytest.raises(NoToken, match=says) as refused:
        await TokenCache(lambda: ("secret-token", expiry), lambda: NOW).token()
    assert "secret-token" not in str(refused.value) and "\n" not in str(refused.value)
