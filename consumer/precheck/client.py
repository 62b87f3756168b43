"""The pre-check: asks Redis for marks before a transaction, writes them after.

Knows marks and a time budget; knows no PostgreSQL. A mark says: in this epoch of the database, this handler has
committed this id with this payload. It may be missing at any time (a flush, an eviction, an outage). It is never wrong,
because it names the epoch, and marks of another epoch do not count.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable, Sequence
from itertools import compress
from struct import Struct
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import redis.asyncio as redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError, ResponseError
from redis.retry import Retry

from consumer.core.delivery import Delivery
from consumer.core.errors import Misconfigured
from consumer.core.handler import Handler
from consumer.core.hosts import certificate_fault
from consumer.core.outcome import DUPLICATE, Cause
from consumer.logs import describe, event
from consumer.metrics.catalog import PRECHECK
from consumer.metrics.recorder import Recorder
from consumer.precheck.breaker import Breaker, Sampler

_CONNECT_SECONDS = 1.0
_MARKS_WAITING_MAX = 8  # batches; more than that are not marked, which costs one claim each later


_MEMBER_BYTES = 24
_BEFORE_MEMBER = b"\r\n$%d\r\n" % _MEMBER_BYTES
_SAMPLERS_MAX = 1000
_fingerprint = Struct(">q").pack

_URL_OPTIONS = {
    "db",
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "client_name",
}


class Untrusted(RedisError):
    """An answer to another question: the connection is dropped."""


class _Question(NamedTuple):
    handler: Handler
    bucket: int
    deliveries: Sequence[Delivery]


class Precheck:
    """Asks and marks within a budget. No method raises because of Redis."""

    def __init__(
        self,
        url: str,
        app: str,
        budget_seconds: float,
        window_seconds: float,
        on_step: Callable[[str], None] = lambda _: None,
        recorder: Recorder | None = None,
    ) -> None:
        try:
            if {name for name, _ in parse_qsl(urlsplit(url).query)} - _URL_OPTIONS:
                # Not quoted: it is a part of the password, if that has a question mark.
                raise Misconfigured(
                    f"CONSUMER_REDIS_URL: an unknown option after the question mark (known: {', '.join(sorted(_URL_OPTIONS))}); "
                    "percent-encode special characters of the password"
                )
            self._redis = redis.Redis.from_url(
                url,
                retry=Retry(NoBackoff(), 0),
                socket_timeout=_CONNECT_SECONDS,
                socket_connect_timeout=_CONNECT_SECONDS,
                decode_responses=False,
            )
        except (ValueError, TypeError):
            # The library's text would quote the part that it could not read, which may be of the password.
            raise Misconfigured(
                "CONSUMER_REDIS_URL: not an address that can be used; write redis://user:password@host:6379/0 (rediss:// "
                "for TLS), and percent-encode special characters of the password"
            ) from None
        self._app = app
        self._budget = budget_seconds
        self._window = window_seconds
        self._on_step = on_step
        self._recorder = recorder
        self._epoch = ""
        self._breaker = Breaker()
        self._samplers: dict[tuple[str, int], Sampler] = {}  # by handler and bucket
        self._marking: set[asyncio.Task[None]] = set()
        self._probe: asyncio.Task[None] | None = None

    async def start(self, epoch: str) -> None:
        """Connect.

        Raises Misconfigured for a refused password, a missing right, and a certificate that is not accepted. Any other
        failure only opens the breaker.
        """
        self._epoch = epoch
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await self._try()
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise Misconfigured(
                f"CONSUMER_REDIS_URL: Redis refused the credentials, or they have too few rights ({error}); see docs/how-to/security.md"
            ) from None
        except (RedisError, OSError, TimeoutError) as error:
            if isinstance(error, ResponseError) and "db index" in str(error).lower():
                raise Misconfigured(
                    "CONSUMER_REDIS_URL: Redis has no database of that number; use a lower one, as in redis://host:6379/0"
                ) from None
            if (cause := _certificate_error(error)) is not None:
                fault = certificate_fault(
                    cause.verify_code, cause.verify_message, "CONSUMER_REDIS_CA_FILE", "CONSUMER_REDIS_URL"
                )
                raise Misconfigured(f"Redis: {fault}") from None
            self._failed(error)

    @property
    def is_off(self) -> bool:
        """Whether Redis did not answer at last, and is not asked."""
        return self._breaker.is_open

    def new_epoch(self, epoch: str) -> None:
        """Ignore the marks so far: the database or its history changed."""
        self._epoch = epoch

    async def stop(self) -> None:
        """Wait within the budget for marks in flight, and disconnect."""
        if self._marking:
            await asyncio.wait(self._marking, timeout=self._budget)
        ending = [*self._marking, *([self._probe] if self._probe else [])]
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending, timeout=_CONNECT_SECONDS)  # each has a connection to end
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await self._redis.aclose()
        except (RedisError, OSError, TimeoutError):
            pass

    async def check(self, deliveries: Sequence[Delivery], now_seconds: float) -> None:
        """Set the outcome of messages that Redis knows: duplicates.

        now_seconds: by the wall clock; skew only costs hits.
        """
        if self._breaker.is_open:
            self._count(deliveries, [], "off")
            return
        questions: list[_Question] = []
        bucket = int(now_seconds // self._window)
        for handler in {delivery.handler for delivery in deliveries}:
            # Each window has its own sampler: where duplicates come soon, few of them are in the previous window.
            wanted_from = [
                window
                for window in (bucket, bucket - 1)
                if handler.idempotent and self._sampler(handler, window).should_ask()
            ]
            if wanted_from:
                wanted = [
                    delivery for delivery in deliveries if delivery.handler is handler and delivery.outcome is None
                ]
                questions += [_Question(handler, window, wanted) for window in wanted_from if wanted]
        if not questions:
            self._count(deliveries, questions, "miss")
            return
        try:
            async with asyncio.timeout(self._budget):
                answers = await self._ask(questions)
        except Exception as error:  # whatever the library raises: Redis is a hint
            _go_on()
            self._failed(error)
            self._count(deliveries, questions, "late")
            return
        _go_on()
        for question, hits in zip(questions, answers, strict=True):
            for delivery in hits:
                delivery.outcome = DUPLICATE[Cause.PRECHECK]
            self._sampler(question.handler, question.bucket).observed(len(question.deliveries), len(hits))
        self._count(deliveries, questions, "miss", hits=len({delivery for hits in answers for delivery in hits}))

    def _count(
        self, deliveries: Sequence[Delivery], questions: Sequence[_Question], result: str, hits: int = 0
    ) -> None:
        """Count the messages by answer.

        result: of those that were asked for and no hit, or of all.
        """
        if self._recorder is None:
            return
        protected = {delivery.handler for delivery in deliveries}
        messages = (
            len(deliveries)
            if all(handler.idempotent for handler in protected)
            else sum(delivery.handler.idempotent for delivery in deliveries)
        )
        asked = messages if result == "off" else sum({one.handler: len(one.deliveries) for one in questions}.values())
        for name, count in ((result, asked - hits), ("hit", hits), ("sampled_out", messages - asked)):
            if count > 0:
                self._recorder.add(PRECHECK, (name,), count)

    async def known(self, deliveries: Sequence[Delivery], now_seconds: float) -> set[Delivery] | None:
        """Return the messages that have a mark; None without an answer."""
        by_handler: dict[Handler, list[Delivery]] = {}
        for delivery in deliveries:
            by_handler.setdefault(delivery.handler, []).append(delivery)
        bucket = int(now_seconds // self._window)
        questions = [
            _Question(handler, window, wanted)
            for handler, wanted in by_handler.items()
            for window in (bucket, bucket - 1)
        ]
        try:
            async with asyncio.timeout(self._budget):
                answers = await self._ask(questions)
        except Exception:
            _go_on()
            return None
        _go_on()
        return {delivery for hits in answers for delivery in hits}

    async def _ask(self, questions: Sequence[_Question]) -> list[list[Delivery]]:
        """Return the messages that have a mark, for each question.

        Raises what the library raises, and Untrusted.
        """
        nonce = os.urandom(8)
        members: dict[Handler, list[bytes]] = {}
        for question in questions:
            if question.handler not in members:
                members[question.handler] = _members(question.deliveries)
        echo, *answers = await self._talk(
            _packed(b"ECHO", nonce),
            *(
                _packed(b"SMISMEMBER", self._key(question.handler, question.bucket), members[question.handler])
                for question in questions
            ),
        )
        if echo != nonce:
            raise Untrusted("an answer to another question")
        hits = []
        for question, answer in zip(questions, answers, strict=True):
            if len(answer) != len(question.deliveries):
                raise Untrusted("an answer of another length")
            hits.append(list(compress(question.deliveries, answer)))
        return hits

    def mark(self, applied: Sequence[Delivery], epoch: str, now_seconds: float) -> None:
        """Mark what was committed in `epoch`, in the background.

        Call it only after the COMMIT was answered.
        """
        if self._breaker.is_open or not applied or len(self._marking) >= _MARKS_WAITING_MAX:
            return
        bucket = int(now_seconds // self._window)
        commands = []
        for handler in {delivery.handler for delivery in applied}:
            key = self._key(handler, bucket, epoch)
            commands.append(
                _packed(b"SADD", key, _members([delivery for delivery in applied if delivery.handler is handler]))
            )
            commands.append(_packed(b"EXPIRE", key, b"%d" % int(self._window * 2)))
        task = asyncio.get_running_loop().create_task(self._send(commands))
        self._marking.add(task)
        task.add_done_callback(self._marking.discard)

    async def _send(self, commands: Sequence[bytes]) -> None:
        try:
            async with asyncio.timeout(self._budget):
                await self._talk(*commands)
        except (RedisError, OSError, TimeoutError) as error:
            self._failed(error)
        else:
            self._on_step("marked")

    async def _talk(self, *commands: bytes) -> list[Any]:
        """Send commands and return their answers.

        Raises what the library raises for the first one that was refused.

        fast path: the library would pack a command's arguments one after the other, in Python, at 0.5 µs each, which is
        more than the rest of a mark costs the worker.
        """
        connection = await self._redis.connection_pool.get_connection()
        try:
            await connection.send_packed_command(commands)
            return [await connection.read_response() for _ in commands]
        except BaseException:
            await connection.disconnect(nowait=True)  # an answer that comes later would be read as another command's
            raise
        finally:
            await self._redis.connection_pool.release(connection)

    def _key(self, handler: Handler, bucket: int, epoch: str | None = None) -> bytes:
        return f"consumer:{epoch or self._epoch}:{self._app}:{handler.name}:{bucket}".encode()

    def _sampler(self, handler: Handler, bucket: int) -> Sampler:
        sampler = self._samplers.get((handler.name, bucket))
        if sampler is None:
            if len(self._samplers) > _SAMPLERS_MAX:
                self._samplers.clear()  # most are of windows that are over
            sampler = self._samplers[handler.name, bucket] = Sampler()
        return sampler

    def _failed(self, error: Exception) -> None:
        """Open the breaker; a probe in the background closes it."""
        if not self._breaker.is_open:
            what = "refuses what it is asked" if isinstance(error, ResponseError) else "does not answer"
            event(logging.WARNING, f"pre-check off: redis {what}; going on without it", error=describe(error))
        pause = self._breaker.failed()
        if self._probe is None or self._probe.done():
            self._probe = asyncio.get_running_loop().create_task(self._probing(pause))

    async def _probing(self, pause_seconds: float) -> None:
        while True:
            await asyncio.sleep(pause_seconds)
            try:
                await self._redis.connection_pool.disconnect()
                async with asyncio.timeout(_CONNECT_SECONDS):
                    await self._try()
            except (RedisError, OSError, TimeoutError):
                pause_seconds = self._breaker.failed()
            else:
                self._breaker.succeeded()
                event(logging.INFO, "pre-check on: redis answers again")
                return

    async def _try(self) -> None:
        """Ask and write, as for a batch, to detect a full Redis."""
        key = f"consumer:probe:{self._app}".encode()
        answers = await self._talk(
            _packed(b"ECHO", b"probe"),
            _packed(b"SMISMEMBER", key, [b"probe".ljust(_MEMBER_BYTES)]),
            _packed(b"SADD", key, [b"probe".ljust(_MEMBER_BYTES)]),
            _packed(b"EXPIRE", key, b"60"),
        )
        if len(answers) != 4:
            raise ResponseError("an answer of another length")


def _certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """Return the TLS error behind the library's exception, if any."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error


def _go_on() -> None:
    """Raise CancelledError if this task was cancelled.

    The library may swallow the cancellation (seen with redis 8.1).
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _members(deliveries: Sequence[Delivery]) -> list[bytes]:
    """Return ids with fingerprints: another payload makes an id unknown."""
    return [delivery.id + _fingerprint(delivery.fingerprint) for delivery in deliveries]


def _packed(name: bytes, key: bytes, rest: bytes | Sequence[bytes] = ()) -> bytes:
    """Return a command in Redis's protocol.

    Of two words, of three, or of two and members of _MEMBER_BYTES each.
    """
    head = b"$%d\r\n%s\r\n$%d\r\n%s\r\n" % (len(name), name, len(key), key)
    if isinstance(rest, bytes):
        return b"*3\r\n%s$%d\r\n%s\r\n" % (head, len(rest), rest)
    body = _BEFORE_MEMBER.join([b"", *rest])[2:] + b"\r\n" if rest else b""
    return b"*%d\r\n%s%s" % (2 + len(rest), head, body)
