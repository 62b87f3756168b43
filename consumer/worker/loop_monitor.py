"""Watches a worker process: a blocked event loop, and its memory."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from consumer.logs import event
from consumer.transaction.limits import CallTracker

BLOCKED_SECONDS = 2.0  # an event loop that is blocked for so long is reported while it is blocked
_CHECK_SECONDS = 0.5


def memory_mb() -> int | None:
    """Return this process's memory in RAM; None on other systems than Linux."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


class LoopMonitor:
    """A thread that reports which handler blocks the event loop.

    It reports while the loop is blocked; the loop itself could do so only afterwards. It names the handler and the
    innermost line of code, and no values.
    """

    def __init__(self, trackers: Iterable[CallTracker]) -> None:
        self._trackers = list(trackers)
        self._loop = asyncio.get_running_loop()
        self._thread_of_loop = threading.get_ident()
        self._turned_at = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="consumer-loop-watch", daemon=True)

    def start(self) -> None:
        """Begin, in the event loop's own thread."""
        self._turn()
        self._thread.start()

    def stop(self) -> None:
        """End; returns when the thread has."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _turn(self) -> None:
        self._turned_at = time.monotonic()
        if not self._over.is_set():
            self._loop.call_later(_CHECK_SECONDS, self._turn)

    def _watch(self) -> None:
        reported = 0.0
        before = time.monotonic()
        while not self._over.wait(_CHECK_SECONDS):
            now, slept_from = time.monotonic(), before
            before = now
            if now - slept_from > 2 * _CHECK_SECONDS:
                continue  # this thread did not run either: the whole process was stopped
            blocked = now - self._turned_at - _CHECK_SECONDS
            if blocked < BLOCKED_SECONDS:
                reported = 0.0
            elif blocked > 2 * reported:
                reported = blocked
                self._log_blocked(blocked)

    def _log_blocked(self, seconds: float) -> None:
        task = asyncio.current_task(self._loop)
        names = [calls.running_inline.name for calls in self._trackers if calls.running_inline is not None]
        names += [call.handler.name for calls in self._trackers for call in [calls.running.get(task)] if call]  # type: ignore[arg-type]
        frame = sys._current_frames().get(self._thread_of_loop)
        place = None
        if frame is not None:
            code = frame.f_code
            place = f"{code.co_filename.rsplit('/', 2)[-1]}:{frame.f_lineno} in {code.co_name}"
        event(
            logging.WARNING,
            "the event loop is blocked: a handler does not await",
            handler=names[0] if names else None,
            at=place,
            seconds=round(seconds, 1),
        )
