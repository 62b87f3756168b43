"""What a replay has found, and what that means: counts, problems, and one verdict.

Knows numbers and names; knows no Kafka, no ledger and no terminal. Every delivery is counted under exactly one of
OUTCOMES. The verdict is "ok" only when nothing is missing, nothing was written, nothing differs and nothing is in doubt.
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
from consumer.replay.outcomes import OUTCOMES
from consumer.replay.timeline import Timeline

ALTERED = "altered_letter"
EDITED = "edited_letter"
UNSTABLE = ("depends_on_order", "beginning_unknown")  # kinds of doubt about rows that were taken out of the differences
SAMPLES_MAX = 20  # of each kind
BLOCK_BITS = 12  # ledger rows are compared with the log in blocks of 4,096 offsets


class Verdict(StrEnum):
    """The answer. Exit codes 0, 1 and 2."""

    OK = "ok"
    NO = "no"
    UNKNOWN = "unknown"

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        return {Verdict.OK: 0, Verdict.NO: 1, Verdict.UNKNOWN: 2}[self]


@dataclass(slots=True)
class Effects:
    """What the transactions wrote in which nothing was to be done: by the database's own count.

    rows: table -> rows inserted, updated, deleted. non_row_writes: transactions that PostgreSQL gave an id although no row was
    counted (TRUNCATE, a row lock). claims: ids that were claimed although the ledger held them.
    """

    transactions: int = 0
    rows: dict[str, list[int]] = field(default_factory=dict)
    non_row_writes: int = 0
    claims: int = 0
    sequences: list[str] = field(default_factory=list)
    uncounted: str = ""  # why sequences could not be looked at

    @property
    def total(self) -> int:
        """Rows written."""
        return sum(map(sum, self.rows.values()))

    @property
    def any(self) -> bool:
        """Whether anything at all was written."""
        return bool(self.total or self.non_row_writes or self.claims or self.sequences)

    def add(self, table: str, inserted: int, updated: int, deleted: int) -> None:
        """Add rows of a table."""
        row = self.rows.setdefault(table, [0, 0, 0])
        for n, each in enumerate((inserted, updated, deleted)):
            row[n] += each


@dataclass(slots=True)
class Findings:
    """Everything that a replay found. Add to it while reading; ask `verdict`, `problems` and `as_dict` at the end."""

    app: str
    mode: str  # check | apply | rebuild | republish
    started_at: str
    filters: dict[str, Any] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    positions: dict[Partition, int] = field(default_factory=dict)
    read: dict[Partition, int] = field(default_factory=dict)  # records
    counts: dict[tuple[str, Partition], dict[str, int]] = field(default_factory=dict)
    times: Timeline = field(default_factory=Timeline)
    effects: Effects | None = None
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
    seconds: float = 0.0

    # -- counting ---------------------------------------------------------------------------------------------------

    def count(self, handler: str, partition: Partition, outcome: str, n: int = 1) -> None:
        """Count deliveries of a handler under one of OUTCOMES."""
        row = self.counts.get((handler, partition))
        if row is None:
            row = self.counts[handler, partition] = dict.fromkeys(OUTCOMES, 0)
        row[outcome] += n

    def sample(self, kind: str, **what: Any) -> None:
        """Keep an example, if there are not enough of its kind."""
        if sum(each["kind"] == kind for each in self.samples) < SAMPLES_MAX:
            self.samples.append({"kind": kind, **what})

    def drop_sample(self, kind: str, handler: str, partition: Partition, offset: int) -> None:
        """Drop the examples of a message that is no problem any more."""
        what = {
            "kind": kind,
            "handler": handler,
            "topic": partition.topic,
            "partition": partition.partition,
            "offset": offset,
        }
        self.samples = [each for each in self.samples if not what.items() <= each.items()]

    def count_gone(self, handler: str, partition: Partition, offset: int, id: bytes) -> None:
        """Count a ledger row that was deleted after its message was read."""
        self.rows_gone += 1
        where = {"topic": partition.topic, "partition": partition.partition, "offset": offset}
        self.sample("rows_gone", handler=handler, **where, id=str(UUID(bytes=id)), detail="its ledger row was deleted")

    def total(self, outcome: str) -> int:
        """Deliveries under one of OUTCOMES, of all handlers."""
        return sum(row[outcome] for row in self.counts.values())

    def is_ahead(self, partition: Partition, offset: int) -> bool:
        """Whether workers have not come to this offset yet, as of the beginning of the replay."""
        position = self.positions.get(partition)
        return position is None or offset >= position

    @property
    def messages(self) -> int:
        """Records read."""
        return sum(self.read.values()) or int((self.rebuilt or {}).get("messages", 0))

    # -- what it means ----------------------------------------------------------------------------------------------

    def problems(self) -> list[dict[str, Any]]:
        """What makes the answer no, one line each."""
        found: list[dict[str, Any]] = []

        def add(kind: str, count: int, text: str) -> None:
            if count:
                found.append({"kind": kind, "count": count, "text": text})

        missing = self.total("missing") - sum(self._absent(each) for each in self.recoded)
        add("missing", missing, self._missing(missing))
        effects = self.effects or Effects()
        tables = ", ".join(f"{table} {sum(row)}" for table, row in sorted(effects.rows.items()) if any(row))
        add(
            "effects",
            effects.total,
            f"{_rows(effects.total)} written for messages that were applied before ({tables}): a handler writes in spite of the claim",
        )
        add(
            "effects_otherwise",
            effects.non_row_writes,
            f"{_n(effects.non_row_writes, 'transaction')} wrote something that is no row (TRUNCATE, a row lock) for messages that were applied before",
        )
        add(
            "claims",
            effects.claims,
            f"{_n(effects.claims, 'id')} could be claimed although the ledger held them: the claim does not hold",
        )
        add(
            "sequences",
            len(effects.sequences),
            f"{_n(len(effects.sequences), 'sequence')} moved for messages that were applied before: {', '.join(effects.sequences[:10])}",
        )
        add(
            "unsettled",
            self.unsettled,
            f"{_n(self.unsettled, 'message')} without a dead letter, whose id another payload has or that cannot be read"
            + self._of_them_ahead(self.unsettled_ahead),
        )
        add(
            "rows_gone",
            self.rows_gone,
            f"{_n(self.rows_gone, 'ledger row')} deleted since their messages were read: they would be applied again",
        )
        orphans = sum(
            each["without_message"] for name, each in (self.history or {}).items() if name not in self.recoded
        )
        add(
            "rows_without_message",
            orphans,
            f"{_n(orphans, 'ledger row')} whose message the log does not hold: something was applied under an id that is not "
            "there, or twice under two ids",
        )
        add("altered_letters", self.altered, f"{_n(self.altered, 'dead letter')} {self._altered()}")
        add(
            "edited_letters",
            self.edits_changed,
            f"{_n(self.edits_changed, 'dead letter')} applied under a new id, whose ledger row is gone or another one: "
            f"{self._shown(EDITED, self.edits_changed)}",
        )
        wrong = (self.precheck or {}).get("wrong", 0)
        add(
            "precheck_wrong",
            wrong,
            f"Redis has a mark for {_n(wrong, 'message')} that the ledger does not hold: `consumer migrate --new-epoch` ends its marks",
        )
        for table, kind, count in self._differences() if self._conclusive() else ():
            add("differences", count, f"{table}: {_n(count, 'row')} {_DIFFERENCE[kind]}")
        dead = self.total("dead_lettered_now")
        add(
            "dead_lettered_now",
            dead,
            f"{_n(dead, 'message')} could not be applied: dead letters now, see `consumer dlq list APP`",
        )
        refused = (self.republished or {}).get("refused", 0)
        add(
            "not_copied",
            refused,
            f"{_n(refused, 'record')} could not be copied: header keys that are not UTF-8, or neither key nor value",
        )
        return found

    def _differences(self) -> list[tuple[str, str, int]]:
        return [
            (table["table"], kind, table[kind])
            for table in (self.rebuilt or {}).get("tables", ())
            for kind in ("missing", "extra", "different")
            if table[kind]
        ]

    def _conclusive(self) -> bool:
        """Whether a difference proves a fault: not where anything that is not known may explain it."""
        rebuilt = self.rebuilt or {}
        # Rows that depend on order, time or the beginning were taken out of the differences before.
        doubts = [each for each in rebuilt.get("unknown", ()) if each["kind"] not in UNSTABLE]
        return not doubts and not any(rebuilt.get(each) for each in ("failed", "compacted", "excuses"))

    def _altered(self) -> str:
        """Where the dead letters lie that hold another record than their message's."""
        return (
            f"hold another record than their message had: {self._shown(ALTERED, self.altered)}; `consumer dlq retry APP LETTER "
            "--value FILE --same-id` gives the right value"
        )

    def _shown(self, kind: str, count: int) -> str:
        """Where the first three examples of a kind lie, and how many more there are."""
        found = [each for each in self.samples if each["kind"] == kind]
        told = [
            f"{each['handler']} {each['topic']}:{each['partition']} offset {each['offset']} ({each['detail']})"
            for each in found[:3]
        ]
        more = f" and {count - len(told):,} more" if count > len(told) else ""
        return f"{', '.join(told)}{more}"

    def _absent(self, handler: str) -> int:
        """Messages of a handler that the ledger lacks."""
        return sum(row["missing"] for (name, _), row in self.counts.items() if name == handler)

    def _missing(self, missing: int) -> str:
        names = dict.fromkeys(name for name, _ in self.counts)
        by_handler = {handler: self._absent(handler) for handler in names if handler not in self.recoded}
        told = ", ".join(f"{handler} {count:,}" for handler, count in by_handler.items() if count)
        more = " or more (some of these may be repetitions)" if self.inexact else ""
        text = f"{_n(missing, 'message')}{more} missing: not in the ledger ({told})"
        return text + self._of_them_ahead(self.ahead)

    def _of_them_ahead(self, count: int) -> str:
        if not count:
            return ""
        return f"; {count:,} of them beyond the position, where workers have not come yet (--until position leaves those out)"

    def unknowns(self) -> list[dict[str, Any]]:
        """Why it could not tell, one line each."""
        found = list(self.doubts)
        unknown = self.total("unknown")
        if unknown:
            found.append(
                {
                    "kind": "before_ledger",
                    "count": unknown,
                    "text": f"{_n(unknown, 'delivery', 'deliveries')} from before the ledger began in their partition, or from before "
                    "what it remembers, or from before message_id= of their handler changed: whether they were applied cannot be told. A later --from leaves them out, `consumer rebuild` compares the state itself, "
                    "--assume-unapplied takes them for missing",
                }
            )
        for name, text in self.recoded.items():
            count = self._absent(name) + (self.history or {}).get(name, {}).get("without_message", 0)
            if count:
                found.append({"kind": "id_code_changed", "count": count, "text": text})
        found += (self.rebuilt or {}).get("unknown", ())
        differences = self._differences()
        if differences and not self._conclusive():
            rows = sum(count for *_, count in differences)
            found.append({"kind": "differences", "count": rows, "text": f"{_n(rows, 'row')} differ, and {self._why()}"})
        return found

    def _why(self) -> str:
        """What may explain the differences of a rebuild."""
        rebuilt = self.rebuilt or {}
        if rebuilt.get("compacted"):
            return (
                f"the log of {', '.join(rebuilt['compacted'])} is compacted, so records are missing from it by design"
            )
        if rebuilt.get("failed"):
            return "messages failed in the rebuild"
        if rebuilt.get("excuses"):
            return f"this may explain it: {'; '.join(rebuilt['excuses'][:3])}"
        return "what could not be told may explain it"

    def verdict(self) -> Verdict:
        """The answer: no as soon as there is a problem, unknown as soon as there is a doubt, else ok."""
        if self.problems():
            return Verdict.NO
        return Verdict.UNKNOWN if self.unknowns() else Verdict.OK

    @property
    def ok(self) -> bool:
        """Whether the verdict is ok: nothing missing, nothing written, nothing different, nothing in doubt."""
        return self.verdict() is Verdict.OK

    def check(self) -> None:
        """Raise an AssertionError that lists the problems and the doubts, unless `ok`."""
        if not self.ok:
            lines = [f"{each['kind']}: {each['text']}" for each in [*self.problems(), *self.unknowns()]]
            raise AssertionError("\n".join(lines))

    def answer(self) -> str:
        """The verdict in one sentence."""
        match self.verdict(), self.mode:
            case Verdict.NO, _:
                return "No: " + "; ".join(each["text"] for each in self.problems()[:3])
            case Verdict.UNKNOWN, _:
                return "Could not tell: " + "; ".join(each["text"] for each in self.unknowns()[:3])
            case _, "apply":
                now = self.total("applied_now")
                return f"{_n(now, 'message')} applied now; nothing is missing" if now else "Nothing was missing"
            case _, "rebuild":
                return "The state is what the topic says: no row is missing, extra or different"
            case _, "republish":
                copied = (self.republished or {}).get("copied", 0)
                return f"{_n(copied, 'record')} copied with the message ids that they had"
            case _:
                return "Nothing is missing, and nothing would happen twice"

    # -- telling it -------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON and for the page."""
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
                    "topic": each.partition.topic,
                    "partition": each.partition.partition,
                    "from": each.first,
                    "to": each.end,
                    "position": self.positions.get(each.partition),
                    "read": None if self.mode == "rebuild" else self.read.get(each.partition, 0),
                }
                for each in self.spans
            ],
            "handlers": self._by_handler(),
            "partitions": [
                {"handler": handler, "topic": partition.topic, "partition": partition.partition, **_with_sum(row)}
                for (handler, partition), row in sorted(self.counts.items())
            ],
            "times": self.times.as_dict() if self.counts else None,
            "effects": self._effects(),
            "history": self.history,
            "precheck": self.precheck,
            "samples": self.samples,
            "rebuild": self.rebuilt,
            "republish": self.republished,
        }

    def as_state(self) -> dict[str, Any]:
        """What must be kept of a replay that is interrupted, as JSON can hold it."""
        return {
            "app": self.app,
            "mode": self.mode,
            "started_at": self.started_at,
            "filters": self.filters,
            "spans": [[*each.partition, each.first, each.end] for each in self.spans],
            "read": [[*each, n] for each, n in self.read.items()],
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
        """What `as_state` told, to go on from there."""
        found = cls(state["app"], state["mode"], state["started_at"], dict(state["filters"]))
        found.spans = [Span(Partition(topic, number), first, end) for topic, number, first, end in state["spans"]]
        found.read = {Partition(topic, number): n for topic, number, n in state["read"]}
        found.counts = {(name, Partition(topic, number)): dict(row) for name, topic, number, row in state["counts"]}
        found.times = Timeline.from_dict(state["times"])
        found.effects = None if state["effects"] is None else Effects(**state["effects"])
        found.ahead, found.unsettled, found.inexact = state["ahead"], state["unsettled"], state["inexact"]
        found.precheck = state["precheck"]
        found.samples = list(state["samples"])
        return found

    def _by_handler(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for (handler, _), row in self.counts.items():
            total = found.setdefault(handler, dict.fromkeys(OUTCOMES, 0))
            for outcome, n in row.items():
                total[outcome] += n
        return {handler: _with_sum(row) for handler, row in found.items()}

    def _effects(self) -> dict[str, Any] | None:
        if self.effects is None:
            return None
        found = self.effects
        how = (
            f"every message was claimed as a worker does, in {_n(found.transactions, 'transaction')} rolled back afterwards; before each "
            "rollback PostgreSQL was asked how many rows of which tables this transaction had inserted, updated or deleted "
            "(pg_stat_xact_all_tables, every table outside the schema consumer), and whether it had given the transaction an id, "
            "without which nothing can be written; "
        )
        how += found.uncounted or "the sequences that these sessions advanced were asked for with currval"
        return {
            "transactions": found.transactions,
            "rows": found.total,
            "tables": {
                table: dict(zip(("inserted", "updated", "deleted"), row, strict=True))
                for table, row in sorted(found.rows.items())
            },
            "otherwise": found.non_row_writes,
            "claims": found.claims,
            "sequences": found.sequences,
            "how": how,
        }


_DIFFERENCE = {
    "missing": "missing (the topic says that they should be there)",
    "extra": "too many (no message of the topic made them, or one was applied twice)",
    "different": "different from what the topic says",
}


def _with_sum(row: Mapping[str, int]) -> dict[str, int]:
    return {"delivered": sum(row.values()), **row}


def _n(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _rows(count: int) -> str:
    return f"{_n(count, 'row')} {'was' if count == 1 else 'were'}"


def blocks(offsets: Sequence[int]) -> dict[int, int]:
    """How many of the offsets lie in each block."""
    return dict(Counter([each >> BLOCK_BITS for each in offsets]))
