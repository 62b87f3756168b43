"""The handlers that a rebuild runs, and the notes about those that it leaves out."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from consumer.app import App
from consumer.core.delivery import Delivery
from consumer.core.errors import Misconfigured, Reject
from consumer.core.handler import Call, Handler
from consumer.core.message import Partition
from consumer.core.retry import Retry
from consumer.rebuild.absent_rows import Statement, statements
from consumer.rebuild.compare import Excuse
from consumer.rebuild.state import RebuildState
from consumer.rebuild.statement_guard import TEXTS_MAX, calling

_FOR_EVER = Retry(attempts=1 << 31, base=0, cap=0)  # as long as it helps: see SinglePass._once_more


def choose_handlers(
    app: App, partitions: Sequence[Partition], wanted: Sequence[str] | None, state: RebuildState
) -> tuple[list[Handler], list[str]]:
    """The handlers to run, as copies, and what there is to say about the others."""
    topics = {each.topic for each in partitions}
    for name in wanted or ():
        if name not in app.handlers:
            near = difflib.get_close_matches(name, app.handlers, 1)
            raise Misconfigured(
                f"App {app.name!r} has no handler {name!r}"
                + (f", did you mean {near[0]!r}?" if near else "")
                + f" (it has: {', '.join(app.handlers)})"
            )
        if not topics & set(app.handlers[name].topics):
            raise Misconfigured(f"handler {name!r} takes none of the topics {', '.join(sorted(topics))}")
    named = [
        each for each in app.handlers.values() if topics & set(each.topics) and (not wanted or each.name in wanted)
    ]
    chosen = [each for each in named if each.idempotent]
    if not chosen:
        raise Misconfigured(
            f"no handler with a ledger takes {', '.join(sorted(topics)) or 'anything'}: nothing to rebuild"
        )
    notes: list[str] = [
        f"handler {each.name} opted out of the ledger and was left out" for each in named if not each.idempotent
    ]
    others = [each.name for each in app.handlers.values() if each.idempotent and each not in chosen]
    if others:
        notes.append(Excuse(f"not run: {', '.join(others)}; what they wrote to the same tables is extra here"))
    for each in chosen:
        if left := sorted(set(each.topics) - topics):
            text = f"handler {each.name} also takes {', '.join(left)}: not replayed, so those rows are extra here"
            notes.append(Excuse(text))
    copies = [
        dataclasses.replace(each, retry=_FOR_EVER, call=_named(each.name, each.call, state))
        for each in chosen
        if each.call is not None
    ]
    return copies, notes


class EarlyReject(Exception):
    """The handler raised Reject. It may only be early here: partitions and topics have no order between them."""


def _named(name: str, call: Call, state: RebuildState) -> Call:
    """A handler's call that tells whose SQL it is, for the sentence that refuses it, and what its updates look for."""
    owners, writers = state.owners, state.writers

    async def named(value: Any, message: Any, tx: Any) -> object:
        noted: list[Statement] = []
        token, sent = calling.set(name), statements.set(noted)
        try:
            result = await call(value, message, tx)
            if state.absent is not None:
                id = tx.subject.id if isinstance(tx.subject, Delivery) else None
                state.absent.note([*noted, *tx.writes] if noted else tx.writes, name, id)
            return result
        except Reject as error:
            raise EarlyReject from error
        finally:
            calling.reset(token)
            statements.reset(sent)
            for sql, _ in tx.writes:
                writers.add(name)
                if sql not in owners:
                    if len(owners) >= TEXTS_MAX:
                        owners.clear()
                    owners[sql] = name

    return named
