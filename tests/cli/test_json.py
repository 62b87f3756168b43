"""Every command with `--json` prints what docs/reference/json.md documents, exactly."""

from __future__ import annotations

import getpass
import json
import uuid
from pathlib import Path
from typing import Any

import pytest
import typer
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from harness import Place, Sent, consume_all, consumer, query, value
from json_page import shapes

from consumer.app_loader import load_app
from consumer.cli.main import whole
from consumer.core.audit import ACTIONS
from consumer.demo.result import DemoResult
from consumer.local_servers import free_port

APP = """
from consumer import App, Reject, Retry, Tx
from consumer.schemes import StateMachine

ORDERS = StateMachine("orders", "status", {{"new": {{"paid"}}, "paid": ()}})
app = App({name!r}, publishes=[{out!r}])

@app.handler({topic!r}, retry=Retry(attempts=1){options})
async def settle(payment: dict, tx: Tx) -> None:
    if payment.get("bad") == "rejected":
        raise Reject("no such account")
    if payment.get("bad") == "failed":
        raise ValueError("no balance")
    tx.defer("insert into effects values ($1, 1, 1)", payment["id"])
    tx.publish({out!r}, payment)
"""
LATE = """
@app.handler({topic!r})
async def late(payment: dict, tx: Tx) -> None: ...
"""
SHARDED = """
from consumer import App
app = App("sharded", shards={shards!r}, route=lambda key: "a")
@app.handler("t")
async def settle(payment: dict) -> None: ...
"""


class Contract:
    """Runs commands and compares their answers with the page."""

    def __init__(self, place: Place, directory: Path, topic: str, out: str) -> None:
        self.place, self.directory, self.topic, self.out = place, directory, topic, out
        self.name = f"json-{uuid.uuid4().hex[:8]}"
        self.module = f"json_{uuid.uuid4().hex[:8]}"
        self.shapes = shapes()
        self.faults: list[str] = []
        self.write("")
        (directory / f"{self.module}_late.py").write_text(self.source("") + LATE.format(topic=topic))
        (directory / f"{self.module}_rule.py").write_text(self.source(", message_id='field:id'"))

    def source(self, options: str) -> str:
        return APP.format(name=self.name, topic=self.topic, out=self.out, options=options)

    def write(self, options: str) -> None:
        (self.directory / f"{self.module}.py").write_text(self.source(options))

    def run(
        self, shape: str, command: str, *arguments: str, app: str = "", fails: bool = False, **environment: str
    ) -> Any:
        """Run `command APP arguments --json`; compare the answer with the documented shape."""
        path = f"{self.module}{app}:app"
        result = consumer(
            self.directory,
            *command.split(),
            *([] if command == "purge" else [path]),
            *arguments,
            "--json",
            **{
                "CONSUMER_POSTGRES_DSN": self.place.worker_dsn,
                "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": self.place.kafka,
                "XDG_STATE_HOME": str(self.directory),
                **environment,
            },
        )
        assert result.returncode in ((2,) if fails else (0, 1)), (command, arguments, result.stdout, result.stderr)
        answer = json.loads(result.stdout)
        self.compare(shape, answer, f"{command} {' '.join(arguments)}")
        return answer

    def compare(self, shape: str, answer: Any, what: str) -> None:
        self.faults += [f"{what}: {fault}" for fault in self.shapes[shape].faults(answer)]


@pytest.fixture
async def contract(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Contract:
    """Messages with every outcome, and a handler that was added later."""
    contract = Contract(place, tmp_path, await place.topic(2), await place.topic())
    monkeypatch.syspath_prepend(str(tmp_path))
    await place.send(
        contract.topic,
        Sent({"id": "a"}, id="a", key="k", partition=0),
        Sent({"id": "b"}, id="b", partition=1),
        Sent({"id": "a"}, id="a", key="k", partition=0),
        Sent(b"\xff\x00", id="broken", partition=0),
        Sent({"id": "c", "bad": "rejected"}, id="c", partition=1, headers=[("trace", b"\xfe")]),
        Sent({"id": "d", "bad": "failed"}, id="d", key="k", partition=0),
        Sent({"id": "e"}, id="e", key="k", partition=0),  # waits behind the one before
    )
    await consume_all(load_app(f"{contract.module}:app"), place.settings())
    return contract


@pytest.mark.timeout(600)  # some fifty commands, each a process
async def test_every_answer_has_the_documented_keys_and_no_other(contract: Contract) -> None:
    await _status_and_positions(contract)
    await _dead_letters(contract)
    await _replays(contract)
    await _other_commands(contract)
    await _outbox(contract)
    _demo_and_shards(contract)
    await _stops(contract)
    _audit(contract)

    of_commands = [(name, shape) for name, shape in contract.shapes.items() if name != "/status"]  # a worker's page
    missing = {f"{command}: {path}" for command, shape in of_commands for path in shape.missing()}
    assert (contract.faults, sorted(missing)) == ([], [])


async def _status_and_positions(contract: Contract) -> None:
    place, topic = contract.place, contract.topic
    number = await value(place.dsn, "select handler from consumer.handlers where app = $1", contract.name)
    await query(
        place.dsn,
        """insert into consumer.waiting (handler, topic, partition, error, count, since, systemic, read_up_to, worker)
           values ($1, $2, 0, 'ValueError', 2, now(), false, 3, gen_random_uuid())""",
        number,
        topic,
    )
    producer = AIOKafkaProducer(bootstrap_servers=place.kafka, transactional_id=f"t-{uuid.uuid4().hex}")
    await producer.start()
    try:
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"{}", partition=1)
        contract.run("status", "status", "--exact")
        await producer.abort_transaction()
    finally:
        await producer.stop()
    await query(place.dsn, "delete from consumer.waiting")
    await consume_all(load_app(f"{contract.module}_late:app"), place.settings())
    contract.run("status", "status", app="_late")
    contract.run("positions", "positions", app="_late")
    contract.run("positions --begin-here", "positions", "--handler", "late", "--begin-here", app="_late")
    to = ["--topic", topic, "--move-to"]
    contract.run("positions --move-to", "positions", *to, "0", "--dry-run")
    contract.run("positions --move-to --partition", "positions", *to, "0", "--partition", "1", "--dry-run")


