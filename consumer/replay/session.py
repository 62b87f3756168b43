"""Respect holds of dead letters in a replay that stores.

A dead letter holds back later messages of its key. A worker asks only about the keys that it knows to be held, because
only the owner of a partition makes holds in it. A replay settles messages of partitions that it does not own. So it
does more, in each transaction that stores:

- It asks about every key that it has a message of, since workers and other replays make holds while it runs.
- Before it asks, it locks the positions of its partitions until its COMMIT. The owner updates them in the transaction
  that makes a hold, so no hold appears between the question and the COMMIT.
- When it makes a hold itself, it raises `positions.holds`. The owner's next transaction in that partition reads another
  number than it read with the holds (Fenced), rolls back, and reads position and holds again. A transaction of the owner
  that runs meanwhile waits for the row, and then reads the same.

Limitation: a message that waits for its next attempt in a worker is no dead letter, and holds nothing here. A replay
that covers it settles it itself, in order. A replay that is narrowed to later messages overtakes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from consumer.core.dead_letters import KeyHold, blocks_key
from consumer.core.delivery import Delivery
from consumer.core.message import Partition
from consumer.core.ordering import Scheduler
from consumer.core.outcome import Dead
from consumer.postgres import positions
from consumer.postgres.session import Session


class AskingScheduler(Scheduler):
    """Treats every key as possibly held by a dead letter."""

    def possibly_held(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Return all deliveries with a key."""
        return [delivery for delivery in deliveries if delivery.ordering_key_hash() is not None]


class ReplaySession(Session):
    """Settles messages of partitions that others own, in key order."""

    owns_positions = False

    async def key_holds(self, deliveries: Sequence[Delivery]) -> dict[Delivery, KeyHold]:
        """Lock the positions, then return the holds of these keys."""
        await positions.lock_of_handler(self.connection, *_handler_and_partitions(deliveries))
        return await super().key_holds(deliveries)

    async def store_dead_letters(
        self, dead: Mapping[Delivery, Dead], attempts: Mapping[Delivery, int], claimed: Sequence[Delivery]
    ) -> None:
        """Store dead letters, and make their new holds known to the owners."""
        await super().store_dead_letters(dead, attempts, claimed)
        holding = [
            delivery
            for delivery, verdict in dead.items()
            if blocks_key(verdict) and delivery.ordering_key_hash() is not None
        ]
        if holding:
            await positions.count_hold(self.connection, *_handler_and_partitions(holding))


def _handler_and_partitions(deliveries: Sequence[Delivery]) -> tuple[int, list[Partition]]:
    return deliveries[0].handler.number, sorted({delivery.partition for delivery in deliveries})
