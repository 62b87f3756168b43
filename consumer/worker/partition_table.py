"""Decides what the Kafka client does with each partition of a worker.

Pure, with one state machine per partition: a transition changes the table and returns the actions that the client must
take; partitions.py takes them. A partition has a place in every database (shard) of the App: each gives its own
position, and each may halt it.

Invariant: the client fetches a partition if and only if its state is READING.

Limitations: does not know whether the worker still owns a partition. Positions are written by compare-and-set, so a
table that is out of date can only cost work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple
from uuid import UUID

from consumer.core.log_identity import PartitionHalt, Position
from consumer.core.message import Partition


class State(Enum):
    """What a partition is doing.

    Where two states apply, the later one wins.
    """

    READING = "reading"  # the client fetches it
    PAUSED = "paused"  # a position is known, and no database has room for it
    UNPOSITIONED = "unpositioned"  # no database has given a position yet
    REFUSED = "refused"  # the broker refused a fetch, and the log monitor has not found out why
    HALTED = "halted"  # it must not go on until its position is moved or the cause is gone


class AwaitPosition(NamedTuple):
    """Fetch nothing of a partition that has no position."""

    partition: Partition


class Pause(NamedTuple):
    """Fetch nothing more of a partition."""

    partition: Partition


class Resume(NamedTuple):
    """Fetch a paused partition from where the client is."""

    partition: Partition


class Seek(NamedTuple):
    """Fetch a partition from an offset.

    topic_id: fetch only from the topic with that id; None: from the topic with that name.
    """

    partition: Partition
    offset: int
    topic_id: UUID | None


Action = AwaitPosition | Pause | Resume | Seek


class Halt(NamedTuple):
    """Why a partition is halted in one database, and at which position."""

    stop: PartitionHalt
    position: Position


@dataclass(slots=True)
class _Place:
    """A partition in one database.

    Neither open nor halted: its position must still be read.
    """

    is_open: bool = False  # its position is known, and a lane takes its messages
    halt: Halt | None = None


@dataclass(slots=True)
class _Entry:
    """One partition."""

    places: dict[str, _Place]
    state: State = State.UNPOSITIONED
    offset: int | None = None  # that the client hands out next; None: it was never positioned
    must_seek: bool = False  # the client may be at another offset
    out_of_range: bool = False  # of a refusal: the log does not hold the offset
    has_moved: bool = False  # something was settled since the last commit to Kafka
    by_operator: bool = False  # paused in every database by an operator


@dataclass(slots=True)
class _Database:
    """What holds for all partitions of one database."""

    assignment_epoch: int = 0
    positions: dict[Partition, Position] = field(default_factory=dict)
    cross_check_below: dict[Partition, int] = field(default_factory=dict)


class PartitionTable:
    """The partitions that are assigned to a worker.

    databases: the names of the App's shards; one in all without shards.
    """

    def __init__(self, databases: Iterable[str]) -> None:
        self._databases = {name: _Database() for name in databases}
        self._entries: dict[Partition, _Entry] = {}
        self.assignments = 0  # so far
        self.has_assignment = False  # False from the start of a rebalance to its end: no batch is taken then

    # -- assignment -------------------------------------------------------------------------------------------------

    def assign(self, partitions: Iterable[Partition]) -> list[Action]:
        """Begin an assignment: every partition waits for its position."""
        self.finish_revoke()  # whether or not the end of the last assignment was seen
        self.has_assignment = True
        self.assignments += 1
        self._next_epochs()
        self._entries = {
            partition: _Entry({name: _Place() for name in self._databases}) for partition in sorted(partitions)
        }
        return [AwaitPosition(partition) for partition in self._entries]

    def begin_revoke(self) -> None:
        """End an assignment.

        Positions stay known until `finish_revoke`, for the batches in flight.
        """
        self.has_assignment = False
        self._next_epochs()

    def finish_revoke(self) -> None:
        """Forget every partition."""
        self._entries.clear()
        for database in self._databases.values():
            database.cross_check_below.clear()

    def next_epoch(self, database: str) -> None:
        """Outdate what is in flight in a database.

        The database is another one, or went back in time.
        """
        self._databases[database].assignment_epoch += 1

    def _next_epochs(self) -> None:
        for name in self._databases:
            self.next_epoch(name)

    def assignment_epoch(self, database: str) -> int:
        """Return the fence of a database.

        Whatever was asked in an earlier epoch is dropped: all partitions were given up since. A partition that is opened
        again alone keeps the epoch, for the sake of the others; core/ordering.py fences it.
        """
        return self._databases[database].assignment_epoch

    @property
    def assignment_epochs(self) -> tuple[int, ...]:
        """The fences of all databases."""
        return tuple(database.assignment_epoch for database in self._databases.values())

    # -- positions --------------------------------------------------------------------------------------------------

    def unpositioned(self, database: str) -> list[Partition]:
        """Return the partitions without a position in a database, in order."""
        if not self.has_assignment:
            return []
        return [
            partition
            for partition, entry in self._entries.items()
            if not (place := entry.places[database]).is_open and place.halt is None
        ]

    def open(self, database: str, partition: Partition, position: Position, cross_check_below: int = 0) -> None:
        """Set the position of a partition in a database.

        The client seeks when `want` says from where. cross_check_below: messages below this offset may have been
        applied in another database.
        """
        entry = self._entries[partition]
        entry.places[database] = _Place(is_open=True)
        of_database = self._databases[database]
        of_database.positions[partition] = position
        of_database.cross_check_below.pop(partition, None)
        if cross_check_below > position.offset:
            of_database.cross_check_below[partition] = cross_check_below
        entry.must_seek = True
        if entry.state is State.UNPOSITIONED:
            entry.state = State.PAUSED

    def close(self, database: str, partition: Partition) -> list[Action]:
        """Forget the position of a partition in a database.

        It is read again. Ends a halt there and a refusal.
        """
        entry = self._entries.get(partition)
        if entry is None:
            return []
        entry.places[database] = _Place()
        self._databases[database].cross_check_below.pop(partition, None)
        if self._is_halted(entry):
            entry.state = State.HALTED
            return []
        if any(place.is_open for place in entry.places.values()):
            self._end_stop(entry)
            return []
        entry.state, entry.offset, entry.must_seek = State.UNPOSITIONED, None, False
        return [AwaitPosition(partition)]

    def positions(self, database: str) -> dict[Partition, Position]:
        """Return the positions and logs that a database gave: a live view.

        A partition stays in it when it is closed: a batch in flight may still have messages of it.
        """
        return self._databases[database].positions

    def cross_check_below(self, database: str) -> Mapping[Partition, int]:
        """Return the offsets below which other databases must be asked.

        Messages below them may have been applied in another database. A live view.
        """
        return self._databases[database].cross_check_below

    # -- fetching ---------------------------------------------------------------------------------------------------

    def want(self, partition: Partition, offset: int | None) -> Action | None:
        """Read a partition on from an offset; None: no database has room."""
        entry = self._entries.get(partition)
        if entry is None or (entry.state is not State.READING and entry.state is not State.PAUSED):
            return None
        if offset is None:
            if entry.state is State.PAUSED:
                return None
            entry.state = State.PAUSED
            return Pause(partition)
        if entry.must_seek or offset != entry.offset:
            entry.state, entry.offset, entry.must_seek = State.READING, offset, False
            return Seek(partition, offset, self._topic_id(partition, entry))
        if entry.state is State.PAUSED:
            entry.state = State.READING
            return Resume(partition)
        return None

    def _topic_id(self, partition: Partition, entry: _Entry) -> UUID | None:
        name = next(name for name, place in entry.places.items() if place.is_open)
        return self._databases[name].positions[partition].topic_id

    def advance(self, partition: Partition, end: int) -> int | None:
        """Note that the client has handed out everything up to `end`.

        Returns from where; None: what it handed out is dropped.
        """
        entry = self._entries.get(partition)
        if entry is None or entry.offset is None:
            return None
        start = entry.offset
        entry.offset = max(start, end)
        return start

    # -- refusals and halts -----------------------------------------------------------------------------------------

    def refuse(self, partition: Partition, *, out_of_range: bool) -> list[Action]:
        """Note that the broker refused a fetch.

        Returns nothing to do where the refusal is of an earlier fetch, and so says nothing.
        """
        entry = self._entries.get(partition)
        if entry is None or entry.state in (State.UNPOSITIONED, State.HALTED):
            return []
        entry.state, entry.out_of_range = State.REFUSED, out_of_range
        return [Pause(partition)]

    def accept(self, partition: Partition) -> None:
        """End the refusal of a partition: nothing speaks against it.

        It goes on when `want` says so.
        """
        entry = self._entries.get(partition)
        if entry is not None and entry.state is State.REFUSED:
            self._end_stop(entry)

    def halt(self, database: str, partition: Partition, stop: PartitionHalt, position: Position) -> list[Action]:
        """Stop a partition that must not go on from its position.

        What was read before is still settled.
        """
        entry = self._entries[partition]
        entry.places[database].halt = Halt(stop, position)
        entry.state = State.HALTED
        return [Pause(partition)]

    def retry(self, partition: Partition) -> None:
        """End the halts of a partition that was being read.

        It goes on from where it was when `want` says so.
        """
        entry = self._entries[partition]
        for place in entry.places.values():
            if place.is_open:
                place.halt = None
        if entry.state is State.HALTED and not self._is_halted(entry):
            self._end_stop(entry)

    def _end_stop(self, entry: _Entry) -> None:
        if entry.state in (State.HALTED, State.REFUSED):
            entry.state, entry.must_seek = State.PAUSED, True

    def _is_halted(self, entry: _Entry) -> bool:
        return any(place.halt is not None for place in entry.places.values())

    # -- what was settled -------------------------------------------------------------------------------------------

    def settled(self, database: str, partition: Partition, position: int) -> None:
        """Note that a position was moved in a database."""
        entry = self._entries.get(partition)
        if entry is None:
            return
        entry.has_moved = True
        below = self._databases[database].cross_check_below
        if below and position >= below.get(partition, position + 1):
            del below[partition]

    def take_moved(self) -> list[Partition]:
        """Return the partitions whose offset moved since the last call.

        Leaves out halted partitions, where Kafka's offset may be of another log, and those without a position in some
        database.
        """
        moved = []
        for partition, entry in self._entries.items():
            if entry.has_moved:
                entry.has_moved = False
                if all(place.is_open and place.halt is None for place in entry.places.values()):
                    moved.append(partition)
        return moved

    def put_back_moved(self, partitions: Iterable[Partition]) -> None:
        """Note that offsets could not be committed."""
        for partition in partitions:
            if (entry := self._entries.get(partition)) is not None:
                entry.has_moved = True

    # -- questions --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    def partitions(self) -> list[Partition]:
        """All that are assigned, in order."""
        return list(self._entries)

    def state(self, partition: Partition) -> State | None:
        """The state of a partition; None for one that is not assigned."""
        entry = self._entries.get(partition)
        return None if entry is None else entry.state

    def may_be_read(self, partition: Partition) -> bool:
        """Whether `want` may have an effect on a partition."""
        entry = self._entries.get(partition)
        return entry is not None and (entry.state is State.READING or entry.state is State.PAUSED)

    @property
    def waits_for_room(self) -> bool:
        """Whether some partition is PAUSED, and not by an operator."""
        return any(entry.state is State.PAUSED and not entry.by_operator for entry in self._entries.values())

    def pause_by_operator(self, paused: Collection[Partition]) -> None:
        """Note which partitions no database may settle.

        No room is awaited for them; `want` pauses and resumes them.
        """
        for partition, entry in self._entries.items():
            entry.by_operator = partition in paused

    def in_state(self, state: State) -> list[Partition]:
        """The partitions in a state, in order."""
        return [partition for partition, entry in self._entries.items() if entry.state is state]

    def offset(self, partition: Partition) -> int | None:
        """Return the offset that the client hands out next.

        None for a partition that was never positioned.
        """
        entry = self._entries.get(partition)
        return None if entry is None else entry.offset

    def refusals(self) -> dict[Partition, bool]:
        """Partitions that are REFUSED; whether the log does not hold their offset."""
        return {
            partition: entry.out_of_range for partition, entry in self._entries.items() if entry.state is State.REFUSED
        }

    def halts(self, database: str) -> dict[Partition, Halt]:
        """Return the halts of a database."""
        return {
            partition: halt
            for partition, entry in self._entries.items()
            if (halt := entry.places[database].halt) is not None
        }
