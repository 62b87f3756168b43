"""Messages without a ledger row that a rebuild leaves out.

Either their handler need not settle them, or the ledger may have forgotten whether they were applied. Limitation: a
message below the position that the ledger has forgotten counts as applied, because everything below a position is settled
and dead letters are never forgotten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from consumer.core.delivery import Delivery
from consumer.core.message import Partition
from consumer.core.retention import may_be_forgotten
from consumer.handler_records import coverage
from consumer.handler_records.settled_ranges import SettledRange
from consumer.postgres import dead_letter_queries, generations
from consumer.postgres.protocol import Connection
from consumer.rebuild.compare import Excuse


@dataclass(slots=True)
class OmittedMessages:
    """Decides which messages are left out, and counts them.

    declared: by handler and partition, the offsets that it need not settle (`consumer positions --begin-here`).
    """

    declared: Mapping[tuple[int, Partition], Sequence[SettledRange]] = field(default_factory=dict)
    _until_ms: int | None = None  # older messages may be forgotten; None: nothing is forgotten
    _below: Mapping[tuple[int, str, int], int] = field(default_factory=dict)
    _exempt: Counter[str] = field(default_factory=Counter)
    _doubtful: Counter[str] = field(default_factory=Counter)
    _example: str = ""

    async def read(
        self, connection: Connection, app: str, handlers: Collection[int], topics: Collection[str], skew_hours: float
    ) -> None:
        """Read from the ledger what may be left out.

        Call it before the transaction becomes read only.
        """
        self.declared = (await coverage.read_coverage(connection, app)).declared
        horizon_ms = await generations.horizon_ms(connection)
        if horizon_ms is None:
            return
        self._until_ms = horizon_ms + round(skew_hours * 3_600_000)
        self._below = await generations.forgotten_below(connection, list(handlers))
        for place in await dead_letter_queries.too_old(connection, list(handlers), list(topics)):
            self._doubt(*place)

    def takes(self, delivery: Delivery, position: int) -> bool:
        """Return whether a message without a row is left out; counts it."""
        number, partition, record = delivery.handler.number, delivery.partition, delivery.record
        offset = record.offset
        if any(span.first <= offset < (span.past or 0) for span in self.declared.get((number, partition), ())):
            self._exempt[delivery.handler.name] += 1
            return True
        if offset < position:
            return False
        below = self._below.get((number, *partition))
        if self._until_ms is not None and may_be_forgotten(record.timestamp, offset, self._until_ms, below):
            self._doubt(delivery.handler.name, *partition, offset)
        return True

    def reach(self, partition: Partition) -> int:
        """Return the offset below which the ledger has forgotten rows."""
        return max((past for (_, *place), past in self._below.items() if tuple(place) == partition), default=0)

    @property
    def exempt(self) -> int:
        """Count of those that their handler need not settle."""
        return self._exempt.total()

    def _doubt(self, handler: str, topic: str, partition: int, offset: int) -> None:
        self._doubtful[handler] += 1
        self._example = self._example or f"{topic}:{partition} at offset {offset}"

    def notes(self) -> list[str]:
        """Return the notes of the answer about them."""
        notes = [
            f"handler {name}: {count:,} messages were left out, which it need not settle (`consumer positions --begin-here`)"
            for name, count in sorted(self._exempt.items())
        ]
        if self._doubtful:
            counts = ", ".join(f"{name} {count:,}" for name, count in sorted(self._doubtful.items()))
            text = (
                f"messages above the position, or with a dead letter too_old, may have been applied: the ledger has forgotten it ({counts}; "
                f"the first is {self._example}), so their effects are not in the rebuild"
            )
            notes.append(Excuse(text))
        return notes
