"""Runs a `consumer` command at a terminal: output, keys and signals."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path

from harness import ROOT


def _at_a_terminal() -> None:
    """In the child: let Ctrl-C at this terminal reach it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class AtTerminal:
    """A command at a terminal; use as a context, which kills it.

    program: another one than `consumer`, as arguments of Python.
    """

    def __init__(
        self,
        cwd: Path,
        *arguments: str,
        columns: int = 80,
        program: tuple[str, ...] = ("-m", "consumer"),
        environment: Mapping[str, str] = {},
    ) -> None:
        clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
        self._fd, child = pty.openpty()
        path = os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "support"]))
        self.process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=cwd,
            env={**clean, "PYTHONPATH": path, "COLUMNS": str(columns), "TERM": "dumb", **environment},
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=_at_a_terminal,
        )
        os.close(child)
        self.shown = ""

    def __enter__(self) -> AtTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._fd)

    def until(self, text: str, seconds: float = 60) -> None:
        """Read what it shows until it has shown this."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline and self._read(deadline), f"not shown: {text!r} in {self.shown!r}"

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def end(self, seconds: float = 60) -> int:
        """Its exit code; everything that it has shown is in `shown`."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        assert time.monotonic() < deadline, f"it has not ended: {self.shown!r}"
        return self.process.wait(max(1, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        """Read on; False at its end."""
        if not select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the other end is closed
            return False
        self.shown += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)
