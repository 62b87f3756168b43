"""Layers, drivers, purity and lengths are as ARCHITECTURE.md says."""

from __future__ import annotations

import ast
import functools
import io
import re
import subprocess
import sys
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from source_trees import nodes_of, text_of, tree_of

import consumer

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "consumer"

CODE_LINES_MAX = 400  # of a file, without blank lines, comments and docstrings
FUNCTION_LINES_MAX = 60
ROOT_MODULES_MAX = 10

# Packages, and modules beside them, from the bottom up: each imports from its own and from those above it in this list.
LAYERS = [
    "core",
    "metrics",
    "outbox",
    "error_places",
    "logs",
    "setting_sources",
    "settings",
    "tls",
    "decoders",
    "local_servers",
    "kafka",
    "deferred_writes",
    "postgres",
    "ext",
    "transaction",
    "effects",
    "precheck",
    "app",
    "app_loader",
    "sharding",
    "handler_records",
    "schemes",
    "retention",
    "dead_letters",
    "rebuild",
    "replay",
    "testing",
    "admin",
    "monitoring",
    "telemetry",
    "worker",
    "demo",
    "console",
    "new_service",
    "cli",
    "__main__",
]

# Third-party libraries, and the packages that may import them. The standard library is free, except for pure modules.
LIBRARIES = {
    "aiokafka": {"kafka"},
    "cramjam": {"kafka"},
    "asyncpg": {"postgres"},
    "redis": {"precheck", "schemes"},
    "sqlalchemy": {"ext"},
    "fastavro": {"decoders"},
    "google": {"decoders"},
    "starlette": {"schemes", "console"},
    "jinja2": {"console"},
    "uvicorn": {"console"},
    "msgspec": {"core", "outbox", "decoders", "deferred_writes", "worker", "demo", "testing"},
    "pydantic": {"core", "settings", "cli"},
    "typer": {"cli"},
    "rich": {"cli", "demo"},
    "watchfiles": {"cli"},
    "pytest": {"testing"},
    "uvloop": {"worker"},
    "prometheus_client": {"monitoring"},
    "opentelemetry": {"telemetry"},
}

# Modules that decide without I/O, clock, randomness or event loop: the package core, and these beside their users.
PURE = {
    "admin/produce_plan.py",
    "admin/purge_plan.py",
    "admin/tail_messages.py",
    "console/figures.py",
    "console/tokens.py",
    "dead_letters/edits.py",
    "deferred_writes/catalog.py",
    "deferred_writes/grammar.py",
    "deferred_writes/rounds.py",
    "deferred_writes/statement_order.py",
    "deferred_writes/statement_reader.py",
    "deferred_writes/statement_shape.py",
    "effects/steps.py",
    "handler_records/settled_ranges.py",
    "handler_records/source_text.py",
    "kafka/bounds.py",
    "kafka/record_batch.py",
    "metrics/__init__.py",
    "metrics/catalog.py",
    "metrics/fleet.py",
    "metrics/recorder.py",
    "metrics/totals.py",
    "new_service/name_rules.py",
    "outbox/__init__.py",
    "outbox/dead_letter_copy.py",
    "outbox/digest.py",
    "outbox/encoding.py",
    "outbox/record.py",
    "outbox/send_queues.py",
    "outbox/streams.py",
    "postgres/claim_sql.py",
    "postgres/epoch.py",
    "postgres/grants.py",
    "postgres/protocol.py",
    "postgres/sql_settings.py",
    "postgres/sql_text.py",
    "postgres/sql_tokens.py",
    "precheck/breaker.py",
    "rebuild/applied_order.py",
    "rebuild/first_rows_rules.py",
    "rebuild/drawn_values.py",
    "rebuild/compare_sql.py",
    "rebuild/copy_sql.py",
    "rebuild/statement_rules.py",
    "rebuild/table_model.py",
    "rebuild/trace_sql.py",
    "rebuild/update_targets.py",
    "rebuild/variations.py",
    "replay/effect_counts.py",
    "replay/findings.py",
    "replay/html/elements.py",
    "replay/outcomes.py",
    "replay/outgoing_verdict.py",
    "replay/rebuild_verdict.py",
    "replay/resume_rules.py",
    "replay/samples.py",
    "replay/timeline.py",
    "replay/unsettled.py",
    "replay/wording.py",
    "schemes/moves.py",
    "transaction/dead_letter_rate.py",
    "transaction/identify.py",
    "transaction/isolate.py",
    "transaction/position_updates.py",
    "transaction/result.py",
    "worker/conflict_turns.py",
    "worker/partition_table.py",
    "worker/restart_policy.py",
    "worker/watchdog.py",
}
IMPURE_LIBRARIES = {
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


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """A file's imported modules, and the names imported from packages."""
    imported: list[str] = []
    for node in nodes_of(text_of(path)):
        match node:
            case ast.Import(names):
                imported += (alias.name for alias in names)
            case ast.ImportFrom(module, names, 0):
                assert module is not None
                imported += (f"{module}.{alias.name}" for alias in names)
            case ast.ImportFrom():
                pytest.fail(f"{path}: a relative import")
    return tuple(imported)


def module_file(dotted: str) -> Path | None:
    """The file of consumer/ that `consumer.a.b.name` comes from."""
    parts = dotted.split(".")
    for length in (len(parts), len(parts) - 1):
        place = ROOT.joinpath(*parts[:length])
        if place.with_suffix(".py").is_file():
            return place.with_suffix(".py")
        if (place / "__init__.py").is_file():
            return place / "__init__.py"
    return None


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_pure(path: Path) -> bool:
    return layer_of(path) == "core" or name_of(path) in PURE


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
every_file = pytest.mark.parametrize("path", FILES, ids=name_of)


@every_file
def test_imports_follow_the_layers(path: Path) -> None:
    layer = layer_of(path)
    assert layer in LAYERS, "a new package or module beside the packages: give it its place in LAYERS"
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == "consumer":
            if path.name == "application.py":  # an application imports what `consumer` itself offers
                assert rest in consumer.__all__, f"{path} imports {module}"
            elif rest not in consumer.__all__:
                assert rest.split(".")[0] in allowed, f"{path} imports {module}, which is in a higher layer"
        elif top not in sys.stdlib_module_names:
            assert layer in LIBRARIES.get(top, ()), f"{path} imports {top}"


@pytest.mark.parametrize("path", [path for path in FILES if is_pure(path)], ids=name_of)
def test_a_pure_module_imports_pure_modules_only(path: Path) -> None:
    for module in imports(path):
        top = module.partition(".")[0]
        if top == "consumer":
            imported = module_file(module)
            assert imported and is_pure(imported), f"{path} imports {module}, which is not pure"
        else:
            assert top not in IMPURE_LIBRARIES, f"{path} is pure and imports {top}"


def test_the_list_of_pure_modules_names_files_that_exist() -> None:
    assert {name for name in PURE if not (PACKAGE / name).is_file()} == set()


def test_imports_form_no_cycle() -> None:
    graph = {}
    for path in FILES:
        targets = {module_file(module) for module in imports(path) if module.partition(".")[0] == "consumer"}
        graph[path] = {target for target in targets if target and target not in {path, PACKAGE / "__init__.py"}}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_few_modules_stand_beside_the_packages() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= ROOT_MODULES_MAX


def code_lines(source: str) -> int:
    """Lines that hold code: not blank, no comment, no docstring."""
    docstrings: set[int] = set()
    for node in nodes_of(source):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    layout = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "handlers").rglob("*.py")])
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())

