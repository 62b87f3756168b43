"""The pre-check in Redis: a hint that a message was settled before. Written after the COMMIT, asked before it, fails open.

Knows marks and a budget; knows no PostgreSQL. The only file that imports redis. A mark says: in this epoch of the
database, this handler has committed this id with this payload. It may be missing at any time (a flush, an eviction, an
outage); it is never wrong, because it names the epoch, and an epoch that ended takes its marks with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import parse_qsl, urlsplit

import redis.asyncio as redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError, ResponseError
from redis.retry import Retry

from consumer.core.breaker import Breaker, Sampler
from consumer.core.errors import Misconfigured
from consumer.core.handler import Handler
from consumer.core.hosts import certificate_fault
from consumer.core.lanes import Delivery
from consumer.core.outcome import DUPLICATE, Cause
from consumer.logs import describe, event

_CONNECT_SECONDS = 1.0
_MARKS_WAITING_MAX = 8  # batches; more than that are not marked, which costs one claim each later


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
    """An answer that does not belong to its question. The connection is dropped and nothing is believed."""


class Precheck:
    """Asks and marks within a budget. No method raises because of Redis."""

    def __init__(
        self,
        url: str,
        app: str,
        budget_seconds: float,
        window_seconds: float,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        try:
            if {name for name, _ in parse_qsl(urlsplit(url).query)} - _URL_OPTIONS:
                # Not quoted: it is a part of the password, when that holds a question mark.
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
                "CONSUMER_REDIS_URL is not an address that can be used: write redis://user:password@host:6379/0 (rediss:// "
                "for TLS), and percent-encode special characters of the password"
            ) from None
        self._app = app
        self._budget = budget_seconds
        self._window = window_seconds
        self._step = step
        self._epoch = ""
        self._breaker = Breaker()
        self._samplers: dict[str, Sampler] = {}
        self._marking: set[asyncio.Task[None]] = set()
        self._probe: asyncio.Task[None] | None = None

    async def start(self, epoch: str) -> None:
        """Connect. Raises Misconfigured for a refused password, a right that is missing, and a certificate that is not
        accepted; any other trouble only opens the breaker."""
        self._epoch = epoch
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await self._try()
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise Misconfigured(
                f"CONSUMER_REDIS_URL: Redis refused the credentials, or they have too few rights (docs/security.md): {error}"
            ) from None
        except (RedisError, OSError, TimeoutError) as error:
            if (cause := _certificate_error(error)) is not None:
                fault = certificate_fault(
                    cause.verify_code, cause.verify_message, "CONSUMER_REDIS_CA_FILE", "CONSUMER_REDIS_URL"
                )
                raise Misconfigured(f"Redis: {fault}") from None
            self._failed(error)

    def new_epoch(self, epoch: str) -> None:
        """The database is another one, or went back in time: the marks so far count no more."""
        self._epoch = epoch

    async def stop(self) -> None:
        """Let marks on their way arrive within the budget, and disconnect."""
        if self._marking:
            await asyncio.wait(self._marking, timeout=self._budget)
        for task in [*self._marking, *([self._probe] if self._probe else [])]:
            task.cancel()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await self._redis.aclose()
        except (RedisError, OSError, TimeoutError):
            pass

    async def check(self, deliveries: Sequence[Delivery], now_seconds: float) -> None:
        """Settle as duplicates those that Redis knows. now_seconds: wall clock; skew only costs hits."""
        if self._breaker.is_open:
            return
        asked: dict[Handler, list[Delivery]] = {}
        for delivery in deliveries:
            if delivery.outcome is None and delivery.handler.idempotent:
                asked.setdefault(delivery.handler, []).append(delivery)
        asked = {handler: wanted for handler, wanted in asked.items() if self._sampler(handler).should_ask()}
        if not asked:
            return
        try:
            async with asyncio.timeout(self._budget):
                found = await self._ask(asked, now_seconds)
        except Exception as error:  # whatever the library raises: Redis is a hint
            _go_on()
            self._failed(error)
            return
        _go_on()
        for handler, wanted in asked.items():
            hits = [each for each, hit in zip(wanted, found[handler], strict=True) if hit]
            for delivery in hits:
                delivery.outcome = DUPLICATE[Cause.PRECHECK]
            self._sampler(handler).observed(len(wanted), len(hits))

    async def known(self, deliveries: Sequence[Delivery], now_seconds: float) -> set[Delivery] | None:
        """Those that Redis has a mark for; None when it did not answer in time. Settles nothing."""
        asked: dict[Handler, list[Delivery]] = {}
        for delivery in deliveries:
            asked.setdefault(delivery.handler, []).append(delivery)
        try:
            async with asyncio.timeout(self._budget):
                found = await self._ask(asked, now_seconds)
        except Exception:
            _go_on()
            return None
        _go_on()
        return {
            each for handler, wanted in asked.items() for each, hit in zip(wanted, found[handler], strict=True) if hit
        }

    async def _ask(self, asked: Mapping[Handler, Sequence[Delivery]], now_seconds: float) -> dict[Handler, list[bool]]:
        """Whether Redis has a mark, in the order asked. Raises what the library raises, and Untrusted."""
        bucket = int(now_seconds // self._window)
        nonce = os.urandom(8)
        pipe = self._redis.pipeline(transaction=False)
        pipe.execute_command("ECHO", nonce)
        for handler, wanted in asked.items():
            members = [_member(each) for each in wanted]
            for key in (self._key(handler, bucket), self._key(handler, bucket - 1)):
                pipe.execute_command("SMISMEMBER", key, *members)
        answers = await pipe.execute()
        if answers[0] != nonce:
            raise Untrusted("an answer to another question")
        found: dict[Handler, list[bool]] = {}
        for number, (handler, wanted) in enumerate(asked.items()):
            current, previous = answers[1 + 2 * number], answers[2 + 2 * number]
            if len(current) != len(wanted) or len(previous) != len(wanted):
                raise Untrusted("an answer of another length")
            found[handler] = [bool(now or before) for now, before in zip(current, previous, strict=True)]
        return found

    def mark(self, applied: Sequence[Delivery], epoch: str, now_seconds: float) -> None:
        """Mark what was committed in `epoch`, in the background. Call it only after the COMMIT was answered."""
        if self._breaker.is_open or not applied or len(self._marking) >= _MARKS_WAITING_MAX:
            return
        by_handler: dict[Handler, list[bytes]] = {}
        for delivery in applied:
            by_handler.setdefault(delivery.handler, []).append(_member(delivery))
        bucket = int(now_seconds // self._window)
        pipe = self._redis.pipeline(transaction=False)
        for handler, members in by_handler.items():
            key = self._key(handler, bucket, epoch)
            pipe.execute_command("SADD", key, *members)
            pipe.execute_command("EXPIRE", key, int(self._window * 2))
        task = asyncio.get_running_loop().create_task(self._send(pipe))
        self._marking.add(task)
        task.add_done_callback(self._marking.discard)

    async def _send(self, pipe: redis.client.Pipeline) -> None:
        try:
            async with asyncio.timeout(self._budget):
                await pipe.execute()
        except (RedisError, OSError, TimeoutError) as error:
            self._failed(error)
        else:
            self._step("marked")

    def _key(self, handler: Handler, bucket: int, epoch: str | None = None) -> str:
        return f"consumer:{epoch or self._epoch}:{self._app}:{handler.name}:{bucket}"

    def _sampler(self, handler: Handler) -> Sampler:
        return self._samplers.setdefault(handler.name, Sampler())

    def _failed(self, error: Exception) -> None:
        """Open the breaker; a probe in the background closes it. Nobody else waits for Redis until then."""
        if not self._breaker.is_open:
            event(logging.WARNING, "pre-check off: redis does not answer; going on without it", error=describe(error))
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
        """What a batch needs: to ask and to write. A Redis that is full or read-only fails here, as it would there."""
        key = f"consumer:probe:{self._app}"
        pipe = self._redis.pipeline(transaction=False)
        pipe.execute_command("ECHO", b"probe")
        pipe.execute_command("SMISMEMBER", key, b"probe")
        pipe.execute_command("SADD", key, b"probe")
        pipe.execute_command("EXPIRE", key, 60)
        answers = await pipe.execute()
        if len(answers) != 4:
            raise ResponseError("an answer of another length")


def _certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """What TLS had against a certificate, below the library's own exception."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error


def _go_on() -> None:
    """Raise CancelledError when this task was told to end: the library was seen to swallow that (redis 8.1)."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _member(delivery: Delivery) -> bytes:
    """Id and payload together: an id that is used again with another payload must not look known."""
    return delivery.id + delivery.fingerprint.to_bytes(8, "big", signed=True)
