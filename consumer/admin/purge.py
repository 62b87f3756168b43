"""Drop old generations of the ledger, and report what holds others back.

Decisions are in core/retention.py and admin/purge_plan.py, the steps in retention/task.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from consumer.admin.ledger_access import connected
from consumer.admin.purge_plan import PurgeEnd, decide, decide_by_logs, longer_needs
from consumer.core.audit import ActedBy, Entry
from consumer.core.errors import Misconfigured
from consumer.core.message import Partition
from consumer.core.retention import HOUR, LedgerState, Policy, Step, contradictions, wanted
from consumer.core.suggestions import check_known
from consumer.kafka.consumer import KafkaConsumer
from consumer.postgres import audit, generations
from consumer.postgres.connection import database_epoch, translated_errors
from consumer.postgres.handlers import topic_numbers
from consumer.retention import task
from consumer.settings import Settings

OnStep = Callable[[str, int | None], None]  # what was done, and to which generation


@dataclass(frozen=True, slots=True, kw_only=True)
class PurgeOptions:
    """What to drop.

    hours: how long rows are kept. force: also what a log can still deliver or another App needs. retired: an App whose
    declared retention does not count any more. by: for the record.
    """

    hours: float
    dry_run: bool = False
    force: bool = False
    retired: str | None = None
    by: ActedBy


class PurgeResult(NamedTuple):
    """What was done, and why not all that is due.

    answer: as `consumer purge --json` prints it."""

    answer: dict[str, Any]
    refusal: str | None


async def purge(settings: Settings, options: PurgeOptions, on_step: OnStep) -> PurgeResult:
    """Drop generations that are older than the retention, or only plan to.

    Raises Misconfigured if the retention contradicts the topics or other Apps, KafkaError and ServiceUnavailable.
    """
    connection = await connected(settings)
    source = KafkaConsumer(settings, None)
    try:
        return await _Purge(settings, options, connection, source).run(on_step)
    finally:
        await source.stop(5)
        connection.terminate()


@dataclass(slots=True)
class _Purge:
    settings: Settings
    options: PurgeOptions
    connection: Any  # asyncpg
    source: KafkaConsumer

    async def run(self, on_step: OnStep) -> PurgeResult:
        topics, longer = await self._needs()
        policy = task.policy_of(self.settings, self.options.hours)
        policy = policy._replace(generation=max(policy.generation, 1 / HOUR))  # --older-than 0: all but this second
        await self.source.start(self.settings.wait_seconds)
        objections, warnings = contradictions(policy, None, await task.logs_of(self.settings, topics))
        if longer:
            objections.append(longer_needs(longer, self.options.hours))
        if objections and not self.options.force and not self.options.dry_run:
            raise Misconfigured("; ".join(objections) + " (or --force)")
        with translated_errors(self.settings):
            before = await generations.read_state(self.connection)
            rows = await generations.estimated_rows(self.connection)
        plan = await self._plan(before, rows, topics)
        steps: list[dict[str, Any]] = []
        if not self.options.dry_run:
            await self._record("begun", retention_hours=policy.retention)
        end = None if self.options.dry_run else await self._act(policy, topics, steps, on_step)
        if end is not None:
            dropped = sum(step["done"] == "dropped" for step in steps)
            await self._record("held back" if end.refusal else "done", dropped=dropped)
        with translated_errors(self.settings):
            after = await generations.read_state(self.connection)
        answer = {
            "dry_run": self.options.dry_run,
            "retention_hours": policy.retention,
            "generation_hours": policy.generation,
            "generations": plan,
            "done": steps,
            "dropped": [step["generation"] for step in steps if step["done"] == "dropped"],
            "horizon": _iso(after.horizon),
            "objections": objections,
            "warnings": warnings,
            "held_back_by": [f"{topic}:{number}" for topic, number in end.partitions] if end else [],
            "unfinished": bool(end and end.is_unfinished),
        }
        return PurgeResult(answer, end.refusal if end else None)

    async def _needs(self) -> tuple[list[str], list[str]]:
        """Return the ledger's topics, and the Apps that need rows for longer.

        Declares --retired, unless it is a dry run.
        """
        retired = self.options.retired
        with translated_errors(self.settings):
            await database_epoch(self.connection, self.settings)
            declared = await generations.declared(self.connection)
            if retired is not None:
                check_known("--retired", retired, declared, "this database")
                if not self.options.dry_run:
                    await generations.declare(self.connection, retired, 0)
                    await self._record(f"{retired} is retired")
                declared[retired] = 0
            topics = sorted(await topic_numbers(self.connection))
        _, longer = wanted(self.options.hours, declared)
        return topics, longer

    async def _record(self, result: str, **numbers: float | None) -> None:
        with translated_errors(self.settings):
            await audit.record(self.connection, Entry("purge", self.options.by, result, None, numbers=numbers))

    async def _plan(self, state: LedgerState, rows: dict[int, int], topics: Sequence[str]) -> list[dict[str, Any]]:
        plan = []
        for generation in state.generations:
            decision = decide(generation, state, self.options.hours)
            if decision is None:
                holding = await self._holding(topics, generation.closed_at or 0.0)
                decision = decide_by_logs(generation, state, self.options.hours, holding)
            plan.append(
                {
                    "number": generation.number,
                    "opened_at": _iso(generation.opened_at),
                    "closed_at": _iso(generation.closed_at),
                    "drop": decision.drop,
                    "why": decision.why,
                    "rows": rows.get(generation.number, 0),
                }
            )
        return plan

    async def _act(
        self, policy: Policy, topics: Sequence[str], steps: list[dict[str, Any]], on_step: OnStep
    ) -> PurgeEnd:
        async def holding(at: float) -> Sequence[Partition]:
            return () if self.options.force else await self._holding(topics, at)

        def note(what: str, step: Step) -> None:
            number = getattr(step, "number", None)
            steps.append({"done": what, "generation": number})
            on_step(what, number)

        with translated_errors(self.settings):
            stopped = await task.keep_up(self.connection, policy, holding, note)
        return PurgeEnd(stopped.step, stopped.partitions, stopped.waits)

    async def _holding(self, topics: Sequence[str], at: float) -> list[Partition]:
        """Return the partitions whose logs hold records as old as that."""
        return await task.reaching(self.source, topics, at, self.settings.ledger_clock_skew_hours)


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
