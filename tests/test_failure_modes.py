"""docs/failure-modes.md is true: F1 to F78 once each, every test that it names exists, and what has none says why."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROWS = re.findall(
    r"^\| F(\d+) \|(.*)\|$", (TESTS.parent / "docs" / "failure-modes.md").read_text("utf-8"), re.MULTILINE
)


def test_each_failure_is_there_once() -> None:
    assert [int(number) for number, _ in ROWS] == list(range(1, 79))


def test_every_test_that_is_named_exists() -> None:
    known: dict[str, set[str]] = {}
    for number, row in ROWS:
        *_, happens, shown = row.split("|")
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", shown)
        assert len(named) == shown.count("`") // 2, f"F{number}: {shown}"
        assert named or re.search("not used|no test makes|[Cc]annot be provoked|no outbox yet", happens), f"F{number}"
        for file, test in named:
            if file not in known:
                body = ast.parse((TESTS / file).read_text("utf-8")).body
                known[file] = {each.name for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert test in known[file], f"F{number}: there is no {file}::{test}"
