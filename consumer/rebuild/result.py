"""The answer of a rebuild."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from consumer.rebuild.compare import Excuse


@dataclass(slots=True)
class RebuildResult:
    """What a rebuild counted, and how the tables differ.

    All counts but `messages` are of deliveries: one for each handler that takes a message. unknown: what makes the answer
    uncertain.
    """

    messages: int = 0
    applied: int = 0
    repeated: int = 0
    dead_lettered: int = 0  # dead letters of the ledger, which were left out
    rejected: int = 0
    failed: int = 0
    unreadable: int = 0
    ranges: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    unknown: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether no table differs, in what was compared."""
        return not any(table["missing"] or table["extra"] or table["different"] for table in self.tables)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON can hold it.

        excuses: the notes that may explain a difference, so that it proves no fault.
        """
        return {**dataclasses.asdict(self), "excuses": [note for note in self.notes if isinstance(note, Excuse)]}
