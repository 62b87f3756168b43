"""Pause, probe and report partitions that a fetch gives nothing of.

aiokafka raises what is wrong with one partition for all of them. kafka/fetch_proxy.py and the guard around decoding report
here instead, and `poll` calls `recover` when something was reported.

Limitations: cannot repair anything; the worker tries again now and then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from aiokafka.errors import CorruptRecordException, KafkaError, UnknownError

from consumer.core.log_identity import HaltReason
from consumer.core.message import LogRecord, Partition, Record
from consumer.core.partition_faults import ReadFailure
from consumer.kafka import decompression, record_batch
from consumer.kafka.decompression import Damaged, TooLarge
from consumer.kafka.errors import PartitionUnreadable
from consumer.kafka.internals import ClientControl, batch_reader, last_offset_on_stack
from consumer.kafka.log_inspection import LogInspection
from consumer.logs import describe, event
from consumer.settings import Settings

_DELAY_SECONDS = 0.25  # between fetches that the broker cannot answer at the moment
_DELAYED_SECONDS_MAX = 30.0  # after that, the partition is unreadable
_EMPTY_SECONDS = 3.0  # after that, a partition of which nothing comes is asked for alone
_THROTTLE_LOG_SECONDS = 60.0


class FetchFaults:
    """Listens to fetches, and knows which partitions are unreadable."""

    def __init__(self, settings: Settings, client_id: str) -> None:
        self._settings = settings
        self._client_id = client_id
        self._control: ClientControl | None = None
        self._log: LogInspection | None = None
        # Called with a partition whose topic the broker does not have under the expected id: it is paused.
        self.on_refused: Callable[[Partition], None] = lambda _: None
        # Called with a partition that cannot be read: it is paused. None: `recover` raises PartitionUnreadable.
        self.on_unreadable: Callable[[Partition, ReadFailure], None] | None = None
        # Called with a partition that was read to its end.
        self.on_end_reached: Callable[[Partition], None] = lambda _: None
        self._failures: dict[Partition, ReadFailure] = {}
        self._bad_headers: dict[Partition, int] = {}  # partition -> offset from which `recover` reads it
        self._unreadable_ranges: dict[Partition, tuple[int, int]] = {}  # first and last offset that no broker can read
        self._empty: dict[Partition, tuple[int, float]] = {}  # offset of which nothing comes, and since when
        self._to_probe: dict[Partition, int] = {}
        self._delayed: dict[Partition, float] = {}  # since when the broker cannot answer
        self._delay_paused: set[Partition] = set()
        self._throttled_seconds = 0.0
        self._throttle_logged_at = float("-inf")

    def connect(self, control: ClientControl, log: LogInspection) -> None:
        """Set what a started client offers."""
        self._control, self._log = control, log

    @property
    def _client(self) -> ClientControl:
        assert self._control is not None, "connect() comes first"
        return self._control

    @property
    def _inspection(self) -> LogInspection:
        assert self._log is not None, "connect() comes first"
        return self._log

    def forget(self, partition: Partition) -> None:
        """Forget reports about a partition, which is read from another offset now."""
        self._failures.pop(partition, None)
        self._bad_headers.pop(partition, None)
        self._to_probe.pop(partition, None)
        self._delay_paused.discard(partition)

    def end_delay(self, partition: Partition) -> None:
        """Leave pausing and resuming a partition to the caller from now on."""
        self._delay_paused.discard(partition)

    # -- reports of kafka/fetch_proxy.py ------------------------------------------------------------------------------

    def refused(self, partition: Partition) -> None:
        """Pause a partition whose topic was recreated."""
        self.end_delay(partition)
        self._client.pause(partition)
        self.on_refused(partition)

    def failed(self, partition: Partition, failure: ReadFailure) -> None:
        """Pause a partition that cannot be read; `recover` reports it."""
        if self._client.is_reading_at(partition, failure.first):
            self.end_delay(partition)
            self._client.pause(partition)
            self._failures[partition] = failure

    def delayed(self, partition: Partition, error: str) -> None:
        """Pause a partition for a moment.

        After a long delay it is unreadable.
        """
        loop = asyncio.get_running_loop()
        since = self._delayed.setdefault(partition, loop.time())
        if loop.time() - since > _DELAYED_SECONDS_MAX:
            del self._delayed[partition]
            if self._client.is_assigned(partition):
                self.failed(partition, self._delay_failure(error, self._client.fetch_position(partition)))
        elif self._client.is_assigned(partition) and not self._client.is_paused(partition):
            self._client.pause(partition)
            self._delay_paused.add(partition)
            loop.call_later(_DELAY_SECONDS, self._resume_after_delay, partition)

    def _delay_failure(self, error: str, offset: int) -> ReadFailure:
        if error == UnknownError.__name__:  # the answer of a broker whose own log is broken
            return ReadFailure(HaltReason.DAMAGED, f"the broker answers {error}", offset, is_brokers=True)
        return ReadFailure(HaltReason.BROKER_ERROR, f"they answer {error}", offset)

    def _resume_after_delay(self, partition: Partition) -> None:
        if partition in self._delay_paused:
            self.end_delay(partition)
            self._client.resume(partition)

    def nothing_new(self, partition: Partition) -> None:
        """Record that a partition can be read, though it holds nothing new."""
        self._delayed.pop(partition, None)
        self._empty.pop(partition, None)
        self.on_end_reached(partition)

    def empty(self, partition: Partition, offset: int) -> None:
        """Record that a fetch gave nothing although there is more.

        Other partitions took the room, or it is damaged.
        """
        now = asyncio.get_running_loop().time()
        known, since = self._empty.get(partition, (offset, now))
        self._empty[partition] = (offset, since if known == offset else now)
        if known == offset and now - since > _EMPTY_SECONDS and self._client.is_reading_at(partition, offset):
            self._to_probe[partition] = offset

    def throttled(self, seconds: float) -> None:
        """Count what a quota costs, and log it now and then."""
        self._throttled_seconds += seconds
        now = asyncio.get_running_loop().time()
        if now - self._throttle_logged_at > _THROTTLE_LOG_SECONDS:
            self._throttle_logged_at = now
            event(
                logging.WARNING,
                "kafka throttles the worker: a quota is used up",
                client_id=self._client_id,
                seconds=round(seconds, 1),
                total_seconds=round(self._throttled_seconds, 1),
            )

    # -- decoding -----------------------------------------------------------------------------------------------------

    def guard(self, partition: Partition, reader: Any, records: Iterator[Any]) -> Iterator[Any]:
        """Yield records up to the first that cannot be decoded.

        The failure is recorded instead of raised.
        """
        try:
            yield from records
        except UnicodeDecodeError:
            self._bad_headers[partition] = reader.next_fetch_offset
        except Exception as error:
            first = reader.next_fetch_offset
            last = last_offset_on_stack(error.__traceback__)
            if last is not None and last < first:
                return  # all offsets of the batch were handed out: the next fetch begins behind it
            reason, text = _decoding_failure(error, self._settings)
            self.end_delay(partition)
            self._client.pause(partition)
            self._failures[partition] = ReadFailure(reason, text, first, last)

    # -- recovery -----------------------------------------------------------------------------------------------------

    def received(self, partitions: Iterable[Any]) -> None:
        """End the delays of partitions that records came from."""
        if self._delayed:
            for partition in partitions:
                self._delayed.pop(Partition(*partition), None)

    @property
    def is_pending(self) -> bool:
        """Whether `recover` has something to do."""
        return bool(self._bad_headers or self._failures or self._to_probe)

    async def recover(self, fetched: Mapping[Any, Sequence[Record]]) -> dict[Partition, Sequence[Record]]:
        """Add records that the client cannot decode, and report unreadable partitions.

        Raises PartitionUnreadable if `on_unreadable` is None.
        """
        records = {Partition(*key): of_partition for key, of_partition in fetched.items()}
        bad_headers, self._bad_headers = self._bad_headers, {}
        for partition, offset in bad_headers.items():
            try:
                records[partition] = [*records.get(partition, ()), *await self._read_bad_header(partition, offset)]
            except Exception as error:
                event(logging.DEBUG, "a batch cannot be fetched again yet", error=describe(error))
        to_probe, self._to_probe = self._to_probe, {}
        for partition, offset in to_probe.items():
            await self._probe(partition, offset)
        failures, self._failures = self._failures, {}
        for partition, known in failures.items():
            failure = await self._with_next_readable(partition, known)
            if self.on_unreadable is None:
                raise PartitionUnreadable(partition, failure)
            self.on_unreadable(partition, failure)
        return {partition: of_partition for partition, of_partition in records.items() if of_partition}

    async def _probe(self, partition: Partition, offset: int) -> None:
        """Ask for a partition alone; record a failure if nothing comes."""
        try:
            is_readable = await self._is_readable(partition, offset)
        except (KafkaError, TimeoutError):
            return
        self._empty.pop(partition, None)
        if not is_readable:
            text = "the broker gives nothing from there although the log goes on"
            self.failed(partition, ReadFailure(HaltReason.DAMAGED, text, offset, is_brokers=True))

    async def _with_next_readable(self, partition: Partition, failure: ReadFailure) -> ReadFailure:
        """Add the last offset that the broker cannot read.

        Looks in ever larger steps, then between the last two: behind damage the broker may give nothing of a whole segment.
        """
        if not failure.is_brokers:
            return failure
        if (known := self._unreadable_ranges.get(partition)) is not None and known[0] == failure.first:
            return failure._replace(last=known[1])
        broken, step = failure.last or failure.first, 1
        try:
            end = (await self._inspection.ends([partition], partial=True)).get(partition, broken + 1)
            readable = broken + 1
            while readable < end and not await self._is_readable(partition, readable):
                broken, step = readable, step * 2
                readable = min(end, readable + step)
            while readable - broken > 1:
                middle = (readable + broken) // 2
                if await self._is_readable(partition, middle):
                    readable = middle
                else:
                    broken = middle
        except (KafkaError, TimeoutError):
            return failure
        self._unreadable_ranges[partition] = failure.first, readable - 1
        return failure._replace(last=readable - 1)

    async def _is_readable(self, partition: Partition, offset: int) -> bool:
        """Whether the broker gives anything from an offset on."""
        try:
            peek = await self._inspection.peek(partition, offset)
        except KafkaError as error:
            if error.retriable and not isinstance(error, CorruptRecordException):
                raise
            return False
        return bool(peek.records) or peek.stable_end <= offset

    async def _read_bad_header(self, partition: Partition, offset: int) -> list[Record]:
        """Decode records whose header keys are not UTF-8 ourselves.

        From an offset to the end of the batch with such a key.
        """
        log, aborted = await self._inspection.raw_batches(
            partition, offset, self._settings.kafka_partition_fetch_bytes_max
        )
        if not self._client.is_reading_at(partition, offset):
            return []  # read from somewhere else meanwhile
        reader = batch_reader(partition, log, aborted, offset)
        records: list[Record] = []
        try:
            records.extend(reader)  # the batches before it, without aborted transactions
        except UnicodeDecodeError:
            for header, body in record_batch.batches(log):
                if header.last_offset >= reader.next_fetch_offset:
                    entries = record_batch.entries(header, decompression.BY_CODEC[header.codec](body))
                    records += [
                        _with_escaped_headers(partition, entry)
                        for entry in entries
                        if entry.offset >= reader.next_fetch_offset
                    ]
                    break
        if records:
            self._client.seek(partition, records[-1].offset + 1)
        return records


def _decoding_failure(error: Exception, settings: Settings) -> tuple[HaltReason, str]:
    """Return why a batch cannot be decoded, without quoting it."""
    if isinstance(error, TooLarge):
        limit = settings.kafka_batch_decompressed_bytes_max
        return (
            HaltReason.TOO_LARGE,
            f"the batch decompresses to more than {limit:,} bytes (CONSUMER_KAFKA_BATCH_DECOMPRESSED_BYTES_MAX)",
        )
    if isinstance(error, CorruptRecordException):
        return HaltReason.DAMAGED, "the batch is damaged (its checksum or its records do not fit)"
    if isinstance(error, Damaged):
        return HaltReason.DAMAGED, f"the batch is damaged ({error})"
    if isinstance(error, MemoryError):
        return HaltReason.TOO_LARGE, "there is not enough memory for the batch"
    return HaltReason.DAMAGED, f"the batch cannot be decoded ({type(error).__name__})"


def _with_escaped_headers(partition: Partition, entry: record_batch.RawRecord) -> LogRecord:
    is_escaped = any("\udc80" <= character <= "\udcff" for key, _ in entry.headers for character in key)
    return LogRecord(
        topic=partition.topic,
        partition=partition.partition,
        offset=entry.offset,
        timestamp=entry.timestamp,
        key=entry.key,
        value=entry.value,
        headers=entry.headers,
        fault="a header key is not UTF-8" if is_escaped else "",
    )
