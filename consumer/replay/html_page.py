"""What a replay found, as one HTML page for whoever has to believe it: the verdict in words first, then every number.

Self-contained: no script, no address, its style inside, so that it can be mailed, printed and kept. Whatever stands in the
findings is text: names and values come from topics and tables, and may be anybody's. They are shown as they are, with
what cannot be seen as an escape. Knows the findings' names, not how they came about: it counts nothing again, and an
absent part is left out. It opens no file.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]

# Longer text says little more to a reader; the JSON report has all of it.
TEXT_MAX = 2000
SLOTS_MAX = 1000  # of the chart; a timeline makes 240

# What is counted: what it is called, and what that means. Every delivery ended in exactly one of those below the first.
OUTCOMES = {
    "delivered": ("delivered", "read from the topic for this handler; the sum of the others"),
    "applied": ("applied", "the ledger holds its id as applied"),
    "missing": ("missing", "in the topic, but not in the ledger"),
    "repeated": ("repeated", "delivered again, with an id that is counted as missing already"),
    "unknown": ("cannot tell", "from before the ledger began, or otherwise in doubt"),
    "dead_lettered": ("dead letters", "kept in the database with its bytes and the reason"),
    "skipped": ("skipped", "its handler opted out of the ledger"),
    "conflicts": ("conflicts", "its id was used before with another payload"),
    "unreadable": ("unreadable", "its payload or its id cannot be read"),
    "applied_now": ("applied now", "applied by this replay"),
    "dead_lettered_now": ("dead letters now", "made a dead letter by this replay"),
}
TOTAL = "delivered"
# Never overlooked: marked in tables, and below the chart, where one of 200,000 would be no pixel high.
GRAVE = {"missing": "missing", "unknown": "in doubt"}
OF_THIS_RUN = ("applied_now", "dead_lettered_now")

DIFFERENCES = {
    "missing": "the topic gives this row, the database lacks it",
    "extra": "the database has this row, the topic does not give it",
    "different": "both have this row, with other values",
}
_ABSENT = "\u2013"
_OK = "Nothing is missing, nothing happens twice"
_SHAPES = {  # beside the words, never instead of them
    "ok": "M5 12.5l4.5 4.5L19 7.5",
    "no": "M6.5 6.5l11 11M17.5 6.5l-11 11",
    "unknown": "M8.5 9a3.5 3.5 0 1 1 5.2 3.1c-1.2.7-1.7 1.4-1.7 2.7M12 18.2v.1",
}


def render(found: Row) -> str:
    """The page. Its text can be written as UTF-8, whatever the findings hold."""
    verdict = found["verdict"] if found["verdict"] in _SHAPES else "unknown"
    headline = _headline(found, verdict)
    sections = (
        _told("Problems", found.get("problems"), "no"),
        _told(
            "Why it could not tell" if verdict == "unknown" else "What could not be told",
            found.get("unknown"),
            "unknown",
        ),
        _notes(found),
        _handlers(found),
        _effects(found),
        _partitions(found),
        _times(found),
        _history(found),
        _precheck(found),
        _rebuilt(found),
        _differences(found),
        _republished(found),
        _samples(found),
        _ranges(found),
    )
    page = el(
        "html",
        el(
            "head",
            Html('<meta charset="utf-8">'),
            Html(
                "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
            ),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="color-scheme" content="light dark">'),
            el("title", f"{_plain(found['app'])}: {_plain(headline)}"),
            el("style", Html(_STYLE)),
        ),
        el("body", _header(found, verdict, headline), el("main", *sections), _footer(found)),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


# -- text becomes HTML here, and nowhere else ---------------------------------------------------------------------------


class Html(str):
    """Markup of our own making. Everything that is not this is text, and is escaped where it enters an element."""

    __slots__ = ()


def el(name: str, *children: object, **attributes: object) -> Html:
    """An element. Children that are not Html are text; None is left out, and so are attributes that are None."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name == "title":  # holds text alone, in HTML
        inner = "".join(html.escape(_plain(each)) for each in children)
    else:
        inner = "".join(each if isinstance(each, Html) else _text(each) for each in children if each is not None)
    return Html(f"<{name}{told}>{inner}</{name}>")


def _text(value: object) -> Html:
    text, cut = _shortened(str(value))
    if text.isprintable():
        shown = html.escape(text)
    else:
        shown = "".join(
            html.escape(each) if each.isprintable() else f'<span class="esc">{_escape(each)}</span>' for each in text
        )
    return Html(shown + cut)


