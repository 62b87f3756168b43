"""Connects to PostgreSQL, waits for it, and checks which database answers.

A connection's transactions are in session.py.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import asyncpg

from consumer import tls
from consumer.core.errors import Misconfigured, ServiceUnavailable
from consumer.core.hosts import certificate_fault
from consumer.core.sqlstate import Meaning
from consumer.logs import describe
from consumer.postgres import server
from consumer.postgres.application_codecs import ApplicationConnection, ConnectionInit, OwnStatements
from consumer.postgres.errors import NotPrimary, Outage, SchemaMissing, meaning_of, redacted_message
from consumer.postgres.server import ServerIdentity
from consumer.settings import Settings

T = TypeVar("T")

SCHEMA_VERSION = 5  # the migration this code needs; migrations/ holds them
ATTEMPT_SECONDS = 10.0  # to connect once
_ATTEMPT_SECONDS_MIN = 0.5
PAUSE_SECONDS = 0.5  # between attempts of a command


def dsn_label(dsn: str) -> str:
    """Name the server and database of a DSN, without user and password."""
    try:
        parts = urlsplit(dsn)
        options = {
            name: value for name, value in parse_qsl(parts.query) if name in ("host", "port", "dbname", "database")
        }
        hosts = parts.netloc.rpartition("@")[2] or options.get("host", "the local socket")
        if "port" in options and ":" not in hosts:
            hosts += f":{options['port']}"
        database = parts.path.lstrip("/") or options.get("dbname", options.get("database", ""))
        return f"PostgreSQL at {hosts}/{database}".rstrip("/")
    except ValueError:
        return "PostgreSQL"


@contextmanager
def translated_errors(settings: Settings) -> Iterator[None]:
    """Raise Outage or Misconfigured for errors of our own statements.

    Misconfigured: the rights or the schema do not fit.
    """
    try:
        yield
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        label = dsn_label(settings.dsn)
        if meaning_of(error) is Meaning.DEPLOYMENT:
            raise Misconfigured(f"{label}: {redacted_message(error)}; check the role's rights and the schema") from None
        raise Outage(f"{label}: {redacted_message(error) or str(error) or type(error).__name__}") from error


async def connect(
    settings: Settings, timeout_seconds: float = ATTEMPT_SECONDS, init: ConnectionInit | None = None
) -> Any:
    """Connect, without looking at the database.

    init: the App's connection_init. Where it sets codecs, the result is an OwnStatements, else asyncpg's connection. Raises
    Misconfigured or Outage, naming the server.
    """
    connection = await _connect(
        settings, timeout_seconds, asyncpg.Connection if init is None else ApplicationConnection
    )
    if init is None:
        return connection
    try:
        await _initialize(connection, init, settings, timeout_seconds)
    except BaseException:
        connection.terminate()
        raise
    return OwnStatements(connection) if connection.codecs else connection


async def _initialize(connection: Any, init: ConnectionInit, settings: Settings, timeout_seconds: float) -> None:
    """Call the App's connection_init, and set again what may not change."""
    label = dsn_label(settings.dsn)
    what = f"{label}: the App's connection_init"
    try:
        async with asyncio.timeout(timeout_seconds) as limit:
            await init(connection)
    except Exception as error:
        if limit.expired():
            raise Outage(f"{what} took longer than {timeout_seconds:g} s") from error
        if connection.is_closed() or isinstance(error, OSError) or meaning_of(error) is Meaning.OUTAGE:
            raise Outage(f"{what} lost the connection") from error
        # asyncpg's ValueError names a type that does not exist; texts of other errors may hold anything.
        text = redacted_message(error) or (str(error) if str(error).startswith("unknown type: ") else "")
        action = "correct it, or create what it needs"
        if text.startswith("unknown type: public."):
            action += '; types of PostgreSQL itself need schema="pg_catalog"'
        raise Misconfigured(f"{what} failed: {describe(error)}{f' ({text})' if text else ''}; {action}") from error
    if connection.is_in_transaction():
        raise Misconfigured(f"{what}: it left a transaction open; commit it, or begin none")
    if not settings.postgres_pooler:
        with translated_errors(settings):
            await connection.execute(_limits_as_sql(settings))


