"""Reads documents for tests, and writes their tables from the code.

`python tests/support/documents.py` writes the tables of docs/reference/settings.md and docs/reference/metrics.md, the settings that
the Helm chart knows, and the events of docs/log-events.md; the meanings of events are kept; a new event gets an empty one, which a
test refuses.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from source_trees import text_of, tree_of

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SETTINGS_PAGE = ROOT / "docs" / "reference" / "settings.md"
METRICS_PAGE = ROOT / "docs" / "reference" / "metrics.md"
EVENTS_PAGE = ROOT / "docs" / "log-events.md"
CHART_SCHEMA = ROOT / "deploy" / "helm" / "idempotent-consumer" / "values.schema.json"

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    file: the name in the comment of its first line, if there is one.
    """

    page: Path
    line: int
    language: str
    code: str

    @property
    def file(self) -> str | None:
        named = re.fullmatch(r"(?:#|--) ([\w.]+\.(?:py|sql|toml))", self.code.split("\n", 1)[0])
        return named[1] if named else None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for fence in _FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 1
        yield Block(page, line, fence["language"], fence["code"])


def commands(block: Block) -> Iterator[str]:
    """The command lines of a shell block, without prompts, comments and output."""
    joined = block.code.replace("\\\n", " ")
    for raw in joined.splitlines():
        if block.language == "console":
            if not raw.startswith("$ "):
                continue
            raw = raw.removeprefix("$ ")
        line = re.sub(r"\s+#\s.*$|^#.*$", "", raw).strip()
        if line:
            yield line


def prose(page: Path) -> str:
    """A page without its code: blocks, and code within a line."""
    return re.sub(r"`[^`\n]*`", "``", _FENCE.sub("", page.read_text("utf-8")))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    anchors_found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        anchors_found.add(re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", plain)))
    return anchors_found


# -- settings -----------------------------------------------------------------------------------------------------------


def settings_table() -> str:
    """One row for each setting, in their order."""
    from consumer.settings import Settings

    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None or field.default == "" else f"`{field.default}`"
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(f"| `CONSUMER_{name.upper()}` | {default} | {meaning} |")
    return "\n".join(rows)


def chart_schema() -> str:
    """The schema of the chart's values, with the settings that there are.

    Secrets come from a Secret, and the chart itself says how many workers there are and where they serve.
    """
    from consumer.settings import Settings, known_settings

    known, fields = known_settings(), Settings.model_fields
    kinds = {str: "string", int: "integer", float: "number", bool: "boolean"}
    settings: dict[str, Any] = {}
    for name, kind in known.types.items():
        if name in known.secrets or name in ("workers", "http"):
            continue
        annotation = fields[name].annotation
        choices = next(
            (get_args(one) for one in (annotation, *get_args(annotation)) if get_origin(one) is Literal), None
        )
        settings[name] = {"enum": list(choices)} if choices else {"type": kinds[kind]}
    schema = json.loads(CHART_SCHEMA.read_text("utf-8"))
    schema["properties"]["settings"]["properties"] = settings
    keys = schema["definitions"]["secret"]["properties"]["keys"]
    keys["properties"] = {name: {"type": "string", "pattern": "^[-._a-zA-Z0-9]+$"} for name in sorted(known.secrets)}
    return json.dumps(schema, indent=2) + "\n"


# -- metrics ------------------------------------------------------------------------------------------------------------


def metrics_table(source: str) -> str:
    """One row for each metric of a source, in their order."""
    from consumer.metrics.catalog import METRICS, Kind

    rows = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        if metric.source.value == source:
            kind = "gauge" if metric.kind is Kind.HIGHEST else metric.kind.value
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            rows.append(f"| `{metric.name}` | {kind} | {labels} | {metric.help} |")
    return "\n".join(rows)


# -- log events ---------------------------------------------------------------------------------------------------------

_LEVELS = {10: "debug", 20: "info", 30: "warning", 40: "error"}


@dataclass(frozen=True)
class Event:
    """A call that logs: text, level and names of fields.

    A field "…" stands for a mapping that adds some.
    """

    text: str
    level: str
    fields: frozenset[str]


def _constants(tree: ast.Module) -> dict[str, str]:
    """Module constants that are texts."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def _texts(node: ast.expr, constants: dict[str, str]) -> list[str]:
    """The texts that an expression may have; "…" for a varying part."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in constants:
            return [constants[name]]
        case ast.IfExp(body=body, orelse=orelse):
            return [*_texts(body, constants), *_texts(orelse, constants)]
        case ast.JoinedStr(values=parts):
            return ["".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)]
    return []


