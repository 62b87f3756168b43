"""The page of a replay: complete, safe from markup, and readable.

Nothing that was found is lost, and nothing in it is markup but our own. In the second half real Chromium shows it: on a
phone and on a desk, light and dark, with values that try to be script.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from consumer.replay.html.counts import COUNTS, DUPLICATES
from consumer.replay.html.page import render, style
from consumer.replay.timeline import Timeline

OK = "Nothing is missing, nothing happens twice"
ID = "0198c0de-7ab4-7c3e-8f00-1234567890ab"
START = 1_764_061_200_000


def counts(**known: int) -> dict[str, int]:
    return {name: known.get(name, 0) for name in COUNTS}


def full() -> dict[str, Any]:
    """Findings with something in every place."""
    timeline = Timeline()
    for name, number in (("applied", 9000), ("repeated", 700), ("dead_lettered", 90), ("missing", 1)):
        timeline.add([START + n * 7_200_000 // number for n in range(number)], name)
    timeline.add([-1, 0], "applied")
    settle = counts(delivered=200_000, applied=190_999, repeated=9_000, missing=1, applied_now=3)
    return {
        "app": "billing",
        "mode": "check",
        "verdict": "no",
        "exit_code": 1,
        "answer": "1 message is missing",
        "problems": [{"kind": "missing", "count": 1, "text": "1 message is missing: handler settle, offset 77"}],
        "unknown": [{"kind": "before_ledger", "count": 5, "text": "5 messages are older than the ledger"}],
        "notes": ["the topic is compacted"],
        "started_at": "2026-11-25T12:00:00+02:00",
        "seconds": 2.1,
        "messages": 200_000,
        "messages_per_second": 95_238,
        "filters": {"key": "7", "message_id": None, "handlers": ["settle"], "partitions": {"payments": [3, 4]}},
        "ranges": [
            {"topic": "payments", "partition": 3, "from": 10, "until": 25_010, "position": 25_000, "read": 24_999},
            {"topic": "payments", "partition": 4, "from": 0, "until": 25_001, "position": None, "read": 25_002},
        ],
        "handlers": {"settle": settle, "notify": counts(delivered=200_000, applied=200_000)},
        "partitions": [
            {"handler": "settle", "topic": "payments", "partition": 3, **counts(delivered=25_003, missing=1)},
            {"handler": "settle", "topic": "payments", "partition": 4, **counts(delivered=900, applied=850)},
            {"handler": "notify", "topic": "payments", "partition": 3, **counts()},
        ],
        "times": timeline.as_dict(),
        "effects": {
            "transactions": 50,
            "rows": 2,
            "otherwise": 4,
            "claims": 5,
            "tables": {"public.accounts": {"inserted": 0, "updated": 2, "deleted": 0}},
            "sequences": ["public.s"],
            "how": "Every message was given to its handlers again.",
        },
        "history": {"settle": {"rows": 180_000, "with_message": 179_998, "without_message": 2}},
        "precheck": {"asked": 200_001, "hits": 180_001, "wrong": 1, "unanswered": 12},
        "samples": [
            {
                "kind": "missing",
                "handler": "settle",
                "topic": "payments",
                "partition": 3,
                "offset": 77_000,
                "id": ID,
                "detail": "would be applied",
            }
        ],
        "rebuild": {
            "tables": [
                {
                    "table": "public.accounts",
                    "rows": 1000,
                    "rebuilt": 1001,
                    "missing": 2,
                    "extra": 3,
                    "different": 4,
                    "matched_by": ["account"],
                    "ignored": {"opened_at": "default now()"},
                }
            ],
            "differences": [
                {
                    "table": "public.accounts",
                    "kind": "different",
                    "key": {"account": 7},
                    "columns": {"balance": {"real": "1100", "rebuilt": "1000"}, "note": {"real": None, "rebuilt": ""}},
                    "count": 1,
                    "messages": [ID],
                },
                {
                    "table": "public.accounts",
                    "kind": "missing",
                    "key": {"account": 8},
                    "columns": {"balance": {"real": None, "rebuilt": "12"}},
                    "count": 2,
                    "messages": [],
                },
            ],
        },
        "republish": {"topic": "copy", "copied": 100, "refused": 6},
    }


MINIMAL = {"app": "billing", "mode": "check", "verdict": "ok", "answer": OK + "."}


class Parsed(HTMLParser):
    """The page as a tree: every element closed, text by element."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.headings: list[str] = []
        self.style = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"rect", "path"}, tag
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.style += data
            return
        self.texts.append(data)
        if self.open[-1:] in (["h1"], ["h2"]):
            self.headings.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == tag]


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(tree, dict | list) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, key))
    else:
        yield path, tree


