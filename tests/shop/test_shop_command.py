"""`make shop` as people meet it: its help, a port that is taken, and nothing left after Ctrl-C."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from shop_process import Script, Shop, soon

from handlers.shop.__main__ import main


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that PostgreSQL's own user can reach, as those of pytest are not."""
    with TemporaryDirectory(dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_a_port_that_is_taken(by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        monkeypatch.setenv("SHOP_PORT", port)
        # Refused before anything is started: starting would say so on standard output.
        assert main(["--port", port] if by == "flag" else []) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert f"port {port}" in told.err and "is taken" in told.err and "--port 0" in told.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "99999"),
        ("--port", "-1"),
        ("--port", "http"),
        ("--port", ""),
        ("--token-seconds", "0"),
        ("--token-seconds", "nan"),
        ("--nothing",),
    ],
)
def test_arguments_that_are_none(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_a_bad_port_in_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SHOP_PORT", "many")
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2 and "'many' is no port" in capsys.readouterr().err


def test_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for each in ("--port", "SHOP_PORT", "--token-seconds", "--json", "Ctrl-C", "make shop"):
        assert each in told


def left_behind(directory: Path) -> list[str]:
    """Directories of its servers, and processes that work in them."""
    found = [each.name for each in directory.iterdir()]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(directory) in process.read_text():
                found.append(process.read_text())
        except OSError:
            continue
    return found


def test_ctrl_c_ends_all_of_it(place: Path) -> None:
    """Also with a page that listens to its events, and with a broker that was stopped while a message waits for it."""
    shop = Shop(TMPDIR=str(place))
    try:
        script = Script(shop)
        assert left_behind(place) != []
        worker = script.view()["services"]["worker"]["pid"]
        host, port = shop.host.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as listening:
            head = f"GET /orders/{script.order}/events HTTP/1.1\r\nhost: {shop.host}\r\ncookie: {script.cookie}\r\n\r\n"
            listening.sendall(head.encode())
            assert b"text/event-stream" in listening.recv(4096)
            assert script.post("/services/kafka", '{"do": "stop"}').status == 200
            assert script.pay().status == 503
            shop.process.send_signal(signal.SIGINT)
            assert shop.process.wait(60) == 0
    finally:
        shop.end()
    soon(lambda: left_behind(place) == [], f"nothing to be left: {left_behind(place)}")
    soon(lambda: not Path(f"/proc/{worker}").exists(), "the worker to be gone")
