"""Judge what handlers publish against what is in Kafka: problems, or doubts.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from consumer.replay.wording import counted, problem

Outgoing: TypeAlias = Mapping[str, Any]  # outgoing_run.py: what it writes to the findings

KINDS = ("missing", "extra", "different")
_PROBLEMS = {
    "missing": "that the handlers publish {are} missing in {topic}",
    "extra": "in {topic} {are} of no message: another producer, or an effect that is not there any more",
    "different": "in {topic} {differ} from what the handlers publish",
}
_REASONS = {
    "unpublished": "{are} in the outbox, and not published yet",
    "discarded": "{were} discarded by an operator (`consumer outbox show APP STREAM`)",
    "truncated": "{are} not in {topic}, whose first records are gone: whether they were there is unknown",
    "unstable": "of {topic} {differ} from one run of the handlers to the next: time, chance, or an order that is not known",
}
_NO_DOUBT = frozenset({"discarded"})  # on record, so it is a note


def outgoing_problems(outgoing: Outgoing) -> Iterator[dict[str, Any]]:
    """Yield a problem for each topic and kind, unless something explains it."""
    for row in outgoing.get("differences", ()):
        if not row["reason"] and not _explanations(outgoing, row["topic"], row["kind"]):
            yield problem(row["kind"], row["count"], _text(_PROBLEMS[row["kind"]], row))


def outgoing_doubts(outgoing: Outgoing) -> list[dict[str, Any]]:
    """Return why the answer is uncertain, and differences that prove nothing."""
    doubts = list(outgoing.get("unknown", ()))
    for row in outgoing.get("differences", ()):
        if row["reason"] in _NO_DOUBT:
            continue
        if row["reason"]:
            doubts.append(problem(row["reason"], row["count"], _text(_REASONS[row["reason"]], row)))
        elif explanations := _explanations(outgoing, row["topic"], row["kind"]):
            text = f"{_text(_PROBLEMS[row['kind']], row)}; this may explain it: {'; '.join(explanations[:3])}"
            doubts.append(problem(f"{row['kind']}_unproved", row["count"], text))
    return doubts


def outgoing_notes(outgoing: Outgoing) -> list[str]:
    """Return what people should know beside the verdict."""
    return [
        _text(_REASONS[row["reason"]], row) for row in outgoing.get("differences", ()) if row["reason"] in _NO_DOUBT
    ]


def _explanations(outgoing: Outgoing, topic: str, kind: str) -> Sequence[str]:
    mine = [
        row["text"] for row in outgoing.get("explanations", ()) if row["topic"] in (topic, "") and kind in row["kinds"]
    ]
    if kind == "extra" and any(
        (row["topic"], row["kind"], row["reason"]) == (topic, "missing", "unstable") for row in outgoing["differences"]
    ):
        mine.insert(0, "the handlers publish under other ids in each run, so a repeated message publishes again")
    return mine


def _text(template: str, row: Mapping[str, Any]) -> str:
    one = row["count"] == 1
    words = {"are": "is" if one else "are", "were": "was" if one else "were", "differ": "differs" if one else "differ"}
    return f"{counted(row['count'], 'record')} {template.format(topic=row['topic'], **words)}"
