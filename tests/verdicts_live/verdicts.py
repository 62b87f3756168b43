"""Judges verdicts of a live system whose truth is known.

Its state is right until a fault is planted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

RIGHT, WRONG = "right", "wrong"


@dataclass(frozen=True)
class Answer:
    """One check or rebuild.

    kinds: of its problems and doubts, for exit codes 1 and 2. behind: only workers that lag.
    """

    what: str  # how it was asked
    code: int
    kinds: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    behind: bool = False
    seconds: float = 0.0
    messages: int = 0

    @property
    def is_rebuild(self) -> bool:
        return self.what.startswith("rebuild")


def of_findings(what: str, findings: Any, seconds: float) -> Answer:
    """What a replay has answered."""
    report = findings.as_dict()
    lines = [*report["problems"], *report["unknown"]]
    kinds = tuple(line["kind"] for line in lines)
    ahead = (findings.ahead, findings.unsettled_ahead) == (findings.total("missing"), findings.unsettled)
    behind = bool(kinds) and set(kinds) <= {"missing", "unsettled"} and ahead and "position" not in what
    examples = [
        str(sample)
        for sample in findings.samples
        if sample["kind"] in kinds or "no dead letter" in str(sample.get("detail"))
    ]
    texts = (
        *(line["text"] for line in lines),
        *examples[:3],
        *map(str, (report["rebuild"] or {}).get("differences", ())[:3]),
    )
    return Answer(what, report["exit_code"], kinds, texts, behind, seconds, findings.messages)


def of_error(what: str, error: Exception, seconds: float) -> Answer:
    """A replay that ended without an answer: exit code 2."""
    text = str(error)
    kind = "nothing in the range" if "range is empty" in text else type(error).__name__
    return Answer(what, 2, (kind,), (text,), seconds=seconds)


def judge(answer: Answer, seen_by: bool | None) -> str:
    """Return right or wrong.

    seen_by: None while nothing is planted, else whether this answer must notice what is. Messages above the positions
    that workers have not come to are missing by definition; that is no fault of the verdict.
    """
    if seen_by:
        return WRONG if answer.code == 0 or answer.behind else RIGHT
    return WRONG if answer.code == 1 and not answer.behind else RIGHT


@dataclass
class Tally:
    """Answers, counted. wrong: with what is needed to look into them."""

    codes: Counter[tuple[str, str]] = field(default_factory=Counter)  # (check or rebuild, exit code) -> answers
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # (check or rebuild, reason of 2) -> answers
    disturbances: Counter[str] = field(default_factory=Counter)
    rates: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(
        default_factory=Counter
    )  # planted fault -> answers that had to notice it, by exit code
    examples: dict[str, str] = field(default_factory=dict)  # reason -> the first text
    wrong: list[dict[str, Any]] = field(default_factory=list)
    messages: int = 0
    seconds: float = 0.0

    def add(self, answer: Answer, seen_by: bool | None, planted: str, **where: Any) -> None:
        which = "rebuild" if answer.is_rebuild else "check"
        code = "1, workers behind" if answer.behind and not seen_by else str(answer.code)
        if planted:
            code += ", fault planted"
        self.codes[which, code] += 1
        self.messages += answer.messages
        if answer.code == 2:
            for kind in dict.fromkeys(answer.kinds):
                self.reasons[which, kind] += 1
            for kind, text in zip(answer.kinds, answer.texts, strict=False):
                self.examples.setdefault(kind, text[:400])
        if seen_by:
            self.noticed[f"{planted}: exit {answer.code}"] += 1
        if judge(answer, seen_by) == WRONG:
            self.wrong.append({**where, "what": answer.what, "code": answer.code, "planted": planted, "texts": list(answer.texts)})  # fmt: skip

    def count(self, which: str) -> int:
        return sum(n for (kind, _), n in self.codes.items() if kind == which)

    def as_dict(self) -> dict[str, Any]:
        return {
            "checks": self.count("check"),
            "rebuilds": self.count("rebuild"),
            "verdicts": {f"{which}: {code}": n for (which, code), n in sorted(self.codes.items())},
            "reasons_of_2": {f"{which}: {kind}": n for (which, kind), n in self.reasons.most_common()},
            "examples": self.examples,
            "noticed": dict(self.noticed),
            "disturbances": dict(self.disturbances.most_common()),
            "messages_by_rate": {str(rate): n for rate, n in sorted(self.rates.items())},
            "messages_by_kind": dict(self.kinds.most_common()),
            "messages_replayed": self.messages,
            "seconds": round(self.seconds, 1),
            "wrong": self.wrong,
        }

    def table(self) -> str:
        """The summary for a terminal."""
        report = self.as_dict()
        lines = [f"\n{report['checks']:,} checks and {report['rebuilds']:,} rebuilds in {self.seconds:,.0f} s"]
        for title in ("verdicts", "reasons_of_2", "noticed", "disturbances", "messages_by_rate", "messages_by_kind"):
            if report[title]:
                lines += ["", title.replace("_", " "), *(f"{n:>8,}  {name}" for name, n in report[title].items())]
        for answer in self.wrong:
            lines += ["", f"WRONG: {answer}"]
        lines += ["", f"{len(self.wrong)} wrong verdicts"]
        return "\n".join(lines)
