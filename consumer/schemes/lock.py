"""A lock in Redis, with a fence in PostgreSQL against late writers.

For work that should not be done by two at a time. Knows one Redis key, a clock that only moves forward, and one upsert.
Limitations: like any lock with a time to live, it cannot know whether its owner is paused. Between taking the lock and
the write that follows, any time may pass (a stopped process, a garbage collector, a packet), and another may hold it by
then. **The lock saves work; the fence decides** (Martin Kleppmann, "How to do distributed locking", 2016, on fencing
tokens and on Redlock). One Redis is enough for that, and several would not make it a guarantee either.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from redis.asyncio.lock import Lock as RedisLock

from consumer.core.errors import RunAgain, TransactionMisuse
from consumer.core.identifiers import ident, table_ident
from consumer.schemes.database import Database, checked
from consumer.schemes.redis_call import RedisAway, answer

if TYPE_CHECKING:
    from redis.asyncio import Redis

_TTL_SECONDS_MIN = 0.1
_SECONDS_MAX = 1e9
_RENEWALS = 3  # in the life of a lock
_DRIFT = 0.01  # of the ttl: how much faster than ours Redis' clock may run
_PAUSE_SECONDS = (0.01, 0.25)  # the shortest and the longest between two attempts to get it
_RELEASE_SECONDS = 1.0
_NUMBER_KEPT_SECONDS = 86_400

# The number is taken in the step that takes the lock: taken later, a paused owner could get one above its successor's.
# It is the clock's microseconds or one more than the last, whichever is higher, so that it goes on rising when Redis has
# lost it; a plain INCR would start at 1 again and repeat numbers. Asked again by the library after a lost answer, the
# script finds its own token and says the same.
_ACQUIRE = """
local holder = redis.call('get', KEYS[1])
if holder and holder ~= ARGV[1] then return {0, redis.call('pttl', KEYS[1])} end
if holder then
    redis.call('pexpire', KEYS[1], ARGV[2])
else
    local time = redis.call('time')
    local last = tonumber(redis.call('get', KEYS[2]) or '0')
    local number = math.max(time[1] * 1000000 + time[2], last + 1)
    redis.call('set', KEYS[2], string.format('%.0f', number), 'px', ARGV[3])
    redis.call('set', KEYS[1], ARGV[1], 'px', ARGV[2])
