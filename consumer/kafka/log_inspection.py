"""Ids, ends, single records and open transactions of logs.

Asks the brokers directly; reads no partition on and joins no group. Limitations: an answer may be out of date when it is used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from aiokafka.errors import KafkaError, LeaderNotAvailableError, for_code
from aiokafka.protocol.fetch import FetchRequest

from consumer.core.identity import fingerprint
from consumer.core.log_identity import RecordFingerprint
from consumer.core.message import LogRecord, Partition
from consumer.kafka import decompression, record_batch
from consumer.kafka.brokers import EARLIEST, LATEST, Brokers
from consumer.kafka.decompression import Damaged, TooLarge
from consumer.kafka.internals import READ_COMMITTED, READ_UNCOMMITTED
from consumer.kafka.protocol import Identity, TopicIds, Unsupported, not_writable

_REQUEST_SECONDS = 10
_PARTIAL_SECONDS = 3.0
_OUT_OF_RANGE = 1
_PEEK_WAIT_MS = 50  # Kafka answers at once, since no byte is waited for; Tansu gives nothing without any time
_RAW_WAIT_MS = 500
_REQUESTS_AT_A_TIME = 32


class Peek(NamedTuple):
    """The leader's view of a log: its ends, and some bytes.

    Open transactions are included.
    """

    out_of_range: bool
    first: int
    stable_end: int
    end: int
    records: bytes


class OpenTransaction(NamedTuple):
    """A transaction that is neither committed nor aborted.

    Kafka hands out nothing from `offset` on.
    """

    offset: int
    since_ms: int  # timestamp of its first record, since 1970


class LogInspection:
    """Asks brokers about logs."""

    def __init__(self, brokers: Brokers) -> None:
        self._brokers = brokers
        self._requests = asyncio.Semaphore(_REQUESTS_AT_A_TIME)

    # -- ids and records ----------------------------------------------------------------------------------------------

    async def identity(self, topics: Sequence[str]) -> Identity:
        """Return the ids of the cluster and of topics. Raises KafkaError.

        They are empty where no broker gives ids.
        """
        try:
            answer = await self._brokers.ask_anyone(TopicIds(list(topics)))
        except Unsupported:
            return Identity(None, {})
        return Identity.read(answer)

    async def not_writable(self, topics: Sequence[str]) -> frozenset[str]:
        """Return the topics that this Kafka user may not write to.

        Empty where no broker says. Raises KafkaError.
        """
        try:
            return not_writable(await self._brokers.ask_anyone(TopicIds(list(topics), operations=True)))
        except Unsupported:
            return frozenset()

    async def peek(self, partition: Partition, offset: int) -> Peek:
        """Ask the leader about a log, without reading on. Raises KafkaError."""
        _, error, high, stable, first, _, _, records = await self._ask_leader(
            partition, offset, bytes_min=0, bytes_max=1, isolation_level=READ_UNCOMMITTED, wait_ms=_PEEK_WAIT_MS
        )
        if error not in (0, _OUT_OF_RANGE):
            raise for_code(error)(f"{partition.topic}:{partition.partition}")
        return Peek(error == _OUT_OF_RANGE, first, stable, high, bytes(records or b""))

    async def fingerprint_at(self, partition: Partition, offset: int) -> RecordFingerprint | None:
        """Return the fingerprint of the record at an offset. Raises KafkaError."""
        record = await self.record_at(partition, offset)
        return None if record is None else RecordFingerprint(offset, record.timestamp, fingerprint(record.value))

    async def record_at(self, partition: Partition, offset: int) -> LogRecord | None:
        """Return the record at an offset, without headers. Raises KafkaError."""
        peek = await self.peek(partition, offset)
        for header, body in record_batch.batches(peek.records):
            if header.base_offset <= offset <= header.last_offset:
                try:
                    for entry in record_batch.entries(header, decompression.BY_CODEC[header.codec](body)):
                        if entry.offset == offset:
                            return LogRecord(*partition, offset, entry.timestamp, entry.key, entry.value, ())
                except (Damaged, TooLarge, ValueError, KeyError):
                    return None  # a batch that cannot be read proves nothing
        return None

    async def raw_batches(self, partition: Partition, offset: int, bytes_max: int) -> tuple[bytes, Any]:
        """Return bytes of the log, and its aborted transactions. Raises KafkaError."""
        _, _, _, _, _, aborted, *_, log = await self._ask_leader(
            partition, offset, bytes_min=1, bytes_max=bytes_max, isolation_level=READ_COMMITTED, wait_ms=_RAW_WAIT_MS
        )
        return bytes(log), aborted

    async def open_transaction(self, partition: Partition) -> OpenTransaction | None:
        """Return the transaction that holds readers back. Raises KafkaError."""
        stable = (await self.ends([partition]))[partition]
        peek = await self.peek(partition, stable)
        if peek.stable_end >= peek.end or peek.stable_end != stable:
            return None
        for header, _ in record_batch.batches(peek.records):
            if header.last_offset >= stable:
                return OpenTransaction(stable, header.first_timestamp)
        return None

    async def _ask_leader(
        self, partition: Partition, offset: int, *, bytes_min: int, bytes_max: int, isolation_level: int, wait_ms: int
    ) -> Any:
        """Return the leader's answer to a fetch. Raises KafkaError.

        bytes_min: how much to wait for. bytes_max: the leader gives the first batch whole nevertheless.
        """
        topics = [(partition.topic, [(partition.partition, offset, bytes_max)])]
        request = FetchRequest(wait_ms, bytes_min, bytes_max, isolation_level, topics, rack_id="")
        async with self._requests:
            leader = await self._brokers.leader_of(partition)
            try:
                response = await self._brokers.ask(leader, request)
            except (KafkaError, TimeoutError):
                self._brokers.forget_leader(partition)
                raise
        if not response.topics:  # throttled, or a broker other than Kafka that had no time
            raise LeaderNotAvailableError(f"{partition.topic}:{partition.partition}")
        answer = response.topics[0][1][0]
        if answer[1] not in (0, _OUT_OF_RANGE):
            self._brokers.forget_leader(partition)
        return answer

    # -- offsets ------------------------------------------------------------------------------------------------------

    async def beginnings(self, partitions: Sequence[Partition], *, partial: bool = False) -> dict[Partition, int]:
        """Return the first offsets that logs hold. Raises KafkaError.

        partial: leave out those that no broker gives now.
        """
        return await self._offsets(dict.fromkeys(partitions, EARLIEST), partial)

    async def ends(
        self, partitions: Sequence[Partition], *, partial: bool = False, uncommitted: bool = False
    ) -> dict[Partition, int]:
        """Return the ends of logs. Raises KafkaError.

        Up to the first open transaction. partial: leave out those that no broker gives now. uncommitted: with the records of open transactions.
        """
        level = READ_UNCOMMITTED if uncommitted else READ_COMMITTED
        return await self._offsets(dict.fromkeys(partitions, LATEST), partial, level)

    async def _offsets(
        self, times: dict[Partition, int], partial: bool, isolation_level: int = READ_COMMITTED
    ) -> dict[Partition, int]:
        seconds = _PARTIAL_SECONDS if partial else _REQUEST_SECONDS
        offsets, problems = await self._brokers.offsets(times, isolation_level, seconds)
        if problems and not partial:
            raise next(iter(problems.values()))
        return {partition: offset or 0 for partition, offset in offsets.items()}

    async def offsets_at(self, partitions: Sequence[Partition], time_ms: int) -> dict[Partition, int | None]:
        """Return the first offsets of that time or later. Raises KafkaError."""
        offsets, problems = await self._brokers.offsets(dict.fromkeys(partitions, time_ms), READ_COMMITTED)
        if problems:
            raise next(iter(problems.values()))
        return offsets

    async def topics(self) -> list[str]:
        """Return all topics that this Kafka user may see. Raises KafkaError."""
        return await self._brokers.topics()

    async def partitions(self, topics: Iterable[str]) -> dict[str, list[Partition]]:
        """Return the partitions of each topic. Raises KafkaError.

        A topic that does not exist has none.
        """
        wanted = list(topics)
        leaders = await self._brokers.partitions(wanted)
        return {topic: [Partition(topic, number) for number in sorted(leaders.get(topic, ()))] for topic in wanted}
