"""The same work with FastStream: interleaved drains of one topic.

Effects are checked after each drain:

    python -m venv .cache/others
    .cache/others/bin/pip install 'faststream[kafka]==0.7.8' asyncpg uvloop
    .venv/bin/python benchmarks/others.py --python .cache/others/bin/python --rounds 3

FastStream is not a dependency of this project, so it runs in an environment of its own (faststream_worker.py). Limitations: one
machine, one workload, one version.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

import asyncpg
import bench as drains
from bench import Bench, Produced, Workload, servers
from contest import Contestant, Row, table, turns

from consumer import logs
from consumer.worker.event_loop import run as run_loop

WORKER = Path(__file__).with_name("faststream_worker.py")


async def faststream(bench: Bench, produced: Produced, python: str, kind: str, messages: int) -> float:
    """One drain by FastStream: messages a second."""
    dsn = await bench.database()
    environment = {
        "PATH": os.environ["PATH"],
        "DRAIN_KAFKA": bench.kafka.bootstrap_servers,
        "DRAIN_POSTGRES": dsn,
        "DRAIN_TOPIC": produced.topic,
        "DRAIN_KIND": kind,
        "DRAIN_MESSAGES": str(messages),
    }
    process = await asyncio.create_subprocess_exec(python, WORKER, env=environment, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    lines = [line for line in output.splitlines() if line.startswith(b'{"messages"')]
    if process.returncode or not lines:
        raise SystemExit(f"FastStream ended with {process.returncode}: {output[-500:]!r}")
    if messages == len(produced.entries):
        await bench.check(dsn, produced.entries)
    else:
        await _check_part(dsn)
    await bench.drop(dsn)
    drained = json.loads(lines[0])
    return float(drained["messages"] / drained["seconds"])


async def _check_part(dsn: str) -> None:
    """Raise unless the effects of a part of the topic exist once."""
    connection = await asyncpg.connect(dsn)
    [(count, ids, total)] = await connection.fetch("select count(*), count(distinct id), sum(amount) from effects")
    balance = await connection.fetchval("select sum(balance) from accounts")
    await connection.close()
    if count != ids or total != balance:
        raise SystemExit(f"wrong effects: {(count, ids, total, balance)}")


async def compare(python: str, messages: int, rounds: int) -> str:
    with ExitStack() as stack:
        kafka, postgres, valkey = (stack.enter_context(server) for server in servers())
        bench = Bench(kafka, postgres, valkey)
        produced = await bench.produced(Workload(messages))
        contestants: dict[str, Contestant] = {
            "loop by hand, a transaction a message": lambda: bench.naive(produced),
            "FastStream, a transaction a message": lambda: faststream(
                bench, produced, python, "message", min(drains.NAIVE_MESSAGES, messages)
            ),
            "this project, two awaited statements a message": lambda: bench.ours(produced, "await"),
            "FastStream, batches claimed by hand": lambda: faststream(bench, produced, python, "batch", messages),
            "loop by hand, executemany, two connections": lambda: bench.by_hand_executemany(produced),
            "this project, deferred writes": lambda: bench.ours(produced, "defer"),
        }
        return table(_rows(await turns(contestants, rounds)))


def _rows(seconds: dict[str, list[float]]) -> list[Row]:
    """Medians, and ratios to the first contestant within each round.

    Within a round, because the load of the machine changes between rounds.
    """
    base = next(iter(seconds.values()))
    rows: list[Row] = []
    for name, speeds in seconds.items():
        ratios = sorted(speed / other for speed, other in zip(speeds, base, strict=True))
        rows.append(
            {
                "contestant": name,
                "msg/s": f"{statistics.median(speeds):,.0f}",
                "times the loop by hand": f"{statistics.median(ratios):.2f}",
                "lowest": f"{ratios[0]:.2f}",
                "highest": f"{ratios[-1]:.2f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="a Python that has FastStream")
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--slow-messages", type=int, default=drains.NAIVE_MESSAGES, help="of the two slowest")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    logs.configure("error", "json")
    drains.NAIVE_MESSAGES = given.slow_messages
    print(run_loop(compare(given.python, given.messages, given.rounds)), file=sys.stdout)


if __name__ == "__main__":
    main()
