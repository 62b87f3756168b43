"""The small HTTP server: its answers, and bad clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from harness import until

from consumer.core.errors import Misconfigured
from consumer.monitoring.http_server import Answer, HttpServer, Request, as_text

pytestmark = pytest.mark.unit


def echo(request: Request) -> Answer:
    return as_text(request.path, str(dict(request.query)), request.headers.get("accept", "-"))


def broken(_: Request) -> Answer:
    raise ValueError("secret")


@asynccontextmanager
async def served(**limits: Any) -> AsyncIterator[tuple[HttpServer, int]]:
    server = HttpServer({"/echo": echo, "/broken": broken}, **limits)
    port = await server.open("127.0.0.1", 0)
    try:
        yield server, port
    finally:
        server.close()


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await reader.read()
    finally:
        writer.close()


async def test_get_and_head() -> None:
    async with served() as (_, port):
        head, _, body = (await ask(port, b"GET /echo?strict&a=1 HTTP/1.1\r\nAccept: x/y\r\n\r\n")).partition(
            b"\r\n\r\n"
        )
        assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"\r\nConnection: close" in head
        assert body == b"/echo\n{'strict': '', 'a': '1'}\nx/y\n" and f"Content-Length: {len(body)}".encode() in head
        same, _, nothing = (await ask(port, b"HEAD /echo?strict&a=1 HTTP/1.1\r\naccept:x/y\r\n\r\n")).partition(
            b"\r\n\r\n"
        )
        assert same == head and nothing == b""


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /echo HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /nothing HTTP/1.1\r\n\r\n", b"404"),
        (b"GET //[ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /echo\r\n\r\n", b"400"),
        (b"\x16\x03\x01\r\n\r\n", b"400"),
        (b"GET /echo HTTP/1.1\r\nX: " + b"y" * 20_000 + b"\r\n\r\n", b"431"),
        (b"GET /" + b"y" * 20_000, b"431"),
    ],
)
async def test_refused_requests(request_bytes: bytes, status: bytes) -> None:
    async with served() as (_, port):
        answer = await ask(port, request_bytes)
        assert answer.split(b" ", 2)[1] == status
        assert b"/echo" in answer if status == b"404" else True


async def test_a_page_that_fails_says_nothing_of_the_error() -> None:
    async with served() as (_, port):
        answer = await ask(port, b"GET /broken HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 500 ") and b"secret" not in answer
        assert (await ask(port, b"GET /echo HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_a_slow_client_is_ended() -> None:
    async with served(request_seconds=0.05) as (_, port):
        assert await ask(port, b"GET /echo HTTP/1.1\r\n") == b""


async def test_idle_connections_are_few_and_end_with_the_server() -> None:
    async with served(connections_max=2) as (server, port):
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]

        async def accepted() -> bool:
            return server.connections == 2

        await until("the connections to be accepted", accepted)
        with pytest.raises(ConnectionError):
            await ask(port, b"GET /echo HTTP/1.1\r\n\r\n")
        server.close()
        for reader, writer in idle:
            try:
                assert await reader.read() == b""
            except ConnectionError:
                pass
            writer.close()


async def test_a_port_in_use_and_an_address_of_another_machine() -> None:
    async with served() as (_, port):
        with pytest.raises(Misconfigured, match="the port is in use"):
            await HttpServer({}).open("127.0.0.1", port)
    with pytest.raises(Misconfigured, match="no such address"):
        await HttpServer({}).open("192.0.2.1", 0)
