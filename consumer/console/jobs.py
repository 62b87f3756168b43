"""Commands that the console runs for operators, and how far they are.

A retry calls the App's handlers, so it is a process of its own, as at a terminal: it runs the code as it is deployed now,
under the App's limits, and what it does is recorded as the command records it. Jobs are kept in memory; what they did is
in PostgreSQL.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consumer.admin.progress_lines import Progress, of_line
from consumer.console.guard import Refused
from consumer.core.audit import ActedBy
from consumer.logs import event
from consumer.settings import Settings

_ROOT = str(Path(__file__).resolve().parent.parent.parent)
_KEPT_MAX = 50
_AT_A_TIME = 3
_LINE_BYTES_MAX = 1 << 20
_END_SECONDS = (10.0, 5.0)  # after the first signal, which lets a transaction end, and after the second


@dataclass(slots=True)
class Job:
    """One run of a command.

    title: what it does, for people. answer: its JSON. error: its last line of an error. code: None while it runs.
    """

    id: str
    title: str
    by: ActedBy
    shard: str
    started_at: float = field(default_factory=time.time)
    ended_at: float | None = None
    progress: Progress | None = None
    answer: dict[str, Any] | None = None
    error: str = ""
    code: int | None = None
    is_stopping: bool = False
    process: asyncio.subprocess.Process | None = None

    @property
    def is_running(self) -> bool:
        """Whether the command has not ended."""
        return self.code is None


class Jobs:
    """The jobs of this run of the console."""

    def __init__(self, path: str, settings: Settings) -> None:
        self._path = path
        self._settings = settings
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Any:
        return iter(sorted(self._jobs.values(), key=lambda job: -job.started_at))

    def get(self, id: str) -> Job | None:
        """Return a job; None if it is not known (any more)."""
        return self._jobs.get(id)

    def start(
        self, id: str, title: str, arguments: Sequence[str], by: ActedBy, shard: str, given: bytes | None = None
    ) -> Job:
        """Start `consumer dlq …`, unless the same form was sent before.

        id: of the form. arguments: after `dlq`, with {APP} in place of the App. given: standard input. Raises Refused
        while too many jobs run.
        """
        if (known := self._jobs.get(id)) is not None:
            return known
        if sum(job.is_running for job in self._jobs.values()) >= _AT_A_TIME:
            raise Refused(409, f"{_AT_A_TIME} jobs are running; wait for one of them, or stop it")
        job = self._jobs[id] = Job(id, title, by, shard)
        for old in [kept for kept in self if not kept.is_running][_KEPT_MAX:]:
            del self._jobs[old.id]
        task = asyncio.create_task(self._run(job, list(arguments), given))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    def stop(self, job: Job) -> None:
        """Let the transaction in hand end, and nothing begin; again: undo it."""
        job.is_stopping = True
        if job.process is not None and job.is_running:
            with suppress(ProcessLookupError):
                job.process.send_signal(signal.SIGTERM)

    async def close(self) -> None:
        """End every job: what is committed stays, the rest is untouched."""
        for seconds in _END_SECONDS:
            for job in self._jobs.values():
                self.stop(job)
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=seconds)
        for job in self._jobs.values():
            if job.process is not None and job.is_running:
                with suppress(ProcessLookupError):
                    job.process.kill()

    async def _run(self, job: Job, arguments: list[str], given: bytes | None) -> None:
        code = 2
        try:
            code = await self._command(job, arguments, given)
        except OSError as error:
            job.error = f"the command cannot be started: {error.strerror or type(error).__name__}"
        finally:
            job.ended_at = time.time()
            job.code = code
            event(
                logging.INFO,
                "a job of the console has ended",
                code=code,
                seconds=round(job.ended_at - job.started_at, 1),
            )

    async def _command(self, job: Job, arguments: list[str], given: bytes | None) -> int:
        shard = [f"--shard={job.shard}"] if job.shard else []
        record = [f"--operator={job.by.operator}", f"--why={job.by.why}"]
        job.process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # do not import a logging.py of the current directory
            "-c",
            f"import sys; sys.path.append({_ROOT!r}); from consumer.__main__ import main; main()",
            "dlq",
            *(self._path if argument == "{APP}" else argument for argument in arguments),
            *(*shard, *record, "--yes", "--json"),
            env=self._settings.child_environment(),
            stdin=asyncio.subprocess.PIPE if given is not None else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES_MAX,
            start_new_session=True,  # Ctrl-C ends the console, which then lets this one end
        )
        assert process.stdout is not None and process.stderr is not None
        if job.is_stopping:
            self.stop(job)
        output, _, _ = await asyncio.gather(
            process.stdout.read(), _follow(job, process.stderr), _give(process.stdin, given or b"")
        )
        code = await process.wait()
        with suppress(ValueError):
            answer = json.loads(output)
            job.answer = answer if isinstance(answer, dict) else None
        return code


async def _follow(job: Job, errors: asyncio.StreamReader) -> None:
    """Read standard error: progress, and the line of an error."""
    while True:
        try:
            raw = await errors.readline()
        except ValueError:  # a line longer than any of ours
            continue
        if not raw:
            return
        line = raw.decode("utf-8", "replace").strip()
        if (progress := of_line(line)) is not None:
            job.progress = progress
        elif line.startswith("consumer: "):
            job.error = line.removeprefix("consumer: ")


async def _give(stdin: asyncio.StreamWriter | None, given: bytes) -> None:
    if stdin is None:
        return
    with suppress(OSError):  # it ended before it had read all; its error says why
        stdin.write(given)
        await stdin.drain()
        stdin.close()
        await stdin.wait_closed()
