"""`consumer run --reload`: what is watched, and what a change does."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Command, Place, Sent, consumer, is_one_line, query, running, until

from consumer.cli import reload
from consumer.cli.watched_files import folders_of, is_source
from consumer.core.errors import Misconfigured
from consumer.settings import Settings

HERE = Path("/home/me/shop")
CONFIG = HERE / "production.toml"


@pytest.mark.unit
@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ("shop.py", True),
        ("orders/handlers.py", True),
        ("production.toml", True),
        ("other.toml", False),
        ("notes.txt", False),
        (".#shop.py", False),
        (".venv/lib/x.py", False),
        ("venv/lib/x.py", False),
        ("orders/__pycache__/handlers.py", False),
        ("../elsewhere/x.py", False),
    ],
)
def test_python_files_and_the_configuration_are_watched(changed: str, counts: bool) -> None:
    assert is_source(Path(os.path.normpath(HERE / changed)), [HERE], {CONFIG}) == counts


@pytest.mark.unit
def test_hidden_folders_above_the_watched_one_do_not_matter() -> None:
    assert is_source(Path("/x/.cache/shop/app.py"), [Path("/x/.cache/shop")], set())


@pytest.mark.unit
def test_watched_is_the_current_directory_or_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    for folder in (work, elsewhere / "orders_elsewhere"):
        folder.mkdir(parents=True)
    (work / "orders_here.py").write_text("raise ValueError")  # it is not imported
    (elsewhere / "orders_elsewhere" / "__init__.py").touch()
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(elsewhere))
    assert folders_of("orders_here:app", []) == [work]
    assert folders_of("orders_missing.handlers:app", []) == [work]
    assert folders_of("orders_elsewhere.handlers:app", []) == [elsewhere / "orders_elsewhere"]
    assert folders_of("orders_here:app", [Path("../elsewhere")]) == [elsewhere]
    with pytest.raises(Misconfigured, match="is an installed package; name what to watch with --reload-dir"):
        folders_of("msgspec:app", [])


@pytest.mark.unit
def test_an_app_that_is_installed_below_the_current_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of its sources would start the installed code again."""
    installed = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    (installed / "orders_installed").mkdir(parents=True)
    (installed / "orders_installed" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(installed))
    with pytest.raises(Misconfigured, match=r"orders_installed\.handlers is an installed package"):
        folders_of("orders_installed.handlers:app", [])


@pytest.mark.unit
def test_linked_sources_are_watched_and_what_is_beside_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    for folder in (work, elsewhere / "orders"):
        folder.mkdir(parents=True)
    (elsewhere / "orders" / "__init__.py").touch()
    (elsewhere / "single.py").touch()
    (work / "orders_linked").symlink_to(elsewhere / "orders")
    (work / "single_linked.py").symlink_to(elsewhere / "single.py")
    monkeypatch.chdir(work)
    assert folders_of("orders_linked.handlers:app", []) == [work, elsewhere / "orders"]
    assert folders_of("single_linked:app", []) == [work, elsewhere]


@pytest.mark.unit
def test_a_link_among_installed_packages_is_followed_to_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editable install may be a link."""
    sources, installed = tmp_path / "src" / "orders", tmp_path / ".venv" / "site-packages"
    for folder in (sources, installed):
        folder.mkdir(parents=True)
    (sources / "__init__.py").touch()
    (installed / "orders_symlinked").symlink_to(sources)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(installed))
    assert folders_of("orders_symlinked.handlers:app", []) == [tmp_path]


@pytest.mark.unit
def test_reload_without_its_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "watchfiles", None)
    with pytest.raises(Misconfigured, match=r"pip install 'idempotent-consumer\[reload\]'"):
        _ = reload.watching("shop:app", Settings(), [])


@pytest.mark.unit
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "shop:app", "--reload-dir", "."], "--reload-dir: no effect alone"),
        (["run", "shop:app", "--reload", "--reload-dir", "nowhere"], "--reload-dir nowhere: not a directory"),
        (["run", "shop.py", "--reload"], "does not name an App"),
    ],
)
def test_flags_that_cannot_work_are_refused_at_once(tmp_path: Path, arguments: list[str], says: str) -> None:
    is_one_line(consumer(tmp_path, *arguments), says)


APP = """
import asyncio, pathlib
from consumer import App, Tx
app = App({name!r})

