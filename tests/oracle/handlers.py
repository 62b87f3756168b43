"""Runs a handler's steps on anything with the methods of Tx.

On the framework's, or on the plain one of serial.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from oracle.case import (
    Boom,
    Copy,
    Defer,
    Execute,
    FetchVal,
    Gather,
    Handler,
    IfNone,
    Many,
    Message,
    Publish,
    Savepoint,
    SetLocal,
    Step,
    Wait,
)


class Oops(Exception):
    """What a handler raises by itself."""


async def run(
    steps: Sequence[Step], tx: Any, fields: dict[str, Any], reject: type[Exception], cause: object = None
) -> None:
    """Run the steps for one message.

    fields: of the message; variables are added. reject: what a refused message raises. cause: the argument of a batch
    handler that the message is.
    """
    for step in steps:
        match step:
            case Defer(sql, args):
                tx.defer(sql, *_values(args, fields))
            case Execute(sql, args):
                await tx.execute(sql, *_values(args, fields))
            case FetchVal(variable, sql, args):
                fields[variable] = await tx.fetchval(sql, *_values(args, fields))
            case Many(sql, rows):
                await tx.executemany(sql, [_values(row, fields) for row in rows])
            case Copy(table, columns, rows):
                records = [_values(row, fields) for row in rows]
                await tx.copy_records_to_table(table, columns=list(columns), records=records)
            case Savepoint(inner, fails):
                try:
                    async with tx.savepoint():
                        await run(inner, tx, fields, reject, cause)
                        if fails:
                            raise Oops("inside a savepoint")
                except Exception as error:
                    if type(error).__module__.startswith("consumer"):
                        raise
            case IfNone(variable, inner, otherwise):
                await run(inner if fields.get(variable) is None else otherwise, tx, fields, reject, cause)
            case Boom():
                if fields.get("boom") == "raise":
                    raise Oops("as its message says")
                if fields.get("boom") == "reject":
                    raise reject("as its message says")
            case Wait(turns):
                for _ in range(turns):
                    await asyncio.sleep(0)
            case Gather(inner):
                async with asyncio.TaskGroup() as group:
                    for step in inner:
                        group.create_task(run([step], tx, fields, reject, cause))
            case Publish(topic, args, key):
                text = [str(value) for value in _values(args, fields)]
                tx.publish(topic, text, key=str(fields.get(key)) if key else None, cause=cause)
            case SetLocal(name, arg):
                await tx.set_local(name, *_values((arg,), fields))


async def run_batch(
    handler: Handler, messages: Sequence[Message], tx: Any, reject: type[Exception], causes: Sequence[object]
) -> None:
    """Run one call of a batch handler.

    causes: its arguments, one for each message.
    """
    if handler.many:
        [step] = handler.steps
        assert isinstance(step, Execute)
        await tx.executemany(step.sql, [_values(step.args, message.fields) for message in messages])
        return
    for message, cause in zip(messages, causes, strict=True):
        await run(handler.steps, tx, dict(message.fields), reject, cause)


def _values(args: Sequence[str], fields: dict[str, Any]) -> list[Any]:
    values = []
    for text in args:
        first, *rest = (fields.get(name) for name in text.split("+"))
        for argument in rest:
            first = None if first is None or argument is None else first + argument
        values.append(first)
    return values