def _plain(value: object) -> str:
    """The same where no markup can stand."""
    text, cut = _shortened(str(value))
    return "".join(each if each.isprintable() else _escape(each) for each in text) + cut


def _shortened(text: str) -> tuple[str, str]:
    return (text, "") if len(text) <= TEXT_MAX else (text[:TEXT_MAX], f"… ({len(text):,} characters)")


def _escape(character: str) -> str:
    """Control characters, marks that turn or hide text, odd spaces, halves of surrogates: none can be seen as they are."""
    return character.encode("unicode_escape").decode("ascii")


def _number(value: object) -> object:
    match value:
        case None:
            return _ABSENT
        case int() if not isinstance(value, bool):
            return f"{value:,}"
        case float():
            return f"{value:,.1f}"
    return value


def _whole(value: object) -> int:
    """For what is drawn; what is no number has no length."""
    return max(0, value) if isinstance(value, int) else 0


def _code(value: object) -> Html:
    """A value or a name, kept apart from the text around it, whichever way it is written."""
    if value is None:
        return el("em", "null")
    if value == "":
        return el("em", "empty text")
    return el("bdi", el("code", value))


def _name(value: object) -> Html:
    """A name that may not be told."""
    return Html(_ABSENT) if value is None else _code(value)


def _when(value: object) -> Html:
    at = _moment(value)
    if at is None:
        return _code(value)
    return el("time", at.strftime("%Y-%m-%d %H:%M:%S UTC"), datetime=at.strftime("%Y-%m-%dT%H:%M:%SZ"))


def _moment(value: object) -> datetime | None:
    try:
        at = datetime.fromisoformat(str(value))
        return at.astimezone(UTC) if at.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _duration(value: object) -> object:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return _number(None) if value is None else value
    if value < 60:
        return f"{value:,.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _several(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _values(value: object) -> Html:
    """A filter or a key: `a = 1, b = 2`, or the list of them."""
    match value:
        case Mapping():
            parts = [Html(f"{_code(name)} = {_values(each)}") for name, each in value.items()]
        case list() | tuple() | set() | frozenset():
            parts = [_values(each) for each in value]
        case _:
            return _code(value)
    return Html(", ".join(parts)) if parts else el("em", "none")


def _place(row: Row) -> Html:
    """topic and partition, on one line"""
    return Html(f"{_name(row.get('topic'))} {el('span', _number(row.get('partition')), class_='partition')}")


# -- what the sections are made of --------------------------------------------------------------------------------------


def _section(title: str, *children: object) -> Html:
    return el("section", el("h2", title), *children)


def _facts(facts: Sequence[tuple[str, object]], kind: str = "facts") -> Html | None:
    if not facts:
        return None
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in facts), class_=kind)


class Cell(Html):
    """A `td` that is made already."""

    __slots__ = ()


def _count(name: str, value: object) -> Cell:
    """A number's cell: zero is pale, and what is grave is marked."""
    kind = "zero" if not value else name if name in GRAVE else ""
    return Cell(el("td", _number(value), class_=f"n {kind}".strip()))


def _marked(value: object) -> Html:
    """A number that should be zero, outside a table."""
    return el("span", _number(value), class_="n missing" if value else "n")


def _table(caption: str, columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]]) -> Html:
    """Columns are (heading, class); the first cell of a row is its heading.

    It scrolls in a box of its own, which the keyboard can reach.
    """
    body = []
    for row in rows:
        cells = [el("th", row[0], scope="row", class_=columns[0][1] or None)]
        for cell, (_, kind) in zip(row[1:], columns[1:], strict=True):
            cells.append(cell if isinstance(cell, Cell) else el("td", cell, class_=kind or None))
        body.append(el("tr", *cells))
    head = el("tr", *(el("th", name, scope="col", class_=kind or None) for name, kind in columns))
    table = el("table", el("caption", el("span", caption)), el("thead", head), el("tbody", *body))
    return el("div", table, class_="scroll", role="region", tabindex="0", aria_label=caption)


def _label(name: object) -> str:
    """What an outcome, or a kind of anything, is called."""
    return OUTCOMES[str(name)][0] if name in OUTCOMES else str(name or "").replace("_", " ")


def _shade(name: str) -> str:
    """The class of an outcome's colour: ours for each name that we know, one for all others."""
    return f"o-{name}" if name in OUTCOMES else "o-other"


