"""Write the sections of a comparison with the output topics."""

from __future__ import annotations

from collections.abc import Sequence

from consumer.replay.html.blocks import data_table, fact_list, section
from consumer.replay.html.counts import count_cell
from consumer.replay.html.elements import Html, el
from consumer.replay.html.values import ABSENT, JsonRow, code, name_or_dash

KINDS = {
    "missing": "the handlers publish it, the topic lacks it",
    "extra": "the topic has it, no handler publishes it",
    "different": "both have this id, with another key, value or header",
}


def topics(findings: JsonRow) -> Html | None:
    """Return the counts of each output topic."""
    outgoing: JsonRow = findings.get("outgoing") or {}
    compared: Sequence[JsonRow] = outgoing.get("topics") or ()
    if not compared:
        return None
    differences: Sequence[JsonRow] = outgoing.get("differences") or ()
    rows = [
        [
            name_or_dash(row.get("topic")),
            *(count_cell("", row.get(name)) for name in ("expected", "ids", "records")),
            *(count_cell("missing", _count(differences, row.get("topic"), kind)) for kind in KINDS),
        ]
        for row in compared
    ]
    columns = [
        ("topic", "name"),
        ("handlers publish", "n"),
        ("in Kafka", "n"),
        ("records", "n"),
        *((kind, "n") for kind in KINDS),
    ]
    return section("Output topics", data_table("What the handlers publish against the output topics", columns, rows))


def _count(differences: Sequence[JsonRow], topic: object, kind: str) -> int:
    return sum(int(row["count"]) for row in differences if row.get("topic") == topic and row.get("kind") == kind)


def differences(findings: JsonRow) -> Html | None:
    """Return records in which handlers and topics disagree."""
    samples: Sequence[JsonRow] = (findings.get("outgoing") or {}).get("samples") or ()
    if not samples:
        return None
    rows = [
        [
            el("span", row.get("kind"), class_="kind"),
            name_or_dash(row.get("topic")),
            code(row.get("id")),
            _place(row.get("partition"), row.get("offset")),
            _source(row),
            " ".join(str(text) for text in (row.get("detail"), row.get("reason")) if text) or ABSENT,
        ]
        for row in samples
    ]
    kinds = [(kind, text) for kind, text in KINDS.items() if any(row.get("kind") == kind for row in samples)]
    columns = [("kind", "name"), ("topic", ""), ("id", "id"), ("at", ""), ("message", ""), ("why", "wide")]
    return section(
        "Differences",
        fact_list(kinds, "words"),
        data_table("Where handlers and output topics disagree", columns, rows),
    )


def _place(partition: object, offset: object) -> Html:
    return el("span", ABSENT, class_="small") if offset is None else code(f"{partition}:{offset}")


def _source(row: JsonRow) -> Html:
    if row.get("source_topic") is None:
        return el("span", ABSENT, class_="small")
    return code(f"{row.get('handler')} {row['source_topic']}:{row.get('source_partition')}:{row.get('source_offset')}")
