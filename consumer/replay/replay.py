"""Replay: read topics again and prove that no effect would happen twice, or apply what is missing.

`consumer replay` and `verify` are this file. A range is read without the group (kafka/log_reader.py). Every message goes through
the worker's own code, apply_batch, in transactions that are undone (check), or, with apply, what the ledger lacks goes
through it once more and is stored. What it does not know: whether an effect outside PostgreSQL happened; whether the state
itself is right (rebuild/rebuild.py compares that); what was applied before the ledger began (it says so and does not guess).

The check calls no handler. With `call_handlers`, handlers of missing messages run in transactions that are undone; that, and
a rebuild, are dry runs (transaction/dry_run_guard.py): handlers may not connect anywhere, unless `allow_outside`.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

from consumer import tls
from consumer.app import App
from consumer.app_loader import running
from consumer.core.delivery import Batch, Delivery
from consumer.core.errors import CannotTell, Misconfigured
from consumer.core.handler import Handler
from consumer.core.identity import CallableId, ids_of_text
from consumer.core.log_identity import ObservedLog, check_log
from consumer.core.message import Partition, Record
from consumer.core.ordering import Scheduler
from consumer.core.outcome import Dead, Outcome, RetryLater
from consumer.core.suggestions import UnknownName, suggestion
from consumer.handler_records import coverage, handler_code, id_rules
from consumer.kafka.admin import group_offsets, is_compacted
from consumer.kafka.bounds import Span
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import KafkaError, LogTruncated
from consumer.kafka.log_reader import Chunk, find_partitions, parse, read, resolve
from consumer.postgres.connection import dsn_label, translated_errors, wait_for
from consumer.postgres.epoch import lineage
from consumer.postgres.errors import Conflict, Outage
from consumer.postgres.session import Session
from consumer.precheck.client import Precheck
from consumer.rebuild.rebuild import rebuild as rebuild_state
from consumer.replay import edited_letters, ledger_diff, republish, resume, sealed_letters, second_look
from consumer.replay import effects as proof
from consumer.replay.check import UNCALLED, Look, Witness, place
from consumer.replay.findings import Effects, Findings
from consumer.replay.session import AskingLane, ReplaySession
from consumer.settings import Settings, load
from consumer.transaction import dry_run_guard
from consumer.transaction.apply import apply_batch
from consumer.transaction.dry_run import DryRunObserver, OnlyResult, dry_run
from consumer.transaction.identify import decode_failure, identify
from consumer.transaction.isolate import FAILURES_MAX, Part, TransactionPoisoned
from consumer.transaction.result import BatchResult, LedgerIds, complete
from consumer.transaction.settle import next_parts, pause_seconds, settle

Mode = Literal["check", "apply", "rebuild", "republish"]

_CHUNK = 4096  # deliveries in one transaction: enough to make its round trips cheap
_SAVE_SECONDS = 5.0
_NOBODY_WAITS = Scheduler({}, 1)  # for the proof, which looks at every message
_EVERY_OFFSET = 1 << 63  # beyond any
# What raises RunAgain is never given up. After so many attempts and so long without anything else, that is the answer.
_FRUITLESS_MAX, _FRUITLESS_SECONDS = 20, 60.0
_LAST_LOOK_SECONDS = 3.0  # for the sequences, before an interrupted replay ends
_SILENT_MAX = 3  # times in a row that Redis is waited for in vain, before it is not asked any more
_PRECHECK_SECONDS = 2.0  # nobody waits for a replay as for a worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to replay, and how. The bounds are as kafka/bounds.py reads them; empty tuples mean all."""

    mode: Mode = "check"
    start: str = "earliest"
    end: str = "latest"
    partitions: tuple[int, ...] = ()
    key: str | bytes | None = None
    message_id: str | None = None
    handlers: tuple[str, ...] = ()
    assume_unapplied: bool = False
    ignore: tuple[str, ...] = ()
    compare: tuple[str, ...] = ()
    base: str | None = None
    trace: bool = True
    republish_to: str | None = None
    call_handlers: bool = False
    allow_outside: bool = False

    @property
    def is_dry_run(self) -> bool:
        """Whether handlers are called, and everything is undone."""
        return self.mode == "rebuild" or (self.mode == "check" and self.call_handlers)


@dataclass(frozen=True, slots=True)
class Told:
    """How a replay tells what it does: lines of text, and how much is done of how much."""

    line: Callable[[str], None] = lambda _: None
    announce: Callable[[str], None] = lambda _: None  # what a person must know before the work begins
    progress: Callable[[str, int, int], None] = lambda *_: None
    save: Callable[[dict[str, Any]], None] | None = None  # its state, to go on with later


@dataclass(slots=True)
class _Lane:
    """Some partitions, in order: what is parked of them, and their connections.

    proof: on which nothing may ever be written or advanced. work: where the handlers of missing messages run.
    """

    state: Scheduler
    chunks: asyncio.Queue[tuple[Partition, Sequence[Record], int] | None]
    proof: Session | None = None
    work: Session | None = None


async def replay(
    app: App,
    settings: Settings,
    topics: Sequence[str],
    options: Options,
    told: Told,
    resumed: dict[str, Any] | None = None,
    source: KafkaConsumer | None = None,
    *,
    alone: bool = False,
) -> Findings:
    """Replay topics. The App's lifespan is entered around it where handlers are called.

    source: how the log is read, where not as usual. alone: the process does nothing else, see `dryrun.Guard`.

    Raises Misconfigured for what cannot be replayed as asked, CannotTell when it ended early (nothing was changed, but
    for what `apply` had stored by then, each message once).
    """
    _check(options)
    one_database(app)
    engine = _Replay(app, settings, list(dict.fromkeys(topics)), options, told, resumed)
    source = source or KafkaConsumer(settings, None)
    if options.is_dry_run:
        return await _dry_run(app, engine, source, options, alone)
    if options.mode != "apply":
        return await engine.run(source)
    async with running(app):
        return await engine.run(source)