def _names(rows: Iterable[Row], beside: Iterable[str] = ()) -> list[str]:
    """The counts that stand in these rows, in our order. What this run did is told only where it did something."""
    rows = list(rows)
    present = {name: None for row in rows for name in row if name not in set(beside)}
    for name in OF_THIS_RUN:
        if not any(row.get(name) for row in rows):
            present.pop(name, None)
    return [name for name in OUTCOMES if name in present] + [name for name in present if name not in OUTCOMES]


# -- the sections, from the top -----------------------------------------------------------------------------------------


def _headline(found: Row, verdict: str) -> str:
    answer = re.sub(r"^(no|could not tell)\s*:\s*", "", str(found["answer"]), flags=re.IGNORECASE)
    match verdict:
        case "ok":
            # What that sentence says is the answer to these two questions. The others have one of their own.
            return _OK if found["mode"] in ("check", "apply") else answer
        case "no":
            return f"No: {answer}"
    return f"Could not tell: {answer}"


def _header(found: Row, verdict: str, headline: str) -> Html:
    answer = str(found["answer"])
    narrowed = [(name, value) for name, value in (found.get("filters") or {}).items() if value is not None]
    ranges, handlers = found.get("ranges") or (), found.get("handlers") or {}
    facts: list[tuple[str, object]] = []
    if found.get("messages") is not None:
        facts.append(("messages", _number(found["messages"])))
    if ranges:
        facts.append(("partitions", _number(len(ranges))))
    if handlers:
        facts.append(("handlers", _number(len(handlers))))
    if found.get("seconds") is not None:
        facts.append(("took", _duration(found["seconds"])))
    if found.get("started_at") is not None:
        facts.append(("started", _when(found["started_at"])))
    shape = f'<svg viewBox="0 0 24 24" aria-hidden="true"><path d="{_SHAPES[verdict]}"/></svg>'
    topics = list(dict.fromkeys(each["topic"] for each in ranges if each.get("topic") is not None))
    return el(
        "header",
        el(
            "p",
            Html("consumer replay "),
            _code(found["app"]),
            *(Html(f" {_code(each)}") for each in topics),
            Html(f" · {_text(found['mode'])}"),
            class_="run",
        ),
        el(
            "div",
            Html(shape),
            el(
                "div",
                el("h1", headline, class_="long" if len(headline) > 120 else None),
                el("p", answer) if headline == _OK and not answer.startswith("Nothing is missing") else None,
                el(
                    "p",
                    Html("Only a part was looked at: "),
                    Html("; ".join(f"{_text(name.replace('_', ' '))} {_values(value)}" for name, value in narrowed)),
                    class_="part",
                )
                if narrowed
                else None,
            ),
            class_=f"verdict {verdict}",
        ),
        _facts(facts, "figures"),
    )


def _told(title: str, told: Iterable[Row] | None, kind: str) -> Html | None:
    if not told:
        return None
    lines = [
        el(
            "li",
            el("span", _number(each.get("count")), class_="count"),
            el("span", each.get("text"), " ", el("span", _label(each.get("kind")), class_="kind")),
        )
        for each in told
    ]
    return _section(title, el("ul", *lines, class_=f"told {kind}"))


def _notes(found: Row) -> Html | None:
    notes = found.get("notes")
    return _section("Notes", el("ul", *(el("li", each) for each in notes), class_="notes")) if notes else None


def _handlers(found: Row) -> Html | None:
    handlers: Mapping[str, Row] = found.get("handlers") or {}
    if not handlers:
        return None
    names = _names(handlers.values())
    rows = ([_code(each), *(_count(name, row.get(name)) for name in names)] for each, row in handlers.items())
    meanings = [(_label(name), OUTCOMES[name][1]) for name in names if name in OUTCOMES]
    return _section(
        "By handler",
        _table(
            "What became of the messages, for each handler",
            [("handler", "name"), *((_label(name), "n") for name in names)],
            rows,
        ),
        el("details", el("summary", "What the words mean"), _facts(meanings, "words")) if meanings else None,
    )


def _effects(found: Row) -> Html | None:
    effects = found.get("effects")
    if not effects:
        return None
    tables: Mapping[str, Row] = effects.get("tables") or {}
    columns = ("inserted", "updated", "deleted")
    rows = ([_code(table), *(_count("missing", row.get(name)) for name in columns)] for table, row in tables.items())
    facts: list[tuple[str, object]] = []
    if effects.get("transactions") is not None:
        facts.append(("transactions, rolled back", _number(effects["transactions"])))
    written = {
        "rows": "rows written",
        "otherwise": "transactions that wrote otherwise",
        "claims": "ids that could be claimed again",
    }
    facts += [(label, _marked(effects[name])) for name, label in written.items() if effects.get(name) is not None]
    sequences = effects.get("sequences")
    if sequences is not None:
        facts.append(("sequences moved", _values(sequences) if sequences else _marked(0)))
    return _section(
        "What messages that were applied would do again",
        _facts(facts),
        _table("Rows written, for each table", [("table", "name"), *((name, "n") for name in columns)], rows)
        if tables
        else None,
        el("p", f"How it was counted: {effects['how']}") if effects.get("how") else None,
    )


