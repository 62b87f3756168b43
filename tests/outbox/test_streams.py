"""Order and accounting of what is sent, whatever fails.

Senders that overlap, answers that get lost, refusals.
"""

from __future__ import annotations

import random as chance
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.message import Partition
from consumer.outbox.record import OutgoingRecord
from consumer.outbox.send_queues import Row, SendQueues, rows_of
from consumer.outbox.streams import Stream

pytestmark = pytest.mark.unit

SOURCE = Partition("in", 0)
OUT = "out"
PARTITIONS = 3


def record(seq: int) -> OutgoingRecord:
    return OutgoingRecord(OUT, seq.to_bytes(16), b"%d" % (seq * 7 % 5), b"x" * (seq % 4))


def partition_of(key: bytes | None) -> int:
    return int(key or b"0") % PARTITIONS


def queues(bytes_max: int = 1 << 20, batch_bytes: int = 500) -> SendQueues:
    return SendQueues(bytes_max, {}, batch_bytes)


def filled(count: int, number: int = 1, into: SendQueues | None = None) -> tuple[Stream, SendQueues]:
    stream, into = Stream(number, SOURCE, OUT, 0, count), into or queues()
    into.add(rows_of(stream, 0, map(record, range(count)), 0), partition_of)
    return stream, into


def test_the_watermark_is_the_contiguous_prefix() -> None:
    stream = Stream(1, SOURCE, OUT, 5, 20)
    for seq in (6, 8, 7):
        stream.acknowledge(seq)
        assert stream.watermark == 5
    stream.acknowledge(5)
    assert stream.watermark == 9 and not stream.acked
    stream.acknowledge(3)  # of an earlier sender
    assert stream.watermark == 9


@given(st.permutations(range(12)))
def test_any_order_of_answers_gives_the_same_watermark(order: list[int]) -> None:
    stream = Stream(1, SOURCE, OUT, 0, 12)
    seen: set[int] = set()
    for seq in order:
        stream.acknowledge(seq)
        seen.add(seq)
        assert stream.watermark == next(n for n in range(13) if n not in seen)


def test_a_commit_that_does_not_follow_sends_to_the_table() -> None:
    stream = Stream(1, SOURCE, OUT, 0, 0)
    assert stream.commits(0, 3) == 0
    stream.load([0, 1, 2])
    assert not stream.is_behind
    assert stream.commits(5, 2) == -1  # 3 and 4 were stored by another process
    assert stream.is_behind and stream.end == 7
    stream.load([3, 4, 5])  # of the table
    assert stream.commits(5, 2) == 1
    with pytest.raises(ValueError, match="missing"):
        stream.load([7])


def test_rows_that_come_late_are_not_queued_twice() -> None:
    stream = Stream(1, SOURCE, OUT, 4, 4)
    assert stream.commits(2, 2) == 2


def test_one_record_batch_of_a_partition_is_in_flight() -> None:
    _, sending = filled(30)
    partition = sending.ready()[0]
    first = sending.take(partition)
    assert first and sending.take(partition) == [] and partition not in sending.ready()
    sending.acknowledged(partition)
    assert partition in sending.ready()


def test_rows_that_failed_for_a_time_are_sent_again_first() -> None:
    _, sending = filled(30)
    partition = sending.ready()[0]
    first = sending.take(partition)
    sending.put_back(partition)
    assert sending.take(partition) == first


def test_a_batch_refused_for_its_size_comes_in_smaller_ones() -> None:
    stream, sending = filled(30)
    partition = sending.ready()[0]
    rows = sending.take(partition)
    assert len(rows) > 2
    assert sending.refused(partition, for_size=True) is None
    smaller = sending.take(partition)
    assert smaller == rows[: len(smaller)] and len(smaller) < len(rows)
    while len(smaller) > 1:
        assert sending.refused(partition, for_size=True) is None
        smaller = sending.take(partition)
    assert sending.refused(partition, for_size=True) is stream


def test_a_refused_row_stops_its_stream_alone() -> None:
    sending = queues(batch_bytes=10_000)
    (one, _), (other, _) = filled(20, 1, sending), filled(20, 2, sending)
    partition = sending.ready()[0]
    batch = sending.take(partition)
    bad = batch[2]
    assert sending.refused(partition, for_size=False) is None
    sent: list[Row] = []
    while rows := sending.take(partition):
        if bad in rows:
            stopped = sending.refused(partition, for_size=False)
            if len(rows) == 1:
                assert stopped is one
                stopped.begin_again(stopped.watermark, stopped.end, "refused")
            continue
        sent += rows
        sending.acknowledged(partition)
    assert [row for row in sent if row.stream is one] == batch[:2]
    assert [row.seq for row in sent if row.stream is other] == [
        seq for seq in range(20) if partition_of(record(seq).key) == partition.partition
    ]


