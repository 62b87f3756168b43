"""State shared by the passes of one rebuild."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from consumer.app import App
from consumer.core.errors import CannotTell
from consumer.core.handler import Handler
from consumer.core.message import Partition
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import KafkaError, LogTruncated
from consumer.outbox.record import Outgoing
from consumer.rebuild.absent_rows import AbsentRows
from consumer.rebuild.compare import ComparisonResult
from consumer.rebuild.drawn_values import ColumnValues
from consumer.rebuild.shared_snapshot import SharedSnapshot
from consumer.rebuild.table_model import ColumnName, Name, TableUsage
from consumer.settings import Settings

NOTHING_CHANGED = "nothing was changed, and it can be run again"

Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]


class OutgoingSink(Protocol):
    """Takes what the handlers publish in the passes of a rebuild.

    With one, rows that differ are only counted.
    """

    async def begin(self) -> None:
        """Begin a pass; forget one that came to no end."""

    async def add(self, outgoing: Sequence[Outgoing]) -> None:
        """Take what a batch publishes."""

    async def end(self) -> None:
        """End a pass."""

    async def differs(self) -> bool:
        """Return whether the first pass publishes something else than is in Kafka."""


@dataclass(slots=True)
class RebuildState:
    """The options and services of one rebuild, and what its passes learned.

    sql_owners: the handler that first sent a deferred statement, by its SQL. writers: handlers that wrote something, in any
    pass. usage: how handlers use the tables. contradicted: of the first pass, see AppliedOrder. absent: of the current
    pass. uncertain_columns: columns that may have begun with other values (first_rows_rules.py). first_comparison,
    first_values: of the first rebuild, with the values that may be drawn. drawn: columns that are.
    """

    app: App
    settings: Settings
    source: KafkaConsumer
    partitions: Sequence[Partition]
    base: str | None
    tell: Tell
    progress: Progress
    snapshot: SharedSnapshot
    sql_owners: dict[str, str] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)
    usage: dict[Name, TableUsage] = field(default_factory=dict)
    contradicted: Counter[str] = field(default_factory=Counter)
    absent: AbsentRows | None = None
    uncertain_columns: Mapping[Name, frozenset[str]] = field(default_factory=dict)
    first_comparison: ComparisonResult = field(default_factory=ComparisonResult)
    first_values: dict[ColumnName, ColumnValues] = field(default_factory=dict)
    drawn: frozenset[ColumnName] = frozenset()
    outgoing: OutgoingSink | None = None
    handlers: list[Handler] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@contextmanager
def kafka_errors(settings: Settings) -> Iterator[None]:
    """Turn errors of Kafka into CannotTell."""
    try:
        yield
    except LogTruncated as error:
        raise CannotTell(f"{error}: records were removed while they were read; {NOTHING_CHANGED}") from error
    except (KafkaError, OSError) as error:  # TimeoutError is an OSError
        text = str(error) or type(error).__name__
        raise CannotTell(
            f"Kafka at {settings.kafka_bootstrap_servers}: {text}: the rebuild has ended; {NOTHING_CHANGED}"
        ) from error
