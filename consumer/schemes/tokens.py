"""Anti-replay tokens in Redis, used up by their first use.

A token is issued with a form, and stands for the id of the message that the form becomes. Knows one Redis and a few
scripts of one key each. Limitations: does not know whether Redis lost something. An asynchronous failover may bring
back a token that was used up, and a flush loses all of them. Therefore the message id is derived from the token alone:
the same token used "for the first time" twice gives the same id twice, and the ledger behind it applies it once. **The
token keeps a person from paying twice by mistake; the ledger is the guarantee.**

Redis holds a hash of the token, and a hash of its subject that cannot be guessed without the token.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from consumer.schemes.redis_call import answer, text

if TYPE_CHECKING:
    from redis.asyncio import Redis

_TOKEN_BYTES = 32
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")  # token_urlsafe of that many bytes
_SUBJECT_CHARACTERS_MAX = 1000
_UNANSWERED_MAX = 10_000
RESULT_BYTES_MAX = 64 * 1024

_ISSUE = """
redis.call('hset', KEYS[1], 'subject', ARGV[1])
redis.call('pexpire', KEYS[1], ARGV[2])
return 1
"""
# The subject first: an attempt with somebody else's token changes nothing. The attempt's own mark, because the library
# asks again when an answer was lost, and must not find its own success as another's. An attempt that was never answered has
# published nothing, so that the next one goes on under its mark, whatever it asks for.
_REDEEM = """
local kept = redis.call('hmget', KEYS[1], 'subject', 'attempt', 'payload', 'used_ms', 'result')
if not kept[1] then return {'unknown'} end
if kept[1] ~= ARGV[1] then return {'foreign'} end
local time = redis.call('time')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
if not kept[2] or kept[2] == ARGV[2] then
    redis.call('hset', KEYS[1], 'attempt', ARGV[2], 'payload', ARGV[3], 'used_ms', string.format('%.0f', now_ms))
    return {'fresh'}
end
if kept[3] ~= ARGV[3] then return {'other payload'} end
return {'used', string.format('%.0f', math.max(0, now_ms - kept[4])), kept[5]}
"""
_STORE = """
local kept = redis.call('hmget', KEYS[1], 'subject', 'attempt')
if kept[1] ~= ARGV[1] or not kept[2] then return 0 end
return redis.call('hsetnx', KEYS[1], 'result', ARGV[2])
"""


@dataclass(frozen=True, slots=True)
class Fresh:
    """Redeemed now: publish, with this message id."""

    message_id: str


@dataclass(frozen=True, slots=True)
class Used:
    """Redeemed before, by the same subject.

    result: what was stored for the first use; None when nothing was: it is still at work, or it died on the way. Then
    publishing again is safe, because the message id is the same. used_seconds: since the first use, by Redis' clock.
    """

    message_id: str
    result: str | None = field(repr=False)
    used_seconds: float


@dataclass(frozen=True, slots=True)
class OtherPayload:
    """Redeemed before by the same subject, for something else."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """Issued to another subject. It is not used up by this attempt."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Never issued, expired, or lost by Redis: indistinguishable."""


Redeemed: TypeAlias = Fresh | Used | OtherPayload | Foreign | Unknown