async def _dry_run(app: App, engine: _Replay, source: KafkaConsumer, options: Options, alone: bool) -> Findings:
    """Run with handlers that have no outside effects. Raises Misconfigured for one that would have some."""
    if options.allow_outside:
        return await _with_dry_handlers(app, engine, source)
    guard = None
    try:
        with dry_run_guard.guarded(alone=alone) as guard:
            found = await _with_dry_handlers(app, engine, source)
    except (Exception, asyncio.CancelledError):
        if guard is None or not guard.refused:
            raise
    if guard is not None and guard.refused:  # maybe swallowed by the handler
        raise Misconfigured(guard.refused)
    return found


async def _with_dry_handlers(app: App, engine: _Replay, source: KafkaConsumer) -> Findings:
    lifespan, subject = running(app), f"the lifespan of App {app.name!r}"
    with dry_run_guard.running_as(subject):
        await lifespan.__aenter__()
    try:
        for each in app.handlers.values():
            each.call = dry_run_guard.around(each)
        found = await engine.run(source)
    except BaseException:
        with dry_run_guard.running_as(subject):
            if not await lifespan.__aexit__(*sys.exc_info()):
                raise
        raise  # a lifespan that swallows exceptions leaves no findings
    with dry_run_guard.running_as(subject):
        await lifespan.__aexit__(None, None, None)
    return found


def one_database(app: App) -> None:
    """Raises Misconfigured for an App with shards."""
    if app.shards:
        raise Misconfigured(
            f"App {app.name!r} has shards, and a replay knows one database only. To apply what is missing, move the positions back "
            "with `consumer positions APP --topic T --partition N --to earliest`: what was applied is not applied again"
        )


def _check(options: Options) -> None:
    """Raise Misconfigured for options that contradict each other, or that nobody would heed."""
    if options.mode == "rebuild":
        heedless: dict[str, bool] = {
            "--from": options.start != "earliest",
            "--to": options.end != "latest",
            "--key": options.key is not None,
            "--message-id": options.message_id is not None,
            "--partition": bool(options.partitions),
            "--assume-unapplied": options.assume_unapplied,
        }
        for option, given in heedless.items():
            if given:
                raise Misconfigured(
                    f"{option} does not go with --rebuild, which compares the state that all messages up to the position have made"
                )
    else:
        for option, value in (("--ignore", options.ignore), ("--compare", options.compare), ("--base", options.base)):
            if value:
                raise Misconfigured(f"{option} goes with --rebuild")
        if not options.trace:
            raise Misconfigured("--no-trace goes with --rebuild")
    if options.call_handlers and options.mode != "check":
        raise Misconfigured(f"--call-handlers does not go with --{options.mode}: leave it out")
    if options.allow_outside and not options.is_dry_run:
        raise Misconfigured(
            "--allow-outside goes with --rebuild or --call-handlers: nothing else calls handlers in a dry run"
        )
    if options.mode == "republish":
        if options.handlers or options.message_id is not None or options.assume_unapplied:
            raise Misconfigured(
                "--republish copies records, whatever their handlers: leave out --handler, --message-id and --assume-unapplied"
            )
        if not options.republish_to:
            raise Misconfigured("--republish: name the topic to copy to")
    if options.key is not None and not isinstance(options.key, str | bytes):
        raise Misconfigured(f"key: text or bytes, not {type(options.key).__name__}")
    if options.message_id is not None and not (isinstance(options.message_id, str) and options.message_id):
        raise Misconfigured("--message-id: the id as its producer sent it, not empty")
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in options.partitions):
        raise Misconfigured("--partition: a number of at least 0")


async def verify(
    app: App,
    *topics: str,
    settings: Settings | None = None,
    start: str | int | datetime = "earliest",
    end: str | int | datetime = "latest",
    partitions: Sequence[int] = (),
    key: str | bytes | None = None,
    message_id: str | None = None,
    handlers: Sequence[str] = (),
    apply: bool = False,
    rebuild: bool = False,
    ignore: Sequence[str] = (),
    compare: Sequence[str] = (),
    base: str | None = None,
    assume_unapplied: bool = False,
    call_handlers: bool = False,
    allow_outside: bool = False,
) -> Findings:
    """What `consumer replay` does, as a call: read topics again, and tell whether anything is missing or would happen twice.

    settings: those of the environment by default. start, end: "earliest", "latest", "position", an offset, a time (a
    string is UTC where it names no zone) or "24h" for a day ago; `end` is not included. apply, rebuild (with ignore,
    compare, base): as the flags of those names; at most one of the two. No topic means all that idempotent handlers take.

    Returns the findings: ask them `ok`, `verdict()`, `problems()`, `as_dict()`, or call `check()`, which raises an
    AssertionError with the problems. Raises Misconfigured for what cannot be replayed, CannotTell when it could not come
    to its end. call_handlers: call the handlers of missing messages too, and undo what they write. Handlers that rebuild or
    call_handlers runs may not connect anywhere, unless allow_outside.
    """
    if apply and rebuild:
        raise Misconfigured("apply and rebuild: choose one of them")
    wanted = list(topics) or sorted({each for h in app.handlers.values() if h.idempotent for each in h.topics})
    options = Options(
        mode="apply" if apply else "rebuild" if rebuild else "check",
        start=_as_text(start),
        end=_as_text(end),
        partitions=(partitions,) if isinstance(partitions, int) else tuple(partitions),
        key=key,
        message_id=message_id,
        handlers=tuple(handlers),
        assume_unapplied=assume_unapplied,
        ignore=tuple(ignore),
        compare=tuple(compare),
        base=base,
        call_handlers=call_handlers,
        allow_outside=allow_outside,
    )
    return await replay(app, settings or load(), wanted, options, Told())


def _as_text(bound: str | int | datetime) -> str:
    return bound.isoformat() if isinstance(bound, datetime) else str(bound)


