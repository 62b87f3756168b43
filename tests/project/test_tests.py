"""Test modules do not import each other; mutants cannot miss their target."""

from __future__ import annotations

import ast
from types import SimpleNamespace

import pytest
from chaos.mutants import MUTANTS as CHAOS_MUTANTS
from chaos.mutants import install
from harness import ROOT
from replacing import INHERITED, NothingToReplace, replace, replace_everywhere, undone_at_the_end
from verdicts.mutants import MUTANTS as VERDICT_MUTANTS
from verdicts.mutants import broken as broken_verdicts

from consumer.core import dead_letters
from consumer.transaction import apply

pytestmark = pytest.mark.unit


TESTS = ROOT / "tests"


def imported_modules(source: str) -> set[str]:
    """The last parts of the names of all imported modules."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {alias.name for alias in node.names}
    return {name.rpartition(".")[2] for name in names}


def test_no_test_module_imports_another() -> None:
    test_modules = {path.stem for path in TESTS.rglob("test_*.py")}
    assert len(test_modules) > 100
    importing = {
        str(path.relative_to(TESTS)): sorted(shared)
        for path in TESTS.rglob("*.py")
        if (shared := imported_modules(path.read_text("utf-8")) & test_modules)
    }
    assert importing == {}, "move what they share to tests/support"


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
