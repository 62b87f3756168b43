"""The framework's side: settles a case's messages like a worker, without Kafka.

The case becomes an App. Drives `consumer.testing.simulated_worker.SimulatedWorker`, which the project keeps in step
with its worker. Records in which order the final calls of the handlers began and ended, and what was sent to
PostgreSQL.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from consumer import App, Message, Reject, Retry, Tx
from consumer.core.handler import Handler as Registered
from consumer.postgres.session import Session
from consumer.settings import load
from consumer.testing.messages import Sent, record_of
from consumer.testing.simulated_worker import Round, SimulatedWorker
from oracle.case import Case, Defer, Handler, Publish
from oracle.case import Message as CaseMessage
from oracle.handlers import run, run_batch

Place = tuple[int, int]  # handler, message, by their numbers in the case
HAS_SET_LOCAL = hasattr(Tx, "set_local")
_numbers = itertools.count()


@dataclass
class Sighting:
    """What was seen of a message at a handler.

    Its outcome and cause, and when its last call began and ended.
    """

    outcome: str
    cause: str
    error: str
    exception: BaseException | None
    began: int = -1
    ended: int = -1
    calls: int = 0


@dataclass
class Seen:
    """What was seen of a run.

    app: its name. batches: the deliveries of each, in order. rewritten: executions of statements that the framework wrote.
    """

    app: str = ""
    places: dict[Place, Sighting] = field(default_factory=dict)
    batches: list[list[Place]] = field(default_factory=list)
    executions: int = 0
    rewritten: int = 0
    rows_rewritten: int = 0
    texts: set[str] = field(default_factory=set)


class NoWatch:
    """In place of consumer.testing's Watch: nothing is looked at between two calls."""

    def own(self, connection: Any) -> None: ...

    def around(self, handler: Registered) -> Any:
        return handler.call

    async def look(self, call: Any) -> None: ...

    async def start(self) -> None: ...

    async def committing(self, transaction: Any, written: Any) -> None: ...

    def committed(self) -> None: ...

    async def end(self) -> None: ...


class OracleLife(SimulatedWorker):
    """A worker's life that notes its batches and its statements."""

    seen: Seen
    index: Mapping[tuple[int, int], int]

    async def _open(self) -> None:
        session: Any = await Session.open(self._settings)
        session.rows = {}
        session.connection.add_query_logger(self._note)
        self._session = session

    def _note(self, query: Any) -> None:
        text, seen = query.query, self.seen
        if "consumer." in text or "typeinfo_tree" in text or not re.search(r"\b[tlvs][0-9]\b", text):
            return
        seen.executions += 1
        if text not in seen.texts and query.args and isinstance(query.args[0], list | tuple):
            seen.rewritten += 1
            seen.rows_rewritten += len(query.args[0])

    async def _settle(self, batch: Any, now: float) -> None:
        places = [
            (int(delivery.handler.name[1:]), self.index[delivery.record.partition, delivery.record.offset])
            for delivery in batch.deliveries
        ]
        self.seen.batches.append(places)
        await super()._settle(batch, now)


def _app(case: Case, name: str, topic: str, index: Mapping[tuple[int, int], int], seen: Seen) -> App:
    app = App(name, publishes=sorted({step.topic for step in case.steps() if isinstance(step, Publish)}))
    ticks = itertools.count()

    def register(number: int, handler: Handler) -> None:
        def begin(messages: Sequence[Message[bytes]]) -> list[CaseMessage]:
            places = [index[message.partition, message.offset] for message in messages]
            for place in places:
                sighting = seen.places[number, place]
                sighting.began, sighting.calls = next(ticks), sighting.calls + 1
            return [case.messages[place] for place in places]

        def end(messages: Sequence[Message[bytes]]) -> None:
            for message in messages:
                seen.places[number, index[message.partition, message.offset]].ended = next(ticks)

        async def one(message: Message[bytes], tx: Tx) -> None:
            [message_case] = begin([message])
            await run(handler.steps, tx, dict(message_case.fields), Reject)
            end([message])

        async def many(messages: list[Message[bytes]], tx: Tx) -> None:
            await run_batch(handler, begin(messages), tx, Reject, messages)
            end(messages)

        options: dict[str, Any] = {"retry": Retry(attempts=1), "order": handler.order}
        if handler.batch is not None:
            options["batch"] = handler.batch
        elif handler.concurrency > 1:
            options["concurrency"] = handler.concurrency
        app.handler(topic, name=f"h{number}", **options)(one if handler.batch is None else many)

    for number, handler in enumerate(case.handlers):
        register(number, handler)
    return app


async def settle(dsn: str, case: Case, timeout_seconds: float = 60) -> Seen:
    """Settle the messages of a case.

    Raises errors that are no message's fault: those are faults of the framework.
    """
    number = next(_numbers)
    topic = f"oracle-{number}"
    seen = Seen(f"oracle-{number}", texts={step.sql for step in case.steps() if hasattr(step, "sql")})
    records, index = [], {}
    ends: dict[int, int] = {}
    for place, message in enumerate(case.messages):
        payload = message.id if message.payload is None else message.payload
        sent = Sent(topic, str(payload).encode(), id=f"m{message.id}", key=message.key, partition=message.partition)
        offset = ends.get(message.partition, 0)
        ends[message.partition] = offset + 1
        index[message.partition, offset] = place
        records.append((sent, record_of(sent, offset)))
        for handler in range(len(case.handlers)):
            seen.places[handler, place] = Sighting("not delivered", "", "", None)
    app = _app(case, seen.app, topic, index, seen)
    for registered in app.handlers.values():
        registered.bind({})
    settings = load(postgres_dsn=dsn, postgres_pooler=False, postgres_lock_timeout_seconds=5.0)
    round_seen = Round("oracle")
    life = OracleLife(app, settings, round_seen, records, None, set(), NoWatch())  # type: ignore[arg-type]
    life.seen, life.index = seen, index
    async with asyncio.timeout(timeout_seconds):
        await life.run(case.batch, True)
    place_of = {id(sent): place for place, (sent, _) in enumerate(records)}
    for delivered in round_seen.delivered:
        sighting = seen.places[int(delivered.handler[1:]), place_of[id(delivered.message)]]
        sighting.outcome, sighting.cause = delivered.outcome, delivered.cause
        sighting.error, sighting.exception = delivered.error, delivered.exception
    return seen


def deferred(case: Case) -> int:
    """How many writes the messages of a case defer, about."""
    return len(case.messages) * sum(isinstance(step, Defer) for step in case.steps())
