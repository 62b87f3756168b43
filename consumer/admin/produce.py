"""Sends messages that the handlers of an App can read.

All are checked before the first is sent.
For development and operations; handlers publish through the outbox. Needs no PostgreSQL. Limitations: a file is held in
memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from consumer.admin.produce_plan import Outgoing, Problem, SeenIds, check, shown_id, with_id
from consumer.app import App
from consumer.core.delivery import Delivery
from consumer.core.errors import CannotTell, Misconfigured, Unreadable
from consumer.core.handler import Handler
from consumer.core.message import LogRecord
from consumer.core.models import Unfit
from consumer.core.shard_route import RouteFault, Router
from consumer.core.suggestions import UnknownName
from consumer.core.topic_names import TopicSelection
from consumer.decoders.from_json import JsonWriter, field_of, json_writer
from consumer.decoders.preparation import fetch_schemas, open_registry
from consumer.kafka.admin import topic_configs
from consumer.kafka.brokers import Brokers
from consumer.kafka.errors import KafkaError
from consumer.kafka.log_inspection import LogInspection
from consumer.kafka.producer import open_producer
from consumer.outbox.new_ids import new_message_id
from consumer.outbox.record import RECORD_BYTES_MAX, sent_size
from consumer.settings import Settings

_AT_A_TIME = 500  # messages that are sent before their acknowledgements are waited for
ACKNOWLEDGED_SECONDS_MIN = 10  # without an acknowledgement, until it gives up; with a longer --wait, that
_LINES_SHOWN_MAX = 5

Report = Callable[[str, int, int], None]  # phase, done, total


class Line(NamedTuple):
    """A value as it was typed.

    number: of its line in the file; None for a single message.
    """

    number: int | None
    text: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to send.

    where: names the lines in errors. is_raw: the values are in the format that handlers read. key_field, id_field: paths
    of fields, for a key and an id of each message.
    """

    topic: str
    lines: Sequence[Line]
    where: str = "VALUE"
    is_raw: bool = False
    key: bytes | None = None
    key_field: str | None = None
    message_id: bytes | None = None
    id_field: str | None = None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    partition: int | None = None


class Acknowledged(NamedTuple):
    """A message that all in-sync replicas have."""

    message: Outgoing
    partition: int
    offset: int


def readers(app: App, path: str, topic: str) -> list[Handler]:
    """Return the handlers of a topic.

    None where the App only publishes it. Raises UnknownName for a topic that it does neither with.
    """
    app.discover([topic])
    handlers = [handler for handler in app.handlers.values() if topic in handler.topics]
    if not handlers and topic not in app.publishes:
        known = TopicSelection([*app.selection.names, *app.publishes], app.selection.patterns)
        raise UnknownName(
            f"TOPIC {topic!r}: {path} neither has a handler of it nor publishes it; {known.suggestion(topic)}"
        )
    return handlers


