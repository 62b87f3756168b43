"""Bad requests: the right status, problem+json, never a charge.

Never a 500. And requests as scripts send them: twenty that are truly concurrent, for each setting of the layers.
"""

from __future__ import annotations

import json
import random
import socket
import string
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from shop_process import FORM, Answer, Script, Shop, is_settled, soon

from consumer.schemes.tokens import Tokens

ON_OFF = (True, False)


@pytest.fixture
def script(shop: Shop) -> Script:
    return Script(shop)


@pytest.fixture(scope="module")
def fixed(shop: Shop) -> Script:
    """One visitor for all inputs that change nothing.

    Its order is never paid.
    """
    return Script(shop)


def is_problem(answer: Answer, status: int, code: str | None = None) -> dict[str, Any]:
    """RFC 9457, of this status."""
    assert answer.status == status, (answer.status, answer.body)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    problem = answer.json
    assert problem["status"] == status and problem["title"] and problem["detail"] and problem["type"]
    assert code is None or problem["code"] == code
    return dict(problem)


async def is_untouched(shop: Shop, script: Script) -> None:
    """The order has sent no message, and PostgreSQL knows nothing of it."""
    view = script.view()
    assert view["messages"] == [] and view["charged"]["times"] == 0
    assert all(400 <= tap["status"] < 500 for tap in view["taps"])
    assert await shop.charges(script.order) == 0


AMOUNTS: list[Any] = [
    *(
        0,
        -1,
        -12.5,
        "-12.50",
        "0",
        "0.00",
        1000.01,
        "1000.01",
        1e9,
        10**18,
        10**400,
        1e300,
        "1e3",
        "1E2",
        "\u0661\u0662",
        "\uff11\uff12",
    ),
    *(
        "",
        " ",
        "12,50",
        "12.505",
        "12.",
        ".5",
        "+5",
        "0x10",
        "1_000",
        "12.50 ",
        " 12.50",
        "12.50\n",
        "NaN",
        "Infinity",
        "-0",
    ),
    *("null", "true", None, True, False, [], [12], {}, {"amount": 1}, "twelve", "'; drop table shop.charges; --", "\0"),
    *("<script>alert(1)</script>", "9" * 5000),
]


@pytest.mark.parametrize("amount", AMOUNTS, ids=lambda value: repr(value)[:30])
async def test_amounts_that_are_none(shop: Shop, fixed: Script, amount: Any) -> None:
    given = {"amount": amount}
    is_problem(
        fixed.post(f"/orders/{fixed.order}/payments", json.dumps(given), idempotency_key=fixed.token),
        422,
        "amount_invalid",
    )
    if isinstance(amount, str):
        form = fixed.post(
            f"/orders/{fixed.order}/payments",
            urlencode({**given, "token": fixed.token}),
            content_type=FORM["content-type"],
        )
        assert (
            form.status == 422
            and b"<script>alert" not in form.body
            and form.headers["content-type"].startswith("text/html")
        )
    await is_untouched(shop, fixed)


BODIES: list[tuple[bytes, int]] = [
    *(
        (body, 400)
        for body in (b"", b"{", b"nonsense", b"{'amount': 1}", b'{"amount": NaN}', b'{"amount": 1', b"\xff\xfe")
    ),
    *((body, 400) for body in (b'{"amount": "\xff"}', b"\0", b'{"amount": 01}', b"[" * 8000, b'{"a":' * 1500)),
    *((body, 422) for body in (b"[]", b"1", b"null", b'"12.50"', b"true", b"{}", b'{"amounts": 1}')),
    *((body, 422) for body in (b'{"amount": "12.50", "currency": "EUR"}', b'{"amount": "12.50", "order": "x"}')),
    (b'{"amount": "' + b"1" * 9000 + b'"}', 413),
    (b'{"amount": 1' + b"0" * 5000 + b"}", 400),  # a number beyond what is decoded
]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=lambda value: str(value)[:30])
async def test_bodies_that_are_none(shop: Shop, fixed: Script, body: bytes, status: int) -> None:
    is_problem(fixed.post(f"/orders/{fixed.order}/payments", body, idempotency_key=fixed.token), status)
    await is_untouched(shop, fixed)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("", 422),
        ("amount=1&amount=2", 422),
        ("a=1&" * 1500, 400),
        ("%", 422),
        ("amount=1&token", 422),
        ("amount=1&x=2", 422),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_forms_that_are_none(shop: Shop, fixed: Script, body: str, status: int) -> None:
    answer = fixed.post(f"/orders/{fixed.order}/payments", body, content_type=FORM["content-type"], idempotency_key="x")
    assert answer.status == status and answer.headers["content-type"].startswith("text/html")
    await is_untouched(shop, fixed)


