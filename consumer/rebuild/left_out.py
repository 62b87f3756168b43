"""Messages without a ledger row that a rebuild leaves out: their handler need not settle them, or the ledger may have forgotten them.

Knows SQL through a connection that is handed in. Limitation: a message below the position that the ledger has forgotten counts as applied,
because everything below a position is settled and dead letters are never forgotten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from consumer.core.delivery import Delivery
from consumer.core.message import Partition
from consumer.core.retention import may_be_forgotten
from consumer.handler_records import coverage
from consumer.handler_records.settled_ranges import Stretch
from consumer.rebuild.compare import Excuse

# Messages that were claimed although the ledger may have forgotten their row. They may have been applied before.
_TOO_OLD = """
select h.name, d.topic, d.partition, d."offset" from consumer.dead_letters d join consumer.handlers h using (handler)
where d.handler = any($1) and d.topic = any($2) and d.reason = 'too_old' and d.state <> 'applied'
order by 2, 3, 4
"""
_BELOW = """
select f.handler, t.name, f.partition, f.below from consumer.forgotten f join consumer.topics t using (topic)
where f.handler = any($1)
"""


@dataclass(slots=True)
class LeftOut:
    """Counts what was left out. declared: by handler and partition, what it need not settle (`positions --begin-here`)."""

    declared: Mapping[tuple[int, Partition], Sequence[Stretch]] = field(default_factory=dict)
    _until_ms: int | None = None  # messages from before may be forgotten; None: nothing is
    _below: Mapping[tuple[int, str, int], int] = field(default_factory=dict)
    _exempt: Counter[str] = field(default_factory=Counter)
    _doubtful: Counter[str] = field(default_factory=Counter)
    _example: str = ""

    async def read(
        self, connection: Any, app: str, handlers: Collection[int], topics: Collection[str], skew_hours: float
    ) -> None:
        """Ask the ledger, before the transaction becomes read only."""
        self.declared = (await coverage.look(connection, app)).declared
        horizon_ms = await connection.fetchval(
            "select ceil(extract(epoch from horizon) * 1000)::int8 from consumer.ledger_state"
        )
        if horizon_ms is None:
            return
        self._until_ms = horizon_ms + round(skew_hours * 3_600_000)
        self._below = {tuple(row)[:3]: row[3] for row in await connection.fetch(_BELOW, list(handlers))}
        for handler, *place in await connection.fetch(_TOO_OLD, list(handlers), list(topics)):
            self._doubt(handler, *place)

    def takes(self, delivery: Delivery, position: int) -> bool:
        """Whether a message that has no row is left out of the rebuild."""
        number, partition, record = delivery.handler.number, delivery.partition, delivery.record
        offset = record.offset
        if any(each.first <= offset < (each.past or 0) for each in self.declared.get((number, partition), ())):
            self._exempt[delivery.handler.name] += 1
            return True
        if offset < position:
            return False
        below = self._below.get((number, *partition))
        if self._until_ms is not None and may_be_forgotten(record.timestamp, offset, self._until_ms, below):
            self._doubt(delivery.handler.name, *partition, offset)
        return True

    def reach(self, partition: Partition) -> int:
        """Up to where the ledger had rows that it has forgotten."""
        return max((past for (_, *place), past in self._below.items() if tuple(place) == partition), default=0)

    @property
    def exempt(self) -> int:
        """How many were left out because their handler need not settle them."""
        return self._exempt.total()

    def _doubt(self, handler: str, topic: str, partition: int, offset: int) -> None:
        self._doubtful[handler] += 1
        self._example = self._example or f"{topic}:{partition} at offset {offset}"

    def notes(self) -> list[str]:
        """What a person should know about them."""
        notes = [
            f"handler {name}: {count:,} messages were left out, which it need not settle (`consumer positions --begin-here`)"
            for name, count in sorted(self._exempt.items())
        ]
        if self._doubtful:
            told = ", ".join(f"{name} {count:,}" for name, count in sorted(self._doubtful.items()))
            text = (
                f"the ledger has forgotten whether messages above the position or with a dead letter too_old were applied before ({told}; "
                f"the first is {self._example}), so their effects are not in the rebuild"
            )
            notes.append(Excuse(text))
        return notes
