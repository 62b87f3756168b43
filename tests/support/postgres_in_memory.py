"""PostgreSQL whose files are in memory.

A database for each test is 300 files. ext4 looks one by one for inodes that were not deleted in the last seconds: 43 to
280 ms of CPU time for `CREATE DATABASE` beside `DROP DATABASE`, 15 ms in memory (measured on Linux 6.18, 2026-11-30). That
was a fifth of the CPU time of all tests.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from consumer.local_servers import Postgres

_MEMORY = Path("/dev/shm")
_NAME = "postgresql-test"
_NEEDED = 4 << 30  # bytes; a run of all tests uses less than 1 GB


class PostgresInMemory(Postgres):
    """A server in /dev/shm, if that has 4 GB.

    Else it is where other servers are. What it has written survives its own kill, as on a disk, but not the machine's.
    """

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self.name = f"{_NAME}-{os.getpid()}"

    def place(self) -> str:
        if not _MEMORY.is_dir() or not os.access(_MEMORY, os.W_OK | os.X_OK):
            return super().place()
        _remove_abandoned()
        return str(_MEMORY) if shutil.disk_usage(_MEMORY).free >= _NEEDED else super().place()


def _remove_abandoned() -> None:
    """Remove what runs that were killed have left in memory.

    A name has the process that began it. No file of the server says it reliably: initdb runs several, one after the other.
    """
    for directory in _MEMORY.glob(f"consumer-{_NAME}-*-*"):
        owner = directory.name.split("-")[-2]
        if not Path(f"/proc/{owner}").exists():
            shutil.rmtree(directory, ignore_errors=True)
