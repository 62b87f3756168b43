"""How far a stream is acknowledged, and its next rows.

A stream is what one input partition publishes to one topic. Its rows are numbered without gaps in the order of their
commits. Everything below the watermark is acknowledged by Kafka; the watermark only grows. A sender begins
at the watermark and goes on without a gap, and only one record batch is in flight for each output partition. So:

- a second sender (a late worker, or the next owner) only repeats rows, and the greater of two watermarks is true;
- of each output partition, the first occurrences of a stream's rows are in the order of their numbers.

Pure. Limitations: does not know the table; postgres/outbox.py reads and writes it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from consumer.core.message import Partition

INTAKE = Partition("", 0)  # the source of streams that no message caused: see `home`


def home(topics: Collection[str]) -> Partition | None:
    """Return the input partition whose owner publishes what `app.publishing` stored.

    topics: of the App; None for none. Kafka gives a partition to one worker of the group, so one worker does it, and another one
    after it. While two versions of an App run, the owner of the first topic of both still has it for its own.
    """
    return Partition(min(topics), 0) if topics else None


def named(source: Partition) -> str:
    """Name the source of a stream for people."""
    return "app.publishing" if source == INTAKE else f"{source.topic}:{source.partition}"


class Stream:
    """One stream in a worker's memory.

    A stream that begins again at its watermark is another object.

    watermark: all rows below it are acknowledged. loaded: the next row to queue. end: the next row that a commit will
    store, as far as known. saved: the watermark that the table has. is_open: False once it stopped or was forgotten; its
    rows are then not sent any more. stopped: why it stopped.
    """

    __slots__ = ("acked", "end", "is_open", "loaded", "number", "saved", "source", "stopped", "topic", "watermark")

    def __init__(
        self, number: int, source: Partition, topic: str, watermark: int, end: int, stopped: str | None = None
    ) -> None:
        self.number = number
        self.source = source
        self.topic = topic
        self.watermark = self.saved = self.loaded = watermark
        self.end = end
        self.stopped = stopped
        self.is_open = stopped is None
        self.acked: set[int] = set()  # above the watermark

    @property
    def is_behind(self) -> bool:
        """Whether rows are to be read from the table."""
        return self.is_open and self.loaded < self.end

    def commits(self, first: int, count: int) -> int:
        """Note rows of a commit.

        Returns how many of the first to skip, or -1 to read the table instead.
        """
        past = first + count
        if past > self.end:
            self.end = past
        if not self.is_open or first > self.loaded:
            return -1  # stopped, or rows before these are not in this memory
        return min(self.loaded - first, count)

    def load(self, seqs: Sequence[int]) -> None:
        """Note rows that were queued, in ascending order.

        Raises ValueError unless they follow the last ones.
        """
        past = self.loaded + len(seqs)
        if seqs[0] != self.loaded or seqs[-1] != past - 1:
            raise ValueError("rows of a stream are missing")
        self.loaded = past
        if self.loaded > self.end:
            self.end = self.loaded

    def acknowledge(self, seq: int) -> None:
        """Note an acknowledged row; raise the watermark over what is contiguous."""
        if not self.is_open or seq < self.watermark:
            return
        if seq != self.watermark:
            self.acked.add(seq)
            return
        seq += 1
        acked = self.acked
        while acked and seq in acked:
            acked.remove(seq)
            seq += 1
        self.watermark = seq

    def begin_again(self, watermark: int, end: int, stopped: str | None = None) -> Stream:
        """Close this, and return the stream as it goes on.

        Rows that are queued of this one are not sent.
        """
        self.is_open = False
        following = Stream(self.number, self.source, self.topic, watermark, max(end, watermark), stopped)
        following.saved = min(self.saved, watermark)
        return following
