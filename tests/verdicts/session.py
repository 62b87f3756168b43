"""One run: cases of consecutive seeds, and a summary.

The run goes on until the time is over.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from verdicts.case import Case
from verdicts.drawing import draw
from verdicts.judging import Judged, judge
from verdicts.servers import Servers


@dataclass
class Summary:
    """What a run has judged.

    verdicts: "mode, fault or none, code" -> cases. unknown: "mode: reason" -> answers 2 where nothing was planted.
    """

    seed: int
    seconds: float = 0.0
    cases: int = 0
    faults: int = 0
    undecided: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    wrong: list[Judged] = field(default_factory=list)

    def add(self, judged: Judged) -> None:
        """Count a case."""
        self.cases += 1
        self.faults += bool(judged.fault)
        if judged.undecided:
            self.undecided[judged.undecided.split(":")[0]] += 1
        for answer in judged.answers:
            self.verdicts[answer.mode, judged.case.fault.kind if judged.fault else "none", answer.code] += 1
            if answer.code == 2 and not judged.fault:
                self.unknown.update(f"{answer.mode}: {reason}" for reason in answer.reasons)
        if judged.is_wrong:
            self.wrong.append(judged)

    def count(self, mode: str, code: int, kind: str | None = None) -> int:
        """The verdicts of a mode with an exit code.

        Of one kind of fault or of all.
        """
        return sum(n for (m, k, c), n in self.verdicts.items() if (m, c) == (mode, code) and kind in (None, k))

    def wrongs(self, code: int) -> int:
        """How many verdicts with this exit code are wrong."""
        return sum(answer.wrong and answer.code == code for judged in self.wrong for answer in judged.answers)

    def as_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "cases": self.cases,
            "faults": self.faults,
            "undecided": dict(self.undecided),
            "verdicts": [
                {"mode": m, "fault": k, "exit_code": c, "cases": n} for (m, k, c), n in sorted(self.verdicts.items())
            ],
            "unknown": dict(self.unknown.most_common()),
            "wrong_0": self.wrongs(0),
            "wrong_1": self.wrongs(1),
            "wrong": [judged.lines() for judged in self.wrong],
        }

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}, {self.seconds:.0f} s",
            f"{self.cases:>7,}  cases",
            f"{self.faults:>7,}  of them with a fault",
        ]
        lines += [f"{n:>7,}  undecided: {why}" for why, n in self.undecided.items()]
        for mode in ("check", "rebuild"):
            for kind, name in (("none", "nothing planted"), (None, "all")):
                codes = ", ".join(f"{code}: {self.count(mode, code, kind):,}" for code in (0, 1, 2))
                lines.append(f"         {mode}, {name}: exit code {codes}")
        lines += [
            f"{n:>7,}  could not tell although nothing was planted, {why}" for why, n in self.unknown.most_common()
        ]
        return "\n".join([*lines, f"{self.wrongs(0):>7,}  wrong 0", f"{self.wrongs(1):>7,}  wrong 1"])


async def judge_all(
    servers: Servers,
    summary: Summary,
    *,
    seconds: float,
    cases: int = 0,
    stop_at: int = 0,
    first: Iterable[Case] = (),
    on_wrong: Callable[[Judged], None] = lambda _: None,
) -> None:
    """Judge cases until the time is over.

    first: cases that come before those of the seed. `summary` is kept up to date.
    """
    began = time.monotonic()
    before = list(first)
    seed = summary.seed
    while time.monotonic() - began < seconds and not (cases and summary.cases >= cases):
        if before:
            case = before.pop(0)
        else:
            case = draw(seed)
            seed += 1
        judged = await judge(servers, case)
        summary.add(judged)
        summary.seconds = time.monotonic() - began
        on_wrong(judged)
        if stop_at and len(summary.wrong) >= stop_at:
            break
