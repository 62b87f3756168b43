"""Worker processes of one supervisor: their states, liveness and readiness.

Pure: the supervisor says what happens. Readiness is of the slots, not of the processes in them, so that neither a restart nor
an outage ends it (as Spring Boot advises: a probe that fails with a shared service would take every replica away at once).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from consumer.metrics.catalog import (
    PARTITION_STOPPED,
    RESTART_REASONS,
    SERVICE_WAITING,
    WORKER_RESTARTS,
    WORKERS,
    Metric,
)
from consumer.metrics.recorder import Labels
from consumer.metrics.totals import Totals


class Phase(Enum):
    """What the supervisor does with a slot."""

    STARTING = "starting"  # its process is not in the group yet
    RUNNING = "running"  # its process has joined the group
    RESTARTING = "restarting"  # its process has ended, another one starts soon
    ENDED = "ended"  # nothing more is started in it


@dataclass(slots=True)
class Slot:
    """One place for a worker process.

    process: counts processes of all slots. has_been_ready: one of its processes was in the group once, and had every
    service by then.
    """

    phase: Phase = Phase.STARTING
    process: int = 0
    pid: int | None = None
    restarts: int = 0
    has_been_ready: bool = False
    batches: int = 0


@dataclass(slots=True)
class Fleet:
    """All slots of one supervisor, and their totals.

    app: its name. is_stopping: a signal has come; the workers drain.
    """

    app: str
    slots: list[Slot]
    totals: Totals = field(default_factory=Totals)
    is_stopping: bool = False
    _processes: int = 0

    @classmethod
    def of(cls, app: str, workers: int) -> Fleet:
        """Return a fleet that begins."""
        fleet = cls(app, [Slot() for _ in range(workers)])
        for reason in RESTART_REASONS:  # a counter that begins at 0 shows its first increase
            fleet.totals.add(WORKER_RESTARTS, (reason,), 0)
        return fleet

    # -- what happens -------------------------------------------------------------------------------------------------

    def started(self, slot: int, pid: int) -> int:
        """Note a new process; return its number."""
        self._processes += 1
        self.slots[slot].process, self.slots[slot].pid = self._processes, pid
        self.slots[slot].phase, self.slots[slot].batches = Phase.STARTING, 0
        self.totals.begin(self._processes)
        return self._processes

    def report(self, slot: int, process: int, fields: Mapping[str, Any]) -> None:
        """Take what a process reports."""
        state = self.slots[slot]
        if process != state.process:
            return
        if fields.get("member"):  # it registers its handlers in PostgreSQL before it joins
            state.phase, state.has_been_ready = Phase.RUNNING, True
        if isinstance(batches := fields.get("batches"), int):
            state.batches = batches
        if (beat := fields.get("metrics")) is not None:
            self.totals.report(process, beat)

    def ended(self, slot: int, process: int, reason: str | None) -> None:
        """Note the end of a process.

        reason: why it ended on its own; None if it was stopped.
        """
        self.totals.end(process)
        state = self.slots[slot]
        state.phase, state.pid = Phase.ENDED, None
        if reason is not None:
            state.phase = Phase.RESTARTING
            state.restarts += 1
            self.totals.add(WORKER_RESTARTS, (reason,))

    def given_up(self, slot: int) -> None:
        """Note that nothing more is started in a slot."""
        self.slots[slot].phase = Phase.ENDED

    # -- questions ----------------------------------------------------------------------------------------------------

    def not_live(self) -> list[str]:
        """Return why the supervisor should be replaced; nothing if it should not."""
        if self.is_stopping:
            return []
        return [f"worker {number} has ended" for number, slot in enumerate(self.slots) if slot.phase is Phase.ENDED]

    def not_ready(self, *, strict: bool = False) -> list[str]:
        """Return why the workers are not ready; nothing if they are.

        strict: also what a worker waits for now, and partitions that have stopped.
        """
        why = ["the workers drain"] if self.is_stopping else []
        why += [
            f"worker {number} has not joined its group yet"
            for number, slot in enumerate(self.slots)
            if not slot.has_been_ready or (strict and slot.phase is not Phase.RUNNING)
        ]
        if strict:
            gauges = self.totals.gauges()
            why += [
                f"waiting for {labels[0]}"
                for (metric, labels), value in gauges.items()
                if metric is SERVICE_WAITING and value
            ]
            why += [
                f"partition {labels[0]}:{labels[1]} has stopped: {labels[2]}"
                for metric, labels in gauges
                if metric is PARTITION_STOPPED
            ]
        return why

    def samples(self) -> dict[Metric, list[tuple[Labels, Any]]]:
        """Return the series of each metric that has some, sorted by labels.

        The first label is the App's name. A value is a number, or a Distribution for a histogram.
        """
        phases = Counter(slot.phase for slot in self.slots)
        self.totals.set_gauges("workers", [(WORKERS, (phase.value,), float(phases[phase])) for phase in Phase])
        samples: dict[Metric, list[tuple[Labels, Any]]] = {}
        for sums in (self.totals.counters(), self.totals.distributions(), self.totals.gauges()):
            for (metric, labels), value in sums.items():
                samples.setdefault(metric, []).append(((self.app, *labels), value))
        for series in samples.values():
            series.sort(key=lambda item: item[0])
        return samples
