"""`consumer dlq retry` and `dlq discard`: arguments to calls, answers to text.

Knows the terminal; decides nothing (dead_letters/retry.py does). A first Ctrl-C or SIGTERM lets the transaction in hand come to its end, a second
one undoes it. Exit codes: 0 all that was asked for is settled, 1 something is not, 2 bad input or a service away, 130 and 143 a signal.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from consumer.app import App
from consumer.app_loader import load_app, running
from consumer.cli import name_filters
from consumer.cli.dlq import FilterFlags
from consumer.cli.framework import POSTGRES, AppPath, AsJson, Refused, command, dlq
from consumer.cli.output import out, print_json, printable
from consumer.cli.per_shard import ShardName
from consumer.cli.progress import progress
from consumer.cli.prompts import ask
from consumer.cli.signals import Interrupted
from consumer.core.errors import CannotTell, Misconfigured
from consumer.core.outcome import Reason
from consumer.core.suggestions import suggestion
from consumer.dead_letters.retry import Filters, Redrive, RetryResult, edit_of
from consumer.dead_letters.session import Edit
from consumer.postgres.connection import wait_for
from consumer.postgres.dead_letter_actions import Chain
from consumer.settings import Settings
from consumer.sharding.shards import settings_of

_SHOWN_MAX = 20  # letters of a bulk action that went wrong, a line each
_KEPT_MAX = 10_000  # letters that the JSON lists
_DISCARD_AT_A_TIME = 500

All = Annotated[bool, typer.Option("--all", help="all open letters of the App")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="show which letters are meant, and change nothing")]
Operator = Annotated[
    str | None, typer.Option("--operator", help="who does it, for the record (default: the user of the system)")
]
Letters = Annotated[
    list[int] | None,
    typer.Argument(metavar="[LETTER]...", min=1, max=2**63 - 1, help="numbers, as `consumer dlq list` shows them", show_default=False),
]  # fmt: skip


@command(dlq, "retry", (*POSTGRES, "dead_letter_topic", "wait_", "log_"))
def dlq_retry(
    app: AppPath,
    settings: Settings,
    only: FilterFlags,
    letters: Letters = None,
    everything: All = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    value: Annotated[
        str | None,
        typer.Option("--value", metavar="FILE", help="run ONE letter with this payload instead (- is standard input)"),
    ] = None,
    same_id: Annotated[
        bool, typer.Option("--same-id", help="with --value: it is the same intent, under the same message id")
    ] = False,
    new_id: Annotated[
        str | None,
        typer.Option(
            "--new-id",
            metavar="ID",
            help="with --value: it is another intent, under this message id (auto: one made of the letter)",
        ),
    ] = None,
    operator: Operator = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Run the handlers of dead letters again, here, in batches, and then those that wait behind them.

    A message keeps its id, so its effects count once, whoever else retries it, and whatever comes again from Kafka. One that fails
    again stays a dead letter with one attempt more, and those behind it go on waiting. Filters and --all leave out letters whose
    messages may have been applied already (too_old), unless --reason too_old names them.

    \b
    Examples:
      consumer dlq retry shop:app 17
      consumer dlq retry shop:app --group 5f2a90c1de --yes
          all of one kind of error
      consumer dlq retry shop:app --handler settle --older-than 1h --dry-run
      consumer dlq retry shop:app 17 --value mended.json --same-id
    """  # fmt: skip
    edit = _edit(letters, value, same_id, new_id)
    selected = only.filters(letters)
    _named(selected, everything)
    loaded, on = _place(app, settings, shard)
    return _settle(loaded, on, selected, _Wanted(operator, yes, dry_run, as_json, edit=edit))


