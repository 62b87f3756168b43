"""Kafka as the worker sees it: poll, seek, commit, and two callbacks at a rebalance. With kafka/protocol.py, all that imports aiokafka.

Knows the client and its traps (measured or read in aiokafka 0.14); knows no handler and no database.

- A rebalance runs in the background, is eager, and is not held up by polling: what a callback must drain, it drains.
- `getmany` is never cancelled: that would switch the client's own liveness check off for good. Ours is worker/watchdog.py.
- When `getmany` raises, the records that it had already taken out are gone from the client, and its position may be past
  them. So after any exception every partition is sought back to what was really received.
- It raises what is wrong with one partition for all of them. So a partition that cannot be read is taken out before: its
  fetch by kafka/fetch_proxy.py, its decoding here.
- `commit()` without offsets would commit what was handed out. Offsets are always given.
- It names topics, and a topic made anew has the same name. So fetches are sent by topic id (kafka/protocol.py).
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, NamedTuple
from uuid import UUID

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka import conn as client_connections
from aiokafka.abc import AbstractTokenProvider
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.client import AIOKafkaClient, ConnectionGroup, CoordinationType
from aiokafka.conn import AIOKafkaConnection, OAuthAuthenticator, collect_hosts
from aiokafka.consumer.fetcher import FetchResult, PartitionRecords
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberMetadata
from aiokafka.errors import (
    AuthenticationFailedError,
    IllegalSaslStateError,
    IllegalStateError,
    InvalidSessionTimeoutError,
    LeaderNotAvailableError,
    OffsetOutOfRangeError,
    SaslAuthenticationFailed,
    UnknownError,
    UnknownTopicOrPartitionError,
    UnsupportedSaslMechanismError,
    for_code,
)
from aiokafka.errors import CorruptRecordException as CorruptRecordException
from aiokafka.errors import KafkaError as KafkaError
from aiokafka.helpers import create_ssl_context
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.record.memory_records import MemoryRecords

from consumer import tls
from consumer.core.errors import CannotTell, Misconfigured, ServiceUnavailable
from consumer.core.hosts import certificate_fault
from consumer.core.identity import fingerprint
from consumer.core.log_identity import Print, Reason
from consumer.core.message import LogRecord, Partition, Record
from consumer.core.partition_faults import Failure, stop_of
from consumer.kafka import decompression, record_batch
from consumer.kafka.brokers import EARLIEST, LATEST, Brokers
from consumer.kafka.decompression import Damaged, TooLarge
from consumer.kafka.fetch_proxy import FetchingById
from consumer.kafka.oauth import Bearer, NoToken, find
from consumer.kafka.protocol import Identity as Identity
from consumer.kafka.protocol import TopicIds, Unsupported
from consumer.logs import describe, event
from consumer.settings import Settings

MEMBER_MARK = b"idempotent-consumer"  # sent when a worker joins its group
REBALANCE_SECONDS = 60  # how long the group waits for every member to have drained
_REQUEST_SECONDS = 10
_ATTEMPT_SECONDS_MIN = 0.5
_READ_UNCOMMITTED, _READ_COMMITTED = 0, 1
_OUT_OF_RANGE = 1
_PEEK_WAIT_MS = 50  # Kafka answers at once, since no byte is waited for; Tansu says nothing without any time
_WAIT_MS, _WAIT_BRIEFLY_MS = 500, 50  # of a fetch that finds nothing, at the broker
_DELAY_SECONDS = 0.25  # between fetches that the broker cannot answer at the moment
_EMPTY_SECONDS = 3.0  # then a partition of which nothing comes is asked for alone
_DELAYED_SECONDS_MAX = 30.0  # then it is reported
_THROTTLE_TOLD_SECONDS = 60.0
_ASKED_AT_A_TIME = 32
_PARTIAL_SECONDS = 3.0

Callback = Callable[[set[Partition]], Awaitable[None]]


class LogTruncated(Exception):
    """The broker refused a fetch position: records were removed, or the log is not the one that it belongs to."""

    def __init__(self, partition: Partition, position: int) -> None:
        super().__init__(f"{partition.topic}:{partition.partition} does not hold offset {position}")
        self.partition = partition
        self.position = position


class PartitionUnreadable(CannotTell):
    """A command cannot read a partition from an offset on."""

    def __init__(self, partition: Partition, failure: Failure) -> None:
        stop = stop_of(partition, failure)
        around = "; leave them out with --from and --to" if stop.missing else f"; {stop.do}"
        super().__init__(f"{partition.topic}:{partition.partition}: {stop.text}{around}")
        self.partition = partition
        self.failure = failure


class Peek(NamedTuple):
    """What the leader tells of a log: its ends, and the bytes from the offset on that was asked for, open transactions included."""

    out_of_range: bool
    first: int
    stable_end: int
    end: int
    records: bytes


class OpenTransaction(NamedTuple):
    """A producer's transaction that is neither committed nor aborted: nothing from `offset` on is handed out."""

    offset: int
    since_ms: int  # the time that its first record bears, since 1970


def client_id(settings: Settings, app: str | None = None, worker: str | None = None) -> str:
    """The name that quotas, broker logs and metrics of Kafka know this client by."""
    if settings.kafka_client_id is not None:
        return settings.kafka_client_id
    parts = [each for each in ("consumer", app, worker) if each]
    return re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(parts))


