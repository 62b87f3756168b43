"""`consumer new`: names, files, and that what it writes works."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import compose_spec
import documents
import pytest
import yaml
from harness import ROOT, Place, consumer, is_one_line, new_topic, query, running, until, value

from consumer.core.errors import Misconfigured
from consumer.new_service.name_rules import problem_of
from consumer.new_service.writing import rendered, write
from consumer.settings import Settings

BIN = Path(sys.executable).parent
FILES = [
    ".dockerignore",
    ".env",
    ".env.example",
    ".gitignore",
    "Dockerfile",
    "README.md",
    "bookings/__init__.py",
    "bookings/app.py",
    "bookings/handlers.py",
    "bookings/models.py",
    "bookings/py.typed",
    "docker-compose.yml",
    "pyproject.toml",
    "schema.sql",
    "tests/test_handlers.py",
    "tests/test_orders.py",
    "wheels/README.md",
]
LONG = "a_service_with_a_name_of_forty_letters_x"


@pytest.mark.unit
@pytest.mark.parametrize("name", ["orders", "a", "order_intake", "v2", LONG, "match"])
def test_a_package_name_is_good(name: str) -> None:
    assert problem_of(name, lambda _: False) is None


@pytest.mark.unit
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Order-Intake", "not a package name; .* such as order_intake"),
        ("2fast", "such as fast"),
        ("", "such as orders"),
        ("class_", "such as orders"),
        ("x__y", "such as x_y"),
        ("../x", "such as x"),
        ("ärger", "such as rger"),
        (LONG + "y", "at most 40"),
        ("class", "a keyword of Python; choose another name, such as class_service"),
        ("json", "a module of Python's own"),
        ("msgspec", "an installed package"),
        ("consumer", "the framework's package"),
        ("tests", "the folder of the tests"),
        ("public", "reserved by PostgreSQL"),
        ("pg_orders", "reserved by PostgreSQL; choose another name, such as orders_service"),
    ],
)
def test_a_name_that_cannot_work_is_refused(name: str, says: str) -> None:
    problem = problem_of(name, lambda name: name == "msgspec")
    assert problem is not None and re.search(says, problem)


@pytest.mark.unit
def test_names_of_what_the_project_needs_are_refused() -> None:
    """Also before it is installed: the tests bring their own tools."""
    project = tomllib.loads(rendered("orders", "0.1.0")["pyproject.toml"])
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    needed += project["project"]["optional-dependencies"]["dev"]
    names = {re.split(r"[^a-z0-9-]", requirement)[0].replace("-", "_") for requirement in needed}
    assert {"hatchling", "idempotent_consumer", "pytest_asyncio"} <= names
    assert {name for name in names - {"msgspec"} if problem_of(name, lambda _: False) is None} == set()


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which `consumer new bookings` was run."""
    directory = tmp_path_factory.mktemp("newcomer")
    (directory / "bookings").mkdir()  # an empty folder is no obstacle
    result = consumer(directory, "new", "bookings", "--json")
    assert json.loads(result.stdout) == {
        "name": "bookings",
        "app": "bookings.handlers:app",
        "directory": str(directory / "bookings"),
        "files": FILES,
    }
    return directory


@pytest.mark.unit
def test_files_of_a_service_are_those_that_are_listed(parent: Path) -> None:
    written = [path for path in (parent / "bookings").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(parent / "bookings")) for path in written) == FILES
    assert [path.name for path in parent.iterdir()] == ["bookings"]
    for path in written:
        assert not re.search(r"\{\{|\}\}", path.read_text()), path


@pytest.mark.unit
def test_refused_names_and_full_folders_leave_nothing_behind(parent: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in parent.rglob("*")}
    is_one_line(consumer(parent, "new", "bookings"), "bookings: exists, and is not an empty folder")
    is_one_line(consumer(parent, "new", "asyncpg"), "'asyncpg': an installed package")
    is_one_line(consumer(parent, "new", "Book-Ings"), "not a package name", "such as book_ings")
    is_one_line(consumer(parent, "new", "\udcff"), "NAME: not valid UTF-8")
    assert {path: path.stat().st_mtime_ns for path in parent.rglob("*")} == before


@pytest.mark.unit
def test_a_folder_that_cannot_be_read_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = Path.iterdir

    def listed(folder: Path) -> Iterator[Path]:
        if folder == tmp_path / "bookings":
            raise PermissionError(13, "Permission denied")
        return listing(folder)

    (tmp_path / "bookings").mkdir()
    monkeypatch.setattr(Path, "iterdir", listed)
    with pytest.raises(Misconfigured, match=r"bookings: cannot be written \(Permission denied\); choose another"):
        write("bookings", tmp_path)


@pytest.mark.unit
@pytest.mark.parametrize("name", ["z", LONG])
def test_a_service_of_any_name_passes_its_linter(tmp_path: Path, name: str) -> None:
    """Lines stay short, and imports in order."""
    for path, text in rendered(name, "0.1.0").items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    run(tmp_path, BIN / "ruff", "check", "--no-cache", ".")
    run(tmp_path, BIN / "ruff", "format", "--no-cache", "--check", ".")


