"""Collect what a replay found, and conclude: counts, problems, and one verdict.

Knows numbers and names; reads no log, no ledger and no terminal. Every delivery is counted under exactly one of
OUTCOMES. The verdict is "ok" only when nothing is missing, nothing was written, nothing differs and nothing is in
doubt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any
from uuid import UUID

from consumer.core.message import Partition
from consumer.kafka.bounds import Span
from consumer.replay.effect_counts import EffectCounts
from consumer.replay.outcomes import OUTCOMES
from consumer.replay.outgoing_verdict import outgoing_doubts, outgoing_problems
from consumer.replay.rebuild_verdict import difference_doubts, difference_problems
from consumer.replay.samples import sample_place
from consumer.replay.timeline import Timeline
from consumer.replay.wording import counted, problem

ALTERED = "altered_dead_letter"
EDITED = "edited_dead_letter"
SAMPLES_MAX = 20  # of each kind
BLOCK_BITS = 12  # ledger rows are compared with the log in blocks of 4,096 offsets


class Verdict(StrEnum):
    """The answer of a replay, with exit codes 0, 1 and 2."""

    OK = "ok"
    NO = "no"
    UNKNOWN = "unknown"

    @property
    def exit_code(self) -> int:
        """The exit code of the command."""
        return {Verdict.OK: 0, Verdict.NO: 1, Verdict.UNKNOWN: 2}[self]


@dataclass(slots=True)
class Findings:
    """Everything that a replay found.

    The replay adds to it while it reads. `verdict`, `problems` and `as_dict` give the answer at its end.
    """

    app: str
    mode: str  # check | apply | rebuild | republish | outgoing
    started_at: str
    filters: dict[str, Any] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    positions: dict[Partition, int] = field(default_factory=dict)
    read: dict[Partition, int] = field(default_factory=dict)  # records
    counts: dict[tuple[str, Partition], dict[str, int]] = field(default_factory=dict)
    times: Timeline = field(default_factory=Timeline)
    effects: EffectCounts | None = None
    ahead: int = 0  # of what is missing: at or beyond the position, where workers have not come yet
    unsettled: int = 0  # conflicts and unreadable messages without a dead letter
    unsettled_ahead: int = 0  # of those: at or beyond the position
    inexact: bool = False  # too many missing ids to tell repetitions among them apart
    history: dict[str, dict[str, int]] | None = None
    edits_changed: int = 0  # dead letters that were applied under a new id, whose ledger row is gone or another one
    altered: int = 0  # dead letters whose stored record is not that of their message
    rows_gone: int = 0  # ledger rows that were there when their messages were read, and are not any more
    gone: int = 0  # ledger rows whose records a compacted log does not hold any more
    precheck: dict[str, int] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    doubts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recoded: dict[str, str] = field(default_factory=dict)  # handlers whose ids may be of other code, and why
    rebuilt: dict[str, Any] | None = None
    republished: dict[str, Any] | None = None
    outgoing: dict[str, Any] | None = None
    seconds: float = 0.0

    # -- counting ---------------------------------------------------------------------------------------------------

    def count(self, handler: str, partition: Partition, outcome: str, n: int = 1) -> None:
        """Count deliveries of a handler under one of OUTCOMES."""
        row = self.counts.get((handler, partition))
        if row is None:
            row = self.counts[handler, partition] = dict.fromkeys(OUTCOMES, 0)
        row[outcome] += n

    def sample(self, kind: str, **details: Any) -> None:
        """Keep an example, if there are not enough of its kind."""
        if sum(sample["kind"] == kind for sample in self.samples) < SAMPLES_MAX:
            self.samples.append({"kind": kind, **details})

    def sample_dead_letter(self, kind: str, handler: str, row: Mapping[str, Any], id: UUID, fault: str) -> None:
        """Keep an example of a dead letter with a fault.

        row: its columns.
        """
        self.sample(
            kind,
            handler=handler,
            topic=row["topic"],
            partition=row["partition"],
            offset=row["offset"],
            id=id.hex,
            detail=f"dead letter {row['dead_letter']}: {fault}",
        )

    def drop_sample(self, kind: str, handler: str, partition: Partition, offset: int) -> None:
        """Drop the examples of a message that is no problem any more."""
        dropped = {
            "kind": kind,
            "handler": handler,
            "topic": partition.topic,
            "partition": partition.partition,
            "offset": offset,
        }
        self.samples = [sample for sample in self.samples if not dropped.items() <= sample.items()]

    def drop_samples(self, kind: str) -> None:
        """Drop all examples of a kind, before it is counted again."""
        self.samples = [sample for sample in self.samples if sample["kind"] != kind]

    def count_gone(self, handler: str, partition: Partition, offset: int, id: bytes) -> None:
        """Count a ledger row that was deleted after its message was read."""
        self.rows_gone += 1
        self.sample("rows_gone", **sample_place(handler, partition, offset, id), detail="its ledger row was deleted")

    def total(self, outcome: str) -> int:
        """Return the deliveries of all handlers under one of OUTCOMES."""
        return sum(row[outcome] for row in self.counts.values())

    def is_ahead(self, partition: Partition, offset: int) -> bool:
        """Return whether workers had not reached this offset when the replay began."""
        position = self.positions.get(partition)
        return position is None or offset >= position

    @property
    def messages(self) -> int:
        """Records read."""
        return sum(self.read.values()) or int((self.rebuilt or self.outgoing or {}).get("messages", 0))

    # -- problems and doubts ----------------------------------------------------------------------------------------

    def problems(self) -> list[dict[str, Any]]:
        """Return what makes the answer no, one line each."""
        candidates = [
            self._missing_problem(),
            *(self.effects or EffectCounts()).problems(),
            self._unsettled_problem(),
            self._rows_gone_problem(),
            self._rows_without_message_problem(),
            self._altered_problem(),
            self._edited_problem(),
            self._precheck_problem(),
            *difference_problems(self.rebuilt or {}),
            *outgoing_problems(self.outgoing or {}),
            self._dead_lettered_problem(),
            self._not_copied_problem(),
        ]
        return [candidate for candidate in candidates if candidate["count"]]

    def _missing_problem(self) -> dict[str, Any]:
        missing = self.total("missing") - sum(self._absent(handler) for handler in self.recoded)
        names = dict.fromkeys(name for name, _ in self.counts)
        by_handler = {handler: self._absent(handler) for handler in names if handler not in self.recoded}
        counts = ", ".join(f"{handler} {count:,}" for handler, count in by_handler.items() if count)
        more = " or more (some of these may be repetitions)" if self.inexact else ""
        text = f"{counted(missing, 'message')}{more} missing: not in the ledger ({counts})"
        return problem("missing", missing, text + _beyond_position(self.ahead))

    def _unsettled_problem(self) -> dict[str, Any]:
        messages = counted(self.unsettled, "message")
        text = f"{messages} without a dead letter, whose id another payload has or that cannot be read"
        return problem("unsettled", self.unsettled, text + _beyond_position(self.unsettled_ahead))

    def _rows_gone_problem(self) -> dict[str, Any]:
        rows = counted(self.rows_gone, "ledger row")
        text = f"{rows} deleted since their messages were read: they would be applied again"
        return problem("rows_gone", self.rows_gone, text)

    def _rows_without_message_problem(self) -> dict[str, Any]:
        orphans = sum(row["without_message"] for name, row in (self.history or {}).items() if name not in self.recoded)
        text = (
            f"{counted(orphans, 'ledger row')} whose message the log does not hold: something was applied under an id that is "
            "not there, or twice under two ids"
        )
        return problem("rows_without_message", orphans, text)

    def _altered_problem(self) -> dict[str, Any]:
        text = (
            f"{counted(self.altered, 'dead letter')} hold another record than their message had: "
            f"{self._examples(ALTERED, self.altered)}; `consumer dlq retry APP LETTER --value FILE --same-id` gives the right value"
        )
        return problem("altered_dead_letters", self.altered, text)

    def _edited_problem(self) -> dict[str, Any]:
        text = (
            f"{counted(self.edits_changed, 'dead letter')} applied under a new id, whose ledger row is gone or another one: "
            f"{self._examples(EDITED, self.edits_changed)}"
        )
        return problem("edited_dead_letters", self.edits_changed, text)

    def _precheck_problem(self) -> dict[str, Any]:
        wrong = (self.precheck or {}).get("wrong", 0)
        text = (
            f"Redis has a mark for {counted(wrong, 'message')} that the ledger does not hold: `consumer migrate --new-epoch` "
            "ends its marks"
        )
        return problem("precheck_wrong", wrong, text)

    def _dead_lettered_problem(self) -> dict[str, Any]:
        dead = self.total("dead_lettered_now")
        text = f"{counted(dead, 'message')} could not be applied: dead letters now, see `consumer dlq list APP`"
        return problem("dead_lettered_now", dead, text)

    def _not_copied_problem(self) -> dict[str, Any]:
        refused = (self.republished or {}).get("refused", 0)
        text = f"{counted(refused, 'record')} could not be copied: header keys that are not UTF-8, or neither key nor value"
        return problem("not_copied", refused, text)

    def _examples(self, kind: str, count: int) -> str:
        """Return three examples of a kind, and how many more there are."""
        samples = [sample for sample in self.samples if sample["kind"] == kind][:3]
        places = [
            f"{sample['handler']} {sample['topic']}:{sample['partition']} offset {sample['offset']} ({sample['detail']})"
            for sample in samples
        ]
        more = f" and {count - len(places):,} more" if count > len(places) else ""
        return f"{', '.join(places)}{more}"

    def _absent(self, handler: str) -> int:
        """Return the messages of a handler that the ledger lacks."""
        return sum(row["missing"] for (name, _), row in self.counts.items() if name == handler)

    def unknowns(self) -> list[dict[str, Any]]:
        """Return why the replay cannot tell, one line each."""
        doubts = list(self.doubts)
        if unknown := self.total("unknown"):
            text = (
                f"{counted(unknown, 'delivery', 'deliveries')} from before the ledger began in their partition, or from before "
                "what it remembers, or from before message_id= of their handler changed: whether they were applied is unknown. "
                "A later --from leaves them out, `consumer rebuild` compares the state itself, --assume-unapplied takes them "
                "for missing"
            )
            doubts.append(problem("before_ledger", unknown, text))
        for name, text in self.recoded.items():
            count = self._absent(name) + (self.history or {}).get(name, {}).get("without_message", 0)
            if count:
                doubts.append(problem("id_code_changed", count, text))
        return doubts + difference_doubts(self.rebuilt or {}) + outgoing_doubts(self.outgoing or {})

    # -- the answer -------------------------------------------------------------------------------------------------

    def verdict(self) -> Verdict:
        """Return the verdict.

        A problem makes it "no"; a doubt without a problem makes it "unknown".
        """
        if self.problems():
            return Verdict.NO
        return Verdict.UNKNOWN if self.unknowns() else Verdict.OK

    @property
    def ok(self) -> bool:
        """Whether the verdict is ok: no problem, and no doubt."""
        return self.verdict() is Verdict.OK

    def check(self) -> None:
        """Raise an AssertionError that lists the problems and the doubts, unless `ok`."""
        if not self.ok:
            lines = [f"{row['kind']}: {row['text']}" for row in [*self.problems(), *self.unknowns()]]
            raise AssertionError("\n".join(lines))

    def answer(self) -> str:
        """Return the verdict in one sentence."""
        match self.verdict(), self.mode:
            case Verdict.NO, _:
                return "No: " + "; ".join(row["text"] for row in self.problems()[:3])
            case Verdict.UNKNOWN, _:
                return "Could not tell: " + "; ".join(row["text"] for row in self.unknowns()[:3])
            case _, "apply":
                now = self.total("applied_now")
                return f"{counted(now, 'message')} applied now; nothing is missing" if now else "Nothing was missing"
            case _, "rebuild":
                return "The state is what the topic says: no row is missing, extra or different"
            case _, "outgoing":
                expected = sum(row["expected"] for row in (self.outgoing or {}).get("topics", ()))
                return (
                    f"The output topics have the {counted(expected, 'record')} that the handlers publish, and no others"
                )
            case _, "republish":
                copied = (self.republished or {}).get("copied", 0)
                return f"{counted(copied, 'record')} copied with the message ids that they had"
            case _:
                return "Nothing is missing, and nothing would happen twice"

    # -- as data ----------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, for JSON and for the HTML page."""
        verdict = self.verdict()
        return {
            "app": self.app,
            "mode": self.mode,
            "verdict": verdict.value,
            "exit_code": verdict.exit_code,
            "answer": self.answer(),
            "problems": self.problems(),
            "unknown": self.unknowns(),
            "notes": self.notes,
            "started_at": self.started_at,
            "seconds": round(self.seconds, 3),
            "messages": self.messages,
            "messages_per_second": round(self.messages / self.seconds) if self.seconds > 0 else 0,
            "filters": self.filters,
            "ranges": [
                {
                    "topic": span.partition.topic,
                    "partition": span.partition.partition,
                    "from": span.first,
                    "until": span.end,
                    "position": self.positions.get(span.partition),
                    "read": None if self.mode in ("rebuild", "outgoing") else self.read.get(span.partition, 0),
                }
                for span in self.spans
            ],
            "handlers": self._by_handler(),
            "partitions": [
                {"handler": handler, "topic": partition.topic, "partition": partition.partition, **_with_sum(row)}
                for (handler, partition), row in sorted(self.counts.items())
            ],
            "times": self.times.as_dict() if self.counts else None,
            "effects": None if self.effects is None else self.effects.as_dict(),
            "history": self.history,
            "precheck": self.precheck,
            "samples": self.samples,
            "rebuild": self.rebuilt,
            "republish": self.republished,
            "outgoing": self.outgoing,
        }

    def as_state(self) -> dict[str, Any]:
        """Return what an interrupted replay keeps, as JSON can hold it."""
        return {
            "app": self.app,
            "mode": self.mode,
            "started_at": self.started_at,
            "filters": self.filters,
            "spans": [[*span.partition, span.first, span.end] for span in self.spans],
            "read": [[*partition, records] for partition, records in self.read.items()],
            "counts": [[handler, *partition, row] for (handler, partition), row in self.counts.items()],
            "times": self.times.as_dict(),
            "effects": None if self.effects is None else asdict(self.effects),
            "ahead": self.ahead,
            "unsettled": self.unsettled,
            "inexact": self.inexact,
            "precheck": self.precheck,
            "samples": self.samples,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Findings:
        """Return what `as_state` wrote, to go on from there."""
        findings = cls(state["app"], state["mode"], state["started_at"], dict(state["filters"]))
        findings.spans = [Span(Partition(topic, number), first, end) for topic, number, first, end in state["spans"]]
        findings.read = {Partition(topic, number): records for topic, number, records in state["read"]}
        findings.counts = {(name, Partition(topic, number)): dict(row) for name, topic, number, row in state["counts"]}
        findings.times = Timeline.from_dict(state["times"])
        findings.effects = None if state["effects"] is None else EffectCounts(**state["effects"])
        findings.ahead, findings.unsettled, findings.inexact = state["ahead"], state["unsettled"], state["inexact"]
        findings.precheck = state["precheck"]
        findings.samples = list(state["samples"])
        return findings

    def _by_handler(self) -> dict[str, dict[str, int]]:
        totals: dict[str, dict[str, int]] = {}
        for (handler, _), row in self.counts.items():
            total = totals.setdefault(handler, dict.fromkeys(OUTCOMES, 0))
            for outcome, n in row.items():
                total[outcome] += n
        return {handler: _with_sum(row) for handler, row in totals.items()}


def _with_sum(row: Mapping[str, int]) -> dict[str, int]:
    return {"delivered": sum(row.values()), **row}


def _beyond_position(count: int) -> str:
    if not count:
        return ""
    return (
        f"; {count:,} of them beyond the position, where workers have not come yet (--until position leaves those out)"
    )


def blocks(offsets: Sequence[int]) -> dict[int, int]:
    """Return how many of the offsets each block has."""
    return dict(Counter([offset >> BLOCK_BITS for offset in offsets]))
