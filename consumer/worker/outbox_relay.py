"""Publishes the outbox of one database.

It has the streams of the partitions that this worker owns; with one of the partitions come those of `app.publishing`. A
lane hands over its rows when its COMMIT has returned. Rows that are not in memory (of an earlier owner, of a command, of a
COMMIT that got no answer, or beyond the memory's bound) are read from the table. The table decides; memory is a shortcut.
Limitations: does not know whether it still owns a partition; a late relay only repeats rows under their ids.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from consumer.core.message import Partition
from consumer.kafka.batch_producer import BATCH_BYTES
from consumer.logs import describe, event
from consumer.outbox.record import StoredStream
from consumer.outbox.send_queues import Row, SendQueues, rows_of
from consumer.outbox.streams import INTAKE, Stream, named
from consumer.postgres import outbox
from consumer.postgres.connection import translated_errors
from consumer.postgres.errors import Outage
from consumer.postgres.session import Session
from consumer.settings import Settings
from consumer.worker.connections import Connections
from consumer.worker.lifetime import Lifetime
from consumer.worker.outbox_sender import OutboxSender, Sending
from consumer.worker.partition_table import PartitionTable
from consumer.worker.shard import Shard

_QUEUED_BYTES_MAX = 16 << 20
_POLL_SECONDS = 1.0
_SAVE_SECONDS = 2.0  # for the last watermarks of partitions that are given up
_TURN_SECONDS = 30.0  # between looks at the age and size of a generation
_GENERATION_SECONDS, _GENERATION_BYTES = 900.0, 1 << 30
_PAUSE_SECONDS = 0.5
_MISSING = "rows are missing in the outbox"


class OutboxRelay:
    """Publishes one database's outbox for one worker.

    home: the partition whose owner publishes what `app.publishing` stored. record_bytes: of the largest record that each topic takes.
    """

    def __init__(
        self,
        app: str,
        home: Callable[[], Partition | None],
        settings: Settings,
        shard: Shard,
        table: PartitionTable,
        connections: Connections,
        lifetime: Lifetime,
        record_bytes: Mapping[str, int],
        on_step: Callable[[str], None],
    ) -> None:
        self._app = app
        self._home = home
        self._settings = settings
        self._shard = shard
        self._table = table
        self._connections = connections
        self._lifetime = lifetime
        self._wake = asyncio.Event()
        self._streams: dict[int, Stream] = {}
        self._stops: dict[int, str] = {}  # that the table does not have yet
        self._queues = SendQueues(_QUEUED_BYTES_MAX, record_bytes, BATCH_BYTES)
        self._sender = OutboxSender(settings, self._queues, self._stop_stream, on_step, self._wake)
        self._epoch = ""  # of the database that the streams were read from
        self._session: Session | None = None
        self._session_lock = asyncio.Lock()
        self._next_poll = self._next_turn = 0.0

    @property
    def published(self) -> Mapping[str, int]:
        """How many rows Kafka has acknowledged since the worker began, by topic."""
        return self._queues.published

    # -- what the worker does meanwhile -------------------------------------------------------------------------------

    def committed(self, epoch: str, stored: Sequence[StoredStream]) -> None:
        """Publish rows whose COMMIT has returned."""
        if epoch != self._epoch:
            return  # read from the table, once its streams are known
        for part in stored:
            stream = self._streams.get(part.stream)
            if stream is None:
                if part.first > 0:
                    self.look()  # there are earlier rows
                    continue
                stream = self._streams[part.stream] = Stream(part.stream, part.source, part.topic, 0, 0)
            skip = stream.commits(part.first, len(part.records))
            if skip < 0 or not self._queues.has_room or (partition_of := self._sender.partitioner(part.topic)) is None:
                self._wake.set()
            elif skip < len(part.records):
                rows = rows_of(stream, part.first + skip, part.records[skip:], part.created_ms)
                self._queues.add(rows, partition_of)
        self._sender.pump()

    def trace_sends(self, sending: Sending) -> None:
        """Run each sending of rows in a block of `sending`."""
        self._sender.sending = sending

    def look(self) -> None:
        """Look at the streams now: partitions were assigned."""
        self._next_poll = 0.0
        self._wake.set()

    async def drain(self, seconds: float) -> None:
        """Wait for what is in flight, and forget every stream.

        seconds: at most. The watermarks are saved.
        """
        await self._sender.pause(seconds)
        with suppress(Exception):
            async with asyncio.timeout(_SAVE_SECONDS), self._session_lock:
                if self._session is not None and self._session.is_usable:
                    await self._save(self._session)
        self._forget()
        self._sender.resume()

    def _forget(self) -> None:
        for stream in self._streams.values():
            stream.is_open = False
        self._streams.clear()
        self._stops.clear()
        self._queues.clear()

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Publish until cancelled, or until the worker stops.

        Waits for services for as long as it takes. Raises Misconfigured.
        """
        try:
            while True:
                session = await self._connections.open(self._shard)
                if session is None:
                    return
                try:
                    with translated_errors(self._settings):
                        await self._relay(session)
                except (Outage, TimeoutError) as error:
                    event(
                        logging.WARNING, "the outbox waits for postgresql", error=describe(error), **self._shard.label
                    )
                finally:
                    self._session = None
                    session.close()
                await self._lifetime.pause(_PAUSE_SECONDS)
        finally:
            await self._sender.close()

    async def _relay(self, session: Session) -> None:
        if session.epoch != self._epoch:
            self._forget()
            self._epoch = session.epoch
        self._session = session
        self._next_poll = 0.0
        while True:
            self._wake.clear()
            if time.monotonic() >= self._next_poll:
                self._next_poll = time.monotonic() + _POLL_SECONDS
                async with self._session_lock:
                    await self._save(session)
                    await self._poll(session)
                    await self._turn(session)
            has_loaded = await self._load(session)
            self._sender.pump()
            if not has_loaded:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), max(0.0, self._next_poll - time.monotonic()))

    async def _save(self, session: Session) -> None:
        """Write how far streams are acknowledged, and then why some stopped.

        Behind a pooler, the database may be an earlier one by now: nothing is written then.

        An operator who sees that a stream stopped may discard its next row: the watermark must be true by then.
        """
        stops = list(self._stops.items())
        moved = {
            number: stream.watermark for number, stream in self._streams.items() if stream.watermark > stream.saved
        }
        if moved:
            await outbox.save_watermarks(session.connection, session.server, moved)
            for number, watermark in moved.items():
                if (stream := self._streams.get(number)) is not None:
                    stream.saved = max(stream.saved, watermark)
        for number, reason in stops:
            await outbox.stop(session.connection, session.server, number, reason)
            self._stops.pop(number, None)

    async def _poll(self, session: Session) -> None:
        """Learn which streams there are, and what is new in them."""
        await session.check_epoch()
        sources = self._sources()
        assigned = set(sources)
        states = await outbox.streams(session.connection, self._app, sources) if sources else []
        if assigned != set(self._sources()):
            self.look()
            return
        for state in states:
            self._update(state)
        for number, stream in list(self._streams.items()):
            if stream.source not in assigned:
                stream.is_open = False
                del self._streams[number]

    def _sources(self) -> list[Partition]:
        """The sources whose streams this worker publishes."""
        partitions = self._table.partitions()
        return [*partitions, INTAKE] if self._home() in partitions else partitions

    def _update(self, state: outbox.StreamState) -> None:
        stream = self._streams.get(state.stream)
        if stream is None:
            self._streams[state.stream] = Stream(
                state.stream, state.source, state.topic, state.watermark, state.end, state.stopped
            )
            return
        if state.stream in self._stops:
            return
        stream.end = max(stream.end, state.end)
        if (stream.stopped is None) != (state.stopped is None):  # an operator resumed it, or another relay stopped it
            self._streams[state.stream] = stream.begin_again(state.watermark, stream.end, state.stopped)

    async def _load(self, session: Session) -> bool:
        """Read rows that are not in memory.

        Returns whether there may be more.
        """
        has_loaded = False
        for stream in list(self._streams.values()):
            if not stream.is_behind or not self._queues.has_room:
                continue
            partition_of = self._sender.partitioner(stream.topic)
            if partition_of is None:
                self._sender.learn(stream.topic, self._streams_of(stream.topic))
                continue
            async with self._session_lock:
                stored = await outbox.rows(session.connection, stream.number, stream.loaded, stream.end)
            if not stream.is_open:
                continue
            rows = [row for item in stored if item.seq >= stream.loaded for row in self._rows(stream, item)]
            if not rows and stream.is_behind:
                self._stop_stream(stream, _MISSING)
                continue
            try:
                self._queues.add(rows, partition_of)
            except ValueError:
                self._stop_stream(stream, _MISSING)
            has_loaded = True
            self._sender.pump()
        return has_loaded

    def _rows(self, stream: Stream, item: outbox.StoredRow) -> list[Row]:
        return rows_of(stream, item.seq, [item.record], item.created_ms)

    def _streams_of(self, topic: str) -> list[Stream]:
        return [stream for stream in self._streams.values() if stream.topic == topic and stream.is_open]

    def _stop_stream(self, stream: Stream, reason: str) -> None:
        """Stop a stream alone, until an operator resumes it."""
        if self._streams.get(stream.number) is not stream:
            return
        self._stops[stream.number] = reason
        self._streams[stream.number] = stream.begin_again(stream.watermark, stream.end, reason)
        event(
            logging.ERROR,
            "publishing stopped",
            topic=stream.topic,
            source=named(stream.source),
            stream=stream.number,
            reason=reason,
            do="see `consumer outbox list APP`",
            **self._shard.label,
        )
        self.look()

    async def _turn(self, session: Session) -> None:
        """Open the next generation and drop published ones, if due."""
        if time.monotonic() < self._next_turn:
            return
        self._next_turn = time.monotonic() + _TURN_SECONDS
        await outbox.turn(session.connection, _GENERATION_SECONDS, _GENERATION_BYTES)
        while await outbox.drop(session.connection, self._settings.outbox_keep_hours * 3600) == "dropped":
            pass
