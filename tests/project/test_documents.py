"""Links, commands, flags, settings, names and events of the documents exist."""

from __future__ import annotations

import ast
import configparser
import importlib
import json
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import documents
import pytest
import typer
import yaml
from documents import PAGES, ROOT, Block

pytestmark = pytest.mark.unit

BLOCKS = [block for page in PAGES for block in documents.blocks(page)]
SHELL = [block for block in BLOCKS if block.language in ("sh", "console")]
LANGUAGES = {"python", "sql", "sh", "console", "ini", "text", "mermaid", "json", "toml", "yaml"}
# Programs that a shell block may name beside ours.
PROGRAMS = {
    ".",
    "alembic",
    "cd",
    "set",
    "python3",
    "pip",
    "python",
    "make",
    "export",
    "docker",
    "kafka-acls.sh",
    "kafka-consumer-groups.sh",
    "kubectl",
    "helm",
    "pre-commit",
    "psql",
}


def test_every_block_names_its_language() -> None:
    assert {f"{block}: {block.language or 'none'}" for block in BLOCKS if block.language not in LANGUAGES} == set()


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.code, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language in ("ini", "json", "toml", "yaml")], ids=str
)
def test_configuration_parses(block: Block) -> None:
    if block.language == "json":
        json.loads(block.code)
    elif block.language == "yaml":
        assert isinstance(yaml.safe_load(block.code), dict)
    elif block.language == "toml":
        tomllib.loads(block.code)
    else:
        configparser.ConfigParser().read_string(block.code)


@cache
def _flags(command: tuple[str, ...]) -> frozenset[str]:
    """The flags of a command. Fails if there is no such command."""
    from consumer.cli.main import whole

    group: Any = typer.main.get_command(whole())
    flags = {"--help", "-h", "--version"}
    for name in command:
        group = group.commands[name]
    return frozenset(
        flags | {flag for parameter in group.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    )


def _command_of(words: list[str]) -> tuple[str, ...]:
    return tuple(words[:2]) if words[:1] in (["dlq"], ["outbox"]) else tuple(words[:1])


def _check_consumer(line: str) -> None:
    words = shlex.split(line)[1:]
    if words[:1] == ["--version"]:
        return
    command = _command_of([word for word in words if not word.startswith("-")])
    known = _flags(command)
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-\d+", word):
            assert word.split("=")[0] in known, f"consumer {' '.join(command)} has no flag {word}"


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_commands_exist(block: Block) -> None:
    for line in documents.commands(block):
        for part in re.split(r" \| | && | \|\| ", line):
            program = part.split()[0]
            if "=" in program or program == "ACL" or "/bin/" in program:
                continue
            if program == "consumer":
                _check_consumer(part)
            else:
                assert program in PROGRAMS, part


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_in_the_text_exist(page: Path) -> None:
    """`consumer X --flag` in one line; lone flags by neighbouring words."""
    for line in re.findall(r"`(consumer [a-z][^`\n]*)`", page.read_text("utf-8")):
        plain = re.sub(r"[\[\]|…]", " ", line)
        words = plain.split()[1:]
        if words[0] in ("demo:app",) or "." in words[0] or words[0].isupper():
            continue
        command = _command_of([word for word in words if not word.startswith("-") and not word.isupper()])
        known = _flags(command)
        for word in words:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0].rstrip(",") in known, f"{line}: no flag {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for address in re.findall(r"\]\(([^)\s]+)\)", documents.prose(page)):
        path, _, anchor = address.partition("#")
        if "://" in address:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {address}"
        if anchor and target.suffix == ".md":
            assert anchor in documents.anchors(target), f"{page.name}: {address}"


def test_the_readme_fits_200_lines() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 200


def test_every_page_is_in_the_sites_navigation() -> None:
    class Loader(yaml.SafeLoader):
        """Takes MkDocs' tags for what they name."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda _, suffix, __: suffix)
    config = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)  # a SafeLoader
    listed = set(re.findall(r"[\w/-]+\.md", json.dumps(config["nav"])))
    written = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    from_root = {page for page in listed if page.startswith("project/") or page == "explanation/architecture.md"}
    assert listed - from_root == written


def test_every_guide_is_on_the_start_page() -> None:
    start = (ROOT / "docs" / "index.md").read_text("utf-8")
    guides = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.parent == ROOT / "docs" / "how-to"]
    assert guides and [guide for guide in guides if f"]({guide})" not in start] == []


@pytest.mark.parametrize("module", ["consumer", "consumer.schemes", "consumer.testing"])
def test_every_public_name_is_in_the_reference(module: str) -> None:
    shown = set(re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/reference/api.md").read_text("utf-8"), re.MULTILINE))
    loaded = importlib.import_module(module)
    assert {f"{module}.{name}" for name in loaded.__all__} <= shown
    for name in loaded.__all__:
        assert getattr(loaded, name).__doc__, f"{module}.{name} has no docstring"


def test_every_command_is_in_the_reference() -> None:
    from consumer.cli.main import whole

    def names(group: Any, path: tuple[str, ...] = ()) -> list[str]:
        if not hasattr(group, "commands"):
            return [" ".join(path)]
        return [name for word, one in group.commands.items() for name in names(one, (*path, word))]

    page = (ROOT / "docs/reference/commands.md").read_text("utf-8")
    listed = set(re.findall(r"^\| `consumer ([a-z ]+?)(?: \[?[A-Z][^`]*)?` \|", page, re.MULTILINE))
    assert listed == set(names(typer.main.get_command(whole())))


def test_the_settings_are_listed_as_they_are() -> None:
    _, table, _ = documents.between(documents.SETTINGS_PAGE, "settings")
    assert table == documents.settings_table(), "run: python tests/support/documents.py"


# Events whose text is not a constant of the code, and where it comes from.
_TEXTS_FROM_ELSEWHERE = {
    "notice.text",  # of handler_records/notices.py, as `consumer status` shows it
    "warning",  # warnings about the retention, with its numbers
    "kind.text",  # an event that log_rarely has listed
    "str(error)",  # the last line of a worker that ends: the reason is in the error
}


def test_the_texts_of_log_events_are_constant() -> None:
    _, unknown = documents.logged()
    assert [place for place in unknown if place.split(": ", 1)[1] not in _TEXTS_FROM_ELSEWHERE] == []


def test_the_log_events_are_listed_as_they_are() -> None:
    events, _ = documents.logged()
    documented = documents.documented_events()
    now = {text: (level, frozenset(fields) - {"…"}) for text, (level, fields) in documents.merged(events).items()}
    listed = {text: (level, frozenset(filter(None, fields))) for text, (level, fields, _) in documented.items()}
    assert listed == now, "run: python tests/support/documents.py"
    assert [text for text, (_, _, meaning) in documented.items() if not meaning] == []


def test_the_glossary_has_each_term_once_and_in_order() -> None:
    terms = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs/glossary.md").read_text("utf-8"), re.MULTILINE)[2:]
    assert terms == sorted(set(terms), key=str.lower)
    assert "docs/glossary.md" in (ROOT / "CONTRIBUTING.md").read_text("utf-8")
