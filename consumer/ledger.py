"""The ledger in PostgreSQL: claims, positions, outcomes, dead letters, and the epoch. The only file that imports asyncpg.

Knows SQL and transactions; knows no Kafka and no Redis. One Session is one connection. BEGIN and COMMIT are plain
statements and their tags are read, because a driver's transaction object hides a COMMIT that the server answered with
ROLLBACK (measured with asyncpg 0.32: no error, nothing stored).
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import asyncpg
from asyncpg.pgproto.pgproto import UUID

from consumer import deadletters, server, transport
from consumer.columns import Columns
from consumer.core import grants
from consumer.core.errors import ConsumerError, Misconfigured
from consumer.core.hosts import certificate_fault
from consumer.core.incarnation import Position, Print
from consumer.core.lanes import Delivery, Move, Tried
from consumer.core.letters import Hold
from consumer.core.message import Partition
from consumer.core.outcome import Dead
from consumer.core.retention import is_time, may_be_forgotten
from consumer.core.sqlstate import Meaning, meaning, without_values
from consumer.generations import ADVISORY_CLASS, FIRST, READ, STANDING, Generations, Statements, statements
from consumer.server import Server
from consumer.settings import Settings

_BATCH_SECONDS_MAX = 5.0
_ROLLBACK_SECONDS = 5.0  # what takes longer is ended with its connection, which undoes it too
_CONFLICTS_CLASS = 1189081  # of the locks by which transactions take turns after conflicts
_MOSTLY_KNOWN = 0.5
_TURNS_MAX = 10  # of the ledger, that one claim sees come and go
_CLAIM_KEY = re.compile("ledger(_[0-9]+)?_claim")
SCHEMA_VERSION = 7  # the migration this code needs; migrations/ holds them

_MAY_NOT = """
select case when current_setting('default_transaction_read_only')::bool then 'anything: default_transaction_read_only is on'
else (
    select string_agg(distinct t, ', ') from unnest($1::text[], $2::text[]) as needed(t, r)
    where not case r when 'delete' then has_table_privilege('consumer.' || t, r)
                     else has_any_column_privilege('consumer.' || t, r) end) end
"""
_CLOSE = """
with moved as (
    update consumer.positions p set next_offset = m.next, updated_at = now(),
           seen_offset = coalesce(m.seen_offset, p.seen_offset),
           seen_timestamp = coalesce(m.seen_timestamp, p.seen_timestamp),
           seen_fingerprint = coalesce(m.seen_fingerprint, p.seen_fingerprint)
    from unnest($2::text[], $3::int4[], $4::int8[], $5::int8[], $6::uuid[], $7::int8[], $8::int8[], $9::int8[], $15::text[], $16::int4[])
         as m(topic, partition, previous, next, topic_id, seen_offset, seen_timestamp, seen_fingerprint, handlers, holds)
    where p.app = $1 and p.topic = m.topic and p.partition = m.partition and p.next_offset = m.previous
      and p.topic_id is not distinct from m.topic_id and p.handlers is not distinct from m.handlers and p.holds = m.holds
    returning 1
), counted as (
    insert into consumer.outcomes as t (handler, topic, partition, outcome, count)
    select * from unnest($10::int2[], $11::int2[], $12::int4[], $13::text[], $14::int8[])
    on conflict (handler, topic, partition, outcome) do update set count = t.count + excluded.count
)
-- A handler may have asked a function to set it otherwise, and what is acknowledged must be durable.
select count(*), (select {stamp}), set_config('synchronous_commit', 'on', true) from moved
"""
INSTALLATION = "select (extract(epoch from made_at) * 1000000)::bigint::text from consumer.installation"
_FORGOTTEN = """
select f.handler, t.name, f.partition, f.below from consumer.forgotten f join consumer.topics t using (topic) where f.handler = any($1)
"""


class Outage(ConsumerError):
    """PostgreSQL cannot do it now, or nobody knows whether it did: drop the connection, wait, run again."""


class NotPrimary(Outage):
    """It answers, but must not be written to. The text says what it is, and quotes nothing."""


class OtherEpoch(Outage):
    """The transaction saw another epoch than its connection began in: what was known of the ledger no longer counts."""


class Conflict(ConsumerError):
    """Two transactions met: run the batch again at once."""


class Fenced(ConsumerError):
    """A position is not what this worker last wrote: another owner moved it, or the database went back in time."""


class SchemaMissing(Misconfigured):
    """The schema is missing or older than this code: run `consumer migrate`."""


class Standing(NamedTuple):
    """What the ledger holds for an id that was claimed before.

    clashes: with another payload. here: by this very record, so this is a redelivery; else the message was produced again.
    """

    dead: bool
    clashes: bool
    here: bool


REDELIVERED = Standing(dead=False, clashes=False, here=True)  # what nearly all of a replay is
_STANDING = {
    (dead, clashes, here): Standing(dead, clashes, here)
    for dead in (False, True)
    for clashes in (False, True)
    for here in (False, True)
} | {tuple(REDELIVERED): REDELIVERED}


def meaning_of(error: BaseException) -> Meaning:
    """What an error may be. Errors of neither database nor driver are the handler's code."""
    if isinstance(error, asyncpg.InvalidCachedStatementError):
        return Meaning.CONFLICT  # a table was altered meanwhile: prepared anew, the statement works
    if isinstance(error, asyncpg.PostgresError):
        if _CLAIM_KEY.fullmatch(getattr(error, "constraint_name", None) or ""):
            return Meaning.CONFLICT  # a concurrent REINDEX may let a conflict through as an error
        if error.sqlstate == "23514" and not getattr(error, "constraint_name", None):
            return Meaning.STATE  # no partition takes the row
        return meaning(error.sqlstate or "")
    if isinstance(error, asyncpg.InternalClientError):
        return Meaning.OUTAGE
    if isinstance(error, asyncpg.InterfaceError):
        return Meaning.MESSAGE
    return Meaning.CODE


