"""Draw counts over time as stacked bars.

The drawing fills its space. All text is beside it, so that none is stretched. It has no inline style, which a strict
content security policy refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from consumer.replay.html.counts import GRAVE, label, shade
from consumer.replay.html.elements import Html, el
from consumer.replay.html.values import JsonRow, drawn_count, moment, several

SLOTS_MAX = 1000  # of the chart; a timeline makes 240
_FEW = 16  # bars that would be too wide in the whole width


class _Scale(NamedTuple):
    """The scale of a chart.

    first: the time of the first slot. width: of a slot. top: the highest count of the scale.
    """

    first: datetime
    width: timedelta
    slots: int
    top: int

    def slot(self, at: datetime) -> int:
        return (at - self.first) // self.width


def chart(buckets: Sequence[JsonRow], names: Sequence[str], width_seconds: object) -> Html | None:
    """Return the chart of these buckets; None where they cannot be drawn."""
    moments = [moment(row.get("at")) for row in buckets]
    starts = [at for at in moments if at is not None]
    if not starts or len(starts) != len(moments) or not isinstance(width_seconds, int) or width_seconds < 1:
        return None
    first, width = min(starts), timedelta(seconds=width_seconds)
    slots = (max(starts) - first) // width + 1
    if slots > SLOTS_MAX:
        return None
    totals = [sum(drawn_count(row.get(name)) for name in names) for row in buckets]
    tick = _tick(max(totals))
    scale = _Scale(first, width, slots, max(1, -(-max(totals) // tick)) * tick)
    bars = [_bar(scale, at, row, names, total) for at, row, total in zip(starts, buckets, totals, strict=True)]
    marks = [mark for at, row in zip(starts, buckets, strict=True) for mark in _mark(scale.slot(at), row)]
    grave = [text for name, text in GRAVE.items() if any(row.get(name) for row in buckets)]
    size = {"viewBox": f"0 0 {slots} 100", "preserveAspectRatio": "none"}
    counts = range(0, scale.top + 1, tick)
    return el(
        "figure",
        el("div", *(el("span", f"{count:,}") for count in reversed(counts)), class_="scale"),
        el(
            "div",
            el(
                "svg",
                *(_line(slots, 100 - 100 * count / scale.top) for count in counts),
                *bars,
                role="img",
                aria_label="Messages by time; the table below has the numbers",
                **size,
            ),
            class_="plot",
        ),
        el("svg", Html("".join(marks)), aria_hidden="true", class_="marks", **{**size, "viewBox": f"0 0 {slots} 8"})
        if marks
        else None,
        _axis(scale, max(starts) + width),
        el("figcaption", f"The marks below the bars are where something is {' or '.join(grave)}.") if marks else None,
        class_="few" if slots <= _FEW else None,
    )


def _bar(scale: _Scale, at: datetime, row: JsonRow, names: Sequence[str], total: int) -> Html:
    """Return the bar of one bucket, with its numbers as a title."""
    slot, under = scale.slot(at), 100.0
    gap = 0.12 if scale.slots <= 120 else 0.0
    rects = [f'<rect class="air" x="{slot}" width="1" height="100"/>']
    for name in names:
        height = 100 * drawn_count(row.get(name)) / scale.top
        if height:
            under -= height
            box = f'x="{slot + gap / 2:g}" y="{under:.3f}" width="{1 - gap:g}" height="{height:.3f}"'
            rects.append(f'<rect class="{shade(name)}" {box}/>')
    counts = ", ".join(f"{label(name)} {drawn_count(row.get(name)):,}" for name in names if row.get(name))
    title = f"{at:%Y-%m-%d %H:%M:%S} UTC, {several(total, 'message', 'messages')}: {counts}"
    return el("g", el("title", title), Html("".join(rects)))


def _mark(slot: int, row: JsonRow) -> list[str]:
    """Return the mark of a bucket that has a problem."""
    marks = [f'<rect class="{shade(name)}" x="{slot}" width="1" height="8"/>' for name in GRAVE if row.get(name)]
    return marks[:1]


def _line(slots: int, at: float) -> Html:
    """Return a line of the grid."""
    return Html(f'<path class="grid" vector-effect="non-scaling-stroke" d="M0 {at:.3f}H{slots}"/>')


def _axis(scale: _Scale, last: datetime) -> Html:
    """Return the times of the beginning, the middle and the end."""
    first = scale.first
    times = [_two_lines(first), _two_lines(first + (last - first) / 2), _two_lines(last)]
    return el("div", Html("".join(times if scale.slots > 1 else [times[0], times[2]])), class_="axis")


def _tick(highest: int) -> int:
    """Return a round step that divides the height into at most four."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if highest <= 4 * factor * power:
                return factor * power
        power *= 10


def _two_lines(at: datetime) -> Html:
    shown = Html(f"{at:%Y-%m-%d}<br>{at:%H:%M:%S}")
    return el("time", shown, datetime=at.strftime("%Y-%m-%dT%H:%M:%SZ"))
