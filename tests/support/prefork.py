"""Runs `consumer` commands as forks of a process that has imported them.

A command imports for half a second of CPU time, and the tests run hundreds. A fork has its own arguments, environment,
working directory, output and exit code, and ends like any interpreter. Limitations: what is decided while modules are
imported (the width of help texts) is decided by the environment of the server.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

_BYTES_MAX = 200_000  # of a request: an environment, mostly


def run(
    arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run `consumer ARGUMENTS…` to its end.

    Returns a `subprocess.CompletedProcess` with its output as text.
    """
    request = json.dumps([list(arguments), str(cwd), dict(environment)]).encode()
    assert len(request) < _BYTES_MAX
    answer, answering = os.pipe()
    with (
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
        os.fdopen(answer, "rb", buffering=0) as answers,
    ):
        socket.send_fds(_server(), [request], [stdout.fileno(), stderr.fileno(), answering])
        os.close(answering)
        pid = int.from_bytes(answers.read(8), "little")
        signal_after = _Alarm(pid, seconds)
        code = int.from_bytes(answers.read(8), "little", signed=True)
        signal_after.cancel()
        outputs = [Path(f"/proc/self/fd/{file.fileno()}").read_bytes().decode() for file in (stdout, stderr)]
    if signal_after.went_off:
        raise subprocess.TimeoutExpired(list(arguments), seconds)
    return subprocess.CompletedProcess(list(arguments), code, *outputs)


class _Alarm:
    """Kills a command that does not end in time."""

    def __init__(self, pid: int, seconds: float) -> None:
        self.went_off = False
        self._pid = pid
        self._timer = threading.Timer(seconds, self._kill)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        self._timer.cancel()

    def _kill(self) -> None:
        self.went_off = True
        os.kill(self._pid, signal.SIGKILL)


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
            arguments, cwd, environment = json.loads(request)
            return arguments, cwd, environment
        os.write(answers, command.to_bytes(8, "little"))
        _, status = os.waitpid(command, 0)
        os.write(answers, os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True))
        os._exit(0)


def _be(arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Become `python -m consumer ARGUMENTS…`."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = cwd  # it was the folder of this file
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv[1:] = arguments
    runpy.run_module("consumer", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    import consumer.cli.main

    consumer.cli.main.whole()
    if (wanted := _serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        _be(*wanted)
