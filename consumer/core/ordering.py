"""Which messages run next, and up to where everything is settled.

Decides on partitions, offsets, keys and times as numbers. A Scheduler serves the partitions of one database, with one or
more batches at a time. It keeps four invariants:

- **one batch at a time of a partition**: nothing is taken of a partition between `begin` and `finish` of a batch of it.
- **order**: two messages of one ordering key (a key of one handler, or its partition) never run in the wrong order. A message
  whose attempt failed is *delayed*; later ones of its key queue behind it; all others go on.
- **position**: the position of a partition never passes a message that some handler has not settled.
- **bounds**: nothing is taken of a partition that is *full*: one of which as many messages are delayed, or as many bytes, as
  the limits say. The others go on; what was fetched of it beyond is dropped, and read again when it has room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import islice

from consumer.core.delivery import Batch, Delivery, PositionUpdate, SavedAttempts, size_of
from consumer.core.handler import Handler
from consumer.core.message import Partition, Record
from consumer.core.partition_queue import PartitionQueue

_DELAYED_BYTES_MIN = 1 << 20  # of a partition


def _in_log_order(deliveries: list[Delivery], freed: int, segments: list[tuple[Partition, int, int]]) -> list[Delivery]:
    """Order a batch by topic, partition and offset.

    A rebuild relies on it: of two messages of one transaction the ledger does not say which was first. freed: how many
    at the front come from different partitions. segments: where each partition begins and ends behind them.
    """
    if freed:
        return sorted(deliveries, key=_log_place)
    ordered = sorted(segments)
    if ordered == segments:
        return deliveries
    return [delivery for _, begin, end in ordered for delivery in deliveries[begin:end]]


def _log_place(delivery: Delivery) -> tuple[str, int, int]:
    return delivery.record.topic, delivery.record.partition, delivery.record.offset


class Scheduler:
    """The partitions of a database: add records, take a batch, settle it."""

    def __init__(
        self,
        handlers: Mapping[str, Sequence[Handler]],
        delayed_max: int,
        delayed_bytes_max: int = 1 << 62,
        idle_batch_interval: float = 0.0,
    ) -> None:
        """Set the limits.

        delayed_max: messages of a partition. delayed_bytes_max: of all partitions, in equal shares of at least 1 MB.
        idle_batch_interval: least time between two batches without messages, which only write positions.
        """
        self._handlers = handlers
        self._delayed_max = delayed_max
        self._delayed_bytes_max = delayed_bytes_max
        self._idle_batch_interval = idle_batch_interval
        self._idle_batch_after = 0.0
        self._retried_last = False
        self._queues: dict[Partition, PartitionQueue] = {}
        self._ready: deque[Delivery] = deque()  # were behind a failed message, and are free to run now
        self._delayed: dict[Hashable, deque[Delivery]] = {}  # key -> the failed message and those behind it
        self._due: dict[Hashable, float] = {}  # key -> time of the next attempt
        self._last_epoch = 0
        self.paused: frozenset[Partition] = frozenset()  # nothing is taken of these, whether assigned or not
        self.in_flight: set[Partition] = set()  # those of the batches that are being settled: nor of these

    # -- partitions come and go -------------------------------------------------------------------------------------

    def assign(self, partition: Partition, position: int) -> None:
        """Begin a partition at `position`, and forget what was known of it."""
        self.revoke(partition)
        self._last_epoch += 1
        self._queues[partition] = PartitionQueue(
            self._last_epoch, frontier=position, position=position, received=position
        )

    def restore(
        self,
        partition: Partition,
        held_keys: Iterable[tuple[int, bytes]],
        saved_attempts: Mapping[tuple[int, int], SavedAttempts],
    ) -> None:
        """Add what the database knows of a partition that was just assigned."""
        if (queue := self._queues.get(partition)) is not None:
            queue.possibly_held, queue.saved_attempts = set(held_keys), dict(saved_attempts)

    def revoke(self, partition: Partition) -> None:
        """Forget a partition, its fetched records, and those delayed.

        They are delivered again to its next owner.
        """
        self._queues.pop(partition, None)
        self._ready = deque(delivery for delivery in self._ready if delivery.partition != partition)
        for key, chain in list(self._delayed.items()):
            if chain[0].partition == partition:  # a key never spans two
                del self._delayed[key], self._due[key]

    @property
    def partitions(self) -> list[Partition]:
        return list(self._queues)

    def handlers(self) -> list[Handler]:
        """Return the handlers of all topics."""
        return [handler for handlers in self._handlers.values() for handler in handlers]

    def position(self, partition: Partition) -> int:
        """Return the position as this worker last wrote or read it."""
        return self._queues[partition].position

    def received(self, partition: Partition) -> int | None:
        """Return the offset to fetch next; None if not assigned."""
        queue = self._queues.get(partition)
        return queue.received if queue else None

    # -- records come in --------------------------------------------------------------------------------------------

    def add(
        self, partition: Partition, records: Sequence[Record], start: int | None = None, end: int | None = None
    ) -> tuple[int, int]:
        """Queue fetched records, in offset order.

        Returns how many messages and bytes were kept. start and end: the records are all that the log holds from `start` up to `end`; by default from the
        first to the last one. Records of a partition that is not assigned, and those below what was received already, are
        dropped. So are all that begin beyond it: what lies between would be lost, and is read again first.
        """
        queue = self._queues.get(partition)
        if queue is None or (start is not None and start > queue.received):
            return 0, 0
        if records and records[0].offset < queue.received:
            records = [record for record in records if record.offset >= queue.received]
        if end is None:
            end = records[-1].offset + 1 if records else 0
        queue.received = max(queue.received, end)
        if not records:
            return 0, 0
        sizes = list(map(size_of, records))
        size = sum(sizes)
        queue.fetched.extend(records)
        queue.sizes.extend(sizes)
        queue.fetched_bytes += size
        return len(records), size

    def has_fetched(self, partition: Partition) -> bool:
        """Whether records of a partition wait to be taken."""
        queue = self._queues.get(partition)
        return queue is not None and bool(queue.fetched)

    @property
    def fetched(self) -> tuple[int, int]:
        """Messages and bytes that wait to be taken."""
        return (
            sum(len(queue.fetched) for queue in self._queues.values()),
            sum(queue.fetched_bytes for queue in self._queues.values()),
        )

    def is_full(self, partition: Partition) -> bool:
        """Whether a partition waits until some delayed messages are settled."""
        queue = self._queues.get(partition)
        return queue is not None and queue.full

    def drop_fetched(self, partition: Partition) -> None:
        """Drop fetched records that were not taken; they are fetched again."""
        queue = self._queues.get(partition)
        if queue is not None and queue.fetched:
            queue.received = queue.fetched[0].offset
            queue.fetched.clear()
            queue.sizes.clear()
            queue.fetched_bytes = 0

    def waiting(self) -> list[tuple[Delivery, int, int]]:
        """Return failed messages that wait.

        With each: how many deliveries of its ordering key wait, itself included, and the partition's frontier.
        """
        return [
            (chain[0], len(chain), queue.frontier)
            for chain in self._delayed.values()
            if (queue := self._queues.get(chain[0].partition)) is not None
        ]

    def oldest(self) -> dict[Partition, Record]:
        """Return the first record of each partition that waits here.

        Not those of a batch that was taken and is not settled yet.
        """
        first = {partition: queue.fetched[0] for partition, queue in self._queues.items() if queue.fetched}
        for delivery in (*self._ready, *(chain[0] for chain in self._delayed.values())):
            known = first.get(delivery.partition)
            if known is None or delivery.record.offset < known.offset:
                first[delivery.partition] = delivery.record
        return first

    @property
    def delayed(self) -> int:
        """Deliveries that wait for another attempt, or behind one."""
        return sum(queue.delayed for queue in self._queues.values())

    # -- batches go out ---------------------------------------------------------------------------------------------

    def take(self, now: float, messages_max: int, bytes_max: int, partitions_max: int | None = None) -> Batch | None:
        """Return the next batch, or None.

        Retries that are due and fresh messages take turns, so that neither waits for ever. partitions_max: of how many
        partitions it may be (None: all).
        """
        self._retried_last = not self._retried_last
        first, second = (
            (self._take_retries, self._take_fresh) if self._retried_last else (self._take_fresh, self._take_retries)
        )
        partitions_max = len(self._queues) if partitions_max is None else partitions_max
        return first(now, messages_max, bytes_max, partitions_max) or second(
            now, messages_max, bytes_max, partitions_max
        )

    def begin(self, batch: Batch) -> None:
        """Take nothing of the batch's partitions until `finish`.

        For callers that settle several batches at a time.
        """
        self.in_flight.update(batch.partition_epochs)

    def finish(self, batch: Batch) -> None:
        """Take from the batch's partitions again, whether it was settled or not."""
        self.in_flight.difference_update(batch.partition_epochs)

    @property
    def has_more(self) -> bool:
        """Whether fetched messages of partitions that are not in flight wait."""
        closed = self._closed()
        return any(
            queue.fetched and not queue.full and partition not in closed for partition, queue in self._queues.items()
        )

    def _closed(self) -> frozenset[Partition]:
        """Return the partitions of which nothing is taken now."""
        return self.paused.union(self.in_flight) if self.in_flight else self.paused

    def _take_retries(self, now: float, messages_max: int, bytes_max: int, partitions_max: int) -> Batch | None:
        retries: list[Delivery] = []
        closed = self._closed()
        epochs: dict[Partition, int] = {}
        for key, due in self._due.items():
            if due > now or bytes_max <= 0 or len(retries) >= messages_max:
                continue
            partition = self._delayed[key][0].partition
            if partition not in closed and (partition in epochs or len(epochs) < partitions_max):
                epochs[partition] = self._queues[partition].epoch
                retries.append(self._delayed[key][0])
                bytes_max -= size_of(retries[-1].record)
        return Batch(retries, {}, epochs) if retries else None

    def _take_fresh(self, now: float, messages_max: int, bytes_max: int, partitions_max: int) -> Batch | None:
        closed = self._closed()
        deliveries = self._take_ready(messages_max, closed)
        freed = len(deliveries)
        epochs = self._epochs_of(deliveries)
        is_taken = freed > 0
        ends: dict[Partition, int] = {}
        segments: list[tuple[Partition, int, int]] = []
        bytes_share = self._bytes_share()
        for partition, queue in self._queues.items():
            if queue.full or (closed and partition in closed):
                continue
            begin = len(deliveries)
            handlers = self._handlers.get(partition.topic, ())
            bytes_max, end = self._take_fetched(queue, handlers, deliveries, messages_max, bytes_max, bytes_share)
            if end is not None:
                is_taken = True
                ends[partition] = end
            if len(deliveries) > begin:
                segments.append((partition, begin, len(deliveries)))
            if not queue.fetched and queue.received > queue.frontier:
                ends[partition] = queue.received
            if len(segments) == partitions_max:
                break
        if ends and not is_taken:
            if now < self._idle_batch_after:
                return None
            self._idle_batch_after = now + self._idle_batch_interval
        # A later partition comes first next time, so that a busy one does not starve it.
        if len(ends) and len(self._queues) > 1:
            first = next(iter(self._queues))
            self._queues[first] = self._queues.pop(first)
        epochs.update((partition, self._queues[partition].epoch) for partition in ends)
        return Batch(_in_log_order(deliveries, freed, segments), ends, epochs) if deliveries or ends else None

    def _take_ready(self, messages_max: int, closed: frozenset[Partition]) -> list[Delivery]:
        """Take messages that were behind a failed one, and are free now."""
        taken: list[Delivery] = []
        left: list[Delivery] = []
        while self._ready and len(taken) < messages_max:
            delivery = self._ready.popleft()
            (left if closed and delivery.partition in closed else taken).append(delivery)
        self._ready.extendleft(reversed(left))
        return taken

    def _take_fetched(
        self,
        queue: PartitionQueue,
        handlers: Sequence[Handler],
        deliveries: list[Delivery],
        messages_max: int,
        bytes_max: int,
        bytes_share: int,
    ) -> tuple[int, int | None]:
        """Append deliveries of one partition to `deliveries`, within the limits.

        Returns how many bytes may still be taken, and the offset after the last record taken.
        """
        end: int | None = None
        number = min(len(queue.fetched), messages_max - len(deliveries))
        if len(handlers) == 1 and number > 0 and not self._delayed and not queue.saved_attempts:
            # Fast path: nothing is delayed, so only the sizes count.
            size = sum(islice(queue.sizes, number))
            if size <= bytes_max:
                [handler] = handlers
                bytes_max -= size
                queue.fetched_bytes -= size
                pop, drop = queue.fetched.popleft, queue.sizes.popleft
                deliveries += [Delivery(handler, pop()) for _ in range(number)]
                for _ in range(number):
                    drop()
                end = deliveries[-1].record.offset + 1
        while (
            queue.fetched
            and queue.delayed < self._delayed_max
            and queue.delayed_bytes < bytes_share
            and len(deliveries) < messages_max
            and (bytes_max > 0 or not deliveries)
        ):
            record = queue.fetched.popleft()
            size = queue.sizes.popleft()
            queue.fetched_bytes -= size
            bytes_max -= size
            for handler in handlers:
                saved = (
                    queue.saved_attempts.pop((handler.number, record.offset), None) if queue.saved_attempts else None
                )
                delivery = Delivery(handler, record, attempts=saved.attempts if saved is not None else 0)
                if saved is not None:
                    self._wait_again(queue, delivery, saved.due)
                elif not (self._delayed and self._queue_behind(delivery)):
                    deliveries.append(delivery)
            end = record.offset + 1
        return bytes_max, end

    def batch_up_to(self, partition: Partition, deliveries: Iterable[Delivery], end: int) -> Batch:
        """Return a batch of chosen deliveries, in offset order.

        Everything else below `end` is settled. Deliveries whose key waits for a failed message queue behind it. The
        partition must be assigned.
        """
        queue = self._queues[partition]
        queue.received = max(queue.received, end)
        free = [delivery for delivery in deliveries if not (self._delayed and self._queue_behind(delivery))]
        return Batch(free, {partition: end}, self._epochs())

    def _bytes_share(self) -> int:
        """Return how many bytes of one partition may be delayed."""
        return max(_DELAYED_BYTES_MIN, self._delayed_bytes_max // max(1, len(self._queues)))

    def batch_of(self, deliveries: Iterable[Delivery]) -> Batch:
        """Return a batch in the caller's order, across partitions.

        Frontiers stay where they are. Deliveries whose key waits for a failed message queue behind it. Their partitions
        must be assigned.
        """
        free = [delivery for delivery in deliveries if not (self._delayed and self._queue_behind(delivery))]
        return Batch(free, {}, self._epochs())

    def _epochs_of(self, deliveries: Iterable[Delivery]) -> dict[Partition, int]:
        return {
            partition: self._queues[partition].epoch for partition in {delivery.partition for delivery in deliveries}
        }

    def _epochs(self) -> dict[Partition, int]:
        return {partition: queue.epoch for partition, queue in self._queues.items()}

    def _current_queue(self, batch: Batch, partition: Partition) -> PartitionQueue | None:
        """Return the partition; None if it was revoked or assigned again since."""
        queue = self._queues.get(partition)
        return queue if queue is not None and queue.epoch == batch.partition_epochs.get(partition) else None

    def is_blocked(self, delivery: Delivery) -> bool:
        """Whether an earlier message of its key has failed.

        For example in an earlier part of the same batch.
        """
        chain = self._delayed.get(delivery.ordering_key()) if self._delayed else None
        return chain is not None and chain[0] is not delivery

    def _queue_behind(self, delivery: Delivery) -> bool:
        chain = self._delayed.get(delivery.ordering_key())
        if chain is None:
            return False
        chain.append(delivery)
        self._delay(self._queues[delivery.partition], delivery)
        return True

    def _wait_again(self, queue: PartitionQueue, delivery: Delivery, due: float) -> None:
        """Delay a message that failed before a restart."""
        if not self._queue_behind(delivery):
            key = delivery.ordering_key()
            self._delayed[key], self._due[key] = deque([delivery]), due
            self._delay(queue, delivery)

    # -- behind dead letters ----------------------------------------------------------------------------------------

    def mark_possibly_held(self, delivery: Delivery) -> None:
        """Record that a dead letter may hold the key of a delivery."""
        queue, chain = self._queues.get(delivery.partition), delivery.ordering_key_hash()
        if queue is not None and chain is not None:
            queue.possibly_held.add((delivery.handler.number, chain))

    def mark_not_held(self, delivery: Delivery) -> None:
        """Record that no dead letter holds the key of a delivery."""
        queue, chain = self._queues.get(delivery.partition), delivery.ordering_key_hash()
        if queue is not None and chain is not None:
            queue.possibly_held.discard((delivery.handler.number, chain))

    def possibly_held(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Return deliveries whose key a dead letter may hold."""
        if not any(queue.possibly_held for queue in self._queues.values()):
            return []
        return [
            delivery
            for delivery in deliveries
            if (queue := self._queues.get(delivery.partition)) is not None
            and queue.possibly_held
            and (delivery.handler.number, delivery.ordering_key_hash()) in queue.possibly_held
        ]

    def _delay(self, queue: PartitionQueue, delivery: Delivery) -> None:
        if not delivery.delayed:
            delivery.delayed = True
            queue.delayed += 1
            queue.delayed_bytes += size_of(delivery.record)
            if queue.delayed >= self._delayed_max or queue.delayed_bytes >= self._bytes_share():
                queue.full = True
            queue.unsettled[delivery.record.offset] = queue.unsettled.get(delivery.record.offset, 0) + 1

    def next_due(self) -> float | None:
        """Return when the earliest retry is due that may be taken now."""
        closed = self._closed() if self._due else frozenset()
        if not closed:
            return min(self._due.values(), default=None)
        open_keys = (key for key in self._due if self._delayed[key][0].partition not in closed)
        return min((self._due[key] for key in open_keys), default=None)

    # -- and are settled --------------------------------------------------------------------------------------------

    def is_current(self, batch: Batch) -> bool:
        """Whether all partitions are assigned as when the batch was taken."""
        return all(
            (queue := self._queues.get(partition)) is not None and queue.epoch == opening
            for partition, opening in batch.partition_epochs.items()
        )

    def position_updates(self, batch: Batch, delayed: Iterable[Delivery]) -> list[PositionUpdate]:
        """Return what positions become when a batch is settled.

        delayed: its deliveries that are not settled. Changes nothing.
        """
        unsettled_now = set(delayed)
        opened: dict[Partition, dict[int, int]] = {}
        for delivery in batch.deliveries:
            if delivery.delayed != (delivery in unsettled_now):
                counts = opened.get(delivery.partition)
                if counts is None:
                    queue = self._current_queue(batch, delivery.partition)
                    counts = opened[delivery.partition] = dict(queue.unsettled) if queue else {}
                offset = delivery.record.offset
                counts[offset] = counts.get(offset, 0) + (1 if delivery in unsettled_now else -1)
        updates: list[PositionUpdate] = []
        for partition in {*batch.ends, *opened}:
            queue = self._current_queue(batch, partition)
            if queue is None:
                continue
            counts = opened.get(partition, queue.unsettled)
            frontier = max(queue.frontier, batch.ends.get(partition, queue.frontier))
            position = min((offset for offset, count in counts.items() if count > 0), default=frontier)
            if position != queue.position:
                updates.append(PositionUpdate(partition, queue.position, position))
        return updates

    def settle(self, batch: Batch, delayed: Mapping[Delivery, float], updates: Sequence[PositionUpdate]) -> None:
        """Record what a committed transaction has settled.

        delayed: the deliveries that are not settled, with the time of their next attempt; those that only wait behind a
        failed one of their key are among them (their own time does not count). Of partitions that were revoked since
        the batch was taken, nothing is recorded: their next owner reads their messages again.
        """
        failed: dict[Hashable, list[Delivery]] = {}
        for delivery in batch.deliveries:
            waits = delivery in delayed
            if not waits and not delivery.delayed:
                continue
            queue = self._current_queue(batch, delivery.partition)
            if queue is None:
                continue
            if waits:
                self._delay(queue, delivery)
                failed.setdefault(delivery.ordering_key(), []).append(delivery)
            else:
                self._release(queue, delivery)
                chain = self._delayed.get(delivery.ordering_key())
                if chain is not None and chain[0] is delivery:
                    chain.popleft()
                    self._ready.extendleft(reversed(chain))
                    del self._delayed[delivery.ordering_key()], self._due[delivery.ordering_key()]
        if self._ready and (failed_again := {key for key in failed if key not in self._delayed}):
            self._block_ready(failed_again)
        for key, deliveries in failed.items():
            chain = self._delayed.get(key)
            if chain is None or len(deliveries) > 1 or chain[0] is not deliveries[0]:
                # Parts of a batch are settled one by one, so these may come after, or between, those that wait already.
                waiting = {*(chain or ()), *deliveries}
                self._delayed[key] = chain = deque(sorted(waiting, key=lambda delivery: delivery.record.offset))
            if chain[0] in delayed:
                self._due.pop(key, None)  # to the end, so that keys which fail again and again hold up no others
                self._due[key] = delayed[chain[0]]
        for partition, end in batch.ends.items():
            queue = self._current_queue(batch, partition)
            if queue is not None:
                queue.frontier = max(queue.frontier, end)
        for move in updates:
            queue = self._current_queue(batch, move.partition)
            if queue is not None:
                queue.position = move.next

    def _block_ready(self, keys: set[Hashable]) -> None:
        """Block what was free to run of keys that have failed again."""
        free: deque[Delivery] = deque()
        for delivery in self._ready:
            key = delivery.ordering_key()
            if key in keys:
                self._delayed.setdefault(key, deque()).append(delivery)
            else:
                free.append(delivery)
        self._ready = free

    def _release(self, queue: PartitionQueue, delivery: Delivery) -> None:
        delivery.delayed = False
        queue.delayed -= 1
        queue.delayed_bytes -= size_of(delivery.record)
        if queue.full:
            queue.full = queue.delayed * 4 > self._delayed_max * 3 or queue.delayed_bytes * 4 > self._bytes_share() * 3
        offset = delivery.record.offset
        left = queue.unsettled.get(offset, 0) - 1
        if left > 0:
            queue.unsettled[offset] = left
        else:
            queue.unsettled.pop(offset, None)
