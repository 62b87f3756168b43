"""Logs members of the App's group that are not workers.

The messages of their partitions are not applied.
"""

from __future__ import annotations

import logging

from consumer.kafka import group
from consumer.logs import event
from consumer.settings import Settings


class GroupCheck:
    """Checks the members of the group after each rebalance.

    is_due: the group has changed since the last check.
    """

    def __init__(self, app: str, settings: Settings) -> None:
        self.is_due = True
        self._app = app
        self._settings = settings
        self._foreign_members: tuple[str, ...] = ()

    async def run(self) -> None:
        """Check the members if that is due.

        Raises KafkaError, TimeoutError and OSError.
        """
        if not self.is_due:
            return
        members = await group.describe_group(self._settings, self._app)
        self.is_due = not members.settled
        if members.foreign_members and members.foreign_members != self._foreign_members:
            event(
                logging.WARNING,
                "another client is a member of this App's group: the messages of its partitions are not applied",
                group=self._app,
                clients=", ".join(members.foreign_members),
                do="give it another group id",
            )
        if members.settled:
            self._foreign_members = members.foreign_members
