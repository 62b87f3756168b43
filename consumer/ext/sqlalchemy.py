"""SQLAlchemy in handlers: a session, and deferred statements, on the Tx.

    from consumer.ext.sqlalchemy import session

    async with session(tx) as s:
        s.add(Payment(id=payment.id))

See docs/how-to/sqlalchemy.md. Limitations: one task at a time uses a session; nothing is streamed; two-phase commits,
isolation levels and `autocommit` are the framework's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import lru_cache
from typing import Any, NoReturn, TypeVar, overload

from consumer.core.errors import Misconfigured, TransactionMisuse

try:
    from sqlalchemy import event
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.ext.asyncio import AsyncSession
except ModuleNotFoundError as error:
    raise Misconfigured(
        f"consumer.ext.sqlalchemy: no module {error.name!r}; pip install 'idempotent-consumer[sqlalchemy]'"
    ) from None

from consumer.ext.sqlalchemy_dialect import ENDED, connect

S = TypeVar("S", bound=AsyncSession)

_IDLE_MAX = 8  # of SQLAlchemy's connections, for one of the worker: messages that run at the same time use one each
_ROLLBACK = (
    "rollback() of a session in a handler: the transaction holds other messages too; raise to store nothing of this "
    "message, or use `async with s.begin_nested()` for a part that may fail"
)
_ROLLED_BACK = (
    "the handler: it went on after its session was rolled back, and its writes stay; raise to store nothing of this "
    "message, or use `async with s.begin_nested()` for a part that may fail"
)


@overload
def session(tx: Any) -> AbstractAsyncContextManager[AsyncSession]: ...
@overload
def session(tx: Any, kind: type[S]) -> AbstractAsyncContextManager[S]: ...
@asynccontextmanager
async def session(tx: Any, kind: Any = AsyncSession) -> AsyncIterator[Any]:
    """Open a session whose statements are those of a `Tx`.

    What was deferred before is sent first. ``commit()`` flushes; objects keep their values. ``begin_nested()`` is
    `Tx.savepoint`. The end of the block releases savepoints that are still open, and flushes what is left. kind: the class
    of the session, for example SQLModel's ``AsyncSession``.

    Raises TransactionMisuse for ``rollback()``, for SQL that controls the transaction and for ``stream()``. An error of
    the database is SQLAlchemy's inside the block (``IntegrityError`` …), and asyncpg's, as of ``tx.execute``, once it
    leaves the block. As there, it fails the message unless a savepoint was around it. A caller may not assume that
    objects can be used after the block where something of them is not loaded.
    """
    if not hasattr(tx, "savepoint"):
        raise TransactionMisuse(f"session(): a {type(tx).__name__} is no Tx; give the Tx that the handler gets")
    if not hasattr(kind, "sync_session_class"):
        raise TransactionMisuse(
            "session(): its class is no AsyncSession; give SQLAlchemy's, SQLModel's, or one of yours"
        )
    idle = tx._scope.preparer.idle
    connection, driver = idle.pop() if idle else await connect()
    driver.tx = tx
    opened = kind(bind=connection, sync_session_class=_sync_class(kind.sync_session_class), expire_on_commit=False)
    opened.sync_session.consumer_tx = tx
    try:
        yield opened
        while (savepoint := opened.get_nested_transaction()) is not None:  # as the COMMIT of a session of its own
            await savepoint.commit()
        if opened.new or opened.dirty or opened.deleted:
            await opened.flush()
    except DBAPIError as error:
        cause = getattr(error.orig, "__cause__", None)
        if cause is None:
            raise
        raise cause from None  # the driver's own, whose class and SQLSTATE say what becomes of the message
    finally:
        try:
            await driver.undo_all()
        finally:
            opened.sync_session.close()
            opened.sync_session.consumer_tx = None
            driver.tx = None
            if not connection.invalidated and not connection.in_transaction() and len(idle) < _IDLE_MAX:
                idle.append((connection, driver))


@lru_cache
def _sync_class(base: type[Any]) -> type[Any]:
    """Return a class of sessions that leave the transaction to the framework."""

    class TxSession(base):  # type: ignore[misc]
        def get_bind(self, *args: Any, **options: Any) -> Any:
            if self.consumer_tx is None:  # its connection may be in use for another message
                raise TransactionMisuse(ENDED)
            return super().get_bind(*args, **options)

        def commit(self) -> None:
            self.flush()

        def rollback(self) -> NoReturn:
            raise TransactionMisuse(_ROLLBACK)

    def rolled_back(synchronous: Any, previous: Any) -> None:
        tx = synchronous.consumer_tx
        if previous.parent is None and tx is not None and tx.error is None:
            tx.error = TransactionMisuse(_ROLLED_BACK)

    event.listen(TxSession, "after_soft_rollback", rolled_back)
    return TxSession
