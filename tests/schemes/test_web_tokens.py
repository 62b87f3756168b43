"""The answers to a browser or an API client, tap after tap.

Starlette and FastAPI on a real Valkey.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from harness import until
from redis.asyncio import Redis

from consumer.local_servers import Valkey
from consumer.schemes.tokens import Tokens, Unknown, message_id_of

pytest.importorskip("starlette", reason="needs the extra `web`")

from asgi_client import Answer, post
from lossy_redis import LossyRedis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from consumer.schemes.web import Problem, Tap, TokenTaps, install

FORM = {"content-type": "application/x-www-form-urlencoded"}


def user_of(request: Request) -> str | None:
    return request.headers.get("x-user")


class Shop:
    """An application that pays: what it published, and how it answers."""

    def __init__(self, tokens: Tokens, **options: Any) -> None:
        self.tokens = tokens
        self.published: list[str] = []
        self.respond: Callable[[], Response] = lambda: JSONResponse({"paid": len(self.published)}, 202)
        self.working: asyncio.Event | None = None  # the first one waits for this
        self.taps = TokenTaps(tokens, options.pop("subject", user_of), field="token", **options)
        self.app = Starlette(routes=[Route("/pay", self.pay, methods=["POST"])])

    async def has_published(self) -> bool:
        return bool(self.published)

    async def pay(self, request: Request) -> Response:
        tap = await self.taps(request)
        if request.headers.get("x-amount", "1").startswith("-"):
            raise Problem(422, "amount_negative", "An amount is positive.")
        await tap.redeem(request.headers.get("x-amount", "1").encode())
        self.published.append(tap.message_id)
        if self.working is not None and not tap.repeated:
            await self.working.wait()
        return await tap.answer(self.respond())

    async def tap(self, token: str | None, user: str | None = "alice", **more: str) -> Answer:
        headers = {"idempotency-key": token, "x-user": user, **{f"x-{name}": value for name, value in more.items()}}
        return await post(
            self.app, "/pay", headers={name: value for name, value in headers.items() if value is not None}
        )


@pytest.fixture
def tokens(redis: Redis, prefix: str) -> Tokens:
    return Tokens(redis, prefix=prefix)


@pytest.fixture
def shop(tokens: Tokens) -> Shop:
    return Shop(tokens)


def is_problem(answer: Answer, status: int, code: str) -> None:
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-length"] == str(len(answer.body))
    problem = answer.json
    assert (problem["status"], problem["code"], problem["type"]) == (status, code, "about:blank")
    assert problem["title"] and problem["detail"]


async def test_the_second_tap_is_answered_with_the_first_ones_answer(shop: Shop, tokens: Tokens) -> None:
    token = await tokens.issue("alice", 60)
    first, second = await shop.tap(token), await shop.tap(token)
    assert shop.published == [message_id_of(token)]
    assert (first.status, first.json) == (202, {"paid": 1})
    assert (second.status, second.body) == (first.status, first.body)
    assert second.headers["content-type"] == first.headers["content-type"] == "application/json"
    assert second.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers


async def test_twenty_taps_at_once_are_one_payment(shop: Shop, tokens: Tokens) -> None:
    token = await tokens.issue("alice", 60)
    answers = await asyncio.gather(*[shop.tap(token) for _ in range(20)])
    assert len(shop.published) == 1
    assert {answer.status for answer in answers} <= {202, 409}
    assert {answer.json["paid"] for answer in answers if answer.status == 202} == {1}


async def test_while_the_first_is_at_work_the_second_is_a_conflict(shop: Shop, tokens: Tokens) -> None:
    token = await tokens.issue("alice", 60)
    shop.working = asyncio.Event()
    first = asyncio.create_task(shop.tap(token))
    await until("the first to have published", shop.has_published)
    second = await shop.tap(token)
    is_problem(second, 409, "token_in_use")
    assert 1 <= int(second.headers["retry-after"]) <= 10
    shop.working.set()
    assert (await first).status == 202
    assert (await shop.tap(token)).status == 202
    assert len(shop.published) == 1


async def test_a_first_use_that_died_is_done_again_under_the_same_message_id(tokens: Tokens) -> None:
    shop = Shop(tokens, again_after_seconds=0)
    token = await tokens.issue("alice", 60)
    shop.working = asyncio.Event()  # never set: it publishes and dies before it answers
    first = asyncio.create_task(shop.tap(token))
    await until("the first to have published", shop.has_published)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await shop.tap(token)).status == 202
    assert shop.published == [message_id_of(token)] * 2  # twice, and the ledger knows it by its id
    assert (await shop.tap(token)).headers["idempotent-replayed"] == "true"


async def test_bad_tokens_are_standard_errors_and_nothing_is_published(
    shop: Shop, tokens: Tokens, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = await tokens.issue("alice", 60)
    is_problem(await shop.tap(None), 428, "token_missing")
    is_problem(await shop.tap(""), 428, "token_missing")
    for malformed in ("x", token + "x", token[:-1] + "é", '"', '""', f'"{token}', f"'{token}'", token + '"', " "):
        is_problem(await shop.tap(malformed), 422, "token_malformed")
    two = [("idempotency-key", token), ("idempotency-key", token), ("x-user", "alice")]
    is_problem(await post(shop.app, "/pay", headers=two), 422, "token_malformed")
    is_problem(await shop.tap("x" * 43), 422, "token_unknown")  # forged, or expired
    is_problem(await shop.tap(token, user="bob"), 403, "token_foreign")
    is_problem(await shop.tap(token, user=None), 403, "no_user")
    assert shop.published == []
    assert (await shop.tap(token)).status == 202  # none of that has used it up
    assert token not in caplog.text


async def test_expired_token_is_an_error(shop: Shop, tokens: Tokens) -> None:
    token = await tokens.issue("alice", 0.001)
    await asyncio.sleep(0.01)
    is_problem(await shop.tap(token), 422, "token_unknown")


async def test_another_amount_under_the_same_token_is_an_error(shop: Shop, tokens: Tokens) -> None:
    token = await tokens.issue("alice", 60)
    assert (await shop.tap(token, amount="10")).status == 202
    is_problem(await shop.tap(token, amount="99"), 422, "token_used_for_another")
    assert len(shop.published) == 1


async def test_invalid_request_leaves_the_token_unused(shop: Shop, tokens: Tokens) -> None:
    token = await tokens.issue("alice", 60)
    is_problem(await shop.tap(token, amount="-5"), 422, "amount_negative")
    assert (await shop.tap(token, amount="5")).status == 202


async def test_the_quoted_form_of_the_draft_is_the_same_token(shop: Shop, tokens: Tokens) -> None:
    token = await tokens.issue("alice", 60)
    assert (await shop.tap(f'"{token}"')).status == 202
    assert (await shop.tap(token)).headers["idempotent-replayed"] == "true"


async def test_a_form_without_javascript_has_it_in_a_field(shop: Shop, tokens: Tokens) -> None:
    token = await tokens.issue("alice", 60)
    headers = {**FORM, "x-user": "alice"}
    assert (await post(shop.app, "/pay", f"amount=5&token={token}".encode(), headers)).status == 202
    assert (await post(shop.app, "/pay", f"token={token}".encode(), headers)).headers["idempotent-replayed"] == "true"
    is_problem(await post(shop.app, "/pay", b"amount=5", headers), 428, "token_missing")
    is_problem(await post(shop.app, "/pay", b"token=1&token=2", headers), 422, "token_malformed")
    upload = b'--x\r\ncontent-disposition: form-data; name="token"; filename="f"\r\n\r\n1\r\n--x--\r\n'
    files = {"content-type": "multipart/form-data; boundary=x", "x-user": "alice"}
    is_problem(await post(shop.app, "/pay", upload, files), 428, "token_missing")
    is_problem(
        await post(shop.app, "/pay", b"{}", {"content-type": "application/json", "x-user": "alice"}),
        428,
        "token_missing",
    )


@pytest.mark.parametrize("harm", ["stopped", "frozen", "full"])
async def test_redis_away_is_503_and_never_500(own_valkey: Valkey, prefix: str, harm: str) -> None:
    async with Redis.from_url(own_valkey.url) as client:
        shop = Shop(Tokens(client, prefix=prefix, budget_seconds=0.3))
        token = await shop.tokens.issue("alice", 60)
        match harm:
            case "stopped":
                own_valkey.kill()
            case "frozen":
                os.kill(own_valkey.pid, signal.SIGSTOP)
            case "full":
                await client.config_set("maxmemory", "1")
        answer = await shop.tap(token)
        is_problem(answer, 503, "tokens_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        assert shop.published == []


async def test_redis_lost_before_the_answer_is_stored_costs_only_the_replay(own_valkey: Valkey, prefix: str) -> None:
    async with Redis.from_url(own_valkey.url) as client:
        shop = Shop(Tokens(client, prefix=prefix, budget_seconds=0.3))
        token = await shop.tokens.issue("alice", 60)

        def gone() -> Response:
            own_valkey.kill()
            return JSONResponse({"paid": 1}, 202)

        shop.respond = gone
        assert (await shop.tap(token)).status == 202


@pytest.mark.parametrize(
    ("response", "replayed"),
    [
        (lambda: Response(b"\x00\xff\x80", 200, media_type="application/octet-stream"), True),
        (lambda: Response(status_code=204), True),
        (lambda: JSONResponse({"error": "no money"}, 402), True),
        (lambda: JSONResponse({"error": "kafka"}, 503), False),
        (lambda: Response(b"x" * 70_000), False),
        (lambda: StreamingResponse(iter([b"a"])), False),
    ],
)
async def test_second_request_gets_the_kept_answer_or_a_new_one(
    tokens: Tokens, response: Callable[[], Response], replayed: bool
) -> None:
    shop = Shop(tokens, again_after_seconds=0)
    shop.respond = response
    install(shop.app)
    token = await tokens.issue("alice", 60)
    first, second = await shop.tap(token), await shop.tap(token)
    assert (first.status, first.body) == (second.status, second.body)
    assert ("idempotent-replayed" in second.headers) == replayed
    assert len(shop.published) == (1 if replayed else 2)


async def test_the_subject_may_be_found_asynchronously(tokens: Tokens) -> None:
    async def session(request: Request) -> str | None:
        await asyncio.sleep(0)
        return user_of(request)

    shop = Shop(tokens, subject=session)
    assert (await shop.tap(await tokens.issue("alice", 60))).status == 202


async def test_the_message_id_comes_after_the_redeeming(tokens: Tokens) -> None:
    tap = Tap(tokens, await tokens.issue("alice", 60), "alice", 10)
    with pytest.raises(RuntimeError, match="redeem"):
        _ = tap.message_id
    assert (await tap.redeem()).message_id


def test_neither_kind_of_answer_shows_its_body_in_a_log() -> None:
    from consumer.schemes.web import Answered

    stored = Answered(202, "application/json", b'{"iban": "DE00"}')
    assert "DE00" not in str(stored) + repr(stored)
    assert repr(Problem(409, "token_in_use", "x")) == "Problem(409, 'token_in_use')"


# -- FastAPI --------------------------------------------------------------------------------------------------------------


async def test_fastapi_dependency_with_an_invalid_body_keeps_the_token_good(tokens: Tokens) -> None:
    fastapi = pytest.importorskip("fastapi")
    taps = TokenTaps(tokens, user_of, field="token")
    app = fastapi.FastAPI()
    install(app)
    published: list[str] = []

    async def pay(tap: Annotated[Tap, fastapi.Depends(taps)], amount: Annotated[int, fastapi.Form()]) -> Any:
        await tap.redeem()
        published.append(tap.message_id)
        return await tap.answer(JSONResponse({"paid": amount}, 202))

    pay.__annotations__ = {
        "tap": Annotated[Tap, fastapi.Depends(taps)],
        "amount": Annotated[int, fastapi.Form()],
        "return": Response,
    }
    app.post("/pay", response_model=None)(pay)
    token = await tokens.issue("alice", 60)
    headers = {**FORM, "x-user": "alice"}
    assert (await post(app, "/pay", f"token={token}&amount=much".encode(), headers)).status == 422
    assert published == []
    first = await post(app, "/pay", f"token={token}&amount=5".encode(), headers)
    second = await post(app, "/pay", f"token={token}&amount=5".encode(), headers)
    assert (first.status, first.json) == (second.status, second.json) == (202, {"paid": 5})
    assert second.headers["idempotent-replayed"] == "true"
    is_problem(await post(app, "/pay", b"amount=5", headers), 428, "token_missing")
    is_problem(await post(app, "/pay", b"amount=5", {**headers, "idempotency-key": "?"}), 422, "token_malformed")
    parameters = json.dumps(app.openapi())
    assert "request" not in json.loads(parameters)["paths"]["/pay"]["post"].get("parameters", [])
    assert len(published) == 1


@pytest.mark.parametrize("losses", [1, 3])
async def test_token_whose_answer_was_lost_is_good_for_the_next_tap(redis: Redis, prefix: str, losses: int) -> None:
    client = LossyRedis(redis)
    tokens = Tokens(client, prefix=prefix)
    shop, token = Shop(tokens), await tokens.issue("alice", 60)
    client.losses = losses
    for _ in range(losses):
        answer = await shop.tap(token)
        assert answer.status == 503 and "Nothing was done" not in answer.body.decode()
    assert (await shop.tap(token, amount="2")).status == 202  # even with another amount: nothing was published
    again = await shop.tap(token, amount="2")
    assert again.status == 202 and again.headers["idempotent-replayed"] == "true"
    assert len(shop.published) == 1
    assert (await shop.tap(token, amount="3")).status == 422


async def test_token_whose_answer_was_lost_elsewhere_is_in_use_for_a_while(redis: Redis, prefix: str) -> None:
    client = LossyRedis(redis)
    tokens = Tokens(client, prefix=prefix)
    token = await tokens.issue("alice", 60)
    client.losses = 1
    assert (await Shop(tokens).tap(token)).status == 503
    answer = await Shop(Tokens(redis, prefix=prefix)).tap(token)
    assert answer.status == 409 and 1 <= int(answer.headers["retry-after"]) <= 10


@pytest.mark.parametrize("form", ["urlencoded", "multipart"])
async def test_token_of_a_form_leaves_the_body_for_the_endpoint(tokens: Tokens, form: str) -> None:
    seen: list[bytes] = []
    taps = TokenTaps(tokens, subject=user_of, field="token")

    async def pay(request: Request) -> Response:
        tap = await taps(request)
        await tap.redeem(await request.body())
        seen.append(await request.body())
        return await tap.answer(JSONResponse({"amount": (await request.form())["amount"]}))

    app = Starlette(routes=[Route("/pay", pay, methods=["POST"])])
    token = await tokens.issue("alice", 60)
    body, kind = f"token={token}&amount=5".encode(), FORM["content-type"]
    if form == "multipart":
        parts = "".join(
            f'--b\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in (("token", token), ("amount", "5"))
        )
        body, kind = f"{parts}--b--\r\n".encode(), "multipart/form-data; boundary=b"
    answer = await post(app, "/pay", headers={"content-type": kind, "x-user": "alice"}, body=body)
    assert (answer.status, json.loads(answer.body), seen) == (200, {"amount": "5"}, [body])


async def test_replayed_answer_has_the_headers_and_bytes_of_the_first(tokens: Tokens) -> None:
    shop = Shop(tokens)
    kept = {"location": "/orders/7", "x-order": "7", "etag": '"a"', "content-language": "de"}
    cookie = {"set-cookie": "session=1", "date": "now", "content-encoding": "gzip"}
    shop.respond = lambda: Response(b"\xff\x00\xfe", 303, {**kept, **cookie}, "application/octet-stream")
    token = await tokens.issue("alice", 60)
    first, again = await shop.tap(token), await shop.tap(token)
    assert first.body == again.body == b"\xff\x00\xfe"
    assert (again.status, {name: again.headers[name] for name in kept}) == (303, kept)
    assert again.headers["content-type"] == "application/octet-stream" and again.headers["content-encoding"] == "gzip"
    assert not {"set-cookie", "date"} & set(again.headers)
    assert again.headers["content-length"] == "3"


async def test_answer_that_an_older_version_kept_is_replayed(tokens: Tokens) -> None:
    shop, token = Shop(tokens), await tokens.issue("alice", 60)
    await tokens.redeem(token, "alice", b"1")
    await tokens.store_result(token, "alice", json.dumps([201, "text/plain", "caf\u00e9"]))
    answer = await shop.tap(token)
    assert (answer.status, answer.headers["content-type"], answer.body) == (201, "text/plain", "café".encode("latin-1"))


@pytest.mark.parametrize("token", [None, 5, b"x", "", "\udcff", ["x"]])
async def test_text_that_is_no_token_is_unknown(tokens: Tokens, token: Any) -> None:
    assert await tokens.redeem(token, "alice") == Unknown()
    assert await tokens.store_result(token, "alice", "x") is False


async def test_arguments_of_another_type_are_named(tokens: Tokens) -> None:
    token = await tokens.issue("alice", 60)
    with pytest.raises(TypeError, match="payload= is bytes, not str"):
        await tokens.redeem(token, "alice", "1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a subject is text"):
        await tokens.redeem(token, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="result= is text, not bytes"):
        await tokens.store_result(token, "alice", b"x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lone surrogate"):
        await tokens.store_result(token, "alice", "\udcff")
