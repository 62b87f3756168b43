"""Load the App, run a replay, show its progress and answer."""

from __future__ import annotations

import os
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from consumer.admin.audit import recording
from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.output import err, print_json
from consumer.cli.progress import progress
from consumer.cli.replay_options import AnswerFlags
from consumer.cli.replay_output import show
from consumer.cli.replay_state import AnyOptions, SavedState, mode_of
from consumer.core.audit import ActedBy
from consumer.core.errors import ConsumerError, Misconfigured
from consumer.replay.findings import Findings, Verdict
from consumer.replay.html import page
from consumer.replay.options import Options, Progress
from consumer.replay.outgoing_run import OutgoingOptions, run_outgoing
from consumer.replay.rebuild_run import RebuildOptions, run_rebuild
from consumer.replay.republish_run import RepublishOptions, run_republish
from consumer.replay.selection import refuse_shards
from consumer.replay.verify import replay
from consumer.settings import Settings
from consumer.transaction import dry_run_guard


def start(
    path: str,
    settings: Settings,
    topics: list[str],
    options: AnyOptions,
    answer: AnswerFlags,
    resume: bool = False,
    by: ActedBy | None = None,
) -> Coroutine[Any, Any, int]:
    """Check the arguments and return the run. Raises Misconfigured."""
    for flag, file in (("--report", answer.report), ("--metrics", answer.metrics)):
        if file is not None:
            check_writable(flag, file)
    app = loaded(path, options)
    refuse_shards(app)
    settings.dsn  # noqa: B018 - raises when there is none
    return run(path, app, settings, topics, options, answer, resume=resume, by=by)


def loaded(path: str, options: AnyOptions) -> App:
    """Load the App.

    Raises Misconfigured if its import leaves a connection open, which a dry run could not refuse to use.
    """
    before = dry_run_guard.opened_connections()
    app = load_app(path)
    if isinstance(options, RebuildOptions | OutgoingOptions):
        is_guarded = not options.allow_outside
    else:
        is_guarded = isinstance(options, Options) and options.is_dry_run and not options.allow_outside
    if is_guarded:
        if opened := sorted(peer for _, peer in dry_run_guard.opened_connections() - before):
            raise Misconfigured(
                f"{path}: its import opens a connection to {opened[0]}, which a dry run cannot refuse to use; open it in the "
                "lifespan, or allow it with --allow-outside"
            )
        if unseen := dry_run_guard.unseen_clients():
            err.print(
                f"consumer: {', '.join(unseen)}: this client connects without Python, so a dry run cannot refuse it: make "
                "sure that no handler uses it here",
                markup=False,
            )
    return app


def check_writable(flag: str, path: Path) -> None:
    """Check a file of the answer before hours of work."""
    try:
        _check_place(flag, path)
    except OSError as error:
        raise Misconfigured(
            f"{flag} {str(path)[:80]}: {error.strerror or error}; name a file that can be written"
        ) from None


def _check_place(flag: str, path: Path) -> None:
    is_replaced = flag == "--metrics"  # by a file beside it, so that a reader never sees half of it
    if path.is_dir() or not path.parent.is_dir() or (is_replaced and path.exists() and not path.is_file()):
        raise Misconfigured(f"{flag} {path}: no file can be written there; name a file in a directory that exists")
    if not os.access(path if path.exists() and not is_replaced else path.parent, os.W_OK):
        raise Misconfigured(f"{flag} {path}: no right to write there; name another file")


async def run(
    path: str,
    app: App,
    settings: Settings,
    topics: list[str],
    options: AnyOptions,
    flags: AnswerFlags,
    *,
    resume: bool,
    by: ActedBy | None = None,
) -> int:
    saved = SavedState(path, settings, topics, options) if isinstance(options, Options | RepublishOptions) else None
    resumed = None
    if resume and saved is not None:
        resumed = saved.load()
    elif saved is not None and saved.exists:
        err.print(
            "consumer: an earlier run of this replay was interrupted; this one starts over; --resume continues it",
            markup=False,
        )
    try:
        with progress("offsets") as bar:
            save = saved.save if saved is not None else None
            reports = Progress(bar.line, bar.announce, bar.progress, save)
            if isinstance(options, Options) and options.mode == "apply" and by is not None:
                async with recording(settings, "replay apply", by, app.name, ", ".join(topics)) as numbers:
                    findings = await _findings(app, settings, topics, options, reports, resumed)
                    numbers |= {outcome: findings.total(outcome) for outcome in ("applied_now", "dead_lettered_now")}
            else:
                findings = await _findings(app, settings, topics, options, reports, resumed)
    except ConsumerError as error:
        unknown = Verdict.UNKNOWN
        if flags.as_json:  # a program that reads JSON does not parse standard error
            failure = {"verdict": unknown.value, "exit_code": unknown.exit_code, "answer": str(error)}
            print_json({"app": app.name, "mode": mode_of(options), **failure})
        if flags.metrics is not None:
            _write_metrics(flags.metrics, app.name, topics, mode_of(options), unknown.exit_code)
        raise
    if saved is not None:
        saved.delete()
    answer = findings.as_dict()
    if flags.as_json:
        print_json(answer)
    else:
        show(findings, answer)
    exit_code = findings.verdict().exit_code
    # Last: a disk that is full by now must not cost the answer.
    if flags.metrics is not None:
        _write_metrics(flags.metrics, app.name, topics, mode_of(options), exit_code)
    if flags.report is not None:
        _write(flags.report, page.render(answer))
    return exit_code


async def _findings(
    app: App,
    settings: Settings,
    topics: list[str],
    options: AnyOptions,
    reports: Progress,
    resumed: dict[str, Any] | None,
) -> Findings:
    match options:
        case RebuildOptions():
            return await run_rebuild(app, settings, topics, options, reports, alone=True)
        case OutgoingOptions():
            return await run_outgoing(app, settings, topics, options, reports, alone=True)
        case RepublishOptions():
            return await run_republish(app, settings, topics, options, reports, resumed)
        case Options():
            return await replay(app, settings, topics, options, reports, resumed, alone=True)


def _write_metrics(path: Path, app: str, topics: list[str], mode: str, exit_code: int) -> None:
    from consumer.monitoring.textfile import verdict_text  # the library takes time to import

    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(verdict_text(app, topics, mode, exit_code, time.time()), "utf-8")
        beside.replace(path)
    except OSError as error:
        raise Misconfigured(f"--metrics {path}: {error}; name a file that can be written") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise Misconfigured(f"--report {path}: {error}; name a file that can be written") from None
