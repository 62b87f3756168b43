"""What a batch's transaction asks of the connection that holds it.

`postgres.session.Session` does it with the ledger. A rebuild does it with temporary tables, inside a transaction that
is rolled back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from consumer.core.dead_letters import KeyHold
from consumer.core.delivery import Delivery, PositionUpdate
from consumer.core.outcome import Dead
from consumer.deferred_writes.writer import BulkWriter
from consumer.outbox.record import Outgoing, StoredStream
from consumer.postgres.claims import ExistingClaim

if TYPE_CHECKING:  # the pytest plugin imports this file and must not load the driver
    from consumer.postgres.application_codecs import Preparer


class BatchStore(Protocol):
    """One transaction at a time, and what a batch stores in it.

    See Session for the methods. connection: runs statements of ours. handler_connection: runs the handlers'. preparer: for
    those of an ORM. batch_seconds_max: after which no further message of a batch is started.
    """

    bulk_writer: BulkWriter
    batch_seconds_max: float
    preparer: Preparer

    @property
    def connection(self) -> Any: ...

    @property
    def handler_connection(self) -> Any: ...

    @property
    def is_usable(self) -> bool: ...

    async def begin(self) -> None: ...

    async def commit(self) -> None: ...

    async def rollback(self) -> None: ...

    def close(self) -> None: ...

    async def claim(
        self, deliveries: Sequence[Delivery], topics: Mapping[str, int], /
    ) -> dict[Delivery, ExistingClaim]: ...

    async def claims_of(
        self, deliveries: Sequence[Delivery], topics: Mapping[str, int], /
    ) -> dict[Delivery, ExistingClaim]: ...

    @property
    def has_forgotten(self) -> bool: ...

    async def too_old(self, deliveries: Sequence[Delivery], /) -> list[Delivery]: ...

    async def key_holds(self, deliveries: Sequence[Delivery], /) -> dict[Delivery, KeyHold]: ...

    async def release_claims(self, deliveries: Sequence[Delivery], /) -> None: ...

    async def store_dead_letters(
        self, dead: Mapping[Delivery, Dead], attempts: Mapping[Delivery, int], claimed: Sequence[Delivery]
    ) -> None: ...

    async def dead_letter_copies(self) -> Sequence[Outgoing]: ...

    async def save_attempts(
        self, tried: Mapping[Delivery, tuple[int, float]], settled: Sequence[Delivery], /
    ) -> None: ...

    async def write_positions(
        self, app: str, moves: Sequence[PositionUpdate], counts: Mapping[tuple[int, int, int, str], int], /
    ) -> None: ...

    async def store_outgoing(self, app: str, outgoing: Sequence[Outgoing], /) -> Sequence[StoredStream]: ...