def test_memory_is_given_back() -> None:
    stream, sending = filled(50)
    assert sending.bytes > 0
    for partition in list(sending.ready()):
        while sending.take(partition):
            sending.acknowledged(partition)
    assert sending.bytes == 0 and stream.watermark == 50
    _, sending = filled(50)
    partition = sending.ready()[0]
    sending.take(partition)
    sending.clear()
    assert sending.ready() == [] and sending.is_in_flight(partition)
    sending.acknowledged(partition)
    assert sending.bytes == 0


def test_a_closed_stream_is_not_sent() -> None:
    stream, sending = filled(9)
    partition = sending.ready()[0]
    assert stream.begin_again(0, 9).watermark == 0
    assert sending.take(partition) == []


def test_a_stream_that_stops_still_has_its_watermark_to_save() -> None:
    stream, _ = filled(9)
    stream.acknowledge(0)
    stopped = stream.begin_again(stream.watermark, 9, "refused")
    assert (stopped.watermark, stopped.saved, stopped.is_open) == (1, 0, False)


class Sender:
    """A relay, with what it knows of one stream.

    And the state of the table that it shares with the others.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.sending = queues(batch_bytes=table.random.choice((200, 400, 2000)))
        self.stream = Stream(1, SOURCE, OUT, table.watermark, len(table.rows))

    def load(self) -> None:
        first = self.stream.loaded
        last = min(len(self.table.rows), first + self.table.random.randint(1, 6))
        if first < last:
            self.sending.add(rows_of(self.stream, first, self.table.rows[first:last], 0), partition_of)

    def send(self) -> None:
        if ready := self.sending.ready():
            self.sending.take(self.table.random.choice(ready))

    def answer(self) -> None:
        flying = [p for p in map(lambda n: Partition(OUT, n), range(PARTITIONS)) if self.sending.is_in_flight(p)]
        if not flying:
            return
        partition = self.table.random.choice(flying)
        rows = self.sending._queues[partition].in_flight
        match self.table.random.choice(("taken", "taken", "answer lost", "not taken", "refused")):
            case "taken":
                self.table.log[partition] += [row.seq for row in rows]
                self.sending.acknowledged(partition)
            case "answer lost":
                self.table.log[partition] += [row.seq for row in rows]
                self.sending.put_back(partition)
            case "not taken":
                self.sending.put_back(partition)
            case "refused":
                if (stopped := self.sending.refused(partition, for_size=self.table.random.random() < 0.5)) is not None:
                    self.save()
                    self.stream = stopped.begin_again(self.table.watermark, len(self.table.rows))

    def save(self) -> None:
        self.table.watermark = max(self.table.watermark, self.stream.watermark)


class Table:
    def __init__(self, random: chance.Random) -> None:
        self.random = random
        self.rows: list[OutgoingRecord] = []
        self.watermark = 0
        self.log: dict[Partition, list[int]] = defaultdict(list)

    def check(self) -> None:
        in_kafka = {seq for seqs in self.log.values() for seq in seqs}
        assert set(range(self.watermark)) <= in_kafka, "below the watermark, everything is in Kafka"
        for partition, seqs in self.log.items():
            first = list(dict.fromkeys(seqs))
            assert first == sorted(first), f"first occurrences out of order in {partition}"


@given(st.integers(0, 2**32))
def test_overlapping_senders_keep_the_order_of_first_occurrences(seed: int) -> None:
    """Owners come and go while earlier ones still send.

    As after a stop by SIGSTOP.
    """
    table = Table(chance.Random(seed))
    senders: list[Sender] = []
    for _ in range(table.random.randint(20, 150)):
        step = table.random.random()
        if step < 0.15:
            for _ in range(table.random.randint(1, 5)):
                table.rows.append(record(len(table.rows)))
        elif step < 0.22 or not senders:
            senders = [*senders[-2:], Sender(table)]
        else:
            sender = table.random.choice(senders)
            table.random.choice((sender.load, sender.send, sender.send, sender.answer, sender.answer, sender.save))()
        table.check()
    last = Sender(table)
    for _ in range(5000):
        if table.watermark == len(table.rows):
            break
        table.random.choice((last.load, last.send, last.answer, last.save))()
        table.check()
    assert table.watermark == len(table.rows), "a sender that goes on gets everything through"
