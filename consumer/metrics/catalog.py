"""Every metric: its name, kind, labels, buckets, and what it says.

Pure. docs/reference/metrics.md is written from this file, and the dashboard and the alerts are checked against it. Labels
hold names from the code and closed sets; never ids, keys, payloads or texts of errors. Names follow Prometheus' rules
(https://prometheus.io/docs/practices/naming/): base units, `_total` for counters.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

PREFIX = "idempotent_consumer_"
VALUES_MAX = 50  # of a bounded label; the others become OTHER
OTHER = "other"


class Kind(Enum):
    """How values of several workers are put together."""

    COUNTER = "counter"  # added; it stays when its worker ends
    HISTOGRAM = "histogram"  # likewise
    GAUGE = "gauge"  # added, of the workers that run
    HIGHEST = "highest"  # a gauge: the largest value of all workers counts


class Source(Enum):
    """Who measures."""

    WORKER = "worker"  # each worker process
    SUPERVISOR = "supervisor"  # the process of `consumer run`
    DATABASE = "database"  # its queries: all replicas show the same value, so take the maximum
    REPLAY = "replay"  # `consumer replay --metrics FILE`, a job


@dataclass(frozen=True, eq=False)
class Metric:
    """One metric.

    name: without the prefix. bounded: a label with values that only the running App knows. buckets: upper bounds of a histogram,
    without infinity.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    source: Source = Source.WORKER
    bounded: str | None = None

    @property
    def full_name(self) -> str:
        """The name as Prometheus sees it."""
        return PREFIX + self.name


_SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0)
_AGES = (1.0, 10.0, 60.0, 600.0, 3600.0, 6 * 3600.0, 86400.0, 3 * 86400.0, 7 * 86400.0, 14 * 86400.0, 30 * 86400.0)
_SIZES = (1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0)

# -- what workers count -----------------------------------------------------------------------------------------------

MESSAGES = Metric(
    "messages_total",
    Kind.COUNTER,
    "Messages that were settled, by outcome: applied, duplicate, dead_lettered or skipped. cause: how a duplicate was "
    "recognized (batch, precheck, ledger, dead_letter), or why a message is a dead letter",
    ("handler", "topic", "outcome", "cause"),
)
FAILED_ATTEMPTS = Metric(
    "failed_attempts_total",
    Kind.COUNTER,
    f"Calls of a handler that failed, by exception class or SQLSTATE; {VALUES_MAX} kinds, the others are {OTHER}",
    ("handler", "topic", "kind"),
    bounded="kind",
)
HANDLER_DURATION = Metric(
    "handler_duration_seconds",
    Kind.HISTOGRAM,
    "Time of a handler's call. Calls that never wait are timed up to 100 at a time, and count with their mean",
    ("handler",),
    _SHORT,
)
BATCH_DURATION = Metric(
    "batch_duration_seconds",
    Kind.HISTOGRAM,
    "Time of a transaction by step: claim, handlers (with their statements), store (dead letters, positions, outbox), commit",
    ("step",),
    _SHORT,
)
BATCH_MESSAGES = Metric("batch_messages", Kind.HISTOGRAM, "Messages of a committed transaction", (), _SIZES)
BATCHES = Metric(
    "batches_total",
    Kind.COUNTER,
    "Transactions by result: committed; isolated (run again in smaller parts, to find a failed message); conflict, outage "
    "(run again); fenced (another worker has the partitions)",
    ("result",),
)
DELAY = Metric(
    "delay_seconds",
    Kind.HISTOGRAM,
    "Time from a record's timestamp to the COMMIT of its effects; up to 16 messages of a batch stand for all of it",
    ("handler", "topic"),
    _LONG,
)
LAG_MESSAGES = Metric(
    "lag_messages",
    Kind.HIGHEST,
    "Offsets from the position to the end of the log, of partitions that a worker owns",
    ("topic", "partition"),
)
LAG_SECONDS = Metric(
    "lag_seconds",
    Kind.HIGHEST,
    "Age of the oldest record that is not settled, of partitions that a worker owns; where none was read yet, for how long "
    "there has been one",
    ("topic", "partition"),
)
PARTITION_STOPPED = Metric(
    "partition_stopped",
    Kind.HIGHEST,
    "1 while a partition is not read until an operator decides or the cause is gone",
    ("topic", "partition", "reason"),
)
WAITING = Metric(
    "waiting_messages",
    Kind.GAUGE,
    "Messages in workers that are tried again: retry (a failed attempt), systemic (not known to be the message's fault, "
    "uncounted), behind (another message of their key)",
    ("handler", "topic", "reason"),
)
PAUSED = Metric("paused", Kind.GAUGE, "Partitions that an operator has paused", ("topic",))
PRECHECK = Metric(
    "precheck_total",
    Kind.COUNTER,
    "Messages by the answer of Redis: hit, miss, late (none within the budget), off (not asked: Redis is away), sampled_out "
    "(not asked: few duplicates lately)",
    ("result",),
)
DUPLICATE_AGE = Metric(
    "duplicate_age_seconds",
    Kind.HISTOGRAM,
    "How long after the first delivery was applied a duplicate came; of at most 20 duplicates every 2 s. The largest says what "
    "retention must be",
    ("handler",),
    _AGES,
)
UNGROUPED = Metric(
    "ungrouped_statements_total",
    Kind.COUNTER,
    "Executions of deferred statements that were not sent together, by reason (docs/explanation/batching.md)",
    ("reason",),
)
OUTBOX_PUBLISHED = Metric(
    "outbox_published_total",
    Kind.COUNTER,
    "Rows of the outbox that Kafka has acknowledged, with repetitions after a takeover",
    ("topic",),
)
REBALANCES = Metric("rebalances_total", Kind.COUNTER, "Assignments of partitions to a worker")
LOOP_BLOCKED = Metric(
    "event_loop_blocked_seconds_total",
    Kind.COUNTER,
    "Time by which a worker's event loop was late: a handler that does not await, or a machine that is too busy",
)
SERVICE_WAITING = Metric(
    "service_waiting",
    Kind.GAUGE,
    "Workers that wait for a service: kafka, postgresql; redis: that go on without it",
    ("service",),
)

