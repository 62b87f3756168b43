"""`consumer demo`: real messages, a killed worker, every balance checked.

Starts its own servers, produces payments of which some are sent twice, runs `consumer run`, kills a worker while it has a
batch in hand, and compares what PostgreSQL holds with what was produced. All numbers are counted: what was produced by the
producer, outcomes by the ledger, and what was read twice from the workers' logs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID, uuid4

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from consumer.admin.counts import handler_counts
from consumer.core.errors import ConsumerError
from consumer.core.message import Partition
from consumer.demo.application import app
from consumer.kafka.admin import create_topic
from consumer.kafka.brokers import Brokers
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.log_inspection import LogInspection
from consumer.kafka.producer import open_producer
from consumer.local_servers import Postgres, Tansu, Valkey, die_with_parent
from consumer.postgres import migrate
from consumer.postgres.connection import connect
from consumer.replay import options as replay_options
from consumer.replay.rebuild_run import RebuildOptions, run_rebuild
from consumer.replay.verify import replay
from consumer.settings import Settings, load

TOPIC = "payments"
PARTITIONS = 8
ACCOUNTS = 1000
DUPLICATES_PERCENT = 10
_PRODUCE_SECONDS = 8.0  # slow enough to watch, and for workers to have a batch in hand when one is killed
_CHUNK = 200
_SETTLE_SECONDS = 40.0
_STOP_SECONDS = 20.0
_LINE_SECONDS = 2.0  # between two lines of progress, without a terminal for a bar
_TABLES = f"""
create table payments (payment_id uuid not null, account int not null, amount bigint not null);
create table accounts (account int primary key, balance bigint not null default 0);
insert into accounts (account) select generate_series(0, {ACCOUNTS - 1});
"""


class _KnownEnds(LogInspection):
    """Ends of the log as the producer knows them.

    Tansu gives the beginning of the last batch for the end of the log.
    """

    def __init__(self, brokers: Brokers, ends: Mapping[Partition, int]) -> None:
        super().__init__(brokers)
        self._ends = ends

    async def ends(
        self, partitions: Sequence[Partition], *, partial: bool = False, uncommitted: bool = False
    ) -> dict[Partition, int]:
        return {partition: self._ends.get(partition, 0) for partition in partitions}


class DemoFailed(ConsumerError):
    """The demo could not run, which says nothing about the numbers."""


@dataclass(frozen=True, slots=True)
class PlannedPayment:
    """A message to produce. amount: in cents.

    elsewhere: a repetition that goes to another partition than the first.
    """

    payment_id: UUID
    account: int
    amount: int
    elsewhere: bool = False


@dataclass(slots=True)
class DemoResult:
    """What was counted. Sums are in cents."""

    produced: int = 0
    distinct: int = 0
    applied: int = 0
    payments_stored: int = 0
    duplicates_by_batch: int = 0  # twice in one batch
    duplicates_by_precheck: int = 0
    duplicates_by_ledger: int = 0
    dead_lettered: int = 0
    redelivered_after_kill: int = 0
    balance_sum: int = 0
    balance_sum_expected: int = 0
    accounts_wrong: int = 0
    replayed: int = 0
    missing_in_replay: int = 0
    rows_written_by_replay: int = 0
    applied_by_replay: int = 0
    differences_in_rebuild: int = 0
    replays_agree: bool = False
    seconds: float = 0.0

    @property
    def agree(self) -> bool:
        """Whether every effect is there once, and no message is missing."""
        duplicates = self.duplicates_by_batch + self.duplicates_by_precheck + self.duplicates_by_ledger
        return (
            self.applied == self.payments_stored == self.distinct
            and self.applied + duplicates == self.produced
            and self.dead_lettered == 0
            and self.balance_sum == self.balance_sum_expected
            and self.accounts_wrong == 0
            and self.replays_agree
        )

    def as_json(self) -> str:
        """Return what `consumer demo --json` prints."""
        return json.dumps({**asdict(self), "agree": self.agree}, indent=2)


def plan(count: int, chance: random.Random) -> list[PlannedPayment]:
    """Plan payments in the order of their production.

    DUPLICATES_PERCENT of `count` repeat an earlier one.

    Half of the repetitions follow at once, as a producer's own retry would, and half come much later; every other one
    goes to another partition, where another worker may have it in hand at the same time.
    """
    repeats = count * DUPLICATES_PERCENT // 100
    firsts = [
        PlannedPayment(uuid4(), chance.randrange(ACCOUNTS), chance.randrange(1, 100_000))
        for _ in range(count - repeats)
    ]
    placed: list[tuple[float, PlannedPayment]] = [(float(n), payment) for n, payment in enumerate(firsts)]
    for n, at in enumerate(chance.sample(range(len(firsts)), repeats)):
        first = firsts[at]
        later = chance.uniform(0, 50) if n % 2 else chance.uniform(0, len(firsts) - at)
        placed.append((at + later, PlannedPayment(first.payment_id, first.account, first.amount, elsewhere=n % 4 < 2)))
    placed.sort(key=lambda entry: entry[0])
    return [payment for _, payment in placed]


class _Reads:
    """What the killed worker had read, and what others read again.

    From the workers' logs.
    """

    def __init__(self) -> None:
        self._by_pid: dict[int, set[tuple[int, int]]] = {}  # partition and offset
        self._victims: set[tuple[int, int]] = set()
        self.again: set[tuple[int, int]] = set()

    def add(self, pid: int, partition: int, first: int, last: int) -> None:
        read = {(partition, offset) for offset in range(first, last + 1)}
        self._by_pid.setdefault(pid, set()).update(read)
        self.again |= self._victims & read

    def killed(self, pid: int) -> None:
        self._victims = self._by_pid.get(pid, set())


class Demo:
    """One demonstration.

    `run` returns the exit code: 0 if all numbers agree, else 1.
    """

    def __init__(self, payments: int, workers: int, *, as_json: bool = False) -> None:
        self._payments = plan(payments, random.Random())  # noqa: S311 - amounts, not secrets
        self._workers = workers
        self._as_json = as_json
        self._console = Console(stderr=as_json, emoji=False)
        self._result = DemoResult()
        self._reads = _Reads()
        self._worker_pids: dict[int, int] = {}  # slot -> pid of the process in it
        self._victim = 0
        self._armed = False  # kill the next worker that reports a batch
        self._opened: set[int] = set()  # pids of workers that have partitions
        self._all_opened = asyncio.Event()
        self._expected: dict[int, int] = {}  # balance of each account
        self._ends: dict[Partition, int] = {}  # how many were produced to each partition
        self._errors: list[str] = []
        self._started_at = time.monotonic()

    async def run(self) -> int:
        """Run the demo, and end what was started in any case.

        Raises EmbeddedUnavailable, DemoFailed.
        """
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with AsyncExitStack() as stack:
            for name in [variable for variable in os.environ if variable.startswith("CONSUMER_")]:
                del os.environ[name]  # settings for other servers than these
            self._report("starting a broker (Tansu), PostgreSQL 18 and Valkey on free ports of this machine")
            # Started in this thread: they die with the thread that started them.
            postgres, valkey, tansu = (stack.enter_context(server()) for server in (Postgres, Valkey, Tansu))
            settings = load(
                kafka_bootstrap_servers=tansu.bootstrap_servers,
                postgres_dsn=postgres.dsn(),
                redis_url=valkey.url,
                kafka_session_timeout_seconds=6,
                log_level="debug",
                log_format="json",
            )
            connection = await connect(settings)
            stack.callback(connection.terminate)
            await migrate.migrate(connection, _TABLES)
            await create_topic(settings, TOPIC, PARTITIONS)
            bars = stack.enter_context(self._bars())
            process = await stack.enter_async_context(self._consumer_run(settings))
            await self._carry_out(settings, connection, process, bars)
            await self._stop(process)
            await self._count(connection)
            await self._replay(settings)
        self._result.seconds = round(time.monotonic() - self._started_at, 1)
        self._show()
        return 0 if self._result.agree else 1

    # -- the run ----------------------------------------------------------------------------------------------------

    async def _carry_out(
        self, settings: Settings, connection: Any, process: asyncio.subprocess.Process, bars: Progress
    ) -> None:
        total = len(self._payments)
        produced = bars.add_task("produced", total=total)
        settled = bars.add_task("settled", total=total)
        producer = asyncio.create_task(self._produce(settings, bars, produced))
        deadline = time.monotonic() + _PRODUCE_SECONDS + _SETTLE_SECONDS
        done, printed_at = 0, time.monotonic()
        try:
            while done < total:
                if producer.done():
                    producer.result()
                if process.returncode is not None:
                    raise DemoFailed(f"`consumer run` ended with {process.returncode}: {' | '.join(self._errors[-3:])}")
                if time.monotonic() > deadline:
                    raise DemoFailed(f"only {done} of {total} messages were settled: {' | '.join(self._errors[-3:])}")
                await asyncio.sleep(0.1)  # the pace of the display
                counts = (await handler_counts(connection, app))["settle"]
                done = counts["applied"] + sum(counts["duplicates"].values()) + counts["dead_lettered"]
                bars.update(settled, completed=done, description=_of(counts))
                if done and not self._console.is_terminal and time.monotonic() > printed_at + _LINE_SECONDS:
                    printed_at = time.monotonic()
                    self._report(_of(counts))
                if self._victim == 0 and done > total * 0.4:
                    self._armed = True
            await producer  # it may still be counting what is settled already
        finally:
            producer.cancel()
            await asyncio.gather(producer, return_exceptions=True)

    async def _produce(self, settings: Settings, bars: Progress, task: TaskID) -> None:
        expected: dict[int, int] = {}
        seen: set[UUID] = set()
        pace = _PRODUCE_SECONDS * _CHUNK / len(self._payments)
        async with open_producer(settings) as producer:
            await self._all_opened.wait()
            self._report(f"producing {len(self._payments):,} payments, {DUPLICATES_PERCENT} % of them twice")
            for start in range(0, len(self._payments), _CHUNK):
                due = time.monotonic() + pace
                sent = []
                for payment in self._payments[start : start + _CHUNK]:
                    partition = Partition(TOPIC, (payment.account + payment.elsewhere) % PARTITIONS)
                    self._ends[partition] = self._ends.get(partition, 0) + 1
                    body = {"payment_id": str(payment.payment_id), "account": payment.account, "amount": payment.amount}
                    sent.append(
                        await producer.send(
                            TOPIC,
                            json.dumps(body).encode(),
                            key=str(payment.account).encode(),
                            partition=partition.partition,
                            headers=[("message-id", str(payment.payment_id).encode())],
                        )
                    )
                await asyncio.gather(*sent)
                for payment in self._payments[start : start + _CHUNK]:
                    self._result.produced += 1
                    if payment.payment_id not in seen:
                        seen.add(payment.payment_id)
                        expected[payment.account] = expected.get(payment.account, 0) + payment.amount
                bars.update(task, completed=self._result.produced)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
        self._expected = expected
        self._result.distinct = len(seen)
        self._result.balance_sum_expected = sum(expected.values())

    @asynccontextmanager
    async def _consumer_run(self, settings: Settings) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run `consumer run` as a process for as long as the block."""
        command = ["consumer", "run", "consumer.demo.application:app", "--workers", str(self._workers)]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *command,
            env=settings.child_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process, which then ends it in order
            preexec_fn=die_with_parent,
        )
        listener = asyncio.create_task(self._listen(process))
        try:
            self._report(f"`{' '.join(command)}` is process {process.pid}")
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
                try:
                    await asyncio.wait_for(process.wait(), _STOP_SECONDS)
                except TimeoutError:
                    process.kill()
                    await process.wait()
            await asyncio.gather(listener, return_exceptions=True)

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        """Read from the log which worker reads what.

        Kills the chosen worker at the moment when it has a batch in hand.
        """
        assert process.stderr is not None
        async for line in process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                self._errors.append(line.decode("utf-8", "replace").strip())
                continue
            text = entry.get("event", "")
            if text == "fetched":
                self._reads.add(entry["pid"], entry["partition"], entry["first"], entry["last"])
                if self._armed and entry["pid"] in self._worker_pids.values():
                    self._kill(entry["pid"])
            elif text == "worker process started":
                self._worker_pids[entry["worker"]] = entry["worker_pid"]
                self._report(f"worker {entry['worker']} is process {entry['worker_pid']}")
            elif text == "partitions opened":
                self._opened.add(entry["pid"])
                if len(self._opened) == self._workers:
                    self._all_opened.set()
            elif text == "worker ended; starting another":
                self._report(
                    f"worker {entry['worker']} ended ({entry.get('killed_by', 'by itself')}): starting another one"
                )
            if entry.get("level") in ("error", "warning"):
                self._errors.append(text)

    def _kill(self, pid: int) -> None:
        self._armed = False
        os.kill(pid, signal.SIGKILL)
        self._victim = pid
        self._reads.killed(pid)
        self._report(f"SIGKILL to process {pid}, with a batch in hand")

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        process.terminate()
        code = await asyncio.wait_for(process.wait(), _STOP_SECONDS + 10)
        if code != 0:
            raise DemoFailed(f"`consumer run` did not stop cleanly: {code}: {' | '.join(self._errors[-3:])}")

    async def _count(self, connection: Any) -> None:
        """Count in PostgreSQL, after the last worker has ended."""
        if self._victim == 0:
            raise DemoFailed("no worker was killed: nothing was shown")
        result = self._result
        counts = (await handler_counts(connection, app))["settle"]
        result.applied, result.dead_lettered = counts["applied"], counts["dead_lettered"]
        causes = counts["duplicates"]
        result.duplicates_by_batch, result.duplicates_by_precheck = causes["batch"], causes["precheck"]
        result.duplicates_by_ledger = causes["ledger"]
        result.payments_stored = await connection.fetchval("select count(*) from payments")
        balances = dict(await connection.fetch("select account, balance from accounts"))
        result.balance_sum = int(sum(balances.values()))
        result.accounts_wrong = sum(balance != self._expected.get(account, 0) for account, balance in balances.items())
        result.redelivered_after_kill = len(self._reads.again)

    def _log_reader(self, settings: Settings) -> KafkaConsumer:
        return KafkaConsumer(settings, None, inspect=lambda brokers: _KnownEnds(brokers, self._ends))

    async def _replay(self, settings: Settings) -> None:
        """Read the topic again: is anything missing, repeated or different?"""
        self._report("replaying the topic: check, apply, rebuild")
        result = self._result
        modes: tuple[replay_options.Mode, ...] = ("check", "apply")
        check, apply = [
            await replay(
                app,
                settings,
                [TOPIC],
                replay_options.Options(mode=mode),
                replay_options.Progress(),
                source=self._log_reader(settings),
            )
            for mode in modes
        ]
        rebuilt = await run_rebuild(
            app, settings, [TOPIC], RebuildOptions(), replay_options.Progress(), source=self._log_reader(settings)
        )
        result.replayed = check.messages
        result.missing_in_replay = check.total("missing")
        assert check.effects is not None and rebuilt.rebuilt is not None
        result.rows_written_by_replay = check.effects.total
        result.applied_by_replay = apply.total("applied_now")
        result.differences_in_rebuild = sum(
            table["missing"] + table["extra"] + table["different"] for table in rebuilt.rebuilt["tables"]
        )
        result.replays_agree = (
            all(findings.ok for findings in (check, apply, rebuilt)) and check.messages == result.produced
        )

    # -- what is shown ----------------------------------------------------------------------------------------------

    def _bars(self) -> Progress:
        columns: Sequence[Any] = (
            TextColumn("{task.description:40}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        return Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)

    def _report(self, text: str) -> None:
        self._console.print(
            f"{time.monotonic() - self._started_at:5.1f} s  {text}", highlight=False, markup=False, soft_wrap=True
        )

    def _show(self) -> None:
        result = self._result
        if self._as_json:
            print(result.as_json())
            return
        table = Table(show_header=False, title=f"{result.produced:,} payments", title_justify="left")
        table.add_column()
        table.add_column(justify="right")
        for label, value in (
            ("produced", f"{result.produced:,}"),
            ("distinct", f"{result.distinct:,}"),
            ("applied", f"{result.applied:,}"),
            ("duplicates stopped within a batch", f"{result.duplicates_by_batch:,}"),
            ("duplicates stopped by the pre-check (Redis)", f"{result.duplicates_by_precheck:,}"),
            ("duplicates stopped by the ledger (PostgreSQL)", f"{result.duplicates_by_ledger:,}"),
            ("redelivered after the kill", f"{result.redelivered_after_kill:,}"),
            ("sum of balances", _money(result.balance_sum)),
            ("expected sum", _money(result.balance_sum_expected)),
            ("accounts with a wrong balance", f"{result.accounts_wrong:,}"),
            ("replayed", f"{result.replayed:,}"),
            ("missing in the replay", f"{result.missing_in_replay:,}"),
            ("rows that the replay would have written", f"{result.rows_written_by_replay:,}"),
            ("applied by `replay --apply`", f"{result.applied_by_replay:,}"),
            ("differences found by `consumer rebuild`", f"{result.differences_in_rebuild:,}"),
        ):
            table.add_row(label, value)
        self._console.print(table)
        if result.agree:
            self._console.print(f"[bold green]every payment was applied exactly once[/]  ({result.seconds} s)")
        else:
            self._console.print("[bold red]the numbers do not agree[/]")


def _of(counts: dict[str, Any]) -> str:
    duplicates = counts["duplicates"]
    return f"settled: {counts['applied']:,} applied, {sum(duplicates.values()):,} duplicates"


def _money(cents: int) -> str:
    return f"{cents // 100:,}.{cents % 100:02}"
