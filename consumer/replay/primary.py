"""Opens connections to one PostgreSQL, and explains failures of services.

Imports postgres and kafka.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from consumer.core.errors import CannotTell
from consumer.core.log_identity import ObservedLog, check_log
from consumer.kafka.errors import KafkaError, LogTruncated
from consumer.kafka.protocol import Identity
from consumer.postgres.application_codecs import ConnectionInit
from consumer.postgres.connection import dsn_label, wait_for
from consumer.postgres.epoch import lineage
from consumer.postgres.errors import Outage
from consumer.postgres.session import Session
from consumer.settings import Settings
from consumer.transaction.result import LedgerIds


class Primary:
    """Opens connections to one PostgreSQL, and refuses another one."""

    def __init__(self, settings: Settings, how_far: Callable[[], str], init: ConnectionInit | None = None) -> None:
        self.settings = settings
        self.epoch = ""
        self._init = init
        self._how_far = how_far

    async def open(self, kind: type[Session] = Session) -> Session:
        """Open a connection to the primary, and wait for it.

        Raises ServiceUnavailable, and CannotTell for another database.
        """
        session = await wait_for(lambda left: kind.open(self.settings, left, self._init), self.settings.wait_seconds)
        if not self.epoch:
            self.epoch = session.epoch
        elif lineage(session.epoch) != lineage(self.epoch):
            session.close()
            raise CannotTell(
                f"PostgreSQL: another one now, or an earlier state of it; start the replay again ({self._how_far()})"
            )
        return session


@contextmanager
def failures_as_cannot_tell(settings: Settings, how_far: Callable[[], str]) -> Iterator[None]:
    """Raise CannotTell where the work is cancelled or a service fails."""
    try:
        yield
    except asyncio.CancelledError:
        raise CannotTell(f"interrupted {how_far()}") from None
    except LogTruncated as error:
        raise CannotTell(
            f"{error.partition.topic}:{error.partition.partition}: records were removed from the log while it was read; "
            f"it no longer holds offset {error.position} ({how_far()})"
        ) from None
    except (KafkaError, TimeoutError) as error:
        raise CannotTell(f"Kafka: {str(error) or type(error).__name__} ({how_far()})") from None
    except Outage as error:
        raise CannotTell(f"{dsn_label(settings.dsn)}: {error} ({how_far()})") from None


def refuse_other_logs(ids: LedgerIds, identity: Identity) -> None:
    """Raise CannotTell for a topic that the ledger does not know."""
    for partition, position in sorted(ids.logs.items()):
        log = ObservedLog(identity.cluster_id, identity.topics.get(partition.topic))
        if halt := check_log(partition, position, log):
            raise CannotTell(f"{halt.text}; `consumer positions APP {halt.do}` begins with what is there now")
