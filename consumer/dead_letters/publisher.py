"""Publishes dead letters to the dead-letter topic, at least once.

Knows the table of dead letters to publish and a producer; settles nothing. The transaction that stores a dead letter
inserts a row there, and the transaction after Kafka's acknowledgement deletes it; SKIP LOCKED lets several workers
share the work, so that dead letters may overtake each other. After a crash in between, it is produced again, under the
same `dead-letter-id`. The table of dead letters is authoritative: what a retry does to a dead letter later is not
published. Limitations: does not know whether anyone reads the topic.

The copy has the original's key, value and headers, and besides: `dead-letter-id` (app/handler/number, the stable id of
the copy), `dead-letter-app`, `-handler`, `-topic`, `-partition`, `-offset`, `-timestamp`, `-reason`, `-error` (the
exception's class or SQLSTATE, not its text, which may quote the payload) and `-attempts`. What this client cannot send
is named in `dead-letter-altered`: headers whose keys are not UTF-8 are left out, and a message with neither key nor
value gets an empty value.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from consumer.core.errors import ConsumerError
from consumer.kafka.errors import KafkaError
from consumer.kafka.producer import open_producer
from consumer.logs import describe, event
from consumer.postgres import dead_letter_actions
from consumer.postgres.session import Session
from consumer.settings import Settings

_AT_A_TIME = 100
_IDLE_SECONDS = 1.0
_SEND_SECONDS = 30.0  # below the time after which PostgreSQL would end the transaction
_BACKOFF_SECONDS = (0.2, 10.0)


Header = tuple[str, bytes | None]


async def publish_loop(
    app: str, topic: str, settings: Settings, connect: Callable[[], Awaitable[Session | None]], woken: asyncio.Event
) -> None:
    """Publish dead letters until cancelled.

    connect: waits for a connection; None when the worker stops. woken: set when there may be some.
    """
    pause = _BACKOFF_SECONDS[0]
    while True:
        session = await connect()
        if session is None:
            return
        try:
            async with open_producer(settings, idempotent=True) as producer:
                while True:
                    pause = _BACKOFF_SECONDS[0]
                    if not await _publish(app, topic, session, producer):
                        woken.clear()
                        with suppress(TimeoutError):
                            await asyncio.wait_for(woken.wait(), _IDLE_SECONDS)
        except asyncio.CancelledError:
            raise
        except (KafkaError, ConsumerError, TimeoutError, OSError) as error:
            event(logging.WARNING, "dead letters wait to be published", topic=topic, error=describe(error))
        except Exception as error:
            if session.is_usable:
                raise
            event(logging.WARNING, "dead letters wait to be published", topic=topic, error=describe(error))
        finally:
            session.close()
        await asyncio.sleep(pause)
        pause = min(_BACKOFF_SECONDS[1], pause * 2)


async def _publish(app: str, topic: str, session: Session, producer: Any) -> int:
    """Publish some dead letters in one transaction; return how many.

    Their rows are deleted only after Kafka's acknowledgement.
    """
    await session.begin()
    rows = await dead_letter_actions.take_unpublished(session.connection, app, _AT_A_TIME)
    if rows:
        async with asyncio.timeout(_SEND_SECONDS):
            sent = [
                await producer.send(
                    topic,
                    row["value"] if row["value"] is not None or row["key"] is not None else b"",
                    key=row["key"],
                    headers=headers_of(row),
                )
                for row in rows
            ]
            answers = await asyncio.gather(*sent, return_exceptions=True)
        for row, answer in zip(rows, answers, strict=True):
            if isinstance(answer, KafkaError) and not answer.retriable:
                # For example too large for that topic: it would hold up all others for ever. PostgreSQL keeps it.
                event(
                    logging.ERROR,
                    "a dead letter cannot be published and is left out; it stays in postgresql",
                    dead_letter=row["dead_letter"],
                    error=describe(answer),
                )
            elif isinstance(answer, BaseException):
                raise answer
        await dead_letter_actions.mark_published(session.connection, [row["dead_letter"] for row in rows])
    await session.commit()
    return len(rows)


def headers_of(row: Any) -> list[Header]:
    """Return the headers of the copy of a dead letter."""
    kept: list[Header] = []
    altered = []
    for name, value in zip(row["header_keys"], row["header_values"], strict=True):
        try:
            kept.append((name.decode("utf-8"), value))
        except UnicodeDecodeError:
            altered.append("a header whose key is not UTF-8 was left out")
    if row["value"] is None and row["key"] is None:
        altered.append("the value was null")
    fields = {
        "id": f"{row['app']}/{row['handler_name']}/{row['dead_letter']}",
        "app": row["app"],
        "handler": row["handler_name"],
        "topic": row["topic"],
        "partition": row["partition"],
        "offset": row["offset"],
        "timestamp": row["timestamp"],
        "reason": row["reason"],
        "error": row["kind"],
        "attempts": row["attempts"],
    } | ({"altered": "; ".join(altered)} if altered else {})
    return kept + [(f"dead-letter-{name}", str(value).encode()) for name, value in fields.items()]
