"""Keep the state of an interrupted replay on disk for --resume."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from consumer.cli.output import err
from consumer.core.errors import Misconfigured
from consumer.postgres.connection import dsn_label
from consumer.replay.options import Options
from consumer.replay.outgoing_run import OutgoingOptions
from consumer.replay.rebuild_run import RebuildOptions
from consumer.replay.republish_run import RepublishOptions
from consumer.settings import Settings

_STATE_VERSION = 4


AnyOptions: TypeAlias = Options | OutgoingOptions | RebuildOptions | RepublishOptions


def mode_of(options: AnyOptions) -> str:
    match options:
        case RebuildOptions():
            return "rebuild"
        case OutgoingOptions():
            return "outgoing"
        case RepublishOptions():
            return "republish"
        case Options():
            return options.mode


class SavedState:
    """The state of one replay on disk.

    A run with the same arguments and services continues it.
    """

    def __init__(self, path: str, settings: Settings, topics: list[str], options: Options | RepublishOptions) -> None:
        same = [
            _STATE_VERSION,
            path,
            topics,
            dsn_label(settings.dsn),
            settings.kafka_bootstrap_servers,
            mode_of(options),
            repr(options),
        ]
        digest = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]
        self._path = _state_directory() / "consumer" / f"replay-{digest}.json"
        self._warned = False

    @property
    def exists(self) -> bool:
        """Whether there is a state to continue from."""
        try:
            return self._path.exists()
        except OSError:
            return False

    def load(self) -> dict[str, Any]:
        """Return the state.

        Raises Misconfigured if there is none that can be read.
        """
        try:
            state: Any = json.loads(self._path.read_text("utf-8"))
            if not isinstance(state, dict):
                raise ValueError("not the state of a replay")
        except FileNotFoundError:
            raise Misconfigured(
                "--resume: no replay with these arguments and services was interrupted; run it without --resume"
            ) from None
        except (OSError, ValueError) as error:
            raise Misconfigured(f"--resume: {self._path} cannot be read: {error}; run it without --resume") from None
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state as a whole.

        If the place is not writable, the replay cannot be resumed; that is printed once.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps(state), "utf-8")
            new.replace(self._path)
        except OSError as error:
            if not self._warned:
                err.print(f"consumer: this replay cannot be resumed if it is interrupted: {error}", markup=False)
            self._warned = True

    def delete(self) -> None:
        """Delete the state of a run that has ended."""
        with suppress(OSError):  # it was never written
            self._path.unlink(missing_ok=True)


def _state_directory() -> Path:
    if home := os.environ.get("XDG_STATE_HOME"):
        return Path(home)
    try:
        return Path.home() / ".local" / "state"
    except RuntimeError:  # there is no such user
        return Path("/nonexistent")