@command(dlq, "discard", (*POSTGRES, "dead_letter_topic", "wait_", "log_"))
def dlq_discard(
    app: AppPath,
    settings: Settings,
    only: FilterFlags,
    letters: Letters = None,
    why: Annotated[
        str | None, typer.Option("--why", metavar="TEXT", help="the reason, for the record (required)")
    ] = None,
    everything: All = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    operator: Operator = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Settle dead letters without applying them: their messages never will be. Then those that wait behind them run, here.

    The letter stays as a trace, with who did it and why, and what comes again under its id is a duplicate.
    """
    if why is None or not why.strip():
        raise Misconfigured("--why TEXT: say why these messages are not to be applied; it is kept with them")
    selected = only.filters(letters)
    _named(selected, everything)
    loaded, on = _place(app, settings, shard)
    return _settle(loaded, on, selected, _Wanted(operator, yes, dry_run, as_json, why=why.strip()))


class _Wanted:
    """What to do with the letters, and how to answer. why: discard them for this reason; None: retry."""

    def __init__(
        self,
        operator: str | None,
        yes: bool,
        dry_run: bool,
        as_json: bool,
        *,
        why: str | None = None,
        edit: Edit | None = None,
    ) -> None:
        self.operator, self.yes, self.dry_run, self.as_json, self.why, self.edit = (
            operator,
            yes,
            dry_run,
            as_json,
            why,
            edit,
        )

    @property
    def verb(self) -> str:
        return "retry" if self.why is None else "discard"


def _place(path: str, settings: Settings, shard: str | None) -> tuple[App, Settings]:
    """The App, and the settings with the address of the database whose letters are meant."""
    app = load_app(path)
    by_shard = settings_of(app, settings)
    if app.shards and shard is None:
        raise Misconfigured(f"each shard has letters of its own: say which with --shard ({', '.join(by_shard)})")
    if shard is not None and shard not in app.shards:
        raise Misconfigured(f"--shard {shard[:40]!r}: not known to App {app.name!r}; {suggestion(shard, app.shards)}")
    return app, by_shard[shard or ""]


def _named(only: Filters, everything: bool) -> None:
    """Raise Misconfigured unless it is clear which letters are meant."""
    narrowed = only != Filters(only.letters)
    if [only.letters is not None, narrowed, everything].count(True) != 1:
        raise Misconfigured(
            "name letters by number, or by filters (--handler, --reason, --group …), or say --all: one of the three"
        )


def _edit(letters: list[int] | None, value: str | None, same_id: bool, new_id: str | None) -> Edit | None:
    if value is None:
        if same_id or new_id is not None:
            raise Misconfigured("--same-id and --new-id go with --value FILE")
        return None
    if letters is None or len(letters) != 1:
        raise Misconfigured("--value goes with exactly one letter")
    if same_id == (new_id is not None):
        raise Misconfigured(
            "--value: choose --same-id (the same intent, mended: it stays one message, under its id) or --new-id ID (another intent: the "
            "letter is discarded, and this one is applied once, under that id)"
        )
    if new_id == "":
        raise Misconfigured("--new-id: an id, not empty")
    try:
        found = sys.stdin.buffer.read() if value == "-" else Path(value).read_bytes()
    except OSError as error:
        raise Misconfigured(f"--value {value}: {error.strerror or error}") from None
    return edit_of(letters[0], found, new_id)


async def _settle(app: App, settings: Settings, only: Filters, wanted: _Wanted) -> int:
    settings.dsn  # noqa: B018 - raises when there is none
    async with running(app):
        drive = await _opened(app, settings, wanted.operator)
        try:
            await name_filters.check(
                drive.session.connection,
                None,
                only.handler,
                only.topic,
                only.group,
                handlers=tuple(app.handlers),
                topics=tuple(app.topics),
            )
            numbers, left_out = await _chosen(drive, only, wanted)
            if wanted.dry_run or not numbers:
                return _nothing_done(numbers, left_out, wanted)
            return await _each(drive, numbers, left_out, wanted, bulk=only.letters is None)
        finally:
            drive.close()


async def _opened(app: App, settings: Settings, operator: str | None) -> Redrive:
    return await wait_for(lambda left: Redrive.open(app, settings, operator or _user()), settings.wait_seconds)


async def _chosen(drive: Redrive, only: Filters, wanted: _Wanted) -> tuple[Sequence[int], int]:
    """The letters that are meant, and how many of the filters are left out. Asks where that is due."""
    discarding = wanted.why is not None
    if only.letters is None:
        if only.handler is not None and only.handler not in drive.handlers and not discarding:
            raise Misconfigured(
                f"--handler {only.handler[:80]!r}: not known to App {drive.app.name!r}, so nothing can run its letters; "
                f"{suggestion(only.handler, drive.handlers)}"
            )
        numbers = await drive.select(only, waiting=discarding)
        unsure = await drive.unsure(only)
        named = only.reason == Reason.TOO_OLD
        left_out = 0 if discarding or named else unsure
        if numbers and not wanted.dry_run and not wanted.yes:
            text = f" ({unsure:,} of them may have been applied already)" if unsure and not left_out else ""
            text += f" ({left_out:,} that may have been applied already are left out)" if left_out else ""
            _ask(f"{wanted.verb} {len(numbers):,} letters{text}?", wanted)
        if named:
            drive.allow_unsure()
        return numbers, left_out
    await drive.check(only.letters, waiting=discarding)
    unsure = await drive.unsure(only)
    if unsure and not discarding and not wanted.dry_run:
        if not wanted.yes:
            _ask(
                f"{unsure:,} of these letters may have been applied already (too_old: the ledger no longer remembers their time). "
                "Look at the handler's own tables first. Apply anyway?",
                wanted,
            )
        drive.allow_unsure()
    return only.letters, 0


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"uid {os.getuid()}"


def _ask(question: str, wanted: _Wanted) -> None:
    if not sys.stdin.isatty():
        raise Misconfigured(
            f"{question.removesuffix('?')}: say --yes, since nobody can be asked here (--dry-run shows the letters)"
        )
    if not ask(question):
        raise Refused("nothing was changed")


def _nothing_done(numbers: Sequence[int], left_out: int, wanted: _Wanted) -> int:
    if wanted.as_json:
        _Answer(len(numbers), left_out).print(None, changed=False, numbers=numbers)
        return 0
    named = ", ".join(map(str, numbers[:200])) + (" …" if len(numbers) > 200 else "")
    out.print(
        f"{len(numbers):,} letters{': ' if len(numbers) else ''}{named}", markup=False, highlight=False, soft_wrap=True
    )
    _say_left_out(left_out)
    return 0


def _say_left_out(count: int) -> None:
    if count:
        out.print(
            f"{count:,} letters are left out: they may have been applied already (too_old). Look at the handler's own tables, then "
            "name them with --reason too_old",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


class _Answer:
    """What became of the letters, in a bounded amount of memory."""

    def __init__(self, asked: int, left_out: int) -> None:
        self.asked, self.left_out = asked, left_out
        self.counts: Counter[str] = Counter()
        self.kept: list[RetryResult] = []
        self.bad: list[RetryResult] = []
        self.reached = 0  # of those asked for

    def add(self, done: RetryResult) -> None:
        self.counts[done.outcome] += 1
        self.reached += not done.behind
        if len(self.kept) < _KEPT_MAX:
            self.kept.append(done)
        if not done.is_settled and len(self.bad) < _SHOWN_MAX:
            self.bad.append(done)

    def is_good(self, bulk: bool) -> bool:
        """Whether all letters are settled: by this command, or, of a bulk, by somebody else."""
        elsewhere = ("taken", "settled", "behind") if bulk else ()
        return all(each in ("applied", "duplicate", "discarded", *elsewhere) for each in self.counts)

    def counted(self) -> str:
        return (
            ", ".join(f"{count:,} {outcome}" for outcome, count in self.counts.most_common()) or "nothing was changed"
        )

    def print(self, error: str | None, *, changed: bool = True, numbers: Sequence[int] = ()) -> None:
        """As JSON, which has the same shape whatever happened."""
        listed = [
            {"letter": each.dead_letter, "outcome": each.outcome, "text": each.text, "behind": each.behind}
            for each in self.kept
        ] or [{"letter": each, "outcome": "selected", "text": "", "behind": False} for each in numbers[:_KEPT_MAX]]
        print_json(
            {
                "asked": self.asked,
                "changed": changed,
                "counts": dict(self.counts),
                "left_out": self.left_out,
                "letters": listed,
                "letters_not_listed": max(sum(self.counts.values()), len(numbers)) - len(listed),
                "error": error,
            }
        )

    def say(self, bulk: bool) -> None:
        bad = self.bad if bulk else self.kept[:_SHOWN_MAX]
        for each in bad:
            behind = " (it waited behind)" if each.behind else ""
            text = f": {each.text[:200]}" if each.text else ""
            out.print(
                printable(f"{each.dead_letter}{behind} {each.outcome}{text}"),
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        settled = sum(self.counts[each] for each in ("applied", "duplicate", "discarded")) if bulk else 0
        if (more := sum(self.counts.values()) - settled - len(bad)) > 0:
            out.print(f"… and {more:,} more: consumer dlq list APP")
        out.print(self.counted(), markup=False, highlight=False)
        _say_left_out(self.left_out)


async def _each(drive: Redrive, numbers: Sequence[int], left_out: int, wanted: _Wanted, *, bulk: bool) -> int:
    answer = _Answer(len(numbers), left_out)
    received: list[int] = []
    task = asyncio.current_task()
    assert task is not None

    def stop(number: int) -> None:
        if received:
            task.cancel()  # the transaction is undone, unless it is on its way to be committed
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    drive.stopping = lambda: bool(received)
    ended = False
    error = ""
    try:
        with progress("letters") as bar:
            doing = f"{wanted.verb.removesuffix('y')}{'ing' if wanted.why is not None else 'ying'}"
            async for done in _run(drive, numbers, wanted):
                answer.add(done)
                bar.progress(doing, min(answer.reached, len(numbers)), len(numbers))
        ended = not received
    except (CannotTell, asyncio.CancelledError) as fault:
        error = str(fault)
    if received:
        word = "interrupted" if received[0] == signal.SIGINT else "terminated"
        error = f"{word} after {sum(answer.counts.values()):,} letters of {len(numbers):,} asked for: {answer.counted()}; the rest is untouched"
        error += ", and the same command goes on with it"
    elif not ended:
        error = f"{error or 'interrupted'} (after {answer.reached:,} of {len(numbers):,} letters: {answer.counted()}; what was settled stays so)"
    if wanted.as_json:
        answer.print(error or None)
    elif ended:
        answer.say(bulk)
    if received:
        raise Interrupted(error, received[0])
    if not ended:
        raise CannotTell(error)
    return 0 if answer.is_good(bulk) else 1


async def _run(drive: Redrive, numbers: Sequence[int], wanted: _Wanted) -> AsyncIterator[RetryResult]:
    """What became of each letter."""
    if wanted.why is None:
        async for done in drive.retry(numbers, wanted.edit):
            yield done
        return
    # First all that are meant, then what waited behind them: or a letter would run that is about to be discarded.
    chains: dict[Chain, None] = {}
    for start in range(0, len(numbers), _DISCARD_AT_A_TIME):
        if drive.stopping():
            return
        some, freed = await drive.discard(numbers[start : start + _DISCARD_AT_A_TIME], wanted.why)
        chains |= dict.fromkeys(freed)
        for done in some:
            yield done
    async for done in drive.release(list(chains)):
        yield done
