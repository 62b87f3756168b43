"""Bars as SVG, readable in light and dark mode.

Without a library, since a table and its picture are all that is needed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

_ROW, _LEFT, _WIDTH, _BAR = 26, 290, 860, 440


def bars(title: str, values: Mapping[str, float], base: str) -> str:
    """Horizontal bars on a linear scale.

    The scale goes up to the largest that is no limit; longer ones are cut, and say so.
    """
    longest = max((v for name, v in values.items() if not name.startswith("limit: aiokafka")), default=1.0)
    height = _ROW * len(values) + 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        "<style>text{fill:#222}.o{fill:#1f6feb}.h{fill:#8c959f}.l{fill:#d0d7de}"
        "@media (prefers-color-scheme:dark){text{fill:#eee}.o{fill:#58a6ff}.h{fill:#8b949e}.l{fill:#484f58}}</style>",
        f'<text x="8" y="22" font-weight="600">{escape(title)}</text>',
    ]
    for number, (name, speed) in enumerate(values.items()):
        top = 38 + number * _ROW
        kind = "o" if name.startswith("ours") else "l" if name.startswith("limit") else "h"
        width = min(speed / longest, 1.0) * _BAR
        cut = " (bar cut)" if speed > longest else ""
        times = f"{speed:,.0f} msg/s, {speed / values[base]:.1f} times{cut}"
        inside = width > _BAR * 0.6
        colour = ' style="fill:#fff"' if inside else ""
        lines += [
            f'<text x="{_LEFT - 8}" y="{top + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="{kind}" x="{_LEFT}" y="{top}" width="{width:.1f}" height="18" rx="2"/>',
            f'<text x="{_LEFT + (6 if inside else width + 6):.1f}" y="{top + 14}"{colour}>{times}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
