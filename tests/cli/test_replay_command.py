"""`consumer replay` as people use it.

Exit codes, tables, JSON, the page, Ctrl-C and --resume, and bad input.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Place, Result, Sent, consume_all, consumer, is_one_line, query, until
from prometheus_client.parser import text_string_to_metric_families

from consumer.app_loader import load_app
from consumer.local_servers import free_port
from consumer.metrics.catalog import PREFIX, REPLAY_AT, REPLAY_VERDICT

APP = """
import asyncio, os, pathlib
import msgspec
from consumer import App, Tx

app = App({name!r})

class Payment(msgspec.Struct):
    id: str
    account: int
    amount: int

@app.handler({topic!r})
async def settle(payment: Payment, tx: Tx) -> None:
    if os.environ.get("SLOW"):
        pathlib.Path(os.environ["SLOW"]).touch()
        await asyncio.sleep(0.05)
    tx.defer("insert into effects values ($1, $2, $3)", payment.id, payment.account, payment.amount)
    tx.defer("update accounts set balance = balance + $2 where id = $1", payment.account, payment.amount)

@app.handler({topic!r}, idempotent=False)
async def look(payment: Payment) -> None: ...
"""


class Shop:
    """A directory with an app, its topic, and commands in it."""

    def __init__(self, place: Place, topic: str, directory: Path) -> None:
        self.place, self.topic, self.directory = place, topic, directory
        self.module = f"shop_{uuid.uuid4().hex[:8]}"
        self.name = f"shop-{uuid.uuid4().hex[:8]}"
        (directory / f"{self.module}.py").write_text(APP.format(name=self.name, topic=topic))
        self.environment = {
            "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": place.kafka,
            "CONSUMER_POSTGRES_DSN": place.worker_dsn,
            "XDG_STATE_HOME": str(directory / "state"),
        }

    def replay(self, *arguments: str, **environment: str) -> Result:
        return self.command("replay", *arguments, **environment)

    def rebuild(self, *arguments: str) -> Result:
        return self.command("rebuild", *arguments)

    def command(self, name: str, *arguments: str, **environment: str) -> Result:
        return consumer(
            self.directory,
            name,
            f"{self.module}:app",
            self.topic,
            *arguments,
            **{**self.environment, **environment},
        )

    async def consume(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(self.directory))
        monkeypatch.chdir(self.directory)
        await consume_all(load_app(f"{self.module}:app"), self.place.settings(redis_url=None))

    def verdict_in(self, name: str) -> float:
        """The verdict that a file of metrics has, which is of now."""
        text = (self.directory / name).read_text("utf-8")
        samples = {
            sample.name.removeprefix(PREFIX): sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        verdict, at = samples[REPLAY_VERDICT.name], samples[REPLAY_AT.name]
        assert verdict.labels == at.labels == {"app": self.name, "topic": self.topic, "mode": "check"}
        assert len(samples) == 2 and abs(at.value - time.time()) < 600
        return verdict.value

    @property
    def states(self) -> list[Path]:
        return list((self.directory / "state").rglob("*.json"))


@pytest.fixture
async def shop(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """Forty messages, four of them twice, all applied."""
    shop = Shop(place, await place.topic(2), tmp_path)
    sent = [Sent({"id": f"p{n}", "account": n, "amount": 1}, id=f"p{n}", key=str(n)) for n in range(40)]
    await place.send(shop.topic, *sent, *sent[:4])
    await shop.consume(monkeypatch)
    return shop


async def test_a_good_answer_is_exit_code_0(shop: Shop, tmp_path: Path) -> None:
    result = shop.replay()
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for text in ("settle", "look", "44", "rows written for messages applied before: 0", "pg_stat_xact_all_tables"):
        assert text in result.stdout
    assert result.stdout.splitlines()[-1] == "Nothing is missing, and nothing would happen twice"
    assert shop.states == []
    answer = json.loads(shop.replay("--json", "--metrics", "nightly.prom").stdout)
    assert (answer["verdict"], answer["exit_code"], answer["messages"]) == ("ok", 0, 44)
    assert shop.verdict_in("nightly.prom") == 0
    assert [file.name for file in tmp_path.glob("nightly*")] == ["nightly.prom"]
    assert answer["handlers"]["settle"]["applied"] == 44 and answer["handlers"]["look"]["skipped"] == 44
    assert answer["effects"]["rows"] == 0 and answer["history"]["settle"]["rows"] == 40


async def test_missing_message_is_exit_code_1_and_repaired_by_apply(shop: Shop, tmp_path: Path) -> None:
    await query(shop.place.dsn, 'delete from consumer.ledger where "offset" = 3 and partition = 1 returning id')
    result = shop.replay("--report", "report.html", "--metrics", "nightly.prom")
    assert result.returncode == 1, result.stderr
    assert shop.verdict_in("nightly.prom") == 1
    assert "would be applied" in result.stdout and f"{shop.topic}:1:3" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("No: 1 message missing")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.startswith("<!DOCTYPE html>") or page.startswith("<!doctype html>")
    assert shop.topic in page and "1 message missing" in page and "http" not in page.replace("http-equiv", "")
    assert shop.replay("--apply").returncode == 0
    assert shop.replay("--partition", "1", "--from", "2", "--until", "5", "--handler", "settle").returncode == 0


async def test_inconclusive_replay_is_exit_code_2(shop: Shop) -> None:
    await query(shop.place.dsn, "update consumer.positions set first_offset = next_offset returning 1")
    await query(shop.place.dsn, "delete from consumer.ledger returning 1")
    result = shop.replay()
    assert result.returncode == 2, result.stderr
    assert "Could not tell: 44 deliveries from before the ledger began" in result.stdout
    assert json.loads(shop.replay("--json").stdout)["verdict"] == "unknown"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--partition", "7"], "no partition 7"),
        (["--handler", "nobody"], "no handler 'nobody'"),
        (["--handler", "look"], "not idempotent"),
        (["--from", "2999-01-01"], "in the future"),
        (["--from", "soon"], "--from 'soon'"),
        (["--from", "latest"], "the range is empty"),
        (["--from", "5", "--until", "5"], "the range is empty"),
        (["--resume"], "no replay with these arguments"),
        (["--message-id", "nope"], "no message of the range has that id"),
        (["--key", "nope"], "no message of the range has that key"),
        (["--key", "\udcff"], "no message of the range has that key"),
        (["--report", "x" * 300], "--report"),
        (["--report", "nowhere/x.html"], "--report nowhere/x.html"),
        (["--metrics", "nowhere/x.prom"], "--metrics nowhere/x.prom"),
        (["--metrics", "/dev/null"], "--metrics /dev/null"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
async def test_bad_input_is_one_line_and_exit_code_2(shop: Shop, arguments: list[str], says: str) -> None:
    is_one_line(shop.replay(*arguments), says)


async def test_a_replay_that_fails_writes_that_it_cannot_tell(shop: Shop) -> None:
    is_one_line(shop.replay("--partition", "7", "--metrics", "nightly.prom"), "no partition 7")
    assert shop.verdict_in("nightly.prom") == 2


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("rebuild", ["--base", "nowhere.sql"], "--base nowhere.sql"),
        ("rebuild", ["--report", "nowhere/x.html"], "--report nowhere/x.html"),
        ("rebuild", ["--handler", "nobody"], "no handler 'nobody'"),
        ("republish", ["--to", ""], "name the topic to copy to"),
        ("republish", ["--to", "nowhere"], "'nowhere': does not exist"),
        ("republish", ["--to", "x", "--from", "5", "--until", "5"], "the range is empty"),
    ],
)
async def test_bad_input_of_rebuild_and_republish_is_one_line(
    shop: Shop, command: str, arguments: list[str], says: str
) -> None:
    is_one_line(shop.command(command, *arguments), says)


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("replay", "--rebuild"),
        ("replay", "--republish"),
        ("replay", "--to"),
        ("replay", "--ignore"),
        ("rebuild", "--from"),
        ("rebuild", "--resume"),
        ("rebuild", "--assume-unapplied"),
        ("republish", "--handler"),
        ("republish", "--message-id"),
    ],
)
def test_flag_of_another_command_is_refused(tmp_path: Path, command: str, flag: str) -> None:
    result = consumer(tmp_path, command, "x:app", "orders", flag)
    assert result.returncode == 2 and f"No such option: {flag}" in result.stderr


async def test_republish_copies_a_range_with_its_ids(shop: Shop) -> None:
    copy = await shop.place.topic(2)
    result = shop.command("republish", "--to", copy, "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["mode"] == "republish" and answer["messages"] == 44


async def test_rebuild_finds_a_changed_row(shop: Shop) -> None:
    assert shop.rebuild("--json").returncode == 0
    await query(shop.place.dsn, "update accounts set balance = balance + 1 where id = 7 returning id")
    result = shop.rebuild("--json")
    answer = json.loads(result.stdout)
    assert (result.returncode, answer["mode"], answer["verdict"]) == (1, "rebuild", "no")


async def test_services_that_are_not_there_are_one_line(shop: Shop) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    dsn = f"postgresql://u:secret@{nowhere}/x"
    result = shop.replay("--wait", "1", CONSUMER_POSTGRES_DSN=dsn)
    is_one_line(result, nowhere, "waited 1 s")
    assert "secret" not in result.stderr
    result = shop.replay("--wait", "1", CONSUMER_KAFKA_BOOTSTRAP_SERVERS=nowhere)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"Kafka at {nowhere} did not answer within 1 s" in result.stderr
    result = consumer(shop.directory, "replay", f"{shop.module}:app", "other", **shop.environment)
    is_one_line(result, "no handler of topic 'other'")


async def test_a_database_without_the_ledger_is_one_line(shop: Shop, postgres: Any) -> None:
    name = f"empty_{uuid.uuid4().hex[:8]}"
    await query(postgres.dsn(), f"create database {name}")
    is_one_line(shop.replay(CONSUMER_POSTGRES_DSN=postgres.dsn(name)), "no ledger yet; run `consumer migrate`")


async def test_a_kept_state_that_is_no_state_is_one_line(shop: Shop) -> None:
    shop.replay("--from", "1")  # makes the directory
    process_state = shop.directory / "state" / "consumer"
    process_state.mkdir(parents=True, exist_ok=True)
    from consumer.cli.replay_state import SavedState
    from consumer.replay.options import Options

    settings = shop.place.settings(redis_url=None)
    name = SavedState(f"{shop.module}:app", settings, [shop.topic], Options())._path.name
    for text in ("null", "{}", "[]", "{", '{"epoch": 1}'):
        (process_state / name).write_text(text)
        is_one_line(shop.replay("--resume"), "--resume")


async def test_failed_replay_answers_in_json_too(shop: Shop) -> None:
    result = shop.replay("--json", "--from", "latest")
    answer = json.loads(result.stdout)
    assert (answer["verdict"], answer["exit_code"], result.returncode) == ("unknown", 2, 2)
    assert "the range is empty" in answer["answer"] and "the range is empty" in result.stderr


async def test_replay_without_a_home_cannot_be_resumed(shop: Shop) -> None:
    del shop.environment["XDG_STATE_HOME"]
    result = shop.replay(HOME="/proc/nowhere")
    assert result.returncode == 0
    assert "cannot be resumed" in result.stderr


async def test_ctrl_c_says_how_far_it_came_and_resume_goes_on(place: Place, tmp_path: Path) -> None:
    shop = Shop(place, await place.topic(2), tmp_path)
    sent = [Sent({"id": f"p{n}", "account": n % 100, "amount": 1}, id=f"p{n}", key=str(n)) for n in range(200)]
    await place.send(shop.topic, *sent)
    before = await query(place.dsn, "select (select count(*) from effects), (select count(*) from consumer.ledger)")
    environment = {
        **{name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")},
        **shop.environment,
        "PYTHONPATH": str(ROOT),
        "SLOW": str(tmp_path / "begun"),
    }
    command = [sys.executable, "-m", "consumer", "replay", f"{shop.module}:app", shop.topic, "--call-handlers"]
    for end, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        (tmp_path / "begun").unlink(missing_ok=True)
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:

            async def begun() -> bool:
                return (tmp_path / "begun").exists()

            await until("a handler to be called", begun)
            process.send_signal(end)
            out, errors = await asyncio.to_thread(process.communicate, None, 30)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == code, errors
        assert out == "" and "nothing was changed" in errors and "--resume" in errors and "of 200 offsets" in errors
        assert "Traceback" not in errors
        assert len(shop.states) == 1
    assert (
        await query(place.dsn, "select (select count(*) from effects), (select count(*) from consumer.ledger)")
        == before
    )
    result = shop.replay("--call-handlers", "--resume", "--json")
    answer = json.loads(result.stdout)
    assert result.returncode == 1 and answer["handlers"]["settle"]["missing"] == 200 and answer["messages"] == 200
    assert shop.states == []


async def test_help_teaches(tmp_path: Path) -> None:
    text = consumer(tmp_path, "replay", "--help").stdout
    for word in (
        "--from",
        "--until",
        "--apply",
        "--resume",
        "--report",
        "--json",
        "Exit code 0",
        "consumer replay shop:app",
    ):
        assert word in text
