"""ARCHITECTURE.md is true: the tree is the disk's, and every import follows the table."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import consumer

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "consumer"

# From the bottom up: a module imports from its own line's left and from the lines above it, from nothing else.
LAYERS = [
    "interrupts",
    "core",
    "places",
    "logs",
    "looping",
    "settings",
    "transport",
    "bearer",
    "schema",
    "embedded",
    "columns",
    "dryrun",
    "scope",
    "tx",
    "compression",
    "wire",
    "fetching",
    "brokers",
    "kafka",
    "group",
    "generations",
    "deadletters",
    "waiting",
    "crowding",
    "server",
    "ledger",
    "precheck",
    "activity",
    "app",
    "calling",
    "once",
    "conflicts",
    "stops",
    "shards",
    "coverage",
    "id_rules",
    "handler_code",
    "notices",
    "schemes",
    "known_names",
    "report",
    "retention",
    "loading",
    "letter_session",
    "redrive",
    "proof",
    "reading",
    "republish",
    "history",
    "sealed_letters",
    "edited_letters",
    "witness",
    "second_look",
    "resuming",
    "absent_rows",
    "compare",
    "drawn",
    "left_out",
    "applied",
    "copies",
    "first_rows",
    "one_snapshot",
    "rebuild",
    "replay_session",
    "replay",
    "page",
    "testing",
    "letter_relay",
    "opening",
    "telling",
    "reporting",
    "watching",
    "worker",
    "process",
    "supervisor",
    "demo",
    "help_text",
    "terminal",
    "shard_command",
    "status_command",
    "positions_command",
    "diagram_command",
    "replay_command",
    "purge_command",
    "dlq_command",
    "redrive_command",
    "cli",
    "__main__",
]

# Libraries and who may import them. Those of the standard library are free, outside the core.
LIBRARIES = {
    "aiokafka": {"compression", "wire", "fetching", "brokers", "kafka", "group"},
    "cramjam": {"compression"},
    "asyncpg": {"ledger"},
    "redis": {"precheck", "schemes"},
    "starlette": {"schemes"},
    "msgspec": {"core", "demo", "testing"},
    "pydantic": {"core", "settings", "terminal"},
    "typer": {
        "help_text",
        "terminal",
        "shard_command",
        "status_command",
        "diagram_command",
        "replay_command",
        "dlq_command",
        "redrive_command",
        "purge_command",
        "cli",
    },
    "rich": {"terminal", "status_command", "replay_command", "dlq_command", "purge_command", "cli", "demo"},
    "pytest": {"testing"},
    "uvloop": {"looping"},
}
IMPURE = {
    "asyncio",
    "datetime",
    "os",
    "random",
    "secrets",
    "socket",
    "subprocess",
    "threading",
    "time",
    "logging",
    "io",
}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, with the names taken from `consumer` as modules of it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Import(names):
                yield from (each.name for each in names)
            case ast.ImportFrom(module, names, 0) if module == "consumer":
                yield from (f"consumer.{each.name}" for each in names)
            case ast.ImportFrom(module, _, 0):
                assert module is not None
                yield module
            case ast.ImportFrom():
                pytest.fail(f"{path}: a relative import")


def part_of(path: Path) -> str:
    """The line of LAYERS that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [each for each in sorted(PACKAGE.rglob("*.py")) if each != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_follows_the_table(path: Path) -> None:
    part = part_of(path)
    assert part in LAYERS, "a new module: give it its place in LAYERS"
    below = LAYERS[: LAYERS.index(part) + 1]
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == "consumer":
            if path.name == "application.py":  # an application's imports: what `consumer` itself offers
                assert rest in consumer.__all__, f"{path} imports {module}"
            else:
                assert rest.split(".")[0] in below, f"{path} imports {module}, which stands above it"
        elif top not in sys.stdlib_module_names:
            assert part in LIBRARIES.get(top, ()), f"{path} imports {top}"
        elif part == "core":
            assert top not in IMPURE, f"{path}: the core knows no {top}"


@pytest.mark.parametrize("path", sorted((ROOT / "handlers").glob("*.py")), ids=lambda path: path.name)
def test_applications_import_from_consumer_alone(path: Path) -> None:
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == "consumer":
            assert rest in consumer.__all__, f"{path} imports {module}"
        else:
            assert top in {"handlers", "msgspec"} or top in sys.stdlib_module_names


# The payment page is more than handlers: it starts services and serves. Which of its files may know what, beside `consumer`
# itself, the schemes and each other.
SHOP = {
    "__init__": set(),
    "application": {"asyncpg", "msgspec", "consumer.settings"},
    "orders": set(),
    "view": set(),
    "running": {"consumer.embedded", "consumer.kafka", "consumer.ledger", "consumer.schema", "consumer.settings"},
    "guard": {"starlette"},
    "web": {"asyncpg", "msgspec", "redis", "starlette", "consumer.embedded", "consumer.kafka"},
    "__main__": {"uvicorn", "consumer.core.errors"},
}


@pytest.mark.parametrize("path", sorted((ROOT / "handlers" / "shop").glob("*.py")), ids=lambda path: path.name)
def test_the_page_imports_what_it_may(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top not in sys.stdlib_module_names and not module.startswith(("handlers.shop.", "consumer.schemes.")):
            is_public = top == "consumer" and rest in consumer.__all__
            assert is_public or module in SHOP[path.stem] or top in SHOP[path.stem], f"{path} imports {module}"


def test_the_tree_is_the_disks() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    block = re.search(r"```tree\n(.*?)```", text, re.DOTALL)
    assert block
    told = [line.split()[0] for line in block[1].splitlines() if line.strip()]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    on_disk = {each for each in listed.stdout.split() if (ROOT / each).exists()}
    covered: set[str] = set()
    for name in told:
        found = {each for each in on_disk if each.startswith(name)} if name.endswith("/") else {name} & on_disk
        assert found, f"ARCHITECTURE.md names {name}, which is not there"
        covered |= found
    assert sorted(on_disk - covered) == []
    assert len(told) == len(set(told))


def test_every_module_opens_with_its_promise() -> None:
    for path in FILES:
        assert (path.name == "__init__.py" and not path.read_text()) or ast.get_docstring(
            ast.parse(path.read_text("utf-8"))
        ), path


def test_every_public_name_has_a_docstring() -> None:
    for name in consumer.__all__:
        assert getattr(consumer, name).__doc__, name
