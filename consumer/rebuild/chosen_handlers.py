"""Chooses the handlers that a rebuild runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from consumer.app import App
from consumer.core.delivery import Delivery
from consumer.core.errors import Misconfigured, Reject
from consumer.core.handler import Call, Handler
from consumer.core.message import Partition
from consumer.core.retry import Retry
from consumer.core.suggestions import suggestion
from consumer.rebuild.absent_rows import Statement, sent_statements
from consumer.rebuild.compare import Excuse
from consumer.rebuild.state import RebuildState
from consumer.rebuild.statement_guard import TEXTS_MAX, current_handler

_UNLIMITED = Retry(attempts=1 << 31, base=0, cap=0)  # SinglePass._retry_failed decides when to give up


def choose_handlers(
    app: App, partitions: Sequence[Partition], wanted: Sequence[str] | None, state: RebuildState
) -> tuple[list[Handler], list[str]]:
    """Return the handlers to run, and notes about the others.

    The handlers are copies whose calls are observed. wanted: names, None or empty for all. Raises Misconfigured for a name that
    no handler has, for a handler of none of the topics, and when none is left.
    """
    topics = {partition.topic for partition in partitions}
    for name in wanted or ():
        if name not in app.handlers:
            raise Misconfigured(f"App {app.name!r}: no handler {name!r}; {suggestion(name, app.handlers)}")
        if not topics & set(app.handlers[name].topics):
            raise Misconfigured(f"handler {name!r}: takes none of the topics {', '.join(sorted(topics))}; leave it out")
    candidates = [
        handler
        for handler in app.handlers.values()
        if topics & set(handler.topics) and (not wanted or handler.name in wanted)
    ]
    chosen = [handler for handler in candidates if handler.idempotent]
    if not chosen:
        raise Misconfigured(f"topics: no handler with a ledger takes {', '.join(sorted(topics)) or 'any'}; name others")
    notes: list[str] = [
        f"handler {handler.name} opted out of the ledger and was left out"
        for handler in candidates
        if not handler.idempotent
    ]
    others = [handler.name for handler in app.handlers.values() if handler.idempotent and handler not in chosen]
    if others:
        notes.append(Excuse(f"not run: {', '.join(others)}; what they wrote to the same tables is extra here"))
    for handler in chosen:
        if left := sorted(set(handler.topics) - topics):
            text = f"handler {handler.name} also takes {', '.join(left)}: not replayed, so those rows are extra here"
            notes.append(Excuse(text))
    copies = [
        dataclasses.replace(handler, retry=_UNLIMITED, call=_observed(handler.name, handler.call, state))
        for handler in chosen
        if handler.call is not None
    ]
    return copies, notes


class EarlyReject(Exception):
    """The handler raised Reject, perhaps only because of the order here.

    Partitions and topics have no order between them, so a later attempt may succeed.
    """


def _observed(name: str, call: Call, state: RebuildState) -> Call:
    """Wrap a handler's call, to note its statements.

    They name the handler when a statement is refused, and say which rows its updates look for.
    """
    owners, writers = state.sql_owners, state.writers

    async def observed(value: Any, message: Any, tx: Any) -> object:
        noted: list[Statement] = []
        token, sent = current_handler.set(name), sent_statements.set(noted)
        try:
            result = await call(value, message, tx)
            if state.absent is not None:
                id = tx.subject.id if isinstance(tx.subject, Delivery) else None
                state.absent.note([*noted, *tx.writes] if noted else tx.writes, name, id)
            return result
        except Reject as error:
            raise EarlyReject from error
        finally:
            current_handler.reset(token)
            sent_statements.reset(sent)
            for sql, _ in tx.writes:
                writers.add(name)
                if sql not in owners:
                    if len(owners) >= TEXTS_MAX:
                        owners.clear()
                    owners[sql] = name

    return observed