class _Replay:
    def __init__(
        self,
        app: App,
        settings: Settings,
        topics: list[str],
        options: Options,
        told: Told,
        resumed: dict[str, Any] | None,
    ) -> None:
        self.app = app
        self.settings = settings
        self.topics = topics
        self.options = options
        self.told = told
        self.resumed = resumed
        self.handlers = _choose(app, topics, options)
        self.skipping = {
            topic: [each.name for each in handlers if not each.idempotent and not options.handlers]
            for topic, handlers in app.by_topic().items()
        }
        self.wanted_key = (
            options.key.encode("utf-8", "surrogateescape") if isinstance(options.key, str) else options.key
        )
        self.wanted_ids = None if options.message_id is None else ids_of_text(options.message_id)
        now = datetime.now(UTC)
        self.now_ms = int(now.timestamp() * 1000)
        self.findings = Findings(
            app.name,
            options.mode,
            now.isoformat(timespec="seconds"),
            {
                "from": None if options.start == "earliest" else options.start,
                "to": None if options.end == "latest" else options.end,
                "partitions": list(options.partitions) or None,
                "key": None if options.key is None else _shown(options.key),
                "message_id": options.message_id,
                "handlers": list(options.handlers) or None,
            },
        )
        self.witness = Witness(
            self.findings, options.mode == "apply", options.call_handlers, options.assume_unapplied, self.session
        )
        self.offset_ids: set[str] = set()
        self.id_rule_doubts: list[dict[str, Any]] = []
        self.names = LedgerIds(app.name, {})
        self.epoch = ""
        self.precheck: Precheck | None = None
        self.lanes: list[_Lane] = []
        self.counted: dict[Partition, int] = {}  # below: deliveries are counted, or are on their way to be applied now
        self.counted_before: dict[Partition, int] = {}  # by the part before an interruption
        self.conditions: dict[str, Mapping[str, str | None]] = {}  # what may not change before it goes on
        self.letters_before = 0  # number of the last dead letter, before it stored anything
        self.has_looked = False  # at the sequences of this part, at its end
        self.blind = False  # a connection was lost before its sequences were looked at
        self.code_recorded_at = float("-inf")
        self.whole: dict[str, Any] | None = None  # the state after the last record
        self.reached: dict[Partition, int] = {}  # where it went on after an interruption; what was copied
        self.rebuilding = ""  # how far a rebuild has come
        self.fruitless, self.settled_at = 0, time.monotonic()  # attempts since anything was settled, and when that was
        self.silent = 0  # times in a row that Redis did not answer
        self.begun_at = time.monotonic()
        self.saved_at = time.monotonic()

    # -- life -------------------------------------------------------------------------------------------------------

    async def run(self, source: KafkaConsumer) -> Findings:
        try:
            await source.start(self.settings.wait_seconds)
            await self._carry_out(source)
        except asyncio.CancelledError:
            raise CannotTell(f"interrupted {self._how_far()}") from None
        except LogTruncated as error:
            raise CannotTell(
                f"records of {error.partition.topic}:{error.partition.partition} were removed from the log while it was read: "
                f"it does not hold offset {error.position} any more ({self._how_far()})"
            ) from None
        except (KafkaError, TimeoutError) as error:
            raise CannotTell(f"Kafka: {str(error) or type(error).__name__} ({self._how_far()})") from None
        except Outage as error:
            raise CannotTell(f"{dsn_label(self.settings.dsn)}: {error} ({self._how_far()})") from None
        finally:
            await self._last_look()
            self._save(force=True)
            for session in [self.witness.session, *(each for lane in self.lanes for each in (lane.proof, lane.work))]:
                if session is not None:
                    session.close()
            if self.precheck is not None:
                await self.precheck.stop()
            await source.stop(5)
        self.findings.seconds = time.monotonic() - self.begun_at
        return self.findings

    async def _carry_out(self, source: KafkaConsumer) -> None:
        findings, options = self.findings, self.options
        session = self.witness.session = await self.session()
        self.epoch = session.epoch
        self.conditions |= resume.conditions_of_code(self.app, self.handlers, self.topics, options)
        if self.resumed is not None:
            self._refuse_changed(self.resumed, session)
        partitions = await find_partitions(source, self.topics, options.partitions)
        await self._learn(session, partitions)
        identity = await source.log.identity(self.topics)
        for each, at in sorted(self.names.logs.items()):
            if stop := check_log(each, at, ObservedLog(identity.cluster_id, identity.topics.get(each.topic))):
                raise CannotTell(f"{stop.text}; `consumer positions APP {stop.do}` begins with what is there now")
        if options.mode == "rebuild":
            await self._rebuild(source, partitions)
            return
        self.conditions |= await resume.conditions_of_services(
            session.connection, identity, self.topics, partitions, self.witness
        )
        start, end = parse(options.start, "--from", self.now_ms), parse(options.end, "--to", self.now_ms)
        if self.resumed is not None:
            await self._go_on_from(self.resumed, source)
            findings = self.findings
        else:
            findings.spans = await resolve(source, partitions, start, end, findings.positions)
            self.letters_before = await resume.letters_before(session.connection)
        if options.mode == "republish":
            await self._republish(source)
            return
        await self._doubt_a_log_that_is_too_short(source)
        await proof.check_countable(session.connection, dsn_label(self.settings.dsn))
        self.witness.uncounted = self._uncounted()
        findings.effects = findings.effects or Effects()
        await self._read(source)
        self._check_selected()
        await self._look_at_sequences()
        if self.told.save is not None:  # what is looked at again from here on must not count twice after a resume
            self.whole = json.loads(json.dumps(self._state()))
        await self._look_again()
        await self._compare_history(source)
        await self._check_letters()
        session = await self.witness.open()
        await resume.weigh_rows_gone(session.connection, findings, self.conditions)
        if self.resumed is not None and options.mode == "apply":
            await resume.doubt_letters(session.connection, self.letters_before, self.handlers, findings)
        self._conclude()
        await self._record_coverage()

    async def session(self, kind: type[Session] = Session) -> Session:
        """A connection to the primary, waited for. Raises ServiceUnavailable, and CannotTell for another database."""
        session = await wait_for(lambda left: kind.open(self.settings, left), self.settings.wait_seconds)
        if self.epoch and lineage(session.epoch) != lineage(self.epoch):
            session.close()
            raise CannotTell(f"PostgreSQL is another one now, or went back in time: begin again ({self._how_far()})")
        return session

    async def _learn(self, session: Session, partitions: Sequence[Partition]) -> None:
        """Numbers, positions, and from where on the ledger knows."""
        await self._look_at_coverage(session, partitions)  # before a new handler is registered
        await self._look_at_id_rules(session, partitions)
        names = [each.name for each in self.handlers]
        number = session.numbers if self.options.mode == "apply" else session.known_numbers
        numbers, topics = await number(self.app.name, names, self.topics)
        if self.options.mode == "apply":
            with translated_errors(self.settings):
                await id_rules.record(session.connection, self.app)
        for handler in self.handlers:
            handler.number = numbers[handler.name]
        self.names = LedgerIds(self.app.name, topics, await session.positions(self.app.name, partitions))
        self.witness.topics = topics
        rows = await session.horizons(self.app.name, partitions)
        self.findings.positions = {each: row[0] for each, row in rows.items()}
        self.witness.horizon = {each: row[1] for each, row in rows.items()}
        if any(each not in rows for each in partitions):
            # Where a worker would begin that has no position yet: at Kafka's commit, and it knows nothing of what is below.
            committed = await group_offsets(self.settings, self.app.name)
            for each in partitions:
                if each not in rows:
                    self.witness.horizon[each] = committed.get(each, 0)
        if (redis_url := tls.redis_url(self.settings)) is not None:
            self.precheck = Precheck(
                redis_url,
                self.app.name,
                _PRECHECK_SECONDS,
                self.settings.precheck_window_hours * 3600,
            )
            self.precheck.new_epoch(self.epoch)
            if self.options.mode == "check":  # with apply, what Redis says beforehand is of no interest
                self.findings.precheck = {"asked": 0, "hits": 0, "wrong": 0, "unanswered": 0}

    async def _record_code(self, session: Session) -> None:
        """Tell the ledger that this code applies messages: before the first one, and every few minutes."""
        now = time.monotonic()
        if now - self.code_recorded_at > handler_code.RENEW_SECONDS:
            with translated_errors(self.settings):
                await handler_code.record(session.connection, self.app)
            self.code_recorded_at = now

    async def _look_at_coverage(self, session: Session, partitions: Sequence[Partition]) -> None:
        """What handlers need not settle is not missing; what looks renamed is reported, and applied only where it is named.

        Raises Misconfigured for a probable rename that would be applied.
        """
        with translated_errors(self.settings):
            picture = await coverage.look(session.connection, self.app.name)
        chosen = {each.name for each in self.handlers}
        numbers = {name: each.number for name, each in picture.known.items() if name in chosen}
        self.witness.exempt = {
            (name, each): picture.declared[number, each]
            for name, number in numbers.items()
            for each in partitions
            if (number, each) in picture.declared
        }
        for each in picture.assess(self.app).renames:
            if each.new not in chosen:
                continue
            text = (
                f"handler {each.new!r} is probably {each.old!r}, renamed: the ledger holds {each.old!r} for the same topic "
                f"{each.topic}, and the App no longer has it; `consumer migrate --rename-handler {self.app.name} {each.old} {each.new}` "
                "keeps what was settled"
            )
            if self.options.mode == "apply" and each.new not in self.options.handlers:
                raise Misconfigured(
                    f"{text}; if it is a new handler, name it with --handler {each.new} (nothing was changed)"
                )
            self.findings.notes.append(text)

    async def _look_at_id_rules(self, session: Session, partitions: Sequence[Partition]) -> None:
        """Nothing is taken for missing that may have been applied under an id of another rule.

        Raises Misconfigured for a changed rule of a handler whose messages would be applied without naming it.
        """
        with translated_errors(self.settings):
            rules = await id_rules.look(session.connection, self.app)
            codes = (await handler_code.look(session.connection, self.app)).id_code
        for each in self.handlers:
            if codes[each.name].others and isinstance(each.rule, CallableId):
                self._doubt_ids(each, handler_code.since_text(codes[each.name]))
        floors = dict(rules.floors)
        for each in self.handlers:
            if (change := rules.changes.get(each.name)) is None:
                continue
            if self.options.mode == "apply":
                if each.name not in self.options.handlers:
                    raise Misconfigured(
                        f"{change.text}; {id_rules.accepting('APP', each.name)}, or name it with --handler {each.name} to apply them "
                        "again (nothing was changed)"
                    )
                continue
            floors |= {(each.name, partition): _EVERY_OFFSET for partition in partitions}
            self.id_rule_doubts.append({"kind": "id_rule_changed", "count": 1, "text": change.text})
        self.witness.floors = floors

    def _doubt_ids(self, handler: Handler, since: str) -> None:
        """Absence proves nothing where messages may have been applied under an id of other code."""
        text = (
            f"handler {handler.name!r}: its message_id= function has been another one than today's, {since}: what was applied "
            "before may have other ids"
        )
        if self.options.mode == "apply" and handler.name not in self.options.handlers:
            raise Misconfigured(
                f"{text}; if its ids are the same, name it with --handler {handler.name} (nothing was changed)"
            )
        self.findings.recoded[handler.name] = text

    async def _record_coverage(self) -> None:
        """Record what an --apply has settled, so that `consumer status` no longer reports it as missed."""
        findings, options = self.findings, self.options
        narrowed = self.wanted_key is not None or self.wanted_ids is not None
        open_questions = findings.total("missing") or findings.total("unknown") or findings.unsettled
        if options.mode != "apply" or narrowed or open_questions:
            return
        begins_first = options.start in ("earliest", "beginning")  # what the log has dropped cannot be filled
        spans = [(each.partition, 0 if begins_first else each.first, each.end) for each in findings.spans]
        session = await self.witness.open()
        with translated_errors(self.settings):
            for handler in self.handlers:
                await coverage.cover(
                    session.connection,
                    handler.number,
                    [
                        (p, first, min(end, findings.positions.get(p, 0)))
                        for p, first, end in spans
                        if p.topic in handler.topics
                    ],
                    "replayed",
                )

    async def _doubt_a_log_that_is_too_short(self, source: KafkaConsumer) -> None:
        """A position beyond the end of the log: the topic was made anew, or lost its tail."""
        ends = await source.log.ends(list(self.findings.positions))
        short = [
            f"{each.topic}:{each.partition} ends at {ends[each]}, and its position is {position}"
            for each, position in sorted(self.findings.positions.items())
            if position > ends[each]
        ]
        if short:
            text = "the log ends below the position, so it is not the one that was consumed: " + ", ".join(short[:5])
            self.findings.doubts.append({"kind": "log_too_short", "count": len(short), "text": text})

    def _check_selected(self) -> None:
        """Raise Misconfigured when a filter let nothing through: no answer is no proof."""
        if self.wanted_ids is not None and not self.findings.counts:
            raise Misconfigured(
                "--message-id: no message of the range has that id, for these handlers; nothing was changed"
            )
        if self.wanted_key is not None and not self.findings.messages:
            raise Misconfigured("--key: no message of the range has that key; nothing was changed")

    # -- reading ----------------------------------------------------------------------------------------------------

    async def _read(self, source: KafkaConsumer) -> None:
        spans = [each for each in self.findings.spans if each.length]
        number = min(self.settings.lanes, len(spans))
        by_topic = self.app.by_topic()
        self.lanes = [
            _Lane(AskingLane(by_topic, self.settings.parked_messages_max), asyncio.Queue(2))
            for _ in range(max(1, number))
        ]
        for lane, session in zip(self.lanes, await asyncio.gather(*[self.session() for _ in self.lanes]), strict=True):
            lane.proof = session
        lane_of: dict[Partition, _Lane] = {}
        for n, span in enumerate(spans):
            lane = lane_of[span.partition] = self.lanes[n % len(self.lanes)]
            lane.state.assign(span.partition, self.reached.get(span.partition, span.first))
        try:
            async with asyncio.TaskGroup() as tasks:
                for lane in self.lanes:
                    tasks.create_task(self._run_lane(lane))
                todo = [each._replace(first=lane_of[each.partition].state.position(each.partition)) for each in spans]
                async for chunk in read(source, todo):
                    for records, end in self._cut(chunk):
                        await lane_of[chunk.partition].chunks.put((chunk.partition, records, end))
                for lane in self.lanes:
                    await lane.chunks.put(None)
        except BaseExceptionGroup as group:
            raise _first(group) from None

    def _cut(self, chunk: Chunk) -> list[tuple[Sequence[Record], int]]:
        """Cut a chunk to the size of transactions. No piece holds both records counted before an interruption and others."""
        past = self.counted_before.get(chunk.partition, 0)
        if chunk.records and chunk.records[0].offset < past <= chunk.records[-1].offset:
            before = [each for each in chunk.records if each.offset < past]
            after = Chunk(chunk.partition, chunk.records[len(before) :], chunk.next)
            return self._cut(Chunk(chunk.partition, before, past)) + self._cut(after)
        size = max(1, _CHUNK // max(1, len(self._of_topic(chunk.partition.topic))))
        if len(chunk.records) <= size:
            return [(chunk.records, chunk.next)]
        pieces = [chunk.records[n : n + size] for n in range(0, len(chunk.records), size)]
        return [(each, each[-1].offset + 1) for each in pieces[:-1]] + [(pieces[-1], chunk.next)]

    def _of_topic(self, topic: str) -> list[Handler]:
        return [each for each in self.handlers if topic in each.topics]

    async def _run_lane(self, lane: _Lane) -> None:
        while (found := await lane.chunks.get()) is not None:
            partition, records, end = found
            await self._chunk(lane, partition, records, end)
            while (
                retries := lane.state.take(time.monotonic(), self.settings.batch_messages_max, 1 << 62)
            ) is not None or lane.state.delayed >= self.settings.parked_messages_max:
                await self._retry(lane, retries)
            self._tell_progress()
            self._save()
        while lane.state.delayed:
            if self.fruitless > _FRUITLESS_MAX and time.monotonic() > self.settled_at + _FRUITLESS_SECONDS:
                raise CannotTell(f"{lane.state.delayed:,} messages ask to be tried again and again ({self._how_far()})")
            await self._retry(lane, lane.state.take(time.monotonic(), self.settings.batch_messages_max, 1 << 62))
            self._tell_progress()
            self._save()

    async def _chunk(self, lane: _Lane, partition: Partition, records: Sequence[Record], end: int) -> None:
        """Records of one partition: look at them all in a transaction that is undone, then deal with what is missing."""
        if self.wanted_key is not None:
            records = [each for each in records if each.key == self.wanted_key]
        handlers = self._of_topic(partition.topic)
        deliveries = [Delivery(handler, record) for record in records for handler in handlers]
        self.offset_ids |= identify(deliveries, self.names.logs)
        if self.wanted_ids is not None:
            deliveries = [each for each in deliveries if each.id in self.wanted_ids]
        look = Look(self.witness, partition, deliveries)
        if deliveries:
            await self._go_through(lane, Batch(deliveries, {}, {}), look)
            await look.sort()
        if self.options.mode == "apply":
            self._counted(look, records, end)
            await self._store(lane, lane.state.batch_up_to(partition, look.missing, end))
            return
        would = await self._rehearse(lane, look.missing)
        # From here on without waiting: what was counted and how far we are must never disagree, or a replay that was
        # interrupted could not go on.
        self._counted(look, records, end)
        look.tally_missing(would)
        batch = lane.state.batch_up_to(partition, (), end)
        lane.state.settle(batch, {}, lane.state.position_updates(batch, ()))

    def _counted(self, look: Look, records: Sequence[Record], end: int) -> None:
        findings, partition = self.findings, look.partition
        look.tally_effects()
        if records and records[-1].offset < self.counted_before.get(partition, 0):
            return
        self.counted[partition] = end
        findings.read[partition] = findings.read.get(partition, 0) + len(records)
        if records and self.wanted_ids is None:
            for name in self.skipping.get(partition.topic, ()):
                findings.count(name, partition, "skipped", len(records))
        look.tally()

    # -- transactions -----------------------------------------------------------------------------------------------

    async def _go_through(self, lane: _Lane, batch: Batch, look: Look) -> None:
        """The proof: claim everything, call the handlers of what was claimed although it stands, count, undo."""
        failures = 0
        while True:
            if lane.proof is None or not lane.proof.is_usable:
                self.blind = True
                lane.proof = await self.session()
            look.begin()
            if self.precheck is not None and self.findings.precheck is not None:
                look.hits = None
                if self.silent < _SILENT_MAX:
                    asked = [each for each in batch.deliveries if each.outcome is None]
                    look.hits = await self.precheck.known(asked, time.time())
                    self.silent = 0 if look.hits is not None else self.silent + 1
            try:
                await dry_run(
                    lane.proof, self.names, _NOBODY_WAITS, batch, look, use_savepoints=False, random=random.random
                )
            except TransactionPoisoned:
                pass  # a handler that was called in spite of its claim, and failed: `look` has seen the claim
            except (Conflict, Outage) as error:
                failures += 1
                if failures > FAILURES_MAX:
                    raise CannotTell(
                        f"{dsn_label(self.settings.dsn)}: {error or type(error).__name__}, {failures} times in a row "
                        f"({self._how_far()})"
                    ) from None
                await asyncio.sleep(0.05 * 2.0**failures)
                continue
            return

    async def _rehearse(self, lane: _Lane, missing: list[Delivery]) -> dict[Delivery, Outcome | None]:
        """What would become of each missing message (None: applied): its handler is called and undone, if asked."""
        would: dict[Delivery, Outcome | None] = {}
        if not self.options.call_handlers:
            return {each: decode_failure(each) or UNCALLED for each in missing}
        for start in range(0, len(missing), self.settings.batch_messages_max):
            batch = Batch(missing[start : start + self.settings.batch_messages_max], {}, {})
            async for part, done in self._settled(lane, batch, OnlyResult()):
                would |= {each: done.outcomes.get(each) for each in part.batch.deliveries}
        return would

    async def _store(self, lane: _Lane, batch: Batch) -> None:
        """Apply what is missing, for real. What fails is parked by its policy, and what is behind it waits."""
        if not batch.deliveries:
            lane.state.settle(batch, {}, lane.state.position_updates(batch, ()))
            return
        async for part, done in self._settled(lane, batch, None):
            complete(lane.state, part.batch, done, time.monotonic())
            if self.precheck is not None and lane.work is not None:
                self.precheck.mark(done.applied, lane.work.epoch, time.time())
            for delivery in part.batch.deliveries:
                self._stored(delivery, done)

    def _stored(self, delivery: Delivery, done: BatchResult) -> None:
        match done.outcomes.get(delivery):
            case None:
                outcome = "applied_now"
                self.witness.matched_now(delivery)
            case Dead(reason):
                outcome = "dead_lettered_now"
                self.findings.sample(outcome, **place(delivery), detail=f"{reason.value}: see `consumer dlq list`")
            case RetryLater():
                self.fruitless += 1
                return  # not yet
            case _:
                outcome = "applied"  # by a worker, meanwhile
        self.fruitless, self.settled_at = 0, time.monotonic()
        self.witness.missing.pop((delivery.handler.name, delivery.id), None)
        self.findings.count(delivery.handler.name, delivery.partition, outcome)
        self.findings.times.add([delivery.record.timestamp], outcome)

    async def _retry(self, lane: _Lane, batch: Batch | None) -> None:
        if batch is not None:
            await self._store(lane, batch)
            return
        due = lane.state.next_due()
        await asyncio.sleep(max(0.0, due - time.monotonic()) if due is not None else 0.05)

    def _settled(
        self, lane: _Lane, batch: Batch, observer: DryRunObserver | None
    ) -> AsyncIterator[tuple[Part, BatchResult]]:
        """Settle a batch as a worker does; yields each part with its result. observer: of a dry run."""

        async def prepare(part: Part) -> bool:
            if lane.work is None or not lane.work.is_usable:
                lane.work = await self.session(ReplaySession)
                lane.work.owns_positions = False
            if observer is None:
                await self._record_code(lane.work)
            return True

        async def attempt(part: Part) -> BatchResult:
            assert lane.work is not None
            run = apply_batch if observer is None else partial(dry_run, observer=observer)
            return await run(
                lane.work,
                self.names,
                lane.state,
                part.batch,
                use_savepoints=part.use_savepoints,
                random=random.random,
            )

        async def after_failure(part: Part, error: Exception) -> Sequence[Part]:
            parts = next_parts(part, error, random.random)
            if isinstance(error, Conflict | Outage):
                await asyncio.sleep(pause_seconds(part.failures))
            return parts

        return settle([batch], prepare, attempt, after_failure, rerun_late=observer is not None)

    # -- the end ----------------------------------------------------------------------------------------------------

    async def _look_again(self) -> None:
        numbers = {each.name: each.number for each in self.handlers}
        await self.witness.look_again(numbers)
        await second_look.look_again(self.witness, numbers)

    async def _look_at_sequences(self) -> None:
        effects = self.findings.effects
        assert effects is not None
        self.has_looked = True
        if self.settings.postgres_pooler:
            effects.uncounted = "sequences were not looked at, because sessions behind a pooler are not ours"
            return
        moved: set[str] = set(effects.sequences)
        for lane in self.lanes:
            if lane.proof is not None and lane.proof.is_usable:
                moved |= set(await proof.sequences_moved(lane.proof.connection))
        effects.sequences = sorted(moved)

    async def _compare_history(self, source: KafkaConsumer) -> None:
        findings = self.findings
        if narrowed := self._narrowed():
            findings.notes.append(f"ledger rows were not compared with the log the other way, because of {narrowed[0]}")
            return
        known = [each for each in self.handlers if each.name not in self.witness.uncounted]
        policies: dict[str, bool] = {}

        async def compacted(topic: str) -> bool:
            if topic not in policies:
                policies[topic] = await is_compacted(self.settings, topic)
            return policies[topic]

        async def read_ends() -> Mapping[Partition, int]:
            return await source.log.ends(await find_partitions(source, self.topics, None))

        whole = self.options.end == "latest" and not self.options.partitions
        self.told.line("comparing the ledger's rows with the log")
        await ledger_diff.compare(
            (await self.witness.open()).connection,
            source,
            findings,
            known,
            self.names.topics,
            self.witness.matched,
            self.witness.missing,
            compacted,
            read_ends if whole else None,
            self.names.logs,
        )
        if findings.gone:
            findings.notes.append(
                f"{findings.gone:,} ledger rows name records that a compacted log does not hold any more: nothing can be told of those"
            )

    async def _check_letters(self) -> None:
        connection = (await self.witness.open()).connection
        numbers = {each.number: each for each in self.handlers if each.number > 0}
        for part in (sealed_letters, edited_letters):
            await part.check(connection, self.findings, numbers, self.wanted_key, self.wanted_ids)

    def _narrowed(self) -> list[str]:
        """The options by which single messages are chosen."""
        return [name for name, on in (("--key", self.wanted_key), ("--message-id", self.wanted_ids)) if on is not None]

    def _uncounted(self) -> frozenset[str]:
        """Handlers whose rows are not compared with the log: every message of theirs is looked at again instead."""
        handlers = [each for each in self.handlers if self._narrowed() or each.number < 0 or self._has_other_ids(each)]
        return frozenset(each.name for each in handlers)

    def _has_other_ids(self, handler: Handler) -> bool:
        """Whether rows of the handler may have ids of another rule than its messages have now."""
        return any(
            self.witness.floors.get((handler.name, each.partition), 0) > each.first for each in self.findings.spans
        )

    def _conclude(self) -> None:
        findings = self.findings
        findings.doubts += self.id_rule_doubts
        dropped = [
            f"{each.partition.topic}:{each.partition.partition} begins at offset {each.first}"
            for each in findings.spans
            if each.first and self.options.start == "earliest"
        ]
        if dropped:
            findings.notes.append(
                f"the log has dropped its first records, of which nothing can be told: {', '.join(dropped[:8])}"
            )
        if self.witness.would and not self.options.call_handlers and self.options.mode == "check":
            findings.notes.append(
                "no handler was called: whether the missing messages would be applied, fail or be rejected is not known "
                "(--call-handlers calls them and undoes what they write)"
            )
        elif self.witness.would:
            told = ", ".join(f"{count:,} would {what}" for what, count in sorted(self.witness.would.items()))
            findings.notes.append(f"the handlers of missing messages were called and undone: {told}")
        if self.blind:
            findings.notes.append(
                "a connection was lost, or the process was killed: sequences that had moved on it are not known"
            )
        for topic in sorted(self.offset_ids):
            findings.notes.append(
                f"messages of {topic} without an id are identified by their offset: a message that was produced twice is two messages"
            )
        if findings.precheck is not None and findings.precheck["unanswered"]:
            findings.notes.append(f"Redis did not answer for {findings.precheck['unanswered']:,} deliveries")

    async def _rebuild(self, source: KafkaConsumer, partitions: Sequence[Partition]) -> None:
        options = self.options
        compacted = [topic for topic in self.topics if await is_compacted(self.settings, topic)]
        found = await rebuild_state(
            self.app,
            self.settings,
            source,
            partitions,
            handlers=options.handlers or None,
            ignore=options.ignore,
            compare=options.compare,
            base=options.base,
            trace=options.trace,
            tell=self.told.line,
            announce=self._announce_calls,
            progress=self._rebuilding,
        )
        self.findings.rebuilt = {**found.as_dict(), "compacted": compacted}
        self.findings.notes += found.notes
        self.findings.spans = [
            Span(Partition(each["topic"], each["partition"]), each["from"], each["to"])
            for each in self.findings.rebuilt["ranges"]
        ]

    def _announce_calls(self, calls: int, handlers: Sequence[str]) -> None:
        allowed = self.options.allow_outside
        outside = "their connections to the outside are allowed" if allowed else "connections of theirs are refused"
        text = (
            f"the rebuild makes up to {calls:,} calls of {', '.join(handlers)}, some again to find the messages behind "
            f"differences; what they write is undone, {outside}"
        )
        self.told.announce(text)
        self.findings.notes.append(text)

    def _rebuilding(self, phase: str, done: int, total: int) -> None:
        self.rebuilding = f"in the rebuild ({phase}: {done:,} of {total:,}); nothing was changed"
        self.told.progress(phase, done, total)

    async def _republish(self, source: KafkaConsumer) -> None:
        options, findings = self.options, self.findings
        assert options.republish_to is not None
        # Who will read the copy: those that take that topic, or, when it is new to the App, those of the topics that are read.
        takers = [each for each in self.app.handlers.values() if options.republish_to in each.topics]
        takers = takers or [each for each in self.app.handlers.values() if set(self.topics) & set(each.topics)]
        republish.check(takers, self.topics, options.republish_to)
        copied = findings.republished = findings.republished or {
            "topic": options.republish_to,
            "copied": 0,
            "refused": 0,
        }
        self.reached |= {each.partition: self.reached.get(each.partition, each.first) for each in findings.spans}
        todo = [each._replace(first=self.reached[each.partition]) for each in findings.spans]
        async for done in republish.republish(
            self.settings,
            source,
            [each for each in todo if each.length],
            options.republish_to,
            wanted=self._wanted,
            fallback=republish.needs_fallback(takers),
            logs=self.names.logs,
        ):
            copied["copied"] += done.copied
            copied["refused"] += done.refused
            findings.read[done.partition] = findings.read.get(done.partition, 0) + done.copied + done.refused
            self.reached[done.partition] = done.next
            self._tell_progress()
            self._save()
        self._check_selected()

    def _wanted(self, record: Record) -> bool:
        return self.wanted_key is None or record.key == self.wanted_key

    # -- how far ----------------------------------------------------------------------------------------------------

    def _reached(self) -> dict[Partition, int]:
        lanes = {each: lane.state.position(each) for lane in self.lanes for each in lane.state.partitions}
        return self.reached | lanes

    def _tell_progress(self) -> None:
        reached = self._reached()
        firsts = {each.partition: each.first for each in self.findings.spans}
        done = sum(offset - firsts[each] for each, offset in reached.items())
        self.told.progress("replaying", done, sum(each.length for each in self.findings.spans))

    def _how_far(self) -> str:
        reached = self._reached()
        total = sum(each.length for each in self.findings.spans)
        if not total:
            return self.rebuilding or "before anything was read; nothing was changed"
        firsts = {each.partition: each.first for each in self.findings.spans}
        done = sum(offset - firsts[each] for each, offset in reached.items())
        applied = self.findings.total("applied_now") + self.findings.total("dead_lettered_now")
        changed = f"{applied:,} missing messages were settled, each once" if applied else "nothing was changed"
        more = "; --resume goes on from here" if self.told.save is not None and reached else ""
        return f"after {done:,} of {total:,} offsets; {changed}{more}"

    def _save(self, *, force: bool = False) -> None:
        """Keep the state, now and then, so that an interrupted replay can go on."""
        now = time.monotonic()
        if self.told.save is None or not self._reached() or (not force and now - self.saved_at < _SAVE_SECONDS):
            return
        self.saved_at = now
        self.told.save(self.whole or self._state())

    async def _last_look(self) -> None:
        """Look at the sequences of connections that are about to be closed before the replay has come to its end."""
        if self.told.save is None or self.findings.effects is None or self.has_looked:
            return
        try:
            async with asyncio.timeout(_LAST_LOOK_SECONDS):
                for lane in self.lanes:
                    if lane.proof is not None:
                        await lane.proof.rollback()
                        self.blind = self.blind or not lane.proof.is_usable
                await self._look_at_sequences()
        except (Exception, asyncio.CancelledError):
            self.blind = True

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "conditions": self.conditions,
            "reached": [[*each, offset] for each, offset in self._reached().items()],
            "counted": [[*each, offset] for each, offset in (self.counted_before | self.counted).items()],
            "positions": [[*each, offset] for each, offset in self.findings.positions.items()],
            "findings": self.findings.as_state(),
            "letters_before": self.letters_before,
            "offset_ids": sorted(self.offset_ids),
            "blind": self.blind or not self.has_looked,
            "republished": self.findings.republished,
            **resume.witness_state(self.witness),
        }

    def _refuse_changed(self, state: dict[str, Any], session: Session) -> None:
        """Raise Misconfigured where the App, its handlers or the database are not as they were."""
        resume.refuse_changed(state.get("conditions"), self.conditions)
        if lineage(str(state.get("epoch"))) != lineage(session.epoch):
            raise Misconfigured(
                "--resume: PostgreSQL is another one since, or went back in time; run it without --resume"
            )

    async def _go_on_from(self, state: dict[str, Any], source: KafkaConsumer) -> None:
        resume.refuse_changed(state["conditions"], self.conditions)
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise Misconfigured("--resume: the state that was kept cannot be read; run it without --resume") from None
        await resume.refuse_shorter_logs(source, self.findings.spans, self.reached)

    def _restore(self, state: dict[str, Any]) -> None:
        before = self.findings
        self.findings = self.witness.findings = Findings.from_state(state["findings"])
        self.findings.notes = [*before.notes, "resumed after an interruption"]
        self.findings.recoded = before.recoded
        self.findings.positions = _by_partition(state["positions"])
        self.reached = _by_partition(state["reached"])
        self.counted_before = _by_partition(state["counted"])
        self.letters_before = state["letters_before"]
        self.offset_ids = set(state["offset_ids"])
        self.blind = state["blind"]
        self.findings.republished = state["republished"]
        resume.restore_witness(self.witness, state)


