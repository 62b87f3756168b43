"""`consumer dlq` at a terminal.

Questions, signals, filters, and names that can be pasted.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, consumer, is_one_line, query, until, value
from retry_desk import Desk
from terminal_session import AtTerminal

PATH = f"{ROOT}{os.pathsep}{ROOT / 'tests'}:{ROOT / 'tests' / 'support'}"


@pytest.fixture
async def desk(database: str) -> Desk:
    desk = Desk(database)
    await desk.open()
    return desk


def environment(desk: Desk) -> dict[str, str]:
    return {"CONSUMER_POSTGRES_DSN": desk.settings.dsn, "TEST_DESK": desk.name, "PYTHONPATH": PATH}


def dlq(desk: Desk, cwd: Path, *arguments: str, **more: str) -> Any:
    return consumer(cwd, "dlq", *arguments, **environment(desk), **more)


@pytest.mark.parametrize("what", [["retry"], ["discard", "--why", "a test"]], ids=["retry", "discard"])
async def test_question_ends_at_once_when_interrupted(desk: Desk, tmp_path: Path, what: list[str]) -> None:
    number = await desk.letter("a")
    before = await desk.rows()
    command = ["dlq", what[0], "retry_desk:app", "--all", *what[1:]]
    for signal_number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (None, 1)):
        with AtTerminal(tmp_path, *command, environment=environment(desk)) as terminal:
            terminal.until("[y/N]")
            if signal_number == signal.SIGINT:
                terminal.press("\x03")
            elif signal_number is not None:
                terminal.process.send_signal(signal_number)
            else:
                terminal.press("n\n")
            assert terminal.end() == code, terminal.shown
            assert "nothing was changed" in terminal.shown and "Traceback" not in terminal.shown
            assert " at " not in terminal.shown.split("consumer: ")[-1].replace(" at the question", "")
    assert await desk.rows() == before
    with AtTerminal(tmp_path, *command, environment=environment(desk)) as terminal:
        terminal.until("[y/N]")
        terminal.press("y\n")
        assert terminal.end() == 0, terminal.shown
    assert await value(desk.dsn, "select state from consumer.dead_letters where dead_letter = $1", number) in (
        "applied",
        "discarded",
    )


ASKS_AGAIN = """
from consumer.cli import prompts, signals
from consumer.worker.event_loop import run

async def ask_again():
    for n in range(200):
        try:
            prompts.ask(f"question {n}")
        except signals.Interrupted as ended:
            print(f"code {ended.code}", flush=True)