def _parameter(function: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> int | None:
    """The index of a parameter among the arguments, without `self`."""
    names = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
    if name not in names:
        return None
    return names.index(name) - (names[0] in ("self", "cls"))


def _passed(
    trees: dict[Path, ast.Module], function: str, place: int, name: str, constants: dict[str, str]
) -> list[str]:
    """The texts that calls of a function pass as one parameter."""
    passed: list[str] = []
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == function:
                given = [word.value for word in node.keywords if word.arg == name]
                given = given or node.args[place : place + 1]
                passed += [text for one in given for text in _texts(one, constants)]
    return passed


def _level(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=int(number)):
            return _LEVELS.get(number, "?")
        case ast.Attribute(attr=name):
            return name.lower()
        case ast.IfExp(body=body, orelse=orelse):
            return f"{_level(body)} or {_level(orelse)}"
    return "?"


@functools.cache
def logged() -> tuple[list[Event], list[str]]:
    """All events of consumer/, and the calls whose text is unknown."""
    events: list[Event] = []
    unknown: list[str] = []
    files = sorted((ROOT / "consumer").rglob("*.py"))
    trees = {path: tree_of(text_of(path)) for path in files}
    everywhere: dict[str, str] = {}
    for tree in trees.values():
        everywhere |= {name: text for name, text in _constants(tree).items() if name.isupper()}
    for path, tree in trees.items():
        constants = {**everywhere, **_constants(tree)}
        for function, node in _calls(tree):
            if path.name == "logs.py" and function is not None and function.name == "event":
                continue
            fields = frozenset(word.arg or "…" for word in node.keywords)
            text = node.args[1]
            texts = _texts(text, constants)
            if not texts and isinstance(text, ast.Name) and function is not None:
                place = _parameter(function, text.id)
                if place is not None:
                    here = _passed({path: tree}, function.name, place, text.id, constants)
                    texts = here or _passed(trees, function.name, place, text.id, constants)
            if not texts:
                unknown.append(f"{path.relative_to(ROOT)}: {ast.unparse(text)}")
            events += [Event(one, _level(node.args[0]), fields) for one in texts]
    return events, unknown


def _calls(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef | None, ast.Call]]:
    """Each call that logs an event, and the function around it."""

    def walk(
        node: ast.AST, function: ast.FunctionDef | ast.AsyncFunctionDef | None
    ) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef | None, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call) and ast.unparse(child.func) in ("event", "logs.event"):
                yield function, child
            inner = child if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            yield from walk(child, inner)

    yield from walk(tree, None)


_ROW = re.compile(
    r"^\| `(?P<text>[^`]+)` \| (?P<level>[^|]*) \| (?P<fields>[^|]*) \| (?P<meaning>.*) \|$", re.MULTILINE
)


def documented_events() -> dict[str, tuple[str, frozenset[str], str]]:
    """Event -> level, fields and meaning, as the page has them."""
    return {
        row["text"]: (row["level"], frozenset(re.findall(r"`([^`]+)`|…", row["fields"])), row["meaning"].strip())
        for row in _ROW.finditer(EVENTS_PAGE.read_text("utf-8"))
    }


def merged(events: list[Event]) -> dict[str, tuple[str, list[str]]]:
    """Event -> levels and fields of all calls that log it."""
    levels_and_fields: dict[str, tuple[str, list[str]]] = {}
    for text in sorted({event.text for event in events}):
        same = [event for event in events if event.text == text]
        levels = sorted({one for event in same for one in event.level.split(" or ")})
        levels_and_fields[text] = " or ".join(levels), sorted({field for event in same for field in event.fields})
    return levels_and_fields


def events_table(rows: dict[str, tuple[str, list[str]]], meanings: dict[str, str]) -> str:
    lines = ["| event | level | fields | meaning |", "| --- | --- | --- | --- |"]
    for text, (level, fields) in rows.items():
        named = ", ".join("…" if field == "…" else f"`{field}`" for field in fields)
        lines.append(f"| `{text}` | {level} | {named} | {meanings.get(text, '')} |")
    return "\n".join(lines)


def between(page: Path, mark: str) -> tuple[str, str, str]:
    """The text before, between and after the marks of a written part."""
    text = page.read_text("utf-8")
    begin, end = f"<!-- written: {mark} -->\n", f"\n<!-- end: {mark} -->"
    before, _, rest = text.partition(begin)
    part, _, after = rest.partition(end)
    return before + begin, part.strip(), end + after


def main() -> None:
    before, _, after = between(SETTINGS_PAGE, "settings")
    SETTINGS_PAGE.write_text(f"{before}\n{settings_table()}\n{after}", "utf-8")
    CHART_SCHEMA.write_text(chart_schema(), "utf-8")
    for source in ("worker", "supervisor", "database", "replay"):
        before, _, after = between(METRICS_PAGE, source)
        METRICS_PAGE.write_text(f"{before}\n{metrics_table(source)}\n{after}", "utf-8")
    events, odd = logged()
    meanings = {text: meaning for text, (_, _, meaning) in documented_events().items()}
    before, _, after = between(EVENTS_PAGE, "events")
    EVENTS_PAGE.write_text(f"{before}\n{events_table(merged(events), meanings)}\n{after}", "utf-8")
    unexplained = [text for text in merged(events) if not meanings.get(text)]
    print("without a meaning:", *unexplained, sep="\n  ")
    print("not constant:", *odd, sep="\n  ")
    print("gone:", *(text for text in meanings if text not in merged(events)), sep="\n  ")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
