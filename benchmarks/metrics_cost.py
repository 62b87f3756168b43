"""What metrics cost a worker."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

from bench import Bench, Workload
from contest import Contestant, Options, Row, ScenarioResult, turns

from consumer.transaction.handler_runner import HandlerRunner
from consumer.transaction.limits import CallTracker
from consumer.worker.batch_metrics import BatchMetrics
from consumer.worker.metrics_report import MetricsReport

# What a worker does for metrics alone.
METRICS = (
    (BatchMetrics, "settled"),
    (CallTracker, "_record_step"),
    (HandlerRunner, "_record_times"),
    (MetricsReport, "_send_changes"),
    (MetricsReport, "_send_beat"),
)


class Stopwatch:
    """CPU time of some methods while a block runs.

    The time of the functions that they call is included.
    """

    def __init__(self, *methods: tuple[type, str]) -> None:
        self.seconds = 0.0
        self._methods = methods
        self._is_running = False

    def __enter__(self) -> Stopwatch:
        self._originals = [getattr(owner, name) for owner, name in self._methods]
        for (owner, name), original in zip(self._methods, self._originals, strict=True):
            setattr(owner, name, self._timed(original))
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), original in zip(self._methods, self._originals, strict=True):
            setattr(owner, name, original)

    def _timed(self, method: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(method)
        def timed(*args: object, **options: object) -> object:
            if self._is_running:
                return method(*args, **options)
            self._is_running = True
            begun = time.thread_time()
            try:
                return method(*args, **options)
            finally:
                self.seconds += time.thread_time() - begun
                self._is_running = False

        return timed


async def metrics(bench: Bench, given: Options) -> ScenarioResult:
    """The workload of reference without and with metrics.

    Where other processes disturb the times, the ratio of two runs says little; the share of one run does.
    """
    produced = await bench.produced(Workload(given.messages))
    shares: dict[str, list[float]] = {"defer": [], "batch": []}

    async def with_metrics(kind: str) -> float:
        with Stopwatch(*METRICS) as watch:
            speed = await bench.ours(produced, kind, clock=time.process_time, http="127.0.0.1:0")
        shares[kind].append(watch.seconds / (len(produced.entries) / speed))
        return speed

    contestants: dict[str, Contestant] = {}
    for kind in shares:
        contestants[f"{kind}, without"] = functools.partial(bench.ours, produced, kind, clock=time.process_time)
        contestants[f"{kind}, with metrics"] = functools.partial(with_metrics, kind)
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(given.rounds):
        order = contestants if number % 2 else dict(reversed(contestants.items()))  # who is second is slower, or faster
        for name, of_round in (await turns(order, 1)).items():
            speeds[name] += of_round
    rows: list[Row] = []
    for kind, of_kind in shares.items():
        pairs = zip(speeds[f"{kind}, without"], speeds[f"{kind}, with metrics"], strict=True)
        costs = sorted(before / after - 1 for before, after in pairs)
        rows.append(
            {
                "handler": kind,
                "share of CPU in metrics": f"{statistics.median(of_kind):.2%}",
                "highest share": f"{max(of_kind):.2%}",
                "CPU against a run without": f"{statistics.median(costs):+.1%}",
                "lowest": f"{costs[0]:+.1%}",
                "highest": f"{costs[-1]:+.1%}",
            }
        )
    return ScenarioResult(
        "CPU time of the worker's process that goes to metrics with `--http`, in alternating runs.", rows
    )
