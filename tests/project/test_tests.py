"""Rules for tests: names, imports, patches, and mutants that hit."""

from __future__ import annotations

import ast
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from chaos.mutants import MUTANTS as CHAOS_MUTANTS
from chaos.mutants import install
from harness import ROOT
from replacing import INHERITED, NothingToReplace, replace, replace_everywhere, undone_at_the_end
from source_trees import nodes_of, text_of
from verdicts.mutants import MUTANTS as VERDICT_MUTANTS
from verdicts.mutants import broken as broken_verdicts

from consumer.core import dead_letters
from consumer.transaction import apply

pytestmark = pytest.mark.unit


TESTS = ROOT / "tests"
NAME_MAX = 70
NO_SUBJECTS = {
    "all",
    "how",
    "it",
    "no",
    "nothing",
    "that",
    "there",
    "they",
    "what",
    "whatever",
    "when",
    "where",
    "which",
    "who",
}


def imported_modules(source: str) -> set[str]:
    """The last parts of the names of all imported modules."""
    names = set()
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {alias.name for alias in node.names}
    return {name.rpartition(".")[2] for name in names}


def test_modules_of_tests_import_no_other_test_module() -> None:
    test_modules = {path.stem for path in TESTS.rglob("test_*.py")}
    assert len(test_modules) > 100
    importing = {
        str(path.relative_to(TESTS)): sorted(shared)
        for path in TESTS.rglob("*.py")
        if (shared := imported_modules(text_of(path)) & test_modules)
    }
    assert importing == {}, "move what they share to tests/support"


def names_without_subject(source: str) -> list[str]:
    """The tests whose names are too long, or have no subject."""
    return [
        node.name
        for node in nodes_of(source)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and (len(node.name) > NAME_MAX or node.name.split("_")[1] in NO_SUBJECTS)
    ]


def private_patches(source: str) -> list[str]:
    """The private names that a test replaces by `monkeypatch`."""
    return [
        str(node.args[1].value)
        for node in nodes_of(source)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "setattr"
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
        and str(node.args[1].value).startswith("_")
    ]


@pytest.mark.parametrize("check", [names_without_subject, private_patches])
def test_tests_follow_the_rule(check: Callable[[str], list[str]]) -> None:
    faults = {str(path.relative_to(TESTS)): names for path in TESTS.rglob("*.py") if (names := check(text_of(path)))}
    assert faults == {}


def test_checks_of_tests_find_faults() -> None:
    source = (
        "async def test_what_is_lost(m):\n    m.setattr(worker, '_claim', None)\n    m.setattr(worker, 'claim', None)\n"
    )
    assert names_without_subject(source) == ["test_what_is_lost"]
    assert private_patches(source) == ["_claim"]


def test_replace_sets_an_attribute_that_exists_and_restores_it() -> None:
    owner = SimpleNamespace(claim=1)
    with undone_at_the_end() as replacements:
        replace(owner, "claim", 2)
        assert owner.claim == 2
        assert replacements == [(owner, "claim", 1)]
    assert owner.claim == 1


def test_replace_refuses_an_attribute_that_does_not_exist() -> None:
    owner = SimpleNamespace(claim=1)
    with pytest.raises(NothingToReplace, match="claims: no such attribute"):
        replace(owner, "claims", 2)
    with pytest.raises(NothingToReplace, match=r"consumer\.transaction\.apply\.apply: no such attribute"):
        replace_everywhere(apply, "apply", None)
    assert vars(owner) == {"claim": 1}


def test_replace_of_an_inherited_method_leaves_the_base_class_alone() -> None:
    class Base:
        def begin(self) -> str:
            return "base"

    class Child(Base): ...

    with undone_at_the_end() as replacements:
        replace(Child, "begin", lambda self: "replaced")
        assert (Base().begin(), Child().begin()) == ("base", "replaced")
        assert replacements[0].original is INHERITED
    assert Child().begin() == "base" and "begin" not in vars(Child)


def test_replace_everywhere_reaches_modules_that_import_the_name() -> None:
    original = dead_letters.blocks_key
    with undone_at_the_end():
        replace_everywhere(dead_letters, "blocks_key", lambda verdict: False)
        assert vars(apply)["blocks_key"] is dead_letters.blocks_key is not original
    assert vars(apply)["blocks_key"] is dead_letters.blocks_key is original


@pytest.mark.parametrize("name", CHAOS_MUTANTS)
def test_chaos_mutant_replaces_something_that_exists(name: str) -> None:
    with undone_at_the_end() as replacements:
        install(name)
        assert replacements


@pytest.mark.parametrize("name", VERDICT_MUTANTS)
def test_verdict_mutant_replaces_something_that_exists(name: str) -> None:
    with broken_verdicts(name) as replacements:
        assert replacements


def test_files_that_begin_first_exist() -> None:
    files = [line for line in (TESTS / "long_files.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert len(files) == len(set(files))
    assert [file for file in files if not (TESTS / file).is_file()] == []
