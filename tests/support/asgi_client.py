"""Sends a request to an ASGI application in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def post(
    app: Any, path: str, body: bytes = b"", headers: Mapping[str, str] | Sequence[tuple[str, str]] = ()
) -> Answer:
    """Send a POST request. Raises what the application raises."""
    return await ask(app, "POST", path, body, headers)


async def ask(
    app: Any,
    method: str,
    address: str,
    body: bytes = b"",
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    client: str = "127.0.0.1",
) -> Answer:
    """Send a request. client: its address. Raises what the application raises."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    path, _, query = address.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs],
        "client": (client, 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    answer = Answer(0, {}, b"")

    bodies = [body]

    async def receive() -> dict[str, Any]:
        if not bodies:
            await asyncio.Event().wait()  # the client stays
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    await app(scope, receive, send)
    return answer
