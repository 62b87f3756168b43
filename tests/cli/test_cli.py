"""The command as people use it: bad input, and reports.

Real processes, real services.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Place, Sent, consume_all, consumer, is_one_line, query
from services import Kafka

from consumer import App, Reject, Retry, Tx
from consumer.local_servers import Postgres, free_port

HEAD = "from consumer import App, Message, Tx\napp = App('bad')\n"
BAD_APPS = {
    "no_annotation": ("@app.handler('t')\nasync def h(payment): ...", ["bad.py:3", "no annotation"]),
    "not_async": ("@app.handler('t')\ndef h(payment: dict): ...", ["bad.py:3", "async def"]),
    "no_message": ("@app.handler('t')\nasync def h(tx: Tx): ...", ["bad.py:3", "takes no message"]),
    "unknown_option": ("@app.handler('t', ordr='key')\nasync def h(p: dict): ...", ["bad.py:3", "ordr", "'order'"]),
    "two_of_a_name": (
        "@app.handler('t')\nasync def h(p: dict): ...\n@app.handler('u', name='h')\nasync def i(p: dict): ...",
        ["bad.py:5", "bad.py:3", "two handlers"],
    ),
    "tx_of_an_opt_out": (
        "@app.handler('t', idempotent=False)\nasync def h(p: dict, tx: Tx): ...",
        ["bad.py:3", "idempotent=False"],
    ),
    "bad_topic": ("@app.handler('a topic')\nasync def h(p: dict): ...", ["bad.py:3", "a topic"]),
    "no_parentheses": ("@app.handler\nasync def h(p: dict): ...", ["bad.py:3", "name the topic"]),
    "no_handlers": ("", ["no handlers"]),
    "missing_resource": ("@app.handler('t')\nasync def h(p: dict, pool: int): ...", ["bad.py:3", "'pool'"]),
    "raises": ("raise RuntimeError('at import')", ["bad.py:3", "RuntimeError: at import"]),
    "syntax": ("def (", ["bad.py", "SyntaxError"]),
    "missing_import": ("import nowhere_to_be_found", ["bad.py:3", "nowhere_to_be_found"]),
}


@pytest.mark.parametrize(("body", "says"), BAD_APPS.values(), ids=BAD_APPS)
def test_an_app_that_cannot_work_is_one_line_that_names_the_place(tmp_path: Path, body: str, says: list[str]) -> None:
    (tmp_path / "bad.py").write_text(HEAD + body + "\n")
    is_one_line(consumer(tmp_path, "run", "bad:app", CONSUMER_POSTGRES_DSN="postgresql://127.0.0.1:1/x"), *says)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nothing", "module:attribute"),
        ("nowhere:app", "nowhere"),
        ("good:other", "did you mean good:app"),
        ("good:number", "not a consumer.App"),
        (":app", "module:attribute"),
    ],
)
def test_a_bad_import_string_is_one_line(tmp_path: Path, path: str, says: str) -> None:
    (tmp_path / "good.py").write_text(HEAD + "number = 1\n@app.handler('t')\nasync def h(p: dict): ...\n")
    is_one_line(consumer(tmp_path, "run", path), says)


GOOD = """
from consumer import App, Tx
app = App('good')

