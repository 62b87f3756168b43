"""Handlers that fail in every way that could quote their message."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

from consumer import App, Message, Retry, Tx

app = App(os.environ["TEST_APP"])
topic = os.environ["TEST_TOPIC"]
ONCE = Retry(attempts=2, base=0.01, cap=0.01)


@app.handler(topic, retry=ONCE)
async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
    text = message.value["text"]
    match message.value["do"]:
        case "raise":
            raise ValueError(os.environ["TEST_OWN_WORDS"])
        case "unique":
            await tx.execute("insert into people (email) values ($1)", text)
            await tx.execute("insert into people (email) values ($1)", text)
        case "unique deferred":
            tx.defer("insert into people (email) values ($1)", text)
            tx.defer("insert into people (email) values ($1)", text)
        case "check":
            await tx.execute("insert into people (email, age) values ($1, -1)", text)
        case "foreign":
            tx.defer("insert into children (email) values ($1)", text)
        case "cast":
            await tx.execute("select $1::text::int", text)
        case "argument":
            await tx.execute("insert into effects (id, account, amount) values ('x', $1, 1)", text)
        case "swallowed":
            try:
                await tx.execute("select $1::text::date", text)
            except Exception:
                pass
        case "future":
            asyncio.get_running_loop().create_future().set_exception(ValueError(text))
        case "thread":
            thread = threading.Thread(target=_raises, args=[text])
            thread.start()
            thread.join()
        case "finalizer":
            _Finalized(text)
        case "task":
            failing = asyncio.create_task(_fails(text))
            del failing
            await asyncio.sleep(0.05)


def _raises(text: str) -> None:
    raise ValueError(text)


async def _fails(text: str) -> None:
    raise ValueError(text)


class _Finalized:
    def __init__(self, text: str) -> None:
        self.text = text

    def __del__(self) -> None:
        raise ValueError(self.text)


@app.handler(topic, name="typed", message_id="header:message-id", retry=ONCE)
async def typed(value: list[int], tx: Tx) -> None: ...


@app.handler(topic, name="watching", idempotent=False, retry=Retry(attempts=1))
async def watching(value: dict[str, Any]) -> None:
    raise RuntimeError