def _is_definite(error: asyncpg.PostgresError) -> bool:
    """Whether a COMMIT that failed so is rolled back for certain: PostgreSQL answered it and goes on."""
    match meaning_of(error):
        case Meaning.OUTAGE:
            return False
        case Meaning.INTERNAL:
            return getattr(error, "severity_en", None) == "ERROR"
        case _:
            return True


def sqlstate_of(error: BaseException) -> str | None:
    """The SQLSTATE of a database error, for logs."""
    return error.sqlstate if isinstance(error, asyncpg.PostgresError) else None


def lock_timed_out(error: BaseException) -> bool:
    """Whether a lock was waited for as long as lock_timeout allows; NOWAIT fails with the same SQLSTATE, at once."""
    is_locked = isinstance(error, asyncpg.LockNotAvailableError)
    return is_locked and getattr(error, "server_source_function", None) == "ProcessInterrupts"


def said(error: BaseException) -> str | None:
    """What a database error says, without the values that its text may quote; None for what is no database error.

    PostgreSQL's DETAIL quotes rows ("Key (email)=(…) already exists"), and the driver quotes arguments that do not fit.
    """
    if isinstance(error, asyncpg.PostgresError):
        return without_values(error.sqlstate or "", str(error.args[0]) if error.args else "")
    if isinstance(error, asyncpg.InterfaceError):
        return str(error).partition(": ")[0]
    return None


def where(dsn: str) -> str:
    """The server and database that a DSN names, without user or password, for messages to people."""
    try:
        parts = urlsplit(dsn)
        given = {
            name: value for name, value in parse_qsl(parts.query) if name in ("host", "port", "dbname", "database")
        }
        hosts = parts.netloc.rpartition("@")[2] or given.get("host", "the local socket")
        if "port" in given and ":" not in hosts:
            hosts += f":{given['port']}"
        return (
            f"PostgreSQL at {hosts}/{parts.path.lstrip('/') or given.get('dbname', given.get('database', ''))}".rstrip(
                "/"
            )
        )
    except ValueError:
        return "PostgreSQL"


