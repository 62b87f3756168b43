"""What the passes of a rebuild share: its options, services, and what they learn of the tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from consumer.app import App
from consumer.core.errors import CannotTell
from consumer.core.handler import Handler
from consumer.core.message import Partition
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import KafkaError, LogTruncated
from consumer.rebuild.absent_rows import AbsentRows
from consumer.rebuild.compare import Compared
from consumer.rebuild.drawn_values import Place, Values
from consumer.rebuild.one_snapshot import OneSnapshot
from consumer.rebuild.table_model import Name, TableUsage
from consumer.settings import Settings

NOTHING_CHANGED = "nothing was changed, and it can be run again"

Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class RebuildState:
    """What all passes of one rebuild share, and what they learn.

    known: how handlers use the tables. owners: deferred SQL, and the handler that it was first seen from. writers: handlers
    that have written something, in any pass. contradicted: of the first pass, see AppliedOrder. absent: of the pass that runs.
    beginnings: of further rebuilds, see beginnings.py. first, values: what the first rebuild gives, and values that may be
    drawn. drawn: columns that are.
    """

    app: App
    settings: Settings
    source: KafkaConsumer
    partitions: Sequence[Partition]
    base: str | None
    tell: Tell
    progress: Progress
    snapshot: OneSnapshot
    owners: dict[str, str] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)
    known: dict[Name, TableUsage] = field(default_factory=dict)
    contradicted: Counter[str] = field(default_factory=Counter)
    absent: AbsentRows | None = None
    beginnings: Mapping[Name, frozenset[str]] = field(default_factory=dict)
    first: Compared = field(default_factory=Compared)
    values: dict[Place, Values] = field(default_factory=dict)
    drawn: frozenset[Place] = frozenset()
    handlers: list[Handler] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@contextmanager
def kafka_errors(settings: Settings) -> Iterator[None]:
    try:
        yield
    except LogTruncated as error:
        raise CannotTell(f"{error}: records were removed while they were read; {NOTHING_CHANGED}") from error
    except (KafkaError, OSError) as error:  # TimeoutError is an OSError
        text = str(error) or type(error).__name__
        raise CannotTell(
            f"Kafka at {settings.kafka_bootstrap_servers}: {text}: the rebuild has ended; {NOTHING_CHANGED}"
        ) from error
