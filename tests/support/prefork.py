"""Runs commands and workers as forks of one process.

It has imported what they need: each would import for half a second of CPU time, and the tests run hundreds. A fork has
its own arguments, environment, working directory, output and exit code, and ends like any interpreter. Limitations: what
is decided while modules are imported (the width of help texts) is decided by the environment of the server, and `ps`
shows the server's command line.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, TextIO

_BYTES_MAX = 200_000  # of a request: an environment, mostly


class Process:
    """A forked command; what tests use of `subprocess.Popen`.

    stdout: its output as text, if it was started without a file for it.
    """

    def __init__(
        self, program: Sequence[str], cwd: Path, environment: Mapping[str, str], stdout: int | None, stderr: int
    ) -> None:
        self.args = list(program)
        self.returncode: int | None = None
        self.stdout: TextIO | None = None
        self._lock = threading.Lock()
        request = json.dumps([self.args, str(cwd), dict(environment)]).encode()
        assert len(request) < _BYTES_MAX
        self._answers, answering = os.pipe()
        opened = [answering]
        if stdout is None:
            reading, stdout = os.pipe()
            opened.append(stdout)
            self.stdout = os.fdopen(reading, "r")
        socket.send_fds(_server(), [request], [stdout, stderr, answering])
        for file in opened:
            os.close(file)
        self.pid = int.from_bytes(os.read(self._answers, 8), "little")

    def __del__(self) -> None:
        os.close(self._answers)

    def poll(self) -> int | None:
        return self._exit_code(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._exit_code(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def _exit_code(self, seconds: float | None) -> int | None:
        if self.returncode is None and self._has_ended(seconds):
            with self._lock:
                if self.returncode is None:
                    code = os.read(self._answers, 8)
                    assert len(code) == 8, "the process that waits for a command was killed"
                    self.returncode = int.from_bytes(code, "little", signed=True)
        return self.returncode

    def _has_ended(self, seconds: float | None) -> bool:
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        return bool(poll.poll(None if seconds is None else seconds * 1000))

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    program: Sequence[object],
    environment: Mapping[str, str],
    stderr: IO[Any],
    *,
    cwd: Path | None = None,
    stdout: IO[Any] | None = None,
) -> Process:
    """Start `python PROGRAM…`.

    A program is a path, or `-m` and a module, and its arguments. Without `stdout` its output goes to a pipe.
    """
    files = None if stdout is None else stdout.fileno(), stderr.fileno()
    return Process([str(part) for part in program], cwd or Path.cwd(), environment, *files)


def run(
    program: Sequence[str], cwd: Path, environment: Mapping[str, str], seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run `python PROGRAM…` to its end.

    Returns a `subprocess.CompletedProcess` with its output as text.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = start(program, environment, stderr, cwd=cwd, stdout=stdout)
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
        outputs = [Path(f"/proc/self/fd/{file.fileno()}").read_bytes().decode() for file in (stdout, stderr)]
    return subprocess.CompletedProcess(list(program), code, *outputs)


async def answer(
    program: Sequence[str], environment: Mapping[str, str], *, cwd: Path | None = None, seconds: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `python PROGRAM…` to its end, or until this is cancelled."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = start(program, environment, stderr, cwd=cwd, stdout=stdout)
        try:
            async with asyncio.timeout(seconds):
                while (code := process.poll()) is None:  # noqa: ASYNC110 - of another process
                    await asyncio.sleep(0.02)
        finally:
            process.kill()
        outputs = [Path(f"/proc/self/fd/{file.fileno()}").read_bytes().decode() for file in (stdout, stderr)]
    return subprocess.CompletedProcess(list(program), code, *outputs)


@cache
def _server() -> socket.socket:
    """Start the server of this process, which ends with it."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (own, other):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _BYTES_MAX)
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("CONSUMER_", "COV_"))}
    server = subprocess.Popen(
        [sys.executable, __file__, str(other.fileno())],
        env={**environment, "COLUMNS": "200", "TERM": "dumb"},
        pass_fds=[other.fileno()],
        stdin=subprocess.DEVNULL,
    )
    other.close()
    atexit.register(server.wait)
    atexit.register(own.close)  # first: the server reads the end of its requests
    return own


def _serve(requests: socket.socket) -> tuple[list[str], str, dict[str, str]] | None:
    """Fork for each request.

    Returns in the fork with what to run, and in the server at the end, with None.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the processes that wait for commands leave no zombies
    while True:
        request, files, _, _ = socket.recv_fds(requests, _BYTES_MAX, 3)
        if not request:
            return None
        if os.fork():
            for file in files:
                os.close(file)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        requests.close()
        stdout, stderr, answers = files
        if not (command := os.fork()):
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            for file in files:
                os.close(file)
            program, cwd, environment = json.loads(request)
            return program, cwd, environment
        os.write(answers, command.to_bytes(8, "little"))
        _, status = os.waitpid(command, 0)
        with suppress(BrokenPipeError):  # what started it is gone
            os.write(answers, os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True))
        os._exit(0)


def _be(program: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Become `python PROGRAM…`."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if program[0] == "-m":
        sys.path[0] = cwd  # it was the folder of this file
        sys.argv[1:] = program[2:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(program[0]).parent)
        sys.argv[:] = program
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    import consumer.cli.main
    import consumer.worker.process
    import consumer.worker.supervisor

    consumer.cli.main.whole()
    gc.freeze()  # or the end of a fork looks at every object once more, which is most of its CPU time
    if (wanted := _serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        _be(*wanted)
