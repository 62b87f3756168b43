"""Show counts of outcomes: names, order, colours and cells.

Problems are never overlooked: cells are marked, bars have a least width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from consumer.replay.html.elements import Html, el
from consumer.replay.html.values import JsonRow, drawn_count, number
from consumer.replay.outcomes import OF_THIS_RUN, OUTCOMES, CountedOutcome

TOTAL = "delivered"
_FIRST = ("applied", "missing", "repeated", "unknown")  # of the columns; the others follow in their own order
# What is counted, in the order of columns. Every delivery ended in exactly one of those below the first.
COUNTS: Mapping[str, CountedOutcome] = {
    TOTAL: CountedOutcome("delivered", "read from the topic for this handler; the sum of the others"),
    **{name: OUTCOMES[name] for name in _FIRST},
    **{name: outcome for name, outcome in OUTCOMES.items() if name not in _FIRST},
}
# What a worker counts beside these: duplicates by cause, as the console shows them.
DUPLICATES: Mapping[str, str] = {
    "duplicate_batch": "duplicate in its batch",
    "duplicate_precheck": "duplicate in Redis",
    "duplicate_ledger": "duplicate in the ledger",
    "duplicate_dead_letter": "duplicate of a dead letter",
}
# Marked in tables, and below the chart, where one of 200,000 would be no pixel high.
GRAVE = {"missing": "missing", "unknown": "in doubt"}


class Cell(Html):
    """A complete `td` element."""

    __slots__ = ()


def count_cell(name: str, value: object) -> Cell:
    """Return the cell of a count: zero is pale, problems are marked."""
    kind = "zero" if not value else name if name in GRAVE else ""
    return Cell(el("td", number(value), class_=f"n {kind}".strip()))


def label(name: object) -> str:
    """Return what an outcome, or a kind of anything, is called."""
    if name in COUNTS:
        return COUNTS[str(name)].title
    return DUPLICATES.get(str(name)) or str(name or "").replace("_", " ")


def shade(name: str) -> str:
    """Return the class of an outcome's colour; unknown names share one."""
    return f"o-{name}" if name in COUNTS or name in DUPLICATES else "o-other"


def present_counts(rows: Iterable[JsonRow], beside: Iterable[str] = ()) -> list[str]:
    """Return the counts that these rows have, in the order of columns.

    beside: keys that are no counts. What this run did is left out where it did nothing.
    """
    rows = list(rows)
    present = {name: None for row in rows for name in row if name not in set(beside)}
    for name in OF_THIS_RUN:
        if not any(row.get(name) for row in rows):
            present.pop(name, None)
    return [name for name in COUNTS if name in present] + [name for name in present if name not in COUNTS]


def legend(names: Iterable[str], totals: Mapping[str, int] | None = None) -> Html:
    """Return the colours of these outcomes, with totals where given."""
    return el(
        "ul",
        *(
            el(
                "li",
                el("span", class_=f"swatch {shade(name)}"),
                label(name),
                None if totals is None else el("b", f" {totals.get(name, 0):,}"),
            )
            for name in names
        ),
        class_="legend",
    )


def bar(row: JsonRow, names: Iterable[str], largest: int) -> Html:
    """Return a bar of the outcomes of one partition.

    Its length is what was delivered, relative to the largest partition. The numbers are beside it.
    """
    total = drawn_count(row.get(TOTAL))
    parts = [(name, drawn_count(row.get(name))) for name in names if name != TOTAL]
    parts = [(name, count) for name, count in parts if count]
    length = 100 * total / largest if largest else 0.0
    scale = length / max(total, sum(count for _, count in parts), 1)
    # One missing message in a million must be visible. The widest part gives what that needs.
    widths = [max(count * scale, 2.0 if name in GRAVE else 0.0) for name, count in parts]
    over = sum(widths) - length
    if over > 0 and widths:
        widths[widths.index(max(widths))] = max(0.0, max(widths) - over)
    rects, at = [f'<rect class="rest" width="{length:.2f}" height="8"/>'], 0.0
    for (name, _), width in zip(parts, widths, strict=True):
        rects.append(f'<rect class="{shade(name)}" x="{at:.2f}" width="{width:.2f}" height="8"/>')
        at += width
    return el("svg", Html("".join(rects)), viewBox="0 0 100 8", preserveAspectRatio="none", aria_hidden="true")
