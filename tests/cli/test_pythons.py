"""What a command answers to bad addresses on every supported Python.

`make pythons` runs it on others than this one. Kafka answers here: on Python 3.12 and later its client's cancelled
tasks hid the error, and the command was "terminated".
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Result, consumer, is_one_line
from services import Kafka

from consumer.local_servers import free_port

APP = "from consumer import App\napp = App('x')\n@app.handler('t')\nasync def h(p: dict): ...\n"


REFUSED = {
    "": "CONSUMER_POSTGRES_DSN",
    "postgresql+asyncpg://u:canary@127.0.0.1/x": "write postgresql://",
    "postgresql://u:canary@127.0.0.1:1/x": "PostgreSQL at 127.0.0.1:1",
}


@pytest.mark.parametrize("dsn", REFUSED, ids=["none", "driver", "nobody"])
@pytest.mark.parametrize("command", ["status", "positions", "probe"])
def test_dsn_that_cannot_work_while_kafka_answers_is_one_line(
    kafka: Kafka, tmp_path: Path, command: str, dsn: str
) -> None:
    is_one_line(answer(tmp_path, command, dsn, kafka.bootstrap_servers), REFUSED[dsn])


@pytest.mark.parametrize("dsn", REFUSED, ids=["none", "driver", "nobody"])
def test_dsn_that_cannot_work_where_nothing_answers_is_one_line(tmp_path: Path, dsn: str) -> None:
    is_one_line(answer(tmp_path, "status", dsn, f"127.0.0.1:{free_port()}"))


def answer(directory: Path, command: str, dsn: str, servers: str) -> Result:
    (directory / "x.py").write_text(APP)
    environment = {
        "CONSUMER_POSTGRES_DSN": dsn,
        "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": servers,
        "CONSUMER_LOG_LEVEL": "error",
    }
    result = consumer(directory, command, "x:app", "--wait", "0.5", **environment)
    assert "canary" not in result.stdout + result.stderr
    return result
