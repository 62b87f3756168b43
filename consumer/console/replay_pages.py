"""The pages of replays: those that changed something, and reports.

A report is the JSON of `consumer replay`, `rebuild` or `republish`, in the directory of --reports. Its page is that of
`--report`, from the same functions.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from consumer.admin import audit
from consumer.console.context import Console, Page
from consumer.console.guard import Refused
from consumer.core.errors import ServiceUnavailable
from consumer.postgres.errors import Outage
from consumer.replay.html import page as report

_APPLIED_MAX = 50
_FILES_MAX = 200
_BYTES_MAX = 32 << 20
_NAME = re.compile(r"[\w.+ -]{1,200}\.json", re.ASCII)
_NEEDED = ("app", "mode", "verdict", "answer")


class Report(NamedTuple):
    """A file of the directory. findings: None where it is no report."""

    name: str
    at: float
    findings: dict[str, Any] | None


async def overview(console: Console, request: Request) -> Response:
    """Reports, the newest first, and replays that applied messages."""
    page = Page(console, request)
    reports = await asyncio.to_thread(_reports, console.options.reports)
    applied = None
    with suppress(Outage, ServiceUnavailable):  # the reports are there without PostgreSQL
        applied = await page.ask(
            lambda connection: audit.entries(connection, console.app.name, "replay apply", None, _APPLIED_MAX)
        )
    return page.render(
        "replays.html", directory=console.options.reports, reports=reports, applied=applied, files_max=_FILES_MAX
    )


async def one(console: Console, request: Request) -> Response:
    """One report."""
    page = Page(console, request)
    name = request.path_params["name"]
    if console.options.reports is None or not _NAME.fullmatch(name):
        raise Refused(404, "there is no such report")
    found_report = await asyncio.to_thread(_read, console.options.reports / name)
    if found_report is None or found_report.findings is None:
        raise Refused(404, "there is no such report")
    article = await asyncio.to_thread(report.article, found_report.findings)
    return page.render("report.html", name=name, article=article)


def _reports(directory: Path | None) -> list[Report]:
    if directory is None:
        return []
    try:
        paths = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
        newest = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)[:_FILES_MAX]
    except OSError:
        return []
    return [read for path in newest if (read := _read(path)) is not None]


def _read(path: Path) -> Report | None:
    """Return a report; None where there is no file of that name."""
    try:
        if not path.is_file() or path.is_symlink():
            return None
        at, size = path.stat().st_mtime, path.stat().st_size
        findings = json.loads(path.read_bytes()) if size <= _BYTES_MAX else None
    except ValueError:
        return Report(path.name, at, None)
    except OSError:
        return None
    is_report = isinstance(findings, dict) and all(isinstance(findings.get(name), str) for name in _NEEDED)
    return Report(path.name, at, findings if is_report else None)
