"""A token works once, for its owner, and becomes a message id.

On a real Valkey.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from typing import Any

import pytest
from redis.asyncio import Redis

from consumer.core.errors import RunAgain
from consumer.local_servers import Valkey
from consumer.schemes.redis_call import RedisAway
from consumer.schemes.tokens import (
    RESULT_BYTES_MAX,
    Foreign,
    Fresh,
    OtherPayload,
    Tokens,
    Unknown,
    Used,
    message_id_of,
)

ALICE, BOB = "alice", "bob"


@pytest.fixture
def tokens(redis: Redis, prefix: str) -> Tokens:
    return Tokens(redis, prefix=prefix)


async def kept(redis: Redis, prefix: str) -> dict[str, dict[str, str]]:
    """Everything in Redis under the prefix, as text."""

    def text(value: Any) -> str:
        return value.decode() if isinstance(value, bytes) else value

    entries = {}
    async for key in redis.scan_iter(match=f"{prefix}*"):
        entries[text(key)] = {text(field): text(value) for field, value in (await redis.hgetall(key)).items()}
    return entries


async def test_the_first_use_is_fresh_and_the_second_knows_the_same_message(tokens: Tokens) -> None:
    token = await tokens.issue(ALICE, 60)
    first = await tokens.redeem(token, ALICE)
    assert isinstance(first, Fresh)
    second = await tokens.redeem(token, ALICE)
    assert isinstance(second, Used)
    assert (second.message_id, second.result) == (first.message_id, None)
    assert 0 <= second.used_seconds < 30


async def test_the_second_is_answered_with_the_first_ones_result(tokens: Tokens) -> None:
    token = await tokens.issue(ALICE, 60)
    assert await tokens.store_result(token, ALICE, "too soon") is False
    await tokens.redeem(token, ALICE)
    assert await tokens.store_result(token, BOB, "not his") is False
    assert await tokens.store_result(token, ALICE, '{"paid": "é"}') is True
    assert await tokens.store_result(token, ALICE, "later") is False
    used = await tokens.redeem(token, ALICE)
    assert isinstance(used, Used)
    assert used.result == '{"paid": "é"}'
    assert "paid" not in repr(used)  # it is a payload


async def test_of_fifty_at_the_same_time_one_is_fresh(tokens: Tokens) -> None:
    token = await tokens.issue(ALICE, 60)
    answers = await asyncio.gather(*[tokens.redeem(token, ALICE) for _ in range(50)])
    assert [type(answer) for answer in answers].count(Fresh) == 1
    assert {answer.message_id for answer in answers if isinstance(answer, Fresh | Used)} == {message_id_of(token)}


async def test_a_foreign_token_is_not_used_up_by_the_attempt(tokens: Tokens) -> None:
    token = await tokens.issue(ALICE, 60)
    assert await tokens.redeem(token, BOB) == Foreign()
    assert isinstance(await tokens.redeem(token, ALICE), Fresh)
    assert await tokens.redeem(token, BOB) == Foreign()


async def test_same_token_for_something_else_is_an_error(tokens: Tokens) -> None:
    token = await tokens.issue(ALICE, 60)
    assert isinstance(await tokens.redeem(token, ALICE, b"10 EUR"), Fresh)
    assert await tokens.redeem(token, ALICE, b"99 EUR") == OtherPayload()
    assert isinstance(await tokens.redeem(token, ALICE, b"10 EUR"), Used)


async def test_a_token_expires_and_a_late_result_does_not_bring_it_back(
    tokens: Tokens, redis: Redis, prefix: str
) -> None:
    token = await tokens.issue(ALICE, 0.3)
    await tokens.redeem(token, ALICE)
    deadline = time.monotonic() + 10
    while await kept(redis, prefix):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert await tokens.redeem(token, ALICE) == Unknown()
    assert await tokens.store_result(token, ALICE, "late") is False
    assert await kept(redis, prefix) == {}


async def test_neither_using_nor_answering_it_makes_a_token_live_longer(
    tokens: Tokens, redis: Redis, prefix: str
) -> None:
    token = await tokens.issue(ALICE, 60)
    [key] = await kept(redis, prefix)
    await redis.pexpire(key, 20_000)
    await tokens.redeem(token, ALICE)
    await tokens.store_result(token, ALICE, "done")
    assert 0 < await redis.pttl(key) <= 20_000


@pytest.mark.parametrize("wrong", ["", "x", "x" * 44, "x" * 42 + "é", "x" * 42 + "\n", "../" * 14 + "x", "' or 1=1 --"])
async def test_token_of_another_form_is_unknown_without_asking_redis(wrong: str) -> None:
    away = Tokens(Redis(port=1))
    assert not Tokens.is_well_formed(wrong)
    assert await away.redeem(wrong, ALICE) == Unknown()
    assert await away.store_result(wrong, ALICE, "x") is False


async def test_a_token_is_unguessable_and_no_two_are_alike(tokens: Tokens) -> None:
    issued = {await tokens.issue(ALICE, 60) for _ in range(100)}
    assert len(issued) == 100
    assert all(Tokens.is_well_formed(token) and len(token) == 43 for token in issued)


async def test_redis_keeps_hashes_only_and_the_log_nothing(
    tokens: Tokens, redis: Redis, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = await tokens.issue(ALICE, 60)
    await tokens.redeem(token, ALICE, b"10 EUR")
    everything = repr(await kept(redis, prefix))
    for secret in (token, ALICE, "10 EUR"):
        assert secret not in everything
        assert secret not in caplog.text
    assert hashlib.sha256(token.encode()).hexdigest() in everything
    # The subject's hash is keyed with the token: who reads Redis cannot try out subjects.
    assert hashlib.sha256(ALICE.encode()).hexdigest() not in everything
    assert hashlib.blake2b(ALICE.encode(), digest_size=32).hexdigest() not in everything


def test_message_id_is_a_uuid_of_the_token_that_does_not_reveal_it() -> None:
    one, other = "a" * 43, "b" * 43
    assert (
        message_id_of(one) == message_id_of(one) == "698d9331-09e4-8c5b-825a-5616bca918e7"
    )  # for ever: it is in ledgers
    assert message_id_of(one) != message_id_of(other)
    assert uuid.UUID(message_id_of(one)).version == 8
    assert message_id_of(one).replace("-", "") not in hashlib.sha256(one.encode()).hexdigest()


@pytest.mark.parametrize("subject", ["", "x" * 1001, None, 7])
async def test_a_subject_that_is_none_is_refused(tokens: Tokens, subject: Any) -> None:
    with pytest.raises(ValueError, match="subject"):
        await tokens.issue(subject, 60)
    with pytest.raises(ValueError, match="subject"):
        await tokens.redeem("x" * 43, subject)


@pytest.mark.parametrize("ttl", [0, -1, True, "60", None, float("nan"), float("inf")])
async def test_a_ttl_that_is_none_is_refused(tokens: Tokens, ttl: Any) -> None:
    with pytest.raises(ValueError, match="ttl_seconds"):
        await tokens.issue(ALICE, ttl)


async def test_a_result_that_is_too_long_is_refused(tokens: Tokens) -> None:
    token = await tokens.issue(ALICE, 60)
    await tokens.redeem(token, ALICE)
    with pytest.raises(ValueError, match="at most"):
        await tokens.store_result(token, ALICE, "é" * (RESULT_BYTES_MAX // 2 + 1))
    assert await tokens.store_result(token, ALICE, "é" * (RESULT_BYTES_MAX // 2))


async def test_lost_answer_that_the_library_retries_is_still_fresh(valkey: Valkey, prefix: str) -> None:
    """The reply to the first use is lost; the library sends again.

    It reconnects before.
    """

    cut = False

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal cut
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", valkey.port)

        async def up() -> None:
            while data := await reader.read(65536):
                upstream_writer.write(data)
            upstream_writer.close()

        task = asyncio.create_task(up())
        while data := await upstream_reader.read(65536):
            if b"fresh" in data and not cut:
                cut = True
                break
            writer.write(data)
        writer.close()
        upstream_writer.close()
        await task

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with server, Redis(port=server.sockets[0].getsockname()[1]) as client:
        tokens = Tokens(client, prefix=prefix, budget_seconds=10)
        token = await tokens.issue(ALICE, 60)
        assert isinstance(await tokens.redeem(token, ALICE), Fresh)
        assert cut
        assert isinstance(await tokens.redeem(token, ALICE), Used)


# -- limits: what Redis loses -------------------------------------------------------------------------------------------------


async def test_limit_a_flush_makes_every_token_unknown(own_redis: Redis, prefix: str) -> None:
    tokens = Tokens(own_redis, prefix=prefix)
    token = await tokens.issue(ALICE, 60)
    await tokens.redeem(token, ALICE)
    await own_redis.flushall()
    assert await tokens.redeem(token, ALICE) == Unknown()


async def test_limit_token_restored_by_a_failover_keeps_its_message_id(own_redis: Redis, prefix: str) -> None:
    tokens = Tokens(own_redis, prefix=prefix)
    token = await tokens.issue(ALICE, 60)
    [key] = [key_name async for key_name in own_redis.scan_iter(match=f"{prefix}*")]
    replica = await own_redis.dump(key)
    assert replica is not None  # what a replica had when the primary died
    first = await tokens.redeem(token, ALICE)
    await own_redis.restore(key, 60_000, replica, replace=True)
    second = await tokens.redeem(token, ALICE)
    assert isinstance(first, Fresh) and isinstance(second, Fresh)
    assert first.message_id == second.message_id


@pytest.mark.parametrize("harm", ["stopped", "frozen", "full", "read-only"])
async def test_broken_redis_is_reported_in_time(own_valkey: Valkey, prefix: str, harm: str) -> None:
    import os
    import signal

    async with Redis.from_url(own_valkey.url) as client:
        tokens = Tokens(client, prefix=prefix, budget_seconds=0.5)
        token = await tokens.issue(ALICE, 60)
        match harm:
            case "stopped":
                own_valkey.kill()
            case "frozen":
                os.kill(own_valkey.pid, signal.SIGSTOP)
            case "full":
                await client.config_set("maxmemory", "1")
            case "read-only":
                await client.execute_command("REPLICAOF", "127.0.0.1", "1")
        begun = time.monotonic()
        with pytest.raises(RedisAway) as raised:
            await tokens.redeem(token, ALICE)
        assert time.monotonic() - begun < 5
        assert token not in str(raised.value)
        assert isinstance(raised.value, RunAgain)  # in a handler, not the message's fault
        with pytest.raises(RedisAway):
            await tokens.issue(ALICE, 60)
