"""Every test that docs/reference/failure-modes.md names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

TESTS = Path(__file__).resolve().parent.parent
ROWS = re.findall(
    r"^\| ([FAB]\d+) \|(.*)\|$",
    (TESTS.parent / "docs" / "reference" / "failure-modes.md").read_text("utf-8"),
    re.MULTILINE,
)


def test_each_failure_is_there_once() -> None:
    assert [item for item, _ in ROWS if item.startswith("F")] == [f"F{number}" for number in range(1, 79)]


def test_each_fault_of_real_systems_is_there() -> None:
    expected = [f"A{number}" for number in range(1, 17)] + [f"B{number}" for number in range(1, 46)]
    assert list(dict.fromkeys(item for item, _ in ROWS if not item.startswith("F"))) == expected


def test_every_test_that_is_named_exists() -> None:
    known: dict[str, set[str]] = {}
    for item, row in ROWS:
        *_, happens, shown = row.split("|")
        named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", shown)
        assert len(named) == shown.count("`") // 2, f"{item}: {shown}"
        assert named or re.search("not used|no test makes|[Cc]annot be provoked|no outbox yet", happens), item
        for file, test in named:
            if file not in known:
                body = ast.parse((TESTS / file).read_text("utf-8")).body
                known[file] = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert not test or test in known[file], f"{item}: there is no {file}::{test}"
