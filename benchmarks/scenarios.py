"""The scenarios by name, and those that compare throughput.

What a goal is compared with is measured in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable

from bench import Bench, Workload
from contest import Contestant, Options, Row, ScenarioResult, rows_of, turns
from costs import cost, ledger, memory
from latencies import killed, latency, start
from metrics_cost import metrics


async def reference(bench: Bench, given: Options) -> ScenarioResult:
    """All contestants on the workload of reference."""
    produced = await bench.produced(Workload(given.messages))
    contestants: dict[str, Contestant] = {
        "the loop people write": lambda: bench.naive(produced),
        "by hand: executemany, two connections": lambda: bench.by_hand_executemany(produced),
        "by hand: unnest, two connections": lambda: bench.by_hand_unnest(produced),
        "ours: defer": lambda: bench.ours(produced, "defer"),
        "ours: defer, with Redis": lambda: bench.ours(produced, "defer", redis=True),
        "ours: defer, two workers": lambda: bench.ours(produced, "defer", workers=2),
        "ours: two awaited statements": lambda: bench.ours(produced, "await"),
        "ours: batch handler": lambda: bench.ours(produced, "batch"),
        "ours: batch handler, with Redis": lambda: bench.ours(produced, "batch", redis=True),
        "ours: batch handler, two workers": lambda: bench.ours(produced, "batch", workers=2),
        "limit: aiokafka alone": lambda: bench.aiokafka_alone(produced),
        "limit: PostgreSQL alone": lambda: bench.postgresql_alone(produced),
    }
    first = next(iter(contestants))
    if given.only:
        wanted = [
            first,
            *(contestant for contestant in contestants if any(part in contestant for part in given.only.split(","))),
        ]
        contestants = {name: contestants[name] for name in dict.fromkeys(wanted)}
    seconds = await turns(contestants, given.rounds)
    return ScenarioResult(
        f"{given.messages:,} messages in 8 partitions, about 200 bytes of JSON, 10 % duplicates, 1,000 keys; the effect of a "
        "message is one INSERT and one UPDATE.",
        rows_of(seconds, first),
        {name: statistics.median(speeds) for name, speeds in seconds.items()},
    )


async def replays(bench: Bench, given: Options) -> ScenarioResult:
    """Read applied messages again, by a worker and by `consumer replay`.

    Compared with reading alone.
    """
    produced = await bench.produced(Workload(given.messages))
    base = "limit: aiokafka alone"
    contestants: dict[str, Contestant] = {
        base: lambda: bench.aiokafka_alone(produced),
        "a worker again, with Redis": lambda: bench.again(produced, redis=True),
        "a worker again": lambda: bench.again(produced, redis=False),
        "replay: check": lambda: bench.replay(produced, "check"),
        "replay: check, with Redis": lambda: bench.replay(produced, "check", redis=True),
        "replay: apply, nothing missing": lambda: bench.replay(produced, "apply"),
        "replay: rebuild": lambda: bench.replay(produced, "rebuild"),
    }
    return ScenarioResult(
        "All messages are applied: 100 % duplicates.", rows_of(await turns(contestants, given.rounds), base)
    )


async def duplicates(bench: Bench, given: Options) -> ScenarioResult:
    """What the pre-check costs and saves, by the share of duplicates."""
    rows: list[Row] = []
    for share in (0.0, 0.1, 0.2, 0.5, 0.8):
        produced = await bench.produced(Workload(given.messages, duplicates=share))
        seconds = await turns(
            {
                f"{share:.0%} duplicates, without Redis": lambda produced=produced: bench.ours(produced, "defer"),  # type: ignore[misc]
                f"{share:.0%} duplicates, with Redis": lambda produced=produced: bench.ours(
                    produced, "defer", redis=True
                ),  # type: ignore[misc]
            },
            given.rounds,
        )
        off, on = (statistics.median(speeds) for speeds in seconds.values())
        rows.append(
            {
                "duplicates": f"{share:.0%}",
                "Redis off, msg/s": f"{off:,.0f}",
                "Redis on, msg/s": f"{on:,.0f}",
                "on / off": f"{on / off:.2f}",
            }
        )
    return ScenarioResult("A handler that defers; the duplicates repeat earlier messages of the same drain.", rows)


async def shapes(bench: Bench, given: Options) -> ScenarioResult:
    """Keys and partitions otherwise than in the workload of reference."""
    base = "reference: 8 partitions, 1,000 keys"
    workloads = {
        base: Workload(given.messages),
        "one hot key": Workload(given.messages, hot=True),
        "1,000,000 keys": Workload(given.messages, keys=1_000_000),
        "1 partition": Workload(given.messages, partitions=1),
        "64 partitions": Workload(given.messages, partitions=64),
    }
    produced_of = {name: await bench.produced(workload) for name, workload in workloads.items()}
    seconds = await turns(
        {name: lambda produced=produced: bench.ours(produced, "defer") for name, produced in produced_of.items()},  # type: ignore[misc]
        given.rounds,
    )
    return ScenarioResult("A handler that defers, one worker.", rows_of(seconds, base))


async def slow(bench: Bench, given: Options) -> ScenarioResult:
    """Handlers that wait 10 ms each: concurrency=64, one partition, 1,000 keys."""
    messages = min(given.messages, 30_000)
    produced = await bench.produced(Workload(messages, partitions=1))
    seconds = await turns({"slow handlers": lambda: bench.ours(produced, "slow")}, given.rounds)
    speed = statistics.median(seconds["slow handlers"])
    return ScenarioResult(
        "Each handler waits 10 ms for something elsewhere; 64 at a time make 6,400 msg/s at most.",
        [{"msg/s": f"{speed:,.0f}", "of 64 / 10 ms": f"{speed / 6400:.0%}"}],
    )


SCENARIOS: dict[str, tuple[str, Callable[[Bench, Options], Awaitable[ScenarioResult]]]] = {
    "reference": ("Against the loop people write, the best by hand, and the limits", reference),
    "replay": ("Replay", replays),
    "duplicates": ("Duplicates and the pre-check", duplicates),
    "shapes": ("Keys and partitions", shapes),
    "slow": ("Slow handlers", slow),
    "latency": ("Latency, open loop", latency),
    "killed": ("A worker killed", killed),
    "ledger": ("A full ledger", ledger),
    "cost": ("Cost of a message", cost),
    "memory": ("Memory", memory),
    "start": ("Start", start),
    "metrics": ("Metrics", metrics),
}


UNUSUAL = frozenset({"memory", "publishing-steady"})  # only when named: it takes long, or says nothing when short
