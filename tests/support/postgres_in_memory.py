"""PostgreSQL whose files are in memory.

A database for each test is 300 files. ext4 looks one by one for inodes that were not deleted in the last seconds: 43 to
280 ms of CPU time for `CREATE DATABASE` beside `DROP DATABASE`, 15 ms in memory (measured on Linux 6.18, 2026-11-30). That
was a fifth of the CPU time of all tests.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from consumer.local_servers import Postgres

_MEMORY = Path("/dev/shm")
_NEEDED = 4 << 30  # bytes; a run of all tests uses less than 1 GB


class PostgresInMemory(Postgres):
    """A server in /dev/shm, if that has 4 GB.

    Else it is where other servers are. What it has written survives its own kill, as on a disk, but not the machine's.
    """

    name = "postgresql-test"

    def place(self) -> str:
        if not _MEMORY.is_dir() or not os.access(_MEMORY, os.W_OK | os.X_OK):
            return super().place()
        self._remove_abandoned()
        return str(_MEMORY) if shutil.disk_usage(_MEMORY).free >= _NEEDED else super().place()

    def _remove_abandoned(self) -> None:
        """Remove what runs that were killed have left in memory."""
        for directory in _MEMORY.glob(f"consumer-{self.name}-*"):
            with suppress(OSError, ValueError, IndexError):
                pid = int((directory / "data" / "postmaster.pid").read_text().splitlines()[0])
                if not Path(f"/proc/{pid}").exists():
                    shutil.rmtree(directory, ignore_errors=True)
