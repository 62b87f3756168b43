"""Print the answer of a replay, rebuild or republication."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Column, Table

from consumer.cli.output import out, printable, right
from consumer.replay.findings import Findings, Verdict
from consumer.replay.outcomes import OUTCOMES

_ALWAYS = {"applied", "dead_lettered", "missing"}


def show(findings: Findings, found: dict[str, Any]) -> None:
    where = ", ".join(dict.fromkeys(each["topic"] for each in found["ranges"]))
    title = f"{findings.app}: {where}, {_n(len(found['ranges']), 'partition')}, {_n(found['messages'], 'message')} in {found['seconds']:.1f} s ({found['messages_per_second']:,}/s)"
    if found["handlers"]:
        shown = [each for each in OUTCOMES if each in _ALWAYS or findings.total(each)]
        table = Table(
            "handler",
            *right("delivered", *[OUTCOMES[each].title for each in shown]),
            title=escape(title),
            title_justify="left",
            box=box.SIMPLE,
        )
        for name, counts in found["handlers"].items():
            table.add_row(escape(name), *[f"{counts[each]:,}" for each in ("delivered", *shown)])
        out.print(table)
    else:
        _say(title)
    effects = found["effects"]
    if effects is not None:
        tables = ", ".join(f"{name} {sum(rows.values()):,}" for name, rows in effects["tables"].items())
        _say(
            f"rows written for messages applied before: {effects['rows']:,}{f' ({tables})' if tables else ''}; sequences moved: {len(effects['sequences'])}"
        )
        _say(f"  counted so: {effects['how']}")
    for name, rows in (found["history"] or {}).items():
        _say(
            f"ledger rows of {name} in this range: {rows['rows']:,}, without a message in the log: {rows['without_message']:,}"
        )
    if found["precheck"] is not None:
        redis = found["precheck"]
        _say(
            f"Redis had a mark for {redis['hits']:,} of {redis['asked']:,} deliveries; wrong: {redis['wrong']:,}, unanswered: {redis['unanswered']:,}"
        )
    if found["rebuild"] is not None:
        _show_rebuild(found["rebuild"])
    if found["samples"]:
        _say("")
        for each in sorted(found["samples"], key=lambda each: each["kind"]):  # lines, since a table would cut the ids
            place = f"{each['topic']}:{each['partition']}:{each['offset']}"
            _say(f"  {each['kind']}: {each['handler']} {place} {each['id']}: {each['detail']}")
        _say("")
    for note in found["notes"]:
        _say(f"note: {note}")
    for problem in found["problems"] + found["unknown"]:
        _say(f"{problem['kind']}: {problem['text']}")
    colour = {Verdict.OK: "green", Verdict.NO: "red", Verdict.UNKNOWN: "yellow"}[findings.verdict()]
    out.print(f"[bold {colour}]{escape(printable(found['answer']))}[/]", highlight=False, soft_wrap=True)


def _show_rebuild(found: dict[str, Any]) -> None:
    table = Table(
        Column("table", overflow="fold"),
        *right("rows", "rebuilt", "missing", "extra", "differ"),
        "matched by",
        "not compared",
        title="rebuild",
        title_justify="left",
        box=box.SIMPLE,
    )
    for each in found["tables"]:
        ignored = ", ".join(f"{name} ({why})" for name, why in each["ignored"].items())
        numbers = [f"{each[name]:,}" for name in ("rows", "rebuilt", "missing", "extra", "different")]
        table.add_row(
            escape(each["table"]), *numbers, escape(", ".join(each["matched_by"] or ["all columns"])), escape(ignored)
        )
    out.print(table)
    for each in found["differences"]:
        row = ", ".join(f"{name}={value}" for name, value in each["key"].items())
        columns = "; ".join(
            f"{name}: {value['real']} instead of {value['rebuilt']}"
            if each["kind"] == "different"
            else f"{name}={value['real'] if each['kind'] == 'extra' else value['rebuilt']}"
            for name, value in each["columns"].items()
        )
        many = f" {each['count']:,} times" if each["count"] > 1 else ""
        behind = f"; messages {', '.join(each['messages'])}" if each["messages"] else "; no message was found behind it"
        _say(f"  {each['table']} {each['kind']}{many}: {'; '.join(filter(None, (row, columns)))}{behind}")


def _n(count: int, one: str) -> str:
    return f"{count:,} {one if count == 1 else one + 's'}"


def _say(text: str) -> None:
    out.print(printable(text), markup=False, highlight=False)
