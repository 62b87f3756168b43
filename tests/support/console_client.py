"""The console's pages without a server, and an operator's requests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from asgi_client import Answer, ask

from consumer import App, Settings, Tx
from consumer.console.auth import Auth, LocalUser
from consumer.console.context import Console
from consumer.console.options import ConsoleOptions
from consumer.console.routes import application

HOST = "127.0.0.1:9465"
NOWHERE = Settings(postgres_dsn="postgresql://none@127.0.0.1:1/none", kafka_bootstrap_servers="127.0.0.1:1")


def small_app(name: str = "billing", topic: str = "payments") -> App:
    app = App(name)

    @app.handler(topic)
    async def settle(body: bytes, tx: Tx) -> None: ...

    return app


class Operator:
    """Asks the pages of a console as a browser does."""

    def __init__(self, console: Console, auth: Auth | None = None, **headers: str) -> None:
        self.console = console
        self.pages = application(console, auth or LocalUser(), console.options.hosts("127.0.0.1", 9465))
        self.headers = {"host": HOST, **{name.replace("_", "-"): text for name, text in headers.items()}}
        self.client = "127.0.0.1"

    @classmethod
    def of(cls, app: App, settings: Settings = NOWHERE, auth: Auth | None = None, **options: Any) -> Operator:
        return cls(Console(app, "module:app", settings, ConsoleOptions(**options)), auth)

    async def get(self, address: str, **headers: str) -> Answer:
        return await ask(self.pages, "GET", address, b"", self._with(headers), self.client)

    async def post(self, address: str, fields: Mapping[str, Any] = {}, **headers: str) -> Answer:
        """Send a form, with a token unless the fields have one."""
        given = {"origin": f"http://{self.headers['host']}", "content-type": "application/x-www-form-urlencoded"}
        sent = {"token": await self.token(), **fields} if "token" not in fields else fields
        return await ask(
            self.pages,
            "POST",
            address,
            urlencode(sent, doseq=True).encode(),
            self._with({**given, **headers}),
            self.client,
        )

    async def token(self) -> str:
        """The token of a form that the console renders for this operator."""
        operator = await self.get("/")
        match = re.search(r'class="who small">([^<,]*)', operator.body.decode())
        assert match is not None, operator
        return self.console.tokens.of(match[1])

    def _with(self, headers: Mapping[str, str]) -> dict[str, str]:
        given = {**self.headers, **{name.replace("_", "-"): text for name, text in headers.items()}}
        return {name: text for name, text in given.items() if text}


def text_of(answer: Answer) -> str:
    """The text of a page, on one line, without markup."""
    return " ".join(re.sub(r"<[^>]*>", " ", answer.body.decode()).split())
