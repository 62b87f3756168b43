"""Who may ask, from where, and which forms are accepted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from asgi_client import ask
from console_client import NOWHERE, Operator, small_app, text_of
from pydantic import SecretStr

from consumer import Misconfigured, Settings
from consumer.console.auth import ByFunction, ByProxy, auth_of
from consumer.console.options import ConsoleOptions
from consumer.console.tokens import FormTokens, is_same_origin

pytestmark = pytest.mark.unit

SECRET = "a-secret-of-the-proxy"
VIEW = "/dead-letters/1/message"


def settings(**more: Any) -> Settings:
    return NOWHERE.model_copy(update=more)


def operator(**options: Any) -> Operator:
    return Operator.of(small_app(), **options)


async def test_every_answer_has_the_headers() -> None:
    client = operator()
    for address in ("/", "/handlers", "/static/console.css", "/nothing", "/dead-letters/x"):
        answer = await client.get(address)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store" and answer.headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in answer.headers
    assert (await client.get("/", host="attacker.example:9465")).headers["content-security-policy"] == policy


async def test_pages_have_no_inline_style_or_script() -> None:
    for address in ("/", "/handlers", "/nothing"):
        body = (await operator().get(address)).body.decode()
        assert not re.search(r"<style|<[^>]* (style|on[a-z]+)=", body)
        assert body.count("<script") == body.count('<script src="/static/')
        assert "http://" not in body and "//cdn" not in body


@pytest.mark.parametrize("host", ["attacker.example:9465", "127.0.0.1:80", "", "127.0.0.1.attacker.example:9465"])
async def test_a_name_of_another_site_reaches_no_page(host: str) -> None:
    assert (await operator().get("/", host=host)).status == 421


@pytest.mark.parametrize("host", ["127.0.0.1:9465", "localhost:9465", "LOCALHOST:9465", "[::1]:9465"])
async def test_names_of_this_machine_do(host: str) -> None:
    assert (await operator().get("/", host=host)).status == 200


@pytest.mark.parametrize(
    ("fields", "headers", "status"),
    [
        ({}, {"origin": ""}, 403),
        ({}, {"origin": "null"}, 403),
        ({}, {"origin": "http://attacker.example"}, 403),
        ({}, {"origin": "http://127.0.0.1:9466"}, 403),
        ({"token": ""}, {}, 403),
        ({"token": "0" * 64}, {}, 403),
        ({"token": FormTokens(b"x" * 32).of("root")}, {}, 403),
        ({}, {"content_type": "text/plain"}, 415),
        ({}, {"content_type": "application/json"}, 415),
        ({"why": "x" * (3 << 20)}, {}, 413),
        ({"letter": [str(number) for number in range(3000)]}, {}, 400),
        ({}, {}, 503),  # a form of ours gets as far as PostgreSQL, which is not there
    ],
)
async def test_forms_of_other_sites_are_refused(fields: dict[str, Any], headers: dict[str, str], status: int) -> None:
    answer = await operator().post(VIEW, fields, **headers)
    assert answer.status == status, text_of(answer)
    assert b"Traceback" not in answer.body


async def test_other_methods_are_refused() -> None:
    client = operator()
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert (await ask(client.pages, method, "/", b"", client.headers)).status == 405
    assert (await ask(client.pages, "HEAD", "/", b"", client.headers)).status == 200
    assert (await client.get(VIEW)).status == 405


def test_origins_are_compared_with_the_host() -> None:
    assert is_same_origin("https://console.example", "console.example")  # a proxy ends TLS
    assert is_same_origin("http://[::1]:9465", "[::1]:9465")
    for origin in (
        "https://console.example.attacker.example",
        "https://attacker.example/console.example",
        "http://[",
        "",
    ):
        assert not is_same_origin(origin, "console.example")
    assert not is_same_origin("https://console.example", None)


# -- who asks -------------------------------------------------------------------------------------------------------------


async def test_proxy_on_this_machine_names_the_operator() -> None:
    client = Operator.of(small_app(), auth=ByProxy(None))
    assert (await client.get("/")).status == 401
    answer = await client.get("/", x_forwarded_user="ada@example.com")
    assert answer.status == 200 and "ada@example.com, read-only" in text_of(answer)
    assert (await client.get("/", x_forwarded_user="a\x1b[31mda")).status == 401
    assert (await client.get("/", x_forwarded_user="x" * 300)).status == 401
    two = [*client.headers.items(), ("x-forwarded-user", "ada"), ("x-forwarded-user", "eve")]
    assert (await ask(client.pages, "GET", "/", b"", two)).status == 401
    client.client = "10.0.0.7"  # anyone who reaches it directly could write any name
    assert (await client.get("/", x_forwarded_user="ada")).status == 401


async def test_proxy_elsewhere_is_known_by_its_secret() -> None:
    client = Operator.of(small_app(), auth=ByProxy(SECRET))
    client.client = "10.0.0.7"
    assert (await client.get("/", x_forwarded_user="ada")).status == 401
    assert (await client.get("/", x_forwarded_user="ada", x_console_secret=SECRET + "x")).status == 401
    assert (await client.get("/", x_forwarded_user="ada", x_console_secret=SECRET)).status == 200


async def test_token_is_of_one_operator() -> None:
    client = Operator.of(small_app(), auth=ByProxy(None))
    token = client.console.tokens.of("ada")
    assert (await client.post(VIEW, {"token": token}, x_forwarded_user="ada")).status == 503
    assert (await client.post(VIEW, {"token": token}, x_forwarded_user="eve")).status == 403


async def test_function_that_fails_lets_no_one_in() -> None:
    class Broken(Exception):
        pass

    def raises(request: Any) -> str | None:
        if "x-user" in request.headers:
            raise Broken("with a secret")
        return None

    for function in (raises, lambda request: 7 if "x-user" in request.headers else None):
        client = Operator.of(small_app(), auth=ByFunction(function))
        assert (await client.get("/")).status == 401
        answer = await client.get("/", x_user="ada")
        assert answer.status == 500 and b"secret" not in answer.body


async def test_functions_may_be_async_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "who_asks.py").write_text(
        "async def waits(request): return request.headers.get('x-user')\n"
        "def plain(request): return request.headers.get('x-user')\n"
        "def raises(request): return request.headers['x-user'] + 1 / 0\n"
        "def anyone(request): return 'root'\n"
        "number = 7\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("waits", "plain"):
        client = Operator.of(small_app(), auth=await auth_of(f"who_asks:{name}", NOWHERE))
        assert (await client.get("/", x_user="ada")).status == 200
        assert (await client.get("/")).status == 401
    for name, says in (
        ("raises", "fails for a request without headers"),
        ("anyone", "lets in a request without headers"),
        ("number", "cannot be called"),
        ("absent", "cannot be imported"),
    ):
        with pytest.raises(Misconfigured, match=says):
            await auth_of(f"who_asks:{name}", NOWHERE)
    with pytest.raises(Misconfigured, match="cannot be imported"):
        await auth_of("no_such_module:who", NOWHERE)
    with pytest.raises(Misconfigured, match="does not name a function"):
        await auth_of("who_asks", NOWHERE)


# -- where it listens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "more", "says"),
    [
        ({"listen": "nowhere"}, {}, "not an address"),
        ({"listen": "127.0.0.1:70000"}, {}, "not an address"),
        ({"listen": "0.0.0.0:9465"}, {}, "add --auth"),
        ({"listen": "[::]:9465"}, {}, "add --auth"),
        ({"listen": "0.0.0.0:9465", "auth": "who:asks"}, {}, "without TLS"),
        ({"listen": "0.0.0.0:9465", "auth": "proxy"}, {"allow_insecure": "http"}, "CONSUMER_CONSOLE_PROXY_SECRET"),
        ({"reports": Path("/nonexistent")}, {}, "no such directory"),
    ],
)
def test_addresses_that_are_refused(options: dict[str, Any], more: dict[str, Any], says: str) -> None:
    with pytest.raises(Misconfigured, match=says):
        ConsoleOptions(**options).address(settings(**more))


def test_addresses_that_are_served() -> None:
    assert ConsoleOptions().address(settings()) == ("127.0.0.1", 9465)
    assert ConsoleOptions(listen="[::1]:0").address(settings()) == ("::1", 0)
    open_to_others = settings(allow_insecure="http", console_proxy_secret=SecretStr(SECRET))
    assert ConsoleOptions(listen="0.0.0.0:1", auth="proxy").address(open_to_others) == ("0.0.0.0", 1)
    assert ConsoleOptions(auth="proxy").hosts("127.0.0.1", 9465) is None
