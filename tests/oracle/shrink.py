"""Makes a failing case small, as long as it still fails.

Fewer messages, steps, tables, columns, constraints and fields.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from oracle.case import (
    Case,
    Defer,
    Execute,
    Gather,
    Handler,
    IfNone,
    Savepoint,
    Step,
    Table,
    arguments_of,
    walk,
)

Fails = Callable[[Case], Awaitable[bool]]


async def shrink(case: Case, fails: Fails, seconds: float) -> Case:
    """The smallest case within that time.

    fails: whether a case still shows the fault.
    """
    until = time.monotonic() + seconds
    passes = (_fewer_messages, _simpler_handlers, _fewer_tables, _smaller_tables, _simpler_messages)
    tried = {repr(case)}  # two passes could otherwise undo each other for ever
    changed = True
    while changed and time.monotonic() < until:
        changed = False
        for simpler in passes:
            # Tried from the smaller case on, after every success.
            progress = True
            while progress and time.monotonic() < until:
                progress = False
                for candidate in simpler(case):
                    if time.monotonic() >= until:
                        break
                    if repr(candidate) in tried:
                        continue
                    tried.add(repr(candidate))
                    if await fails(candidate):
                        case, progress, changed = candidate, True, True
                        break
    return _without_unused(case)


def _without(items: Sequence[Any], start: int, count: int = 1) -> tuple[Any, ...]:
    return (*items[:start], *items[start + count :])


def _fewer_messages(case: Case) -> Iterator[Case]:
    size = len(case.messages) // 2
    while size:
        for start in range(0, len(case.messages), size):
            if len(case.messages) > size:
                yield replace(case, messages=_without(case.messages, start, size))
        size //= 2


def _simpler_handlers(case: Case) -> Iterator[Case]:
    for number, handler in enumerate(case.handlers):
        if len(case.handlers) > 1:
            yield replace(case, handlers=_without(case.handlers, number))
        for simpler in _simpler_handler(handler):
            yield replace(case, handlers=(*case.handlers[:number], simpler, *case.handlers[number + 1 :]))


def _simpler_handler(handler: Handler) -> Iterator[Handler]:
    if handler.batch is not None:
        yield replace(handler, batch=None, many=False)
    if handler.concurrency > 1:
        yield replace(handler, concurrency=1)
    if handler.order != "key":
        yield replace(handler, order="key")
    for steps in _simpler_steps(handler.steps):
        if steps:
            yield replace(handler, steps=steps, many=False)


def _simpler_steps(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    for number, step in enumerate(steps):
        yield _without(steps, number)
        others: list[tuple[Step, ...]] = []
        match step:
            case Savepoint(inner):
                others = [inner, *((replace(step, steps=simpler),) for simpler in _simpler_steps(inner))]
            case Gather(inner):
                others = [inner, *((replace(step, steps=simpler),) for simpler in _simpler_steps(inner) if simpler)]
            case IfNone(_, inner, otherwise):
                others = [inner, otherwise]
                others += [(replace(step, steps=simpler),) for simpler in _simpler_steps(inner)]
                others += [(replace(step, otherwise=simpler),) for simpler in _simpler_steps(otherwise)]
            case Execute(sql, args):
                others = [(Defer(sql, args),)]
        for simpler in others:
            yield (*steps[:number], *simpler, *steps[number + 1 :])


def _fewer_tables(case: Case) -> Iterator[Case]:
    for number in range(len(case.tables)):
        yield replace(case, tables=_without(case.tables, number))
    for number in range(len(case.ddl)):
        yield replace(case, ddl=_without(case.ddl, number))


def _smaller_tables(case: Case) -> Iterator[Case]:
    for number, table in enumerate(case.tables):
        for smaller in _smaller_table(table):
            yield replace(case, tables=(*case.tables[:number], smaller, *case.tables[number + 1 :]))


def _smaller_table(table: Table) -> Iterator[Table]:
    for number in reversed(range(len(table.columns))):
        yield replace(table, columns=_without(table.columns, number))
    for count in (2, 1):
        for number in range(len(table.extras) - count + 1):
            yield replace(table, extras=_without(table.extras, number, count))
    for number in range(len(table.before)):
        yield replace(table, before=_without(table.before, number))
    if table.options:
        yield replace(table, options="", extras=tuple(extra for extra in table.extras if "partition of" not in extra))
    for number, column in enumerate(table.columns):
        for word in (" deferrable initially deferred", " default 0", " default ''", " on delete cascade", " primary key", " unique", " not null"):  # fmt: skip
            if word in column:
                shorter = column.replace(word, "")
                yield replace(table, columns=(*table.columns[:number], shorter, *table.columns[number + 1 :]))


def _simpler_messages(case: Case) -> Iterator[Case]:
    if case.batch != 60:
        yield replace(case, batch=60)
    lean = _without_unused(case)
    if lean != case:
        yield lean
    yield replace(
        case, messages=tuple(replace(message, key="k", partition=0) for message in case.messages if message.key != "k")
    )
    ways: list[tuple[str, Any]] = [("key", "k"), ("key", None), ("partition", 0), ("payload", None)]
    for name, value in ways:
        if any(getattr(message, name) != value for message in case.messages):
            yield replace(case, messages=tuple(replace(message, **{name: value}) for message in case.messages))
    ids = tuple(replace(message, id=number + 1) for number, message in enumerate(case.messages))
    if any(message.id != number + 1 for number, message in enumerate(case.messages)):
        yield replace(case, messages=ids)
    for name in {name for message in case.messages for name in message.fields} - {"boom"}:
        values = list(dict.fromkeys(repr(message.fields.get(name)) for message in case.messages))
        if len(values) > 1:
            yield _with_field(case, name, case.messages[0].fields.get(name))
        if len(values) > 1 and all(isinstance(message.fields.get(name), int) for message in case.messages):
            yield _with_field(case, name, 1)


def _with_field(case: Case, name: str, value: object) -> Case:
    return replace(
        case,
        messages=tuple(replace(message, fields={**message.fields, name: value}) for message in case.messages),
    )


def _without_unused(case: Case) -> Case:
    """The case without fields that no step names."""
    used = {name for step in case.steps() for name in arguments_of(step)} | {"boom"}
    used |= {step.variable for handler in case.handlers for step in walk(handler.steps) if isinstance(step, IfNone)}
    if all(used.issuperset(message.fields) for message in case.messages):
        return case
    return replace(
        case,
        messages=tuple(
            replace(message, fields={name: value for name, value in message.fields.items() if name in used})
            for message in case.messages
        ),
    )