class Producing:
    """One run of `consumer produce`."""

    def __init__(self, app: App, handlers: Sequence[Handler], request: Request, settings: Settings) -> None:
        self._handlers = handlers
        self._request = request
        self._settings = settings
        self._writer: JsonWriter | None = None if request.is_raw else json_writer(request.topic, handlers, app.encoder)
        self._router = Router(list(app.shards), app.route) if app.shards else None
        self._has_registry = any(handler.schema_needed is not None for handler in handlers)

    async def prepare(self, report: Report) -> list[Outgoing]:
        """Return the messages, checked.

        Raises Misconfigured, which names the lines that are wrong.
        """
        await self._open_registry()
        lines, seen = self._request.lines, SeenIds()
        messages: list[Outgoing] = []
        problems: list[tuple[int | None, str]] = []
        for place, line in enumerate(lines):
            try:
                messages.append(await self._message(place, line, seen))
            except (Problem, Unfit, Unreadable, RouteFault) as error:
                problems.append((line.number, str(error)))
            if place % _AT_A_TIME == 0:
                report("checking", place + 1, len(lines))
                await asyncio.sleep(0)  # for signals
        if problems:
            raise Misconfigured(f"{self._refusal(problems)}; nothing was sent")
        return messages

    async def _open_registry(self) -> None:
        codec = self._writer.codec if self._writer is not None else None
        codecs: list[Any] = [handler.decode for handler in self._handlers if handler.schema_needed is not None]
        if codec is not None and hasattr(codec, "use_registry"):
            codecs.append(codec)
        if codecs:
            await open_registry(codecs, codec, [self._request.topic], self._settings)

    async def _message(self, place: int, line: Line, seen: SeenIds) -> Outgoing:
        request, text = self._request, line.text
        new, wanted, key = str(new_message_id()).encode(), request.message_id, request.key
        if request.id_field is not None and text is not None:
            wanted = field_of(text, request.id_field.split("."))
        if request.key_field is not None and text is not None:
            key = field_of(text, request.key_field.split("."))
        value, headers = text, request.headers
        if text is not None and self._writer is not None:
            value, added = self._writer.write(text, wanted, new)
            given = {name for name, _ in headers}
            headers += tuple(header for header in added if header[0] not in given)
            wanted = None if self._writer.writes_events else wanted
        record = LogRecord(request.topic, request.partition or 0, place, int(time.time() * 1000), key, value, headers)
        if self._has_registry:
            await fetch_schemas([Delivery(handler, record) for handler in self._handlers], self._settings)
        record, sent = with_id(self._handlers, record, wanted, new)
        deliveries = check(self._handlers, record)
        seen.add(deliveries, line.number or 0)
        if self._router is not None:
            self._router.shard_of(key)
        return Outgoing(line.number, record, shown_id(deliveries, sent))

    def _refusal(self, problems: Sequence[tuple[int | None, str]]) -> str:
        number, problem = problems[0]
        if number is None:
            return f"{self._request.where}: {problem}"
        others = ", ".join(str(line) for line, _ in problems[1 : _LINES_SHOWN_MAX + 1])
        more = f" (and so {len(problems) - 1:,} more: {others}{', …' if len(problems) > _LINES_SHOWN_MAX + 1 else ''})"
        return f"{self._request.where}, line {number}: {problem}{more if others else ''}"

    async def send(
        self, messages: Sequence[Outgoing], acknowledged: Callable[[Acknowledged], None], report: Report
    ) -> None:
        """Send messages in their order, until Kafka has acknowledged all.

        acknowledged: called with each. Raises Misconfigured where nothing can be sent, CannotTell for an end in between.
        """
        await self._check_topic(messages)
        sending: list[asyncio.Future[Any]] = []
        try:
            async with open_producer(self._settings, idempotent=True) as producer:
                await self._check_rights(producer)
                await self._check_partition(producer)
                for first in range(0, len(messages), _AT_A_TIME):
                    part = messages[first : first + _AT_A_TIME]
                    for message in part:
                        sending.append(await self._start(producer, message.record))
                    await self._acknowledged(sending[first:])
                    for message, future in zip(part, sending[first:], strict=True):
                        metadata = future.result()
                        acknowledged(Acknowledged(message, metadata.partition, metadata.offset))
                    report("sending", first + len(part), len(messages))
        except (KafkaError, OSError) as error:  # TimeoutError is an OSError
            raise CannotTell(f"Kafka: {error or type(error).__name__}; {_how_many(sending, messages)}") from None
        except asyncio.CancelledError:
            raise CannotTell(_how_many(sending, messages)) from None

    async def _start(self, producer: Any, record: LogRecord) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = await producer.send(
            record.topic,
            record.value,
            key=record.key,
            partition=self._request.partition,
            headers=list(record.headers),
        )
        return future

    async def _acknowledged(self, sending: Sequence[asyncio.Future[Any]]) -> None:
        """Wait until messages are acknowledged or refused.

        Raises TimeoutError where Kafka no longer answers. Not gather, which would give up what is under way.
        """
        seconds = max(ACKNOWLEDGED_SECONDS_MIN, self._settings.wait_seconds)
        waiting = set(sending)
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise TimeoutError(f"no acknowledgement within {seconds:g} s")

    async def _check_rights(self, producer: Any) -> None:
        topic = self._request.topic
        if topic in await LogInspection(Brokers(producer.client)).not_writable([topic]):
            raise Misconfigured(f"topic {topic!r}: may not be written to; give this Kafka user the right Write on it")

    async def _check_topic(self, messages: Sequence[Outgoing]) -> None:
        topic, request = self._request.topic, self._request
        configs = await topic_configs(self._settings, [topic])
        if topic not in configs:
            raise Misconfigured(f"topic {topic!r}: does not exist; have it created, or check the Kafka cluster")
        limit = int((configs[topic] or {}).get("max.message.bytes") or RECORD_BYTES_MAX)
        for number, record, _ in messages:
            if (size := sent_size(record.key, record.value, record.headers)) > limit:
                place = request.where if number is None else f"{request.where}, line {number}"
                raise Misconfigured(
                    f"{place}: {size:,} bytes, and topic {topic!r} takes {limit:,}; raise max.message.bytes of the topic; nothing "
                    "was sent"
                )

    async def _check_partition(self, producer: Any) -> None:
        partition, topic = self._request.partition, self._request.topic
        if partition is not None and partition not in (known := await producer.partitions_for(topic)):
            raise Misconfigured(f"--partition {partition}: topic {topic!r} has none; it has 0 to {max(known)}")


def _how_many(sending: Sequence[asyncio.Future[Any]], messages: Sequence[Outgoing]) -> str:
    """Return how many messages were acknowledged, for an error."""
    done = sum(future.done() and not future.cancelled() and future.exception() is None for future in sending)
    unsure = len(sending) - done
    text = f"{done:,} of {len(messages):,} messages were acknowledged"
    return f"{text}, and {unsure:,} more may have been sent" if unsure else text
