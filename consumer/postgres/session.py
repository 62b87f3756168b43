"""A worker's connection: verified COMMITs, and what a batch stores.

BEGIN and COMMIT are plain statements and their command tags are read, because a driver's transaction object hides a COMMIT
that the server answered with ROLLBACK (measured with asyncpg 0.32: no error, nothing stored). Limitations: the SQL of the
tables is in claims.py, positions.py, handlers.py and dead_letters.py.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import asyncpg

from consumer.core.dead_letters import KeyHold
from consumer.core.delivery import Delivery, PositionUpdate, SavedAttempts
from consumer.core.errors import Misconfigured
from consumer.core.log_identity import Position
from consumer.core.message import Partition
from consumer.core.outcome import Dead
from consumer.deferred_writes.writer import BulkWriter
from consumer.outbox.record import Outgoing, StoredStream
from consumer.postgres import claims, dead_letter_copies, dead_letters, grants, handlers, outbox, positions, server
from consumer.postgres.application_codecs import ConnectionInit, Preparer, application_connection, coded_types
from consumer.postgres.claim_sql import ADVISORY_CLASS
from consumer.postgres.claims import Claims, ExistingClaim
from consumer.postgres.connection import (
    ATTEMPT_SECONDS,
    connect,
    database_epoch,
    detect_dead_peers,
    dsn_label,
    session_settings,
    translated_errors,
)
from consumer.postgres.errors import Fenced, OtherEpoch, Outage, is_definite
from consumer.postgres.positions import Horizon
from consumer.postgres.server import ServerIdentity
from consumer.settings import Settings

CONFLICTS_CLASS = 1189081  # of the locks by which transactions take turns after conflicts
_BATCH_SECONDS_MAX = 5.0
_ROLLBACK_SECONDS = 5.0  # a connection whose rollback takes longer is ended, which undoes the transaction too

_MISSING_RIGHTS = """
select case when current_setting('default_transaction_read_only')::bool then 'anything: default_transaction_read_only is on'
else (
    select string_agg(distinct t, ', ') from unnest($1::text[], $2::text[]) as needed(t, r)
    where not case r when 'delete' then has_table_privilege('consumer.' || t, r)
                     else has_any_column_privilege('consumer.' || t, r) end) end