end
return {1, redis.call('get', KEYS[2])}
"""


class LockBusy(RunAgain):
    """Somebody else held the lock for the whole of ``wait_seconds``."""


class LockLost(RunAgain):
    """The lock was lost during the work; the text says how.

    Another owner may have worked at the same time.
    """


class LateWriter(RunAgain):
    """A later owner of the lock has written already.

    Nothing may be written under this number any more.
    """


class Lock:
    """An asynchronous context manager that holds a lock in Redis.

    redis: a ``redis.asyncio`` client, decoding or not. name: of what is locked. ttl_seconds: after how long without a
    renewal others may take it, at least 0.1; it is renewed three times in that time while the block runs. wait_seconds:
    how long to wait for it; waiters ask at random intervals of a few ms to 0.25 s, so there is no queue, and no waiter
    is always last. prefix: of its keys. ::

        async with Lock(redis, "invoices:2031", ttl_seconds=30, wait_seconds=5) as lock:
            async with connection.transaction():
                await check_fence(connection, "fences", "invoices:2031", lock.number)
                …

    Entering raises LockBusy, or RedisAway. When the lock is lost inside (it was not renewed in time, Redis was flushed
    or restarted or does not answer), `lost` is set, the block's task is cancelled where it waits, and LockLost is
    raised out of the block; also at the end of a block that did not wait any more. An exception of the block itself
    propagates unchanged.

    redis-py's own Lock is used for release and renewal: its scripts compare the owner's token first. Its acquire is
    not: it has no number, and takes an answer that was lost for another owner. Nor has it a watchdog.

    Limitations:

    - Another owner may work at the same time: see above. Whatever must not be done twice is checked by the fence, in the
      transaction that does it, or is the ledger's.
    - A cancelled block does not undo a COMMIT: one in flight is the caller's, and its outcome is unknown. With the fence in
      its transaction it is right either way.
    - The lock does not last until a handler's transaction is committed: that is after the handler has returned, and so
      after the block. In a handler only the fence protects the writes.
    - Each `Lock` is entered by one task, and once at a time.
    - Code that does not wait (a long computation) cannot be cancelled, and does not notice the loss.
    """

    def __init__(
        self,
        redis: Redis,
        name: str,
        ttl_seconds: float,
        *,
        wait_seconds: float = 0.0,
        prefix: str = "consumer:lock:",
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError("a lock needs a name")
        if isinstance(ttl_seconds, bool) or not _TTL_SECONDS_MIN <= ttl_seconds < _SECONDS_MAX:
            raise ValueError(f"ttl_seconds: a number of seconds, at least {_TTL_SECONDS_MIN}")
        if isinstance(wait_seconds, bool) or not 0 <= wait_seconds < _SECONDS_MAX:
            raise ValueError("wait_seconds: a number of seconds, at least 0")
        self.name = name
        self.lost = asyncio.Event()
        self._ttl = float(ttl_seconds)
        self._wait = float(wait_seconds)
        # In a cluster, the text in braces decides on which node a key is: both must be on one.
        self._key = f"{prefix}{{{name}}}"
        self._number_key = f"{self._key}:number"
        self._acquire_script = redis.register_script(_ACQUIRE)
        self._renew_script = redis.register_script(RedisLock.LUA_REACQUIRE_SCRIPT)
        self._release_script = redis.register_script(RedisLock.LUA_RELEASE_SCRIPT)
        self._token = ""
        self._number: int | None = None
        self._until = 0.0  # by time.monotonic: others cannot have it before
        self._watchdog: asyncio.Task[None] | None = None
        self._cancelled_before = 0
        self._cancelled = False
        self._ending = False
        self._why = ""

    @property
    def number(self) -> int:
        """The fencing number: higher than that of every earlier owner.

        Raises RuntimeError outside the block. It rises over restarts and flushes of Redis as long as the clock of its
        host does not go back by more than it was away; until such a clock has caught up, the fence refuses new owners
        too.
        """
        if self._number is None:
            raise RuntimeError("a lock has its number inside its block")
        return self._number

    async def __aenter__(self) -> Lock:
        if self._watchdog is not None:
            raise RuntimeError("this Lock is held already: create another one for another block")
        owner = asyncio.current_task()
        assert owner is not None
        self.lost = asyncio.Event()
        self._token, self._why = secrets.token_urlsafe(16), ""
        self._cancelled = self._ending = False
        self._cancelled_before = owner.cancelling()
        try:
            await self._acquire()
        except asyncio.CancelledError:
            await self._release()  # it may have been ours by then
            raise
        self._watchdog = asyncio.create_task(self._watch(owner))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        owner, watchdog = asyncio.current_task(), self._watchdog
        assert owner is not None and watchdog is not None
        self._ending = True  # from here on the watchdog cancels no task
        others = 0
        if self._cancelled:
            others = max(0, owner.uncancel() - self._cancelled_before)
        try:
            watchdog.cancel()
            await asyncio.wait([watchdog], timeout=_RELEASE_SECONDS)
            ours = await self._release()
        finally:
            self._watchdog = self._number = None
        if self._cancelled and kind is asyncio.CancelledError and not others:
            raise LockLost(self._why) from None
        if kind is None and (self.lost.is_set() or ours is False):
            self.lost.set()
            raise LockLost(self._why or "the lock was lost before it was released")

    async def _acquire(self) -> None:
        deadline = time.monotonic() + self._wait
        ttl_ms = int(self._ttl * 1000)
        kept_ms = max(ttl_ms * 10, _NUMBER_KEPT_SECONDS * 1000)
        while True:
            asked = time.monotonic()
            acquired: list[Any] = await answer(
                self._acquire_script(keys=[self._key, self._number_key], args=[self._token, ttl_ms, kept_ms]),
                self._ttl * (1 - _DRIFT),  # a later answer would be for a lock that has expired
            )
            if int(acquired[0]):
                self._hold_from(asked)
                self._number = int(acquired[1])
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise LockBusy(f"the lock was held by another for {self._wait:g} s")
            shortest, longest = _PAUSE_SECONDS
            pause = min(longest, max(shortest, int(acquired[1]) / 1000 if int(acquired[1]) >= 0 else longest))
            await asyncio.sleep(min(left, random.uniform(pause / 2, pause)))  # noqa: S311 - keeps waiters apart

    def _hold_from(self, asked: float) -> None:
        """Note from when the lock is held.

        Redis begins to count after the request, so no other owner can have it before this plus the time to live.
        """
        self._until = asked + self._ttl * (1 - _DRIFT)

    async def _watch(self, owner: asyncio.Task[Any]) -> None:
        """Renew while the block runs.

        Ends when the lock is lost: Redis says so, or the time is over.
        """
        pause = self._ttl / _RENEWALS
        while True:
            await asyncio.sleep(max(0.0, min(pause, self._until - time.monotonic())))
            asked = time.monotonic()  # not the loop's, which stands still within a callback (uvloop)
            if asked >= self._until:
                # This process was stopped, its loop was busy, or Redis did not answer in all that time.
                self._lose(owner, f"the lock was not renewed within its ttl of {self._ttl:g} s")
                return
            try:
                renewed = await answer(
                    self._renew_script(keys=[self._key], args=[self._token, int(self._ttl * 1000)]), self._until - asked
                )
            except RedisAway:
                pause = min(self._ttl / _RENEWALS, _PAUSE_SECONDS[1])  # time is left: renew again soon
                continue
            if not renewed:
                self._lose(owner, "the lock is another's, or Redis has lost it")
                return
            pause = self._ttl / _RENEWALS
            self._hold_from(asked)

    def _lose(self, owner: asyncio.Task[Any], why: str) -> None:
        self._why = why
        self.lost.set()
        if not self._ending:
            self._cancelled = True
            owner.cancel()

    async def _release(self) -> bool | None:
        """Release the lock.

        Returns False if it was lost before, None if Redis did not answer: then the time to live ends it.
        """
        with suppress(RedisAway):
            return bool(await answer(self._release_script(keys=[self._key], args=[self._token]), _RELEASE_SECONDS))
        return None


async def check_fence(
    tx: Database,
    table: str,
    key: str,
    number: int,
    *,
    key_column: str = "name",
    number_column: str = "number",
) -> None:
    """Let only the newest owner write.

    Increases the number kept for `key`; raises LateWriter if it is higher already.

    tx: a `Tx`, or an asyncpg connection **in the transaction that does the writes**, before them and before the reads
    that they follow from. table: your own, as in ``create table fences (name text primary key, number bigint not
    null)``; rows are inserted on first use. number: a lock's.

    One upsert that only moves forward. Its row lock is held until the transaction ends, so an earlier owner either
    commits before a later one's check is answered, or is refused. The same number passes again.

    Raises LateWriter, TransactionMisuse outside a transaction (the check would protect nothing), TypeError and
    ValueError for an invalid number, Misfit for a table, column or unique index that does not exist.

    Limitations: rows that others write without it are not protected. Taking the lock does not move the fence: until the
    later owner calls this, an earlier one still passes, and what the later one reads before is not protected.
    """
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"check_fence: a number, not {type(number).__name__}")
    if not 0 < number < 2**63:
        raise ValueError("check_fence: a fencing number is positive, and a bigint")
    in_transaction = getattr(tx, "is_in_transaction", None)  # a Tx is always in one
    if in_transaction is not None and not in_transaction():
        raise TransactionMisuse(
            "check_fence: outside a transaction it protects nothing; open one around it and the writes"
        )
    name, kept = ident(key_column), ident(number_column)
    passed = await checked(
        tx.fetchval(
            f"insert into {table_ident(table)} as kept ({name}, {kept}) values ($1, $2) "  # noqa: S608 - by ident
            f"on conflict ({name}) do update set {kept} = excluded.{kept} where kept.{kept} <= excluded.{kept} returning true",
            key,
            number,
        ),
        f"check_fence on {table}",
    )
    if not passed:
        raise LateWriter(f"check_fence on {table}: a later owner of the lock has written already")
