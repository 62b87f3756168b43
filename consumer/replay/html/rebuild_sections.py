"""Write the sections of a rebuild: tables compared, and rows that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from consumer.replay.html.blocks import data_table, fact_list, section
from consumer.replay.html.counts import count_cell
from consumer.replay.html.elements import Html, el
from consumer.replay.html.values import ABSENT, JsonRow, code, name_or_dash, shown_value

DIFFERENCES = {
    "missing": "the topic gives this row, the database lacks it",
    "extra": "the database has this row, the topic does not give it",
    "different": "both have this row, with other values",
}


def tables(findings: JsonRow) -> Html | None:
    """Return how many rows of each table agree with the topic."""
    compared: Sequence[JsonRow] = (findings.get("rebuild") or {}).get("tables") or ()
    if not compared:
        return None
    counts = ("rows", "rebuilt", *DIFFERENCES)
    rows = [
        [
            name_or_dash(row.get("table")),
            *(count_cell("missing" if name in DIFFERENCES else "", row.get(name)) for name in counts),
            shown_value(row["matched_by"]) if row.get("matched_by") else "all columns",
            _ignored(row.get("ignored") or {}),
        ]
        for row in compared
    ]
    columns = [
        ("table", "name"),
        ("rows", "n"),
        ("from the topic", "n"),
        *((name, "n") for name in DIFFERENCES),
        ("matched by", "wide"),
        ("not compared", "wide"),
    ]
    return section("Rebuilt tables", data_table("The database against what the topic gives", columns, rows))


def _ignored(columns: Mapping[str, Any]) -> Html:
    if not columns:
        return el("span", "nothing", class_="small")
    return Html("".join(el("div", code(name), el("span", f" {why}", class_="small")) for name, why in columns.items()))


def differences(findings: JsonRow) -> Html | None:
    """Return the rows in which database and topic disagree."""
    differing: Sequence[JsonRow] = (findings.get("rebuild") or {}).get("differences") or ()
    if not differing:
        return None
    rows = [
        [
            el("span", row.get("kind"), class_="kind"),
            name_or_dash(row.get("table")),
            shown_value(row.get("key")),
            _sides(row.get("columns") or {}, str(row.get("kind"))),
            count_cell("", row.get("count")),
            Html("".join(el("div", code(message)) for message in row.get("messages") or ())),
        ]
        for row in differing
    ]
    kinds = [kind for kind in DIFFERENCES if any(row.get("kind") == kind for row in differing)]
    columns = [
        ("kind", "name"),
        ("table", ""),
        ("key", "wide"),
        ("values", "wide"),
        ("rows", "n"),
        ("messages", "id"),
    ]
    return section(
        "Differences",
        fact_list([(kind, DIFFERENCES[kind]) for kind in kinds], "words"),
        data_table("Where the database and the topic disagree", columns, rows),
    )


def _sides(columns: Mapping[str, JsonRow], kind: str) -> Html:
    """Return the two values of each column, one below the other.

    So a digit that differs stands below its counterpart.
    """
    lines = []
    for name, sides in columns.items():
        pairs = [
            el("dd", el("span", label, class_="side"), code(sides.get(side)))
            for side, label, absent in (("real", "database", "missing"), ("rebuilt", "topic", "extra"))
            if kind != absent or sides.get(side) is not None
        ]
        lines.append(el("div", el("dt", code(name)), *pairs))
    return el("dl", *lines, class_="sides") if lines else el("span", ABSENT, class_="small")
