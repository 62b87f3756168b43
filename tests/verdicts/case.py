"""A case as plain data: an application, a history, and a fault.

A record's value is `{"m": index}`; the fields that handlers read are `payloads[index]`. So an edited dead letter is another
index, and the same handler runs in a worker, in a rebuild and on plain asyncpg. Column names tell what a rebuild can give
again: of those that end in `_at` or `_rnd`, or begin with `sid`, only whether there is a value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from oracle.case import Shown, Step

MOVING = re.compile(r".*_(at|rnd)|sid\d*")


@dataclass(frozen=True, repr=False)
class When(Step):
    """`if message.FIELD == value: steps`."""

    field: str
    value: Any
    steps: tuple[Step, ...]

    @property
    def inner(self) -> tuple[Step, ...]:
        return self.steps


@dataclass(frozen=True, repr=False)
class Again(Step):
    """`if variable is None: raise RunAgain`.

    The missing value comes from another topic.
    """

    variable: str


@dataclass(frozen=True, repr=False)
class Draw(Step):
    """`variable = str(uuid4())`: a value that Python draws."""

    variable: str


@dataclass(frozen=True, repr=False)
class Table(Shown):
    """A table with its statements.

    seeds: its first rows. fed_by: the table whose trigger fills it.
    """

    name: str
    ddl: tuple[str, ...]
    seeds: tuple[str, ...] = ()
    fed_by: str = ""


@dataclass(frozen=True, repr=False)
class Handler(Shown):
    """A handler of one topic (by its number)."""

    name: str
    topic: int
    steps: tuple[Step, ...]
    attempts: int = 2
    batch: int | None = None
    order: str = "key"


@dataclass(frozen=True, repr=False)
class Send(Shown):
    """A record.

    id: the number of its message id. at: milliseconds after the beginning of the history.
    """

    payload: int
    id: int
    topic: int
    partition: int
    key: str | None
    at: int


@dataclass(frozen=True)
class Settle:
    """Wait until everything that can be settled is settled.

    restart: the workers are then replaced.
    """

    restart: bool = False


@dataclass(frozen=True)
class Operate:
    """An operator at the oldest dead letters.

    retry, discard, edit (same id) or replace (new id), with another payload.
    """

    what: str
    most: int = 1
    payload: int = 0


@dataclass(frozen=True)
class Heal:
    """From now on no payload fails: the code was corrected."""


Event = Send | Settle | Operate | Heal


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    chance: decides between the places where it can be planted. payload, other: of effects.
    """

    kind: str = "none"
    chance: int = 0
    payload: int = 0
    other: int = 0


@dataclass(frozen=True, repr=False)
class Case(Shown):
    """All of a case.

    spread: the ledger's transactions are moved a minute apart, as if the history had taken that long.
    """

    seed: int
    tables: tuple[Table, ...]
    handlers: tuple[Handler, ...]
    partitions: tuple[int, ...]  # of each topic
    payloads: tuple[dict[str, Any], ...]
    history: tuple[Event, ...]
    fault: Fault = field(default_factory=Fault)
    batch: int = 100
    lanes: int = 1
    workers: int = 1
    spread: bool = False
    base: bool = False

    @property
    def is_serial(self) -> bool:
        """Whether transactions never overlap, so effects have one order."""
        return self.lanes == self.workers == 1

    @property
    def seeds(self) -> str:
        """The first rows of all tables, as SQL."""
        return ";\n".join(seed for table in self.tables for seed in table.seeds)

    def lines(self) -> list[str]:
        """A compact description."""
        sends = sum(isinstance(event, Send) for event in self.history)
        rest = [repr(event) for event in self.history if not isinstance(event, Send)]
        return [
            f"topics with {', '.join(map(str, self.partitions))} partitions; {sends} records; batch {self.batch}, lanes "
            f"{self.lanes}, workers {self.workers}{', spread' if self.spread else ''}{', with --base' if self.base else ''}",
            *(f"table {table.name}: {'; '.join([*table.ddl, *table.seeds])}" for table in self.tables),
            *(repr(handler) for handler in self.handlers),
            "history: " + " ".join(map(_short, self.history))
            if sends <= 12
            else f"history: {sends} records, {' '.join(rest)}",
            f"fault: {self.fault}",
        ]


def _short(event: Event) -> str:
    if isinstance(event, Send):
        return f"{event.topic}:{event.partition}<-m{event.payload}(id {event.id}, key {event.key}, {event.at} ms)"
    return repr(event)
