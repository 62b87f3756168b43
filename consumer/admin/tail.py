"""Follows topics, and asks the ledger what became of each message.

Joins no group, commits nothing and changes nothing. Reads what is committed. Limitations: partitions that are added
meanwhile are not read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

from consumer.admin.bytes_as_text import text_or_base64
from consumer.admin.ledger_access import connected
from consumer.admin.tail_messages import fault_in, id_text, in_time_order
from consumer.app import App
from consumer.core.delivery import Delivery
from consumer.core.errors import CannotTell, Misconfigured
from consumer.core.log_identity import ObservedLog, Position, check_log
from consumer.core.message import Partition, Record
from consumer.core.message_state import NOTHING, HandlerState, State, state_of
from consumer.core.shard_route import RouteFault, Router
from consumer.decoders.from_json import json_of
from consumer.decoders.preparation import fetch_schemas
from consumer.kafka.bounds import Latest, Span
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import LogTruncated
from consumer.kafka.log_reader import Chunk, find_partitions, parse, read, read_last, resolve, spans_between
from consumer.kafka.protocol import Identity
from consumer.postgres import message_states, positions
from consumer.postgres.connection import database_epoch, translated_errors
from consumer.postgres.protocol import Connection
from consumer.settings import Settings
from consumer.sharding import shards
from consumer.transaction.identify import identify

_FOR_EVER = 1 << 62  # an offset that no log reaches
_CHUNKS_MAX = 16  # that are read before they are shown
# A worker settles a message within some ten milliseconds of its arrival: shown at once, each would be unsettled.
SETTLE_SECONDS, _ASK_AGAIN_SECONDS = 1.0, 0.1

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TailOptions:
    """What to follow.

    until: None for ever. last: begin with the last so many messages.
    """

    topics: tuple[str, ...] = ()
    start: str = "latest"
    until: str | None = None
    last: int | None = None
    partitions: tuple[int, ...] = ()
    key: bytes | None = None
    values: bool = False


def time_of(timestamp_ms: int) -> datetime | None:
    """Return the time of a record.

    None where it has none, or one beyond the year 9999: of a producer that counts microseconds.
    """
    try:
        return _EPOCH + timedelta(milliseconds=timestamp_ms) if timestamp_ms >= 0 else None
    except OverflowError:
        return None


class Shown(NamedTuple):
    """A message, and what became of it."""

    record: Record
    id: str | None
    handlers: Sequence[HandlerState]
    value: bytes | None  # as JSON, where a decoder makes it from another format

    def as_dict(self, with_values: bool) -> dict[str, Any]:
        """Return the message as `--json` prints it."""
        record, at = self.record, time_of(self.record.timestamp)
        row: dict[str, Any] = {
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "time": None if at is None else at.isoformat(timespec="milliseconds"),
            "key": text_or_base64(record.key),
            "id": self.id,
            "handlers": [
                {**state._asdict(), "at": None if state.at is None else state.at.isoformat()} for state in self.handlers
            ],
        }
        if with_values:
            row["headers"] = [[name, text_or_base64(value)] for name, value in record.headers]
            row["value"] = text_or_base64(self.value)
        return row


class Ledgers:
    """Connections to the databases of an App, opened again when they end."""

    def __init__(self, app: App, settings: Settings) -> None:
        self._settings = shards.settings_of(app, settings)
        self._open: dict[str, Any] = {}

    async def ask(self, shard: str, question: Callable[[Connection], Awaitable[T]]) -> T:
        """Ask a database.

        Waits for one that is down as long as --wait allows. Raises Misconfigured, ServiceUnavailable.
        """
        settings = self._settings[shard]
        while True:
            connection = self._open.get(shard)
            if connection is None or connection.is_closed():
                connection = self._open[shard] = await connected(settings)
                with translated_errors(settings):
                    await database_epoch(connection, settings)
            try:
                return await question(connection)
            except Exception:
                if not connection.is_closed():
                    raise

    def close(self) -> None:
        """End the connections."""
        for connection in self._open.values():
            connection.terminate()


@dataclass(slots=True)
class Tail:
    """One run of `consumer tail`."""

    app: App
    settings: Settings
    options: TailOptions
    ledgers: Ledgers = field(init=False)
    _router: Router = field(init=False)
    _logs: Identity = field(init=False)
    _ends: dict[Partition, int] = field(default_factory=dict)  # of the logs when it began; what comes after is new

    def __post_init__(self) -> None:
        self.ledgers = Ledgers(self.app, self.settings)
        self._router = Router(list(self.app.shards), self.app.route)

    async def run(self, show: Callable[[Sequence[Shown]], None], announce: Callable[[str], None]) -> None:
        """Show messages as they come, until the end of the range.

        Raises Misconfigured, ServiceUnavailable, KafkaError, and CannotTell for records that are gone or unreadable.
        """
        await self.app.open_registry(self.settings)
        source = KafkaConsumer(self.settings, None)
        try:
            await source.start(self.settings.wait_seconds)
            spans = await self._spans(source, announce)
            if self.options.last is not None:
                spans = await self._show_last(source, spans, self.options.last, show)
            if any(span.length for span in spans):
                await self._follow(source, spans, show)
        except LogTruncated as error:
            raise CannotTell(f"{error}: it was removed while it was read; run the command again") from None
        finally:
            self.ledgers.close()
            await source.stop(5)

    async def _spans(self, source: KafkaConsumer, announce: Callable[[str], None]) -> list[Span]:
        """Return what to read of each partition."""
        topics = list(self.options.topics)
        if not topics:
            if self.app.has_patterns:
                self.app.discover(await source.log.topics())
            existing = await source.log.partitions(self.app.topics)
            topics = [topic for topic in self.app.topics if existing[topic]]
            if absent := [topic for topic in self.app.topics if not existing[topic]]:
                announce(f"topics that do not exist are left out: {', '.join(absent)}")
            if not topics:
                raise Misconfigured(f"topics: none of {self.app.selection} exists; have them created")
        partitions = await find_partitions(source, topics, self.options.partitions)
        self._logs = await source.log.identity(topics)
        now = int(time.time() * 1000)
        start = parse(self.options.start, "--from", now)
        known = await self._positions(partitions)
        if self.options.until is not None and self.options.last is None:
            return await resolve(source, partitions, start, parse(self.options.until, "--until", now), known)
        spans = await spans_between(source, partitions, start, Latest(), known)
        self._ends = {span.partition: span.end for span in spans}
        return [
            span._replace(first=span.end if self.options.last is not None else span.first, end=_FOR_EVER)
            for span in spans
        ]

    async def _positions(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Return the lowest position of each partition in all shards.

        Asked in any case: a database that cannot be used is an error at once, not with the first message.
        """
        known: dict[Partition, int] = {}
        for shard in self._router.shards or ("",):
            at = await self.ledgers.ask(shard, lambda asked: positions.read_positions(asked, self.app.name, partitions))
            for partition, position in at.items():
                known[partition] = min(position.offset, known.get(partition, position.offset))
        return known

    async def _show_last(
        self, source: KafkaConsumer, spans: Sequence[Span], last: int, show: Callable[[Sequence[Shown]], None]
    ) -> list[Span]:
        """Show the last messages of all partitions; return what comes after."""
        records = await read_last(source, {span.partition: span.first for span in spans}, last)
        await self._show(in_time_order(records)[-last:], show)
        return [span._replace(end=span.first) for span in spans] if self.options.until is not None else list(spans)

    async def _follow(
        self, source: KafkaConsumer, spans: Sequence[Span], show: Callable[[Sequence[Shown]], None]
    ) -> None:
        chunks: asyncio.Queue[Chunk | None] = asyncio.Queue(_CHUNKS_MAX)

        async def fetch() -> None:
            failure = None
            try:
                async for chunk in read(source, spans):
                    await chunks.put(chunk)
            except Exception as error:  # raised again, once what was read before is shown
                failure = error
            await chunks.put(None)
            if failure is not None:
                raise failure

        fetching = asyncio.create_task(fetch())
        try:
            is_open = True
            while is_open:
                read_now = [await chunks.get()]
                while not chunks.empty():
                    read_now.append(chunks.get_nowait())
                is_open = None not in read_now
                records = [record for chunk in read_now if chunk is not None for record in chunk.records]
                await self._show(in_time_order(records), show)
            await fetching  # raises what ended it
        finally:
            fetching.cancel()

    # -- what became of them ------------------------------------------------------------------------------------------

    async def _show(self, records: Sequence[Record], show: Callable[[Sequence[Shown]], None]) -> None:
        if self.options.key is not None:
            records = [record for record in records if record.key == self.options.key]
        if not records:
            return
        clock = asyncio.get_running_loop().time
        deadline = clock() + SETTLE_SECONDS
        by_topic = self.app.by_topic()
        while True:
            deliveries = [Delivery(handler, record) for record in records for handler in by_topic.get(record.topic, ())]
            await fetch_schemas(deliveries, self.settings)
            states = await self._states(deliveries)
            if clock() > deadline or not any(
                state.state is State.UNSETTLED and self._is_new(delivery) for delivery, state in states.items()
            ):
                break
            await asyncio.sleep(_ASK_AGAIN_SECONDS)
        by_record: dict[int, list[Delivery]] = {id(record): [] for record in records}
        for delivery in deliveries:
            by_record[id(delivery.record)].append(delivery)
        show([self._shown(record, by_record[id(record)], states) for record in records])

    def _is_new(self, delivery: Delivery) -> bool:
        """Whether a message came after the tail began, whatever its timestamp says."""
        end = self._ends.get(delivery.partition)
        return end is not None and delivery.record.offset >= end

    def _shown(self, record: Record, deliveries: Sequence[Delivery], states: Mapping[Delivery, HandlerState]) -> Shown:
        value = record.value
        if self.options.values and deliveries and deliveries[0].handler.read is not None:
            value = json_of(deliveries[0].handler.read, record)
        id = id_text(deliveries[0]) if deliveries else None
        return Shown(record, id, [states[delivery] for delivery in deliveries], value)

    async def _states(self, deliveries: Sequence[Delivery]) -> dict[Delivery, HandlerState]:
        by_shard: dict[str, list[Delivery]] = {}
        states: dict[Delivery, HandlerState] = {}
        for delivery in deliveries:
            try:
                shard = self._router.shard_of(delivery.record.key) if self.app.shards else ""
            except RouteFault as fault:
                identify([delivery])
                states[delivery] = state_of(delivery, NOTHING, None, str(fault))
                continue
            by_shard.setdefault(shard, []).append(delivery)
        for shard, of_shard in by_shard.items():
            states |= await self.ledgers.ask(shard, lambda asked, some=of_shard: self._stored(asked, some))  # type: ignore[misc]
        return states

    async def _stored(self, connection: Connection, deliveries: Sequence[Delivery]) -> dict[Delivery, HandlerState]:
        partitions = sorted({delivery.partition for delivery in deliveries})
        # Before the messages: one that is settled in between is applied, and not unknown.
        logs: dict[Partition, Position] = await positions.read_positions(connection, self.app.name, partitions)
        identify(deliveries, logs)
        stored = await message_states.read(connection, self.app.name, deliveries)
        others = {partition: self._other_log(partition, position) for partition, position in logs.items()}
        return {
            delivery: state_of(
                delivery,
                of_message,
                logs[delivery.partition].offset if delivery.partition in logs else None,
                fault_in(delivery),
            )
            if (other := others.get(delivery.partition)) is None
            else state_of(delivery, NOTHING, None, other)
            for delivery, of_message in zip(deliveries, stored, strict=True)
        }

    def _other_log(self, partition: Partition, position: Position) -> str | None:
        """Return why a position is of another log.

        Its messages had the same offsets. None: it is of this log.
        """
        log = ObservedLog(self._logs.cluster_id, self._logs.topics.get(partition.topic))
        halt = check_log(partition, position, log)
        return None if halt is None else halt.text