def run(directory: Path, *command: str | Path, **environment: str) -> str:
    """Run a program with no setting of this process."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=directory,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(600)  # programs that a slow machine takes minutes for
def test_a_new_service_passes_the_strict_type_checker(parent: Path) -> None:
    cache = ROOT / ".mypy_cache" / "new_service"  # without it mypy reads the whole framework again
    run(parent / "bookings", sys.executable, "-m", "mypy", "--cache-dir", str(cache), MYPYPATH=str(ROOT))


_BY_THE_READER = ("python3 -m venv", "pip install", "docker compose", "set -a")


def commands_of(page: Path) -> Iterator[list[str]]:
    """The commands of a page that can run here."""
    for block in documents.blocks(page):
        for line in documents.commands(block) if block.language == "sh" else ():
            if not line.startswith(_BY_THE_READER):
                yield shlex.split(line)


@pytest.mark.timeout(600)  # programs that a slow machine takes minutes for
async def test_the_page_about_it_works_as_pasted(place: Place, tmp_path: Path) -> None:
    """The service passes its tests, and applies a message."""
    await new_topic(place.kafka, 2, "orders")
    directory, ran = tmp_path, []
    for words in commands_of(ROOT / "docs" / "how-to" / "new-service.md"):
        ran.append(words[1])
        if words[0] == "cd":
            directory /= words[1]
        elif words[0] == "python":
            output = await asyncio.to_thread(
                run, directory, sys.executable, *words[1:], CONSUMER_TEST_POSTGRES_DSN=place.dsn
            )
            assert "9 passed" in output
        elif words[:2] == ["consumer", "run"]:
            async with running(words[1:], place.settings(postgres_dsn=place.dsn), directory):

                async def is_settled() -> bool:
                    return bool(await value(place.dsn, "select sum(next_offset) = 2 from consumer.positions"))

                await until("both messages to be settled", is_settled, 90)
        else:
            services = {"CONSUMER_POSTGRES_DSN": place.dsn, "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": place.kafka}
            done = await asyncio.to_thread(consumer, directory, *words[1:], **services)
            assert done.returncode == 0, (words, done.stderr)
    assert ran == ["new", "orders", "-m", "migrate", "produce", "produce", "run"]
    assert await query(place.dsn, "select customer, total from customers") == [("ada", 100)]


# -- files for Docker, without Docker -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose(parent: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((parent / "bookings" / "docker-compose.yml").read_text())
    return document


@pytest.mark.unit
def test_compose_follows_the_specification_and_uses_our_images(compose: dict[str, Any]) -> None:
    compose_spec.PyCompose.from_json(json.dumps(compose))
    ours = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert compose["services"].keys() == ours["services"].keys()
    for name in ("kafka", "topics", "postgres", "valkey"):
        assert compose["services"][name]["image"] == ours["services"][name]["image"], name


@pytest.mark.unit
def test_addresses_of_env_are_those_of_compose(parent: Path, compose: dict[str, Any]) -> None:
    lines = (parent / "bookings" / ".env").read_text().splitlines()
    env = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    settings = {name: text for name, text in env.items() if name.startswith("CONSUMER_")}
    assert {name.removeprefix("CONSUMER_").lower() for name in settings} <= Settings.model_fields.keys()
    services = compose["services"]
    assert env["CONSUMER_KAFKA_BOOTSTRAP_SERVERS"] in services["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    postgres = services["postgres"]["environment"]
    user, password = postgres["POSTGRES_USER"], env["POSTGRES_PASSWORD"]
    assert env["CONSUMER_POSTGRES_DSN"] == f"postgresql://{user}:{password}@127.0.0.1:5432/{postgres['POSTGRES_DB']}"
    assert env["CONSUMER_REDIS_URL"] == f"redis://:{env['VALKEY_PASSWORD']}@127.0.0.1:6379/0"
    used = set(re.findall(r"\$\{(\w+):-development-only\}", (parent / "bookings" / "docker-compose.yml").read_text()))
    assert used == {"POSTGRES_PASSWORD", "VALKEY_PASSWORD"} <= env.keys()


@pytest.mark.unit
def test_names_that_yaml_takes_for_something_else_stay_text() -> None:
    for name in ("yes", "on", "null"):
        document = yaml.safe_load(rendered(name, "0.1.0")["docker-compose.yml"])
        environment: Mapping[str, Any] = document["services"]["postgres"]["environment"]
        assert [document["name"], environment["POSTGRES_USER"], environment["POSTGRES_DB"]] == [name] * 3


@pytest.mark.unit
def test_the_image_is_of_our_python_and_not_root(parent: Path) -> None:
    text = (parent / "bookings" / "Dockerfile").read_text()
    ours = (ROOT / "deploy" / "Dockerfile").read_text()

    def lines(dockerfile: str, word: str) -> Iterator[str]:
        return (line for line in dockerfile.splitlines() if line.startswith(word))

    for word in ("FROM", "USER", "STOPSIGNAL", "ENTRYPOINT"):
        assert list(lines(text, word)) == list(lines(ours, word)) != []
    copied = {part for line in lines(text, "COPY") if "--from" not in line for part in line.split()[1:-1]}
    allowed = re.findall(r"^!(\S+)", (parent / "bookings" / ".dockerignore").read_text(), re.MULTILINE)
    assert copied == set(allowed)
    assert all((parent / "bookings" / name).exists() for name in copied)
