"""`consumer demo`: real messages, a killed worker, every balance checked.

Starts its own servers, produces payments of which some are sent twice, runs `consumer run`, kills a worker while it has a
batch in hand, and compares what PostgreSQL holds, and the receipts in Kafka, with what was produced. All numbers are
counted: what was produced by the producer, outcomes by the ledger, and what was read twice from the workers' logs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from consumer.admin.counts import handler_counts
from consumer.admin.outbox import summary
from consumer.core.errors import ConsumerError
from consumer.core.message import Partition
from consumer.demo.application import app
from consumer.demo.log_facts import KnownEnds, Reads
from consumer.demo.plan import DUPLICATES_PERCENT, TABLES, plan
from consumer.demo.receipts import read_receipts
from consumer.demo.result import DemoResult
from consumer.kafka.admin import create_topic
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.producer import open_producer
from consumer.local_servers import Postgres, Tansu, Valkey, die_with_parent
from consumer.postgres import migrate
from consumer.postgres.connection import connect
from consumer.replay import options as replay_options
from consumer.replay.rebuild_run import RebuildOptions, run_rebuild
from consumer.replay.verify import replay
from consumer.settings import Settings, load

TOPIC, RECEIPTS = "payments", "receipts"
PARTITIONS = 8
_PRODUCE_SECONDS = 8.0  # slow enough to watch, and for workers to have a batch in hand when one is killed
_CHUNK = 200
_SETTLE_SECONDS = 40.0
_STOP_SECONDS = 20.0
_LINE_SECONDS = 2.0  # between two lines of progress, without a terminal for a bar


class DemoFailed(ConsumerError):
    """The demo could not run, which says nothing about the numbers."""


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
        self._reads = Reads()
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
            await migrate.migrate(connection, TABLES)
            for topic in (TOPIC, RECEIPTS):
                await create_topic(settings, topic, PARTITIONS)
            bars = stack.enter_context(self._bars())
            process = await stack.enter_async_context(self._consumer_run(settings))
            await self._carry_out(settings, connection, process, bars)
            await self._stop(process)
            await self._count(connection, settings)
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
        done, unpublished, printed_at = 0, 1, time.monotonic()
        try:
            while done < total or unpublished:
                if producer.done():
                    producer.result()
                if process.returncode is not None:
                    raise DemoFailed(f"`consumer run` ended with {process.returncode}: {' | '.join(self._errors[-3:])}")
                if time.monotonic() > deadline:
                    raise DemoFailed(f"only {done} of {total} messages were settled: {' | '.join(self._errors[-3:])}")
                await asyncio.sleep(0.1)  # the pace of the display
                counts = (await handler_counts(connection, app))["settle"]
                unpublished = (await summary(connection, app.name))["unpublished"]
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

    async def _count(self, connection: Any, settings: Settings) -> None:
        """Count in PostgreSQL and Kafka, after the last worker has ended."""
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
        receipts = await read_receipts(settings, RECEIPTS, PARTITIONS, result.distinct, _STOP_SECONDS)
        result.receipts, result.receipts_repeated = len(receipts), receipts.total() - len(receipts)

    def _log_reader(self, settings: Settings) -> KafkaConsumer:
        return KafkaConsumer(settings, None, inspect=lambda brokers: KnownEnds(brokers, self._ends))

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
        self._console.print(result.as_table())
        if result.agree:
            self._console.print(f"[bold green]every payment was applied exactly once[/]  ({result.seconds} s)")
        else:
            self._console.print("[bold red]the numbers do not agree[/]")


def _of(counts: dict[str, Any]) -> str:
    duplicates = counts["duplicates"]
    return f"settled: {counts['applied']:,} applied, {sum(duplicates.values()):,} duplicates"