run(signals.until_signal(ask_again()))
"""


def test_question_ends_at_a_signal_just_before_it_reads(tmp_path: Path) -> None:
    chance = random.Random(7)
    with AtTerminal(tmp_path, program=("-c", ASKS_AGAIN)) as terminal:
        for n in range(200):
            terminal.until(f"question {n} [y/N]")
            at = time.perf_counter() + chance.random() * 0.0003  # the time from the question to its read is about this
            while time.perf_counter() < at:
                pass
            terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 0, terminal.shown
    assert terminal.shown.count("code 143") == 200 and "Traceback" not in terminal.shown


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_bulk_retry_that_is_interrupted_keeps_what_is_done(
    desk: Desk, tmp_path: Path, signal_number: int, code: int
) -> None:
    await desk.many(3000)
    command = ["dlq", "retry", "retry_desk:app", "--all", "--yes"]
    with AtTerminal(tmp_path, *command, environment={**environment(desk), "TEST_DESK_PAUSE": "0.002"}) as terminal:
        await until("some to be applied", lambda: value(desk.dsn, "select count(*) > 0 from done"))
        terminal.process.send_signal(signal_number)
        assert terminal.end() == code, terminal.shown
    done = await value(desk.dsn, "select count(*) from done")
    assert 0 < done < 3000
    assert f"{done:,} applied; the rest is untouched" in terminal.shown
    assert "Traceback" not in terminal.shown and " at cli/terminal.py" not in terminal.shown
    assert await query(desk.dsn, "select state, count(*) from consumer.dead_letters group by 1 order by 1") == [
        ("applied", done), ("dead", 3000 - done),
    ]  # fmt: skip
    result = dlq(desk, tmp_path, "retry", "retry_desk:app", "--all", "--yes", "--json")
    assert json.loads(result.stdout)["counts"] == {"applied": 3000 - done}
    assert await value(desk.dsn, "select count(distinct id) = 3000 and count(*) = 3000 from done")


async def test_second_interrupt_undoes_the_transaction_in_hand(desk: Desk, tmp_path: Path) -> None:
    await desk.many(20)
    command = ["dlq", "retry", "retry_desk:app", "--all", "--yes"]
    with AtTerminal(tmp_path, *command, environment={**environment(desk), "TEST_DESK_PAUSE": "3600"}) as terminal:
        begun = "select exists (select from pg_stat_activity where state = 'idle in transaction' and datname = current_database())"
        await until("the handler to run", lambda: value(desk.dsn, begun))
        for number in (signal.SIGINT, signal.SIGTERM):  # two of one kind may arrive as one
            terminal.process.send_signal(number)
        assert terminal.end() in (130, 143), terminal.shown  # whichever of the two was handled first
    assert await desk.done() == []
    assert await query(desk.dsn, "select distinct state from consumer.dead_letters") == [("dead",)]


async def test_bulk_retry_leaves_out_what_may_have_been_applied_and_says_so(desk: Desk, tmp_path: Path) -> None:
    old, new = await desk.letter("old", reason="too_old"), await desk.letter("new")
    result = dlq(desk, tmp_path, "retry", "retry_desk:app", "--all", "--yes")
    assert result.returncode == 0, result.stderr
    assert "1 dead letters are left out" in result.stdout and "--reason too_old" in result.stdout
    assert await desk.done() == ["new"]
    answer = json.loads(dlq(desk, tmp_path, "retry", "retry_desk:app", "--all", "--yes", "--json").stdout)
    assert (answer["asked"], answer["left_out"], answer["letters"], answer["changed"]) == (0, 1, [], False)
    is_one_line(dlq(desk, tmp_path, "retry", "retry_desk:app", str(old)), "may have been applied", "--yes")
    assert await desk.done() == ["new"]
    is_one_line(dlq(desk, tmp_path, "retry", "retry_desk:app", str(new)), "applied already")
    result = dlq(desk, tmp_path, "retry", "retry_desk:app", "--reason", "too_old", "--yes")
    assert result.returncode == 0, result.stderr
    assert await desk.done() == ["new", "old"]


async def test_retry_json_has_one_shape(desk: Desk, tmp_path: Path) -> None:
    await desk.letter("a")
    shapes = []
    for arguments in (["--all", "--dry-run"], ["--topic", "orders", "--yes"], ["--topic", "orders", "--yes"]):
        answer = json.loads(dlq(desk, tmp_path, "retry", "retry_desk:app", *arguments, "--json").stdout)
        shapes.append((set(answer), {frozenset(entry) for entry in answer["letters"]} or None))
    assert shapes[0] == shapes[1]
    assert shapes[2] == (shapes[0][0], None)


async def test_filter_that_names_nothing_is_an_error(desk: Desk, tmp_path: Path) -> None:
    number = await desk.letter("a")
    before = await desk.rows()
    for arguments, says in (
        (["list", desk.name[:-1]], ["APP", f"did you mean {desk.name}?"]),
        (["list", "retry_desk:app", "--handler", "setle"], ["--handler 'setle'", "did you mean settle?"]),
        (["list", desk.name, "--handler", "setle"], ["did you mean settle?"]),
        (["list", "retry_desk:app", "--topic", "order"], ["--topic 'order'", "did you mean orders?"]),
        (["list", "retry_desk:app", "--group", "abcdef0124"], ["--group", "did you mean abcdef0123?"]),
        (["list", "retry_desk:app", "--reason", "fail"], ["--reason", "did you mean failed?"]),
        (["list", "retry_desk:app", "--state", "death"], ["--state", "did you mean dead?"]),
        (["list", "retry_desk:app", "--by-group", "--handler", "setle"], ["did you mean settle?"]),
        (["list", "retry_desk:app", "--actions", "--topic", "order"], ["did you mean orders?"]),
        (["show", "retry_desk:app", str(number + 1)], ["no dead letter"]),
        (["retry", "retry_desk:app", "--handler", "setle", "--yes"], ["did you mean settle?"]),
        (["retry", "retry_desk:app", "--topic", "order", "--yes"], ["did you mean orders?"]),
        (["retry", "retry_desk:app", "--group", "abcdef0124", "--yes"], ["did you mean abcdef0123?"]),
        (["retry", "retry_desk:app", str(number + 1)], ["there is none"]),
        (["discard", "retry_desk:app", "--why", "x", "--handler", "setle", "--yes"], ["did you mean settle?"]),
        (["discard", "retry_desk:app", "--why", "x", "--topic", "order", "--yes"], ["did you mean orders?"]),
    ):
        is_one_line(dlq(desk, tmp_path, *arguments), *says)
    assert await desk.rows() == before
    for name in (desk.name, "retry_desk:app"):
        rows = json.loads(dlq(desk, tmp_path, "list", name, "--json").stdout)
        assert [row["letter"] for row in rows] == [number]


async def test_tables_at_eighty_columns_cut_no_name(desk: Desk, tmp_path: Path) -> None:
    number = await desk.letter("a", key="k")
    for arguments in (["list", "retry_desk:app"], ["list", "retry_desk:app", "--by-group"]):
        with AtTerminal(tmp_path, "dlq", *arguments, environment=environment(desk)) as terminal:
            assert terminal.end() == 0, terminal.shown
        for name in (desk.name, "settle", "abcdef0123", "failed", str(number)):
            assert any(name in line.split() for line in terminal.shown.splitlines()), (name, terminal.shown)
        assert "…" not in terminal.shown
    assert "orders:0:0" in dlq(desk, tmp_path, "list", "retry_desk:app").stdout