def changed(tree: Any, change: Callable[[tuple[Any, ...], Any], Any], path: tuple[Any, ...] = ()) -> Any:
    """A copy with each leaf as `change` makes it."""
    if isinstance(tree, dict) and tree:
        return {key: changed(value, change, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list) and tree:
        return [changed(value, change, (*path, number)) for number, value in enumerate(tree)]
    return change(path, tree)


# Names that the page does not choose: of handlers, tables, columns and filters, and of outcomes that we do not know.
FREE = [
    ("handlers", "settle"),
    ("handlers",),
    ("effects", "tables"),
    ("history",),
    ("filters", "partitions"),
    ("filters",),
    ("times", "untimed"),
    ("rebuild", "tables", 0, "ignored"),
    ("rebuild", "differences", 0, "key"),
    ("rebuild", "differences", 0, "columns"),
]


UNSEEN = "\x00\x1b[31m\n\u202eevil\u200b\ud800"


def payload(number: int, unseen: str) -> str:
    return (
        f"<script>ran=1</script><img src=x onerror='ran=1'>\"' onmouseover='ran=1' style=\"x\"><svg onload=ran=1>"
        f"</td></table></title></style><!-- &amp; {unseen} number{number}."
    )


def hostile(unseen: str) -> tuple[dict[str, Any], int]:
    """Findings whose every text and foreign name is an attack.

    And their number.
    """
    findings, number = full(), 0

    def next_payload() -> str:
        nonlocal number
        number += 1
        return payload(number, unseen)

    def attack(path: tuple[Any, ...], value: Any) -> Any:
        # The page shows whether it is one of three verdicts, not the word; and one time that is none is enough.
        if path == ("verdict",) or (path[-1] == "at" and path[2] > 0) or not isinstance(value, str) or value == "":
            return value
        return next_payload()

    findings = changed(findings, attack)
    for path in FREE:
        place = findings
        for step in path:
            place = place[step]
        for name in list(place)[:1]:
            place[next_payload()] = place.pop(name)
    return findings, number


# Text that can be seen as it is takes a shorter way.
HOSTILE, ATTACKS = hostile(UNSEEN)
HOSTILE_SEEN = hostile("")[0]


# -- what is in it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("findings", [HOSTILE, HOSTILE_SEEN], ids=["unseen", "seen"])
def test_findings_are_shown_as_text(findings: dict[str, Any]) -> None:
    source = render(findings)
    source.encode("utf-8")  # the half of a surrogate is an escape by now
    assert not set(source) & {"\x00", "\x1b", "\u202e", "\u200b", "\ud800"}
    parsed = Parsed(source)
    assert {tag for tag, _ in parsed.elements} <= {tag for tag, _ in Parsed(render(full())).elements}
    names = {name for _, attributes in parsed.elements for name in attributes}
    assert not any(name.startswith("on") or name in {"src", "href", "xlink:href", "srcset", "action"} for name in names)
    shown = set(re.findall(r"number(\d+)\.", parsed.text))
    assert shown == {str(number) for number in range(1, ATTACKS + 1)}
    for escaped in (r"\x00", r"\x1b", r"\n", r"\u202e", r"\u200b", r"\ud800"):
        assert (f'<span class="esc">{escaped}</span>' in source) == (findings is HOSTILE)


def test_page_fetches_nothing_and_runs_nothing() -> None:
    source = render(full())
    parsed = Parsed(source)
    assert source.startswith("<!doctype html>\n<html")
    assert "default-src 'none'; style-src 'unsafe-inline'" in [
        attributes.get("content") for attributes in parsed.named("meta")
    ]
    assert not {"script", "link", "img", "iframe", "base", "form", "a", "use"} & {tag for tag, _ in parsed.elements}
    assert "url(" not in parsed.style and "@import" not in parsed.style and "<" not in parsed.style


def test_every_number_is_there() -> None:
    number = 0
    numbers: dict[tuple[Any, ...], int] = {}

    def count(path: tuple[Any, ...], value: Any) -> Any:
        nonlocal number
        if isinstance(value, bool) or not isinstance(value, int) or path[-1] == "width_seconds":
            return value
        number += 1
        numbers[path] = 1_000_000 + number * 1009
        return numbers[path]

    findings = changed(full(), count)
    parsed = Parsed(render(findings))
    words = set(re.findall(r"[\d,]+\d", "|".join(parsed.texts)))
    # A key or a filter is a value, not a count: it is shown as it is.
    values = {path for path in numbers if "key" in path or path[0] == "filters"}
    missing = {
        path for path, number in numbers.items() if (str(number) if path in values else f"{number:,}") not in words
    }
    assert missing == set()
    assert len(numbers) > 300


def test_values_differ_from_their_absence() -> None:
    parsed = Parsed(render(full()))
    assert "null" in parsed.texts and "empty text" in parsed.texts and "no usable time" in parsed.texts
    assert "None" not in parsed.text
    # A row that the database lacks has no values there, not even null ones.
    findings = full()
    del findings["rebuild"]["differences"][0]
    parsed = Parsed(render(findings))
    assert "null" not in parsed.texts and "database" not in parsed.texts and "12" in parsed.texts


@pytest.mark.parametrize(
    ("change", "headline"),
    [
        ({"verdict": "ok"}, OK),
        (
            {"verdict": "ok", "mode": "rebuild", "answer": "Every row is as it should be"},
            "Every row is as it should be",
        ),
        ({"verdict": "no"}, "No: 1 message is missing"),
        ({"verdict": "no", "answer": "No: 2 are missing"}, "No: 2 are missing"),
        ({"verdict": "no", "answer": "Nothing was read"}, "No: Nothing was read"),
        ({"verdict": "unknown", "answer": "the ledger is younger"}, "Could not tell: the ledger is younger"),
        ({"verdict": "unknown", "answer": "Could not tell: it ended"}, "Could not tell: it ended"),
        ({"verdict": "surely", "answer": "1"}, "Could not tell: 1"),  # what we do not know is no yes
    ],
)
def test_the_verdict_is_the_heading(change: dict[str, Any], headline: str) -> None:
    source = render({**full(), **change})
    parsed = Parsed(source)
    assert parsed.headings[0] == headline
    assert [tag for tag, _ in parsed.elements].count("h1") == 1
    assert f"<title>billing: {headline}</title>" in source
    assert (OK in source) == (headline == OK)
    kinds = [
        attributes["class"]
        for attributes in parsed.named("div")
        if (attributes.get("class") or "").startswith("verdict")
    ]
    assert kinds == [f"verdict {change['verdict'] if change['verdict'] != 'surely' else 'unknown'}"]


def test_beside_a_good_verdict_its_reason_stands_once() -> None:
    assert Parsed(render({**full(), "verdict": "ok", "answer": "All 7 are there."})).text.count("All 7 are there.") == 1
    assert Parsed(render(MINIMAL)).text.count(OK) == 2  # the title and the heading


def test_verdict_says_that_only_a_part_was_looked_at() -> None:
    heading = "Only a part was checked"
    assert f"{heading}: key 7; handlers settle; partitions payments = 3, 4" in Parsed(render(full())).text
    for filters in ({}, None, {"key": None, "message_id": None, "handlers": None, "partitions": None}):
        assert heading not in Parsed(render({**full(), "filters": filters})).text


SECTIONS = {
    "problems": "Problems",
    "unknown": "What is unknown",
    "notes": "Notes",
    "handlers": "By handler",
    "effects": "What applied messages would do again",
    "partitions": "By partition",
    "times": "By time",
    "history": "The ledger against the log",
    "precheck": "Redis",
    "rebuild": "Rebuilt tables",
    "republish": "Copied to another topic",
    "samples": "Examples",
    "ranges": "What was read",
}


def test_the_sections_stand_in_their_order() -> None:
    expected = list(SECTIONS.values())
    expected.insert(expected.index("Rebuilt tables") + 1, "Differences")
    assert Parsed(render(full())).headings == ["No: 1 message is missing", *expected, "How it was run"]
    assert Parsed(render(MINIMAL)).headings == [OK, "How it was run"]


@pytest.mark.parametrize(("name", "heading"), SECTIONS.items())
def test_page_omits_absent_parts(name: str, heading: str) -> None:
    findings = full()
    before = Parsed(render(findings)).headings
    assert heading in before
    gone = {heading, "Differences"} if name == "rebuild" else {heading}
    expected = [part for part in before if part not in gone]
    del findings[name]
    assert Parsed(render(findings)).headings == expected
    nothing: tuple[Any, ...] = (None, [], {})
    for empty in nothing:
        assert Parsed(render({**findings, name: empty})).headings == expected


def test_page_without_any_one_key_is_whole() -> None:
    """The page is whole without any key, and shows no Python.

    Each key is removed alone, and each is null once.
    """
    whole = full()
    del whole["times"]["buckets"][2:]  # all alike
    paths = {path[:length] for path, _ in leaves(whole) for length in range(1, len(path) + 1)}
    names = {path[-1] for path in FREE}
    for path in paths:
        if path[0] in MINIMAL or isinstance(path[-1], int):
            continue
        for remove in (True, False):
            findings = copy.deepcopy(whole)
            place = findings
            for step in path[:-1]:
                place = place[step]
            if remove:
                del place[path[-1]]
            elif len(path) > 1 and path[-2] in names:
                continue  # under a name that comes from elsewhere something stands
            else:
                place[path[-1]] = None
            assert "None" not in Parsed(render(findings)).text, path


def test_tables_say_what_they_are() -> None:
    source = render(full())
    parsed = Parsed(source)
    tables = len(parsed.named("table"))
    assert (
        tables == len(parsed.named("caption")) == source.count('class="scroll" role="region" tabindex="0" aria-label=')
    )
    assert {attributes.get("scope") for attributes in parsed.named("th")} == {"col", "row"}
    for table in re.findall(r"<table>.*?</table>", source):
        rows = [len(re.findall(r"<t[hd][ >]", row)) for row in re.findall(r"<tr>.*?</tr>", table)]
        assert len(set(rows)) == 1 and rows[0] > 1
    assert '<time datetime="2026-11-25T10:00:00Z">2026-11-25 10:00:00 UTC</time>' in source


def test_the_chart_is_as_high_as_what_it_shows() -> None:
    buckets = [
        {"at": "2026-11-25T10:00:00Z", "applied": 300, "missing": 100},
        {"at": "2026-11-25T10:02:00Z", "applied": 200},
    ]
    source = render({**MINIMAL, "times": {"width_seconds": 60, "buckets": buckets, "untimed": {}}})
    assert 'viewBox="0 0 3 100"' in source  # the empty minute has its place
    assert "<title>2026-11-25 10:00:00 UTC, 400 messages: applied 300, missing 100</title>" in source
    bars = re.findall(r'<rect class="o-(\w+)" x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"/>', source)
    assert bars == [
        ("applied", "0.06", "25.000", "75.000"),
        ("missing", "0.06", "0.000", "25.000"),
        ("applied", "2.06", "50.000", "50.000"),
    ]
    doubtful = [*buckets, {"at": "2026-11-25T10:03:00Z", "unknown": 1}]
    assert "is missing or in doubt." in render({**MINIMAL, "times": {"width_seconds": 60, "buckets": doubtful}})
    # One that is missing is no pixel of 200,000: it has a mark of its own.
    assert source.count('height="8"/>') == 1 and "The marks below the bars are where something is missing." in source


@pytest.mark.parametrize(
    "change",
    [
        {"width_seconds": 0},
        {"width_seconds": None},
        {"width_seconds": "1"},
        {"width_seconds": 1, "buckets": [{"at": f"{year}-01-01T00:00:00Z", "applied": 1} for year in (1971, 2199)]},
        {"buckets": [{"at": "soon", "applied": 1}]},
        {"buckets": [{"at": "0001-01-01T00:00:00+14:00", "applied": 1}]},
        {"buckets": [], "untimed": {"applied": 4}},
    ],
)
def test_times_that_cannot_be_drawn_are_named(change: dict[str, Any]) -> None:
    parsed = Parsed(render({**full(), "times": {**full()["times"], **change}}))
    assert "By time" in parsed.headings and parsed.named("figure") == []
    assert any(
        (attributes.get("aria-label") or "").startswith("Messages in steps") for attributes in parsed.named("div")
    )


def test_a_bar_is_no_longer_than_what_was_delivered() -> None:
    rows = [
        {"handler": "h", "topic": "t", "partition": 0, **counts(delivered=1_000_000, applied=999_999, missing=1)},
        {"handler": "h", "topic": "t", "partition": 1, **counts(delivered=500_000, applied=900_000, missing=1)},
        {"handler": "h", "topic": "t", "partition": 2, **counts(delivered=1, missing=1)},
        {"handler": "h", "topic": "t", "partition": 3, **counts()},
    ]
    source = render({**MINIMAL, "partitions": rows})
    bars = re.findall(r'<td class="share">(.*?)</td>', source)
    for bar, length in zip(bars, (100, 50, 0, 0), strict=True):
        widths = {
            name: float(width) for name, width in re.findall(r'class="([\w-]+)"(?: x="[\d.]+")? width="([\d.]+)"', bar)
        }
        assert widths.pop("rest") == length
        assert sum(widths.values()) == pytest.approx(length, abs=0.02)
        assert length == 0 or widths["o-missing"] >= 2  # to be seen at all


def test_a_text_without_end_is_cut() -> None:
    source = render({**MINIMAL, "notes": ["x" * 10_000_000]})
    assert len(source) < 100_000
    assert "… (10,000,000 characters)" in source


@pytest.mark.parametrize("seconds", [0.04, 59.9, 60, 3725.2, 1e9, float("inf"), float("nan"), "long"])
def test_any_duration_has_a_text(seconds: Any) -> None:
    expected = {0.04: "0.0 s", 59.9: "59.9 s", 60: "1 min 0 s", 3725.2: "1 h 2 min", 1e9: "277,777 h 46 min"}
    parsed = Parsed(render({**MINIMAL, "seconds": seconds}))
    assert expected.get(seconds, str(seconds)) in parsed.texts


# -- how it looks -------------------------------------------------------------------------------------------------------


def palettes() -> dict[str, dict[str, str]]:
    light, dark = re.findall(r":root\{([^}]*)\}", style())
    both = [dict(re.findall(r"--([\w-]+):(#[0-9a-f]+)", palette)) for palette in (light, dark)]
    return {"light": both[0], "dark": {**both[0], **both[1]}}


def contrast(one: str, other: str) -> float:
    """By the formula of WCAG 2."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(digit * 2 for digit in colour[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_contrast_with_their_ground(scheme: str) -> None:
    colours = palettes()[scheme]
    for ground in ("back", "ok-back", "no-back", "unknown-back"):
        assert contrast(colours["text"], colours[ground]) > 7
        assert contrast(colours["soft"], colours[ground]) > 4.5
    for tone in ("ok", "no", "unknown"):
        assert contrast(colours[tone], colours[f"{tone}-back"]) > 4.5
        assert contrast(colours[tone], colours["back"]) > 4.5
    shades = re.findall(r"\.o-\w+\{--c:var\(--([\w-]+)\)\}", style())
    assert len(shades) == len(COUNTS) + len(
        DUPLICATES
    )  # all but what was delivered, and one for names that we do not know
    for shade in shades:
        assert contrast(colours[shade], colours["back"]) >= 3, shade


class Chromium:
    """Real Chromium without a window, a fresh profile each time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def dump(self, source: str) -> str:
        """The document after it has loaded."""
        return self._run(source, "--dump-dom")

    def screenshot(self, source: str, width: int, scheme: str) -> bytes:
        target = self._directory / "screenshot.png"
        target.unlink(missing_ok=True)
        colours = f"--blink-settings=preferredColorScheme={'0' if scheme == 'dark' else '1'}"
        self._run(source, f"--screenshot={target}", f"--window-size={width},900", "--hide-scrollbars", colours)
        return target.read_bytes()

    def _run(self, source: str, *arguments: str) -> str:
        path = shutil.which("chromium")
        if path is None:
            pytest.fail("no chromium in PATH: run `make chromium`", pytrace=False)
        file = self._directory / "page.html"
        file.write_text(source, "utf-8")
        command = [
            path,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={self._directory / 'profile'}",
            *arguments,
            file.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, timeout=90, check=False)
        errors = done.stderr.decode("utf-8", "replace")
        if done.returncode != 0:
            pytest.fail(
                f"{path} ended with {done.returncode} (`make chromium` installs one that works): {errors[-2000:]}"
            )
        return done.stdout.decode("utf-8")


@pytest.fixture
def chromium(tmp_path: Path) -> Chromium:
    return Chromium(tmp_path)


_MEASURE = """
addEventListener('load', () => {
  const frames = [...document.querySelectorAll('iframe')].map(frame => {
    const window = frame.contentWindow, document = window.document, root = document.documentElement;
    const inside = [...document.querySelectorAll('body *')].filter(each => !each.closest('.scroll *, svg *'));
    const boxes = [...document.querySelectorAll('.scroll')];
    return {
      name: frame.name,
      ran: 'ran' in window,
      width: window.innerWidth,
      scrolls: root.scrollWidth,
      beyond: inside.filter(each => each.getBoundingClientRect().right > window.innerWidth + 0.5).map(each => each.outerHTML.slice(0, 80)),
      boxes: boxes.filter(each => each.scrollWidth > each.clientWidth + 1).map(each => each.getAttribute('aria-label')),
      reached: boxes.every(each => { each.focus(); return document.activeElement === each || !each.checkVisibility(); }),
    };
  });
  document.title = JSON.stringify(frames);
});
"""


def measured(chromium: Chromium, sources: dict[str, str], widths: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """What a script of ours sees of copies of the pages.

    Each in a frame of each width. One start for all.
    """
    frames = []
    for name, source in sources.items():
        # Without the policy: ours could not run, and theirs would have nothing else in its way.
        free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
        free = free.replace("<details>", "<details open>")
        quoted = free.replace("&", "&amp;").replace('"', "&quot;")
        for width in widths:
            frames.append(
                f'<iframe name="{name} {width}" style="width:{width}px;height:900px;border:0" srcdoc="{quoted}"></iframe>'
            )
    dumped = chromium.dump(f"<!doctype html><title></title><script>{_MEASURE}</script>{''.join(frames)}")
    title = re.search(r"<title>(.*?)</title>", dumped, re.DOTALL)
    assert title and title[1], dumped[:500]
    text = title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", " ").replace("&amp;", "&")
    return {page["name"]: page for page in json.loads(text)}


def test_pages_never_scroll_sideways_and_run_no_value(chromium: Chromium) -> None:
    control = "<!doctype html><body><div class=wide style='width:2000px'>x</div><img src=x onerror='ran=1'>" + payload(
        0, ""
    )
    long = changed(full(), lambda _, value: value * 60 if isinstance(value, str) and value != "no" else value)
    sources = {
        "full": render(full()),
        "hostile": render(HOSTILE),
        "seen": render(HOSTILE_SEEN),
        "long": render(long),
        "minimal": render(MINIMAL),
        "control": control,
    }
    widths = measured(chromium, sources, (360, 1280))
    assert len(widths) == 12
    for name, width in widths.items():
        if name.startswith("control"):
            assert width["ran"] and width["scrolls"] > width["width"] and width["beyond"], width
        else:
            assert not width["ran"], name
            assert width["scrolls"] <= width["width"] == int(name.split()[1]), width
            assert width["beyond"] == [] and width["reached"], width
    assert len(widths["full 360"]["boxes"]) > 5
    assert widths["full 1280"]["boxes"] == []


def test_as_it_is_chromium_reads_it_as_we_wrote_it(chromium: Chromium) -> None:
    source = render(HOSTILE)
    dumped = chromium.dump(source)
    assert "<script" not in dumped and "<img" not in dumped
    written = re.findall(r"<([a-z0-9]+)", re.sub(r"<title>.*?</title>", "", source))
    read = re.findall(r"<([a-z0-9]+)", re.sub(r"<title>.*?</title>", "", dumped))
    assert read == written  # nothing was closed, moved or added for us
    assert set(re.findall(r"number(\d+)\.", dumped)) == {str(number) for number in range(1, ATTACKS + 1)}


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_has_a_light_and_a_dark_look(chromium: Chromium, width: int, scheme: str) -> None:
    image = chromium.screenshot(render(full()), width, scheme)
    size, lines = png(image)
    assert size == (width, 900)
    ground = palettes()[scheme]["back"]
    expected = bytes.fromhex(ground[1:] if len(ground) == 7 else "".join(digit * 2 for digit in ground[1:]))
    # Whatever its filter is, the first pixel of an image stands there as it is.
    assert lines[0][1:4] == expected
    assert len(set(lines)) > 200  # no empty sheet


def png(image: bytes) -> tuple[tuple[int, int], list[bytes]]:
    """Width and height, and the filtered lines."""
    assert image.startswith(b"\x89PNG")
    width, height, depth, colours = struct.unpack(">IIBB", image[16:26])
    assert depth == 8
    at, packed = 8, b""
    while at < len(image):
        length, kind = struct.unpack(">I4s", image[at : at + 8])
        packed += image[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    raw = zlib.decompress(packed)
    step = 1 + width * {2: 3, 6: 4}[colours]
    return (width, height), [raw[number * step : (number + 1) * step] for number in range(height)]