@app.handler('t')
async def h(p: dict, tx: Tx): ...
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    (tmp_path / "good.py").write_text(GOOD)
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "CONSUMER_POSTGRES_DSN"),
        ({"CONSUMER_POSTGRES_DSN": "not a dsn"}, "CONSUMER_POSTGRES_DSN"),
        ({"CONSUMER_LANES_MAX": "many"}, "CONSUMER_LANES_MAX"),
        ({"CONSUMER_GRACE_SECONDS": "-1"}, "CONSUMER_GRACE_SECONDS"),
        ({"CONSUMER_KAFKA_SECURITY_PROTOCOL": "TLS"}, "CONSUMER_KAFKA_SECURITY_PROTOCOL"),
        ({"CONSUMER_LOG_LEVEL": "loud"}, "CONSUMER_LOG_LEVEL"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(good: Path, environment: dict[str, str], says: str) -> None:
    is_one_line(consumer(good, "run", "good:app", **environment), says)


def test_postgresql_that_is_not_there_after_the_wait_is_one_line(good: Path) -> None:
    port = free_port()
    result = consumer(
        good, "migrate", "--wait", "0.5", CONSUMER_POSTGRES_DSN=f"postgresql://me:canary@127.0.0.1:{port}/x"
    )
    is_one_line(result, f"127.0.0.1:{port}", "waited 0.5 s")
    assert "canary" not in result.stderr


async def test_kafka_that_is_not_there_after_the_wait_is_one_line(good: Path, place: Place) -> None:
    port = free_port()
    result = consumer(
        good,
        *("run", "good:app", "--wait", "0.5", "--log-level", "error"),
        CONSUMER_POSTGRES_DSN=place.worker_dsn,
        CONSUMER_KAFKA_BOOTSTRAP_SERVERS=f"127.0.0.1:{port}",
    )
    is_one_line(result, f"127.0.0.1:{port}")


async def test_a_wrong_postgresql_password_is_one_line(good: Path, postgres: Postgres, kafka: Kafka) -> None:
    dsn = f"postgresql://demo:canary@127.0.0.1:{postgres.port}/postgres"
    for command in (["run", "good:app"], ["migrate"], ["status", "good:app"], ["show", "good:app", "x"]):
        result = consumer(
            good, *command, CONSUMER_POSTGRES_DSN=dsn, CONSUMER_KAFKA_BOOTSTRAP_SERVERS=kafka.bootstrap_servers
        )
        is_one_line(result, "password authentication failed")
        assert "canary" not in result.stderr


async def test_a_wrong_redis_password_is_one_line(good: Path, place: Place) -> None:
    url = place.redis_url.replace("redis://", "redis://bob:canary@")
    result = consumer(good, "run", "good:app", CONSUMER_POSTGRES_DSN=place.worker_dsn, CONSUMER_REDIS_URL=url)
    is_one_line(result, "CONSUMER_REDIS_URL")
    assert "canary" not in result.stderr


async def test_a_wrong_kafka_password_is_one_line(good: Path, place: Place, kafka: Kafka) -> None:
    environment = {
        "CONSUMER_POSTGRES_DSN": place.worker_dsn,
        "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": kafka.sasl_servers,
        "CONSUMER_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "CONSUMER_KAFKA_SASL_USERNAME": "alice",
    }
    is_one_line(consumer(good, "status", "good:app", **environment), "CONSUMER_KAFKA_SASL_PASSWORD")
    result = consumer(good, "status", "good:app", **environment, CONSUMER_KAFKA_SASL_PASSWORD="canary")
    is_one_line(result, "the SASL credentials are refused")
    assert "canary" not in result.stderr
    assert consumer(good, "status", "good:app", **environment, CONSUMER_KAFKA_SASL_PASSWORD="right").returncode == 0


async def test_a_missing_schema_is_one_line_that_names_the_command(good: Path, database: str, kafka: Kafka) -> None:
    for command in (
        ["run", "good:app"],
        ["status", "good:app"],
        ["show", "good:app", "x"],
        ["dlq", "list", "good:app"],
    ):
        result = consumer(
            good, *command, CONSUMER_POSTGRES_DSN=database, CONSUMER_KAFKA_BOOTSTRAP_SERVERS=kafka.bootstrap_servers
        )
        is_one_line(result, "consumer migrate")


def test_help_teaches(tmp_path: Path) -> None:
    result = consumer(tmp_path, "run", "--help")
    assert result.returncode == 0
    for text in ("--workers", "--grace", "--wait", "CONSUMER_POSTGRES_DSN", "CONSUMER_REDIS_URL", "SIGTERM"):
        assert text in result.stdout
    everything = consumer(tmp_path, "--help").stdout
    for name in ("run", "migrate", "status", "show", "dlq", "positions", "demo"):
        assert name in everything


# -- reports ------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def reported(place: Place, tmp_path: Path) -> dict[str, Any]:
    """A topic with all outcomes, and the environment to ask.

    Two applied messages, a duplicate, an unreadable and a rejected one.
    """
    topic = await place.topic(2)
    name = f"cli-{uuid.uuid4().hex[:8]}"
    app = App(name)

    @app.handler(topic, retry=Retry(attempts=1))
    async def settle(payment: dict[str, Any], tx: Tx) -> None:
        if payment.get("bad"):
            raise Reject("no such account")
        tx.defer("insert into effects values ($1, 1, 1)", payment["id"])

    (tmp_path / "reported.py").write_text(
        textwrap.dedent(f"""
        from consumer import App, Tx
        app = App({name!r})

        @app.handler({topic!r})
        async def settle(payment: dict, tx: Tx): ...
        """)
    )
    await place.send(
        topic,
        Sent({"id": "a"}, id="a", partition=0),
        Sent({"id": "b"}, id="b", partition=1),
        Sent({"id": "a"}, id="a", partition=0),
        Sent(b"\xff\x00", id="broken", partition=0),
        Sent({"id": "c", "bad": True}, id="c", partition=1, headers=[("trace", b"\xfe")]),
    )
    await consume_all(app, place.settings())
    await place.send(topic, Sent({"id": "d"}, id="d", partition=1))  # not consumed
    return {
        "cwd": tmp_path,
        "topic": topic,
        "app": name,
        "environment": {"CONSUMER_POSTGRES_DSN": place.worker_dsn, "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": place.kafka},
    }


async def test_status_has_positions_lag_and_outcomes(reported: dict[str, Any]) -> None:
    result = consumer(reported["cwd"], "status", "reported:app", "--json", **reported["environment"])
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    settle = answer["handlers"]["settle"]
    assert (settle["applied"], settle["dead_lettered"]) == (2, 2)
    assert sum(settle["duplicates"].values()) == 1
    [id] = {partition.pop("topic_id") for partition in answer["partitions"]}
    assert str(uuid.UUID(id)) == id
    good = {"stopped": None, "open_transaction": None, "paused": None, "waiting": 0}
    assert answer["partitions"] == [
        {"topic": reported["topic"], "partition": 0, "position": 3, "end": 3, "lag": 0, "unread": 0, **good},
        {"topic": reported["topic"], "partition": 1, "position": 2, "end": 3, "lag": 1, "unread": 1, **good},
    ]
    text = consumer(reported["cwd"], "status", "reported:app", **reported["environment"])
    assert text.returncode == 0
    assert "settle" in text.stdout and reported["topic"] in text.stdout


async def test_show_has_the_outcome_of_a_message(reported: dict[str, Any]) -> None:
    result = consumer(reported["cwd"], "show", "reported:app", "a", "--json", **reported["environment"])
    assert result.returncode == 0
    [handler] = json.loads(result.stdout)["handlers"]
    assert (handler["handler"], handler["state"], handler["partition"], handler["offset"]) == (
        "settle",
        "applied",
        0,
        0,
    )
    assert handler["at"]
    dead = consumer(reported["cwd"], "show", "reported:app", "c", **reported["environment"])
    assert dead.returncode == 0 and "dead-lettered" in dead.stdout and "rejected" in dead.stdout
    unknown = consumer(reported["cwd"], "show", "reported:app", "never seen", **reported["environment"])
    assert unknown.returncode == 1 and "unknown" in unknown.stdout


async def test_dead_letters_are_listed_and_shown_byte_for_byte(reported: dict[str, Any]) -> None:
    result = consumer(reported["cwd"], "dlq", "list", "reported:app", "--json", **reported["environment"])
    listed = {row["reason"]: row for row in json.loads(result.stdout)}
    assert set(listed) == {"unreadable", "rejected"}
    assert "value" not in listed["rejected"]
    number = str(listed["unreadable"]["letter"])
    shown = json.loads(
        consumer(reported["cwd"], "dlq", "show", "reported:app", number, "--json", **reported["environment"]).stdout
    )
    assert shown["value"] == {"base64": "/wA="}
    assert shown["headers"] == [["message-id", "broken"]]
    number = str(listed["rejected"]["letter"])
    shown = json.loads(
        consumer(reported["cwd"], "dlq", "show", "reported:app", number, "--json", **reported["environment"]).stdout
    )
    assert shown["error"] == "no such account" and ["trace", {"base64": "/g=="}] in shown["headers"]
    assert consumer(reported["cwd"], "dlq", "show", "reported:app", "999999", **reported["environment"]).returncode == 2
    table = consumer(
        reported["cwd"], "dlq", "list", "reported:app", "--reason", "rejected", **reported["environment"]
    ).stdout
    assert "no such account" in table and "unreadable" not in table


async def test_a_position_is_moved_by_command_and_nonsense_is_refused(reported: dict[str, Any], place: Place) -> None:
    move = ["positions", "reported:app", "--topic", reported["topic"], "--partition", "1"]
    for wrong in ("9", "x", "-1"):
        assert consumer(reported["cwd"], *move, "--move-to", wrong, **reported["environment"]).returncode == 2
    assert consumer(reported["cwd"], *move, **reported["environment"]).returncode == 2
    assert consumer(reported["cwd"], *move, "--move-to", "earliest", **reported["environment"]).returncode == 0
    rows = await query(place.dsn, "select next_offset from consumer.positions where partition = 1")
    assert rows == [(0,)]


# -- found by trying everything that a careless or hostile user would ------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise RuntimeError('canary')", "RuntimeError at lifespan.py"),
        ("raise SystemExit(0)", "SystemExit at lifespan.py"),
        ("await asyncio.sleep(60)", "longer than --wait"),
        ("return\n    yield", "the lifespan of 'bad' failed"),
    ],
)
def test_a_lifespan_that_fails_or_hangs_is_one_line(tmp_path: Path, body: str, says: str) -> None:
    (tmp_path / "lifespan.py").write_text(
        "import asyncio\nfrom contextlib import asynccontextmanager\nfrom consumer import App\n"
        f"@asynccontextmanager\nasync def life(app):\n    {body}\n    yield\n"
        "app = App('bad', lifespan=life)\n@app.handler('t')\nasync def h(p: dict): ...\n"
    )
    result = consumer(
        tmp_path, "run", "lifespan:app", "--wait", "1", CONSUMER_POSTGRES_DSN="postgresql://127.0.0.1:1/x"
    )
    is_one_line(result, says)
    assert "canary" not in result.stderr


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("CONSUMER_POSTGRES_DSN", "postgresql://demo:canary#x@127.0.0.1/x"),
        ("CONSUMER_POSTGRES_DSN", "postgresql://demo:canary/x@127.0.0.1/x"),
        ("CONSUMER_POSTGRES_DSN", "postgresql://demo:abc?canary@127.0.0.1/x"),
        ("CONSUMER_POSTGRES_DSN", "postgresql://demo:canary@127.0.0.1:99999/x"),
        ("CONSUMER_POSTGRES_DSN", "postgresql://demo:canary@127.0.0.1:1,127.0.0.1:2/x"),
        ("CONSUMER_REDIS_URL", "redis://:canary#x@127.0.0.1/0"),
        ("CONSUMER_REDIS_URL", "redis://:canary@127.0.0.1/0?decode_responses=true"),
        ("CONSUMER_KAFKA_BOOTSTRAP_SERVERS", "user:canary@127.0.0.1:9092"),
    ],
)
async def test_an_address_that_cannot_be_used_is_one_line_without_its_password(
    good: Path, place: Place, name: str, address: str
) -> None:
    environment = {
        "CONSUMER_POSTGRES_DSN": place.worker_dsn,
        "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": place.kafka,
        name: address,
    }
    result = consumer(good, "run", "good:app", "--wait", "0.5", "--log-level", "error", **environment)
    is_one_line(result)
    assert "canary" not in result.stderr + result.stdout


