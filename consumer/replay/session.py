"""Holds of dead letters for a replay that stores: it settles messages of partitions that it does not own.

Knows positions and holds; knows no Kafka. A worker asks only about the chains that it knows to be held, because only the owner of a
partition makes holds in it. A replay is the exception, so it does more, in each transaction that stores:

- It asks about every chain that it has a message of, since workers and other replays make holds while it runs.
- Before it asks it locks the positions of its partitions, until its COMMIT. The owner updates them in the transaction that makes a hold,
  so no hold appears between the question and the COMMIT.
- When it makes a hold itself, it raises `positions.holds`. The owner's next transaction in that partition finds another number than it
  read with the holds (Fenced), is undone, and reads position and holds again. A transaction of the owner that runs meanwhile
  waits for the row and finds the same.

Limitation: a message that waits for its next attempt in a worker is no dead letter and holds nothing here; a replay that covers
it too settles it itself, in order. One that is narrowed to later messages overtakes it.
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


class AskingLane(Scheduler):
    """A Scheduler that treats every key as possibly held by a dead letter."""

    def possibly_held(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        return [each for each in deliveries if each.ordering_key_hash() is not None]


class ReplaySession(Session):
    """A Session that settles messages of partitions which others own, in the order of their keys."""

    owns_positions = False

    async def key_holds(self, deliveries: Sequence[Delivery]) -> dict[Delivery, KeyHold]:
        await positions.lock_of_handler(self.connection, *_places(deliveries))
        return await super().key_holds(deliveries)

    async def store_dead_letters(
        self, dead: Mapping[Delivery, Dead], attempts: Mapping[Delivery, int], claimed: Sequence[Delivery]
    ) -> None:
        await super().store_dead_letters(dead, attempts, claimed)
        holding = [
            each for each, verdict in dead.items() if blocks_key(verdict) and each.ordering_key_hash() is not None
        ]
        if holding:
            await positions.count_hold(self.connection, *_places(holding))


def _places(deliveries: Sequence[Delivery]) -> tuple[int, list[Partition]]:
    return deliveries[0].handler.number, sorted({delivery.partition for delivery in deliveries})
