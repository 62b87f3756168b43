"""Write the sections of the page, from the top.

Each section takes the findings as JSON has them, and is None where its part is absent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from consumer.replay.html.blocks import data_table, fact_list, marked, section
from consumer.replay.html.chart import chart
from consumer.replay.html.counts import COUNTS, TOTAL, bar, count_cell, label, legend, present_counts
from consumer.replay.html.elements import Html, el, escaped
from consumer.replay.html.values import (
    JsonRow,
    code,
    drawn_count,
    duration,
    name_or_dash,
    number,
    partition_name,
    several,
    shown_value,
    when,
)

_OK = "Nothing is missing, nothing happens twice"
SHAPES = {  # beside the words, never in their place
    "ok": "M5 12.5l4.5 4.5L19 7.5",
    "no": "M6.5 6.5l11 11M17.5 6.5l-11 11",
    "unknown": "M8.5 9a3.5 3.5 0 1 1 5.2 3.1c-1.2.7-1.7 1.4-1.7 2.7M12 18.2v.1",
}


def headline(findings: JsonRow, verdict: str) -> str:
    """Return the answer as a heading that begins with the verdict."""
    answer = re.sub(r"^(no|could not tell)\s*:\s*", "", str(findings["answer"]), flags=re.IGNORECASE)
    match verdict:
        case "ok":
            # The fixed sentence answers these two modes; the others bring their own.
            return _OK if findings["mode"] in ("check", "apply") else answer
        case "no":
            return f"No: {answer}"
        case _:
            return f"Could not tell: {answer}"


def header(findings: JsonRow, verdict: str, heading: str) -> Html:
    """Return the verdict, what it is about, and the main numbers."""
    answer = str(findings["answer"])
    narrowed = [(name, value) for name, value in (findings.get("filters") or {}).items() if value is not None]
    spans, by_handler = findings.get("ranges") or (), findings.get("handlers") or {}
    facts: list[tuple[str, object]] = []
    if findings.get("messages") is not None:
        facts.append(("messages", number(findings["messages"])))
    if spans:
        facts.append(("partitions", number(len(spans))))
    if by_handler:
        facts.append(("handlers", number(len(by_handler))))
    if findings.get("seconds") is not None:
        facts.append(("took", duration(findings["seconds"])))
    if findings.get("started_at") is not None:
        facts.append(("started", when(findings["started_at"])))
    shape = f'<svg viewBox="0 0 24 24" aria-hidden="true"><path d="{SHAPES[verdict]}"/></svg>'
    topics = list(dict.fromkeys(span["topic"] for span in spans if span.get("topic") is not None))
    return el(
        "header",
        el(
            "p",
            Html("consumer replay "),
            code(findings["app"]),
            *(Html(f" {code(topic)}") for topic in topics),
            Html(f" · {escaped(findings['mode'])}"),
            class_="run",
        ),
        el(
            "div",
            Html(shape),
            el(
                "div",
                el("h1", heading, class_="long" if len(heading) > 120 else None),
                el("p", answer) if heading == _OK and not answer.startswith("Nothing is missing") else None,
                el(
                    "p",
                    Html("Only a part was checked: "),
                    Html(
                        "; ".join(f"{escaped(name.replace('_', ' '))} {shown_value(value)}" for name, value in narrowed)
                    ),
                    class_="part",
                )
                if narrowed
                else None,
            ),
            class_=f"verdict {verdict}",
        ),
        fact_list(facts, "figures"),
    )


def reasons(title: str, rows: Iterable[JsonRow] | None, kind: str) -> Html | None:
    """Return problems or doubts, one line each."""
    if not rows:
        return None
    lines = [
        el(
            "li",
            el("span", number(row.get("count")), class_="count"),
            el("span", row.get("text"), " ", el("span", label(row.get("kind")), class_="kind")),
        )
        for row in rows
    ]
    return section(title, el("ul", *lines, class_=f"reasons {kind}"))


def notes(findings: JsonRow) -> Html | None:
    """Return what the replay noted."""
    lines = findings.get("notes")
    return section("Notes", el("ul", *(el("li", line) for line in lines), class_="notes")) if lines else None


def handlers(findings: JsonRow) -> Html | None:
    """Return the outcomes by handler, with their meanings."""
    by_handler: Mapping[str, JsonRow] = findings.get("handlers") or {}
    if not by_handler:
        return None
    names = present_counts(by_handler.values())
    rows = (
        [code(handler), *(count_cell(name, row.get(name)) for name in names)] for handler, row in by_handler.items()
    )
    meanings = [(label(name), COUNTS[name].meaning) for name in names if name in COUNTS]
    return section(
        "By handler",
        data_table(
            "Outcomes of the messages, by handler",
            [("handler", "name"), *((label(name), "n") for name in names)],
            rows,
        ),
        el("details", el("summary", "What the words mean"), fact_list(meanings, "words")) if meanings else None,
    )


def effects(findings: JsonRow) -> Html | None:
    """Return what applied messages would write again."""
    counted = findings.get("effects")
    if not counted:
        return None
    tables: Mapping[str, JsonRow] = counted.get("tables") or {}
    columns = ("inserted", "updated", "deleted")
    rows = ([code(table), *(count_cell("missing", row.get(name)) for name in columns)] for table, row in tables.items())
    facts: list[tuple[str, object]] = []
    if counted.get("transactions") is not None:
        facts.append(("transactions, rolled back", number(counted["transactions"])))
    written = {
        "rows": "rows written",
        "otherwise": "transactions with other writes",
        "claims": "ids that could be claimed again",
    }
    facts += [(title, marked(counted[name])) for name, title in written.items() if counted.get(name) is not None]
    sequences = counted.get("sequences")
    if sequences is not None:
        facts.append(("sequences moved", shown_value(sequences) if sequences else marked(0)))
    return section(
        "What applied messages would do again",
        fact_list(facts),
        data_table("Rows written, by table", [("table", "name"), *((name, "n") for name in columns)], rows)
        if tables
        else None,
        el("p", f"How it was counted: {counted['how']}") if counted.get("how") else None,
    )


def partitions(findings: JsonRow) -> Html | None:
    """Return the outcomes by partition, a table for each handler."""
    counted: Sequence[JsonRow] = findings.get("partitions") or ()
    if not counted:
        return None
    present = present_counts(counted, ("handler", "topic", "partition"))
    names = [name for name in present if name == TOTAL or any(row.get(name) for row in counted)]
    empty = [label(name) for name in present if name not in names]
    largest = max(drawn_count(row.get(TOTAL)) for row in counted)
    by_handler: dict[str, list[JsonRow]] = {}
    for row in counted:
        by_handler.setdefault(str(row.get("handler") or ""), []).append(row)
    tables = [
        data_table(
            f"Handler {handler}",
            [("partition", "name"), ("outcomes", "share"), *((label(name), "n") for name in names)],
            (
                [partition_name(row), bar(row, names, largest), *(count_cell(name, row.get(name)) for name in names)]
                for row in rows
            ),
        )
        for handler, rows in by_handler.items()
    ]
    drawn = [name for name in names if name != TOTAL]
    return section(
        "By partition",
        legend(drawn) if drawn else None,
        *tables,
        el("p", f"Zero in every partition: {', '.join(empty)}.", class_="small") if empty else None,
    )


def times(findings: JsonRow) -> Html | None:
    """Return the outcomes by time: chart and numbers."""
    timeline = findings.get("times")
    if not timeline or not (timeline.get("buckets") or timeline.get("untimed")):
        return None
    buckets: Sequence[JsonRow] = timeline.get("buckets") or ()
    untimed: JsonRow = timeline.get("untimed") or {}
    names = [name for name in present_counts([*buckets, untimed], ("at",)) if name != TOTAL]
    totals = {name: sum(drawn_count(row.get(name)) for row in (*buckets, untimed)) for name in names}
    width = _time_span(timeline.get("width_seconds"))
    rows = [[when(row.get("at")), *(count_cell(name, row.get(name) or 0) for name in names)] for row in buckets]
    if untimed:
        rows.append([Html("no usable time"), *(count_cell(name, untimed.get(name) or 0) for name in names)])
    without = ", ".join(f"{label(name)} {number(count)}" for name, count in untimed.items())
    return section(
        "By time",
        el("p", f"By the time of each record, in steps of {width}. Times are UTC, set by the producer or the broker."),
        legend(names, totals),
        chart(buckets, names, timeline.get("width_seconds")),
        el("p", f"Without a usable time: {without}.") if untimed else None,
        el(
            "details",
            el("summary", f"The numbers of the chart ({several(len(rows), 'row', 'rows')})"),
            data_table(
                f"Messages in steps of {width}, by how they ended",
                [("from", "name"), *((label(name), "n") for name in names)],
                rows,
            ),
        ),
    )


def _time_span(seconds: object) -> str:
    """Return the width of a bucket in its largest whole unit."""
    if isinstance(seconds, int) and seconds > 0:
        for size, one, many in ((86400, "day", "days"), (3600, "hour", "hours"), (60, "minute", "minutes")):
            if seconds % size == 0:
                return several(seconds // size, one, many)
        return several(seconds, "second", "seconds")
    return f"{number(seconds)} seconds"


def history(findings: JsonRow) -> Html | None:
    """Return how many ledger rows have a message in the log."""
    by_handler: Mapping[str, JsonRow] = findings.get("history") or {}
    if not by_handler:
        return None
    rows = [
        [
            code(handler),
            count_cell("", row.get("rows")),
            count_cell("", row.get("with_message")),
            count_cell("missing", row.get("without_message")),
        ]
        for handler, row in by_handler.items()
    ]
    columns = [("handler", "name"), ("rows in the ledger", "n"), ("with a message", "n"), ("without one", "n")]
    return section(
        "The ledger against the log", data_table("Rows of the ledger that a message accounts for", columns, rows)
    )


def precheck(findings: JsonRow) -> Html | None:
    """Return how far the marks in Redis agree with the ledger."""
    counted = findings.get("precheck")
    if not counted:
        return None
    return section(
        "Redis",
        fact_list(
            [
                ("asked about", number(counted.get("asked"))),
                ("marked as seen", number(counted.get("hits"))),
                ("marked, but not in the ledger", marked(counted.get("wrong"))),
                ("unanswered", number(counted.get("unanswered"))),
            ]
        ),
    )


def republished(findings: JsonRow) -> Html | None:
    """Return how many records were copied."""
    copied = findings.get("republish")
    if not copied:
        return None
    return section(
        "Copied to another topic",
        fact_list(
            [
                ("topic", name_or_dash(copied.get("topic"))),
                ("copied", number(copied.get("copied"))),
                ("refused", number(copied.get("refused"))),
            ]
        ),
    )


def samples(findings: JsonRow) -> Html | None:
    """Return examples of messages, with places and ids."""
    examples: Sequence[JsonRow] = findings.get("samples") or ()
    if not examples:
        return None
    rows = [
        [
            el("span", label(example.get("kind")), class_="kind"),
            name_or_dash(example.get("handler")),
            partition_name(example),
            number(example.get("offset")),
            name_or_dash(example.get("id")),
            example.get("detail"),
        ]
        for example in examples
    ]
    columns = [
        ("kind", "name"),
        ("handler", ""),
        ("partition", "line"),
        ("offset", "n"),
        ("message id", "id"),
        ("detail", "wide"),
    ]
    return section("Examples", data_table("Messages to look at", columns, rows))


def ranges(findings: JsonRow) -> Html | None:
    """Return the offsets that were read."""
    spans: Sequence[JsonRow] = findings.get("ranges") or ()
    if not spans:
        return None
    names = ("from", "until", "position", "read")
    columns = [
        ("partition", "name"),
        ("from offset", "n"),
        ("before offset", "n"),
        ("position of the app", "n"),
        ("messages read", "n"),
    ]
    rows = ([partition_name(row), *(number(row.get(name)) for name in names)] for row in spans)
    return section("What was read", data_table("Offsets of each partition", columns, rows))


def footer(findings: JsonRow, note: str | None = None) -> Html:
    """Return how the replay was run. note: a sentence about the page."""
    facts: list[tuple[str, object]] = [("app", code(findings["app"])), ("mode", code(findings["mode"]))]
    if findings.get("started_at") is not None:
        facts.append(("started", when(findings["started_at"])))
    if findings.get("seconds") is not None:
        facts.append(("took", duration(findings["seconds"])))
    if findings.get("messages") is not None:
        facts.append(("messages", number(findings["messages"])))
    if findings.get("messages_per_second") is not None:
        facts.append(("messages per second", number(findings["messages_per_second"])))
    for name, value in (findings.get("filters") or {}).items():
        facts.append(
            (name.replace("_", " "), el("span", "all", class_="small") if value is None else shown_value(value))
        )
    if findings.get("exit_code") is not None:
        facts.append(("exit code", number(findings["exit_code"])))
    return el(
        "footer",
        el("h2", "How it was run"),
        fact_list(facts),
        el("p", note, class_="small") if note else None,
    )
