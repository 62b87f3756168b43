"""The judge: what must be true of log, PostgreSQL and Redis afterwards.

It knows no server and no clock. The log decides what should be there: each id that is committed in it ends exactly once
for each handler. The expected state comes from the log alone, never from what the consumer reports.
docs/explanation/chaos.md describes I1 to I16.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import NAMESPACE_OID, UUID, uuid5

INVARIANTS = {
    "I1": "no loss: every id in the log is applied or a dead letter, for each handler; what the producer knows is in the log",
    "I2": "no double: one effect for each handler and id; sum of effects = balance = sum over the log",
    "I3": "no ghost: what is applied was produced, and its transaction was committed",
    "I4": "atomic: claim and effect were written by one transaction; neither is there alone",
    "I5": "offsets are safe at all times: below Kafka's commit and below the position everything is settled and durable",
    "I6": "replay changes nothing: read again from zero, and copied to another topic",
    "I7": "identity: fingerprints are those of the log; each payload that came under a used id is kept as a conflict",
    "I8": "order of each key is the log's",
    "I9": "Redis does not matter: the state is the log's; a mark of this epoch has its row",
    "I10": "scopes are apart: each handler alone satisfies I1 and I2",
    "I11": "liveness: no lag after the faults, and SIGTERM ends everything within its grace, with exit code 0",
    "I12": "conservation: applied + duplicates + dead letters + skipped = records in the log + those delivered again",
    "I13": "outbox: what the effects published is in the output topic, nothing else is; each key in order; the next application has it once",
    "I14": "purge: no id is forgotten that the log or a dead letter can still deliver",
    "I15": "outages make no dead letters",
    "I16": "no payload and no password in a log",
    "I17": "the batch rule: tables written by forms of statements that depend on the order are as one message at a time leaves them",
}
HANDLERS = ("audit", "book", "forms")
_EXAMPLES_MAX = 5


class LogEntry(NamedTuple):
    """A committed record.

    amount: None if no handler can apply it. may_fail: it fails until the handlers are repaired.
    """

    topic: str
    partition: int
    offset: int
    id: str
    fingerprint: int
    key: str
    amount: int | None
    may_fail: bool = False


class Row(NamedTuple):
    """A row of the ledger.

    xmin: 32 bits of the transaction that inserted it.
    """

    handler: str
    id: str
    fingerprint: int
    applied: bool
    xmin: int
    topic: str
    partition: int
    offset: int


class Letter(NamedTuple):
    handler: str
    id: str
    fingerprint: int
    topic: str
    partition: int
    offset: int
    reason: str
    state: str = "dead"


class Edit(NamedTuple):
    """A payload that an operator gave a dead letter under another id.

    It may be applied, once, instead of the dead letter.
    """

    handler: str
    id: str
    key: str
    amount: int
    topic: str
    partition: int
    offset: int
    required: bool = False  # an operator applied it


class Effect(NamedTuple):
    handler: str
    id: str
    key: str
    amount: int
    topic: str
    partition: int
    offset: int
    xid: int


@dataclass
class Forms:
    """The tables of the handler `forms`.

    tickets, lines: number and id; stock, latest: by key; accounts: by uuid.
    """

    tickets: list[tuple[int, str]]
    lines: list[tuple[int, str]]
    stock: list[tuple[str, int]]
    latest: list[tuple[str, str]]
    accounts: dict[UUID, int]


@dataclass
class Evidence:
    """All the evidence of a run.

    journal: by number of message, as producing.py keeps it.
    """

    log: list[LogEntry] = field(default_factory=list)
    journal: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    ledger: list[Row] = field(default_factory=list)
    letters: list[Letter] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    balances: Mapping[tuple[str, str], int] = field(default_factory=dict)
    orders: Mapping[tuple[str, str, int, str], list[int]] = field(default_factory=dict)
    forms: Forms | None = None
    outcomes: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    positions: Mapping[tuple[str, int], int] = field(default_factory=dict)
    marks: set[tuple[str, str, int]] = field(default_factory=set)
    redelivered: int = 1 << 62  # at most
    edits: list[Edit] = field(default_factory=list)
    versions: bool = False  # the application's next version has a handler more, which was filled at the end


Violations = dict[str, list[str]]


class _Found:
    def __init__(self) -> None:
        self.violations: dict[str, list[str]] = defaultdict(list)
        self._counts: Counter[str] = Counter()

    def add(self, invariant: str, text: str) -> None:
        self._counts[invariant] += 1
        if self._counts[invariant] <= _EXAMPLES_MAX:
            self.violations[invariant].append(text)

    def result(self) -> Violations:
        for invariant, count in self._counts.items():
            if count > _EXAMPLES_MAX:
                self.violations[invariant].append(f"… {count} in all")
        return dict(self.violations)


def judge(evidence: Evidence, *, everything_settled: bool = True) -> Violations:
    """Return the violations by invariant.

    everything_settled: the log was consumed to its end, so whatever is missing is lost.
    """
    violations = _Found()
    log = _Log(evidence.log)
    _journal(evidence, log, violations)
    for handler in (*HANDLERS, "late") if evidence.versions else HANDLERS:
        if everything_settled:
            _ends(handler, evidence, log, violations)
        _effects(handler, evidence, log, violations)
        if everything_settled and handler in HANDLERS:
            _conservation(handler, evidence, log, violations)
    _forms(evidence, violations)
    _letters(evidence, log, violations)
    _marks(evidence, violations)
    found_terminal = terminal(evidence.log, evidence.positions, *_settled(evidence))
    for text in found_terminal:
        violations.add("I5", text)
        violations.add("I14", text)
    return violations.result()


class _Log:
    """The log by id and by place."""

    def __init__(self, entries: Iterable[LogEntry]) -> None:
        self.entries = list(entries)
        self.by_id: dict[str, list[LogEntry]] = defaultdict(list)
        for entry in self.entries:
            self.by_id[entry.id].append(entry)
        self.at = {(entry.topic, entry.partition, entry.offset): entry for entry in self.entries}
        self.records = Counter(entry.topic for entry in self.entries)


def _journal(evidence: Evidence, log: _Log, violations: _Found) -> None:
    there = {(entry.id, entry.fingerprint) for entry in log.entries}
    ok = {
        (entry["id"], entry["hash"]) for entry in evidence.journal.values() if entry["state"] in ("ok", "info", "sent")
    }
    for entry in evidence.journal.values():
        mine = (entry["id"], entry["hash"])
        if entry["state"] == "ok" and mine not in there:
            violations.add("I1", f"{entry['id']} was acknowledged and is not in the log")
        if entry["state"] == "fail" and mine in there and mine not in ok:
            violations.add("I3", f"{entry['id']} was aborted and is in the log")
    if evidence.journal:
        for id, fingerprint in there - ok:
            violations.add("I3", f"{id} ({fingerprint}) is in the log, and was not sent")


def _ends(handler: str, evidence: Evidence, log: _Log, violations: _Found) -> None:
    """I1, I7: an id ends once; its other payloads are dead letters."""
    counts = Counter(effect.id for effect in evidence.effects if effect.handler == handler)
    letters = {
        (letter.id, letter.fingerprint): letter.reason for letter in evidence.letters if letter.handler == handler
    }
    payload_applied = {effect.id: effect for effect in evidence.effects if effect.handler == handler}
    for id, entries in log.by_id.items():
        payloads = {entry.fingerprint: entry for entry in entries}
        buried = {payload for payload in payloads if (id, payload) in letters}
        if counts[id] == 0:
            if not buried:
                _lost(
                    handler, f"{handler}: {id} ({_place(entries[0])}) has no effect and is no dead letter", violations
                )
            elif all(entry.amount is not None and not entry.may_fail for entry in entries) and "behind" not in {
                letters[id, payload] for payload in buried
            }:
                _lost(handler, f"{handler}: {id} is nothing but a conflict", violations)
            missing = set(payloads) - buried
        else:
            effect = payload_applied[id]
            record = log.at.get((effect.topic, effect.partition, effect.offset))
            missing = set(payloads) - buried - ({record.fingerprint} if record else set())
        for fingerprint in missing if len(payloads) > 1 else ():
            violations.add(
                "I7",
                f"{handler}: {id} came with another payload ({_place(payloads[fingerprint])}), which is no dead letter",
            )


def _lost(handler: str, text: str, violations: _Found) -> None:
    violations.add("I1", text)
    violations.add("I10", text)


def _effects(handler: str, evidence: Evidence, log: _Log, violations: _Found) -> None:
    """I2, I3, I4, I7, I8: of what is there."""
    mine = [effect for effect in evidence.effects if effect.handler == handler]
    for letter in evidence.letters:
        if letter.handler == handler and letter.state == "applied" and letter.id not in {effect.id for effect in mine}:
            violations.add("I1", f"{handler}: {letter.id} is a letter that was applied, and has no effect")
    rows = {claim.id: claim for claim in evidence.ledger if claim.handler == handler}
    counts = Counter(effect.id for effect in mine)
    edits = {edit.id: edit for edit in evidence.edits if edit.handler == handler}
    for required_edit in edits.values():
        if required_edit.required and not counts[required_edit.id]:
            violations.add("I1", f"{handler}: {required_edit.id}, which an operator gave a letter, has no effect")
    for id, count in counts.items():
        if count > 1:
            violations.add("I2", f"{handler}: {id} has {count} effects")
            violations.add("I10", f"{handler}: {id} has {count} effects")
    sums: Counter[str] = Counter()
    for effect in mine:
        sums[effect.key] += effect.amount
        record = log.at.get((effect.topic, effect.partition, effect.offset))
        if (edit := edits.get(effect.id)) is not None:
            if (edit.key, edit.amount) != (effect.key, effect.amount):
                violations.add("I7", f"{handler}: {effect.id} is applied with another payload than its operator gave")
        elif record is None or record.id != effect.id:
            violations.add(
                "I3", f"{handler}: {effect.id} is applied, and not in the log at {effect.partition}:{effect.offset}"
            )
        elif (record.key, record.amount) != (effect.key, effect.amount):
            violations.add("I7", f"{handler}: {effect.id} is applied with another payload than {_place(record)} has")
        row = rows.get(effect.id)
        if row is None or not row.applied:
            violations.add("I4", f"{handler}: {effect.id} has an effect and no row in the ledger that says so")
        elif row.xmin != effect.xid & 0xFFFFFFFF:
            violations.add(
                "I4", f"{handler}: {effect.id}: claim and effect are of two transactions ({row.xmin}, {effect.xid})"
            )
    for row in rows.values():
        if row.applied and not counts[row.id]:
            violations.add("I4", f"{handler}: {row.id} is applied, says the ledger, and has no effect")
        record = log.at.get((row.topic, row.partition, row.offset))
        if record is not None and (record.id, record.fingerprint) != (row.id, row.fingerprint):
            violations.add("I7", f"{handler}: the ledger has another fingerprint of {row.id} than the log")
    balances = {key: amount for (of, key), amount in evidence.balances.items() if of == handler}
    expected = _expected_sums(handler, evidence, log)
    for key in sorted({*sums, *balances, *expected}):
        if not sums[key] == balances.get(key, 0) == expected[key]:
            violations.add(
                "I2",
                f"{handler}: {key}: effects {sums[key]}, balance {balances.get(key, 0)}, by the log {expected[key]}",
            )
    lists: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for effect in mine:
        lists[effect.topic, effect.partition, effect.key].append(effect.offset)
    for (of, *place), offsets in evidence.orders.items():
        if of == handler and handler in HANDLERS:
            placed = [offset for offset in offsets if offset >= 0]  # an edit with a new id has no place in the log
            if any(a >= b for a, b in zip(placed, placed[1:], strict=False)):
                violations.add("I8", f"{handler}: {place} was applied in the order {_bend(placed)}")
            if sorted(offsets) != sorted(lists[tuple(place)]):  # type: ignore[index]
                violations.add("I2", f"{handler}: {place}: the list of its order has {len(offsets)} entries, not {len(lists[tuple(place)])}")  # type: ignore[index]  # fmt: skip


def _forms(evidence: Evidence, violations: _Found) -> None:
    """I17: what order-dependent statements left, measured by the effects of their handler."""
    if (forms := evidence.forms) is None:
        return
    mine = [effect for effect in evidence.effects if effect.handler == "forms" and UUID(effect.id).int % 3 == 0]
    ids = Counter(effect.id for effect in mine)
    if Counter(id for _, id in forms.tickets) != ids:
        violations.add("I17", f"{len(forms.tickets)} tickets for {len(mine)} effects")
    if Counter(forms.lines) != Counter(forms.tickets):
        wrong = len(set(forms.lines) - set(forms.tickets))
        violations.add("I17", f"{wrong} of {len(forms.lines)} lines belong to the ticket of another message")
    sums: dict[str, int] = defaultdict(int)  # by place; a Counter would take zero for nothing
    balances: dict[UUID, int] = defaultdict(int)
    for effect in mine:
        sums[f"{effect.topic}:{effect.partition}:{effect.key}"] += effect.amount
        balances[account_of(effect.key)] += effect.amount
    if sorted(forms.stock) != sorted(sums.items()):
        differ = sorted({key for key, _ in set(forms.stock) ^ set(sums.items())})[:3]
        violations.add("I17", f"stock is not what was added to it, for {differ}")
    rows = Counter(key for key, _ in forms.latest)
    if rows != Counter(dict.fromkeys(sums, 1)):
        violations.add(
            "I17", f"not one latest row for each key: {(rows - Counter(dict.fromkeys(sums, 1))).most_common(3)}"
        )
    if not {id for _, id in forms.latest} <= set(ids):
        violations.add("I17", "a latest row is of no effect")
    if forms.accounts != dict(balances):
        violations.add(
            "I17", f"accounts come to {sum(forms.accounts.values())}, and should to {sum(balances.values())}"
        )


def _expected_sums(handler: str, evidence: Evidence, log: _Log) -> Counter[str]:
    """The sum of the applied ids by key.

    An id counts once, with the payload that the log has where it was applied.
    """
    sums: Counter[str] = Counter()
    seen: set[str] = set()
    edits = {edit.id: edit for edit in evidence.edits if edit.handler == handler}
    for effect in evidence.effects:
        if effect.handler == handler and effect.id in edits and effect.id not in seen:
            seen.add(effect.id)
            sums[edits[effect.id].key] += edits[effect.id].amount
            continue
        record = log.at.get((effect.topic, effect.partition, effect.offset))
        if effect.handler == handler and effect.id not in seen and record is not None:
            seen.add(effect.id)
            sums[record.key] += record.amount or 0
    return sums


def _conservation(handler: str, evidence: Evidence, log: _Log, violations: _Found) -> None:
    """I12, for each topic: the numbers of outcomes add up.

    Waiting messages hold back the position; what was applied beyond it may come again, as a duplicate.
    """
    for topic, records in log.records.items():
        applied = sum(
            1 for claim in evidence.ledger if claim.handler == handler and claim.topic == topic and claim.applied
        )
        others = {what: n for (of, where, what), n in evidence.outcomes.items() if (of, where) == (handler, topic)}
        others.pop("kept", None)  # counts the ledger's rows, which are counted here
        if not 0 <= applied + sum(others.values()) - records <= evidence.redelivered:
            violations.add("I12", f"{handler}: {records} records in {topic}, and {applied} applied, {others}")


def _letters(evidence: Evidence, log: _Log, violations: _Found) -> None:
    """I15: dead letters have a reason.

    Only what cannot be applied, what comes under a used id, and what waits behind such.
    """
    at_fault: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    # What `late` has missed is applied later: then earlier messages of a key wait behind later ones.
    letters = sorted(
        evidence.letters, key=lambda letter: (letter.handler == "late" and letter.reason == "behind", letter.offset)
    )
    for letter in letters:
        record = log.at.get((letter.topic, letter.partition, letter.offset))
        if record is None or record.id != letter.id or record.fingerprint != letter.fingerprint:
            violations.add(
                "I7",
                f"{letter.handler}: the letter {letter.id} is not what the log has at {letter.partition}:{letter.offset}",
            )
            continue
        unit = (letter.handler, letter.topic, letter.partition, record.key)
        payloads = {entry.fingerprint for entry in log.by_id[letter.id]}
        if letter.reason == "behind":
            if not at_fault[unit]:
                violations.add("I15", f"{letter.handler}: {letter.id} waits behind nothing")
        elif record.amount is None or record.may_fail or len(payloads) > 1:
            at_fault[unit].append(letter.offset)
        else:
            violations.add(
                "I15",
                f"{letter.handler}: {letter.id} ({_place(record)}) is a dead letter ({letter.reason}) for no fault of its own",
            )


def _marks(evidence: Evidence, violations: _Found) -> None:
    rows = {(claim.handler, claim.id, claim.fingerprint) for claim in evidence.ledger}
    for handler, id, fingerprint in evidence.marks - rows:
        violations.add("I9", f"{handler}: Redis has a mark of {id} ({fingerprint}), and the ledger has no such row")


def _settled(evidence: Evidence) -> tuple[set[tuple[str, str]], set[tuple[str, str, int]]]:
    claims = {(claim.handler, claim.id) for claim in evidence.ledger}
    return claims, {(letter.handler, letter.id, letter.fingerprint) for letter in evidence.letters}


def terminal(
    log: Iterable[LogEntry],
    offsets: Mapping[tuple[str, int], int],
    claims: set[tuple[str, str]],
    letters: set[tuple[str, str, int]],
) -> list[str]:
    """I5: the (handler, id) below an offset that have no end."""
    ends = []
    for record in log:
        if record.offset < offsets.get((record.topic, record.partition), 0):
            for handler in HANDLERS:
                if (handler, record.id) not in claims and (handler, record.id, record.fingerprint) not in letters:
                    ends.append(
                        f"{handler}: {record.id} ({_place(record)}) is not settled, below {offsets[record.topic, record.partition]}"
                    )
    return ends


def _place(entry: LogEntry) -> str:
    return f"{entry.partition}:{entry.offset}"


def account_of(key: str) -> UUID:
    """The account, as the application derives it.

    Written again here: the code under test must not answer for itself.
    """
    return uuid5(NAMESPACE_OID, key)


def _bend(offsets: list[int]) -> str:
    at = next(n for n in range(1, len(offsets)) if offsets[n] <= offsets[n - 1])
    return f"… {', '.join(map(str, offsets[max(0, at - 2) : at + 2]))} …"