"""


class Session:
    """One connection, and the transactions of batches on it.

    connection: for statements of ours. handler_connection: the same one, with the application's codecs. Every method but
    `close` raises Outage when the connection is lost.
    """

    # A retry of dead letters or a replay settles messages too, and leaves positions and attempts to the workers.
    owns_positions: ClassVar[bool] = True
    # Whether a claim is the first statement of its transaction; a retry of dead letters locks and revives before.
    claims_first: ClassVar[bool] = True

    def __init__(self, connection: Any, settings: Settings, identity: ServerIdentity, installation: str = "") -> None:
        self.connection = connection
        self.handler_connection = application_connection(connection)
        self.preparer = Preparer(connection.prepare)
        self.bulk_writer = BulkWriter(self.handler_connection, looks=connection, coded=coded_types(connection))
        self._settings = settings
        self.server = identity  # when the connection was opened; a pooler may lead to another server since
        self.epoch = identity.epoch
        self._write_positions = positions.write_statement(identity.stamp_sql)
        self.installation = installation  # which schema: constant, also over restores, until it is recreated
        self.claims = Claims(
            connection,
            lambda: self.begin(),
            settings.ledger_clock_skew_hours,
            is_first=self.claims_first,
        )
        limits = session_settings(settings) if settings.postgres_pooler else {}
        # A pooler shares the server's session, so each transaction sets its own limits, and nothing outlives it.
        local = "".join(
            f"; set local {name} = '{value}'" for name, value in limits.items() if not name.startswith(("tcp", "app"))
        )
        # Slow handlers leave the connection idle: commit well before the server ends the idle transaction.
        self.batch_seconds_max = min(_BATCH_SECONDS_MAX, settings.postgres_idle_in_transaction_timeout_seconds / 3)
        # Transactions of sessions with the same number run one at a time; 32 bits. None after a turn that came too late.
        self.turn: int | None = None
        self._dead: list[tuple[int, bytes, int]] = []
        self._begin = f"begin isolation level read committed{local}"

    @classmethod
    async def open(
        cls, settings: Settings, timeout_seconds: float = ATTEMPT_SECONDS, init: ConnectionInit | None = None
    ) -> Self:
        """Connect and check that this is a primary with the schema.

        init: the App's connection_init. Raises Outage, Misconfigured or SchemaMissing.
        """
        connection = await connect(settings, timeout_seconds, init)
        try:
            detect_dead_peers(connection)
            with translated_errors(settings):
                async with asyncio.timeout(timeout_seconds):  # TimeoutError is an OSError: an outage
                    identity = await database_epoch(connection, settings)
                    installation = await server.installed_at(connection)
                    missing = await connection.fetchval(_MISSING_RIGHTS, *grants.needed())
                if missing:
                    raise Misconfigured(
                        f"{dsn_label(settings.dsn)}: this role may not write to {missing}; run `consumer migrate --grants ROLE`, and execute what it prints"
                    )
                session = cls(connection, settings, identity, installation)
                await session.claims.read_generations()
        except BaseException:
            connection.terminate()
            raise
        return session

    @property
    def is_usable(self) -> bool:
        return not self.connection.is_closed()

    async def begin(self) -> None:
        """Begin a transaction that holds the lock of the ledger's version.

        See migrations/0001_schema.sql.
        """
        lock = f"select pg_advisory_xact_lock_shared({ADVISORY_CLASS:d}, {self.claims.generations.version:d})"
        if self.turn is not None:
            turn = f"select pg_advisory_xact_lock({CONFLICTS_CLASS:d}, {self.turn:d})"
            try:
                await self.connection.execute(f"{self._begin}; {turn}; {lock}")
                return
            except asyncpg.LockNotAvailableError:  # the wait is bounded: continue without a turn
                self.turn = None
                await self.rollback()
        await self.connection.execute(f"{self._begin}; {lock}")

    async def rollback(self) -> None:
        """Undo the transaction.

        A connection on which that fails is ended, which undoes it too.
        """
        try:
            if self.connection.is_in_transaction():
                await asyncio.wait_for(self.connection.execute("rollback"), _ROLLBACK_SECONDS)
        except Exception:
            self.connection.terminate()

    async def commit(self) -> None:
        """Commit durably, or raise.

        Raises Outage when the outcome is unknown (no answer came): the connection is dropped and the batch runs again from
        the top, where its claims give the answer. Never cancel or time out this call: PostgreSQL may be committing. Other
        database errors here are definite rollbacks (a deferred constraint, a serialization failure).
        """
        try:
            tag = await self.connection.execute("commit")
        except BaseException as error:
            if isinstance(error, asyncpg.PostgresError) and is_definite(error):
                raise
            self.connection.terminate()
            if isinstance(error, Exception):
                raise Outage("the outcome of a COMMIT is unknown") from error
            raise
        if tag != "COMMIT":
            raise AssertionError(f"COMMIT was answered with {tag}: a failed statement was not noticed")

    def close(self) -> None:
        """End the connection at once; the server undoes an open transaction."""
        self.connection.terminate()

    async def check_constraints(self) -> None:
        """Check deferred constraints now, as a COMMIT would.

        Raises what the database says.
        """
        await self.connection.execute("set constraints all immediate")

    async def check_epoch(self) -> None:
        """Raise OtherEpoch when the connection leads to another epoch than at first."""
        with translated_errors(self._settings):
            stamp = await self.connection.fetchval(f"select {self.server.stamp_sql}")
        self._check_stamp(stamp)

    def _check_stamp(self, stamp: str | None) -> None:
        if stamp != self.server.stamp:
            self.connection.terminate()
            raise OtherEpoch("the connection leads to another server, or the database went back in time")

    # -- what a batch's transaction stores ----------------------------------------------------------------------------

    async def claim(self, deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> dict[Delivery, ExistingClaim]:
        """Claim every id; return the earlier claims (Claims.claim)."""
        return await self.claims.claim(deliveries, topics)

    async def claims_of(
        self, deliveries: Sequence[Delivery], topics: Mapping[str, int]
    ) -> dict[Delivery, ExistingClaim]:
        """Read the claims of ids that `claim` was called for (Claims.claims_of)."""
        return await self.claims.claims_of(deliveries, topics)

    async def existing_claims(
        self, deliveries: Sequence[Delivery], topics: Mapping[str, int]
    ) -> tuple[dict[Delivery, ExistingClaim], list[Delivery]]:
        """Read the claims of ids, and list the ids without one (Claims.existing)."""
        return await self.claims.existing(deliveries, topics)

    @property
    def has_forgotten(self) -> bool:
        """Whether rows are gone, so that messages can be too old."""
        return self.claims.has_forgotten

    async def too_old(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Return messages whose row may be gone (Claims.too_old).

        That their claim was won proves nothing.
        """
        return await self.claims.too_old(deliveries)

    async def may_run(self, deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> set[Delivery]:
        """Return the messages that are neither claimed nor too old.

        For what comes before their transaction. Claims nothing, so the answer may be another one there.
        """
        await self.claims.read_generations()
        _, absent = await self.existing_claims(deliveries, topics)
        return set(absent).difference(await self.too_old(absent) if absent else ())

    async def release_claims(self, deliveries: Sequence[Delivery]) -> None:
        """Delete claims of this transaction, for messages that will be tried again."""
        await self.claims.release(deliveries)

    async def store_dead_letters(
        self, dead: Mapping[Delivery, Dead], attempts: Mapping[Delivery, int], claimed: Sequence[Delivery]
    ) -> None:
        """Store dead letters, and mark their claims.

        claimed: those whose claim was inserted in this transaction, perhaps as applied.
        """
        if claimed:
            await self.claims.mark_dead(claimed)
        await dead_letters.store(self.connection, dead, attempts)
        self._dead = [(delivery.handler.number, delivery.id, delivery.fingerprint) for delivery in dead]

    async def dead_letter_copies(self) -> Sequence[Outgoing]:
        """Return the copies of the dead letters that `store_dead_letters` stored."""
        topic = self._settings.dead_letter_topic
        return () if topic is None else await dead_letter_copies.of_new(self.connection, self._dead, topic)

    async def save_attempts(self, tried: Mapping[Delivery, tuple[int, float]], settled: Sequence[Delivery]) -> None:
        """Save the attempts of delayed messages; delete those of settled ones.

        tried: attempts, and seconds until the next.
        """
        if self.owns_positions:
            await dead_letters.save_attempts(self.connection, tried, settled)

    async def write_positions(
        self, app: str, moves: Sequence[PositionUpdate], counts: Mapping[tuple[int, int, int, str], int]
    ) -> None:
        """Write positions by compare-and-set, and count outcomes.

        A position is written only if it is what this worker last knew. counts: (handler, topic, partition, outcome) -> messages. Raises Fenced when a position has moved, and OtherEpoch
        when this transaction runs in another epoch than the connection began in.
        """
        if not self.owns_positions:
            moves = ()
        moved, stamp = await positions.write(self.connection, self._write_positions, app, moves, counts)
        self._check_stamp(stamp)
        if moved != len(moves):
            raise Fenced("a position was moved by another worker, or the database went back in time")

    async def store_outgoing(self, app: str, outgoing: Sequence[Outgoing]) -> Sequence[StoredStream]:
        """Store what handlers publish; locks its streams until the COMMIT."""
        return await outbox.store(self.connection, app, outgoing)

    async def key_holds(self, deliveries: Sequence[Delivery]) -> dict[Delivery, KeyHold]:
        """Return whether dead letters hold the keys of these messages.

        The answer is valid until the end of this transaction.
        """
        return await dead_letters.key_holds(self.connection, deliveries)

    # -- what a worker or a command reads and registers beside batches ------------------------------------------------

    async def numbers(
        self, app: str, names: Iterable[str], topics: Iterable[str]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Return the numbers of handlers and topics; number new ones.

        Raises Outage or Misconfigured.
        """
        with translated_errors(self._settings):
            return await handlers.register(self.connection, app, names, topics)

    async def known_numbers(
        self, app: str, names: Iterable[str], topics: Iterable[str]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Return numbers as `numbers` does, without writing.

        A new name gets a negative number, which no row has.
        """
        with translated_errors(self._settings):
            return await handlers.known(self.connection, app, names, topics)

    async def horizons(self, app: str, partitions: Sequence[Partition]) -> dict[Partition, Horizon]:
        """Return the existing positions, with the offsets where the application began."""
        with translated_errors(self._settings):
            by_partition = await positions.horizons(self.connection, app)
        return {partition: by_partition[partition] for partition in partitions if partition in by_partition}

    async def claimed_ids(self, ids: Sequence[tuple[int, bytes]]) -> set[tuple[int, bytes]]:
        """Return which (handler number, id) the ledger has."""
        return await claims.claimed_ids(self.connection, ids)

    async def restore(
        self, numbers: Sequence[int], offsets: Mapping[Partition, int]
    ) -> tuple[dict[Partition, set[tuple[int, bytes]]], dict[Partition, dict[tuple[int, int], SavedAttempts]]]:
        """Read the held keys and the saved attempts of partitions to open.

        Due times are seconds from now.
        """
        return await dead_letters.restore(self.connection, numbers, offsets)

    async def with_dead_letter(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Return the messages whose id and payload have a dead letter."""
        return await dead_letters.with_dead_letter(self.connection, deliveries)

    async def without_dead_letter(self, keys: Sequence[tuple[int, bytes, int]]) -> list[int]:
        """Return the indexes of keys whose dead letter is missing.

        keys: (handler number, id, fingerprint). A key that was applied later needs none.
        """
        return await dead_letters.without_dead_letter(self.connection, keys)

    async def positions(self, app: str, partitions: Sequence[Partition]) -> dict[Partition, Position]:
        """Return the existing positions of these partitions."""
        return await positions.read_positions(self.connection, app, partitions)

    async def begin_positions(
        self, app: str, starts: Mapping[Partition, Position], of_group: Collection[Partition] = ()
    ) -> None:
        """Write first positions (positions.begin)."""
        await positions.begin(self.connection, app, starts, of_group)

    async def name_logs(self, app: str, logs: Mapping[Partition, tuple[str | None, uuid.UUID]]) -> None:
        """Record cluster and topic ids of positions that have none yet."""
        await positions.name_logs(self.connection, app, logs)
