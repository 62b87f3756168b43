"""The partition table, against a client and a simple model."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from consumer.core.log_identity import HaltReason, PartitionHalt, Position
from consumer.core.message import Partition
from consumer.worker.partition_table import Action, AwaitPosition, PartitionTable, Pause, Resume, Seek, State

pytestmark = pytest.mark.unit

EAST, WEST = "east", "west"
P0, P1 = Partition("payments", 0), Partition("payments", 1)
STOP = PartitionHalt(HaltReason.DAMAGED, "it is damaged", "--move-to 1")

partitions = st.sampled_from([P0, P1])
databases = st.sampled_from([EAST, WEST])
offsets = st.integers(0, 5)


class Client:
    """A Kafka client: its assignment, offsets and paused partitions."""

    def __init__(self) -> None:
        self.offsets: dict[Partition, int | None] = {}
        self.fetching: set[Partition] = set()
        self.topic_ids: dict[Partition, UUID | None] = {}

    def assign(self, assigned: set[Partition]) -> None:
        """After a rebalance the client fetches all, from any offset."""
        self.offsets = dict.fromkeys(assigned)
        self.fetching = set(assigned)

    def take(self, *actions: Action | None) -> None:
        for action in actions:
            match action:
                case AwaitPosition(partition):
                    self.offsets[partition] = None
                    self.fetching.discard(partition)
                case Pause(partition):
                    self.fetching.discard(partition)
                case Resume(partition):
                    self.fetching.add(partition)
                case Seek(partition, offset, topic_id):
                    self.offsets[partition] = offset
                    self.topic_ids[partition] = topic_id
                    self.fetching.add(partition)
                case None:
                    pass


class TableMachine(RuleBasedStateMachine):
    """Every transition, in any order, with two databases."""

    @initialize()
    def begin(self) -> None:
        self.table = PartitionTable([EAST, WEST])
        self.client = Client()
        self.assigned: set[Partition] = set()
        self.is_draining = True
        self.open: dict[str, dict[Partition, Position]] = {EAST: {}, WEST: {}}
        self.halted: dict[str, set[Partition]] = {EAST: set(), WEST: set()}
        self.refused: dict[Partition, bool] = {}
        self.moved: set[Partition] = set()
        self.cross_checked: dict[str, dict[Partition, int]] = {EAST: {}, WEST: {}}
        self.epochs = self.table.assignment_epochs

    # The group, and the databases.

    @rule(assigned=st.sets(partitions))
    def a_rebalance_assigns(self, assigned: set[Partition]) -> None:
        self._forget()
        self.assigned, self.is_draining = assigned, False
        self.client.assign(assigned)
        self.client.take(*self.table.assign(assigned))
        self._epochs_grow(EAST, WEST)

    @rule()
    def a_rebalance_begins(self) -> None:
        self.is_draining = True
        self.table.begin_revoke()
        self._epochs_grow(EAST, WEST)

    @rule()
    def a_rebalance_has_drained(self) -> None:
        self.is_draining = True
        self.table.begin_revoke()
        self.table.finish_revoke()
        self._forget()
        self._epochs_grow(EAST, WEST)

    @rule(database=databases)
    def a_database_is_another_one(self, database: str) -> None:
        self.table.next_epoch(database)
        self._epochs_grow(database)
        for partition in list(self.open[database]):
            self._close(database, partition)

    @rule(database=databases, offset=offsets, below=offsets, topic=st.sampled_from([None, UUID(int=1), UUID(int=2)]))
    def positions_are_read(self, database: str, offset: int, below: int, topic: UUID | None) -> None:
        for partition in self.table.unpositioned(database):
            position = Position(offset, "cluster", topic)
            self.table.open(database, partition, position, below)
            self.open[database][partition] = position
            if below > offset:
                self.cross_checked[database][partition] = below

    @rule(database=databases, partition=partitions)
    def a_position_has_moved(self, database: str, partition: Partition) -> None:
        self._close(database, partition)

    def _close(self, database: str, partition: Partition) -> None:
        self.client.take(*self.table.close(database, partition))
        self.open[database].pop(partition, None)
        self.cross_checked[database].pop(partition, None)
        if partition in self.assigned:
            self.halted[database].discard(partition)
            if not self._is_halted(partition):
                self.refused.pop(partition, None)

    # The lanes, and the client.

    @rule(partition=partitions, offset=offsets)
    def a_lane_has_room(self, partition: Partition, offset: int) -> None:
        self.client.take(self.table.want(partition, offset))
        if self._may_be_read(partition):
            assert partition in self.client.fetching
            assert self.client.offsets[partition] == offset

    @rule(partition=partitions)
    def no_lane_has_room(self, partition: Partition) -> None:
        self.client.take(self.table.want(partition, None))
        if self._may_be_read(partition):
            assert partition not in self.client.fetching

    @rule(partition=partitions, count=st.integers(1, 3))
    def records_come(self, partition: Partition, count: int) -> None:
        if partition in self.client.fetching:
            start = self.client.offsets[partition]
            assert start is not None, "the client fetches from nowhere"
            self.client.offsets[partition] = start + count
            assert self.table.advance(partition, start + count) == start

    @rule(partition=partitions, database=databases, position=st.integers(0, 10))
    def a_batch_is_settled(self, partition: Partition, database: str, position: int) -> None:
        self.table.settled(database, partition, position)
        if partition in self.assigned:
            self.moved.add(partition)
            if position >= self.cross_checked[database].get(partition, 11):
                del self.cross_checked[database][partition]

    @rule(is_committed=st.booleans())
    def offsets_are_committed(self, is_committed: bool) -> None:
        everywhere = {partition for partition in self.moved if all(partition in at for at in self.open.values())}
        moved = self.table.take_moved()
        assert moved == sorted(partition for partition in everywhere if not self._is_halted(partition))
        self.moved = set() if is_committed else set(moved)
        if not is_committed:
            self.table.put_back_moved(moved)

    # What goes wrong with a log.

    @rule(partition=partitions, out_of_range=st.booleans())
    def a_fetch_is_refused(self, partition: Partition, out_of_range: bool) -> None:
        actions = self.table.refuse(partition, out_of_range=out_of_range)
        self.client.take(*actions)
        says_something = self._is_open(partition) and not self._is_halted(partition)
        assert bool(actions) == says_something
        if says_something:
            self.refused[partition] = out_of_range

    @rule(partition=partitions)
    def a_refusal_is_explained(self, partition: Partition) -> None:
        self.table.accept(partition)
        self.refused.pop(partition, None)

    @rule(partition=partitions, database=databases)
    def a_partition_must_not_go_on(self, partition: Partition, database: str) -> None:
        if partition in self.assigned:
            self.client.take(*self.table.halt(database, partition, STOP, Position(3)))
            self.halted[database].add(partition)
            self.refused.pop(partition, None)

    @rule(partition=partitions)
    def a_partition_is_tried_again(self, partition: Partition) -> None:
        if partition in self.assigned:
            self.table.retry(partition)
            for database, halted in self.halted.items():
                if partition in self.open[database]:
                    halted.discard(partition)

    # What always holds.

    @invariant()
    def the_client_fetches_what_the_table_says(self) -> None:
        reading = self.table.in_state(State.READING)
        assert self.client.fetching & self.assigned == set(reading)
        for partition in reading:
            assert self.client.offsets[partition] == self.table.offset(partition)

    @invariant()
    def states_are_those_of_the_model(self) -> None:
        assert set(self.table.partitions()) == self.assigned
        for partition in (P0, P1):
            assert self.table.state(partition) is self._state(partition)
        assert self.table.refusals() == self.refused
        for database in (EAST, WEST):
            assert set(self.table.halts(database)) == self.halted[database]
            assert self.table.cross_check_below(database) == self.cross_checked[database]
            known = {*self.open[database], *self.halted[database]}
            unpositioned = [] if self.is_draining else sorted(self.assigned - known)
            assert self.table.unpositioned(database) == unpositioned
            positions = self.table.positions(database)
            assert all(positions[partition] == at for partition, at in self.open[database].items())

    def _state(self, partition: Partition) -> State | None:
        if partition not in self.assigned:
            return None
        if self._is_halted(partition):
            return State.HALTED
        if partition in self.refused:
            return State.REFUSED
        if not self._is_open(partition):
            return State.UNPOSITIONED
        return State.READING if partition in self.client.fetching else State.PAUSED

    def _may_be_read(self, partition: Partition) -> bool:
        return self._state(partition) in (State.READING, State.PAUSED)

    def _is_open(self, partition: Partition) -> bool:
        return any(partition in at for at in self.open.values())

    def _is_halted(self, partition: Partition) -> bool:
        return any(partition in halted for halted in self.halted.values())

    def _forget(self) -> None:
        for database in (EAST, WEST):
            self.open[database].clear()
            self.halted[database].clear()
            self.cross_checked[database].clear()
        self.assigned, self.refused, self.moved = set(), {}, set()

    def _epochs_grow(self, *names: str) -> None:
        for name, before, now in zip((EAST, WEST), self.epochs, self.table.assignment_epochs, strict=True):
            assert now > before if name in names else now == before
            assert now == self.table.assignment_epoch(name)
        self.epochs = self.table.assignment_epochs


TableMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40)
TestTableAgainstItsModel = TableMachine.TestCase


@pytest.fixture
def table() -> PartitionTable:
    """P0 is read from 10; it has one database."""
    table = PartitionTable([""])
    assert table.assign([P0]) == [AwaitPosition(P0)]
    table.open("", P0, Position(10, topic_id=UUID(int=1)))
    assert table.want(P0, 10) == Seek(P0, 10, UUID(int=1))
    return table


def test_partition_without_room_is_paused_once_and_resumed_in_place(table: PartitionTable) -> None:
    assert table.advance(P0, 15) == 10
    assert table.want(P0, None) == Pause(P0)
    assert table.want(P0, None) is None
    assert table.want(P0, 15) == Resume(P0)
    assert table.want(P0, 15) is None


def test_partition_read_again_from_an_earlier_offset_is_sought_to(table: PartitionTable) -> None:
    table.advance(P0, 15)
    assert table.want(P0, 12) == Seek(P0, 12, UUID(int=1))


def test_records_of_a_partition_without_position_are_dropped(table: PartitionTable) -> None:
    table.close("", P0)
    assert table.advance(P0, 20) is None


def test_partition_opened_at_the_clients_offset_is_sought_to_anyway(table: PartitionTable) -> None:
    table.close("", P0)
    table.open("", P0, Position(10))
    assert table.want(P0, 10) == Seek(P0, 10, None)


def test_halt_at_opening_outlasts_a_retry_and_ends_with_a_moved_position() -> None:
    """Nothing was read, so only another position helps."""
    table = PartitionTable([EAST, WEST])
    table.assign([P0])
    table.open(EAST, P0, Position(4))
    assert table.halt(WEST, P0, STOP, Position(-1)) == [Pause(P0)]
    assert table.want(P0, 4) is None
    table.retry(P0)
    assert table.state(P0) is State.HALTED
    assert table.close(WEST, P0) == []
    assert table.unpositioned(WEST) == [P0]
    assert table.want(P0, 4) == Seek(P0, 4, None)


def test_moved_partition_that_is_halted_is_not_committed(table: PartitionTable) -> None:
    table.settled("", P0, 12)
    table.halt("", P0, STOP, Position(12))
    assert table.take_moved() == []


def test_transitions_of_a_partition_that_is_not_assigned_do_nothing(table: PartitionTable) -> None:
    assert table.want(P1, 0) is None and table.advance(P1, 5) is None
    assert table.refuse(P1, out_of_range=True) == [] and table.close("", P1) == []
    table.settled("", P1, 5)
    assert table.state(P1) is None and len(table) == 1