def _limits_as_sql(settings: Settings) -> str:
    """Return statements that set the limits on which workers rely."""
    limits = session_settings(settings).items()
    return "; ".join(f"set {name} = '{value}'" for name, value in limits if not name.startswith(("tcp", "app")))


async def _connect(settings: Settings, timeout_seconds: float, kind: type[asyncpg.Connection[Any]]) -> Any:
    label = dsn_label(settings.dsn)
    try:
        return await asyncpg.connect(
            settings.dsn,
            connection_class=kind,
            timeout=timeout_seconds,
            ssl=tls.postgres_tls(settings),
            statement_cache_size=0 if settings.postgres_pooler else 100,
            server_settings=None if settings.postgres_pooler else session_settings(settings),
        )
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
        # InvalidPasswordError is among them: waiting does not heal any of these.
        raise Misconfigured(f"{label}: {redacted_message(error)}; check CONSUMER_POSTGRES_DSN") from None
    except ssl.SSLCertVerificationError as error:
        fault = certificate_fault(
            error.verify_code, error.verify_message, "CONSUMER_POSTGRES_CA_FILE", "CONSUMER_POSTGRES_DSN"
        )
        raise Misconfigured(f"{label}: {fault}") from None
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InternalClientError) as error:
        if isinstance(error, ConnectionError) and "rejected SSL upgrade" in str(error):
            raise Misconfigured(f"{label}: no TLS; turn it on, or see CONSUMER_ALLOW_INSECURE") from None
        if isinstance(error, asyncpg.ProtocolViolationError) and "unsupported startup parameter" in str(error):
            raise Misconfigured(f"{label}: it is PgBouncer; set CONSUMER_POSTGRES_POOLER=true") from None
        if isinstance(error, asyncpg.PostgresError) and meaning_of(error) is Meaning.DEPLOYMENT:
            raise Misconfigured(f"{label}: {redacted_message(error)}; check the role's rights and the schema") from None
        raise Outage(f"{label}: {redacted_message(error) or str(error) or type(error).__name__}") from error
    except (ValueError, TypeError, asyncpg.InterfaceError):
        # The driver's text would quote the part that it could not read, which may be of the password.
        raise Misconfigured(
            "CONSUMER_POSTGRES_DSN: not an address that can be used; write postgresql://user:password@host:port/database, "
            "and percent-encode special characters of the password"
        ) from None


async def wait_for(
    attempt: Callable[[float], Awaitable[T]],
    seconds: float,
    *,
    after: Callable[[Outage], float] = lambda outage: PAUSE_SECONDS,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> T:
    """Repeat an attempt until PostgreSQL answers.

    attempt: receives how many seconds it may take. after: receives the outage of a failed attempt, returns the pause
    before the next one. Raises ServiceUnavailable after `seconds`, and any other error of an attempt at once.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + seconds
    while True:
        try:
            return await attempt(min(ATTEMPT_SECONDS, max(_ATTEMPT_SECONDS_MIN, deadline - clock())))
        except Outage as outage:
            pause = after(outage)
            if clock() + pause > deadline:
                raise ServiceUnavailable(f"{outage} (waited {seconds:g} s)") from None
            await sleep(pause)


def session_settings(settings: Settings) -> dict[str, str]:
    """Return the server settings that every connection of ours needs."""
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
    """Convert a limit for PostgreSQL, where 0 would mean no limit."""
    return max(1, round(seconds * 1000))


async def database_epoch(connection: asyncpg.Connection[Any], settings: Settings) -> ServerIdentity:
    """Read which server and epoch a connection leads to.

    Raises NotPrimary for a standby, SchemaMissing for a missing or old schema, and what the driver raises.
    """
    label = dsn_label(settings.dsn)
    standby, migrated = await server.state(connection)
    if standby:
        raise NotPrimary(f"{label}: a standby, which cannot be written to; give the primary's address")
    if not migrated:
        raise SchemaMissing(f"{label}: no ledger yet; run `consumer migrate`")
    version = await server.schema_version(connection)
    if version < SCHEMA_VERSION:
        raise SchemaMissing(
            f"{label}: the ledger is at version {version} and this code needs {SCHEMA_VERSION}; run `consumer migrate`"
        )
    return await server.identify(connection)


def detect_dead_peers(connection: asyncpg.Connection[Any]) -> None:
    """Let the kernel end a connection whose peer is gone.

    Linux has all of these options; elsewhere those that exist are set.
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
