"""Plain English: banned words, the form of docstrings, empty names.

In code and in documents.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support")]

import documents  # noqa: E402
from source_trees import nodes_of, text_of  # noqa: E402

pytestmark = pytest.mark.unit

BANNED = re.compile(
    r"\b(anew|told|whoever|nobody|heed(s|ed)?|in vain|lest|thereof|therein|whatsoever|befall(s|en)?|as ever|made (of|known)"
    r"|is at it|comes? about|unasked|to be believed|a flat no)\b",
    re.IGNORECASE,
)
FIRST_LINE_WORDS_MAX = 12
FOLDERS = ("consumer", "handlers", "tests", "benchmarks", "docs")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
OTHERS = sorted(
    path
    for folder in FOLDERS
    for ending in ("sql", "js", "html", "css")
    for path in (ROOT / folder).rglob(f"*.{ending}")
)

# Words that are right where they are.
ALLOWED = {
    "consumer/local_servers.py": {"nobody"},  # the user of Unix
    "tests/cli/test_pythons.py": {"nobody"},  # users, handlers and values of that name, which do not exist
    "tests/cli/test_replay_command.py": {"nobody"},
    "tests/rebuild/test_rebuild.py": {"nobody"},
    "tests/support/retry_desk.py": {"nobody"},
    "tests/testing/test_testing.py": {"nobody"},
    "tests/worker/test_embedded.py": {"nobody"},
}
ITSELF = Path(__file__).resolve()  # it names the words that it refuses

# They say nothing about what they hold.
BANNED_NAMES = {"each", "found", "told", "made"}
NAMES_ALLOWED = {"consumer/schemes/versioned.py": {"found"}}  # `Stale.found` is public


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def words_of(path: Path) -> list[str]:
    """The banned words of a file.

    Code in a document does not count: it is tested in its own file.
    """
    text = documents.prose(path) if path.suffix == ".md" else text_of(path)
    return [match[0] for match in BANNED.finditer(text.replace("_", " "))]


def docstrings_of(path: Path) -> Iterator[tuple[str, str]]:
    """Name and first paragraph's first line of each docstring."""
    for node in nodes_of(text_of(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", path.stem), text.split("\n", 1)[0]


def is_well_formed(line: str) -> bool:
    """Whether a first line is a short sentence."""
    return line.rstrip().endswith((".", ":", "?")) and len(line.split()) <= FIRST_LINE_WORDS_MAX


def badly_formed(path: Path) -> list[str]:
    return [f"{name}: {line}" for name, line in docstrings_of(path) if not is_well_formed(line)]


def banned_names_of(source: str, allowed: Set[str] = frozenset()) -> list[str]:
    """The variables, parameters, attributes and functions whose names say nothing."""
    names: list[tuple[int, str]] = []
    for node in nodes_of(source):
        match node:
            case ast.Name(name, ast.Store()) | ast.Attribute(_, name, ast.Store()):
                names.append((node.lineno, name))
            case ast.arg(name):
                names.append((node.lineno, name))
            case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name):
                names.append((node.lineno, name))
    return [f"line {line}: {name}" for line, name in names if name.strip("_") in BANNED_NAMES - allowed]


DOCUMENTS = [*documents.PAGES, ROOT / "Makefile"]


def _faults(check: Callable[[Path], list[str]], paths: Iterable[Path]) -> dict[str, list[str]]:
    return {_name(path): faults for path in paths if (faults := check(path))}


def test_files_have_no_banned_word() -> None:
    def refused_words(path: Path) -> list[str]:
        return [word for word in words_of(path) if word not in ALLOWED.get(_name(path), set())]

    assert _faults(refused_words, [path for path in [*DOCUMENTS, *SOURCES, *OTHERS] if path != ITSELF]) == {}


def test_docstrings_begin_with_a_short_sentence() -> None:
    assert _faults(badly_formed, SOURCES) == {}


def test_names_say_what_they_hold() -> None:
    def refused_names(path: Path) -> list[str]:
        return banned_names_of(text_of(path), NAMES_ALLOWED.get(_name(path), set()))

    assert _faults(refused_names, SOURCES) == {}


def test_the_checks_find_faults(tmp_path: Path) -> None:
    source = '"""A table that is made anew."""\ndef f(found):\n    """No end"""\n    return [each for each in found]\n'
    faulty = tmp_path / "faulty.py"
    faulty.write_text(source)
    assert words_of(faulty) == ["anew"]
    assert badly_formed(faulty) == ["f: No end"]
    assert banned_names_of(source) == ["line 2: found", "line 4: each"]
    assert banned_names_of(source, {"found"}) == ["line 4: each"]