def _partitions(found: Row) -> Html | None:
    partitions: Sequence[Row] = found.get("partitions") or ()
    if not partitions:
        return None
    every = _names(partitions, ("handler", "topic", "partition"))
    names = [name for name in every if name == TOTAL or any(row.get(name) for row in partitions)]
    empty = [_label(name) for name in every if name not in names]
    largest = max(_whole(row.get(TOTAL)) for row in partitions)
    by_handler: dict[str, list[Row]] = {}
    for row in partitions:
        by_handler.setdefault(str(row.get("handler") or ""), []).append(row)
    tables = [
        _table(
            f"Handler {handler}",
            [("partition", "name"), ("outcomes", "share"), *((_label(name), "n") for name in names)],
            (
                [_place(row), _bar(row, names, largest), *(_count(name, row.get(name)) for name in names)]
                for row in rows
            ),
        )
        for handler, rows in by_handler.items()
    ]
    drawn = [name for name in names if name != TOTAL]
    return _section(
        "By partition",
        _legend(drawn) if drawn else None,
        *tables,
        el("p", f"Zero in every partition: {', '.join(empty)}.", class_="small") if empty else None,
    )


def _bar(row: Row, names: Iterable[str], largest: int) -> Html:
    """As long as what was delivered, beside the largest; in it, how the messages ended. The numbers stand beside it."""
    total = _whole(row.get(TOTAL))
    parts = [(name, _whole(row.get(name))) for name in names if name != TOTAL]
    parts = [(name, count) for name, count in parts if count]
    length = 100 * total / largest if largest else 0.0
    scale = length / max(total, sum(count for _, count in parts), 1)
    # One missing message in a million is there to be seen. The widest part gives what that needs.
    widths = [max(count * scale, 2.0 if name in GRAVE else 0.0) for name, count in parts]
    over = sum(widths) - length
    if over > 0 and widths:
        widths[widths.index(max(widths))] = max(0.0, max(widths) - over)
    rects, at = [f'<rect class="rest" width="{length:.2f}" height="8"/>'], 0.0
    for (name, _), width in zip(parts, widths, strict=True):
        rects.append(f'<rect class="{_shade(name)}" x="{at:.2f}" width="{width:.2f}" height="8"/>')
        at += width
    return el("svg", Html("".join(rects)), viewBox="0 0 100 8", preserveAspectRatio="none", aria_hidden="true")


def _legend(names: Iterable[str], totals: Mapping[str, int] | None = None) -> Html:
    return el(
        "ul",
        *(
            el(
                "li",
                el("span", class_=f"swatch {_shade(name)}"),
                _label(name),
                None if totals is None else el("b", f" {totals.get(name, 0):,}"),
            )
            for name in names
        ),
        class_="legend",
    )


def _times(found: Row) -> Html | None:
    times = found.get("times")
    if not times or not (times.get("buckets") or times.get("untimed")):
        return None
    buckets: Sequence[Row] = times.get("buckets") or ()
    untimed: Row = times.get("untimed") or {}
    names = [name for name in _names([*buckets, untimed], ("at",)) if name != TOTAL]
    totals = {name: sum(_whole(row.get(name)) for row in (*buckets, untimed)) for name in names}
    width = _span(times.get("width_seconds"))
    rows = [[_when(row.get("at")), *(_count(name, row.get(name) or 0) for name in names)] for row in buckets]
    if untimed:
        rows.append([Html("no usable time"), *(_count(name, untimed.get(name) or 0) for name in names)])
    without = ", ".join(f"{_label(name)} {_number(count)}" for name, count in untimed.items())
    return _section(
        "By time",
        el("p", f"By the time of each record, in steps of {width}. Times are UTC, set by the producer or the broker."),
        _legend(names, totals),
        _chart(buckets, names, times.get("width_seconds")),
        el("p", f"Without a usable time: {without}.") if untimed else None,
        el(
            "details",
            el("summary", f"The numbers of the chart ({_several(len(rows), 'row', 'rows')})"),
            _table(
                f"Messages in steps of {width}, by how they ended",
                [("from", "name"), *((_label(name), "n") for name in names)],
                rows,
            ),
        ),
    )


