"""Starts a worker process, and tells it what to work on.

An interpreter needs half a second for a worker's imports. `consumer run` starts the first one before its own imports, and
knows only afterwards what it is for. So App and settings come through the pipe, which also keeps secrets out of lists of
processes. An interpreter whose pipe ends before that ends silently. Imports nothing that takes time.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_ROOT = str(Path(__file__).resolve().parent.parent.parent)
_LENGTH_BYTES = 8


class Interpreter(NamedTuple):
    """A process that imports, then reads an assignment from its standard input.

    reports: the descriptor from which its reports are read.
    """

    process: subprocess.Popen[bytes]
    reports: int


_early: list[Interpreter] = []


def start() -> Interpreter:
    """Start an interpreter; raises OSError."""
    reports, report_to = os.pipe()
    try:
        # Not asyncio's: that waits until the pipes are closed, and children of the worker may hold them.
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",  # do not import a logging.py of the current directory
                "-c",
                # The collector would look at every module again and again: a tenth of the imports.
                f"import gc, sys; gc.disable(); sys.path.append({_ROOT!r}); from consumer.worker.process import main; main()",
                str(report_to),
            ],
            stdin=subprocess.PIPE,
            bufsize=0,
            pass_fds=(report_to,),
            process_group=0,  # its own, so that its children can be killed with it, and Ctrl-C does not reach it
        )
    except BaseException:
        os.close(reports)
        raise
    finally:
        os.close(report_to)
    return Interpreter(process, reports)


def start_early() -> None:
    """Start an interpreter for `taken_early`.

    The end of this process ends it: at once if Python ends, else with the pipe, once it has imported.
    """
    early = start()
    _early.append(early)
    atexit.register(_discard)


def taken_early() -> Interpreter | None:
    """Return the interpreter that was started early, once."""
    return _early.pop() if _early else None


def _discard() -> None:
    if early := taken_early():
        early.process.kill()
        early.process.wait()


def assignment(path: str, environment: Mapping[str, str]) -> bytes:
    """Return what tells an interpreter its App and its environment."""
    content = json.dumps([path, dict(environment)]).encode()
    return len(content).to_bytes(_LENGTH_BYTES, "big") + content


def read_assignment() -> str | None:
    """Read the assignment, and set the environment.

    Returns the path of the App; None when the pipe ends before.
    """
    content = _read_exactly(int.from_bytes(_read_exactly(_LENGTH_BYTES), "big"))
    if not content:
        return None
    path, environment = json.loads(content)
    os.environ.clear()
    os.environ.update(environment)
    return str(path)


def _read_exactly(size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = os.read(0, size - len(content))
        if not part:
            return b""
        content += part
    return content
