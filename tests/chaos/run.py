"""One run: faults under load, then heal, drain and judge.

Then everything is read again, twice, and judged again. A run counts only if each of its faults has happened, records
were delivered again, and COMMITs had unknown outcomes: a harness that finds nothing must at least have looked.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import uuid4

import asyncpg
import prefork
from aiokafka import AIOKafkaProducer
from harness import ROOT, WORKER_PASSWORD, new_topic, until

from chaos import evidence, second_stage, workload
from chaos.invariants import INVARIANTS, Evidence, LogEntry, Violations, judge, terminal
from chaos.nemesis import Fired, Nemesis
from chaos.operators import Operators, settled
from chaos.producing import Producing, read
from chaos.rig import APPLICATION, NEXT_APPLICATION, PARTITIONS, Consumers, Rig
from chaos.schedule import PLAIN, Fault, Ways, draw

ARTEFACTS = ROOT / ".cache" / "chaos"
_FORMS = ("tickets", "ticket_lines", "stock", "latest", "accounts")
_DRAIN_SECONDS = 180.0
OUT_PARTITIONS = 3
_IS_PUBLISHED = """
select coalesce(bool_and(p.stopped is not null or p.next_seq = s.next_seq), true)
from consumer.outbox_streams s join consumer.outbox_published p using (stream)
"""
# Everything that the outbox still has is published once more.
_PUBLISH_AGAIN = """
update consumer.outbox_published p set next_seq = coalesce(
    (select min(o.seq) from consumer.outbox o where o.stream = p.stream), p.next_seq)
