"""PostgreSQL servers copied from another: a standby, or a restored backup."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from harness import until, value
from proxy import Proxy

from consumer.local_servers import LocalServer, Postgres


class Copy(Postgres):
    """A server that begins as a base backup of `primary`.

    port: where that is reached, perhaps a proxy's.
    """

    def __init__(self, primary: Postgres, port: int = 0, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self._primary = primary
        self._primary_port = port or primary.port
        self._password = primary._password

    def prepare(self) -> None:
        self._install = self._primary._install
        data = self.directory / "data"
        data.mkdir(mode=0o700)
        if os.geteuid() == 0:
            self.directory.chmod(0o755)
            os.chown(data, self.identity()["user"], self.identity()["group"])
        source = f"postgresql://demo:{self._password}@127.0.0.1:{self._primary_port}/postgres"
        subprocess.run(
            [
                self.program("pg_basebackup"),
                "-D",
                data,
                "-d",
                source,
                *self.kind(),
                "-c",
                "fast",
                "--no-sync",
            ],
            check=True,
            capture_output=True,
            cwd=self.directory,
            env=self.environment(),
            **self.identity(),
        )

    def kind(self) -> list[str]:
        raise NotImplementedError


class Standby(Copy):
    """Follows the primary, asynchronously; `select pg_promote()` makes it one."""

    name = "standby"

    def kind(self) -> list[str]:
        return ["-R", "-X", "stream"]


class Backup(Copy):
    """A base backup: `take` it, later `restore` it to a point.

    The point is a named restore point, reached with the WAL that the primary has left.
    """

    name = "backup"

    def kind(self) -> list[str]:
        return ["-X", "none"]

    def take(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="consumer-backup-", dir=self.place()))
        self.prepare()

    def restore(self, point: str, port: int) -> None:
        """Start as a server of its own, restored to the point.

        Recovery goes to the point; then the server is a primary, on this port.
        """
        data = self.directory / "data"
        self._options = {
            **self._options,
            "restore_command": f"cp {self._primary.directory}/data/pg_wal/%f %p",
            "recovery_target_name": point,
            "recovery_target_action": "promote",
        }
        subprocess.run(["touch", data / "recovery.signal"], check=True, **self.identity())
        self.port = port
        self.run()
        self.wait()


def power_cut(server: LocalServer) -> None:
    """SIGKILL for the server and all that it has started, at once."""
    os.killpg(server.pid, signal.SIGKILL)
    server.kill()


async def caught_up(primary: Postgres, standby: Postgres) -> None:
    """Wait until the standby has replayed what the primary has written."""
    written = await value(primary.dsn(), "select pg_current_wal_lsn()::text")

    async def replayed() -> bool:
        return bool(await value(standby.dsn(), "select pg_last_wal_replay_lsn() >= $1::text::pg_lsn", written))

    await until("the standby to have caught up", replayed)


def through(dsn: str, proxy: Proxy, server: Postgres) -> str:
    """The address of a database of the server, reached through the proxy."""
    return dsn.replace(f":{server.port}/", f":{proxy.port}/")