@pytest.mark.parametrize(
    "media_type",
    [
        "",
        "text/plain",
        "application/xml",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "json",
        "*/*",
        "\xff",
    ],
)
async def test_media_types_that_are_not_taken(shop: Shop, fixed: Script, media_type: str) -> None:
    path = f"/orders/{fixed.order}/payments"
    is_problem(
        fixed.post(path, '{"amount": 1}', content_type=media_type, idempotency_key=fixed.token), 415, "media_type"
    )
    await is_untouched(shop, fixed)


TOKENS = {
    "none": ("", 428, "token_missing"),
    "short": ("abc", 422, "token_malformed"),
    "of other characters": ("!" * 43, 422, "token_malformed"),
    "too long": ("A" * 5000, 422, "token_malformed"),
    "forged": ("A" * 43, 422, "token_unknown"),
    "not ascii": ("é" * 43, 422, "token_malformed"),
}


@pytest.mark.parametrize(("token", "status", "code"), TOKENS.values(), ids=TOKENS)
async def test_tokens_that_are_none(shop: Shop, fixed: Script, token: str, status: int, code: str) -> None:
    path = f"/orders/{fixed.order}/payments"
    is_problem(fixed.post(path, '{"amount": 1}', idempotency_key=token), status, code)
    form = fixed.post(path, urlencode({"amount": "1", "token": token}), content_type=FORM["content-type"])
    assert form.status == status
    await is_untouched(shop, fixed)


async def test_tokens_of_others_and_of_other_orders(shop: Shop, script: Script) -> None:
    other = Script(shop)
    is_problem(script.pay(idempotency_key=other.token), 403, "token_foreign")
    first = script.token
    script.again()
    is_problem(script.pay(idempotency_key=first), 403, "token_foreign")
    # Another's order is as unknown as none.
    is_problem(script.post(f"/orders/{other.order}/payments", '{"amount": 1}', idempotency_key=other.token), 404)
    is_problem(script.shop.ask("GET", f"/orders/{other.order}/events", None, {"cookie": script.cookie}), 404)
    await is_untouched(shop, script)
    await is_untouched(shop, other)


async def test_a_token_that_has_expired(shop: Shop, script: Script) -> None:
    async with Redis.from_url(shop.announced["redis_url"]) as redis:
        key = Tokens(redis, prefix="shop:token:")._key(script.token)
        assert await redis.pexpire(key, 1)
        while await redis.exists(key):
            pass
    # A forged one says nothing of the page's own.
    is_problem(script.pay(idempotency_key="A" * 43), 422, "token_unknown")
    assert script.load() == (script.order, script.token)
    is_problem(script.pay(), 422, "token_unknown")
    await is_untouched(shop, script)
    # It can no longer be paid: the page loaded next shows another order, which can.
    expired = script.order
    script.order, script.token = script.load()
    assert script.order != expired and script.pay().status == 202


async def test_a_token_again_for_another_amount(shop: Shop, script: Script) -> None:
    first = script.pay()
    assert first.status == 202
    is_problem(script.pay("13.00"), 422, "token_used_for_another")
    again = script.pay()
    assert (again.status, again.body) == (202, first.body) and again.headers["idempotent-replayed"] == "true"
    quoted = script.pay(idempotency_key=f'"{script.token}"')
    assert quoted.body == first.body
    soon(lambda: is_settled(script.view()), "the payment to be settled")
    assert await shop.charges(script.order) == 1


async def test_an_id_again_for_another_amount_is_refused_by_the_ledger(shop: Shop, script: Script) -> None:
    script.again(token=False)
    assert [script.pay(amount).status for amount in ("12.50", "13.00")] == [202, 202]
    soon(lambda: is_settled(script.view()), "the payments to be settled")
    assert "used for another amount" in script.view()["messages"][1]["fate"]
    assert await shop.charges(script.order) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://127.0.0.1"},
        {"origin": ""},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
    ids=str,
)
async def test_requests_from_other_sites(shop: Shop, fixed: Script, headers: dict[str, str]) -> None:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    for path, body in (
        (f"/orders/{fixed.order}/payments", '{"amount": "12.50"}'),
        ("/orders", "{}"),
        ("/services/worker", '{"do": "kill"}'),
    ):
        sent = {"cookie": fixed.cookie, "content-type": "application/json", "idempotency-key": fixed.token, **given}
        is_problem(shop.ask("POST", path, body, sent), 403, "origin_foreign")
    await is_untouched(shop, fixed)


