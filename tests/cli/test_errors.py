"""Errors for people have the form `subject: problem; action`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import ROOT
from source_trees import nodes_of, text_of

pytestmark = pytest.mark.unit

FILES = sorted((ROOT / "consumer").rglob("*.py"))
ERRORS = {"Misconfigured", "RegistrationError", "SchemaMissing", "TransactionMisuse", "UnknownName"}
# The subject or the whole text comes from elsewhere, where it has the form already.
PASSED_ON = {
    "refusal", "faults + answered", "'; '.join(objections) + ' (or --force)'", "'; '.join(errors)", "str(error)", "guard.refused",
    "f'App({name!r}): {fault}'", "f'App({name!r}): {error}'", "f'--listen {options.listen}: {address_problem(error)}'", "_ENDED", "ENDED", "fault", "f'Kafka at {broker}: {fault}'", "f'{label}: {fault}'", "f'Redis: {fault}'", "f'CONSUMER_HTTP={host}:{port}: {address_problem(error)}'",
    "f'{name[:80]!r}: {problem}'",
    "'; '.join((_problem(gathered, dict(problem)) for problem in error.errors()))",
    "_TWICE", "_ROLLBACK", "_NOT_A_WRITE.format(type(statement).__name__)", "_NO_CAUSE", "_OTHER_CAUSE", "_SEVERAL.format(method)", "_SEVERAL.format('defer')",
}  # fmt: skip


def texts(path: Path) -> Iterator[tuple[int, str, str]]:
    """The line, the expression and the text of each error.

    What is inserted into the text is `{}`.
    """
    errors = ERRORS | {"Refused"} if path.parent.name in ("cli", "admin") else ERRORS  # elsewhere it is another class
    for node in nodes_of(text_of(path)):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=[argument])) if name in errors:
                choices = [argument.body, argument.orelse] if isinstance(argument, ast.IfExp) else [argument]
                for choice in choices:
                    parts = choice.values if isinstance(choice, ast.JoinedStr) else [choice]
                    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
                    yield node.lineno, ast.unparse(argument), text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "consumer").as_posix())
def test_error_says_subject_problem_and_action(path: Path) -> None:
    wrong = [
        (line, text)
        for line, expression, text in texts(path)
        if expression not in PASSED_ON and not re.fullmatch(r"([^:;]{2,}:|\{\}:\{\}:) .+; .+|\{\}; .+", text, re.DOTALL)
    ]
    assert wrong == []


def test_errors_to_check_exist() -> None:
    assert sum(len(list(texts(path))) for path in FILES) > 150
