"""The application's own logging, with our handlers and with a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import documents
import pytest
from harness import ROOT, Place, Sent, consumer, execute, is_one_line, running, until

SCRIPT = """
import logging, sys
from consumer import logs
from consumer.app_loader import load_app
logs.configure({level!r}, {style!r}, config={config!r})
load_app("shop:app")
logs.event(logging.INFO, "ours", count=1)
try:
    raise ValueError("payload 4711")
except ValueError:
    logging.getLogger("shop.orders").exception("it failed", extra={{"order": 17, "level": "x"}})
    logs.log.exception("ours failed")
"""
APP = """
import logging
{before}
from consumer import App, Tx
app = App("shop")
log = logging.getLogger("shop")

@app.handler("orders")
async def settle(order: bytes, tx: Tx) -> None: ...

log.info("order %s\\nof two lines " + "x" * 600, 4711, extra={{"tenant": "acme"}})
log.debug("too small")
"""


def run(directory: Path, style: str, *, before: str = "", config: str | None = None, level: str = "info") -> str:
    (directory / "shop.py").write_text(APP.format(before=before))
    script = SCRIPT.format(level=level, style=style, config=config)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stderr


def test_application_logs_as_json_have_level_extra_and_traceback(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in run(tmp_path, "json").splitlines()]
    info, ours, failed, ours_failed = lines
    assert (info["logger"], info["level"], info["tenant"]) == ("shop", "info", "acme")
    assert info["event"].startswith("order 4711\nof two lines") and len(info["event"]) > 600
    assert (ours["event"], ours["count"]) == ("ours", 1)
    assert (failed["order"], failed["level"], failed["extra_level"]) == (17, "error", "x")
    assert "Traceback" in failed["traceback"] and "payload 4711" in failed["traceback"]
    assert "payload" not in json.dumps(ours_failed) and ours_failed["error"].startswith("ValueError at ")


def test_application_logs_as_text_have_level_extra_and_traceback(tmp_path: Path) -> None:
    text = run(tmp_path, "text")
    assert "info    [" in text and "shop: order 4711\nof two lines" in text and "tenant=acme" in text
    assert "Traceback (most recent call last)" in text and "ValueError: payload 4711" in text
    assert text.count("payload 4711") == 1  # ours names the place alone
    assert "too small" not in text
    assert "too small" in run(tmp_path, "text", level="debug")


CONFIGURED = (
    "logging.config.dictConfig({'version': 1, 'handlers': {'h': {'class': 'logging.StreamHandler', 'formatter': 'f'}},"
)
CONFIGURED += "'formatters': {'f': {'format': 'MINE %(message)s'}}, 'root': {'handlers': ['h'], 'level': 'INFO'}})"


@pytest.mark.parametrize(
    "before",
    [
        "import logging.config; " + CONFIGURED,
        "logging.basicConfig(force=True, level='INFO', format='MINE %(message)s')",
    ],
    ids=["dictConfig", "basicConfig"],
)
def test_application_that_configures_logging_itself_keeps_our_events(tmp_path: Path, before: str) -> None:
    text = run(tmp_path, "json", before=before)
    assert "MINE order 4711" in text and "MINE it failed" in text
    assert '"event": "ours"' in text and '"count": 1' in text


DICT = {
    "formatters": {
        "mine": {"format": "%(levelname)s %(name)s %(message)s"},
        "ours": {"()": "consumer.logs.JsonFormatter"},
    },
    "handlers": {
        "mine": {"class": "logging.FileHandler", "filename": "mine.log", "formatter": "mine"},
        "ours": {"class": "logging.StreamHandler", "formatter": "ours"},
    },
    "loggers": {"consumer": {"handlers": ["ours"], "propagate": False}},
    "root": {"handlers": ["mine"], "level": "INFO"},
}
TOML = """
[formatters.mine]
format = "%(levelname)s %(name)s %(message)s"
[formatters.ours]
"()" = "consumer.logs.JsonFormatter"
[handlers.mine]
class = "logging.FileHandler"
filename = "mine.log"
formatter = "mine"
[handlers.ours]
class = "logging.StreamHandler"
formatter = "ours"
[loggers.consumer]
handlers = ["ours"]
propagate = false
[root]
handlers = ["mine"]
level = "INFO"
"""
INI = """
[loggers]
keys=root,consumer
[handlers]
keys=mine,ours
[formatters]
keys=mine,ours
[logger_root]
level=INFO
handlers=mine
[logger_consumer]
level=INFO
handlers=ours
qualname=consumer
propagate=0
[handler_mine]
class=FileHandler
args=("mine.log",)
formatter=mine
[handler_ours]
class=StreamHandler
args=()
formatter=ours
[formatter_mine]
format=%(levelname)s %(name)s %(message)s
[formatter_ours]
class=consumer.logs.JsonFormatter
"""
FILES = {"log.json": json.dumps(DICT), "log.toml": TOML, "log.ini": INI}


@pytest.mark.parametrize("name", FILES)
def test_log_config_file_decides_where_everything_goes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name])
    errors = run(tmp_path, "json", config=name)
    mine = (tmp_path / "mine.log").read_text()
    assert "INFO shop order 4711" in mine and "ERROR shop.orders it failed" in mine and "ours" not in mine
    assert [json.loads(line)["event"] for line in errors.splitlines()] == ["ours", "ours failed"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("nowhere.json", None, "No such file"),
        ("nowhere.ini", None, "No such file"),
        ("log.json", "{", "Expecting property name"),
        ("log.json", "[]", "not an object"),
        ("log.json", '{"handlers": {"h": {"class": "nowhere.Handler"}}}', "Unable to configure handler 'h'"),
        ("log.json", '{"version": 2}', "version"),
        ("log.toml", "a = ", "Invalid value"),
        ("log.ini", "nothing", "log.ini"),
        ("log.ini", "[loggers]\nkeys=root", "log.ini"),
        ("log.yaml", "a: 1", "unknown format"),
        (".", None, "unknown format"),
    ],
)
def test_log_config_that_cannot_be_used_is_one_line(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    (tmp_path / "shop.py").write_text(APP.format(before=""))
    result = consumer(tmp_path, "replay", "shop:app", "orders", "--log-config", name)
    is_one_line(result, "CONSUMER_LOG_CONFIG", says)


SHARED = """
import logging
from consumer import logs
logs.configure("info", "json")
logs.log.propagate = True  # as a file may say: root and `consumer` have one handler
logs.never_wait()
for number in range(500):
    logs.event(logging.INFO, "ours", number=number)