async def test_a_role_that_may_not_write_is_found_at_start(good: Path, place: Place) -> None:
    role = f"reader_{uuid.uuid4().hex[:8]}"
    await query(place.dsn, f"create role {role} login password 'reads'")
    await query(place.dsn, f"grant usage on schema consumer to {role}")
    dsn = place.dsn.replace(place.dsn.split("//")[1].split("@")[0], f"{role}:reads")
    environment = {"CONSUMER_POSTGRES_DSN": dsn, "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": place.kafka}
    is_one_line(consumer(good, "run", "good:app", **environment), "permission denied")
    await query(place.dsn, f"grant select on all tables in schema consumer to {role}")
    assert consumer(good, "status", "good:app", **environment).returncode == 0  # to look is enough
    is_one_line(consumer(good, "run", "good:app", **environment), "may not write to", "ledger")
    await query(place.dsn, f"grant select, insert on all tables in schema consumer to {role}")
    is_one_line(consumer(good, "run", "good:app", **environment), "may not write to", "positions")  # nor update


async def test_own_sql_that_ends_the_transaction_is_refused(good: Path, database: str) -> None:
    (good / "own.sql").write_text("create table keep (a int);\ncommit;\nselect 1/0;")
    is_one_line(consumer(good, "migrate", "--file", "own.sql", CONSUMER_POSTGRES_DSN=database), "own.sql", "COMMIT")
    (good / "own.sql").write_text("-- nothing\n")
    assert consumer(good, "migrate", "--file", "own.sql", CONSUMER_POSTGRES_DSN=database).returncode == 0
    (good / "own.sql").write_text("select 1;\nselect fro x;")
    is_one_line(consumer(good, "migrate", "--file", "own.sql", CONSUMER_POSTGRES_DSN=database), "own.sql:2")
    assert consumer(good, "migrate", "--sql", "--check", CONSUMER_POSTGRES_DSN=database).returncode == 2