class Tokens:
    """Issues and redeems tokens; its methods may be called concurrently.

    One for a process. redis: a ``redis.asyncio`` client, decoding or not. prefix: of its keys; applications that share
    a Redis need different ones. budget_seconds: for one command to Redis, with whatever the client retries.

    Every method raises `RedisAway` if Redis does not answer in time or refuses. It may have done its work all the same:
    issue another token, or redeem the same one again.
    """

    def __init__(self, redis: Redis, *, prefix: str = "consumer:token:", budget_seconds: float = 1.0) -> None:
        self._prefix = prefix
        self._budget = budget_seconds
        self._unanswered: dict[str, str] = {}  # key -> this process's attempt that Redis may have recorded
        self._issue = redis.register_script(_ISSUE)
        self._redeem = redis.register_script(_REDEEM)
        self._store = redis.register_script(_STORE)

    @staticmethod
    def is_well_formed(token: str) -> bool:
        """Whether this could be a token: 43 characters of URL-safe Base64."""
        return isinstance(token, str) and _TOKEN.fullmatch(token) is not None

    async def issue(self, subject: str, ttl_seconds: float) -> str:
        """Return a new token of 256 random bits for a subject.

        subject: who may redeem it: a user, a session, a user and a form. Put the token where only the subject sees it,
        and in no URL. Raises ValueError for a subject that is empty or longer than 1,000 characters, or a ttl that is
        not a positive number of seconds; RedisAway.
        """
        if isinstance(ttl_seconds, bool) or not isinstance(ttl_seconds, int | float) or not 0.001 <= ttl_seconds < 1e9:
            raise ValueError("ttl_seconds: a positive number of seconds")
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        kept = _subject_digest(token, subject)
        await answer(self._issue(keys=[self._key(token)], args=[kept, int(ttl_seconds * 1000)]), self._budget)
        return token

    async def redeem(self, token: str, subject: str, payload: bytes = b"") -> Redeemed:
        """Use a token up: exactly one attempt returns Fresh.

        payload: what the token is used for, as bytes; a second use for something else returns OtherPayload (a digest of
        it is kept). Raises ValueError for a subject that no token can have; RedisAway; TypeError for a payload that is
        not bytes. For a token of another form it returns Unknown without asking Redis.

        Limitations: Fresh may come twice, if Redis has lost the first use. The message id is the same then. After
        RedisAway the token may be used up by an attempt that published nothing: this process takes it over at the next
        call, for another process it is Used without a result.
        """
        _check_subject(subject)
        if not isinstance(payload, bytes | bytearray | memoryview):
            raise TypeError(f"redeem: payload= is bytes, not {type(payload).__name__}")
        if not self.is_well_formed(token):
            return Unknown()
        key = self._key(token)
        attempt = self._unanswered.pop(key, None) or secrets.token_hex(8)
        args = [_subject_digest(token, subject), attempt, hashlib.sha256(payload).hexdigest()]
        try:
            reply: list[Any] = await answer(self._redeem(keys=[key], args=args), self._budget)
        except BaseException:
            if len(self._unanswered) >= _UNANSWERED_MAX:
                self._unanswered.pop(next(iter(self._unanswered)))
            self._unanswered[key] = attempt
            raise
        match text(reply[0]):
            case "fresh":
                return Fresh(message_id_of(token))
            case "used":
                result = text(reply[2]) if reply[2] is not None else None
                return Used(message_id_of(token), result, int(reply[1]) / 1000)
            case "other payload":
                return OtherPayload()
            case "foreign":
                return Foreign()
            case _:
                return Unknown()

    async def store_result(self, token: str, subject: str, result: str) -> bool:
        """Keep the first use's result, to answer later uses with.

        It lives as long as the token. Returns False if the token is unknown, another subject's or not redeemed, or has
        a result: the first one stays. Raises ValueError for more than 64 KiB of UTF-8; RedisAway.
        """
        _check_subject(subject)
        if not isinstance(result, str):
            raise TypeError(f"store_result: result= is text, not {type(result).__name__}")
        try:
            encoded = result.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("store_result: result= holds a lone surrogate, which UTF-8 cannot") from None
        if len(encoded) > RESULT_BYTES_MAX:
            raise ValueError(f"a result of {len(encoded)} bytes: at most {RESULT_BYTES_MAX} are kept")
        if not self.is_well_formed(token):
            return False
        kept = _subject_digest(token, subject)
        return bool(await answer(self._store(keys=[self._key(token)], args=[kept, encoded]), self._budget))

    def _key(self, token: str) -> str:
        return self._prefix + hashlib.sha256(token.encode()).hexdigest()


def message_id_of(token: str) -> str:
    """Return the message id of a token: a UUID (version 8).

    The token cannot be derived from it.
    """
    digest = bytearray(hashlib.blake2b(token.encode(), digest_size=16, person=b"consumer-message").digest())
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    return str(uuid.UUID(bytes=bytes(digest)))


def _check_subject(subject: str) -> None:
    if not isinstance(subject, str) or not 0 < len(subject) <= _SUBJECT_CHARACTERS_MAX:
        raise ValueError(f"a subject is text of 1 to {_SUBJECT_CHARACTERS_MAX} characters")


def _subject_digest(token: str, subject: str) -> str:
    """Return a digest of the subject, keyed with the token.

    Subjects are guessable, and a reader of Redis must not be able to try them.
    """
    _check_subject(subject)
    key = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
    return hashlib.blake2b(subject.encode("utf-8", "surrogatepass"), key=key, digest_size=32).hexdigest()