async def test_this_site_may(shop: Shop, script: Script) -> None:
    answer = script.pay(origin=shop.url, sec_fetch_site="same-origin")
    assert answer.status == 202
    port = shop.host.partition(":")[2]
    assert shop.ask("GET", "/", None, {"host": f"localhost:{port}"}).status == 200
    cookie = shop.ask("GET", "/").headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost", "127.0.0.1.evil.example", ""]
)
def test_other_names_of_this_server(shop: Shop, host: str) -> None:
    is_problem(shop.ask("GET", "/", None, {"host": host}), 400, "host_unknown")


def test_shop_listens_on_this_machine_only(shop: Shop) -> None:
    port = int(shop.host.partition(":")[2])
    for address in {
        str(address_info[4][0]) for address_info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    }:
        if not address.startswith("127."):
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((address, port), timeout=5)


STRANGE_STATES: list[Any] = ["lost", "", "PAID", None, 1, [], {}, "paid\0"]
STRANGE_VERSIONS: list[Any] = ["1", "one", 1.5, 1.0, True, -1, 2**63, 10**30, [], {}, ""]
MOVES: list[tuple[dict[str, Any], int, str]] = [
    *(({"state": state, "version": 1}, 422, "state_unknown") for state in STRANGE_STATES),
    ({"version": 1}, 422, "state_unknown"),
    ({"state": "shipped"}, 428, "version_missing"),
    ({"state": "shipped", "version": None}, 428, "version_missing"),
    *(({"state": "shipped", "version": version}, 422, "version_invalid") for version in STRANGE_VERSIONS),
    ({"state": "shipped", "version": 1, "by": "me"}, 422, "field_unknown"),
    ({"state": "paid", "version": 1}, 409, "move_illegal"),  # only a charge can
    ({"state": "placed", "version": 1}, 409, "move_illegal"),
    ({"state": "shipped", "version": 1}, 409, "not_charged"),
]


@pytest.mark.parametrize(("given", "status", "code"), MOVES, ids=lambda value: str(value)[:50])
async def test_moves_that_are_none(shop: Shop, fixed: Script, given: dict[str, Any], status: int, code: str) -> None:
    is_problem(fixed.post(f"/orders/{fixed.order}/state", json.dumps(given)), status, code)
    await is_untouched(shop, fixed)


async def test_moves_of_a_paid_order(shop: Shop, script: Script) -> None:
    assert script.pay().status == 202
    soon(lambda: script.view()["order"]["state"] == "paid", "the order to be paid")
    version = script.view()["order"]["version"]
    path = f"/orders/{script.order}/state"

    def move(state: str, version: int) -> Answer:
        return script.post(path, json.dumps({"state": state, "version": version}))

    is_problem(move("delivered", version), 409, "move_illegal")  # too early
    is_problem(move("shipped", version - 1), 409, "version_stale")
    assert script.view()["order"] == {**script.view()["order"], "state": "paid", "version": version}
    assert move("shipped", version).json == {"state": "shipped", "version": version + 1}
    assert move("shipped", version).json == {"state": "shipped", "version": version + 1}  # a repetition
    assert move("delivered", version + 1).status == 200
    is_problem(move("shipped", version + 2), 409, "move_illegal")  # too late
    is_problem(script.post(path, "state=shipped", content_type=FORM["content-type"]), 415)
    assert await shop.charges(script.order) == 1


def test_paths_and_methods(shop: Shop, fixed: Script) -> None:
    known = f"/orders/{fixed.order}"
    for path in (
        "/nowhere",
        "/orders/1",
        f"/orders/{uuid4()}",
        "/orders/",
        f"{known}/",
        "/shop.js/",
        "/../etc/passwd",
        "//",
    ):
        is_problem(shop.ask("GET", path, None, {"cookie": fixed.cookie}), 405 if path == "/orders" else 404)
    is_problem(fixed.post(f"/orders/{uuid4()}/payments", '{"amount": 1}'), 404, "order_unknown")
    is_problem(fixed.post("/services/printer", '{"do": "stop"}'), 404, "service_unknown")
    for method, path, allowed in (
        ("GET", "/orders", "POST"),
        ("POST", "/", "GET"),
        ("GET", f"{known}/payments", "POST"),
        ("PUT", f"{known}/payments", "POST"),
        ("DELETE", known, "GET"),
        ("PATCH", f"{known}/state", "POST"),
        ("BREW", "/", "GET"),
        ("OPTIONS", "/orders", "POST"),
    ):
        answer = shop.ask(method, path, "{}" if method not in ("GET", "OPTIONS") else None, {"cookie": fixed.cookie})
        is_problem(answer, 405)
        assert allowed in answer.headers["allow"]
    for path in ("/", "/shop.css", f"{known}/events"):
        assert shop.ask("HEAD", path, None, {"cookie": fixed.cookie}).status == 200