def connection_options(settings: Settings, app: str | None = None, worker: str | None = None) -> dict[str, Any]:
    """What every client of this broker needs. Raises Misconfigured for unusable certificates, and for a connection in clear."""
    tls.check_kafka(settings)
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_bootstrap_servers,
        "security_protocol": settings.kafka_security_protocol,
        "client_id": client_id(settings, app, worker),
    }
    if "SSL" in settings.kafka_security_protocol.replace("SASL", ""):
        try:
            options["ssl_context"] = create_ssl_context(
                cafile=settings.kafka_security_ca_file,
                certfile=settings.kafka_security_cert_file,
                keyfile=settings.kafka_security_key_file,
            )
        except (OSError, ssl.SSLError) as error:
            raise Misconfigured(f"CONSUMER_KAFKA_SECURITY_CA_FILE, _CERT_FILE or _KEY_FILE: {error}") from None
    if settings.kafka_security_protocol.startswith("SASL"):
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        if settings.kafka_sasl_mechanism == "OAUTHBEARER":
            if settings.kafka_sasl_token_provider is None:
                raise Misconfigured("SASL OAUTHBEARER needs CONSUMER_KAFKA_SASL_TOKEN_PROVIDER=module:callable")
            options["sasl_oauth_token_provider"] = _Tokens(Bearer(find(settings.kafka_sasl_token_provider)))
        elif settings.kafka_sasl_username is None or settings.kafka_sasl_password is None:
            raise Misconfigured("SASL needs CONSUMER_KAFKA_SASL_USERNAME and CONSUMER_KAFKA_SASL_PASSWORD")
        else:
            options |= {
                "sasl_plain_username": settings.kafka_sasl_username,
                "sasl_plain_password": settings.kafka_sasl_password.get_secret_value(),
            }
    return options


class _NoToken(KafkaError):  # type: ignore[misc]
    """NoToken as the client knows errors: it tries again."""


class _Tokens(AbstractTokenProvider):  # type: ignore[misc]
    def __init__(self, bearer: Bearer) -> None:
        self._bearer = bearer

    async def token(self) -> str:
        try:
            return await self._bearer.token()
        except NoToken as error:
            raise _NoToken(str(error)) from None

    def refused(self) -> None:
        self._bearer.refused()


class _Authenticator(OAuthAuthenticator):  # type: ignore[misc]
    """The client's own takes a refused token for accepted, and waits for metadata for ever (seen with aiokafka 0.14).

    A broker that refuses a token says why in an answer without an error code, and waits for one more byte before it sends
    the code (RFC 7628, 3.2.3).
    """

    async def step(self, payload: bytes | None) -> tuple[bytes, bool] | None:
        if self._token_sent and payload:
            self._sasl_oauth_token_provider.refused()
            return b"\x01", True
        return await super().step(payload)  # type: ignore[no-any-return]


client_connections.OAuthAuthenticator = _Authenticator


async def started(make: Callable[[], Any], settings: Settings, wait_seconds: float) -> Any:
    """A started client, waited for.

    Raises ServiceUnavailable after `wait_seconds`, and Misconfigured for what waiting does not heal: refused credentials, and
    a certificate that is not accepted.
    """
    servers = settings.kafka_bootstrap_servers
    clock = asyncio.get_running_loop().time
    deadline = clock() + wait_seconds
    pause, told = 0.2, False
    while True:
        client = None
        try:
            client = make()
            async with asyncio.timeout(min(_REQUEST_SECONDS, max(_ATTEMPT_SECONDS_MIN, deadline - clock()))):
                await client.start()
            return client
        except ValueError as error:
            await _discard(client)
            raise Misconfigured(f"CONSUMER_KAFKA_BOOTSTRAP_SERVERS={servers}: {error}") from None
        except (KafkaError, OSError, AssertionError) as error:  # TimeoutError is an OSError
            await _discard(client)
            why = await _ask_why(settings)
            if clock() + pause > deadline:
                raise ServiceUnavailable(
                    f"Kafka at {servers} did not answer within {wait_seconds:g} s: {why or str(error) or type(error).__name__}"
                ) from None
        except BaseException:
            await _discard(client)
            raise
        if not told:
            event(logging.WARNING, "waiting for kafka", servers=servers)
            told = True
        await asyncio.sleep(pause)
        pause = min(2.0, pause * 2)


async def _discard(client: Any) -> None:
    """Stop what did not start: else the client complains of it when it is collected."""
    if client is not None:
        with suppress(Exception):
            await (client.close() if isinstance(client, AIOKafkaAdminClient) else client.stop())