assert logs.end(30)
"""


def test_lines_are_written_to_the_end_by_a_handler_of_two_loggers() -> None:
    done = subprocess.run([sys.executable, "-c", SHARED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [json.loads(line)["number"] for line in done.stderr.splitlines()] == [n for n in range(500) for _ in (1, 2)]


PAGE = ROOT / "docs" / "how-to" / "logging.md"


async def test_one_format_of_the_applications_own_for_every_process(place: Place, tmp_path: Path) -> None:
    """The page's files, with structlog."""
    topic = await place.topic()
    for block in documents.blocks(PAGE):
        if block.file:
            (tmp_path / block.file).write_text(block.code.replace('"payments"', f'"{topic}"'))
    await execute(place.dsn, "create table payments (id int, amount int); grant all on payments to public")
    await place.send(topic, Sent({"id": 7, "amount": 5}, id="7"))
    [line] = [line for block in documents.blocks(PAGE) if block.language == "sh" for line in documents.commands(block)]
    # A worker finds the formatter in its current directory alone.
    async with running(line.split()[1:], place.settings(), tmp_path, PYTHONPATH=str(ROOT)) as command:

        async def is_settled() -> bool:
            return "payment settled" in command.errors and "partitions opened" in command.errors

        await until("a line of the handler", is_settled, 90)
        command.process.terminate()
        assert await command.wait() == 0
    lines = [json.loads(line) for line in command.errors.splitlines()]  # there is no other line
    assert {"event", "logger", "level", "timestamp"} <= set.intersection(*(set(line) for line in lines))
    by_event = {line["event"]: line for line in lines}
    assert by_event["worker process started"]["worker"] == 0  # of the supervisor
    assert by_event["partitions opened"]["count"] == 1  # of a worker
    assert by_event["payment settled"]["payment"] == 7 and by_event["payment settled"]["logger"] == "billing"
    assert not any("fields" in line for line in lines)
