"""Logs are structured, and contain no message, id or secret."""

from __future__ import annotations

import io
import json
import logging
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from harness import WORKER_PASSWORD, Place, Sent, consume_all, letters, until, working
from services import Kafka

from consumer import App, Message, Retry, Tx, logs

CANARY = "canary7f3a"
NO_IDS: dict[str, str] = {}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def restored() -> Iterator[None]:
    """The loggers as pytest had them."""
    before = [
        (logger, logger.handlers[:], logger.level, logger.propagate) for logger in (logging.getLogger(), logs.log)
    ]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_json_off_a_terminal_and_text_on_one(restored: None) -> None:
    plain, terminal = io.StringIO(), Terminal()
    logs.configure("info", "auto", plain)
    logs.event(logging.WARNING, "it happened", topic="a\nb\x1b[31m", count=3)
    line = json.loads(plain.getvalue())
    assert (line["event"], line["level"], line["count"]) == ("it happened", "warning", 3)
    logs.configure("info", "auto", terminal)
    logs.event(logging.WARNING, "it happened", topic="a\nb\x1b[31m", count=3)
    logs.event(logging.DEBUG, "not this", count=1)
    text = terminal.getvalue()
    assert "it happened" in text and "count=3" in text and "not this" not in text
    assert text.count("\n") == 1 and "\x1b" not in text  # a name cannot forge a line or drive the terminal


async def test_logs_hold_no_payload_id_key_or_secret(place: Place, kafka: Kafka, restored: None) -> None:
    """Every failure of a message happens, at the most verbose level."""
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    topic = await place.topic()
    app = App(f"logs-{uuid.uuid4().hex[:8]}")

    @app.handler(topic, retry=Retry(attempts=2, base=0.01, cap=0.01))
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        match message.value.get("do"):
            case "raise":
                raise ValueError(message.value["text"])
            case "sql":
                await tx.execute("select $1::text::int", message.value["text"])
            case "defer":
                tx.defer("insert into accounts (id) values ($1::text::int)", message.value["text"])
            case "wrong":
                tx.defer("insert into accounts (id) values ($1)", message.value["text"])
            case "misuse":
                await tx.execute(f"commit -- {CANARY}")
            case "syntax":
                await tx.execute(f"select {CANARY}")

    @app.handler(topic, name="typed", message_id=f"header:{CANARY}")
    async def typed(value: list[int], tx: Tx) -> None: ...

    @app.handler(topic, name="by_function", message_id=lambda value: NO_IDS[CANARY])
    async def by_function(value: dict[str, Any]) -> None: ...

    @app.handler(topic, name="opted_out", idempotent=False, retry=Retry(attempts=1))
    async def opted_out(value: dict[str, Any]) -> None:
        raise RuntimeError(CANARY)

    doings = ["raise", "sql", "defer", "wrong", "misuse", "nothing"]
    sent = [
        Sent(
            {"do": action, "text": CANARY},
            id=f"{CANARY}-{action}",
            key=CANARY + action,
            headers=[(CANARY, CANARY.encode())],
        )
        for action in doings
    ]
    await place.send(topic, sent[0])
    await consume_all(app, place.settings())  # apart, since only the first failures of a batch are logged
    await place.send(
        topic, *sent, sent[0], Sent(f'"{CANARY}'.encode(), id=CANARY), Sent({"text": CANARY}, id=f"{CANARY}-raise")
    )
    await consume_all(app, place.settings())
    assert len(await letters(place.dsn)) > 20
    # What does not fit the schema waits until the code or the schema is repaired.
    await place.send(topic, Sent({"do": "syntax", "text": CANARY}, id=f"{CANARY}-syntax", key=f"{CANARY}-syntax"))
    async with working(app, place.settings()):

        async def waits() -> bool:
            return "waits, uncounted" in stream.getvalue()

        await until("the log event", waits)
    logged = stream.getvalue()
    for line in logged.splitlines():
        json.loads(line)
    assert "dead letter" in logged and "tried again" in logged
    assert CANARY not in logged
    assert WORKER_PASSWORD not in logged
