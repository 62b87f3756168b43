"""What a rebuild found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from consumer.rebuild.compare import Excuse


@dataclass(slots=True)
class Rebuilt:
    """What a rebuild has found. Counts but `messages` are of deliveries: of a message, and each handler that takes it."""

    messages: int = 0
    applied: int = 0
    repeated: int = 0
    dead_lettered: int = 0  # by the ledger, so they were left out
    rejected: int = 0
    failed: int = 0
    unreadable: int = 0
    ranges: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    unknown: list[dict[str, Any]] = field(default_factory=list)  # what makes the answer uncertain
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether no table differs, as far as could be told."""
        return not any(each["missing"] or each["extra"] or each["different"] for each in self.tables)

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it. excuses: the notes that may explain a difference, so that it is no proof of a fault."""
        return {**dataclasses.asdict(self), "excuses": [each for each in self.notes if isinstance(each, Excuse)]}