@pytest.mark.parametrize(
    "cookie", ["", "shop_visitor=", "shop_visitor=abc", "shop_visitor=" + "0" * 32, "shop_visitor=" + "z" * 32]
)
def test_requests_without_a_visitor_are_refused(shop: Shop, fixed: Script, cookie: str) -> None:
    headers = {"cookie": cookie, "content-type": "application/json", "idempotency-key": fixed.token}
    is_problem(shop.ask("POST", f"/orders/{fixed.order}/payments", '{"amount": 1}', headers), 404)
    if cookie != "shop_visitor=" + "0" * 32:  # which is a visitor, of no order
        is_problem(shop.ask("POST", "/orders", "{}", headers), 403, "no_user")
        is_problem(shop.ask("POST", "/services/worker", '{"do": "kill"}', headers), 403, "no_user")


@pytest.mark.parametrize("given", ['{"token": 1}', '{"token": "on"}', '{"tokens": true}', '{"ledger": null}', "[]"])
def test_switches_that_are_none(fixed: Script, given: str) -> None:
    is_problem(fixed.post("/orders", given), 422)


@pytest.mark.parametrize("given", ['{"do": "explode"}', "{}", '{"do": null}', '{"do": ["kill"]}', '{"do": "kill"}'])
def test_orders_to_services_that_are_none(fixed: Script, given: str) -> None:
    is_problem(fixed.post("/services/redis", given), 422, "do_unknown")


def test_a_body_without_a_length_is_counted(shop: Shop, fixed: Script) -> None:
    """Chunked: its size is known only when it has come."""
    host, port = shop.host.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /orders/{fixed.order}/payments HTTP/1.1\r\nhost: {shop.host}\r\ncookie: {fixed.cookie}\r\n"
        connection.sendall(head.encode() + b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
        connection.sendall(b"".join(b"400\r\n" + b"1" * 1024 + b"\r\n" for _ in range(9)))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


async def test_invalid_request_gets_no_500_and_no_charge(shop: Shop, fixed: Script) -> None:
    """Random requests, the same ones in each run."""
    chance = random.Random(7)
    paths = [
        "/",
        "/orders",
        "/services/x",
        *(f"/orders/{fixed.order}{path}" for path in ("", "/payments", "/state", "/x")),
    ]
    for _ in range(300):
        text = "".join(chance.choices(string.printable + '{}[]":,', k=chance.randrange(200)))
        given: dict[str, Any] = {
            "".join(chance.choices(string.ascii_lowercase, k=5)): chance.choice([text, 1, None, [text]])
        }
        given |= {
            chance.choice(["amount", "state", "version", "do", "token"]): chance.choice([text, -1, 1e99, None, {}])
        }
        body = chance.choice(
            [text.encode(), json.dumps(given).encode(), chance.randbytes(50), urlencode(given).encode()]
        )
        kind = chance.choice(["application/json", "application/x-www-form-urlencoded", "text/html", ""])
        headers = {"cookie": fixed.cookie, "content-type": kind, "idempotency-key": chance.choice(["x", "A" * 43])}
        answer = shop.ask(chance.choice(["POST", "POST", "POST", "PUT", "GET"]), chance.choice(paths), body, headers)
        assert answer.status < 500, (answer.status, body, headers)
        if answer.status >= 400 and not answer.headers["content-type"].startswith("text/html"):
            is_problem(answer, answer.status)
    await is_untouched(shop, fixed)


# -- truly at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("token", "ledger"), [(a, b) for a in ON_OFF for b in ON_OFF])
async def test_twenty_requests_at_once(shop: Shop, script: Script, token: bool, ledger: bool) -> None:
    script.again(token=token, ledger=ledger)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: script.pay(), range(20)))
    times = 1 if token or ledger else 20
    soon(lambda: len(script.view()["messages"]) >= (1 if token else 20), "the messages")
    soon(lambda: is_settled(script.view()) and script.view()["charged"]["times"] >= times, "all to be settled")
    assert await shop.charges(script.order) == times
    view = script.view()
    if "could not be checked" not in view["token"]["text"]:  # on a machine that is too busy for Redis to answer in time
        assert len(view["messages"]) == (1 if token else 20)
    statuses = [answer.status for answer in answers]
    assert set(statuses) <= ({202, 409} if token else {202})
    for answer in answers:
        if answer.status == 409:
            assert int(answer.headers["retry-after"]) >= 1 and is_problem(answer, 409, "token_in_use")
    # A tap that had to wait gets the first one's answer.
    last = script.pay()
    assert last.status == 202
    if token:
        assert last.body in [answer.body for answer in answers] and last.headers["idempotent-replayed"] == "true"
