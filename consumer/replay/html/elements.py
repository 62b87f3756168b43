"""Turn text into HTML elements: the only place that escapes.

Names and values come from topics and tables, and may be hostile. They are shown as they are; characters that cannot be
seen are shown as escapes.
"""

from __future__ import annotations

import html

# Longer text says little more to a reader; the JSON report has all of it.
TEXT_MAX = 2000


class Html(str):
    """Markup that this package wrote.

    Any other text is escaped where it enters an element.
    """

    __slots__ = ()

    def __html__(self) -> str:
        """Return itself: templates that escape leave it as it is."""
        return self


def el(name: str, *children: object, **attributes: object) -> Html:
    """Return an element.

    Children that are not Html are text. Children and attributes that are None are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name == "title":  # holds text alone, in HTML
        inner = "".join(html.escape(plain(child)) for child in children)
    else:
        inner = "".join(child if isinstance(child, Html) else escaped(child) for child in children if child is not None)
    return Html(f"<{name}{written}>{inner}</{name}>")


def escaped(value: object) -> Html:
    """Return a value as text; invisible characters become marked escapes."""
    shown, cut = _shortened(str(value))
    if shown.isprintable():
        markup = html.escape(shown)
    else:
        markup = "".join(
            html.escape(character) if character.isprintable() else f'<span class="esc">{_escape(character)}</span>'
            for character in shown
        )
    return Html(markup + cut)


def escaped_lines(text: str) -> Html:
    """Return a whole text of several lines, for an element like `pre`."""
    return Html(
        "".join(
            html.escape(character)
            if character.isprintable() or character in "\n\t"
            else f'<span class="esc">{_escape(character)}</span>'
            for character in text
        )
    )


def plain(value: object) -> str:
    """Return a value as text for places where no markup can stand."""
    shown, cut = _shortened(str(value))
    return "".join(character if character.isprintable() else _escape(character) for character in shown) + cut


def _shortened(value: str) -> tuple[str, str]:
    return (value, "") if len(value) <= TEXT_MAX else (value[:TEXT_MAX], f"… ({len(value):,} characters)")


def _escape(character: str) -> str:
    """Return the Python escape of an invisible character.

    These are control characters, marks that turn or hide text, odd spaces and lone surrogates.
    """
    return character.encode("unicode_escape").decode("ascii")
