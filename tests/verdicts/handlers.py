"""The App of a case.

Its handlers run the steps of their message, record each call, and may be sabotaged while a case settles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import uuid4

from oracle.case import IfNone, Step
from oracle.handlers import run as run_plain

from consumer import App, Message, Reject, Retry, RunAgain, Tx
from verdicts.case import Again, Case, Draw, Fault, Handler, When


class NotYet(Exception):
    """Raised on plain asyncpg where a handler asks to run again."""


class Place(NamedTuple):
    """A delivery: of a record, to a handler."""

    handler: str
    topic: str
    partition: int
    offset: int


class Call(NamedTuple):
    """A call of a handler: its payload, record's time, and number."""

    turn: int
    payload: int
    timestamp: int


async def run(
    steps: tuple[Step, ...], tx: Any, fields: dict[str, Any], reject: type[Exception], again: type[Exception]
) -> None:
    """Run the steps for one message on anything with Tx's methods."""
    for step in steps:
        match step:
            case When(name, value, inner):
                if fields.get(name) == value:
                    await run(inner, tx, fields, reject, again)
            case IfNone(variable, inner, otherwise):
                await run(inner if fields.get(variable) is None else otherwise, tx, fields, reject, again)
            case Again(variable):
                if fields.get(variable) is None:
                    raise again("what it needs is not there yet")
            case Draw(variable):
                fields[variable] = str(uuid4())
            case _:
                await run_plain([step], tx, fields, reject)


@dataclass
class Life:
    """What the handlers of a case do at the moment.

    calls: the last one of each delivery. healed: nothing fails any more.
    """

    case: Case
    fault: Fault = field(default_factory=Fault)
    healed: bool = False
    calls: dict[Place, Call] = field(default_factory=dict)
    turn: int = 0

    def fields(self, payload: int, timestamp: int) -> dict[str, Any]:
        """What a handler reads of a message."""
        fields = {**self.case.payloads[payload], "ts": timestamp}
        return {**fields, "boom": ""} if self.healed else fields

    def effects(self, payload: int, timestamp: int) -> list[dict[str, Any]]:
        """The fields for which a handler runs its steps.

        Once those of its message, unless it is sabotaged.
        """
        fault = self.fault
        fields = self.fields(payload, timestamp)
        if payload not in (fault.payload, fault.other):
            return [fields]
        mine = payload == fault.payload
        match fault.kind:
            case "effect_lost" if mine:
                return []
            case "effect_doubled" if mine:
                return [fields, dict(fields)]
            case "effect_altered" if mine:
                return [{**fields, "n": fields["n"] + 50}]
            case "effect_foreign" if mine:
                return [fields, {**self.fields(fault.other, timestamp), "boom": ""}]
            case "effects_swapped" if fault.payload != fault.other:
                return [self.fields(fault.other if mine else fault.payload, timestamp)]
        return [fields]

    async def call(self, handler: Handler, message: Message[dict[str, Any]], tx: Tx) -> None:
        """Run a handler for one message."""
        self.turn += 1
        payload = message.value["m"]
        place = Place(handler.name, message.topic, message.partition, message.offset)
        self.calls[place] = Call(self.turn, payload, message.timestamp)
        for fields in self.effects(payload, message.timestamp):
            await run(handler.steps, tx, fields, Reject, RunAgain)


def app_of(life: Life, name: str, topics: list[str]) -> App:
    """An App with the handlers of a case, controlled by its life."""
    app = App(name)
    for handler in life.case.handlers:
        _register(app, life, handler, topics[handler.topic])
    return app


def _register(app: App, life: Life, handler: Handler, topic: str) -> None:
    retry = Retry(attempts=handler.attempts, base=0.01, cap=0.02)
    options: dict[str, Any] = {"name": handler.name, "order": handler.order, "retry": retry}
    if handler.batch is None:

        @app.handler(topic, **options)
        async def one(message: Message[dict[str, Any]], tx: Tx) -> None:
            await life.call(handler, message, tx)

    else:

        @app.handler(topic, batch=handler.batch, **options)
        async def many(messages: list[Message[dict[str, Any]]], tx: Tx) -> None:
            for message in messages:
                await life.call(handler, message, tx)
