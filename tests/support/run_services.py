"""Start Kafka, PostgreSQL and Valkey until Ctrl-C: `make services`.

Arguments: topics to create.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from services import Kafka  # noqa: E402

from consumer.kafka.admin import create_topic  # noqa: E402
from consumer.local_servers import Postgres, Valkey  # noqa: E402
from consumer.settings import Settings  # noqa: E402

PARTITIONS = 4


async def create(bootstrap_servers: str, topics: list[str]) -> None:
    settings = Settings(kafka_bootstrap_servers=bootstrap_servers)
    for topic in topics:
        await create_topic(settings, topic, PARTITIONS)


def main() -> None:
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # servers that start meanwhile are ended by the context managers
    with Kafka() as kafka, Postgres() as postgres, Valkey() as valkey:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
        for signum in ends:
            signal.signal(signum, lambda *_: None)
        asyncio.run(create(kafka.bootstrap_servers, sys.argv[1:]))
        print(f"export CONSUMER_KAFKA_BOOTSTRAP_SERVERS={kafka.bootstrap_servers}")
        print(f"export CONSUMER_POSTGRES_DSN={postgres.dsn()}")
        print(f"export CONSUMER_REDIS_URL={valkey.url}")
        print("# running until Ctrl-C: paste these lines into another terminal", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
