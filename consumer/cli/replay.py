"""`consumer replay`: its arguments, its progress, its answer as a table, JSON or a page, and the file to go on from.

Knows the terminal and files; decides nothing (replay/verify.py does). What it leaves behind: the page that was asked for, and,
while a replay runs or after it was interrupted, a file with counts and offsets in the user's state directory.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich import box
from rich.markup import escape
from rich.table import Column, Table

from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.framework import AppPath, AsJson, cli, command
from consumer.cli.output import err, out, print_json, printable
from consumer.cli.progress import progress
from consumer.core.errors import ConsumerError, Misconfigured
from consumer.postgres.connection import dsn_label
from consumer.replay import html_page
from consumer.replay.findings import OUTCOMES, Findings, Verdict
from consumer.replay.options import Options, Progress
from consumer.replay.rebuild_run import RebuildOptions, run_rebuild
from consumer.replay.republish_run import RepublishOptions, run_republish
from consumer.replay.selection import refuse_shards
from consumer.replay.verify import replay
from consumer.settings import Settings
from consumer.transaction import dry_run_guard

_STATE_VERSION = 3


@command(
    cli,
    "replay",
    ("kafka_", "postgres_", "redis_", "precheck_window", "lanes", "batch_messages", "parked_", "wait_", "log_"),
)
def replay_command(
    app: AppPath,
    topics: Annotated[
        list[str], typer.Argument(metavar="TOPIC...", help="topics that the App has handlers of", show_default=False)
    ],
    settings: Settings,
    start: Annotated[
        str,
        typer.Option(
            "--from",
            help="earliest, position, an offset, a time (2026-11-25T10:00Z; UTC without a zone), or 24h for a day ago",
        ),
    ] = "earliest",
    end: Annotated[
        str,
        typer.Option(
            "--to", help="where to stop, itself not included: latest, position, an offset, a time, or 10m ago"
        ),
    ] = "latest",
    partitions: Annotated[
        list[int] | None, typer.Option("--partition", min=0, help="only this partition (may be repeated)")
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="only messages with this key")] = None,
    message_id: Annotated[
        str | None, typer.Option("--message-id", help="only the message with this id, as its producer sent it")
    ] = None,
    handlers: Annotated[
        list[str] | None, typer.Option("--handler", help="only for this handler (may be repeated)")
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="apply what is missing, once, as a worker would; workers may be running")
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild", help="run the handlers on empty copies of their tables, and compare the real ones with them"
        ),
    ] = False,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", help="with --rebuild: do not compare this column, or TABLE.COLUMN (may be repeated)"),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", help="with --rebuild: compare this column although it is usually left out"),
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="with --rebuild: SQL that makes the state before the first message")
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace/--no-trace", help="with --rebuild: find the messages behind the differences")
    ] = True,
    republish: Annotated[
        str | None, typer.Option("--republish", metavar="TOPIC", help="copy the range there, with its message ids")
    ] = None,
    assume_unapplied: Annotated[
        bool,
        typer.Option(
            "--assume-unapplied", help="take what is older than the ledger for missing, where one cannot tell"
        ),
    ] = False,
    call_handlers: Annotated[
        bool,
        typer.Option("--call-handlers", help="also call the handlers of missing messages, and undo what they write"),
    ] = False,
    allow_outside: Annotated[
        bool,
        typer.Option(
            "--allow-outside",
            help="with --rebuild or --call-handlers: let handlers and the lifespan connect elsewhere (mail, HTTP, other databases)",
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on where the same replay was interrupted")] = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="write the answer as an HTML page")
    ] = None,
    as_json: AsJson = False,
) -> Any:
    """Read topics again and prove that nothing is missing and nothing would happen twice.

    Every message goes through the worker's own code in transactions that are rolled back, and PostgreSQL is asked what
    they have written. Running workers are not disturbed: no group is joined, no offset is committed. No handler is called,
    except with --apply, --rebuild or --call-handlers; the last two refuse connections that handlers open.

    Exit code 0: nothing missing, nothing written, nothing different. 1: something is. 2: it could not tell.

    \b
    Examples:
      consumer replay shop:app payments
          check everything that the log holds
      consumer replay shop:app payments --from 24h --to position --json
      consumer replay shop:app payments --apply
          repair what is missing
      consumer replay shop:app payments --apply --handler NEW
          fill a new handler from the topic's history
      consumer replay shop:app payments refunds --rebuild
          compare the tables with what the topics say
    """
    chosen = [
        name for name, on in (("--apply", apply), ("--rebuild", rebuild), ("--republish", republish is not None)) if on
    ]
    if len(chosen) > 1:
        raise Misconfigured(f"{' and '.join(chosen)}: choose one of them")
    if rebuild and resume:
        raise Misconfigured(
            "--resume does not go with --rebuild: its one transaction ended with the interruption; run it without --resume"
        )
    mode: Any = chosen[0][2:] if chosen else "check"
    text = None
    if base is not None:
        try:
            text = base.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise Misconfigured(f"--base {base}: {error}") from None
    if report is not None:
        _check_writable(report)
    narrowing = {
        "--from": start != "earliest",
        "--to": end != "latest",
        "--key": key is not None,
        "--message-id": message_id is not None,
        "--partition": bool(partitions),
        "--assume-unapplied": assume_unapplied,
    }
    _refuse_contradictions(
        mode,
        narrowing,
        {"--ignore": bool(ignore), "--compare": bool(compare), "--base": base is not None, "--no-trace": not trace},
        {
            "--call-handlers": call_handlers,
            "--allow-outside": allow_outside and not rebuild and not call_handlers,
            "--handler": bool(handlers),
        },
    )
    options: _AnyOptions
    if rebuild:
        options = RebuildOptions(
            handlers=tuple(handlers or ()),
            ignore=tuple(ignore or ()),
            compare=tuple(compare or ()),
            base=text,
            trace=trace,
            allow_outside=allow_outside,
        )
    elif republish is not None:
        options = RepublishOptions(target=republish, start=start, end=end, partitions=tuple(partitions or ()), key=key)
    else:
        options = Options(
            mode="apply" if apply else "check",
            start=start,
            end=end,
            partitions=tuple(partitions or ()),
            key=key,
            message_id=message_id,
            handlers=tuple(handlers or ()),
            assume_unapplied=assume_unapplied,
            call_handlers=call_handlers,
            allow_outside=allow_outside,
        )
    loaded = _loaded(app, options)
    refuse_shards(loaded)
    settings.dsn  # noqa: B018 - raises when there is none
    return _replay(app, loaded, settings, topics, options, resume=resume, report=report, as_json=as_json)


_AnyOptions: TypeAlias = Options | RebuildOptions | RepublishOptions


def _refuse_contradictions(
    mode: str, narrowing: dict[str, bool], of_rebuild: dict[str, bool], others: dict[str, bool]
) -> None:
    """Raise Misconfigured for flags that do not go with the mode."""
    for option, given in narrowing.items():
        if given and mode == "rebuild":
            raise Misconfigured(
                f"{option} does not go with --rebuild, which compares the state that all messages up to the position have made"
            )
    for option, given in of_rebuild.items():
        if given and mode != "rebuild":
            raise Misconfigured(f"{option} goes with --rebuild")
    if others["--call-handlers"] and mode != "check":
        raise Misconfigured(f"--call-handlers does not go with --{mode}: leave it out")
    if others["--allow-outside"]:
        raise Misconfigured(
            "--allow-outside goes with --rebuild or --call-handlers: nothing else calls handlers in a dry run"
        )
    if mode == "republish" and (others["--handler"] or narrowing["--message-id"] or narrowing["--assume-unapplied"]):
        raise Misconfigured(
            "--republish copies records, whatever their handlers: leave out --handler, --message-id and --assume-unapplied"
        )


def _mode(options: _AnyOptions) -> str:
    match options:
        case RebuildOptions():
            return "rebuild"
        case RepublishOptions():
            return "republish"
        case Options():
            return options.mode


def _loaded(path: str, options: _AnyOptions) -> App:
    """The App. Raises Misconfigured if its import leaves a connection open that a dry run could not refuse to use."""
    before = dry_run_guard.opened_connections()
    app = load_app(path)
    if isinstance(options, RebuildOptions):
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


def _check_writable(path: Path) -> None:
    """Before hours of work, not after them."""
    try:
        _check_place(path)
    except OSError as error:
        raise Misconfigured(f"--report {str(path)[:80]}: {error.strerror or error}") from None


def _check_place(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise Misconfigured(f"--report {path}: no file can be written there")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Misconfigured(f"--report {path}: no right to write there")


async def _replay(
    path: str,
    app: App,
    settings: Settings,
    topics: list[str],
    options: _AnyOptions,
    *,
    resume: bool,
    report: Path | None,
    as_json: bool,
) -> int:
    kept = None if isinstance(options, RebuildOptions) else _Kept(path, settings, topics, options)
    resumed = None
    if resume and kept is not None:
        resumed = kept.load()
    elif kept is not None and kept.exists:
        err.print(
            "consumer: an earlier run of this replay was interrupted; this one begins anew (--resume would go on)",
            markup=False,
        )
    try:
        with progress("offsets") as told:
            save = kept.save if kept is not None else None
            reports = Progress(told.line, told.announce, told.progress, save)
            match options:
                case RebuildOptions():
                    findings = await run_rebuild(app, settings, topics, options, reports, alone=True)
                case RepublishOptions():
                    findings = await run_republish(app, settings, topics, options, reports, resumed)
                case Options():
                    findings = await replay(app, settings, topics, options, reports, resumed, alone=True)
    except ConsumerError as error:
        if as_json:  # who reads JSON learns of it there too
            unknown = Verdict.UNKNOWN
            answer = {"verdict": unknown.value, "exit_code": unknown.exit_code, "answer": str(error)}
            print_json({"app": app.name, "mode": _mode(options), **answer})
        raise
    if kept is not None:
        kept.delete()
    found = findings.as_dict()
    if as_json:
        print_json(found)
    else:
        _show(findings, found)
    if report is not None:  # last: a disk that is full by now must not cost the answer
        _write(report, html_page.render(found))
    return findings.verdict().exit_code


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise Misconfigured(f"--report {path}: {error}") from None


class _Kept:
    """The state of one replay on disk, so that the same one (same arguments, same services) can go on."""

    def __init__(self, path: str, settings: Settings, topics: list[str], options: Options | RepublishOptions) -> None:
        same = [
            _STATE_VERSION,
            path,
            topics,
            dsn_label(settings.dsn),
            settings.kafka_bootstrap_servers,
            _mode(options),
            repr(options),
        ]
        digest = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]
        self._path = _state_directory() / "consumer" / f"replay-{digest}.json"
        self._told = False

    @property
    def exists(self) -> bool:
        """Whether there is something to go on from."""
        try:
            return self._path.exists()
        except OSError:
            return False

    def load(self) -> dict[str, Any]:
        """The state. Raises Misconfigured when there is none that can be read."""
        try:
            found: Any = json.loads(self._path.read_text("utf-8"))
            if not isinstance(found, dict):
                raise ValueError("not the state of a replay")
        except FileNotFoundError:
            raise Misconfigured(
                "--resume: no replay with these arguments and services was interrupted; run it without --resume"
            ) from None
        except (OSError, ValueError) as error:
            raise Misconfigured(f"--resume: {self._path} cannot be read: {error}") from None
        return found

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state as a whole. A place that cannot be written to costs only the resuming, and is told once."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps(state), "utf-8")
            new.replace(self._path)
        except OSError as error:
            if not self._told:
                err.print(f"consumer: this replay cannot be resumed if it is interrupted: {error}", markup=False)
            self._told = True

    def delete(self) -> None:
        """It has come to its end."""
        with suppress(OSError):  # it was never written
            self._path.unlink(missing_ok=True)


def _state_directory() -> Path:
    if home := os.environ.get("XDG_STATE_HOME"):
        return Path(home)
    try:
        return Path.home() / ".local" / "state"
    except RuntimeError:  # nobody's home: there is no such user
        return Path("/nonexistent")


# -- the answer ---------------------------------------------------------------------------------------------------------

_TITLES = {
    "applied": "applied",
    "dead_lettered": "dead letters",
    "skipped": "skipped",
    "missing": "missing",
    "repeated": "repeated",
    "conflicts": "conflicts",
    "unreadable": "unreadable",
    "unknown": "cannot tell",
    "applied_now": "applied now",
    "dead_lettered_now": "dead letters now",
}
_ALWAYS = {"applied", "dead_lettered", "missing"}


def _show(findings: Findings, found: dict[str, Any]) -> None:
    where = ", ".join(dict.fromkeys(each["topic"] for each in found["ranges"]))
    title = f"{findings.app}: {where}, {_n(len(found['ranges']), 'partition')}, {_n(found['messages'], 'message')} in {found['seconds']:.1f} s ({found['messages_per_second']:,}/s)"
    if found["handlers"]:
        shown = [each for each in OUTCOMES if each in _ALWAYS or findings.total(each)]
        table = Table(
            "handler",
            *_right("delivered", *[_TITLES[each] for each in shown]),
            title=escape(title),
            title_justify="left",
            box=box.SIMPLE,
        )
        for name, counts in found["handlers"].items():
            table.add_row(escape(name), *[f"{counts[each]:,}" for each in ("delivered", *shown)])
        out.print(table)
    else:
        _say(title)
    effects = found["effects"]
    if effects is not None:
        tables = ", ".join(f"{name} {sum(rows.values()):,}" for name, rows in effects["tables"].items())
        _say(
            f"rows written for messages applied before: {effects['rows']:,}{f' ({tables})' if tables else ''}; sequences moved: {len(effects['sequences'])}"
        )
        _say(f"  counted so: {effects['how']}")
    for name, rows in (found["history"] or {}).items():
        _say(
            f"ledger rows of {name} in this range: {rows['rows']:,}, without a message in the log: {rows['without_message']:,}"
        )
    if found["precheck"] is not None:
        redis = found["precheck"]
        _say(
            f"Redis had a mark for {redis['hits']:,} of {redis['asked']:,} deliveries; wrong: {redis['wrong']:,}, unanswered: {redis['unanswered']:,}"
        )
    if found["rebuild"] is not None:
        _show_rebuild(found["rebuild"])
    if found["samples"]:
        _say("")
        for each in sorted(found["samples"], key=lambda each: each["kind"]):  # lines, since a table would cut the ids
            place = f"{each['topic']}:{each['partition']}:{each['offset']}"
            _say(f"  {each['kind']}: {each['handler']} {place} {each['id']}: {each['detail']}")
        _say("")
    for note in found["notes"]:
        _say(f"note: {note}")
    for problem in found["problems"] + found["unknown"]:
        _say(f"{problem['kind']}: {problem['text']}")
    colour = {Verdict.OK: "green", Verdict.NO: "red", Verdict.UNKNOWN: "yellow"}[findings.verdict()]
    out.print(f"[bold {colour}]{escape(printable(found['answer']))}[/]", highlight=False, soft_wrap=True)


def _show_rebuild(found: dict[str, Any]) -> None:
    table = Table(
        Column("table", overflow="fold"),
        *_right("rows", "rebuilt", "missing", "extra", "differ"),
        "matched by",
        "not compared",
        title="rebuild",
        title_justify="left",
        box=box.SIMPLE,
    )
    for each in found["tables"]:
        ignored = ", ".join(f"{name} ({why})" for name, why in each["ignored"].items())
        numbers = [f"{each[name]:,}" for name in ("rows", "rebuilt", "missing", "extra", "different")]
        table.add_row(
            escape(each["table"]), *numbers, escape(", ".join(each["matched_by"] or ["all columns"])), escape(ignored)
        )
    out.print(table)
    for each in found["differences"]:
        row = ", ".join(f"{name}={value}" for name, value in each["key"].items())
        columns = "; ".join(
            f"{name}: {value['real']} instead of {value['rebuilt']}"
            if each["kind"] == "different"
            else f"{name}={value['real'] if each['kind'] == 'extra' else value['rebuilt']}"
            for name, value in each["columns"].items()
        )
        many = f" {each['count']:,} times" if each["count"] > 1 else ""
        behind = f"; messages {', '.join(each['messages'])}" if each["messages"] else "; no message was found behind it"
        _say(f"  {each['table']} {each['kind']}{many}: {'; '.join(filter(None, (row, columns)))}{behind}")


def _n(count: int, one: str) -> str:
    return f"{count:,} {one if count == 1 else one + 's'}"


def _say(text: str) -> None:
    out.print(printable(text), markup=False, highlight=False)


def _right(*names: str) -> list[Any]:
    return [Column(name, justify="right", overflow="fold") for name in names]
