"""Change the position of one partition in one database. Running workers notice."""

from __future__ import annotations

import secrets

from consumer.app import App
from consumer.core.log_identity import ObservedLog, PartitionHalt, Position, check_log
from consumer.core.message import Partition
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.protocol import Identity
from consumer.postgres import dead_letters as dead_letters_table
from consumer.postgres import handler_history, positions
from consumer.postgres.positions import read_positions
from consumer.postgres.protocol import Connection


async def move_position(connection: Connection, app: str, partition: Partition, offset: int) -> int | None:
    """Set the position of a partition; return the previous one.

    Ids stay in the ledger, so moving back applies nothing twice. Moving forward skips the messages in between for good.
    """
    async with connection.transaction():
        before = await positions.lock(connection, app, partition)
        await positions.move(connection, app, partition, offset)
        await handler_history.move_coverage_back(connection, app, partition, offset)
    return before


async def adopt_log(
    connection: Connection, source: KafkaConsumer, app: App, partition: Partition, identity: Identity, first: int
) -> PartitionHalt | None:
    """Begin the present log, if the position is of another one.

    Returns why the partition had stopped. None: the position is of this log, and nothing was changed.

    Ids stay in the ledger, so a message that was applied is not applied again. Exception: ids that are made from offsets,
    because the same offset is another message now. identity, first: of the present log; if its beginning moves meanwhile,
    the partition stops for that. Raises KafkaError.
    """
    topic_id = identity.topics.get(partition.topic)
    async with connection.transaction():
        await positions.lock(connection, app.name, partition)
        at = (await read_positions(connection, app.name, [partition])).get(partition)
        if at is None:
            return None
        log = ObservedLog(identity.cluster_id, topic_id, first)
        stop = check_log(partition, at, log)
        if stop is None:
            stop = check_log(partition, at, await _ask_leader(source, partition, at, log))
        if stop is None or not stop.do.endswith("--adopt"):
            return None
        salt = topic_id.bytes if topic_id is not None else secrets.token_bytes(16)
        await positions.restart(connection, app.name, partition, first, identity.cluster_id, topic_id, salt)
        await handler_history.forget_partition(connection, app.name, partition)
        await dead_letters_table.forget_attempts_in(connection, app.name, partition)
    return stop


async def _ask_leader(source: KafkaConsumer, partition: Partition, at: Position, log: ObservedLog) -> ObservedLog:
    """Add what only the partition's leader knows. Raises KafkaError."""
    peek = await source.log.peek(partition, at.offset)
    log = log._replace(end=peek.end if peek.end >= 0 else None, out_of_range=peek.out_of_range)
    if at.seen is not None:
        log = log._replace(at_seen=await source.log.fingerprint_at(partition, at.seen.offset))
    return log