async def _ask_why(settings: Settings) -> str:
    """Why a broker turns us away, if it can be told: while bootstrapping, the client reports all of it as a broker that is down.

    Raises Misconfigured for what waiting does not heal.
    """
    servers, protocol = settings.kafka_bootstrap_servers, settings.kafka_security_protocol
    if protocol == "PLAINTEXT":
        return ""
    options = {name: value for name, value in connection_options(settings).items() if name != "bootstrap_servers"}
    why = ""
    for host, port, _ in collect_hosts(servers):
        connection = AIOKafkaConnection(host, int(port), request_timeout_ms=3000, **options)
        try:
            await asyncio.wait_for(connection.connect(), 3)
            return ""
        except ssl.SSLCertVerificationError as error:
            fault = certificate_fault(
                error.verify_code,
                error.verify_message,
                "CONSUMER_KAFKA_SECURITY_CA_FILE",
                "CONSUMER_KAFKA_BOOTSTRAP_SERVERS and in what the broker advertises",
            )
            raise Misconfigured(f"Kafka at {host}:{port}: {fault}") from None
        except UnsupportedSaslMechanismError as error:
            raise Misconfigured(
                f"Kafka at {servers} does not offer {settings.kafka_sasl_mechanism} there: CONSUMER_KAFKA_SASL_MECHANISM "
                f"({type(error).__name__})"
            ) from None
        except (AuthenticationFailedError, SaslAuthenticationFailed, IllegalSaslStateError) as error:
            given = "_TOKEN_PROVIDER" if settings.kafka_sasl_mechanism == "OAUTHBEARER" else "_USERNAME, _PASSWORD"
            raise Misconfigured(
                f"Kafka at {servers} refused the SASL credentials ({type(error).__name__}): CONSUMER_KAFKA_SASL{given}"
            ) from None
        except ssl.SSLError as error:
            why = f"no TLS with {host}:{port} ({error.reason}): is CONSUMER_KAFKA_SECURITY_PROTOCOL={protocol} right for this port?"
        except _NoToken as error:
            why = str(error)
        except ConnectionRefusedError:
            continue
        except (KafkaError, OSError, TimeoutError) as error:
            why = f"{type(error).__name__}: is CONSUMER_KAFKA_SECURITY_PROTOCOL={protocol} right for {host}:{port}?"
        finally:
            connection.close()
    return why


