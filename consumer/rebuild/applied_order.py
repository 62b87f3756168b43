"""Merges partitions into the order in which their effects were applied.

Pure. The ledger has the time of the transaction that applied a message (`applied_at`, PostgreSQL's clock). Within one
transaction a worker settles its batch by topic, partition and offset. A message that the ledger does not know follows
the time of its record.

Limitations: two transactions that overlapped may have met a row in the other order than they began; `shift` gives a second
possible order, so that a caller can find the rows that depend on it. PostgreSQL's clock may have stepped back: messages of
one key whose times contradict their offsets are counted, and `by_records` gives the order without the ledger's times. A
step back that puts no two messages of a key in the wrong order is not noticed.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from consumer.core.delivery import Delivery, size_of
from consumer.core.message import Partition, Record

LOOKAHEAD = 2000  # entries of a partition that must be known before its first one is taken
_CONTRADICTED_MAX = 1000  # messages, after which the search ends


class OrderEntry(NamedTuple):
    """A delivery and when it was applied.

    applied_at: microseconds since 1970 by PostgreSQL's clock; None where the ledger does not know. time: of the record, in
    microseconds. turn: index of the handler among those of its topic. action: for a retried dead letter, the number of the
    operator's action; a transaction of retries runs in the order of these numbers.
    """

    delivery: Delivery
    applied_at: int | None
    time: int
    turn: int = 0
    action: int | None = None


def transactions(entries: Iterable[OrderEntry]) -> list[list[OrderEntry]]:
    """Group entries by transaction, in their order.

    An entry without an effect belongs to the group before it.
    """
    groups: list[list[OrderEntry]] = []
    at: int | None = None
    for entry in entries:
        is_new = entry.applied_at != at and (entry.applied_at is not None or entry.delivery.outcome is None)
        if is_new or not groups:
            groups.append([])
        if is_new:
            at = entry.applied_at
        groups[-1].append(entry)
    return groups


_Rank = tuple[int, int, int, int]  # time, partition, offset, handler: the order in which a worker settles


class _Buffer:
    """Entries of one partition, in offset order.

    place: index of the partition. sizes: bytes of each entry. first: number of entries[0], counted from the beginning.
    earliest: sliding minimum of (applied_at, number), both ascending. latest: time of the last entry that was taken;
    entries without a time of their own keep their order by it. size: bytes of all entries.
    """

    __slots__ = ("complete", "earliest", "entries", "first", "latest", "place", "size", "sizes")

    def __init__(self, place: int) -> None:
        self.place = place
        self.entries: deque[OrderEntry] = deque()
        self.sizes: deque[int] = deque()
        self.first = 0
        self.earliest: deque[tuple[int, int]] = deque()
        self.latest = 0
        self.size = 0
        self.complete = False

    def append(self, entry: OrderEntry, at: int | None) -> None:
        size = size_of(entry.delivery.record)
        self.sizes.append(size)
        self.size += size
        if at is not None:
            while self.earliest and self.earliest[-1][0] > at:
                self.earliest.pop()
            self.earliest.append((at, self.first + len(self.entries)))
        self.entries.append(entry)

    def pop(self) -> OrderEntry:
        if self.earliest and self.earliest[0][1] == self.first:
            self.earliest.popleft()
        self.first += 1
        self.size -= self.sizes.popleft()
        return self.entries.popleft()


class AppliedOrder:
    """Merges entries of several partitions into one order.

    shift: microseconds by which each partition comes later than the one before it, for another possible order of overlapping
    transactions. bytes_max: of one partition; beyond it, its first entry is taken without further lookahead. by_records:
    ignore the ledger's times; each partition keeps the order of its offsets. contradicted: by handler, messages that were
    applied after later messages of their key.
    """

    def __init__(
        self,
        partitions: Iterable[Partition],
        *,
        lookahead: int = LOOKAHEAD,
        bytes_max: int = 1 << 26,
        shift: int = 0,
        by_records: bool = False,
    ) -> None:
        self._places = {partition: place for place, partition in enumerate(sorted(partitions))}
        self._buffers = {partition: _Buffer(place) for partition, place in self._places.items()}
        self._lookahead = lookahead
        self._bytes_max = bytes_max
        self._shift = shift
        self._by_records = by_records
        self.contradicted: Counter[str] = Counter()
        self._late: list[tuple[_Rank, int, OrderEntry]] = []  # retries, applied after later entries of their partition
        self._heads: list[tuple[_Rank, Partition]] = []
        self._blocked = set(self._places)  # partitions that must be read further before anything is taken
        self._number = 0

    @property
    def held(self) -> int:
        """The number of entries that are not taken yet."""
        return len(self._late) + sum(len(buffer.entries) for buffer in self._buffers.values())

    def is_low(self, partition: Partition) -> bool:
        """Whether more of the partition should be added."""
        return not self._knows_enough(self._buffers[partition], 1.5)

    def add(self, partition: Partition, entries: Sequence[OrderEntry], *, complete: bool) -> None:
        """Add entries in offset order. complete: no others follow."""
        buffer = self._buffers[partition]
        buffer.complete = buffer.complete or complete
        for entry in entries:
            buffer.append(entry, self._time(entry))
        if partition in self._blocked:
            self._offer(partition)

    def add_late(self, entry: OrderEntry) -> None:
        """Add an entry that has no offset, such as an edit."""
        at = entry.applied_at if entry.applied_at is not None else entry.time
        place = self._places.get(entry.delivery.partition, len(self._places))
        self._push_late(self._rank(entry, at, place), entry)

    def take(self, most: int) -> list[OrderEntry]:
        """Return the next entries; none while a partition must be read first."""
        taken: list[OrderEntry] = []
        while len(taken) < most and not self._blocked:
            if self._late and (not self._heads or self._late[0][0] < self._heads[0][0]):
                taken.append(heapq.heappop(self._late)[2])
            elif self._heads:
                rank, partition = self._heads[0]
                buffer = self._buffers[partition]
                buffer.latest = rank[0]
                taken.append(buffer.pop())
                following = self._next_rank(partition)
                if following is None:
                    heapq.heappop(self._heads)
                else:
                    heapq.heapreplace(self._heads, (following, partition))
            else:
                break
        return taken

    def _knows_enough(self, buffer: _Buffer, times: float = 1.0) -> bool:
        return (
            buffer.complete or len(buffer.entries) >= self._lookahead * times or buffer.size >= self._bytes_max * times
        )

    def _offer(self, partition: Partition) -> None:
        """Add the partition's next entry to the heads, or block."""
        rank = self._next_rank(partition)
        if rank is not None:
            self._blocked.discard(partition)
            heapq.heappush(self._heads, (rank, partition))

    def _next_rank(self, partition: Partition) -> _Rank | None:
        """Return the rank of the partition's next entry.

        None if it is not known yet: then the partition blocks. Late entries go to `_late`.
        """
        buffer = self._buffers[partition]
        while buffer.entries:
            if not self._knows_enough(buffer):
                break
            entry = buffer.entries[0]
            at = self._time(entry)
            if at is not None and (entry.action is not None or buffer.earliest[0][0] < at):
                if entry.action is None:
                    self._note_contradiction(buffer, entry, at)
                self._push_late(self._rank(entry, at, buffer.place), buffer.pop())
                continue
            if at is None:
                at = max(buffer.latest - self._shift * buffer.place, entry.time)
                at = min(at, buffer.earliest[0][0]) if buffer.earliest else at
            return self._rank(entry, at, buffer.place)
        if buffer.complete:
            self._blocked.discard(partition)
        else:
            self._blocked.add(partition)
        return None

    def _time(self, entry: OrderEntry) -> int | None:
        return None if self._by_records else entry.applied_at

    def _note_contradiction(self, buffer: _Buffer, entry: OrderEntry, at: int) -> None:
        """Count an entry applied after a later one of its key."""
        if self.contradicted.total() >= _CONTRADICTED_MAX:
            return
        key = entry.delivery.ordering_key()
        later = islice(buffer.entries, 1, None)
        if any(
            other.applied_at is not None and other.applied_at < at and other.delivery.ordering_key() == key
            for other in later
        ):
            self.contradicted[entry.delivery.handler.name] += 1

    def _rank(self, entry: OrderEntry, at: int, place: int) -> _Rank:
        if entry.action is not None:
            return at + self._shift * place, -1, entry.action, 0
        return at + self._shift * place, place, entry.delivery.record.offset, entry.turn

    def _push_late(self, rank: _Rank, entry: OrderEntry) -> None:
        self._number += 1
        heapq.heappush(self._late, (rank, self._number, entry))


class Backlog:
    """Records that were read and are not in the order yet."""

    def __init__(self) -> None:
        self._records: dict[Partition, deque[Record]] = {}
        self._complete: set[Partition] = set()

    def add(self, partition: Partition, records: Iterable[Record], *, complete: bool) -> None:
        """Add records in offset order. complete: no others follow."""
        self._records.setdefault(partition, deque()).extend(records)
        if complete:
            self._complete.add(partition)

    def holds(self, partition: Partition) -> bool:
        """Return whether `take` has something for the partition."""
        return partition in self._records

    def take(self, partition: Partition, most: int) -> tuple[list[Record], bool]:
        """Return the next records of a partition, and whether none follow."""
        held = self._records[partition]
        taken = [held.popleft() for _ in range(min(most, len(held)))]
        if not held:
            del self._records[partition]
        return taken, not held and partition in self._complete
