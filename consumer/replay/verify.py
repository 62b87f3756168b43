"""Replay: read topics again, and prove that nothing happens twice.

`consumer replay` and `verify` call this file. Imports the rest of the package. A check calls no handler. With
call_handlers, handlers of missing messages run in transactions that are rolled back, and may not connect anywhere
(transaction/dry_run_guard.py).

Limitations: it does not know whether an effect outside PostgreSQL happened, nor whether the state itself is right
(rebuild/rebuild.py compares that), nor what was applied before the ledger began (it says so).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any

from consumer.app import App
from consumer.app_loader import running
from consumer.core.errors import Misconfigured
from consumer.kafka.consumer import KafkaConsumer
from consumer.replay.dry_handlers import with_dry_handlers
from consumer.replay.engine import Engine
from consumer.replay.findings import Findings
from consumer.replay.options import Limits, Options, Progress, validate
from consumer.replay.outgoing_run import OutgoingOptions, run_outgoing
from consumer.replay.rebuild_run import RebuildOptions, run_rebuild
from consumer.replay.run import Run
from consumer.replay.selection import refuse_shards
from consumer.settings import Settings, load


async def replay(
    app: App,
    settings: Settings,
    topics: Sequence[str],
    options: Options,
    progress: Progress,
    resumed: dict[str, Any] | None = None,
    source: KafkaConsumer | None = None,
    *,
    limits: Limits | None = None,
    alone: bool = False,
) -> Findings:
    """Replay topics. Enters the App's lifespan where handlers run.

    Args:
        resumed: the state that `progress.save` got from an interrupted replay with the same options.
        source: reads the log; by default a consumer without a group.
        alone: the process does nothing else (dry_run_guard.py).

    Raises Misconfigured for what cannot be replayed, CannotTell when it ended early. Nothing was changed then, but for
    what `apply` had stored, each message once.
    """
    validate(options)
    refuse_shards(app)
    await app.open_registry(settings)
    run = Run(app, settings, list(dict.fromkeys(topics)), options, progress, limits or Limits())
    engine = Engine(run, resumed)
    work = partial(engine.run, source or KafkaConsumer(settings, None))
    if options.is_dry_run:
        return await with_dry_handlers(app, work, allow_outside=options.allow_outside, alone=alone)
    if not run.applies:
        return await work()
    async with running(app):
        return await work()


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
    outgoing: bool = False,
    ignore: Sequence[str] = (),
    compare: Sequence[str] = (),
    base: str | None = None,
    assume_unapplied: bool = False,
    call_handlers: bool = False,
    allow_outside: bool = False,
) -> Findings:
    """Read topics again, and find what is missing or would happen twice.

    Args:
        topics: by default all topics of idempotent handlers.
        settings: by default from the environment.
        start, end: "earliest", "latest", "position", an offset, a time (a string is UTC unless it names a zone) or "24h"
            for a day ago. `end` itself is not included.
        apply: apply what is missing, as `consumer replay --apply`.
        rebuild: compare the tables with the topics, as `consumer rebuild`, with ignore, compare and base.
        outgoing: compare what the handlers publish with the output topics, as `consumer replay --outgoing`, with base.
        call_handlers: call the handlers of missing messages too, and roll back what they write.
        allow_outside: let handlers connect elsewhere where rebuild or call_handlers runs them.

    Returns the findings: read `ok`, `verdict()`, `problems()` or `as_dict()`, or call `check()`, which raises an
    AssertionError with the problems. Raises Misconfigured for what cannot be replayed, CannotTell when it ended early.
    """
    if apply + rebuild + outgoing > 1:
        raise Misconfigured("apply, rebuild and outgoing: not together; choose one of them")
    settings = settings or load()
    names = list(topics) or await _idempotent_topics(app, settings)
    options = Options(
        mode="apply" if apply else "check",
        start=_as_text(start),
        end=_as_text(end),
        partitions=(partitions,) if isinstance(partitions, int) else tuple(partitions),
        key=key,
        message_id=message_id,
        handlers=tuple(handlers),
        assume_unapplied=assume_unapplied,
        call_handlers=call_handlers,
        allow_outside=allow_outside,
    )
    if outgoing:
        return await run_outgoing(app, settings, names, _outgoing_options(options, ignore, compare, base), Progress())
    if rebuild:
        return await run_rebuild(app, settings, names, _rebuild_options(options, ignore, compare, base), Progress())
    if ignore or compare or base:
        raise Misconfigured("ignore, compare and base: no effect alone; they go with rebuild=True or outgoing=True")
    return await replay(app, settings, names, options, Progress())


async def _idempotent_topics(app: App, settings: Settings) -> list[str]:
    if app.has_patterns:
        source = KafkaConsumer(settings, None)
        await source.start(settings.wait_seconds)
        try:
            app.discover(await source.log.topics())
        finally:
            await source.stop(5)
    return sorted({topic for handler in app.handlers.values() if handler.idempotent for topic in handler.topics})


def _rebuild_options(
    options: Options, ignore: Sequence[str], compare: Sequence[str], base: str | None
) -> RebuildOptions:
    """Return the options of a rebuild. Raises Misconfigured for others."""
    if options != Options(handlers=options.handlers, allow_outside=options.allow_outside):
        raise Misconfigured(
            "rebuild: it compares the state that all messages up to the position lead to; leave out start, end, partitions, "
            "key, message_id, assume_unapplied and call_handlers"
        )
    return RebuildOptions(
        handlers=options.handlers,
        ignore=tuple(ignore),
        compare=tuple(compare),
        base=base,
        allow_outside=options.allow_outside,
    )


def _outgoing_options(
    options: Options, ignore: Sequence[str], compare: Sequence[str], base: str | None
) -> OutgoingOptions:
    """Return the options of `outgoing`. Raises Misconfigured for others."""
    if options != Options(allow_outside=options.allow_outside) or ignore or compare:
        raise Misconfigured("outgoing: it compares the whole of the topics; only base and allow_outside go with it")
    return OutgoingOptions(base=base, allow_outside=options.allow_outside)


def _as_text(bound: str | int | datetime) -> str:
    return bound.isoformat() if isinstance(bound, datetime) else str(bound)
