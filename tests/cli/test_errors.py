"""Every error of a command has the form `subject: problem; action`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import ROOT

pytestmark = pytest.mark.unit

FILES = [path for package in ("cli", "admin") for path in sorted((ROOT / "consumer" / package).glob("*.py"))]
ERRORS = {"Misconfigured", "Refused", "UnknownName"}
# The subject is a value, or the whole text comes from elsewhere, where it has the form already.
PASSED_ON = {"refusal", "faults + answered", "'; '.join(objections) + ' (or --force)'"}


def texts(path: Path) -> Iterator[tuple[int, str, str]]:
    """The line, the expression and the text of each error.

    What is inserted into the text is `{}`.
    """
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=[argument])) if name in ERRORS:
                choices = [argument.body, argument.orelse] if isinstance(argument, ast.IfExp) else [argument]
                for choice in choices:
                    parts = choice.values if isinstance(choice, ast.JoinedStr) else [choice]
                    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
                    yield node.lineno, ast.unparse(argument), text


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_error_says_subject_problem_and_action(path: Path) -> None:
    wrong = [
        (line, text)
        for line, expression, text in texts(path)
        if expression not in PASSED_ON and not re.fullmatch(r"[^:;]{2,}: .+; .+", text, re.DOTALL)
    ]
    assert wrong == []


def test_errors_to_check_exist() -> None:
    assert sum(len(list(texts(path))) for path in FILES) > 30