async def _dead_letters(contract: Contract) -> None:
    directory, place = contract.directory, contract.place
    listed = contract.run("dlq list", "dlq list")
    numbers = {row["reason"]: str(row["letter"]) for row in listed}
    contract.run("dlq list --by-group", "dlq list", "--by-group")
    contract.run("dlq retry", "dlq retry", "--all", "--dry-run")
    contract.run("dlq retry", "dlq retry", numbers["failed"])
    (directory / "value.json").write_text('{"id": "mended"}')
    edit = ["--value", "value.json", "--new-id", "auto"]
    contract.run("dlq retry", "dlq retry", numbers["failed"], *edit)
    await query(place.dsn, "update consumer.dead_letters set value = 'x' where reason = 'rejected'")
    contract.run("dlq discard", "dlq discard", numbers["rejected"], "--why", "a test")
    contract.run("dlq erase", "dlq erase", numbers["rejected"], "--why", "a test", "--yes")
    contract.run("dlq list --actions", "dlq list", "--actions")
    for number in numbers.values():
        contract.run("dlq show", "dlq show", number)


async def _replays(contract: Contract) -> None:
    place, topic = contract.place, contract.topic
    redis: dict[str, Any] = {"CONSUMER_REDIS_URL": place.redis_url}
    await query(
        place.dsn, "delete from consumer.ledger where topic = $1 and partition = 1 and applied_at is not null", 1
    )
    contract.run("status", "status", "--exact")
    contract.run("replay", "replay", topic, "--call-handlers", **redis)
    contract.run("replay", "replay", topic, "--from", "latest", fails=True)
    contract.run("replay", "replay", topic, "--apply", "--partition", "1")
    contract.run("republish", "republish", topic, "--to", await place.topic())
    await query(place.dsn, "update effects set amount = 5 where id = 'a'")
    contract.run("rebuild", "rebuild", topic)
    await place.send(contract.out, Sent({"id": "of a stranger"}))
    contract.run("replay", "replay", topic, "--outgoing", fails=True)  # an edited dead letter explains it


async def _other_commands(contract: Contract) -> None:
    contract.run("pause", "pause", "--topic", contract.topic, "--why", "a test")
    contract.run("pause", "pause", "--topic", contract.topic, "--why", "again")
    contract.run("status", "status")
    contract.run("resume", "resume", "--why", "a test")
    call = "insert into consumer.effects (handler, id, key, payload) select handler, id, 'key', 1 from consumer.ledger returning 1"
    await query(contract.place.dsn, call)
    contract.run("show", "show", "a")
    contract.run("show", "show", "c")
    contract.run("show", "show", "never seen")
    contract.run("produce", "produce", contract.topic, '{"id": "new"}', "--key", "k", "--dry-run")
    contract.run("tail", "tail", contract.topic, "--values", "-n", "1", "--until", "latest")
    contract.run("probe", "probe")
    contract.run("diagram", "diagram")
    rules = ["--handler", "settle", "--accept-id-rule"]
    contract.run("positions --accept-id-rule", "positions", *rules, app="_rule")
    contract.run("purge", "purge", "--older-than", "0", "--dry-run")
    contract.run("purge", "purge", "--older-than", "0", "--force", CONSUMER_LEDGER_CLOCK_SKEW_HOURS="0")