def _choose(app: App, topics: Sequence[str], options: Options) -> list[Handler]:
    """The handlers to replay for. Raises Misconfigured for a name or a topic that does not fit."""
    if not topics:
        raise Misconfigured(f"name at least one topic of {app.name!r} (it has: {', '.join(app.topics)})")
    for topic in topics:
        if topic not in app.topics and options.mode != "republish":
            raise UnknownName(f"{app.name!r} has no handler of topic {topic!r}; {suggestion(topic, app.topics)}")
    for name in options.handlers:
        handler = app.handlers.get(name)
        if handler is None:
            raise UnknownName(f"{app.name!r} has no handler {name!r}; {suggestion(name, app.handlers)}")
        if not handler.idempotent:
            raise Misconfigured(
                f"handler {name!r} is not idempotent (idempotent=False): it keeps no ledger row, so there is nothing to verify"
            )
        if not set(topics) & set(handler.topics):
            raise Misconfigured(
                f"handler {name!r} does not take {', '.join(topics)} (it takes: {', '.join(handler.topics)})"
            )
    chosen = [
        each
        for each in app.handlers.values()
        if each.idempotent
        and set(topics) & set(each.topics)
        and (not options.handlers or each.name in options.handlers)
    ]
    for topic in topics:
        if options.mode != "republish" and not any(topic in each.topics for each in chosen):
            only = f" of {', '.join(options.handlers)}" if options.handlers else ""
            raise Misconfigured(
                f"no handler{only} that keeps a ledger row takes topic {topic!r}: all are idempotent=False, so there is nothing to verify"
                if not options.handlers
                else f"no handler{only} takes topic {topic!r}"
            )
    return chosen


def _by_partition(rows: Sequence[Sequence[Any]]) -> dict[Partition, int]:
    return {Partition(topic, number): offset for topic, number, offset in rows}


def _shown(key: str | bytes) -> str:
    return key if isinstance(key, str) else key.decode("utf-8", "backslashreplace")


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure of a group of tasks: the others were cancelled because of it."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
