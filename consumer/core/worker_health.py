"""How a worker inside another program is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

State = Literal["starting", "consuming", "stopping", "stopped", "failed"]


@dataclass(frozen=True)
class WorkerHealth:
    """How an embedded worker is.

    state: ``starting`` until it is a member of the group, ``stopped`` also when it ended by itself because of the memory
    that the process uses, ``failed`` when it will settle nothing any more. batches: transactions settled so far. waiting:
    whether it waits for PostgreSQL. error: type and place of what ended it.
    """

    state: State
    batches: int
    waiting: bool
    error: str | None = None

    @property
    def ready(self) -> bool:
        """Whether it consumes, and PostgreSQL answers."""
        return self.state == "consuming" and not self.waiting


class EmbeddedWorker(Protocol):
    """What `App.worker` yields."""

    @property
    def health(self) -> WorkerHealth:
        """How the worker is now; asks no service."""
