"""Which rows go into the next record batch of each output partition.

Rows of a stream enter the queue of their output partition in the order of their numbers. At most one record batch of a
partition is in flight, and Kafka takes or refuses it as a whole: nothing overtakes. A batch that is refused for its size
comes again in smaller ones; otherwise its rows come one by one, until the row at fault stops its stream. Other streams
go on. Pure.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from consumer.core.message import Partition
from consumer.outbox.record import OutgoingRecord, sent_size, wire_headers
from consumer.outbox.streams import Stream

ROWS_MAX = 2000  # of a record batch


class Row(NamedTuple):
    """A row to send.

    timestamp: milliseconds since 1970. size: at most, in bytes.
    """

    stream: Stream
    seq: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    timestamp: int
    size: int


def rows_of(stream: Stream, first: int, records: Iterable[OutgoingRecord], timestamp: int) -> list[Row]:
    """Return the rows of records that follow each other in a stream."""
    rows = []
    for seq, record in enumerate(records, first):
        key, value, headers = record.key, record.value, wire_headers(record)
        rows.append(Row(stream, seq, key, value, headers, timestamp, sent_size(key, value, headers)))
    return rows


class SendQueue:
    """The rows of one output partition.

    in_flight: the rows of the batch that is not answered yet.
    """

    __slots__ = ("careful", "in_flight", "partition", "waiting")

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.waiting: deque[Row] = deque()
        self.in_flight: list[Row] = []
        self.careful = 0  # so many rows go one by one: one of them was refused


class SendQueues:
    """The queues of all output partitions, and the bytes in them.

    bytes_max: beyond it no more rows are taken in. record_bytes: of the largest record that each topic takes; read when
    a record batch is built. batch_bytes: of a record batch, at most.
    """

    def __init__(self, bytes_max: int, record_bytes: Mapping[str, int], batch_bytes: int) -> None:
        self._bytes_max = bytes_max
        self._record_bytes = record_bytes
        self._batch_bytes = batch_bytes
        self._lowered: dict[str, int] = {}  # by topic, after Kafka refused a record batch for its size
        self._queues: dict[Partition, SendQueue] = {}
        self.bytes = 0
        self.published: Counter[str] = Counter()  # rows that Kafka has acknowledged, by topic

    @property
    def has_room(self) -> bool:
        """Whether more rows may be taken in."""
        return self.bytes < self._bytes_max

    def is_in_flight(self, partition: Partition) -> bool:
        """Whether a record batch of an output partition is not answered yet."""
        queue = self._queues.get(partition)
        return queue is not None and bool(queue.in_flight)

    def ready(self) -> list[Partition]:
        """Return the output partitions with rows to send and nothing in flight."""
        return [queue.partition for queue in self._queues.values() if queue.waiting and not queue.in_flight]

    def add(self, rows: Sequence[Row], partition_of: Callable[[bytes | None], int]) -> None:
        """Queue rows of one stream, which follow its last ones."""
        if not rows:
            return
        stream = rows[0].stream
        stream.load([row.seq for row in rows])
        for row in rows:
            partition = Partition(stream.topic, partition_of(row.key))
            queue = self._queues.get(partition)
            if queue is None:
                queue = self._queues[partition] = SendQueue(partition)
            queue.waiting.append(row)
            self.bytes += row.size

    def take(self, partition: Partition) -> list[Row]:
        """Return the next record batch.

        Empty where one is in flight, or nothing waits.
        """
        queue = self._queues.get(partition)
        if queue is None or queue.in_flight:
            return []
        topic = partition.topic
        bytes_max = self._lowered.get(topic) or min(self._batch_bytes, self._record_bytes.get(topic, self._batch_bytes))
        rows: list[Row] = []
        size = 0
        while queue.waiting:
            row = queue.waiting[0]
            if not row.stream.is_open:
                queue.waiting.popleft()
                self.bytes -= row.size
                continue
            if rows and (size + row.size > bytes_max or len(rows) >= ROWS_MAX or queue.careful):
                break
            rows.append(queue.waiting.popleft())
            size += row.size
        queue.in_flight = rows
        return rows

    def acknowledged(self, partition: Partition) -> None:
        """Kafka has taken the batch in flight."""
        queue = self._queues[partition]
        for row in queue.in_flight:
            row.stream.acknowledge(row.seq)
            self.bytes -= row.size
        self.published[partition.topic] += len(queue.in_flight)
        queue.careful = max(0, queue.careful - len(queue.in_flight))
        queue.in_flight = []

    def put_back(self, partition: Partition) -> None:
        """Put the rows of a batch that failed first again."""
        queue = self._queues[partition]
        queue.waiting.extendleft(reversed(queue.in_flight))
        queue.in_flight = []

    def leave_out(self, partition: Partition) -> bool:
        """Leave out a refused row that is alone in its batch.

        It counts as published. Returns whether it was alone.
        """
        if len(self._queues[partition].in_flight) != 1:
            return False
        self.acknowledged(partition)
        return True

    def refused(self, partition: Partition, *, for_size: bool) -> Stream | None:
        """Take back a batch that Kafka refuses.

        Returns the stream to stop, once that is known.
        """
        queue = self._queues[partition]
        rows = queue.in_flight
        if len(rows) == 1:
            [row] = rows
            self.bytes -= row.size
            queue.careful = max(0, queue.careful - 1)
            queue.in_flight = []
            return row.stream if row.stream.is_open else None
        if for_size:
            size = sum(row.size for row in rows)
            self._lowered[partition.topic] = max(1, size // 2)
        else:
            queue.careful = len(rows)
        self.put_back(partition)
        return None

    def clear(self) -> None:
        """Forget every row that waits.

        What is in flight stays until it is answered.
        """
        for queue in self._queues.values():
            for row in queue.waiting:
                self.bytes -= row.size
            queue.waiting.clear()
            queue.careful = 0
        self._queues = {partition: queue for partition, queue in self._queues.items() if queue.in_flight}
