"""State of one database of a worker, and of its lanes.

Data only: the parts of the worker read and write it. An App without shards has one database, whose name is empty.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from consumer.core.delivery import Batch
from consumer.core.handler import Handler
from consumer.core.message import Partition
from consumer.core.ordering import Scheduler
from consumer.postgres.application_codecs import ConnectionInit
from consumer.postgres.session import Session
from consumer.settings import Settings
from consumer.transaction.limits import CallTracker
from consumer.transaction.result import LedgerIds
from consumer.worker.conflict_turns import Turns
from consumer.worker.lane_starts import LaneStarts

if TYPE_CHECKING:
    from consumer.precheck.client import Precheck


@dataclass(slots=True, eq=False)
class Shard:
    """One database; the partition table holds its partitions."""

    name: str
    settings: Settings  # the worker's, with the address of this database
    ids: LedgerIds
    scheduler: Scheduler
    init: ConnectionInit | None = None  # the App's connection_init
    by_topic: dict[str, list[Handler]] = field(default_factory=dict)  # the handlers, with their numbers in its ledger
    by_name: dict[str, Handler] = field(default_factory=dict)  # the same, also those of no topic yet
    precheck: Precheck | None = None  # its marks name the epoch of this database
    control: Session | None = None  # the connection beside the lanes
    control_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    epoch: str = ""
    paused: frozenset[Partition] = frozenset()  # which of the assigned partitions they cover
    registered: str = ""  # the epoch that the numbers of handlers and topics are of
    registered_topics: frozenset[str] = frozenset()
    code_recorded_at: float = 0.0
    installation: str = ""
    positions_wanted: asyncio.Event = field(default_factory=asyncio.Event)  # some partition may be unpositioned
    crowded_until: float = 0.0  # monotonic: connections are given back, for other workers and lanes
    has_room: bool = True  # its share of the buffer is not used up
    lanes: list[LaneState] = field(default_factory=list)
    starts: LaneStarts = field(default_factory=LaneStarts)

    @property
    def label(self) -> dict[str, str]:
        """The fields that name the database in log events."""
        return {"shard": self.name} if self.name else {}

    @property
    def handlers(self) -> set[Handler]:
        """All handlers, with their numbers in this ledger."""
        return set(self.by_name.values())


@dataclass(slots=True, eq=False)
class LaneState:
    """A lane: its connection, and the batch that it settles.

    Any lane of a shard may take a batch of any partition that is not in flight.
    """

    number: int  # among those of its shard; the first idle one takes the next batch
    shard: Shard
    calls: CallTracker
    turns: Turns
    session: Session | None = None
    opened_at: float = 0.0  # of the session, monotonic
    worked_at: float = 0.0  # when its last batch ended, monotonic
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # no transaction is in flight
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # there may be a batch to take
    part: Batch | None = None  # what it is settling
    batches: int = 0  # settled so far
