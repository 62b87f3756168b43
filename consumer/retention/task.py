"""Drops ledger rows that are no longer needed, by whole generations.

Asks core/retention.py what is due and calls the functions of migrations/0001_schema.sql, each of which is one short
transaction that waits for no other. Any number of processes may do so at the same time: a step names the version of the
ledger that it was decided on, and a second process finds another version. No generation is dropped while the log holds
a record of its time. Limitations: does not see topics of another Kafka cluster whose applications use the same
database; each application declares how long it needs its rows, and the longest time counts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple

from consumer.core.delivery import Delivery
from consumer.core.errors import Misconfigured
from consumer.core.message import Partition
from consumer.core.retention import (
    HOUR,
    Drop,
    Forget,
    LedgerState,
    Policy,
    RotateGeneration,
    Step,
    TopicRetention,
    Wait,
    contradictions,
    due,
    is_time,
    wanted,
    what_is_wrong,
)
from consumer.kafka.admin import topic_configs
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import KafkaError
from consumer.logs import describe, event
from consumer.postgres import effects, generations
from consumer.postgres.connection import connect, database_epoch, translated_errors
from consumer.postgres.errors import Outage, sqlstate_of
from consumer.postgres.handlers import topic_numbers
from consumer.postgres.protocol import Connection
from consumer.retention import settled_dead_letters
from consumer.settings import Settings

ROUND_SECONDS_MAX = 60.0  # between two rounds of the background task
_ERASE_SECONDS = 600.0  # between two looks for dead letters that are to be erased
_PAUSE_SECONDS = (0.05, 1.0)  # between two attempts at a step that would have to wait
_PATIENCE_SECONDS = 30.0  # of such attempts, in one round

_LOCK_NOT_AVAILABLE = "55P03"


class Stopped(NamedTuple):
    """Why `keep_up` ended: the next step, and what delays it."""

    state: LedgerState
    step: Step
    partitions: Sequence[Partition] = ()  # whose logs still hold records of the generation's time
    waits: bool = False  # for other transactions, or for another process that takes a step


def policy_of(settings: Settings, hours: float) -> Policy:
    """The policy of the settings, with rows kept for `hours`."""
    return Policy.of(hours, settings.ledger_generation_hours, settings.ledger_clock_skew_hours)


async def act(connection: Connection, state: LedgerState, step: RotateGeneration | Forget | Drop) -> str:
    """Take a step, and return what was done.

    Returns "busy" or "waiting" if nothing was done.
    """
    try:
        match step:
            case RotateGeneration():
                return await generations.turn(connection, state.version)
            case Forget(number):
                return await generations.forget(connection, state.version, number)
            case Drop(number):
                return await generations.drop(connection, number)
    except Exception as error:
        if sqlstate_of(error) == _LOCK_NOT_AVAILABLE:
            return "waiting"  # a long read of the whole ledger holds its lock
        raise


async def keep_up(
    connection: Connection,
    policy: Policy,
    held: Callable[[float], Awaitable[Sequence[Partition]]],
    on_step: Callable[[str, Step], None],
    patience_seconds: float = _PATIENCE_SECONDS,
) -> Stopped:
    """Take all steps that are due.

    on_step: called with what was done and the step. held: returns the partitions whose logs can still deliver
    a record of that time or from before, in seconds since 1970; if there are any, the generation stays. Limitations:
    other processes may take steps at the same time, and a step that must wait is left after the patience.
    """
    waited, pause = 0.0, _PAUSE_SECONDS[0]
    while True:
        state = await generations.read_state(connection)
        step = due(state, policy)
        match step:
            case Wait():
                return Stopped(state, step)
            case Forget(_, closed_at) if partitions := await held(closed_at):
                return Stopped(state, step, partitions)
            case RotateGeneration() | Forget() | Drop():
                done = await act(connection, state, step)
        if done not in ("busy", "waiting"):
            on_step(done, step)
            waited, pause = 0.0, _PAUSE_SECONDS[0]
            continue
        if waited >= patience_seconds:
            return Stopped(state, step, waits=True)
        await asyncio.sleep(pause)
        waited += pause
        pause = min(_PAUSE_SECONDS[1], pause * 2)


async def reaching(source: KafkaConsumer, topics: Iterable[str], at: float, skew_hours: float) -> list[Partition]:
    """Return partitions whose log holds records of that time or older.

    As far as clocks agree. Topics that do not exist hold none. A log whose timestamps do not grow with the offset is
    judged by its first younger record. Raises KafkaError.
    """
    try:
        partitions = [
            partition for of_topic in (await source.log.partitions(topics)).values() for partition in of_topic
        ]
        if not partitions:
            return []
        firsts = await source.log.beginnings(partitions)
        ends = await source.log.ends(partitions)
        younger = await source.log.offsets_at(partitions, int((at + skew_hours * HOUR) * 1000) + 1)
    except TimeoutError:
        raise KafkaError("no answer in time") from None  # a TimeoutError would be taken for PostgreSQL's
    return [
        partition
        for partition in partitions
        if firsts[partition] < (ends[partition] if (past := younger.get(partition)) is None else past)
    ]


async def logs_of(settings: Settings, topics: Sequence[str]) -> list[TopicRetention]:
    """Return the retention settings of topics; omits missing topics.

    Raises KafkaError.
    """
    retentions = []
    for topic, configs in (await topic_configs(settings, topics)).items():
        if configs is None:
            retentions.append(TopicRetention(topic, None, 0, False, known=False))
            continue
        policies = (configs.get("cleanup.policy") or "delete").split(",")
        hours = int(configs.get("retention.ms") or -1) / 3_600_000
        segment = int(configs.get("segment.ms") or 0) / 3_600_000
        retentions.append(TopicRetention(topic, hours if hours >= 0 else None, segment, "delete" not in policies))
    return retentions


async def check(settings: Settings, topics: Sequence[str]) -> None:
    """Check that the settings fit each other and the topics.

    Raises Misconfigured with the arithmetic; logs a warning for what is doubtful.
    """
    if settings.ledger_retention_hours is None:
        return
    window = settings.precheck_window_hours if settings.redis_url is not None else None
    policy = policy_of(settings, settings.ledger_retention_hours)
    errors, _ = contradictions(policy, window, ())
    if not errors:
        errors, warnings = contradictions(policy, window, await logs_of(settings, topics))
        for warning in warnings:
            event(logging.WARNING, warning)
    if errors:
        raise Misconfigured("; ".join(errors))


class Timestamps:
    """Warns once per topic of timestamps that say nothing about age.

    Only if the ledger does not keep its rows for ever.
    """

    def __init__(self, settings: Settings) -> None:
        self._matters = settings.ledger_retention_hours is not None
        self._seen: set[str] = set()

    def look(self, deliveries: Iterable[Delivery]) -> None:
        """Log the first such record of each topic."""
        if not self._matters:
            return
        for delivery in deliveries:
            record = delivery.record
            if not is_time(record.timestamp) and record.topic not in self._seen:
                self._seen.add(record.topic)
                event(
                    logging.WARNING,
                    f"timestamp of a record cannot be used: {what_is_wrong(record.timestamp)}",
                    topic=record.topic,
                    partition=record.partition,
                    offset=record.offset,
                    do="let the producer send milliseconds since 1970, or set message.timestamp.type=LogAppendTime; until then retention "
                    "judges such records by their offsets: docs/how-to/retention.md",
                )


class Keeper:
    """Declares how long rows are needed, and takes due steps.

    A background task of a worker that never ends by itself. It opens a connection of its own for each round. An error
    is logged once and tried again.
    """

    def __init__(self, settings: Settings, app: str, source: KafkaConsumer, random: Callable[[], float]) -> None:
        self._settings = settings
        self._app = app
        self._source = source
        self._random = random
        self._logged = ""
        self._erase_at = 0.0

    async def run(self) -> None:
        while True:
            try:
                pause = await self._round()
            except (Outage, KafkaError, OSError) as error:  # TimeoutError is an OSError
                self._warn("the ledger is not kept short for now", error=describe(error.__cause__ or error))
                pause = ROUND_SECONDS_MAX / 4
            except Misconfigured as error:
                self._warn(
                    "the ledger is not kept short",
                    error=str(error),
                    do="grant what `consumer migrate --grants ROLE` prints, or let `consumer purge` run as the owner now and then",
                )
                pause = ROUND_SECONDS_MAX
            await asyncio.sleep(pause * (0.5 + self._random() / 2))

    async def _round(self) -> float:
        """Take the steps that are due.

        Returns the seconds until something may be due again.
        """
        settings, own = self._settings, self._settings.ledger_retention_hours
        connection = await connect(settings)
        try:
            with translated_errors(settings):
                await database_epoch(connection, settings)
                await generations.declare(connection, self._app, own)
                await self._erase_settled(connection)
                if own is None:
                    return ROUND_SECONDS_MAX
                hours, longer = wanted(own, await generations.declared(connection, self._app))
                if hours is None:
                    self._warn("nothing of the ledger is dropped: other applications keep theirs for ever", apps=longer)
                    return ROUND_SECONDS_MAX

                async def held(at: float) -> list[Partition]:
                    topics = sorted(await topic_numbers(connection))  # a round may be long, and topics may be new
                    return await reaching(self._source, topics, at, settings.ledger_clock_skew_hours)

                stopped = await keep_up(connection, policy_of(settings, hours), held, self._done)
                await effects.forget(connection)
        finally:
            connection.terminate()
        if stopped.partitions:
            first = stopped.partitions[0]
            self._warn(
                "nothing of the ledger is dropped: a log still holds records of that time",
                topic=first.topic,
                partition=first.partition,
                partitions=len(stopped.partitions),
            )
        elif not stopped.waits:
            self._logged = ""
        return min(ROUND_SECONDS_MAX, stopped.step.seconds) if isinstance(stopped.step, Wait) else ROUND_SECONDS_MAX

    async def _erase_settled(self, connection: Connection) -> None:
        """Erase dead letters that were settled long ago.

        Rarely, since it reads the whole table.
        """
        hours, now = self._settings.dead_letter_retention_hours, time.monotonic()
        if hours is None or now < self._erase_at:
            return
        erased = await settled_dead_letters.erase(connection, self._app, hours)
        self._erase_at = now + _ERASE_SECONDS
        if erased:
            event(logging.INFO, "settled dead letters are erased", count=erased)

    def _done(self, what: str, step: Step) -> None:
        number = getattr(step, "number", None)
        event(logging.INFO, f"ledger {what}", **({} if number is None else {"generation": number}))

    def _warn(self, what: str, **fields: Any) -> None:
        if what + str(fields) != self._logged:
            self._logged = what + str(fields)
            event(logging.WARNING, what, **fields)