def _span(seconds: object) -> str:
    if isinstance(seconds, int) and seconds > 0:
        for size, one, many in ((86400, "day", "days"), (3600, "hour", "hours"), (60, "minute", "minutes")):
            if seconds % size == 0:
                return _several(seconds // size, one, many)
        return _several(seconds, "second", "seconds")
    return f"{_number(seconds)} seconds"


def _chart(buckets: Sequence[Row], names: Sequence[str], width: object) -> Html | None:
    """Stacked bars on a scale of time, drawn to fill what room there is; all text beside it, so that none is stretched."""
    starts = [_moment(row.get("at")) for row in buckets]
    sound = [each for each in starts if each is not None]
    if not sound or len(sound) != len(starts) or not isinstance(width, int) or width < 1:
        return None
    first, step = min(sound), timedelta(seconds=width)
    slots = (max(sound) - first) // step + 1
    if slots > SLOTS_MAX:
        return None
    tops = [sum(_whole(row.get(name)) for name in names) for row in buckets]
    tick = _tick(max(tops))
    top = max(1, -(-max(tops) // tick)) * tick
    bars, marks = [], []
    gap = 0.12 if slots <= 120 else 0.0
    for at, row, total in zip(sound, buckets, tops, strict=True):
        slot, under = (at - first) // step, 100.0
        told = ", ".join(f"{_label(name)} {_whole(row.get(name)):,}" for name in names if row.get(name))
        rects = [f'<rect class="air" x="{slot}" width="1" height="100"/>']
        for name in names:
            height = 100 * _whole(row.get(name)) / top
            if height:
                under -= height
                box = f'x="{slot + gap / 2:g}" y="{under:.3f}" width="{1 - gap:g}" height="{height:.3f}"'
                rects.append(f'<rect class="{_shade(name)}" {box}/>')
        label = f"{at:%Y-%m-%d %H:%M:%S} UTC, {_several(total, 'message', 'messages')}: {told}"
        bars.append(el("g", el("title", label), Html("".join(rects))))
        for name in GRAVE:
            if row.get(name):
                marks.append(f'<rect class="{_shade(name)}" x="{slot}" width="1" height="8"/>')
                break
    size = {"viewBox": f"0 0 {slots} 100", "preserveAspectRatio": "none"}
    grid = "".join(
        f'<div class="tick" style="bottom:{100 * each / top:.3f}%"><span>{each:,}</span></div>'
        for each in range(0, top + 1, tick)
    )
    last = max(sound) + step
    axis = [f"{_stand(first)}", f"{_stand(first + (last - first) / 2)}", f"{_stand(last)}"]
    grave = [told for name, told in GRAVE.items() if any(row.get(name) for row in buckets)]
    return el(
        "figure",
        el(
            "div",
            Html(grid),
            el("svg", *bars, role="img", aria_label="Messages by time; the table below has the numbers", **size),
            class_="plot",
        ),
        el("svg", Html("".join(marks)), aria_hidden="true", class_="marks", **{**size, "viewBox": f"0 0 {slots} 8"})
        if marks
        else None,
        el("div", Html("".join(axis if slots > 1 else [axis[0], axis[2]])), class_="axis"),
        el("figcaption", f"The marks below the bars are where something is {' or '.join(grave)}.") if marks else None,
        style=f"--gutter:{len(f'{top:,}')};max-width:{max(320, 48 * slots)}px",
    )


def _tick(highest: int) -> int:
    """A round step that divides what is drawn into four parts at most."""
    power = 1
    while True:
        for times in (1, 2, 5):
            if highest <= 4 * times * power:
                return times * power
        power *= 10


def _stand(at: datetime) -> Html:
    shown = Html(f"{at:%Y-%m-%d}<br>{at:%H:%M:%S}")
    return el("time", shown, datetime=at.strftime("%Y-%m-%dT%H:%M:%SZ"))


def _history(found: Row) -> Html | None:
    history: Mapping[str, Row] = found.get("history") or {}
    if not history:
        return None
    rows = [
        [
            _code(handler),
            _count("", row.get("rows")),
            _count("", row.get("with_message")),
            _count("missing", row.get("without_message")),
        ]
        for handler, row in history.items()
    ]
    columns = [("handler", "name"), ("rows in the ledger", "n"), ("with a message", "n"), ("without one", "n")]
    return _section(
        "The ledger against the log", _table("Rows of the ledger that a message accounts for", columns, rows)
    )


def _precheck(found: Row) -> Html | None:
    precheck = found.get("precheck")
    if not precheck:
        return None
    return _section(
        "Redis",
        _facts(
            [
                ("asked about", _number(precheck.get("asked"))),
                ("marked as seen", _number(precheck.get("hits"))),
                ("marked, but not in the ledger", _marked(precheck.get("wrong"))),
                ("unanswered", _number(precheck.get("unanswered"))),
            ]
        ),
    )


def _rebuilt(found: Row) -> Html | None:
    tables: Sequence[Row] = (found.get("rebuild") or {}).get("tables") or ()
    if not tables:
        return None
    counts = ("rows", "rebuilt", "missing", "extra", "different")
    marked = ("missing", "extra", "different")
    rows = [
        [
            _name(row.get("table")),
            *(_count("missing" if name in marked else "", row.get(name)) for name in counts),
            _values(row["matched_by"]) if row.get("matched_by") else "all columns",
            _ignored(row.get("ignored") or {}),
        ]
        for row in tables
    ]
    columns = [
        ("table", "name"),
        ("rows", "n"),
        ("from the topic", "n"),
        *((name, "n") for name in marked),
        ("matched by", "wide"),
        ("not compared", "wide"),
    ]
    return _section("Rebuilt tables", _table("The database against what the topic gives", columns, rows))


def _ignored(columns: Mapping[str, Any]) -> Html:
    if not columns:
        return el("span", "nothing", class_="small")
    return Html("".join(el("div", _code(name), el("span", f" {why}", class_="small")) for name, why in columns.items()))


def _differences(found: Row) -> Html | None:
    differences: Sequence[Row] = (found.get("rebuild") or {}).get("differences") or ()
    if not differences:
        return None
    rows = []
    for each in differences:
        columns: Mapping[str, Row] = each.get("columns") or {}
        rows.append(
            [
                el("span", each.get("kind"), class_="kind"),
                _name(each.get("table")),
                _values(each.get("key")),
                _sides(columns, str(each.get("kind"))),
                _count("", each.get("count")),
                Html("".join(el("div", _code(message)) for message in each.get("messages") or ())),
            ]
        )
    kinds = [kind for kind in DIFFERENCES if any(each.get("kind") == kind for each in differences)]
    columns_shown = [
        ("kind", "name"),
        ("table", ""),
        ("key", "wide"),
        ("values", "wide"),
        ("rows", "n"),
        ("messages", "id"),
    ]
    return _section(
        "Differences",
        _facts([(kind, DIFFERENCES[kind]) for kind in kinds], "words"),
        _table("Where the database and the topic disagree", columns_shown, rows),
    )


def _sides(columns: Mapping[str, Row], kind: str) -> Html:
    """Each column's two values, one below the other, so that a different digit stands below its fellow."""
    lines = []
    for name, sides in columns.items():
        pairs = [
            el("dd", el("span", label, class_="side"), _code(sides.get(side)))
            for side, label, absent in (("real", "database", "missing"), ("rebuilt", "topic", "extra"))
            if kind != absent or sides.get(side) is not None
        ]
        lines.append(el("div", el("dt", _code(name)), *pairs))
    return el("dl", *lines, class_="sides") if lines else el("span", _ABSENT, class_="small")


def _republished(found: Row) -> Html | None:
    copied = found.get("republish")
    if not copied:
        return None
    return _section(
        "Copied to another topic",
        _facts(
            [
                ("topic", _name(copied.get("topic"))),
                ("copied", _number(copied.get("copied"))),
                ("refused", _number(copied.get("refused"))),
            ]
        ),
    )


def _samples(found: Row) -> Html | None:
    samples: Sequence[Row] = found.get("samples") or ()
    if not samples:
        return None
    rows = [
        [
            el("span", _label(each.get("kind")), class_="kind"),
            _name(each.get("handler")),
            _place(each),
            _number(each.get("offset")),
            _name(each.get("id")),
            each.get("detail"),
        ]
        for each in samples
    ]
    columns = [
        ("kind", "name"),
        ("handler", ""),
        ("partition", "line"),
        ("offset", "n"),
        ("message id", "id"),
        ("detail", "wide"),
    ]
    return _section("Examples", _table("Messages to look at", columns, rows))


def _ranges(found: Row) -> Html | None:
    ranges: Sequence[Row] = found.get("ranges") or ()
    if not ranges:
        return None
    names = ("from", "to", "position", "read")
    columns = [
        ("partition", "name"),
        ("from offset", "n"),
        ("before offset", "n"),
        ("position of the app", "n"),
        ("messages read", "n"),
    ]
    rows = ([_place(row), *(_number(row.get(name)) for name in names)] for row in ranges)
    return _section("What was read", _table("Offsets of each partition", columns, rows))


def _footer(found: Row) -> Html:
    facts: list[tuple[str, object]] = [("app", _code(found["app"])), ("mode", _code(found["mode"]))]
    if found.get("started_at") is not None:
        facts.append(("started", _when(found["started_at"])))
    if found.get("seconds") is not None:
        facts.append(("took", _duration(found["seconds"])))
    if found.get("messages") is not None:
        facts.append(("messages", _number(found["messages"])))
    if found.get("messages_per_second") is not None:
        facts.append(("messages per second", _number(found["messages_per_second"])))
    for name, value in (found.get("filters") or {}).items():
        facts.append((name.replace("_", " "), el("span", "all", class_="small") if value is None else _values(value)))
    if found.get("exit_code") is not None:
        facts.append(("exit code", _number(found["exit_code"])))
    return el(
        "footer",
        el("h2", "How it was run"),
        _facts(facts),
        el("p", "This page stands by itself: no script, and nothing of it is fetched from elsewhere.", class_="small"),
    )


_STYLE = """
:root{color-scheme:light dark;--back:#fff;--line:#d9dde1;--text:#1c2126;--soft:#545d66;
--ok:#166534;--ok-back:#edf7f0;--no:#b01c1c;--no-back:#fdf0ef;--unknown:#805200;--unknown-back:#fdf6e5;
--applied:#2f6db5;--repeated:#d5727c;--dead:#c08213;--skipped:#8d959d;--conflicts:#8b4fae;--unreadable:#7d5a3c;
--odd:#4a4f55;--missing:#d01f2e;--now:#17877b;--dead-now:#9a6510;--rest:#e6e9ec}
@media screen and (prefers-color-scheme:dark){:root{--back:#12161a;--line:#343c45;--text:#e4e8ec;
--soft:#a3adb7;--ok:#6fd08c;--ok-back:#14271b;--no:#ff9b92;--no-back:#331918;--unknown:#ecc063;--unknown-back:#2c2411;
--applied:#5e9be0;--repeated:#f0a7ad;--dead:#dba13c;--skipped:#7d8690;--conflicts:#b98ad6;--unreadable:#b58d69;
--odd:#c5cbd1;--missing:#ff5f5f;--now:#3fb8a9;--dead-now:#c48a30;--rest:#2b333b}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:72rem;padding:1.25rem clamp(.9rem,3vw,2rem) 3rem;background:var(--back);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:clamp(1.25rem,1rem + 1.6vw,1.7rem);line-height:1.25;margin:0;color:var(--tone)}
h1.long{font-size:1.15rem;line-height:1.4}
h2{font-size:1.05rem;line-height:1.3;margin:2.25rem 0 .5rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
p,ul,dl{margin:.5rem 0}
p{max-width:46rem}
code{font:.93em/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:break-spaces}
em{color:var(--soft)}
time{white-space:nowrap}
.esc{color:var(--no);border:1px solid;border-radius:3px;padding:0 .15em;margin:0 .1em;font-size:.9em}
.small,.kind,caption,figcaption,.axis,dt,.run{color:var(--soft);font-size:.86rem}
.run{margin:0 0 .6rem}
.verdict{display:flex;gap:.9rem;padding:1rem 1.1rem;border:1px solid var(--tone);border-left-width:6px;border-radius:6px;
background:var(--tint)}
.verdict>div{min-width:0}
.verdict p{margin:.4rem 0 0}
.verdict svg{flex:none;width:2rem;height:2rem;fill:none;stroke:var(--tone);stroke-width:3;stroke-linecap:round;
stroke-linejoin:round}
.part{font-weight:600}
.ok{--tone:var(--ok);--tint:var(--ok-back)}
.no{--tone:var(--no);--tint:var(--no-back)}
.unknown{--tone:var(--unknown);--tint:var(--unknown-back)}
.figures{display:flex;flex-wrap:wrap;gap:.5rem 2.25rem;margin:.9rem 0 0}
.figures dd{font-size:1.1rem;font-weight:600}
dd{margin:0;font-variant-numeric:tabular-nums;min-width:0}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(clamp(9.4rem,18vw,12rem),1fr));gap:.5rem 1.5rem}
.facts>div{display:flex;flex-direction:column;justify-content:space-between}
.words>div{display:grid;grid-template-columns:min(9rem,30%) 1fr;gap:.75rem;padding:.1rem 0}
.words dt{color:inherit;font-weight:600}
.told{list-style:none;padding:0;display:grid;grid-template-columns:max-content minmax(0,1fr);column-gap:.9rem}
.told li{display:grid;grid-template-columns:max-content minmax(0,1fr);grid-template-columns:subgrid;grid-column:1/-1;column-gap:.9rem;padding:.45rem .7rem;margin:.3rem 0;
background:var(--tint);border-left:4px solid var(--tone)}
.count{font-weight:700;text-align:right;font-variant-numeric:tabular-nums;color:var(--tone)}
.notes{padding-left:1.2rem}
.scroll{overflow-x:auto;margin:.6rem 0 1rem;background:linear-gradient(to left,var(--back) 40%,transparent) right/2.5rem 100%
no-repeat local,linear-gradient(to left,var(--line),transparent) right/.8rem 100% no-repeat scroll}
:focus-visible{outline:2px solid var(--applied);outline-offset:2px}
table{border-collapse:separate;border-spacing:0;font-size:.89rem}
caption{text-align:left;padding:.1rem 0 .35rem}
caption span{position:sticky;left:0;display:inline-block;max-width:min(46rem,calc(100vw - 1.8rem))}
th,td{padding:.3rem .55rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);unicode-bidi:isolate;
overflow-wrap:break-word;max-width:26rem}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom;overflow-wrap:normal}
tbody th{font-weight:400;position:sticky;left:0;background:var(--back);min-width:6.5rem;max-width:min(20rem,44vw)}
th:first-child{padding-left:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;min-width:4rem}
.zero{color:var(--soft)}
td.missing{background:var(--no-back)}
.n.missing{color:var(--no);font-weight:700}
td.unknown{color:var(--unknown);font-weight:700;background:var(--unknown-back)}
.n.missing::before{content:"\\25B2\\00A0";content:"\\25B2\\00A0"/"";font-size:.7em}
.partition{font-variant-numeric:tabular-nums;color:var(--soft)}
.line{white-space:nowrap}
.wide{min-width:13rem}
.id{min-width:19.5rem}
.share{min-width:9rem}
.share svg{display:block;width:100%;height:.7rem;margin-top:.35rem}
td .small,th .kind,.sides .side{font-size:.95em}
.sides{margin:0}
.sides dt{color:inherit}
.sides dd{display:flex;gap:.6rem}
.side{flex:none;width:4.5rem;color:var(--soft);font-size:.86rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0;font-size:.86rem}
.swatch{display:inline-block;width:.8em;height:.8em;margin-right:.45em;border-radius:2px;background:var(--c)}
rect{fill:var(--c)}
.air{fill:transparent}
.rest{fill:var(--rest)}
g:hover .air{fill:var(--rest)}
figure{margin:1.2rem 0 .75rem}
figure{padding-left:calc(var(--gutter)*.55rem + .5rem)}
.plot{position:relative;height:12rem}
.plot svg{position:absolute;inset:0;width:100%;height:100%}
.tick{position:absolute;left:0;right:0;border-top:1px solid var(--line)}
.tick span{position:absolute;right:100%;bottom:0;transform:translateY(50%);padding-right:.5rem;font-size:.8rem;white-space:nowrap;
line-height:1;color:var(--soft);font-variant-numeric:tabular-nums}
.marks{display:block;width:100%;height:.5rem;margin-top:3px}
.axis{display:flex;justify-content:space-between;margin-top:.3rem;line-height:1.3;font-variant-numeric:tabular-nums}
.axis time:nth-child(2){text-align:center}
.axis time:last-child{text-align:right}
details{margin:.5rem 0}
summary{cursor:pointer;color:var(--soft);font-size:.89rem;padding:.25rem 0}
.o-applied{--c:var(--applied)}.o-repeated{--c:var(--repeated)}.o-dead_lettered{--c:var(--dead)}
.o-skipped{--c:var(--skipped)}.o-conflicts{--c:var(--conflicts)}.o-unreadable{--c:var(--unreadable)}
.o-unknown{--c:var(--odd)}.o-missing{--c:var(--missing)}.o-applied_now{--c:var(--now)}
.o-dead_lettered_now{--c:var(--dead-now)}.o-other{--c:var(--soft)}
footer{margin-top:3rem}
@media print{html{font-size:9.5pt}body{max-width:none;padding:0;font-size:1rem}table{font-size:.8rem}th,td{padding:.2rem .35rem}
.scroll{overflow:visible}tr,li,figure{break-inside:avoid}h2{break-after:avoid}
tbody th{position:static}details::details-content{content-visibility:visible;block-size:auto}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""
