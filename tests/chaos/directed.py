"""Short scenarios, one for each mistake in mutants.py.

A scenario has a few messages, one fault, and the judge of the random runs. It runs with its mutant, which must be
caught, and with the real consumer, which must pass.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import prefork
from aiokafka import AIOKafkaProducer
from harness import ROOT, as_worker, migrated, new_topic, settings_for, until

from chaos import evidence, second_stage
from chaos.application import TABLES
from chaos.invariants import HANDLERS, Edit, Evidence, LogEntry, Violations, judge, terminal
from consumer import Settings

_PARTITIONS = 2
_SECONDS = 120.0
_APPLIED_SECONDS = 60.0
APP = "chaos.application:app"
_making = asyncio.Lock()  # two at a time would both make the role of the workers


@dataclass(frozen=True)
class Message:
    id: int
    key: str = "a"
    partition: int = 0
    amount: int = 1
    more: str = ""  # raises, swallows, fails, once or late
    source: str = ""  # of a CloudEvent, whose id is the number

    @property
    def headers(self) -> list[tuple[str, bytes]]:
        return [("ce_id", str(self.id).encode()), ("ce_source", self.source.encode())]

    @property
    def value(self) -> bytes:
        return json.dumps({"key": self.key, "amount": self.amount, **({self.more: True} if self.more else {})}).encode()


@dataclass(frozen=True)
class Scenario:
    """One scenario, and what must catch its mutant.

    caught_by: the invariants, one of which at least must be violated. die: the step at which the first process kills
    itself. before, after: what is produced before it starts, and once that is settled. back: at the end, restore the
    database as it was before the later messages. prepare: SQL for the database. rewound: once all is settled, the
    database goes back in time under the worker's connections. stopped: stop the worker while later messages are
    produced, and start it again after the commands. commands: of an operator, each with its environment. settings,
    environment: of the worker. publishes: there is an output topic, which is
    judged. applied_by: ids that must have effects although a partition cannot be settled.
    """

    mutant: str
    caught_by: frozenset[str]
    before: list[Message] = field(default_factory=lambda: [Message(n, f"k{n % 3}") for n in range(6)])
    after: list[Message] = field(default_factory=list)
    die: str = ""
    back: bool = False
    redis: bool = True
    slow: float = 0.0
    prepare: str = ""
    retry: float = 0.05
    rewound: bool = False
    stopped: bool = False
    commands: list[tuple[dict[str, str], list[str]]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    applied: list[int] = field(default_factory=list)
    publishes: bool = False


_MENDED, _POSTPONE = {"CHAOS_MENDED": "1"}, {"CHAOS_POSTPONE": "1"}
_MEND = ["dlq", "retry", APP, "{letter}", "--value", "{value}", "--new-id", "{id}", "--yes"]
_RETRY = ["dlq", "retry", APP, "--all", "--yes"]
_GOOD = [Message(n, f"k{n}") for n in range(10, 14)]  # of others: a handler none of whose messages succeeds only waits
_TEN_TWICE = [Message(n, f"k{n}", partition) for n in range(10) for partition in (0, 1)]
_FIRST_LETTER = """
select d.dead_letter, d.topic, d.partition, d."offset" from consumer.dead_letters d join consumer.handlers h using (handler)
where h.name = 'book' and d.state = 'dead' order by d.dead_letter limit 1
"""
_REWIND = """
begin; delete from effects; delete from balances; delete from orders; delete from tickets; delete from ticket_lines;
delete from stock; delete from latest; delete from accounts; delete from consumer.ledger; delete from consumer.outcomes;
update consumer.positions set next_offset = 0; update consumer.installation set nonce = gen_random_uuid(); commit
"""
# The worker checks deferred constraints before its COMMIT: what is to be slow in COMMIT alone is put off until then.
_SLOW_COMMIT = """
create table slow (); create function wait_at_commit() returns trigger language plpgsql security definer as $$ begin
    if current_query() not ilike 'set constraints%' then perform pg_sleep(0.6);
    else set constraints waits deferred; insert into slow default values; end if;
    return null; end $$;
create constraint trigger waits after insert on slow deferrable initially deferred
    for each row execute function wait_at_commit();
create function slow_down() returns trigger language plpgsql security definer as $$ begin
    insert into slow default values; return null; end $$;
create trigger slows after insert on effects
    for each row when (new.amount = 777 and new.handler = 'book') execute function slow_down();
"""
# The effect of one message takes longer than all of the next messages' transactions.
_SLOW_EFFECT = """
create function slow_down() returns trigger language plpgsql as $$ begin perform pg_sleep(0.6); return new; end $$;
create trigger slows before insert on effects for each row when (new.amount = 777) execute function slow_down();
"""
_REMOVE = """
create function remove_from_outbox(int, bigint) returns void language plpgsql security definer as $$ begin
    delete from consumer.outbox where stream = $1 and seq = $2; end $$;
