"""Ctrl-C at any moment of a command: one line, exit code 130.

And tests that press it where SIGINT is ignored.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from harness import ROOT

import consumer
from consumer.local_servers import free_port

# Seconds after the command's first line: over all imports, to a command that waits for PostgreSQL.
DELAYS = (0.0, 0.02, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 3.0)
APP = "from consumer import App\napp = App('x')\n@app.handler('t')\nasync def h(p: dict): ...\n"


def console_script(directory: Path) -> list[str]:
    """What pip makes of the entry point in pyproject.toml."""
    module, _, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][
        "consumer"
    ].partition(":")
    script = directory / "script.py"
    script.write_text(
        f"import re\nimport sys\nfrom {module} import {function}\nif __name__ == '__main__':\n    sys.exit({function}())\n"
    )
    return [sys.executable, str(script)]


def answers_signals(process: int) -> bool:
    """Whether the process has its own handler of SIGTERM.

    Python itself has none: before that, it is Python's own start.
    """
    words = Path(f"/proc/{process}/status").read_text().partition("SigCgt:")[2].split()
    return bool(words) and bool(int(words[0], 16) & 1 << signal.SIGTERM - 1)


def interrupted(command: list[str], cwd: Path, seconds: float) -> tuple[int, str]:
    """Exit code and standard error of a command after SIGINT.

    The signal comes after so many seconds.
    """
    clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(ROOT), "CONSUMER_LOG_LEVEL": "error"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not answers_signals(process.pid):
            assert process.poll() is None
        time.sleep(seconds)  # what is varied here, not a wait for something
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
        return process.returncode, errors
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("entry", ["module", "script"])
@pytest.mark.parametrize("command", ["status", "run", "dlq"])
def test_ctrl_c_at_any_moment_is_one_line(tmp_path: Path, entry: str, command: str) -> None:
    (tmp_path / "x.py").write_text(APP)
    dsn = f"postgresql://127.0.0.1:{free_port()}/x"
    start = [sys.executable, "-m", "consumer"] if entry == "module" else console_script(tmp_path)
    arguments = {"status": ["status", "x:app"], "run": ["run", "x:app"], "dlq": ["dlq", "list", "x:app"]}[command]
    arguments += ["--postgres-dsn", dsn, "--wait", "60"]
    for delay in DELAYS:
        ended = interrupted([*start, *arguments], tmp_path, delay)
        assert ended == (130, "consumer: interrupted\n"), f"after {delay} s"


def test_sigterm_while_the_application_is_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import os, time\nos.write(2, b'.')\ntime.sleep(60)\n" + APP)
    process = subprocess.Popen(
        [sys.executable, "-m", "consumer", "status", "x:app", "--postgres-dsn", "postgresql://127.0.0.1:1/x"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None and process.stderr.read(1) == b"."  # it imports the application
        process.terminate()
        assert process.communicate(timeout=60)[1] == b"consumer: terminated\n"
        assert process.returncode == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()


def test_package_offers_every_name_that_it_lists() -> None:
    assert set(consumer._MODULES) == set(consumer.__all__)
    for name in consumer.__all__:
        assert getattr(consumer, name).__name__ == name
    assert set(consumer.__all__) <= set(dir(consumer))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        consumer.Nothing  # type: ignore[attr-defined]  # noqa: B018


def test_package_imports_nothing_before_a_name_is_used() -> None:
    code = "import sys; before = set(sys.modules); import consumer.cli.interrupts; print(*set(sys.modules) - before)"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert set(result.stdout.split()) == {"consumer", "consumer.cli", "consumer.cli.interrupts"}


def test_tests_that_press_ctrl_c_pass_where_sigint_is_ignored() -> None:
    tests = [
        "tests/cli/test_interrupts.py::test_ctrl_c_at_any_moment_is_one_line[status-module]",
        "tests/demo/test_demo.py::test_ended_early_it_leaves_nothing[2]",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests],
        cwd=ROOT,
        env={name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout
