"""PgBouncer in transaction mode; its server can be replaced under its clients."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from consumer.local_servers import LocalServer, Postgres, unprivileged_user

needs_pgbouncer = pytest.mark.skipif(
    not shutil.which("pgbouncer") and not Path("/usr/sbin/pgbouncer").exists(), reason="no PgBouncer on this machine"
)


class Pooler(LocalServer):
    """PgBouncer before a server. connections: to the server, for all clients together."""

    name = "pgbouncer"

    def __init__(self, server: Postgres, connections: int = 4) -> None:
        super().__init__()
        self._server = server
        self._target = server.port
        self._connections = connections

    def prepare(self) -> None:
        (self.directory / "users").write_text(f'"demo" "{self._server._password}"\n')
        if os.geteuid() == 0:
            self.directory.chmod(0o755)
            os.chown(self.directory, *unprivileged_user())

    def _write_config(self) -> Path:
        config = self.directory / "pgbouncer.ini"
        config.write_text(
            f"""[databases]
* = host=127.0.0.1 port={self._target}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {self.port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {self.directory}/users
admin_users = demo
pool_mode = transaction
default_pool_size = {self._connections}
server_login_retry = 1
"""
        )
        return config

    def command(self) -> Sequence[str | Path]:
        return [str(shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"), self._write_config()]

    def answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def identity(self) -> dict[str, Any]:
        return self._server.identity()

    def dsn(self, through: str) -> str:
        """The address of a database of the server, through the pooler."""
        return through.replace(f":{self._server.port}/", f":{self.port}/")

    async def tell(self, *orders: str) -> None:
        """Give orders to the admin console: PAUSE, RESUME, RELOAD, RECONNECT."""
        connection = await asyncpg.connect(self.dsn(self._server.dsn("pgbouncer")), statement_cache_size=0)
        try:
            for order in orders:
                await connection.execute(order)
        finally:
            connection.terminate()

    async def lead_to(self, server: Postgres) -> None:
        """Use another server from now on; clients stay connected."""
        self._target = server.port
        self._write_config()
        await self.tell("RELOAD")