"""  # which the role of a worker may not

SCENARIOS = [
    Scenario("M1", frozenset({"I1", "I5"}), die="handled:1", slow=0.1),
    Scenario("M2", frozenset({"I1", "I5"}), die="handled:1"),
    Scenario("M3", frozenset({"I1"}), die="handled:1"),
    Scenario("M4", frozenset({"I2"}), before=_TEN_TWICE, slow=0.05),
    Scenario("M5", frozenset({"I1", "I4"}), die="handled:1"),
    Scenario("M6", frozenset({"I1", "I5", "I9"}), before=[Message(n, more="swallows") for n in range(3)]),
    Scenario("M7", frozenset({"I1"}), before=[Message(0)], after=[Message(n) for n in range(1, 4)], back=True),
    Scenario("M8", frozenset({"I2"}), before=[Message(n // 2) for n in range(6)]),
    Scenario("M9", frozenset({"I1", "I5"}), before=[Message(0), Message(1, more="raises"), Message(2, "b")], die="before_offset_commit:1", retry=1.0),
    Scenario("M10", frozenset({"I2", "I14"}), after=[Message(n, f"k{n % 3}") for n in range(6)], redis=False),
    Scenario("M11", frozenset({"I1", "I10"})),
    Scenario("M12", frozenset({"I1", "I5", "I9"}), before=[Message(0), Message(1, amount=777), Message(2, "b")], prepare=_SLOW_COMMIT),
    Scenario("M13", frozenset({"I1"})),
    Scenario("M14", frozenset({"I17"}), before=[Message(n, f"k{n % 3}") for n in range(24)], environment={"CHAOS_DEFER": "1"}),
    Scenario("M15", frozenset({"I1", "I5"}), rewound=True, after=[Message(n, f"k{n}") for n in range(20, 24)]),
    Scenario("M16", frozenset({"I1"}), before=[*_GOOD, Message(0, more="fails")], commands=[(_POSTPONE, _MEND), (_MENDED, _MEND)]),
    Scenario("M17", frozenset({"I8"}), before=[*_GOOD, Message(0, more="fails")], after=[Message(1), Message(2)], stopped=True, commands=[({}, ["replay", APP, "{topic}", "--apply"]), (_MENDED, _RETRY)]),
    Scenario("M18", frozenset({"I11"}), before=[*[Message(n, "b", 1, more="raises" if n == 20 else "") for n in range(20, 60)], *_GOOD], after=[Message(n, f"k{n}") for n in range(5)], retry=600.0, settings={"parked_messages_max": 10, "lanes_max": 1}, applied=[*range(10, 14), *range(5)]),
    Scenario("M19", frozenset({"I1"}), before=[Message(1, "a", source="/eu"), Message(1, "a", source="/us"), *_GOOD]),
    Scenario("M20", frozenset({"I1", "I4"}), before=[*_GOOD, Message(0, more="once"), Message(1)]),
    Scenario("M21", frozenset({"I8"}), before=[*_GOOD, Message(0, more="fails"), Message(1), Message(2)], commands=[(_MENDED, _RETRY)]),
    Scenario("M22", frozenset({"I4"}), before=[*_GOOD, Message(0, more="late")]),
    Scenario("M23", frozenset({"I4"}), before=[*_GOOD, Message(0, more="fails")]),
    Scenario("M24", frozenset({"I13"}), publishes=True, die="outbox_sending:1"),
    Scenario("M25", frozenset({"I13"}), publishes=True, die="outbox_sending:1", prepare=_REMOVE),
    Scenario("M26", frozenset({"I13"}), publishes=True),
    Scenario("M27", frozenset({"I2"}), before=[Message(0)], after=[Message(0), Message(1)], redis=False),
    Scenario("M28", frozenset({"I1", "I5"}), before=[Message(n, f"k{n}", amount=1 if n else 777) for n in range(6)], prepare=_SLOW_EFFECT, settings={"batch_messages_max": 1}),
]  # fmt: skip


class Stage:
    """Where a scenario runs: its own database, topic and application.

    The servers are shared with others.
    """

    def __init__(self, kafka: str, postgres: Any, valkey: Any, directory: Path) -> None:
        self._kafka, self._postgres, self._valkey, self._directory = kafka, postgres, valkey, directory
        self._name = f"directed-{uuid.uuid4().hex[:8]}"
        self._database = self._name.replace("-", "_")
        self._ids: dict[int, str] = {}
        self._log: list[LogEntry] = []
        self._edits: list[Edit] = []
        self._kafka_counts = True  # until the database went back: then Kafka's copy is ahead for a while, as it may

    async def play(self, scenario: Scenario, mutant: str) -> Violations:
        """Return the violations: at the end, or once the expected ones appear."""
        async with _making:
            await self._admin(f"create database {self._database}")
            await migrated(self._postgres.dsn(self._database), TABLES + scenario.prepare)
        self._topic = await new_topic(self._kafka, _PARTITIONS, f"{self._name}-log")
        await new_topic(self._kafka, _PARTITIONS, f"{self._topic}-copy")
        self._out = await new_topic(self._kafka, _PARTITIONS, f"{self._name}-out") if scenario.publishes else ""
        await self._send(scenario.before)
        if scenario.die:
            await self._died(self._start(scenario, mutant, die=scenario.die))
        process = self._start(scenario, mutant)
        try:
            violations = await self._judged(scenario, mutant)
            if scenario.back:
                await self._stop(process)
                await self._admin(f"create database {self._database}_before template {self._database}")
                process = self._start(scenario, mutant)
            if scenario.rewound and not violations:
                await self._rewind()
            if scenario.stopped:
                await self._stop(process)
            if scenario.after and not violations:
                await asyncio.sleep(0.3)  # what an early purge waits for
                await self._send(scenario.after)
                violations = {} if scenario.stopped else await self._judged(scenario, mutant)
            for environment, arguments in [] if violations else scenario.commands:
                await self._command(scenario, mutant, environment, arguments)
            if scenario.stopped:
                process = self._start(scenario, mutant)
            if scenario.commands and not violations:
                self._edits = [edit._replace(required=True) for edit in self._edits]
                violations = await self._judged(scenario, mutant)
            if scenario.back and not violations:
                await self._stop(process)
                await self._put_back()
                process = self._start(scenario, mutant)
                violations = await self._judged(scenario, mutant)
            return violations
        finally:
            process.kill()
            process.wait()
            with suppress(Exception):
                await self._admin(f"drop database {self._database} with (force)")

    async def _judged(self, scenario: Scenario, mutant: str) -> Violations:
        deadline = time.monotonic() + _SECONDS
        while True:
            violations, settled, ids = await self._look()
            if scenario.applied:  # it is never settled: what must be applied all the same counts
                wanted = {str(self._ids[name]) for name in scenario.applied if name in self._ids}
                settled = wanted <= ids
                if not settled and time.monotonic() > deadline - _SECONDS + _APPLIED_SECONDS:
                    violations.setdefault("I11", []).append(
                        f"{len(wanted - ids)} messages of another partition are not applied"
                    )
            if violations or settled:
                return violations
            who = mutant or "the real consumer"
            assert time.monotonic() < deadline, f"{who} does not settle the scenario of {scenario.mutant}"
            await asyncio.sleep(0.3)  # looking is work, too

    async def _look(self) -> tuple[Violations, bool, set[str]]:
        """Return violations, whether all is settled, and the ids applied everywhere.

        Messages in flight are no violation.
        """
        group = await evidence.committed(self._kafka, self._name, self._topic)
        gathered = Evidence(log=self._log, edits=self._edits)
        published = await evidence.published(self._kafka, self._out, _PARTITIONS) if self._out else []
        connection = await asyncpg.connect(self._postgres.dsn(self._database))
        try:
            await evidence.look(connection, self._name, gathered)
            stage, is_published = await evidence.second_stage(
                connection, self._name, gathered, published, has_next=False
            )
        finally:
            await connection.close()
        ends = {(record.topic, record.partition): record.offset + 1 for record in self._log}
        settled = all(gathered.positions.get(place, 0) >= end for place, end in ends.items())
        violations = judge(gathered, everything_settled=settled)
        if self._out:
            violations |= second_stage.judge(stage, everything_settled=settled and is_published)
            settled = settled and is_published
        offsets = (
            {(self._topic, partition): offset for partition, offset in (group or {}).items()}
            if self._kafka_counts
            else {}
        )
        claims = {(claim.handler, claim.id) for claim in gathered.ledger}
        letters = {(letter.handler, letter.id, letter.fingerprint) for letter in gathered.letters}
        if bad := terminal(self._log, offsets, claims, letters):
            violations.setdefault("I5", []).append(f"online, kafka's commit: {bad[0]}")
        applied = Counter(effect.id for effect in gathered.effects)
        return violations, settled, {id for id, count in applied.items() if count >= len(HANDLERS)}

    # -- acts -------------------------------------------------------------------------------------------------------

    async def _send(self, messages: list[Message]) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=self._kafka, linger_ms=20)
        await producer.start()
        try:
            futures = []
            for message in messages:
                id = self._ids.setdefault(message.id, str(uuid.uuid4()))
                futures.append(
                    await producer.send(
                        self._topic, message.value, key=message.key.encode(), partition=message.partition,
                        headers=message.headers if message.source else [("message-id", id.encode())],
                    )
                )  # fmt: skip
            await asyncio.gather(*futures)
        finally:
            await producer.stop()
        self._log, _ = await evidence.read_log(self._kafka, [self._topic], _PARTITIONS)

    def _settings(self, scenario: Scenario) -> Settings:
        return settings_for(
            as_worker(self._postgres.dsn(self._database)),
            self._kafka,
            self._valkey.url if scenario.redis else None,
            kafka_session_timeout_seconds=1,
            precheck_budget_ms=5000,
            **scenario.settings,
        )

    def _start(self, scenario: Scenario, mutant: str, die: str = "") -> prefork.Process:
        with (self._directory / f"{self._name}.log").open("ab") as log:
            return prefork.start(["-m", "chaos.worker"], self._environment(scenario, mutant, die), log, stdout=log)

    def _environment(self, scenario: Scenario, mutant: str, die: str = "") -> dict[str, str]:
        clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
        more = {
            "CHAOS_APP": self._name,
            "CHAOS_TOPIC": self._topic,
            "CHAOS_OUT": self._out,
            "CHAOS_MUTANT": mutant,
            "CHAOS_DIE": die,
            "CHAOS_SLOW": str(scenario.slow),
            "CHAOS_RETRY": str(scenario.retry),
            "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "support"])),
        }
        return {**clean, **self._settings(scenario).dump(), **more, **scenario.environment}

    async def _command(
        self, scenario: Scenario, mutant: str, environment: dict[str, str], arguments: list[str]
    ) -> None:
        """What an operator does. Exit code 1 is an answer, too."""
        given = {"{topic}": self._topic}
        if "{letter}" in arguments:
            given |= await self._mending()
        program = ["-m", "consumer", *[given.get(argument, argument) for argument in arguments], "--json"]
        answer = await prefork.answer(program, {**self._environment(scenario, mutant), **environment}, seconds=_SECONDS)
        with (self._directory / f"{self._name}.log").open("a") as log:
            log.write(f"$ consumer {' '.join(arguments)}\n{answer.stdout}{answer.stderr}")
        assert answer.returncode in (0, 1), answer.stderr[-400:]

    async def _mending(self) -> dict[str, str]:
        """The dead letter of `book`, and its new payload and id.

        The same each time.
        """
        if not self._edits:
            connection = await asyncpg.connect(self._postgres.dsn(self._database))
            try:
                [(self._letter, topic, partition, offset)] = await connection.fetch(_FIRST_LETTER)
            finally:
                await connection.close()
            self._edits = [Edit("book", str(uuid.uuid4()), "a", 5, topic, partition, offset)]
            value = {"key": "a", "amount": 5, "id": self._edits[0].id, "fails": True}
            (self._directory / f"{self._name}.json").write_text(json.dumps(value))
        path = str(self._directory / f"{self._name}.json")
        return {"{letter}": str(self._letter), "{value}": path, "{id}": self._edits[0].id}

    async def _rewind(self) -> None:
        """Empty the database under its connections, and give it another epoch."""
        self._kafka_counts = False
        connection = await asyncpg.connect(self._postgres.dsn(self._database))
        try:
            await connection.execute(_REWIND)
        finally:
            await connection.close()

    async def _died(self, process: prefork.Process) -> None:
        await self._ended(process)
        assert process.returncode == -9, f"it was to kill itself, and ended with {process.returncode}"

    async def _stop(self, process: prefork.Process) -> None:
        process.terminate()
        await self._ended(process)

    async def _ended(self, process: prefork.Process) -> None:
        async def gone() -> bool:
            return process.poll() is not None

        try:
            await until("the worker to end", gone, _SECONDS)
        finally:
            process.kill()
            process.wait()

    async def _put_back(self) -> None:
        """Restore the database as it was before the later messages.

        As after a restore: the same address, another epoch.
        """
        self._kafka_counts = False
        await self._admin(f"drop database {self._database} with (force)")
        await self._admin(f"alter database {self._database}_before rename to {self._database}")
        connection = await asyncpg.connect(self._postgres.dsn(self._database))
        try:
            await connection.execute("update consumer.installation set nonce = gen_random_uuid()")
        finally:
            await connection.close()

    async def _admin(self, sql: str) -> None:
        connection = await asyncpg.connect(self._postgres.dsn())
        try:
            await connection.execute(sql)
        finally:
            await connection.close()


async def play_all(
    stage: Callable[[], Stage], plays: list[tuple[Scenario, str]], at_a_time: int = 3
) -> list[Violations | BaseException]:
    """Several scenarios side by side: most of their time is waiting."""
    places = asyncio.Semaphore(at_a_time)

    async def one(scenario: Scenario, mutant: str) -> Violations:
        async with places:
            return await stage().play(scenario, mutant)

    plays_on: list[Awaitable[Violations]] = [one(*play) for play in plays]
    return await asyncio.gather(*plays_on, return_exceptions=True)
