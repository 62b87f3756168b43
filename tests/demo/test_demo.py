"""A small `consumer demo`: right numbers, wrong balances shown, nothing left.

Nothing is left after Ctrl-C, either.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from consumer.demo.plan import DUPLICATES_PERCENT, plan
from consumer.demo.result import DemoResult
from consumer.local_servers import Postgres


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that PostgreSQL's own user can reach.

    That user cannot reach pytest's directories.
    """
    with TemporaryDirectory(dir=Postgres().place()) as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "consumer", "demo", *arguments],
        env={**os.environ, "TMPDIR": str(directory), "CONSUMER_POSTGRES_DSN": "postgresql://not.this.one/x"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_behind(directory: Path) -> list[str]:
    """Directories of its servers, and processes that work in them."""
    names = [path.name for path in directory.iterdir()]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_text("utf-8", "replace")  # any process of this machine, with any bytes
        except OSError:
            continue
        if str(directory) in command:
            names.append(command)
    return names


def test_its_numbers_agree_and_it_removes_what_it_started(place: Path) -> None:
    process = start(place, "--payments", "3000", "--json")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    report = json.loads(output)
    assert report["produced"] == 3000
    assert report["distinct"] == report["applied"] == report["payments_stored"] == 2700
    assert report["receipts"] == 2700
    assert report["replayed"] == 3000 and report["replays_agree"]
    for key in ("missing_in_replay", "rows_written_by_replay", "applied_by_replay", "differences_in_rebuild"):
        assert report[key] == 0
    stopped = [report[f"duplicates_by_{source}"] for source in ("batch", "precheck", "ledger")]
    assert sum(stopped) == 300
    assert report["balance_sum"] == report["balance_sum_expected"] > 0
    assert report["agree"] is True
    assert "SIGKILL" in errors
    assert left_behind(place) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_early_it_leaves_nothing(place: Path, number: signal.Signals) -> None:
    process = start(place)
    assert process.stdout is not None
    for line in process.stdout:
        if "producing" in line:
            break
    assert left_behind(place) != []
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    deadline = time.monotonic() + 10
    while left := left_behind(place):
        assert time.monotonic() < deadline, left


def test_a_wrong_number_is_not_called_agreement() -> None:
    good = DemoResult(
        produced=10, distinct=9, applied=9, payments_stored=9, duplicates_by_ledger=1, receipts=9, replays_agree=True
    )
    assert good.agree
    for name in (
        "produced",
        "applied",
        "payments_stored",
        "dead_lettered",
        "receipts",
        "balance_sum",
        "accounts_wrong",
    ):
        setattr(good, name, getattr(good, name) + 1)
        assert not good.agree, name
        setattr(good, name, getattr(good, name) - 1)
    good.replays_agree = False
    assert not good.agree


def test_the_plan_holds_the_duplicates_it_promises() -> None:
    planned = plan(1000, random.Random(1))
    assert len(planned) == 1000
    repeated = Counter(payment.payment_id for payment in planned)
    assert len(repeated) == 1000 - 1000 * DUPLICATES_PERCENT // 100
    assert set(repeated.values()) == {1, 2}
    assert any(payment.elsewhere for payment in planned)
