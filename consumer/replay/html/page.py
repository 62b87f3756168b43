"""Render the findings of a replay as one HTML page.

The verdict comes first, then every number. The page is self-contained: it has no script and no address, and its style
is inside, so that it can be mailed, printed and kept. An absent part of the findings is left out.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from consumer.replay.html import outgoing_sections, rebuild_sections, sections
from consumer.replay.html.elements import Html, el, plain
from consumer.replay.html.values import JsonRow


def render(findings: JsonRow) -> str:
    """Return the page of findings, as `Findings.as_dict` returns them.

    Its text can be written as UTF-8, whatever the findings hold.
    """
    verdict = _verdict_of(findings)
    headline = sections.headline(findings, verdict)
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
            el("title", f"{plain(findings['app'])}: {plain(headline)}"),
            el("style", Html(f"\n{style()}")),
        ),
        el(
            "body",
            sections.header(findings, verdict, headline),
            el("main", *_parts(findings, verdict)),
            sections.footer(findings, "This page is self-contained: it has no script and loads nothing."),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def article(findings: JsonRow) -> Html:
    """Return the same for a page that has this style."""
    verdict = _verdict_of(findings)
    header = sections.header(findings, verdict, sections.headline(findings, verdict))
    return el("article", header, *_parts(findings, verdict), sections.footer(findings))


def _verdict_of(findings: JsonRow) -> str:
    return findings["verdict"] if findings["verdict"] in sections.SHAPES else "unknown"


def _parts(findings: JsonRow, verdict: str) -> tuple[Html | None, ...]:
    """Return the sections; None for an absent one."""
    return (
        sections.reasons("Problems", findings.get("problems"), "no"),
        sections.reasons(
            "Why the answer is unknown" if verdict == "unknown" else "What is unknown",
            findings.get("unknown"),
            "unknown",
        ),
        sections.notes(findings),
        sections.handlers(findings),
        sections.effects(findings),
        sections.partitions(findings),
        sections.times(findings),
        sections.history(findings),
        sections.precheck(findings),
        rebuild_sections.tables(findings),
        rebuild_sections.differences(findings),
        outgoing_sections.topics(findings),
        outgoing_sections.differences(findings),
        sections.republished(findings),
        sections.samples(findings),
        sections.ranges(findings),
    )


@cache
def style() -> str:
    """Return the style sheet of the page."""
    return (resources.files(__package__) / "style.css").read_text("utf-8")
