"""How a registry is reached, and what is an outage.

Over real HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from harness import settings_for, until
from schema_registry import SchemaRegistry

from consumer import App, Misconfigured
from consumer.core.delivery import Delivery
from consumer.core.errors import ServiceUnavailable
from consumer.core.message import LogRecord
from consumer.core.outcome import RetryLater
from consumer.decoders import Avro
from consumer.decoders.preparation import set_aside
from consumer.decoders.registry import Registry
from consumer.decoders.registry_client import RegistryClient, RegistryUnavailable

pytestmark = pytest.mark.unit


def client(url: str, **more: Any) -> RegistryClient:
    return RegistryClient(settings_for("postgresql://x/y", "127.0.0.1:1", None, schema_registry_url=url, **more))


@pytest.mark.parametrize(
    ("credentials", "settings"),
    [
        (
            "Basic " + base64.b64encode(b"key:se:cret").decode(),
            {"schema_registry_username": "key", "schema_registry_password": "se:cret"},
        ),
        ("Bearer abc", {"schema_registry_token": "abc"}),
    ],
)
def test_credentials_are_sent(credentials: str, settings: dict[str, str]) -> None:
    with SchemaRegistry() as registry:
        registry.credentials = credentials
        assert client(registry.url, **settings).schema(1).kind == "AVRO"
        with pytest.raises(
            RegistryUnavailable, match=r"refuses the credentials \(401\); see CONSUMER_SCHEMA_REGISTRY_USER"
        ):
            client(registry.url).schema(1)


def test_certificates_are_verified(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.issue("registry", "localhost"))
    with SchemaRegistry(context) as registry:
        assert client(registry.url, schema_registry_ca_file=str(authority.file)).schema(1).kind == "AVRO"
        for ca in ({"schema_registry_ca_file": str(other.file)}, {}):
            with pytest.raises(RegistryUnavailable, match=r"does not answer .*CERTIFICATE_VERIFY_FAILED"):
                client(registry.url, **ca).schema(1)
        by_address = registry.url.replace("localhost", "127.0.0.1")
        with pytest.raises(RegistryUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            client(by_address, schema_registry_ca_file=str(authority.file)).schema(1)
        assert all(path == "/schemas/ids/1" for path in registry.requests)


def test_the_next_address_is_asked_if_one_does_not_answer() -> None:
    with SchemaRegistry() as registry:
        assert client(f"http://localhost:1, {registry.url}/").schema(1).kind == "AVRO"


def test_a_path_that_is_no_registry_is_not_taken_for_an_unknown_schema() -> None:
    with (
        SchemaRegistry() as registry,
        pytest.raises(RegistryUnavailable, match="lack a path, such as /apis/ccompat/v7"),
    ):
        client(f"{registry.url}/wrong").schema(1)


def test_a_registry_without_descriptors_of_protobuf_is_named() -> None:
    """Apicurio answers with the text, whatever format is asked for."""
    with SchemaRegistry() as registry:
        registry.serializes = False
        with pytest.raises(RegistryUnavailable, match="Protobuf schema as text only; use one that answers"):
            client(registry.url).schema(6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "CONSUMER_SCHEMA_REGISTRY_URL: not set, and a decoder or encoder of the App needs it; set it"),
        ({"url": "registry:8081"}, "no http or https address; write https://host:port"),
        ({"url": "https://key:secret@registry"}, "holds a user; write it to CONSUMER_SCHEMA_REGISTRY_USERNAME"),
        ({"url": "http://registry.example:8081"}, "or allow it with CONSUMER_ALLOW_INSECURE=registry"),
        ({"url": "https://r", "username": "a"}, "goes with CONSUMER_SCHEMA_REGISTRY_PASSWORD; set both, or neither"),
        (
            {"url": "https://r", "username": "a", "password": "b", "token": "c"},
            "excludes CONSUMER_SCHEMA_REGISTRY_USERNAME; unset one",
        ),
        ({"url": "https://r", "ca_file": "/nowhere"}, "CONSUMER_SCHEMA_REGISTRY_CA_FILE: it cannot be used"),
    ],
)
async def test_settings_that_cannot_be_used_are_one_line_at_the_start(settings: dict[str, str], says: str) -> None:
    app = App("shop", decode=Avro())

    @app.handler("orders")
    async def store(order: dict[str, Any]) -> None: ...

    given = {f"schema_registry_{name}": value for name, value in settings.items()}
    with pytest.raises(Misconfigured) as error:
        await app.open_registry(settings_for("postgresql://x/y", "127.0.0.1:1", None, **given))
    assert says in str(error.value) and "\n" not in str(error.value) and "secret" not in str(error.value)


def test_another_machine_without_tls_can_be_allowed() -> None:
    client("http://registry.example:8081", allow_insecure="registry")


async def test_a_registry_that_is_down_is_asked_again_until_it_answers() -> None:
    with SchemaRegistry() as server:
        server.is_down = True
        registry = Registry(client(server.url))
        assert not await registry.fetch([1], 0.05)
        await until("several requests", lambda: _true(len(server.requests) > 2))
        assert "503" in registry.error and registry.needs(1)
        with pytest.raises(ServiceUnavailable, match=r"schema registry: the registry answers 503, for 0.01 s"):
            await registry.fetch_all([1], 0.01)
        server.is_down = False
        assert await registry.fetch([1], 30)
        assert registry.schema(1).kind == "AVRO" and registry.error == ""


async def test_messages_behind_one_that_is_set_aside_wait_too() -> None:
    with SchemaRegistry() as server:
        app = App("shop", decode=Avro())

        @app.handler("orders")
        async def store(order: dict[str, Any]) -> None: ...

        await app.open_registry(settings_for("postgresql://x/y", "127.0.0.1:1", None, schema_registry_url=server.url))

        def delivery(offset: int, key: bytes, schema: int) -> Delivery:
            value = b"\0" + schema.to_bytes(4, "big") + b"x"
            return Delivery(app.handlers["store"], LogRecord("orders", 0, offset, 0, key, value, ()))

        assert await set_aside([known := delivery(0, b"k", 1)]) == [known]
        server.is_down = True
        batch = [delivery(1, b"a", 2), delivery(2, b"a", 1), delivery(3, b"b", 1), delivery(4, b"c", 3)]
        assert await set_aside(batch) == [batch[2]]
        assert [type(one.outcome) for one in batch] == [RetryLater, RetryLater, type(None), RetryLater]
        assert [one.attempts for one in batch] == [0, 0, 0, 0] and all(one.id for one in batch if one.outcome)
        assert batch[0].failure_cause is not None and batch[0].failure_cause.systemic
        server.is_down = False
        for one in batch:
            one.outcome = None  # as a scheduler does before it gives them again

        async def ready() -> bool:
            return await set_aside(batch) == batch

        await until("the schemas", ready)


async def test_an_unknown_id_that_is_known_a_moment_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower of a registry may lag behind its leader."""
    monkeypatch.setattr("consumer.decoders.registry.CONFIRM_SECONDS", 0.2)
    with SchemaRegistry() as server:
        registry = Registry(client(server.url))
        fetching = asyncio.create_task(registry.fetch([77], 30))
        await until("the first request", lambda: _true(server.requests))
        server.add("late-value", '"string"', id=77)
        assert await fetching
        assert registry.schema(77).text == '"string"'


async def _true(condition: object) -> bool:
    return bool(condition)