"""
_EFFECT_TABLES = "select md5(string_agg(t::text, '|' order by t::text)) from {} t"


@dataclass
class Outcome:
    """The result of a run.

    vacuous: why it does not count, if it does not. directory: what is kept of it, "" when nothing.
    """

    seed: int
    seconds: float
    faults: list[Fired] = field(default_factory=list)
    violations: Violations = field(default_factory=dict)
    vacuous: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    directory: str = ""
    ways: str = "plain"

    @property
    def counted(self) -> bool:
        return not self.vacuous

    @property
    def good(self) -> bool:
        return self.counted and not self.violations


class Watch:
    """Check each second that nothing below an offset is unsettled.

    Offsets in Kafka and in PostgreSQL.
    """

    def __init__(self, rig: Rig, database: str, app: str, topic: str, nemesis: Nemesis, violations: Violations) -> None:
        self._rig, self._database, self._app, self._topic, self._nemesis = rig, database, app, topic, nemesis
        self._violations = violations
        self._tail = evidence.Tail(rig.bootstrap_servers, topic, PARTITIONS)
        self._ahead: dict[int, int] = {}  # what Kafka may know more than PostgreSQL, since a failover
        self._failovers = 0
        self.checks = 0

    async def run(self) -> None:
        """For ever. A check that an outage prevents is left out."""
        tail = asyncio.create_task(self._tail.run())
        try:
            while True:
                await asyncio.sleep(1)
                with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    await self.check()
        finally:
            tail.cancel()
            await asyncio.gather(tail, return_exceptions=True)

    async def check(self) -> None:
        failovers = self._nemesis.failovers
        group = await evidence.committed(self._rig.bootstrap_servers, self._app, self._topic)  # first: it may only lag
        connection = await asyncpg.connect(self._rig.primary.dsn(self._database), timeout=3)
        try:
            async with asyncio.timeout(10):
                positions, claims, letters = await evidence.settled(connection, self._app, self._topic)
        finally:
            connection.terminate()
        if failovers != self._nemesis.failovers:
            return  # in the middle of one: the two readings are of two databases
        if failovers != self._failovers:
            # The database went back; Kafka's copy could not. It may stay ahead of the positions until they have caught up.
            self._failovers = failovers
            self._ahead = {n: entries[-1].offset + 1 for n, entries in self._tail.entries.items() if entries}
        self.checks += 1
        for name, offsets in (("position", positions), ("kafka's commit", group or {})):
            for partition, offset in offsets.items():
                if (
                    name != "position"
                    and offset > positions.get(partition, 0)
                    and offset <= self._ahead.get(partition, -1)
                ):
                    continue
                known = [record for record in self._tail.entries.get(partition, []) if record.offset < offset]
                bad = terminal(known, {(self._topic, partition): offset}, claims, letters)
                if bad:
                    texts = self._violations.setdefault("I5", [])
                    if len(texts) < 5:
                        texts.append(f"online, {name} {offset}: {bad[0]} ({len(bad)} such)")


class Run:
    """One run on the servers of a rig."""

    def __init__(
        self,
        rig: Rig,
        seed: int,
        seconds: float,
        *,
        rate: float = 100.0,
        workers: int = 2,
        faults: list[Fault] | None = None,
        ways: Ways = PLAIN,
    ) -> None:
        self._rig = rig
        self._seconds = seconds
        self._seed = seed
        self._rate = rate
        self._workers = workers
        self._schedule = draw(seed, seconds, ways) if faults is None else faults
        self._ways = ways
        self._name = f"chaos-{seed}-{uuid4().hex[:6]}"
        self._directory = rig.directory / self._name
        self._journal = self._directory / "journal.jsonl"
        self.outcome = Outcome(seed, seconds, ways=str(ways))

    async def run(self) -> Outcome:
        """The whole of it. Keeps its artefacts only when something is wrong."""
        self._directory.mkdir()
        (self._directory / "schedule.json").write_text(
            json.dumps([asdict(fault) for fault in self._schedule], indent=1)
        )
        rig, outcome = self._rig, self.outcome
        if any(fault.kind == "fail over" for fault in self._schedule):
            await rig.with_standby()
        self._database = await rig.database()
        self._topic = await new_topic(rig.bootstrap_servers, PARTITIONS, f"{self._name}-log")
        await new_topic(rig.bootstrap_servers, PARTITIONS, f"{self._topic}-copy")
        if self._ways.pooler:
            await rig.with_pooler()
        self._settings = rig.settings(self._database, pooler=self._ways.pooler)
        self._environment = {"CHAOS_APP": self._name, "CHAOS_TOPIC": self._topic}
        self._out = f"{self._name}-out" if self._ways.stages else ""
        if self._out:
            await new_topic(rig.bootstrap_servers, OUT_PARTITIONS, self._out)
            self._environment["CHAOS_OUT"] = self._out
        if self._seed % 2:
            self._environment["CHAOS_DEFER"] = "1"  # half of the runs group the writes of whole batches
        # Commands, and what reads everything again at the end, are of the newest version.
        newest = {**self._environment, "CHAOS_VERSION": "2" if self._ways.versions else "1"}
        consumers = Consumers(self._settings, self._directory, self._environment, self._workers, self._ways.versions)
        self._operators = Operators(self._name, self._topic, self._settings, newest, self._directory)
        self._environment = newest
        try:
            await self._torment(consumers)
            await self._settle(consumers)
        except Exception as error:  # of the harness, or of a condition that did not come
            outcome.violations.setdefault("I11", []).append(f"{type(error).__name__}: {error}")
            outcome.vacuous.append("it did not come to its end: nothing was judged after that")
        finally:
            await rig.heal()
            consumers.end()
        if not outcome.good:
            await self._keep()
        with suppress(Exception):
            await self._forget()
        shutil.rmtree(self._directory, ignore_errors=True)
        return outcome

    async def _torment(self, consumers: Consumers) -> None:
        outcome = self.outcome
        for application in (APPLICATION, APPLICATION, *([NEXT_APPLICATION] if self._out else [])):
            consumers.start(application)
        nemesis = Nemesis(self._rig, consumers, self._seed, self._database, self._name, self._topic, self._operators)
        outcome.faults = nemesis.outcome
        watch = Watch(self._rig, self._database, self._name, self._topic, nemesis, outcome.violations)
        burst = 40
        producing = Producing(self._rig.bootstrap_servers, self._topic, self._journal, burst / self._rate)
        stop = asyncio.Event()
        sending = asyncio.create_task(producing.run(workload.plan(self._seed, PARTITIONS, burst), stop))
        watching = asyncio.create_task(watch.run())
        try:
            for command in list(consumers.running):
                await consumers.opened(command)
            started = time.monotonic()
            await nemesis.run(self._schedule)
            await asyncio.sleep(max(0.0, started + self._seconds - time.monotonic()))
            await self._heal(consumers)
            await evidence.no_open_transaction(self._rig.bootstrap_servers, self._topic, PARTITIONS)
            stop.set()
            await asyncio.wait_for(sending, 60)
            outcome.counts["drained after, ms"] = await self._drained()
            await watch.check()
            outcome.counts["online checks"] = watch.checks
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
        outcome.counts["unknown commits"] = nemesis.unknown_commits
        outcome.counts["messages sent"] = producing.sent
        outcome.vacuous += [
            f"{attempt.fault.kind} did not happen: {attempt.error}" for attempt in nemesis.outcome if attempt.error
        ]
        if len(nemesis.outcome) != len(self._schedule):
            outcome.vacuous.append("not all faults have happened")
        if not nemesis.unknown_commits:
            outcome.vacuous.append("no COMMIT had an unknown outcome")
        if not watch.checks:
            outcome.vacuous.append("the online checker could not look once")

    async def _heal(self, consumers: Consumers) -> None:
        await self._rig.heal()
        for pid in consumers.paused:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def _drained(self) -> int:
        """Wait until both stages have consumed everything; return milliseconds."""
        started = time.monotonic()
        await self._no_lag(APPLICATION)
        if self._out:
            await until("everything to be published", self._is_published, _DRAIN_SECONDS)
            await self._no_lag(NEXT_APPLICATION)
        return int((time.monotonic() - started) * 1000)

    async def _is_published(self) -> bool:
        connection = await asyncpg.connect(self._rig.primary.dsn(self._database))
        try:
            return bool(await connection.fetchval(_IS_PUBLISHED))
        finally:
            await connection.close()

    async def _no_lag(self, application: str) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _WAIT_FOR_NO_LAG, application, str(_DRAIN_SECONDS),
            env={**os.environ, **self._settings.dump(), **self._environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'support'}"},
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, errors = await process.communicate()
        assert process.returncode == 0, f"lag is left: {errors.decode()[-4000:]}"

    async def _settle(self, consumers: Consumers) -> None:
        """Judge, stop the workers, replay, read again twice, judge again.

        The second time from zero, the third in a copy of the topic.
        """
        outcome = self.outcome
        gathered, _ = await self._evidence([self._topic])
        gathered.redelivered = evidence.redelivered(evidence.events(consumers.logs), gathered.log)
        outcome.counts["redelivered"] = gathered.redelivered
        outcome.counts["operators' commands"] = self._operators.acts
        outcome.counts["letters settled by operators"] = settled(gathered.letters)
        gathered.redelivered += settled(gathered.letters) + len(gathered.edits)
        self._add(judge(gathered))
        await self._judge_second_stage(gathered)
        if not outcome.counts["redelivered"]:
            outcome.vacuous.append("no record was delivered again")
        outcome.counts |= {
            "records": len(gathered.log),
            "effects": len(gathered.effects),
            "dead letters": len(gathered.letters),
            "duplicates": sum(n for (_, _, what), n in gathered.outcomes.items() if what.startswith("duplicate")),
            "marks in Redis": len(gathered.marks),
        }
        if not outcome.counts["duplicates"]:
            self._add({"I12": ["no duplicate was recognized"]})
        if self._ways.versions:
            await self._fill()
        before = await self._hashes()
        for command in list(consumers.running):
            code = await consumers.stop(command)
            if code != 0:
                self._add({"I11": [f"exit code {code} after SIGTERM: {command.errors[-300:]}"]})
        await self._replayed()
        if await self._hashes() != before:
            self._add({"I6": ["`consumer replay` has changed the effects"]})
        await self._again(consumers)
        again, _ = await self._evidence([self._topic, f"{self._topic}-copy"])
        if await self._hashes() != before:
            self._add({"I6": ["reading again from zero and in a copy has changed the effects"]})
        self._add(
            {
                name: [f"after the replay: {text}" for text in texts]
                for name, texts in judge(again).items()
                if name != "I12"
            }
        )
        await self._judge_second_stage(again)
        self._logs(consumers)

    async def _judge_second_stage(self, gathered: Evidence) -> None:
        if not self._out:
            return
        records = await evidence.published(self._rig.bootstrap_servers, self._out, OUT_PARTITIONS)
        connection = await asyncpg.connect(self._rig.primary.dsn(self._database))
        try:
            stage, _ = await evidence.second_stage(connection, self._name, gathered, records, has_next=True)
        finally:
            await connection.close()
        self._add(second_stage.judge(stage))
        counts = self.outcome.counts
        counts["published"], counts["received"] = len(records), len(stage.received or ())
        counts["published again"] = len(records) - len({record.id for record in records})

    async def _fill(self) -> None:
        """Apply what the next version's new handler has missed.

        With the command that `consumer status` names.
        """
        answer = await self._command("replay", "chaos.application:app", self._topic, "--apply", "--handler", "late")
        if answer.returncode not in (0, 1):
            self._add(
                {
                    "I6": [
                        f"`replay --apply --handler late` ends with {answer.returncode}: {(answer.stderr or answer.stdout)[-500:]}"
                    ]
                }
            )
        evidence, _ = await self._evidence([self._topic])
        evidence.versions = True
        self._add(judge(evidence))

    async def _again(self, consumers: Consumers) -> None:
        """Positions back to zero, and everything once more in the copy."""
        await self._execute("update consumer.positions set next_offset = 0")
        await self._execute(_PUBLISH_AGAIN)
        _, records = await evidence.read_log(self._rig.bootstrap_servers, [self._topic], PARTITIONS)
        producer = AIOKafkaProducer(bootstrap_servers=self._rig.bootstrap_servers, linger_ms=5)
        await producer.start()
        try:
            futures = [
                await producer.send(f"{self._topic}-copy", record.value, key=record.key, partition=record.partition, headers=list(record.headers))
                for record in records
            ]  # fmt: skip
            await asyncio.gather(*futures)
        finally:
            await producer.stop()
        commands = [consumers.start(), *([consumers.start(NEXT_APPLICATION)] if self._out else [])]
        await self._drained()
        for command in commands:
            code = await consumers.stop(command)
            if code != 0:
                self._add({"I11": [f"exit code {code} after SIGTERM"]})

    async def _command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        path = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'support'}"
        environment = {**os.environ, **self._settings.dump(), **self._environment, "PYTHONPATH": path}
        return await prefork.answer(["-m", "consumer", *arguments, "--json"], environment)

    async def _replayed(self) -> None:
        answer = await self._command("replay", "chaos.application:app", self._topic)
        if answer.returncode != 0:
            (self._directory / "replay.json").write_text(answer.stdout)
            self._add(
                {"I6": [f"`consumer replay` ends with {answer.returncode}: {(answer.stderr or answer.stdout)[-500:]}"]}
            )

    def _logs(self, consumers: Consumers) -> None:
        for path in consumers.logs:
            text = path.read_text("utf-8", "replace")
            for secret, name in ((workload.CANARY, "a payload"), (WORKER_PASSWORD, "the password")):
                if secret in text:
                    self._add({"I16": [f"{name} is in {path.parent.name}/{path.name}"]})
            if "Traceback" in text:
                self._add({"I16": [f"a traceback in {path.parent.name}/{path.name}"]})

    # -- looking ----------------------------------------------------------------------------------------------------

    async def _evidence(self, topics: list[str]) -> tuple[Evidence, list[LogEntry]]:
        log, _ = await evidence.read_log(self._rig.bootstrap_servers, topics, PARTITIONS)
        gathered = Evidence(log=log)
        gathered.edits = self._operators.edits
        if topics == [self._topic]:
            gathered.journal = read(self._journal)
        connection = await asyncpg.connect(self._rig.primary.dsn(self._database))
        try:
            epoch = await _epoch(connection)
            gathered.marks = await evidence.marks(
                self._rig.valkey, epoch, self._name
            )  # first: a mark comes after its row
            await evidence.look(connection, self._name, gathered)
        finally:
            await connection.close()
        return gathered, log

    async def _hashes(self) -> list[Any]:
        connection = await asyncpg.connect(self._rig.primary.dsn(self._database))
        try:
            return [
                await connection.fetchval(_EFFECT_TABLES.format(handler))
                for handler in ("effects", "balances", "orders", *_FORMS, "receipts", "receipt_balances")
            ]
        finally:
            await connection.close()

    async def _execute(self, sql: str, *args: Any) -> None:
        connection = await asyncpg.connect(self._rig.primary.dsn(self._database))
        try:
            await connection.execute(sql, *args)
        finally:
            await connection.close()

    def _add(self, violations: Mapping[str, list[str]]) -> None:
        for name, texts in violations.items():
            assert name in INVARIANTS
            self.outcome.violations.setdefault(name, []).extend(texts)

    # -- afterwards -------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Keep journal, schedule, logs and a dump of the tables.

        They outlive this process.
        """
        kept = ARTEFACTS / self._name
        with suppress(Exception):
            dump = [
                str(self._rig.primary.program("pg_dump")),
                "--inserts",
                "-d",
                self._rig.primary.dsn(self._database),
            ]
            process = await asyncio.create_subprocess_exec(*dump, stdout=asyncio.subprocess.PIPE)
            (self._directory / "dump.sql").write_bytes((await process.communicate())[0])
        with suppress(Exception):
            log, _ = await evidence.read_log(self._rig.bootstrap_servers, [self._topic], PARTITIONS)
            (self._directory / "log.jsonl").write_text("".join(json.dumps(record._asdict()) + "\n" for record in log))
        (self._directory / "outcome.json").write_text(json.dumps(asdict(self.outcome), indent=1))
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self._directory, kept)
        self.outcome.directory = str(kept)

    async def _forget(self) -> None:
        connection = await asyncpg.connect(self._rig.primary.dsn())
        try:
            await connection.execute(f"drop database {self._database} with (force)")
        finally:
            await connection.close()


async def _epoch(connection: asyncpg.Connection) -> str:
    """As ARCHITECTURE.md tells it: system identifier, timeline, nonce, start of the server."""
    [(system, timeline, nonce, started)] = await connection.fetch(
        """select to_hex(system_identifier), substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8), i.nonce,
                  to_hex((extract(epoch from pg_postmaster_start_time()) * 1000000)::int8)
           from pg_control_system(), consumer.installation i"""
    )
    return f"{system}-{timeline}-{nonce.hex[:12]}-{started}"


# In a process of its own, because the application's module reads its environment when it is imported.
_WAIT_FOR_NO_LAG = """
import asyncio, importlib, sys
from consumer.settings import load
from harness import drained
app = importlib.import_module(sys.argv[1].partition(":")[0]).app
asyncio.run(drained(app, load(), float(sys.argv[2])))
"""