async def connect(settings: Settings, timeout_seconds: float = 10) -> asyncpg.Connection[Any]:
    """A connection, without looking at what is in it. Raises Misconfigured or Outage, naming the place."""
    dsn = settings.dsn
    try:
        return await asyncpg.connect(
            dsn,
            timeout=timeout_seconds,
            ssl=transport.postgres_tls(settings),
            statement_cache_size=0 if settings.postgres_pooler else 100,
            server_settings=None if settings.postgres_pooler else _session_settings(settings),
        )
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
        # InvalidPasswordError is among them: waiting does not heal any of these.
        raise Misconfigured(f"{where(dsn)}: {said(error)}") from None
    except ssl.SSLCertVerificationError as error:
        fault = certificate_fault(
            error.verify_code, error.verify_message, "CONSUMER_POSTGRES_CA_FILE", "CONSUMER_POSTGRES_DSN"
        )
        raise Misconfigured(f"{where(dsn)}: {fault}") from None
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InternalClientError) as error:
        if isinstance(error, ConnectionError) and "rejected SSL upgrade" in str(error):
            raise Misconfigured(
                f"{where(dsn)} speaks no TLS: turn it on there, or see CONSUMER_ALLOW_INSECURE"
            ) from None
        if isinstance(error, asyncpg.ProtocolViolationError) and "unsupported startup parameter" in str(error):
            raise Misconfigured(f"{where(dsn)} is PgBouncer: set CONSUMER_POSTGRES_POOLER=true") from None
        if isinstance(error, asyncpg.PostgresError) and meaning_of(error) is Meaning.DEPLOYMENT:
            raise Misconfigured(f"{where(dsn)}: {said(error)}") from None
        raise Outage(f"{where(dsn)}: {said(error) or str(error) or type(error).__name__}") from error
    except (ValueError, TypeError, asyncpg.InterfaceError):
        # The driver's text would quote the part that it could not read, which may be of the password.
        raise Misconfigured(
            "CONSUMER_POSTGRES_DSN is not an address that can be used: write postgresql://user:password@host:port/database, "
            "and percent-encode special characters of the password"
        ) from None


def _session_settings(settings: Settings) -> dict[str, str]:
    return {
        "application_name": "idempotent-consumer",
        "lock_timeout": str(milliseconds(settings.postgres_lock_timeout_seconds)),
        "idle_in_transaction_session_timeout": str(milliseconds(settings.postgres_idle_in_transaction_timeout_seconds)),
        "synchronous_commit": "on",  # a role or database that turned it off would lose settled messages
        "tcp_keepalives_idle": "10",
        "tcp_keepalives_interval": "5",
        "tcp_keepalives_count": "4",
    }


def milliseconds(seconds: float) -> int:
    """A limit as PostgreSQL takes it: 0 would be none at all."""
    return max(1, round(seconds * 1000))


@contextmanager
def sorted_errors(settings: Settings) -> Iterator[None]:
    """Errors of our own statements at start: Outage, to wait for, or Misconfigured, where rights or schema do not fit."""
    try:
        yield
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        if meaning_of(error) is Meaning.DEPLOYMENT:
            raise Misconfigured(f"{where(settings.dsn)}: {said(error)}") from None
        raise Outage(f"{where(settings.dsn)}: {said(error) or str(error) or type(error).__name__}") from error