async def _outbox(contract: Contract) -> None:
    """A stream that stopped, with one row."""
    number = await value(
        contract.place.dsn,
        """with made as (
               insert into consumer.outbox_streams (app, source_topic, source_partition, topic, next_seq)
               values ($1, 'in', 0, 'out', 1) returning stream
           ), known as (
               insert into consumer.outbox_published (stream, stopped, stopped_at) select stream, 'too large', now() from made
           )
           insert into consumer.outbox (generation, stream, seq, id, topic, key, value, handler, source_offset, type)
           select 1, stream, 0, gen_random_uuid(), 'out', 'k', 'v', h.handler, 7, 'made'
           from made, consumer.handlers h where h.app = $1 limit 1 returning stream""",
        contract.name,
    )
    contract.run("status", "status")
    contract.run("outbox list", "outbox list")
    contract.run("outbox resume", "outbox resume", str(number), "--why", "a test")
    contract.run("outbox discard", "outbox discard", str(number), "--why", "not stopped")
    contract.run("outbox show", "outbox show", str(number))


def _demo_and_shards(contract: Contract) -> None:
    contract.compare("demo", json.loads(DemoResult().as_json()), "demo")
    contract.compare("new", json.loads(consumer(contract.directory, "new", "orders_v2", "--json").stdout), "new")
    good = contract.place.worker_dsn
    shards = {"a": good, "b": f"postgresql://u@127.0.0.1:{free_port()}/x"}
    (contract.directory / f"{contract.module}_shards.py").write_text(SHARDED.format(shards=shards))
    contract.run("config", "config", app="_shards")
    contract.run("with shards", "probe", "--wait", "0.5", app="_shards", fails=True)


async def _stops(contract: Contract) -> None:
    """Records that were removed, and a topic that was created again."""
    place, topic = contract.place, contract.topic
    to = ["--topic", topic, "--move-to"]
    contract.run("positions --move-to", "positions", *to, "earliest", "--apply-again")
    admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
    await admin.start()
    try:
        await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(2)})
    finally:
        await admin.close()
    contract.run("status", "status")
    await query(place.dsn, "update consumer.positions set topic_id = gen_random_uuid()")
    contract.run("positions --adopt", "positions", "--topic", topic, "--adopt")


def _audit(contract: Contract) -> None:
    """Actions of earlier commands are on record; dry runs are not."""
    rows = contract.run("audit", "audit", "--limit", "1000")
    elsewhere = {"outbox discard", "rename handler", "dlq view"}  # their own tests look
    assert {row["action"] for row in rows} == set(ACTIONS) - elsewhere
    assert [row["result"] for row in rows if row["action"] == "purge"] == ["done", "begun"]
    assert [row["result"] for row in rows if row["action"] == "replay apply"] == ["done", "begun"]
    moved = [row["numbers"]["position"] for row in rows if row["action"] == "positions move"]
    assert moved == [0, 0]
    assert {row["operator"] for row in rows} == {getpass.getuser()}
    assert contract.run("audit", "audit", "--action", "purge", "--since", "1h") == [
        row for row in rows if row["action"] == "purge"
    ]


@pytest.mark.unit
def test_every_command_with_json_has_a_heading() -> None:
    with_json = {name for name, params in _commands(typer.main.get_command(whole())) if "as_json" in params}
    documented = {" ".join(word for word in heading.split() if not word.startswith("-")) for heading in shapes()}
    assert documented - {"with shards", "/status"} == with_json


def _commands(group: Any, path: str = "") -> list[tuple[str, set[str]]]:
    if not hasattr(group, "commands"):
        return [(path.strip(), {param.name for param in group.params})]
    return [pair for name, command in group.commands.items() for pair in _commands(command, f"{path} {name}")]


TABLE = """
## `a`, `b`

| key | type | meaning |
| --- | --- | --- |
| `rows` | integer | how many |
| `stop` | object or null | why |
| `stop.why` | string | text |
| `names.*.count` | integer | each |
| `list[].key` | bytes | each |
"""


@pytest.mark.unit
@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ({"rows": 1, "stop": None, "names": {"x": {"count": 1}}, "list": [{"key": {"base64": ""}}]}, None),
        ({"rows": 1, "more": 1}, "more: not documented"),
        ({"rows": "1"}, "rows: str is not integer"),
        ({"rows": True}, "rows: bool is not integer"),
        ({"stop": {"when": 1}}, "stop.when: not documented"),
        ({"names": {"x": {"other": 1}}}, "names.*.other: not documented"),
        ({"list": {"key": "x"}}, "list.key: not documented"),
    ],
)
def test_an_answer_that_differs_from_its_table_is_a_fault(answer: dict[str, Any], fault: str | None) -> None:
    assert shapes(TABLE)["b"].faults(answer) == ([] if fault is None else [fault])


@pytest.mark.unit
def test_a_documented_key_that_is_never_printed_is_missing() -> None:
    shape = shapes(TABLE)["a"]
    shape.faults({"rows": 1, "stop": None})
    assert shape.missing() == ["list[].key", "names.*.count", "stop.why"]
