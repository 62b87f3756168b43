"""Print the answer of a replay, rebuild or republication."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from consumer.cli.output import line, names, numbers, out, printable
from consumer.cli.output import show as show_table
from consumer.replay.findings import Findings, Verdict
from consumer.replay.outcomes import OUTCOMES
from consumer.replay.outgoing_verdict import KINDS

_ALWAYS = {"applied", "dead_lettered", "missing"}
_COLOURS = {Verdict.OK: "green", Verdict.NO: "red", Verdict.UNKNOWN: "yellow"}


def show(findings: Findings, answer: dict[str, Any]) -> None:
    """Print the answer of `findings.as_dict()` as text."""
    topics = ", ".join(dict.fromkeys(bounds["topic"] for bounds in answer["ranges"]))
    title = (
        f"{findings.app}: {topics}, {_n(len(answer['ranges']), 'partition')}, {_n(answer['messages'], 'message')} in "
        f"{answer['seconds']:.1f} s ({answer['messages_per_second']:,}/s)"
    )
    if answer["handlers"]:
        _show_handlers(findings, answer["handlers"], title)
    else:
        line(title)
    _show_evidence(answer)
    if answer["rebuild"] is not None:
        _show_rebuild(answer["rebuild"])
    if answer["outgoing"] is not None:
        _show_outgoing(answer["outgoing"])
    if answer["samples"]:
        line("")
        for sample in sorted(answer["samples"], key=lambda sample: sample["kind"]):  # lines: a table would cut the ids
            place = f"{sample['topic']}:{sample['partition']}:{sample['offset']}"
            line(f"  {sample['kind']}: {sample['handler']} {place} {sample['id']}: {sample['detail']}")
        line("")
    for note in answer["notes"]:
        line(f"note: {note}")
    for problem in answer["problems"] + answer["unknown"]:
        line(f"{problem['kind']}: {problem['text']}")
    colour = _COLOURS[findings.verdict()]
    out.print(f"[bold {colour}]{escape(printable(answer['answer']))}[/]", highlight=False, soft_wrap=True)


def _show_handlers(findings: Findings, handlers: dict[str, dict[str, int]], title: str) -> None:
    outcomes = [outcome for outcome in OUTCOMES if outcome in _ALWAYS or findings.total(outcome)]
    table = Table(
        *names("handler"), *numbers("delivered", *(OUTCOMES[outcome].title for outcome in outcomes)), box=box.SIMPLE
    )
    for name, counts in handlers.items():
        table.add_row(escape(name), *(f"{counts[column]:,}" for column in ("delivered", *outcomes)))
    show_table(table, title)


def _show_evidence(answer: dict[str, Any]) -> None:
    effects = answer["effects"]
    if effects is not None:
        tables = ", ".join(f"{name} {sum(rows.values()):,}" for name, rows in effects["tables"].items())
        line(
            f"rows written for messages applied before: {effects['rows']:,}{f' ({tables})' if tables else ''}; sequences "
            f"moved: {len(effects['sequences'])}"
        )
        line(f"  counted so: {effects['how']}")
    for name, rows in (answer["history"] or {}).items():
        line(
            f"ledger rows of {name} in this range: {rows['rows']:,}, without a message in the log: {rows['without_message']:,}"
        )
    if answer["precheck"] is not None:
        redis = answer["precheck"]
        line(
            f"Redis had a mark for {redis['hits']:,} of {redis['asked']:,} deliveries; wrong: {redis['wrong']:,}, unanswered: "
            f"{redis['unanswered']:,}"
        )


def _show_rebuild(answer: dict[str, Any]) -> None:
    table = Table(
        *names("table"),
        *numbers("rows", "rebuilt", "missing", "extra", "differ"),
        "matched by",
        "not compared",
        box=box.SIMPLE,
    )
    for row in answer["tables"]:
        ignored = ", ".join(f"{name} ({why})" for name, why in row["ignored"].items())
        counts = [f"{row[name]:,}" for name in ("rows", "rebuilt", "missing", "extra", "different")]
        table.add_row(
            escape(row["table"]), *counts, escape(", ".join(row["matched_by"] or ["all columns"])), escape(ignored)
        )
    show_table(table, "rebuild")
    for difference in answer["differences"]:
        _show_difference(difference)


def _show_outgoing(answer: dict[str, Any]) -> None:
    table = Table(*names("topic"), *numbers("handlers publish", "in kafka", "records", *KINDS), box=box.SIMPLE)
    for row in answer["topics"]:
        differing = {
            kind: sum(d["count"] for d in answer["differences"] if (d["topic"], d["kind"]) == (row["topic"], kind))
            for kind in KINDS
        }
        counts = [row["expected"], row["ids"], row["records"], *differing.values()]
        table.add_row(escape(row["topic"]), *(f"{count:,}" for count in counts))
    show_table(table, "published")
    for sample in answer["samples"]:
        line(f"  {_outgoing_sample(sample)}")


def _outgoing_sample(sample: dict[str, Any]) -> str:
    kind = (
        f"{sample['kind']} ({sample['reason'] or sample['detail']})"
        if sample["reason"] or sample["detail"]
        else sample["kind"]
    )
    place = "" if sample["offset"] is None else f" at {sample['topic']}:{sample['partition']}:{sample['offset']}"
    source = ""
    if sample["source_topic"] is not None:
        source = (
            f", of {sample['handler']} {sample['source_topic']}:{sample['source_partition']}:{sample['source_offset']}"
        )
    return f"{kind}: {sample['topic']} {sample['id']}{place}{source}"


def _show_difference(difference: dict[str, Any]) -> None:
    key = ", ".join(f"{name}={value}" for name, value in difference["key"].items())
    columns = "; ".join(
        f"{name}: {value['real']} instead of {value['rebuilt']}"
        if difference["kind"] == "different"
        else f"{name}={value['real'] if difference['kind'] == 'extra' else value['rebuilt']}"
        for name, value in difference["columns"].items()
    )
    many = f" {difference['count']:,} times" if difference["count"] > 1 else ""
    messages = difference["messages"]
    behind = f"; messages {', '.join(messages)}" if messages else "; no message was found behind it"
    line(f"  {difference['table']} {difference['kind']}{many}: {'; '.join(filter(None, (key, columns)))}{behind}")


def _n(count: int, one: str) -> str:
    return f"{count:,} {one if count == 1 else one + 's'}"
