"""`make shop` as people use it: its help, and bad arguments.

conftest.py tests Ctrl-C, where the shop of all tests ends.
"""

from __future__ import annotations

import socket

import pytest

from handlers.shop.__main__ import main


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_a_port_that_is_taken(by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        monkeypatch.setenv("SHOP_PORT", port)
        # Refused before anything is started: starting would say so on standard output.
        assert main(["--port", port] if by == "flag" else []) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert f"port {port}" in printed.err and "is taken" in printed.err and "--port 0" in printed.err


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
    printed = capsys.readouterr().out
    for text in ("--port", "SHOP_PORT", "--token-seconds", "--json", "Ctrl-C", "make shop"):
        assert text in printed