# Still above the limits; each goes from this list when it is split.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


@every_source
def test_a_file_is_short(path: Path) -> None:
    source = text_of(path)
    maybe_code = sum(not line.strip().startswith("#") for line in source.splitlines() if line.strip())
    is_long = maybe_code > CODE_LINES_MAX and code_lines(source) > CODE_LINES_MAX
    assert is_long == (path.relative_to(ROOT).as_posix() in LONG_FILES)


@every_source
def test_a_function_fits_a_screen(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    long = {
        f"{name}: {node.name}"
        for node in nodes_of(text_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES_MAX
    }
    assert long == {entry for entry in LONG_FUNCTIONS if entry.startswith(f"{name}:")}


def test_lines_of_code_are_counted_without_comments_and_docstrings() -> None:
    assert code_lines('"""Two\nlines."""\n\n# a comment\nx = (\n    1,\n)\n\ndef f():\n    """One."""\n') == 4


@pytest.mark.parametrize("path", sorted((ROOT / "handlers").glob("*.py")), ids=lambda path: path.name)
def test_applications_import_from_consumer_alone(path: Path) -> None:
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == "consumer":
            assert rest in consumer.__all__, f"{path} imports {module}"
        else:
            assert top in {"handlers", "msgspec"} or top in sys.stdlib_module_names


# The payment page is more than handlers: it starts services and serves. Which of its files may import what, beside
# `consumer` itself, the schemes and each other.
SHOP = {
    "__init__": set(),
    "application": {"asyncpg", "msgspec", "consumer.settings"},
    "orders": set(),
    "view": set(),
    "running": {
        "consumer.local_servers",
        "consumer.kafka",
        "consumer.postgres",
        "consumer.settings",
    },
    "guard": {"starlette"},
    "log_watch": {"aiokafka"},
    "pages": {"asyncpg", "redis", "starlette", "consumer.local_servers"},
    "payments_api": {"asyncpg", "starlette"},
    "requests": {"msgspec", "starlette"},
    "__main__": {"uvicorn", "consumer.core"},
}


@pytest.mark.parametrize("path", sorted((ROOT / "handlers" / "shop").glob("*.py")), ids=lambda path: path.name)
def test_the_page_imports_what_it_may(path: Path) -> None:
    assert ast.get_docstring(tree_of(text_of(path))), path
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top not in sys.stdlib_module_names and not module.startswith(("handlers.shop", "consumer.schemes.")):
            is_public = top == "consumer" and rest in consumer.__all__
            allowed = SHOP[path.stem]
            package = ".".join(module.split(".")[:2])
            assert is_public or top in allowed or package in allowed, f"{path} imports {module}"


def test_every_module_has_a_docstring() -> None:
    assert [name_of(path) for path in FILES if not ast.get_docstring(tree_of(text_of(path)))] == []


@pytest.mark.parametrize("package", [layer for layer in LAYERS if (PACKAGE / layer).is_dir()])
def test_architecture_lists_every_package(package: str) -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    assert re.search(rf"^\| `{package}/` \|", text, re.MULTILINE)


def test_architecture_names_only_files_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    named = set(re.findall(r"`([\w./]+/[\w./]*|[\w/]+\.(?:py|md|sql|toml))`", text))
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    known = {*tracked, *(name.removeprefix("consumer/") for name in tracked)}
    known |= {f"{parent}/" for name in known for parent in map(str, Path(name).parents)}
    assert sorted(named - known) == []


def test_every_public_name_has_a_docstring() -> None:
    assert [name for name in consumer.__all__ if not getattr(consumer, name).__doc__] == []