async def test_the_current_directory_does_not_shadow_what_a_worker_imports(good: Path, place: Place) -> None:
    """A service's own logging.py, and a directory named like us."""
    (good / "redis.py").write_text("raise RuntimeError('not this one')")
    topic = await place.topic()
    (good / "good.py").write_text(GOOD.replace("'t'", repr(topic)).replace("'good'", repr(topic)))
    clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
    process = subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-c",
            f"import sys; sys.path.append({str(ROOT)!r}); import consumer.cli.main as c; c.main()",
            "run",
            "good:app",
        ],
        cwd=good,
        env={**clean, "CONSUMER_POSTGRES_DSN": place.worker_dsn, "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": place.kafka},
        stderr=subprocess.PIPE,
        stdin=None,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            assert "worker ended" not in line
            if "partitions opened" in line:
                break
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0


async def test_dead_letters_send_no_terminal_codes_or_emoji(place: Place, tmp_path: Path) -> None:
    topic = await place.topic(101)
    app = App(f"cli-{uuid.uuid4().hex[:8]}")

    @app.handler(topic, retry=Retry(attempts=1))
    async def settle(payment: dict[str, Any], tx: Tx) -> None: ...

    await place.send(topic, Sent(b"\x1b]0;owned\x07\x1b[2J:smile:\nreason      applied", id="x", partition=100))
    await consume_all(app, place.settings())
    environment = {"CONSUMER_POSTGRES_DSN": place.worker_dsn}
    shown = consumer(tmp_path, "dlq", "show", app.name, "1", **environment).stdout
    assert "\x1b" not in shown and ":smile:" in shown
    assert len([line for line in shown.splitlines() if line.startswith("reason")]) == 1
    assert f"{topic}:100:0" in consumer(tmp_path, "dlq", "list", app.name, **environment).stdout
    assert f"{topic}:100:0" in consumer(tmp_path, "show", app.name, "x", **environment).stdout