class Source:
    """One member of a consumer group, or a reader without one."""

    def __init__(self, settings: Settings, group: str | None, worker: str | None = None) -> None:
        self._settings = settings
        self._group = group
        self._worker = worker
        self._consumer: AIOKafkaConsumer | None = None
        self._known: Brokers | None = None
        self._ids: dict[Partition, UUID] = {}
        # Called with a partition whose topic the broker does not have under the id that `go_on` was given: it is paused.
        self.on_refused: Callable[[Partition], None] = lambda _: None
        # Called with a partition that cannot be read: it is paused. None: `poll` raises PartitionUnreadable.
        self.on_failed: Callable[[Partition, Failure], None] | None = None
        # Called with a partition that was read to its end.
        self.on_nothing_new: Callable[[Partition], None] = lambda _: None
        self._failures: dict[Partition, Failure] = {}
        self._bad_headers: dict[Partition, int] = {}  # and the offset from which it is read in another way
        self._unreadable_to: dict[
            Partition, tuple[int, int]
        ] = {}  # the first and the last offset that brokers cannot read
        self._empty: dict[Partition, tuple[int, float]] = {}  # of which nothing came from an offset, and since when
        self._to_probe: dict[Partition, int] = {}
        self._delayed: dict[Partition, float] = {}  # whose fetches the broker cannot answer, and since when
        self._delay_paused: set[Partition] = set()
        self._asking = asyncio.Semaphore(_ASKED_AT_A_TIME)
        self.throttled_seconds = 0.0  # all that quotas have cost so far
        self._throttle_told_at = float("-inf")

    def _make(self) -> AIOKafkaConsumer:
        settings = self._settings
        session = int(settings.kafka_session_timeout_seconds * 1000)
        return AIOKafkaConsumer(
            **connection_options(settings, self._group, self._worker),
            group_id=self._group,
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="none",
            session_timeout_ms=session,
            heartbeat_interval_ms=min(int(settings.kafka_heartbeat_seconds * 1000), session // 3),
            rebalance_timeout_ms=REBALANCE_SECONDS * 1000,
            partition_assignment_strategy=(_Assignor,),
            # Full buffers stop the polling for as long as a batch takes; a member that does nothing is found otherwise.
            max_poll_interval_ms=24 * 3600 * 1000,
            metadata_max_age_ms=10_000,  # new topics and partitions are noticed within this time
            max_partition_fetch_bytes=settings.kafka_partition_fetch_bytes_max,
            request_timeout_ms=40_000,
            fetch_max_wait_ms=_WAIT_MS,
        )

    async def start(self, wait_seconds: float) -> None:
        """Connect. Raises ServiceUnavailable or Misconfigured."""
        decompression.prepare(self._settings.kafka_batch_decompressed_bytes_max)
        self._consumer = await started(self._make, self._settings, wait_seconds)
        self._known = Brokers(self._consumer._client)
        fetcher = self._consumer._fetcher
        fetcher._records = _Fetched(fetcher._records, self._guarded)
        fetcher._client = FetchingById(fetcher._client, self._ids, self)

    # -- what kafka/fetch_proxy.py tells --------------------------------------------------------------------------------------

    def refused(self, partition: Partition) -> None:
        """Pause a partition whose topic is another one now."""
        self.pause(partition)
        self.on_refused(partition)

    def failed(self, partition: Partition, failure: Failure) -> None:
        """Pause a partition that cannot be read; `poll` reports it."""
        if self._stands_at(partition, failure.first):
            self.pause(partition)
            self._failures[partition] = failure

    def delayed(self, partition: Partition, why: str) -> None:
        """Leave a partition alone for a moment; one that is delayed for long cannot be read."""
        loop = asyncio.get_running_loop()
        since = self._delayed.setdefault(partition, loop.time())
        tp = TopicPartition(*partition)
        with suppress(IllegalStateError):
            if loop.time() - since > _DELAYED_SECONDS_MAX:
                del self._delayed[partition]
                offset = self.consumer._subscription.subscription.assignment.state_value(tp).position
                failure = Failure(Reason.BROKER_ERROR, f"they answer {why}", offset)
                if why == UnknownError.__name__:  # what a broker answers that meets something broken itself
                    failure = Failure(Reason.DAMAGED, f"the broker answers {why}", offset, is_brokers=True)
                self.failed(partition, failure)
            elif tp in self.consumer.assignment() and tp not in self.consumer.paused():
                self.consumer.pause(tp)
                self._delay_paused.add(partition)
                loop.call_later(_DELAY_SECONDS, self._end_delay, partition)

    def _end_delay(self, partition: Partition) -> None:
        if partition in self._delay_paused:
            self.resume(partition)

    def nothing_new(self, partition: Partition) -> None:
        """Note that a partition can be read, though it holds nothing new."""
        self._delayed.pop(partition, None)
        self._empty.pop(partition, None)
        self.on_nothing_new(partition)

    def empty(self, partition: Partition, offset: int) -> None:
        """Note that a fetch gave nothing although there is more: other partitions had all the room, or it is damaged."""
        now = asyncio.get_running_loop().time()
        known, since = self._empty.get(partition, (offset, now))
        self._empty[partition] = (offset, since if known == offset else now)
        if known == offset and now - since > _EMPTY_SECONDS and self._stands_at(partition, offset):
            self._to_probe[partition] = offset

    def throttled(self, seconds: float) -> None:
        """Count what a quota costs, and log it now and then."""
        self.throttled_seconds += seconds
        now = asyncio.get_running_loop().time()
        if now - self._throttle_told_at > _THROTTLE_TOLD_SECONDS:
            self._throttle_told_at = now
            event(
                logging.WARNING,
                "kafka throttles the worker: a quota is used up",
                client_id=client_id(self._settings, self._group, self._worker),
                seconds=round(seconds, 1),
                total_seconds=round(self.throttled_seconds, 1),
            )

    def _stands_at(self, partition: Partition, offset: int) -> bool:
        """Whether a partition is being read from an offset; else what is told of it is about the past."""
        tp = TopicPartition(*partition)
        subscription = self.consumer._subscription.subscription
        assignment = subscription.assignment if subscription is not None else None
        if assignment is None or tp not in assignment.tps:
            return False
        state = assignment.state_value(tp)
        return bool(state.has_valid_position and state.position == offset and not state.paused)

    def _guarded(self, partition: Partition, reader: Any, records: Iterator[Any]) -> Iterator[Any]:
        """Decoded records up to what cannot be decoded, which is noted instead of raised."""
        try:
            yield from records
        except UnicodeDecodeError:
            self._bad_headers[partition] = reader.next_fetch_offset
        except Exception as error:
            first = reader.next_fetch_offset
            last = _last_on_stack(error.__traceback__)
            if last is not None and last < first:
                return  # all offsets of the batch were handed out: the next fetch begins behind it
            reason, text = _decoding_failure(error, self._settings)
            self.pause(partition)
            self._failures[partition] = Failure(reason, text, first, last)

    @property
    def consumer(self) -> AIOKafkaConsumer:
        assert self._consumer is not None, "start() comes first"
        return self._consumer

    @property
    def _brokers(self) -> Brokers:
        assert self._known is not None, "start() comes first"
        return self._known

    def subscribe(self, topics: Sequence[str], on_revoked: Callback, on_assigned: Callback) -> None:
        """Join the group. A topic that does not exist yet is consumed as soon as it does."""
        self.consumer.subscribe(topics=list(topics), listener=_Listener(on_revoked, on_assigned))

    def assign(self, partitions: Iterable[Partition]) -> None:
        """Read these partitions, without a group."""
        self.consumer.assign([TopicPartition(*each) for each in partitions])

    @property
    def member_id(self) -> str:
        """The member id in the group, empty before the first join."""
        coordinator = getattr(self.consumer, "_coordinator", None)
        return getattr(coordinator, "member_id", "") or ""

    async def poll(
        self, timeout_seconds: float, received: Callable[[Partition], int | None]
    ) -> dict[Partition, Sequence[Record]]:
        """Fetched records by partition, in offset order. Never cancel it.

        received: the next offset wanted, for partitions that are being consumed. Raises LogTruncated for a partition
        whose position the log does not hold, and PartitionUnreadable where `on_failed` is not set; it is paused then. A
        record with a header key that is not UTF-8 comes as a LogRecord in its place.
        """
        try:
            found = await self.consumer.getmany(timeout_ms=int(timeout_seconds * 1000))
        except OffsetOutOfRangeError as error:
            self._seek_back(received)
            partition, position = next(iter(error.args[0].items()))
            with suppress(IllegalStateError):
                self.consumer.pause(TopicPartition(*partition))
            raise LogTruncated(Partition(*partition), position) from None
        except InvalidSessionTimeoutError:
            raise Misconfigured(
                f"Kafka refuses CONSUMER_KAFKA_SESSION_TIMEOUT_SECONDS={self._settings.kafka_session_timeout_seconds:g}: "
                "it must lie between the broker's group.min.session.timeout.ms and group.max.session.timeout.ms"
            ) from None
        except BaseException:
            self._seek_back(received)
            raise
        if self._delayed:
            for partition in found:
                self._delayed.pop(Partition(*partition), None)
        if self._bad_headers or self._failures or self._to_probe:
            return await self._with_unreadable(found)
        return found  # type: ignore[no-any-return]

    async def _with_unreadable(self, found: dict[Any, Sequence[Record]]) -> dict[Partition, Sequence[Record]]:
        """What was fetched, with records that the client cannot decode and we can; reports what nobody can."""
        all_found: dict[Partition, Sequence[Record]] = {Partition(*each): records for each, records in found.items()}
        bad_headers, self._bad_headers = self._bad_headers, {}
        for partition, offset in bad_headers.items():
            try:
                all_found[partition] = [*all_found.get(partition, ()), *await self._with_bad_header(partition, offset)]
            except Exception as error:
                event(logging.DEBUG, "a batch cannot be fetched again yet", error=describe(error))
        to_probe, self._to_probe = self._to_probe, {}
        for partition, offset in to_probe.items():
            await self._probe(partition, offset)
        failures, self._failures = self._failures, {}
        for partition, known in failures.items():
            failure = await self._with_next_readable(partition, known)
            if self.on_failed is None:
                raise PartitionUnreadable(partition, failure)
            self.on_failed(partition, failure)
        return {partition: records for partition, records in all_found.items() if records}

    def _seek_back(self, received: Callable[[Partition], int | None]) -> None:
        for each in self.consumer.assignment():
            offset = received(Partition(*each))
            if offset is not None:
                self.consumer.seek(each, offset)

    async def _probe(self, partition: Partition, offset: int) -> None:
        """Ask for a partition alone: whether the broker gives anything from an offset, at which it says that there is more."""
        try:
            gives = await self._gives(partition, offset)
        except (KafkaError, TimeoutError):
            return
        self._empty.pop(partition, None)
        if not gives:
            text = "the broker gives nothing from there although the log goes on"
            self.failed(partition, Failure(Reason.DAMAGED, text, offset, is_brokers=True))

    async def _with_next_readable(self, partition: Partition, failure: Failure) -> Failure:
        """A failure with the last offset that the broker cannot give, where it is the broker that cannot read on.

        Looks in ever larger steps, then between the last two: behind damage the broker may give nothing of a whole segment.
        """
        if not failure.is_brokers:
            return failure
        if (known := self._unreadable_to.get(partition)) is not None and known[0] == failure.first:
            return failure._replace(last=known[1])
        broken, step = failure.last or failure.first, 1
        try:
            end = (await self.ends([partition], partial=True)).get(partition, broken + 1)
            readable = broken + 1
            while readable < end and not await self._gives(partition, readable):
                broken, step = readable, step * 2
                readable = min(end, readable + step)
            while readable - broken > 1:
                middle = (readable + broken) // 2
                broken, readable = (broken, middle) if await self._gives(partition, middle) else (middle, readable)
        except (KafkaError, TimeoutError):
            return failure
        self._unreadable_to[partition] = failure.first, readable - 1
        return failure._replace(last=readable - 1)

    async def _gives(self, partition: Partition, offset: int) -> bool:
        """Whether the broker gives anything from an offset on."""
        try:
            found = await self.peek(partition, offset)
        except KafkaError as error:
            if error.retriable and not isinstance(error, CorruptRecordException):
                raise
            return False
        return bool(found.records) or found.stable_end <= offset

    async def _with_bad_header(self, partition: Partition, wanted: int) -> list[Record]:
        """The records from `wanted` up to the end of the batch with a header key that is not UTF-8, read by ourselves."""
        log, aborted = await self._fetch_raw(partition, wanted)
        if not self._stands_at(partition, wanted):
            return []  # read from somewhere else meanwhile
        tp = TopicPartition(*partition)
        reader = PartitionRecords(tp, MemoryRecords(log), aborted, wanted, None, None, True, _READ_COMMITTED)
        reader._consumer_record = _record
        found: list[Record] = []
        try:
            found.extend(reader)  # what stands before it, with aborted transactions left out
        except UnicodeDecodeError:
            for header, body in record_batch.batches(log):
                if header.last_offset >= reader.next_fetch_offset:
                    entries = record_batch.entries(header, decompression.BY_CODEC[header.codec](body))
                    found += [_raw(partition, each) for each in entries if each.offset >= reader.next_fetch_offset]
                    break
        if found:
            self.consumer.seek(tp, found[-1].offset + 1)
        return found

    async def _fetch_raw(self, partition: Partition, offset: int) -> tuple[bytes, Any]:
        """The log from `offset` on as bytes, and the aborted transactions in it."""
        most = self._settings.kafka_partition_fetch_bytes_max
        _, _, _, _, _, aborted, *_, log = await self._ask_leader(partition, offset, 1, most, _READ_COMMITTED, 500)
        return bytes(log), aborted

    async def _ask_leader(
        self, partition: Partition, offset: int, least: int, most: int, isolation_level: int, wait_ms: int
    ) -> Any:
        """The leader's answer to a fetch of one partition, as the client would read it. Raises KafkaError.

        least: bytes to wait for. most: bytes of the log, though it gives the first batch whole.
        """
        wanted = [(partition.topic, [(partition.partition, offset, most)])]
        request = FetchRequest(wait_ms, least, most, isolation_level, wanted, rack_id="")
        async with self._asking:
            leader = await self._brokers.leader_of(partition)
            try:
                response = await self._brokers.ask(leader, request)
            except (KafkaError, TimeoutError):
                self._brokers.forget_leader(partition)
                raise
        if not response.topics:  # throttled, or an imitation of Kafka that had no time
            raise LeaderNotAvailableError(f"{partition.topic}:{partition.partition}")
        found = response.topics[0][1][0]
        if found[1] not in (0, _OUT_OF_RANGE):
            self._brokers.forget_leader(partition)
        return found

    # -- what a log is ----------------------------------------------------------------------------------------------

    async def identity(self, topics: Sequence[str]) -> Identity:
        """The cluster's id and those of topics, as one broker knows them now; empty where none can tell. Raises KafkaError."""
        try:
            answer = await self._brokers.ask_anyone(TopicIds(list(topics)))
        except Unsupported:
            return Identity(None, {})
        return Identity.read(answer)

    async def peek(self, partition: Partition, offset: int) -> Peek:
        """Ask the leader about a log, without reading on. Raises KafkaError."""
        _, error, high, stable, first, _, _, records = await self._ask_leader(
            partition, offset, 0, 1, _READ_UNCOMMITTED, _PEEK_WAIT_MS
        )
        if error not in (0, _OUT_OF_RANGE):
            raise for_code(error)(f"{partition.topic}:{partition.partition}")
        return Peek(error == _OUT_OF_RANGE, first, stable, high, bytes(records or b""))

    async def print_at(self, partition: Partition, offset: int) -> Print | None:
        """The record at an offset, as a position keeps it; None where there is none. Raises KafkaError."""
        found = await self.record_at(partition, offset)
        return None if found is None else Print(offset, found.timestamp, fingerprint(found.value))

    async def record_at(self, partition: Partition, offset: int) -> LogRecord | None:
        """The record at an offset, without its headers; None where there is none. Raises KafkaError."""
        found = await self.peek(partition, offset)
        for header, body in record_batch.batches(found.records):
            if header.base_offset <= offset <= header.last_offset:
                try:
                    for each in record_batch.entries(header, decompression.BY_CODEC[header.codec](body)):
                        if each.offset == offset:
                            return LogRecord(*partition, offset, each.timestamp, each.key, each.value, ())
                except (Damaged, TooLarge, ValueError, KeyError):
                    return None  # a batch that cannot be read proves nothing
        return None

    async def open_transaction(self, partition: Partition) -> OpenTransaction | None:
        """The transaction that holds a log's readers back, if there is one. Raises KafkaError."""
        stable = (await self.ends([partition]))[partition]
        found = await self.peek(partition, stable)
        if found.stable_end >= found.end or found.stable_end != stable:
            return None
        for header, _ in record_batch.batches(found.records):
            if header.last_offset >= stable:
                return OpenTransaction(stable, header.first_timestamp)
        return None

    def held_back_at(self, partition: Partition) -> int | None:
        """The offset at which an open transaction holds readers back, as of the last fetch; None where none does."""
        if self.is_assigned(partition):
            end = self.consumer.highwater(TopicPartition(*partition))
            stable = self.consumer.last_stable_offset(TopicPartition(*partition))
            if end is not None and stable is not None and 0 <= stable < end:
                return int(stable)
        return None

    # -- positions --------------------------------------------------------------------------------------------------

    def is_assigned(self, partition: Partition) -> bool:
        return TopicPartition(*partition) in self.consumer.assignment()

    def is_leaderless(self, partition: Partition) -> bool:
        """Whether the brokers, as of their last answer, know the partition and no leader of it."""
        cluster = self.consumer._client.cluster
        return bool(cluster.leader_for_partition(TopicPartition(*partition)) == -1)

    def hold(self, partition: Partition) -> None:
        """Do not fetch a partition until `go_on`. Its position is set to something, so that the client asks nobody."""
        self._forget(partition)
        with suppress(IllegalStateError):
            self.consumer.pause(TopicPartition(*partition))
            self.consumer.seek(TopicPartition(*partition), 0)

    def _forget(self, partition: Partition) -> None:
        """What was noted of a partition is about another offset than it is read from now."""
        self._failures.pop(partition, None)
        self._bad_headers.pop(partition, None)
        self._to_probe.pop(partition, None)
        self._delay_paused.discard(partition)

    def pause(self, partition: Partition) -> None:
        """Fetch nothing more of a partition, and keep its position."""
        self._delay_paused.discard(partition)
        with suppress(IllegalStateError):
            self.consumer.pause(TopicPartition(*partition))

    def resume(self, partition: Partition) -> None:
        """Fetch a paused partition again, from where it was."""
        self._delay_paused.discard(partition)
        with suppress(IllegalStateError):
            self.consumer.resume(TopicPartition(*partition))

    def expect_more(self, soon: bool) -> None:
        """Say whether paused partitions are to be read on soon.

        The client has one fetch at a time on its way to a broker, and one that finds nothing waits there for half a second. A
        partition that is resumed meanwhile waits as long: where the others were idle, one busy partition was read at
        27,000 messages a second, and is at 60,000 since.
        """
        self.consumer._fetcher._fetch_max_wait_ms = _WAIT_BRIEFLY_MS if soon else _WAIT_MS

    def go_on(self, partition: Partition, offset: int, topic_id: UUID | None = None) -> None:
        """Fetch a partition from `offset`, of the topic with that id and of no other (None: of whatever has its name)."""
        if topic_id is None:
            self._ids.pop(partition, None)
        else:
            self._ids[partition] = topic_id
        self._forget(partition)
        with suppress(IllegalStateError):
            self.consumer.seek(TopicPartition(*partition), offset)
            self.consumer.resume(TopicPartition(*partition))

    async def position(self, partition: Partition) -> int | None:
        """The next offset that the client will hand out: past markers and aborted records, which it hands to nobody."""
        with suppress(IllegalStateError):
            return int(await self.consumer.position(TopicPartition(*partition)))
        return None

    async def committed(self, partition: Partition) -> int | None:
        """The group's committed offset. Raises KafkaError."""
        offset = await asyncio.wait_for(self.consumer.committed(TopicPartition(*partition)), _REQUEST_SECONDS)
        return None if offset is None else int(offset)

    async def copies(self, partitions: Sequence[Partition]) -> dict[Partition, tuple[int, str]]:
        """The group's committed offsets, each with what was written beside it, in one request. Raises KafkaError."""
        coordinator = self.consumer._coordinator  # no public way to it
        wanted = [TopicPartition(*each) for each in partitions]
        found = await asyncio.wait_for(coordinator.fetch_committed_offsets(wanted), _REQUEST_SECONDS)
        return {Partition(*each): (int(at.offset), at.metadata or "") for each, at in found.items()}

    async def beginnings(self, partitions: Sequence[Partition], *, partial: bool = False) -> dict[Partition, int]:
        """First offsets that the log holds. partial: without those that cannot be told now. Raises KafkaError."""
        return await self._offsets(dict.fromkeys(partitions, EARLIEST), partial)

    async def ends(
        self, partitions: Sequence[Partition], *, partial: bool = False, uncommitted: bool = False
    ) -> dict[Partition, int]:
        """Ends of the log as far as it is committed. Raises KafkaError.

        partial: without those that cannot be told now. uncommitted: with the records of open transactions.
        """
        level = _READ_UNCOMMITTED if uncommitted else _READ_COMMITTED
        return await self._offsets(dict.fromkeys(partitions, LATEST), partial, level)

    async def _offsets(
        self, wanted: dict[Partition, int], partial: bool, level: int = _READ_COMMITTED
    ) -> dict[Partition, int]:
        seconds = _PARTIAL_SECONDS if partial else _REQUEST_SECONDS
        found, problems = await self._brokers.offsets(wanted, level, seconds)
        if problems and not partial:
            raise next(iter(problems.values()))
        return {each: at or 0 for each, at in found.items()}

    async def offsets_at(self, partitions: Sequence[Partition], time_ms: int) -> dict[Partition, int | None]:
        """Offsets of the first records of that time or later, None where there are none. Raises KafkaError."""
        found, problems = await self._brokers.offsets(dict.fromkeys(partitions, time_ms), _READ_COMMITTED)
        if problems:
            raise next(iter(problems.values()))
        return found

    async def partitions(self, topics: Iterable[str]) -> dict[str, list[Partition]]:
        """The partitions of each topic, none for a topic that does not exist. Raises KafkaError."""
        wanted = list(topics)
        found = await self._brokers.partitions(wanted)
        return {topic: [Partition(topic, each) for each in sorted(found.get(topic, ()))] for topic in wanted}

    async def commit(self, positions: Mapping[Partition, tuple[int, str]]) -> bool:
        """Copy positions to Kafka, each with a note. Best effort: False when a rebalance or an outage came between, which is normal."""
        wanted = {TopicPartition(*each): copied for each, copied in positions.items() if self.is_assigned(each)}
        if not wanted:
            return True
        try:
            await asyncio.wait_for(self.consumer.commit(wanted), 5)
        except (KafkaError, TimeoutError) as error:
            event(logging.DEBUG, "offset commit failed; positions are in PostgreSQL", error=describe(error))
            return False
        return True

    async def stop(self, timeout_seconds: float) -> None:
        """Leave the group and disconnect, or give up after the timeout."""
        if self._consumer is None:
            return
        task = asyncio.current_task()
        cancelled = task.cancelling() if task is not None else 0
        try:
            await asyncio.wait_for(self._consumer.stop(), timeout_seconds)
        except asyncio.CancelledError:
            # Since Python 3.12 the client's own cancelled tasks come out here: they must not hide why this stops.
            if task is not None and task.cancelling() > cancelled:
                raise
        except Exception:  # noqa: S110 - it is gone either way
            pass


class _Fetched(OrderedDict[Any, Any]):
    """What the client has fetched and not handed out: made to hand out light records instead of its own, and to raise nothing.

    Its own are dataclasses of eleven fields: a fifth of a replay's CPU time, and work for the collector of cycles.
    """

    def __init__(self, content: Any, guarded: Callable[[Partition, Any, Iterator[Any]], Iterator[Any]]) -> None:
        super().__init__(content)
        self._guarded = guarded

    def __setitem__(self, partition: Any, found: Any) -> None:
        if isinstance(found, FetchResult):
            reader = found._partition_records
            reader._consumer_record = _record
            reader._records_iterator = self._guarded(Partition(*partition), reader, reader._records_iterator)
        super().__setitem__(partition, found)


def _record(partition: Any, record: Any) -> LogRecord:
    topic, number = partition
    return LogRecord(topic, number, record.offset, record.timestamp, record.key, record.value, tuple(record.headers))


class _Assignor(RoundRobinPartitionAssignor):  # type: ignore[misc]
    """The client's default, which also tells the group that this member is a worker: see kafka/group.py."""

    @classmethod
    def metadata(cls, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        return ConsumerProtocolMemberMetadata(cls.version, list(topics), MEMBER_MARK)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Hands rebalances to the worker. The client logs and swallows exceptions, so the worker's callbacks raise none."""

    def __init__(self, on_revoked: Callback, on_assigned: Callback) -> None:
        self._on_revoked = on_revoked
        self._on_assigned = on_assigned

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._on_revoked({Partition(*each) for each in revoked})

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        await self._on_assigned({Partition(*each) for each in assigned})


def _last_on_stack(trace: TracebackType | None) -> int | None:
    """The last offset of the batch that the client was decoding when it raised, as far as the batch can tell."""
    batch = None
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "_unpack_records":
            batch = trace.tb_frame.f_locals.get("next_batch")
        trace = trace.tb_next
    try:
        return int(batch.next_offset) - 1 if batch is not None else None
    except Exception:
        return None


def _decoding_failure(error: Exception, settings: Settings) -> tuple[Reason, str]:
    """Why a batch cannot be decoded, in words that quote nothing of it."""
    if isinstance(error, TooLarge):
        most = settings.kafka_batch_decompressed_bytes_max
        return (
            Reason.TOO_LARGE,
            f"the batch decompresses to more than {most:,} bytes (CONSUMER_KAFKA_BATCH_DECOMPRESSED_BYTES_MAX)",
        )
    if isinstance(error, CorruptRecordException):
        return Reason.DAMAGED, "the batch is damaged (its checksum or its records do not fit)"
    if isinstance(error, Damaged):
        return Reason.DAMAGED, f"the batch is damaged ({error})"
    if isinstance(error, MemoryError):
        return Reason.TOO_LARGE, "there is not enough memory for the batch"
    return Reason.DAMAGED, f"the batch cannot be decoded ({type(error).__name__})"


def _raw(partition: Partition, entry: record_batch.Entry) -> LogRecord:
    escaped = any("\udc80" <= each <= "\udcff" for key, _ in entry.headers for each in key)
    return LogRecord(
        topic=partition.topic,
        partition=partition.partition,
        offset=entry.offset,
        timestamp=entry.timestamp,
        key=entry.key,
        value=entry.value,
        headers=entry.headers,
        fault="a header key is not UTF-8" if escaped else "",
    )


@asynccontextmanager
async def producing(settings: Settings, *, idempotent: bool = False) -> AsyncIterator[AIOKafkaProducer]:
    """A producer; on leaving, what was sent is acknowledged by all replicas in sync, or an error is raised.

    idempotent: its retries neither repeat nor reorder what it sends, as far as the broker can do that.
    """
    producer = await started(
        lambda: AIOKafkaProducer(
            **connection_options(settings), acks="all", linger_ms=5, enable_idempotence=idempotent
        ),
        settings,
        settings.wait_seconds,
    )
    try:
        yield producer
        await producer.flush()
    finally:
        await producer.stop()


async def group_offsets(settings: Settings, group: str) -> dict[Partition, int]:
    """What a group has committed, asked without joining it. Raises KafkaError or Misconfigured.

    A cluster that no group has used before makes the topic of the offsets first: that is waited for.
    """
    admin = await started(lambda: AIOKafkaAdminClient(**connection_options(settings)), settings, settings.wait_seconds)
    clock = asyncio.get_running_loop().time
    deadline = clock() + settings.wait_seconds
    try:
        while True:
            try:
                found = await asyncio.wait_for(admin.list_consumer_group_offsets(group), _REQUEST_SECONDS)
                break
            except KafkaError as error:
                if not error.retriable or clock() > deadline:
                    raise
                await asyncio.sleep(0.2)
    finally:
        await admin.close()
    return {Partition(*each): int(at.offset) for each, at in found.items() if at.offset >= 0}


async def topic_configs(settings: Settings, topics: Sequence[str]) -> dict[str, dict[str, str | None] | None]:
    """The settings of those topics that exist; None where they may not be read. Raises KafkaError."""
    admin = await started(lambda: AIOKafkaAdminClient(**connection_options(settings)), settings, settings.wait_seconds)
    try:
        wanted = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in topics]
        answers = await asyncio.wait_for(admin.describe_configs(wanted), _REQUEST_SECONDS) if wanted else []
    finally:
        await admin.close()
    found: dict[str, dict[str, str | None] | None] = {}
    for code, _, _, topic, configs in (each for answer in answers for each in answer.resources):
        if code != UnknownTopicOrPartitionError.errno:
            found[topic] = None if code else {entry[0]: entry[1] for entry in configs}
    return found


async def is_compacted(settings: Settings, topic: str) -> bool:
    """Whether the log of a topic drops records that are not the newest of their key. Raises KafkaError."""
    configs = (await topic_configs(settings, [topic])).get(topic) or {}
    return "compact" in (configs.get("cleanup.policy") or "")


async def create_topic(settings: Settings, topic: str, partitions: int) -> None:
    """Create a topic with one replica. Raises KafkaError."""
    admin = await started(lambda: AIOKafkaAdminClient(**connection_options(settings)), settings, settings.wait_seconds)
    try:
        await admin.create_topics([NewTopic(topic, partitions, 1)])
    finally:
        await admin.close()


async def leave_group(settings: Settings, group: str, member_id: str) -> None:
    """Take a dead process out of its group, so that its partitions move at once instead of after the session timeout.

    Raises KafkaError or OSError when that cannot be done: then the session timeout does it.
    """
    client = AIOKafkaClient(**connection_options(settings))
    try:
        await client.bootstrap()
        node = await client.coordinator_lookup(CoordinationType.GROUP, group)
        await client.send(node, LeaveGroupRequest(group, member_id), group=ConnectionGroup.COORDINATION)
    finally:
        await client.close()