class Session:
    """One worker connection. Every method but `close` raises Outage when the connection is lost."""

    def __init__(
        self, connection: asyncpg.Connection[Any], settings: Settings, seen: Server, installation: str = ""
    ) -> None:
        self.connection = connection
        self.columns = Columns(connection)
        self._settings = settings
        self.server = seen  # as it was when the connection was opened: a pooler may lead to another one since
        self.epoch = seen.epoch
        self._close = _CLOSE.format(stamp=seen.stamp_sql)
        self.installation = installation  # which schema: the same until it is made anew, whatever time it goes back to
        self.owns_positions = True  # a replay settles messages too, and leaves the positions to the workers
        limits = _session_settings(settings) if settings.postgres_pooler else {}
        # Behind a pooler the session is not ours: limits travel with each transaction, and nothing outlives it.
        local = "".join(
            f"; set local {name} = '{value}'" for name, value in limits.items() if not name.startswith(("tcp", "app"))
        )
        # Slow handlers leave the connection idle: commit what is done well before the server ends the transaction.
        self.batch_seconds_max = min(_BATCH_SECONDS_MAX, settings.postgres_idle_in_transaction_timeout_seconds / 3)
        # Transactions of sessions with one number run one at a time; 32 bits. None after a turn that did not come in time.
        self.turn: int | None = None
        self._begin = f"begin isolation level read committed{local}"
        self._share_known = 0.0  # of the ids that were claimed last
        self._generations = FIRST  # as they were read last; a claim notices when that is no longer so
        self._skew_ms = round(settings.ledger_clock_skew_hours * 3_600_000)

    @classmethod
    async def open(cls, settings: Settings, timeout_seconds: float = 10) -> Session:
        """Connect and check that this is a primary with the schema. Raises Outage, Misconfigured or SchemaMissing."""
        connection = await connect(settings, timeout_seconds)
        try:
            _detect_dead_peers(connection)
            with sorted_errors(settings):
                async with asyncio.timeout(timeout_seconds):  # TimeoutError is an OSError: an outage
                    seen = await describe(connection, settings)
                    installation = await connection.fetchval(INSTALLATION)
                    missing = await connection.fetchval(_MAY_NOT, *grants.needed())
                if missing:
                    raise Misconfigured(
                        f"{where(settings.dsn)}: this role may not write to {missing}: grant it what `consumer migrate --grants ROLE` prints"
                    )
                session = cls(connection, settings, seen, installation)
                session._generations = await session._read_generations()
        except BaseException:
            connection.terminate()
            raise
        return session

    @property
    def is_usable(self) -> bool:
        return not self.connection.is_closed()

    async def begin(self) -> None:
        """Begin a transaction that holds the lock of the ledger's version: see migrations/0005_generations.sql."""
        lock = f"select pg_advisory_xact_lock_shared({ADVISORY_CLASS:d}, {self._generations.version:d})"
        if self.turn is not None:
            turn = f"select pg_advisory_xact_lock({_CONFLICTS_CLASS:d}, {self.turn:d})"
            try:
                await self.connection.execute(f"{self._begin}; {turn}; {lock}")
                return
            except asyncpg.LockNotAvailableError:  # the wait is bounded: go on without a turn
                self.turn = None
                await self.rollback()
        await self.connection.execute(f"{self._begin}; {lock}")

    async def rollback(self) -> None:
        """Undo everything. A connection on which that fails is ended, which undoes it too."""
        try:
            if self.connection.is_in_transaction():
                await asyncio.wait_for(self.connection.execute("rollback"), _ROLLBACK_SECONDS)
        except Exception:
            self.connection.terminate()

    async def commit(self) -> None:
        """Make it durable, or raise.

        Raises Outage when the outcome is unknown (the answer did not come): the connection is dropped and the batch
        runs again from the top, where its claims give the answer. Never cancel or time out this call: PostgreSQL may
        be committing. Other database errors here are definite rollbacks (a deferred constraint, a serialization failure).
        """
        try:
            tag = await self.connection.execute("commit")
        except BaseException as error:
            if isinstance(error, asyncpg.PostgresError) and _is_definite(error):
                raise
            self.connection.terminate()
            if isinstance(error, Exception):
                raise Outage("the outcome of a COMMIT is unknown") from error
            raise
        if tag != "COMMIT":
            raise AssertionError(f"COMMIT was answered with {tag}: a failed statement was not noticed")

    def close(self) -> None:
        """End the connection at once; an open transaction is undone by the server."""
        self.connection.terminate()

    # -- the batch --------------------------------------------------------------------------------------------------

    async def claim(self, deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> dict[Delivery, Standing]:
        """Claim every id in one statement; returns those that were claimed before, with what stands in the ledger.

        A claim that another transaction holds is waited for, until that one commits or rolls back. The ids must be
        distinct for each handler. Sorted by key, so that two batches cannot wait for each other here.
        """
        known: dict[Delivery, Standing] = {}
        unknown = deliveries
        if self._share_known > _MOSTLY_KNOWN:  # as in a replay: to look costs half of what a claim that is lost does
            known, unknown = _standing(deliveries, await self._ask(deliveries, topics, to_claim=False))
        standing = known
        if unknown:
            standing, unseen = _standing(unknown, await self._ask(unknown, topics, to_claim=True))
            if unseen:
                # A second statement, because it sees what a concurrent transaction has committed while the first one waited.
                standing |= await self.claimed(unseen, topics)
            standing |= known
        self._share_known = len(standing) / len(deliveries)
        return standing

    async def claimed(self, deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> dict[Delivery, Standing]:
        """What stands for ids that this transaction has claimed or found claimed. Raises Conflict when a claim has vanished."""
        found = await self.connection.fetchrow(self._statements.standing, *_offers(deliveries, topics))
        standing, vanished = _standing(deliveries, found)
        if vanished:
            raise Conflict("a claim vanished between two statements")
        return standing

    async def standing(
        self, deliveries: Sequence[Delivery], topics: Mapping[str, int]
    ) -> tuple[dict[Delivery, Standing], list[Delivery]]:
        """What stands in the ledger for ids, and those without a row. Claims nothing, waits for nobody."""
        return _standing(deliveries, await self.connection.fetchrow(STANDING, *_offers(deliveries, topics)))

    async def _ask(self, deliveries: Sequence[Delivery], topics: Mapping[str, int], *, to_claim: bool) -> Any:
        """Claim, or only look, in a transaction begun anew where the ledger has turned since its generations were read."""
        alike = _offers_alike(deliveries, topics)
        offers = alike if alike is not None else _offers(deliveries, topics)
        for _ in range(_TURNS_MAX):
            error = None
            match to_claim, alike is not None:
                case True, True:
                    statement = self._statements.claim_alike
                case True, False:
                    statement = self._statements.claim
                case False, True:
                    statement = self._statements.standing_alike
                case _:
                    statement = self._statements.standing
            try:
                lost = await self.connection.fetchrow(statement, *offers)
                assert lost is not None
                if lost[5] == self._generations.version:
                    return lost
            except asyncpg.UndefinedTableError as gone:  # a generation that was dropped, maybe
                error = gone
            # Nothing but this was done yet, and a look at what is committed, so nobody misses the transaction.
            await self.connection.execute("rollback")
            before = self._generations
            self._generations = await self._read_generations()
            if error is not None and self._generations == before:
                raise error
            await self.begin()
        raise Conflict("the ledger turned again and again")

    async def _read_generations(self) -> Generations:
        row = await self.connection.fetchrow(READ)
        assert row is not None
        version, target, turning, live, horizon_ms = row
        return Generations(version, target, turning, tuple(live), horizon_ms)

    @property
    def _statements(self) -> Statements:
        return statements(self._generations.target, self._generations.turning, self._generations.live)

    @property
    def has_forgotten(self) -> bool:
        """Whether any message can be too old: nothing is, where no row is gone."""
        return self._generations.horizon_ms is not None

    async def too_old(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Those that may have had a row that is gone, so that a claim which is won proves nothing.

        Of this transaction's claim: the horizon is of the version that the claim was checked against. The clocks of producers
        and of PostgreSQL may differ by `ledger_clock_skew_hours`. Records without a usable timestamp are judged by their offsets
        (core/retention.py). Limitation: a producer that sends an id again with a new timestamp, later than rows are kept.
        """
        horizon_ms = self._generations.horizon_ms
        if horizon_ms is None:
            return []
        below: dict[tuple[int, str, int], int] = {}
        if any(not is_time(each.record.timestamp) for each in deliveries):
            handlers = sorted({each.handler.number for each in deliveries})
            below = {tuple(row)[:3]: row[3] for row in await self.connection.fetch(_FORGOTTEN, handlers)}
        return [
            each
            for each in deliveries
            if may_be_forgotten(
                (record := each.record).timestamp,
                record.offset,
                horizon_ms + self._skew_ms,
                below.get((each.handler.number, record.topic, record.partition)),
            )
        ]

    async def unclaim(self, deliveries: Sequence[Delivery]) -> None:
        """Take back claims of this transaction, for messages that will be tried again."""
        await self.connection.execute(self._statements.unclaim, *_keys(deliveries))

    async def bury(
        self, dead: Mapping[Delivery, Dead], attempts: Mapping[Delivery, int], claimed: Sequence[Delivery]
    ) -> None:
        """Keep dead letters. `claimed`: those whose claim was made in this transaction, maybe as applied."""
        if claimed:
            await self.connection.execute(self._statements.bury, *_keys(claimed))
        await deadletters.bury(self.connection, dead, attempts, publish=self._settings.dead_letter_topic is not None)

    async def holds(self, deliveries: Sequence[Delivery]) -> dict[Delivery, Hold]:
        """Whether dead letters hold back these deliveries, for the time of this transaction."""
        return await deadletters.ask(self.connection, deliveries)

    async def note_attempts(self, tried: Mapping[Delivery, tuple[int, float]], settled: Sequence[Delivery]) -> None:
        """Keep attempts, and seconds until the next, of messages that are not settled; forget those of settled ones."""
        if self.owns_positions:
            await deadletters.note_attempts(self.connection, tried, settled)

    async def recall(
        self, handlers: Sequence[int], positions: Mapping[Partition, int]
    ) -> tuple[dict[Partition, set[tuple[int, bytes]]], dict[Partition, dict[tuple[int, int], Tried]]]:
        """What opening partitions must know of dead letters and attempts. The due times are seconds from now."""
        return await deadletters.recall(self.connection, handlers, positions)

    async def check_constraints(self) -> None:
        """Check now what a COMMIT would check: deferred constraints. Raises what the database says."""
        await self.connection.execute("set constraints all immediate")

    async def close_batch(
        self, app: str, moves: Sequence[Move], counts: Mapping[tuple[int, int, int, str], int]
    ) -> None:
        """Write the positions, each only if it still is what this worker last knew, and count the outcomes.

        counts: (handler, topic, partition, outcome) -> messages. Raises Fenced when a position has moved, and OtherEpoch
        when this transaction runs in another epoch than the connection began in.
        """
        if not self.owns_positions:
            moves = ()
        row = await self.connection.fetchrow(
            self._close,
            app,
            [move.partition.topic for move in moves],
            [move.partition.partition for move in moves],
            [move.previous for move in moves],
            [move.next for move in moves],
            [move.topic_id for move in moves],
            [move.seen and move.seen.offset for move in moves],
            [move.seen and move.seen.timestamp for move in moves],
            [move.seen and move.seen.fingerprint for move in moves],
            *(list(column) for column in zip(*[(*key, n) for key, n in sorted(counts.items())], strict=True))
            if counts
            else ([], [], [], [], []),
            [move.handlers for move in moves],
            [move.holds for move in moves],
        )
        moved, stamp, _ = row or (None, None, None)
        self._check_stamp(stamp)
        if moved != len(moves):
            raise Fenced("a position was moved by another worker, or the database went back in time")

    async def check_epoch(self) -> None:
        """Raise OtherEpoch when the server behind the connection is in another epoch than it was at first."""
        with sorted_errors(self._settings):
            stamp = await self.connection.fetchval(f"select {self.server.stamp_sql}")
        self._check_stamp(stamp)

    def _check_stamp(self, stamp: str | None) -> None:
        if stamp != self.server.stamp:
            self.connection.terminate()
            raise OtherEpoch("the connection leads to another server, or the database went back in time")

    # -- names and positions ----------------------------------------------------------------------------------------

    async def numbers(
        self, app: str, handlers: Iterable[str], topics: Iterable[str]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """The numbers of handlers and topics, given on first sight. Raises Outage or Misconfigured."""
        with sorted_errors(self._settings):
            return await self._numbers(app, handlers, topics)

    async def _numbers(
        self, app: str, handlers: Iterable[str], topics: Iterable[str]
    ) -> tuple[dict[str, int], dict[str, int]]:
        await self._refuse_renamed(app, sorted(handlers))
        # Only what is missing is inserted: an upsert would burn a number of a small range at every start.
        await self.connection.execute(
            """insert into consumer.handlers (app, name) select $1, n from unnest($2::text[]) n
               where not exists (select from consumer.handlers h where h.app = $1 and h.name = n)
               on conflict do nothing""",
            app,
            sorted(handlers),
        )
        await self.connection.execute(
            """insert into consumer.topics (name) select n from unnest($1::text[]) n
               where not exists (select from consumer.topics t where t.name = n) on conflict do nothing""",
            sorted(topics),
        )
        found = await self.connection.fetch("select name, handler from consumer.handlers where app = $1", app)
        known = await self.connection.fetch("select name, topic from consumer.topics")
        return {row[0]: row[1] for row in found}, {row[0]: row[1] for row in known}

    async def _refuse_renamed(self, app: str, handlers: Sequence[str]) -> None:
        row = await self.connection.fetchrow(
            """select r.old_name, r.new_name from consumer.handler_renames r where r.app = $1 and r.old_name = any($2::text[])
               and not exists (select from consumer.handlers h where (h.app, h.name) = (r.app, r.old_name))
               order by r.renamed_at desc limit 1""",
            app,
            handlers,
        )
        if row is not None:
            raise Misconfigured(
                f"handler {row[0]!r} of App {app!r} was renamed to {row[1]!r} in the ledger; run the code with the new name, "
                f"or rename it back with `consumer migrate --rename-handler {app} {row[1]} {row[0]}`"
            )

    async def known_numbers(
        self, app: str, handlers: Iterable[str], topics: Iterable[str]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """As `numbers`, and nothing is written: what has no number yet gets a negative one, which no row can have."""
        with sorted_errors(self._settings):
            await self._refuse_renamed(app, sorted(handlers))
            found = dict(await self.connection.fetch("select name, handler from consumer.handlers where app = $1", app))
            known = dict(await self.connection.fetch("select name, topic from consumer.topics"))
        return (
            {name: found.get(name, -number) for number, name in enumerate(handlers, 1)},
            {name: known.get(name, -number) for number, name in enumerate(topics, 1)},
        )

    async def horizons(self, app: str, partitions: Sequence[Partition]) -> dict[Partition, tuple[int, int | None]]:
        """Positions, and the offsets at which the application began (None: not recorded), of the partitions that have any."""
        with sorted_errors(self._settings):
            rows = await self.connection.fetch(
                "select topic, partition, next_offset, first_offset from consumer.positions where app = $1", app
            )
        found = {Partition(row[0], row[1]): (row[2], row[3]) for row in rows}
        return {each: found[each] for each in partitions if each in found}

    async def which_stand(self, ids: Sequence[tuple[int, bytes]]) -> set[tuple[int, bytes]]:
        """Those (handler, id) that the ledger holds."""
        rows = await self.connection.fetch(
            """select l.handler, l.id from unnest($1::int2[], $2::uuid[]) as o(handler, id)
               join consumer.ledger l using (handler, id)""",
            [each[0] for each in ids],
            [UUID(each[1]) for each in ids],
        )
        return {(row[0], row[1].bytes) for row in rows}

    async def letters(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Those that a dead letter with this id and this payload settles."""
        rows = await self.connection.fetch(
            """select o.place from unnest($1::int2[], $2::uuid[], $3::int8[]) with ordinality as o(handler, id, fingerprint, place)
               where exists (select from consumer.dead_letters d
                             where (d.handler, d.id, d.fingerprint) = (o.handler, o.id, o.fingerprint) and """
            + deadletters.SETTLES
            + ")",
            *_keys(deliveries),
            [each.fingerprint for each in deliveries],
        )
        return [deliveries[row[0] - 1] for row in rows]

    async def letters_gone(self, keys: Sequence[tuple[int, bytes, int]]) -> list[int]:
        """The places of those (handler, id, fingerprint) that have no dead letter and were not applied later."""
        rows = await self.connection.fetch(
            """select o.place from unnest($1::int2[], $2::uuid[], $3::int8[]) with ordinality as o(handler, id, fingerprint, place)
               where not exists (select from consumer.dead_letters d
                                 where (d.handler, d.id, d.fingerprint) = (o.handler, o.id, o.fingerprint))
                 and not exists (select from consumer.ledger l where (l.handler, l.id, l.fingerprint) =
                                 (o.handler, o.id, o.fingerprint) and l.applied_at is not null)
               order by o.place""",
            [each[0] for each in keys],
            [UUID(each[1]) for each in keys],
            [each[2] for each in keys],
        )
        return [row[0] - 1 for row in rows]

    async def positions(self, app: str, partitions: Sequence[Partition]) -> dict[Partition, Position]:
        """The positions that are known, of the partitions asked for."""
        return await read_positions(self.connection, app, partitions)

    async def begin_positions(
        self, app: str, starts: Mapping[Partition, Position], of_group: Collection[Partition] = ()
    ) -> None:
        """Write first positions. One that another worker has written in the meantime stays as it is.

        of_group: those that begin where another client of the Kafka group has committed.
        """
        await self.connection.executemany(
            """insert into consumer.positions (app, topic, partition, next_offset, first_offset, cluster_id, topic_id, began_with)
               values ($1, $2, $3, $4, $4, $5, $6, $7) on conflict do nothing""",
            [
                (app, *each, at.offset, at.cluster_id, at.topic_id, "group" if each in of_group else None)
                for each, at in starts.items()
            ],
        )

    async def name_logs(self, app: str, logs: Mapping[Partition, tuple[str | None, uuid.UUID]]) -> None:
        """Record cluster and topic ids of positions that have none yet; what is recorded stays."""
        await self.connection.executemany(
            """update consumer.positions set cluster_id = coalesce(cluster_id, $4), topic_id = coalesce(topic_id, $5)
               where (app, topic, partition) = ($1, $2, $3)""",
            [(app, each.topic, each.partition, *ids) for each, ids in logs.items()],
        )


async def read_positions(
    connection: asyncpg.Connection[Any], app: str, partitions: Sequence[Partition]
) -> dict[Partition, Position]:
    """The positions that are known, of the partitions asked for. Raises what the driver raises."""
    rows = await connection.fetch(
        """select p.topic, p.partition, p.next_offset, p.cluster_id, p.topic_id, p.salt,
                  p.first_offset, p.handlers, p.holds, p.seen_offset, p.seen_timestamp, p.seen_fingerprint
           from consumer.positions p join unnest($2::text[], $3::int4[]) as w(topic, partition) using (topic, partition)
           where p.app = $1""",
        app,
        [each.topic for each in partitions],
        [each.partition for each in partitions],
    )
    return {
        Partition(topic, number): Position(
            offset, cluster, id, salt, Print(*seen) if seen[0] is not None else None, first, handlers, holds
        )
        for topic, number, offset, cluster, id, salt, first, handlers, holds, *seen in map(tuple, rows)
    }


async def describe(connection: asyncpg.Connection[Any], settings: Settings) -> Server:
    """The server and epoch behind a connection.

    Raises NotPrimary for a standby, SchemaMissing for a missing or old schema, and what the driver raises.
    """
    standby, migrated = await server.state(connection)
    if standby:
        raise NotPrimary(f"{where(settings.dsn)} is a standby: it cannot be written to")
    if not migrated:
        raise SchemaMissing(f"{where(settings.dsn)} has no ledger yet: run `consumer migrate`")
    version = await connection.fetchval("select max(version) from consumer.schema_versions")
    if version is None or version < SCHEMA_VERSION:
        raise SchemaMissing(
            f"{where(settings.dsn)}: the ledger is at version {version or 0} and this code needs {SCHEMA_VERSION}: run `consumer migrate`"
        )
    return await server.identify(connection)


def uuids(ids: Iterable[bytes]) -> list[UUID]:
    """As the driver takes them. Its own type is made from bytes several times faster than Python's."""
    return [UUID(each) for each in ids]


def _offers(deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> tuple[list[Any], ...]:
    return (
        [each.handler.number for each in deliveries],
        [UUID(each.id) for each in deliveries],
        [each.fingerprint for each in deliveries],
        [topics[each.record.topic] for each in deliveries],
        [each.record.partition for each in deliveries],
        [each.record.offset for each in deliveries],
        [each.outcome is None for each in deliveries],
    )


def _offers_alike(deliveries: Sequence[Delivery], topics: Mapping[str, int]) -> tuple[Any, ...] | None:
    """The offers where they are of one handler, from one partition, and none is a dead letter; else None."""
    handler, record = deliveries[0].handler, deliveries[0].record
    topic, partition = record.topic, record.partition
    ids, fingerprints, offsets = [], [], []
    for each in deliveries:
        record = each.record
        if (
            each.handler is not handler
            or record.partition != partition
            or record.topic != topic
            or each.outcome is not None
        ):
            return None
        ids.append(UUID(each.id))
        fingerprints.append(each.fingerprint)
        offsets.append(record.offset)
    return handler.number, ids, fingerprints, topics[topic], partition, offsets, True


def _standing(deliveries: Sequence[Delivery], lost: Any) -> tuple[dict[Delivery, Standing], list[Delivery]]:
    """What stands for those that were lost, and those of which the statement could not see it."""
    everything, elsewhere, dead, clashes, unseen = (
        [deliveries[place - 1] for place in each or ()] for each in lost[:5]
    )
    found = dict.fromkeys(everything, REDELIVERED)
    if elsewhere or dead or clashes:
        away, died, clashing = set(elsewhere), set(dead), set(clashes)
        for each in away | died | clashing:
            found[each] = _STANDING[each in died, each in clashing, each not in away]
    for each in unseen:
        del found[each]
    return found, unseen


def _keys(deliveries: Sequence[Delivery]) -> tuple[list[int], list[UUID]]:
    return [each.handler.number for each in deliveries], [UUID(each.id) for each in deliveries]


def _detect_dead_peers(connection: asyncpg.Connection[Any]) -> None:
    """Let the kernel end a connection whose peer is gone, so that nothing, a COMMIT included, waits for hours.

    Linux knows all of these options; elsewhere those that exist are set.
    """
    transport = getattr(connection, "_transport", None)
    plain = transport.get_extra_info("socket") if transport is not None else None
    if plain is None or plain.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with suppress(OSError):
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", 10),
            ("TCP_KEEPINTVL", 5),
            ("TCP_KEEPCNT", 4),
            ("TCP_USER_TIMEOUT", 30_000),
        ):
            if hasattr(socket, option):
                plain.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