@app.handler({topic!r})
async def settle(payment: dict, tx: Tx) -> None:
    pathlib.Path("begun").touch()
    while payment["id"] == "slow" and not pathlib.Path("go").exists():
        await asyncio.sleep(0.02)
    await tx.execute("insert into effects values ($1, 1, 1)", payment["id"] + " {version}")
"""


class Edited:
    """An App whose file is edited while `consumer run --reload` runs it."""

    def __init__(self, place: Place, topic: str, directory: Path) -> None:
        self.place, self.directory = place, directory
        self.name, self.module = f"app-{uuid.uuid4().hex[:8]}", f"app_{uuid.uuid4().hex[:8]}"
        self.topic = topic

    def save(self, version: str, suffix: str = "") -> None:
        text = APP.format(name=self.name, topic=self.topic, version=version) + suffix
        (self.directory / f"{self.module}.py").write_text(text)

    def run(self) -> Any:
        return running(["run", f"{self.module}:app", "--reload"], self.place.settings(), self.directory)

    async def save_while_a_message_is_in_hand(self, command: Command) -> None:
        """The handler waits for the file `go`; the drain waits for it."""
        await self.place.send(self.topic, Sent({"id": "slow"}, id="slow"))
        await until("the slow message to be in hand", self._slow_has_begun, 90)
        self.save("two")
        await until("the drain", seen(command, "stopping: workers drain"), 90)

    async def _slow_has_begun(self) -> bool:
        return (self.directory / "begun").exists()


def seen(command: Command, text: str, times: int = 1) -> Callable[[], Any]:
    async def is_logged() -> bool:
        return command.errors.count(text) >= times

    return is_logged


def applied(place: Place, *names: str) -> Callable[[], Any]:
    async def are_there() -> bool:
        return await query(place.dsn, "select id from effects order by id") == [(name,) for name in names]

    return are_there


async def test_a_change_drains_workers_and_runs_the_new_code(place: Place, tmp_path: Path) -> None:
    topic = await place.topic()
    app = Edited(place, topic, tmp_path)
    app.save("one")
    async with app.run() as command:
        await app.save_while_a_message_is_in_hand(command)
        (tmp_path / "go").touch()
        await until("the message to be applied once, by the old code", applied(place, "slow one"), 90)
        await place.send(topic, Sent({"id": "quick"}, id="quick"))
        await until("the new code", applied(place, "quick two", "slow one"), 90)

        app.save("three", "this is no Python\n")
        await until("the error", seen(command, "not running: the next change of a file starts it again"), 90)
        [line] = [line for line in command.errors.splitlines() if line.startswith("consumer: ")]
        assert f"'{app.module}': cannot be imported; SyntaxError" in line and f"{app.module}.py:12)" in line
        app.save("four")
        await place.send(topic, Sent({"id": "late"}, id="late"))
        await until("the corrected code", applied(place, "late four", "quick two", "slow one"), 90)

        command.process.send_signal(signal.SIGINT)
        assert await command.wait() == 0, command.errors
    assert command.errors.count("a file has changed") >= 2, command.errors
    assert "Traceback" not in command.errors


async def test_workers_drain_when_the_watching_process_is_killed(place: Place, tmp_path: Path) -> None:
    app = Edited(place, await place.topic(), tmp_path)
    app.save("one")
    async with app.run() as command:
        await until("a worker", seen(command, "partitions opened"), 90)
        command.process.send_signal(signal.SIGKILL)
        await until("the drain", seen(command, "worker stopped"), 90)


async def test_ctrl_c_during_the_drain_of_a_change_lets_it_finish(place: Place, tmp_path: Path) -> None:
    app = Edited(place, await place.topic(), tmp_path)
    app.save("one")
    async with app.run() as command:
        await app.save_while_a_message_is_in_hand(command)
        command.process.send_signal(signal.SIGINT)
        (tmp_path / "go").touch()
        assert await command.wait(90) == 0, command.errors
    assert await query(place.dsn, "select id from effects") == [("slow one",)]
    assert "second signal" not in command.errors
