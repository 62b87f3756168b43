"""One run of the oracle: cases of consecutive seeds, and a summary.

The run goes on until the time is over; the summary says what the cases exercised.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import asyncpg

from oracle import framework
from oracle.case import Case, Difference, pasted
from oracle.check import Verdict, check
from oracle.databases import Databases
from oracle.generate import draw
from oracle.shrink import shrink


@dataclass
class Counterexample:
    """A case on which the sides differ, as small as possible."""

    seed: int
    after_seconds: float
    kind: str
    text: str
    test: str


@dataclass
class Summary:
    """What a run has exercised and found.

    rewritten: executions that stood for several writes; refused: messages.
    """

    seed: int
    seconds: float = 0.0
    cases: int = 0
    invalid: int = 0
    undecided: int = 0
    messages: int = 0
    failed: int = 0
    refused: int = 0
    batches: int = 0
    deferred: int = 0
    executions: int = 0
    rewritten: int = 0
    rows_rewritten: int = 0
    cases_rewritten: int = 0
    counterexamples: list[Counterexample] = field(default_factory=list)

    def add(self, case: Case, verdict: Verdict) -> None:
        """Count a case."""
        self.cases += 1
        self.invalid += bool(verdict.invalid)
        self.undecided += verdict.undecided
        self.refused += verdict.refused
        self.failed += verdict.failed
        if (seen := verdict.seen) is not None:
            self.messages += len(seen.places)
            self.batches += len(seen.batches)
            self.deferred += framework.deferred(case)
            self.executions += seen.executions
            self.rewritten += seen.rewritten
            self.rows_rewritten += seen.rows_rewritten
            self.cases_rewritten += bool(seen.rewritten)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        counts = {
            "cases": self.cases,
            "of them with an invalid schema": self.invalid,
            "of them undecided (concurrency, too many orders)": self.undecided,
            "messages": self.messages,
            "of them not applied": self.failed,
            "of them refused": self.refused,
            "batches": self.batches,
            "writes deferred (about)": self.deferred,
            "statements executed": self.executions,
            "of them for several writes": self.rewritten,
            "writes in those": self.rows_rewritten,
            "cases with grouped writes": self.cases_rewritten,
            "counterexamples": len(self.counterexamples),
        }
        lines = [f"{number:>9,}  {name}" for name, number in counts.items()]
        return "\n".join([f"seed {self.seed}, {self.seconds:.0f} s", *lines])


async def search(
    databases: Databases,
    summary: Summary,
    *,
    seconds: float,
    cases: int = 0,
    stop_at: int = 1,
    shrink_seconds: float = 60,
    on_found: Callable[[Counterexample], None] = lambda _: None,
    alone: bool = False,
) -> None:
    """Check cases until the time is over or `stop_at` counterexamples exist.

    `summary` is kept up to date. alone: one message in each transaction of the framework, too, so that only what is not
    the batch's can differ.
    """
    began = time.monotonic()
    seed = summary.seed
    while (now := time.monotonic()) - began < seconds and len(summary.counterexamples) < stop_at:
        if cases and summary.cases >= cases:
            break
        case = draw(seed, framework.HAS_SET_LOCAL)
        if alone:
            handlers = tuple(replace(handler, batch=None, many=False, concurrency=1) for handler in case.handlers)
            case = replace(case, batch=1, handlers=handlers)
        verdict = await check(databases, case)
        if verdict.undecided:
            case, verdict = await _decided(databases, case, verdict)
        summary.add(case, verdict)
        summary.seconds = time.monotonic() - began
        if verdict.difference is not None:
            after = time.monotonic() - began
            small, difference = await minimal(databases, case, verdict.difference, shrink_seconds)
            example = Counterexample(seed, round(after, 1), difference.kind, str(difference), pasted(small, difference))
            summary.counterexamples.append(example)
            on_found(example)
            began += time.monotonic() - now  # shrinking is not searching
        seed += 1


async def _decided(databases: Databases, case: Case, verdict: Verdict) -> tuple[Case, Verdict]:
    """A smaller case, of which all orders can be tried.

    For one with too many orders: with few of its messages, if one of these fails.
    """
    few = max(2, 5 // len(case.handlers))
    for start in range(0, min(len(case.messages), 8 * few), few):
        fewer = replace(case, messages=case.messages[start : start + few])
        verdict_of_fewer = await check(databases, fewer)
        if verdict_of_fewer.difference is not None:
            return fewer, verdict_of_fewer
    return case, verdict


async def minimal(databases: Databases, case: Case, difference: Difference, seconds: float) -> tuple[Case, Difference]:
    """The smallest case that fails alike, and what is then wrong."""
    last = [difference]

    async def fails(candidate: Case) -> bool:
        try:
            verdict = await check(databases, candidate)
        except asyncpg.PostgresError:  # its tables cannot be made: something that they need was taken away
            return False
        if verdict.difference is None or verdict.difference.kind != difference.kind:
            return False
        last[0] = verdict.difference
        return True

    smaller = await shrink(case, fails, seconds)
    return smaller, last[0]
