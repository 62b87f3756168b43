"""`consumer console`: bad input is one line with exit code 2."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from harness import ROOT, Result, consumer, is_one_line

APP = "from consumer import App\napp = App('small')\n@app.handler('t')\nasync def settle(body: bytes) -> None: ...\n"
AUTH = (
    "def raises(request): raise RuntimeError('with a secret')\ndef who(request): return request.headers.get('x-user')\n"
)


def run(cwd: Path, *arguments: str, path: str = str(ROOT), **environment: str) -> Result:
    (cwd / "small.py").write_text(APP)
    (cwd / "who_asks.py").write_text(AUTH)
    dsn = "postgresql://none@127.0.0.1:1/none"
    return consumer(cwd, "console", "small:app", *arguments, CONSUMER_POSTGRES_DSN=dsn, PYTHONPATH=path, **environment)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--listen", "127.0.0.1"], "not an address"),
        (["--listen", "0.0.0.0:0"], "add --auth"),
        (["--listen", "192.0.2.1:80", "--auth", "who_asks:who", "--allow-insecure", "http"], "no such address"),
        (["--listen", "127.0.0.1:0", "--auth", "who_asks:raises"], "fails for a request without headers"),
        (["--listen", "127.0.0.1:0", "--auth", "who_asks:absent"], "cannot be imported"),
        (["--listen", "127.0.0.1:0", "--auth", "absent:who"], "cannot be imported"),
        (["--reports", "/nonexistent"], "no such directory"),
        (["--auth", "proxy", "--console-proxy-secret", "short"], "CONSUMER_CONSOLE_PROXY_SECRET: shorter"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    result = run(tmp_path, *arguments)
    is_one_line(result, says)
    assert "secret" not in result.stderr.replace("SECRET", "") or "short" not in result.stderr


def test_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        is_one_line(run(tmp_path, "--listen", f"127.0.0.1:{other.getsockname()[1]}"), "the port is in use")


def test_missing_extra_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "jinja2.py").write_text("raise ModuleNotFoundError('gone', name='jinja2')\n")
    is_one_line(run(tmp_path, path=f"{absent}:{ROOT}"), "pip install 'idempotent-consumer[console]'")
