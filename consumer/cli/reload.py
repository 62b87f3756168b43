"""`consumer run --reload`: end and start the supervisor when a file changes.

The watching process imports nothing of the App. It runs the same command as a child, which is ended by SIGTERM, so workers
drain as they always do; every start reads settings and code again. A child that ends by itself (an App that cannot be
imported, a service that does not answer) is started again after the next change.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from consumer.cli.watched_files import folders_of, is_source
from consumer.core.errors import Misconfigured
from consumer.logs import describe, event
from consumer.settings import Settings

_ROOT = str(Path(__file__).resolve().parent.parent.parent)
_QUIET_MS = 200  # an editor that saves several files is awaited for so long, and for _QUIET_MAX_MS at most
_QUIET_MAX_MS = 2000

_is_watched = False


def is_watched() -> bool:
    """Whether this process is the child of one that watches."""
    return _is_watched


def watching(path: str, settings: Settings, given: Sequence[Path]) -> Coroutine[Any, Any, int]:
    """Return a coroutine that runs this process's command, and watches.

    given: the directories of --reload-dir. Raises Misconfigured without the extra, and for what cannot be watched.
    """
    try:
        import watchfiles  # noqa: F401
    except ModuleNotFoundError:
        raise Misconfigured("--reload: the extra is not installed; pip install 'idempotent-consumer[reload]'") from None
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # an event of ours names the file
    folders = folders_of(path, given)
    files = {Path(name).resolve() for name in (settings.config_file, settings.log_config) if name is not None}
    return _Reloader(folders, files).run()


def run_watched() -> None:
    """Run the command of this process's arguments, as the child."""
    global _is_watched
    _is_watched = True
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    from consumer.cli.main import main

    main()


def _end_with_the_parent() -> None:
    """Drain when the watching process is gone.

    It holds the other end of stdin.
    """
    with suppress(OSError):
        while os.read(0, 100):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


class _Reloader:
    """Runs the child, watches files and passes signals on.

    folders: watched with what is below them. files: watched by name, because an editor may replace a file.
    """

    def __init__(self, folders: Sequence[Path], files: set[Path]) -> None:
        self._folders = folders
        self._files = files
        self._changed = asyncio.Event()
        self._changed_file = ""
        self._stopping = asyncio.Event()
        self._watchers: list[asyncio.Task[None]] = []
        self._is_draining = False
        self._child: subprocess.Popen[bytes] | None = None

    async def run(self) -> int:
        """Run until a signal. Returns the exit code of the last child."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, number)
        others = {file.parent for file in self._files if not any(map(file.is_relative_to, self._folders))}
        self._watch(set(self._folders), recursive=True)
        self._watch(others, recursive=False)
        await asyncio.sleep(0)  # each has begun to watch then, before the child reads a file
        event(logging.INFO, "watching for changes", directories=", ".join(map(str, [*self._folders, *others])))
        try:
            return await self._run_children()
        finally:
            for watcher in self._watchers:
                watcher.cancel()
            await asyncio.gather(*self._watchers, return_exceptions=True)
            if self._child is not None and self._child.poll() is None:
                self._child.kill()

    def _signalled(self, number: int) -> None:
        """Pass a signal on, unless the child drains already."""
        self._stopping.set()
        if self._is_draining:
            self._is_draining = False  # the next signal ends it at once
        elif self._child is not None:
            self._child.send_signal(number)

    def _watch(self, paths: set[Path], *, recursive: bool) -> None:
        if paths:
            self._watchers.append(asyncio.create_task(self._note_changes(paths, recursive)))

    async def _note_changes(self, paths: set[Path], recursive: bool) -> None:
        from watchfiles import awatch

        async for changes in awatch(
            *paths,
            watch_filter=lambda _, name: is_source(Path(name), self._folders, self._files),
            debounce=_QUIET_MAX_MS,
            step=_QUIET_MS,
            recursive=recursive,
        ):
            self._changed_file = min(name for _, name in changes)
            self._changed.set()

    async def _run_children(self) -> int:
        while True:
            self._changed.clear()
            self._is_draining = False
            child = self._child = _start()
            ended = asyncio.create_task(asyncio.to_thread(child.wait))
            await self._any_of(ended)
            if self._changed.is_set() and not ended.done() and not self._stopping.is_set():
                event(logging.INFO, "a file has changed: workers drain, and start again", file=self._changed_file)
                self._is_draining = True
                child.terminate()
            elif not self._stopping.is_set() and not self._changed.is_set():
                event(logging.WARNING, "not running: the next change of a file starts it again", exit_code=await ended)
                await self._any_of()
            code = await ended
            if self._stopping.is_set():
                return code if code >= 0 else 128 - code

    async def _any_of(self, *ended: asyncio.Task[int]) -> None:
        """Wait for the child's end, a change or a signal. Raises Misconfigured."""
        events = [asyncio.create_task(one.wait()) for one in (self._changed, self._stopping)]
        await asyncio.wait([*ended, *events, *self._watchers], return_when=asyncio.FIRST_COMPLETED)
        for task in events:
            task.cancel()
        for watcher in self._watchers:
            if watcher.done() and (error := watcher.exception()) is not None:
                raise Misconfigured(
                    f"--reload: files cannot be watched ({describe(error)}); name fewer with --reload-dir DIRECTORY"
                )


def _start() -> subprocess.Popen[bytes]:
    code = f"import sys; sys.path.append({_ROOT!r}); from consumer.cli.reload import run_watched; run_watched()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, *sys.argv[1:]],  # -P: do not import a logging.py of the current directory
        stdin=subprocess.PIPE,
        process_group=0,  # Ctrl-C reaches this process, which passes it on once
        # Python compares a source with its bytecode by size and seconds: two saves in a second may look the same.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