def test_help_shows_every_flag_and_variable_in_full(tmp_path: Path) -> None:
    text = consumer(tmp_path, "run", "--help", COLUMNS="80", PYTHONIOENCODING="ascii").stdout
    assert "--kafka-bootstrap-servers" in text
    assert "CONSUMER_KAFKA_BOOTSTRAP_SERVERS" in "".join(text.split())


def test_closed_standard_streams_are_survived(tmp_path: Path) -> None:
    command = f"{sys.executable} -m consumer migrate --sql <&- 2>&- | head -c 20"
    result = subprocess.run(
        ["sh", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.stdout.startswith("begin;")


def test_an_empty_variable_is_as_good_as_none(tmp_path: Path) -> None:
    result = consumer(tmp_path, "migrate", "--check", "--wait", "0", CONSUMER_REDIS_URL="", CONSUMER_LANES_MAX="")
    is_one_line(result, "CONSUMER_POSTGRES_DSN")


async def test_a_session_timeout_that_kafka_refuses_is_no_outage(good: Path, place: Place) -> None:
    environment = {"CONSUMER_POSTGRES_DSN": place.worker_dsn, "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": place.kafka}
    result = consumer(good, "run", "good:app", "--kafka-session-timeout-seconds", "0.5", **environment)
    assert result.returncode == 2
    assert "CONSUMER_KAFKA_SESSION_TIMEOUT_SECONDS=0.5" in result.stderr
    assert "Traceback" not in result.stderr
