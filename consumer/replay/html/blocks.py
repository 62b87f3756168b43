"""Build the blocks of a section: heading, facts, table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from consumer.replay.html.counts import Cell
from consumer.replay.html.elements import Html, el
from consumer.replay.html.values import number


def section(title: str, *children: object) -> Html:
    """Return a section with its heading."""
    return el("section", el("h2", title), *children)


def fact_list(pairs: Sequence[tuple[str, object]], kind: str = "facts") -> Html | None:
    """Return names with their values; None where there are none."""
    if not pairs:
        return None
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in pairs), class_=kind)


def marked(value: object) -> Html:
    """Return a number that should be zero, outside a table."""
    return el("span", number(value), class_="n missing" if value else "n")


def data_table(caption: str, columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table of columns (heading, class).

    The first cell of a row is its heading. The table scrolls in a box of its own, which the keyboard can reach.
    """
    body = []
    for row in rows:
        cells = [el("th", row[0], scope="row", class_=columns[0][1] or None)]
        for cell, (_, kind) in zip(row[1:], columns[1:], strict=True):
            cells.append(cell if isinstance(cell, Cell) else el("td", cell, class_=kind or None))
        body.append(el("tr", *cells))
    head = el("tr", *(el("th", name, scope="col", class_=kind or None) for name, kind in columns))
    inner = el("table", el("caption", el("span", caption)), el("thead", head), el("tbody", *body))
    return el("div", inner, class_="scroll", role="region", tabindex="0", aria_label=caption)
