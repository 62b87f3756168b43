"""The shop as a process, and raw requests to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg
from harness import ROOT

PRICE = 1250
JSON = {"content-type": "application/json"}
FORM = {"content-type": "application/x-www-form-urlencoded"}


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Shop:
    """`python -m handlers.shop`, on a free port."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "handlers.shop", "--port", "0", "--json", *arguments],
            cwd=ROOT,
            env={**os.environ, "CONSUMER_POSTGRES_DSN": "postgresql://not.this.one/x", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the shop did not start"
        self.announced = json.loads(line)
        self.url: str = self.announced["page"]
        self.host = self.url.removeprefix("http://")
        self.dsn: str = self.announced["postgres_dsn"]

    def ask(
        self, method: str, path: str, body: bytes | str | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        try:
            connection.request(method, path, body.encode() if isinstance(body, str) else body, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, {n.lower(): v for n, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    async def value(self, sql: str, *args: Any) -> Any:
        connection = await asyncpg.connect(self.dsn)
        try:
            return await connection.fetchval(sql, *args)
        finally:
            await connection.close()

    async def charges(self, order: str) -> int:
        """How often an order was charged: what PostgreSQL holds."""
        return int(await self.value("select count(*) from shop.charges where order_id = $1", UUID(order)))

    async def balance(self, order: str, protected: bool) -> int:
        """Of the account of who made the order."""
        return int(
            await self.value(
                "select balance from shop.accounts a join shop.orders o using (visitor) where order_id = $1 and a.protected = $2",
                UUID(order),
                protected,
            )
        )

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Script:
    """A visitor without a browser."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        answer = shop.ask("GET", "/")
        assert answer.status == 200
        self.cookie = answer.headers["set-cookie"].split(";")[0]
        self.order, self.token = read(answer.body)

    def post(self, path: str, body: bytes | str | None, **headers: str) -> Answer:
        given = {"cookie": self.cookie, "content-type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        return self.shop.ask("POST", path, body, {name: value for name, value in given.items() if value})

    def again(self, **switches: bool) -> None:
        """Another order, under these switches."""
        answer = self.post("/orders", json.dumps(switches))
        assert answer.status == 201
        self.order = answer.json["order"]
        order, self.token = self.load()
        assert order == self.order

    def load(self) -> tuple[str, str]:
        """The order and the token that the page shows now."""
        return read(self.shop.ask("GET", "/", None, {"cookie": self.cookie}).body)

    def pay(self, amount: str = "12.50", **headers: str) -> Answer:
        given = {"idempotency_key": self.token} if self.token else {}
        return self.post(f"/orders/{self.order}/payments", json.dumps({"amount": amount}), **{**given, **headers})

    def view(self) -> dict[str, Any]:
        answer = self.shop.ask("GET", f"/orders/{self.order}", None, {"cookie": self.cookie})
        assert answer.status == 200
        return dict(answer.json)


def read(page: bytes) -> tuple[str, str]:
    """The order and the token of a page."""
    text = page.decode()
    order, token = re.search('data-order="([^"]*)"', text), re.search('data-token="([^"]*)"', text)
    assert order and token
    return order[1], token[1]


def is_settled(view: dict[str, Any]) -> bool:
    """Whether everything that this order sent has come to its end."""
    return all(tap["status"] is not None for tap in view["taps"]) and not any(
        "not settled" in message["fate"] or message["place"] is None for message in view["messages"]
    )


def soon(condition: Any, what: str, seconds: float = 60) -> Any:
    """Wait for a condition without a loop of asyncio."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
