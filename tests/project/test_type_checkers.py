"""Type checkers accept handlers that work, and refuse mistakes.

Each checker runs once, strictly, on tests/project/typed_examples. A line with the comment `refused` is one that it
reports; all others are not.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from consumer import App

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = Path(__file__).parent / "typed_examples"
REFUSED = {
    f"{path.relative_to(EXAMPLES)}:{number}"
    for path in EXAMPLES.glob("*/*.py")
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
    if line.endswith("# refused")
}


@pytest.mark.unit
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("accepted/*.py")), ids=lambda path: path.stem)
def test_accepted_examples_register(path: Path) -> None:
    assert isinstance(runpy.run_path(str(path))["app"], App)


def test_mypy() -> None:
    done = _run(
        *("mypy", "--strict", "--config-file", os.devnull, "--explicit-package-bases"),  # not this project's settings
        *("--cache-dir", str(ROOT / ".mypy_cache/examples"), "."),
    )
    _check(re.findall(r"^(.+?):(\d+): error: (.*)", done.stdout, re.MULTILINE), done)


def test_pyright() -> None:
    done = _run("pyright", "--pythonpath", sys.executable, "--outputjson")
    faults = [fault for fault in json.loads(done.stdout)["generalDiagnostics"] if fault["severity"] == "error"]
    _check(
        [
            (os.path.relpath(fault["file"], EXAMPLES), fault["range"]["start"]["line"] + 1, fault["message"])
            for fault in faults
        ],
        done,
    )


def _run(checker: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a checker on all examples."""
    environment = {**os.environ, "MYPYPATH": str(ROOT), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    command = [sys.executable, "-m", checker, *arguments]
    return subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=170)


def _check(faults: Iterable[tuple[str, int | str, str]], done: subprocess.CompletedProcess[str]) -> None:
    reported = {f"{path}:{line}": message for path, line, message in faults}
    assert reported, done.stdout + done.stderr
    refused_though_right = [f"{place}: {reported[place]}" for place in sorted(reported.keys() - REFUSED)]
    assert not refused_though_right, "\n".join(refused_though_right)
    accepted_though_wrong = sorted(REFUSED - reported.keys())
    assert not accepted_though_wrong
