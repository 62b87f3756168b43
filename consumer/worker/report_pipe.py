"""The pipe on which a worker reports to its supervisor.

It never waits: a report that finds the pipe full is refused whole, and one that went in by half is completed later, since a
line must not be cut. Limitations: whether the supervisor reads is unknown.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode
_BYTES_MAX = 1 << 20  # of a line; the supervisor reads no longer ones


class ReportPipe:
    """Writes reports as JSON lines to a descriptor."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._rest = b""

    def send(self, fields: dict[str, Any]) -> bool:
        """Send a report; return False if it was refused.

        Then nothing of it was sent: the pipe is full or closed, or the report too large.
        """
        line = _encode(fields) + b"\n"
        if len(line) > _BYTES_MAX or not self._flush():
            return False
        self._rest = line
        self._flush()
        if len(self._rest) == len(line):
            self._rest = b""
            return False
        if self._rest:
            asyncio.get_running_loop().add_writer(self._descriptor, self._go_on)
        return True

    def _flush(self) -> bool:
        """Write the rest of the last report; return whether all is written."""
        try:
            while self._rest:
                self._rest = self._rest[os.write(self._descriptor, self._rest) :]
        except BlockingIOError:
            return False
        except OSError:  # the supervisor is gone, which standard input reports too
            return False
        return True

    def _go_on(self) -> None:
        try:
            self._rest = self._rest[os.write(self._descriptor, self._rest) :]
        except BlockingIOError:
            return
        except OSError:
            self._rest = b""
        if not self._rest:
            asyncio.get_running_loop().remove_writer(self._descriptor)