# -- what the supervisor counts ---------------------------------------------------------------------------------------

RESTART_REASONS = ("killed", "failed", "stalled", "no_heartbeat", "memory", "dead_letters", "misconfigured")
WORKER_RESTARTS = Metric(
    "worker_restarts_total",
    Kind.COUNTER,
    f"Worker processes that ended on their own, by reason: {', '.join(RESTART_REASONS)}",
    ("reason",),
    source=Source.SUPERVISOR,
)
WORKERS = Metric(
    "workers",
    Kind.GAUGE,
    "Worker processes by state: starting, running (in the group), restarting, ended",
    ("state",),
    source=Source.SUPERVISOR,
)
DATABASE_READS = Metric(
    "database_reads_total",
    Kind.COUNTER,
    "Rounds of the queries behind the figures of the database: ok or failed. Where they fail, those figures are missing",
    ("shard", "result"),
    source=Source.SUPERVISOR,
)

# -- what queries find ------------------------------------------------------------------------------------------------


def _database(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, Kind.HIGHEST, help, ("shard", *labels), source=Source.DATABASE)


DEAD_LETTERS = _database(
    "dead_letters", "Open dead letters: dead (an operator must decide), waiting (behind a dead one)", "handler", "state"
)
DEAD_LETTER_OLDEST = _database("dead_letter_oldest_seconds", "Age of the oldest dead letter in state dead", "handler")
HELD_UNITS = _database("held_units", "Units of order (keys, partitions) that wait behind a dead letter", "handler")
OUTBOX_UNPUBLISHED = _database("outbox_unpublished", "Rows of the outbox that Kafka has not acknowledged", "topic")
OUTBOX_OLDEST = _database("outbox_oldest_seconds", "Age of the oldest row that is not published", "topic")
OUTBOX_STOPPED = _database("outbox_stopped", "Streams that stopped, until an operator resumes them", "topic")
LEDGER_BYTES = _database("ledger_bytes", "Size of a generation of the ledger, with its index", "generation")
LEDGER_FORGETS_IN = _database(
    "ledger_forgets_in_seconds", "Time until the ledger drops its oldest rows; absent where it keeps them for ever"
)
LEDGER_RETENTION = _database(
    "ledger_retention_seconds", "How long the ledger remembers a message, at least; absent where it does for ever"
)

# -- what a replay writes ---------------------------------------------------------------------------------------------

REPLAY_VERDICT = Metric(
    "replay_verdict",
    Kind.HIGHEST,
    "The verdict of the last replay: 0 ok, 1 problems found, 2 cannot tell",
    ("topic", "mode"),
    source=Source.REPLAY,
)
REPLAY_AT = Metric(
    "replay_at_seconds",
    Kind.HIGHEST,
    "When the last replay ended, Unix time. mode: check, apply, outgoing, rebuild or republish",
    ("topic", "mode"),
    source=Source.REPLAY,
)

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
BY_NAME = {metric.name: metric for metric in METRICS}
