"""One run of the oracle: cases of consecutive seeds until the time is over, and a summary of what they exercised."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import asyncpg

from oracle import framework
from oracle.case import Case, Found, pasted
from oracle.check import Verdict, check
from oracle.databases import Databases
from oracle.generate import draw
from oracle.shrink import shrink


@dataclass
class Counterexample:
    """A case on which the two sides differ, as small as it could be made."""

    seed: int
    after_seconds: float
    kind: str
    text: str
    test: str


@dataclass
class Summary:
    """What a run has exercised and found. rewritten: executions that stood for several writes; refused: messages."""

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
    found: list[Counterexample] = field(default_factory=list)

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
            "counterexamples": len(self.found),
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
    told: Callable[[Counterexample], None] = lambda _: None,
    alone: bool = False,
) -> None:
    """Check cases until the time is over or `stop_at` counterexamples were found. `summary` is kept up to date.

    alone: one message in each transaction of the framework, too, so that only what is not the batch's can differ.
    """
    began = time.monotonic()
    seed = summary.seed
    while (now := time.monotonic()) - began < seconds and len(summary.found) < stop_at:
        if cases and summary.cases >= cases:
            break
        case = draw(seed, framework.HAS_SET_LOCAL)
        if alone:
            handlers = tuple(replace(each, batch=None, many=False, concurrency=1) for each in case.handlers)
            case = replace(case, batch=1, handlers=handlers)
        verdict = await check(databases, case)
        if verdict.undecided:
            case, verdict = await _decided(databases, case, verdict)
        summary.add(case, verdict)
        summary.seconds = time.monotonic() - began
        if verdict.found is not None:
            after = time.monotonic() - began
            found = await minimal(databases, case, verdict.found, shrink_seconds)
            example = Counterexample(seed, round(after, 1), found[1].kind, str(found[1]), pasted(*found))
            summary.found.append(example)
            told(example)
            began += time.monotonic() - now  # shrinking is not searching
        seed += 1


async def _decided(databases: Databases, case: Case, verdict: Verdict) -> tuple[Case, Verdict]:
    """A case of too many orders to try, with so few of its messages that all can be tried, if one of these fails."""
    few = max(2, 5 // len(case.handlers))
    for start in range(0, min(len(case.messages), 8 * few), few):
        fewer = replace(case, messages=case.messages[start : start + few])
        found = await check(databases, fewer)
        if found.found is not None:
            return fewer, found
    return case, verdict


async def minimal(databases: Databases, case: Case, found: Found, seconds: float) -> tuple[Case, Found]:
    """The smallest case that fails in the same way, and what is then wrong with it."""
    last = [found]

    async def fails(candidate: Case) -> bool:
        try:
            verdict = await check(databases, candidate)
        except asyncpg.PostgresError:  # its tables cannot be made: something that they need was taken away
            return False
        if verdict.found is None or verdict.found.kind != found.kind:
            return False
        last[0] = verdict.found
        return True

    smaller = await shrink(case, fails, seconds)
    return smaller, last[0]
