"""A changed `message_id=` applies no earlier message again."""

from __future__ import annotations

import functools
import json
from typing import Any
from uuid import uuid4

import pytest
from app_commands import command, status
from handler_versions import app_with
from harness import Place, Result, consume_all, is_one_line, query, running, until, value
from payments_app import lone_payment

from consumer import App, Tx
from consumer.core.identity import parse_rule, rule_text

OLD = "worker_app:alone"  # settle with the default ids
NEW = "worker_app:by_offset"  # settle with message_id="offset"


def offset_version(app: App) -> App:
    """As worker_app:by_offset, for a worker of this process."""
    other = App(app.name)

    @other.handler(app.topics[0], name="settle", message_id="offset")
    async def settle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into effects values ($1, 1, 1)", f"again {body['id']}")

    return other


async def settled(place: Place, count: int = 10) -> tuple[App, str]:
    """An App that has applied messages under the ids of their headers."""
    topic = await place.topic()
    app = app_with(f"rules-{uuid4().hex[:8]}", topic, "settle")
    await place.send(topic, *[lone_payment(f"p{n}") for n in range(count)])
    await consume_all(app, place.settings())
    assert len(await place.effects()) == count
    return app, topic


async def accept(place: Place, app: App) -> Result:
    return await command(place, app, "positions", NEW, "--handler", "settle", "--accept-id-rule")


async def notices(place: Place, app: App, path: str) -> tuple[int, list[str]]:
    code, answer = await status(place, app, path)
    return code, [notice["kind"] for notice in answer["notices"]]


async def test_changed_rule_is_reported_and_replay_applies_nothing_again(place: Place) -> None:
    app, topic = await settled(place)
    refused = await command(place, app, "replay", NEW, topic, "--apply")
    is_one_line(refused, "by default, and in this code by offset", "--accept-id-rule", "--handler settle")
    assert len(await place.effects()) == 10
    assert await notices(place, app, NEW) == (1, ["id_rule_changed"])
    checked = await command(place, app, "replay", NEW, topic, "--json")
    answer = json.loads(checked.stdout)
    assert (checked.returncode, answer["verdict"]) == (2, "unknown"), checked.stdout
    assert "id_rule_changed" in checked.stdout
    # The code with the recorded rule is as good as before.
    assert await notices(place, app, OLD) == (0, [])
    assert (await command(place, app, "replay", OLD, topic, "--apply")).returncode == 0
    assert len(await place.effects()) == 10
    named = await command(place, app, "replay", NEW, topic, "--apply", "--handler", "settle")  # who names it means it
    assert "10" in named.stdout and len(await place.effects()) == 20


async def test_positions_do_not_go_back_to_messages_with_other_ids(place: Place) -> None:
    app, topic = await settled(place)
    back = ["positions", NEW, "--topic", topic, "--move-to", "earliest"]
    is_one_line(await command(place, app, *back), "in this code by offset", "--apply-again", "nothing was changed")
    is_one_line(await command(place, app, *back, "--dry-run"), "in this code by offset")
    assert (await command(place, app, *back[:-1], "latest")).returncode == 0
    assert await value(place.dsn, "select next_offset from consumer.positions where app = $1", app.name) == 10
    moved = await command(place, app, *back, "--apply-again")
    assert moved.returncode == 0, moved.stderr
    is_one_line(await command(place, app, "positions", NEW, "--apply-again"), "--apply-again goes with --move-to")


async def test_accepted_rule_protects_what_was_applied_before(place: Place) -> None:
    app, topic = await settled(place)
    done = await accept(place, app)
    assert done.returncode == 0, done.stderr
    assert "by offset now" in done.stdout
    again = await accept(place, app)
    assert again.returncode == 1 and "nothing was changed" in again.stderr
    assert await notices(place, app, NEW) == (0, [])
    await place.send(topic, lone_payment("q"))
    await consume_all(offset_version(app), place.settings())
    assert len(await place.effects()) == 11
    checked = await command(place, app, "replay", NEW, topic)
    assert checked.returncode == 2 and "message_id= of their handler changed" in checked.stdout, checked.stdout
    assert (await command(place, app, "replay", NEW, topic, "--from", "10")).returncode == 0
    for options in ([], ["--handler", "settle"]):
        await command(place, app, "replay", NEW, topic, "--apply", *options)
        assert len(await place.effects()) == 11
    back = ["positions", NEW, "--topic", topic, "--move-to"]
    is_one_line(await command(place, app, *back, "9"), "below offset 10 would be applied again", "--apply-again")
    assert (await command(place, app, *back, "10")).returncode == 0
    await consume_all(offset_version(app), place.settings())
    assert len(await place.effects()) == 11
    # Back to the old rule is a change as well.
    assert await notices(place, app, OLD) == (1, ["id_rule_changed"])
    is_one_line(await command(place, app, "replay", OLD, topic, "--apply"), "by offset, and in this code by default")


async def test_rows_beyond_the_position_are_protected_when_a_rule_is_accepted(place: Place) -> None:
    """A waiting message holds the position back while later ones are applied."""
    app, topic = await settled(place)
    await query(place.dsn, "update consumer.positions set next_offset = 3 where app = $1", app.name)
    assert (await accept(place, app)).returncode == 0
    assert await query(place.dsn, "select topic, partition, below from consumer.id_rule_changes") == [(topic, 0, 10)]


async def test_run_logs_a_changed_rule_once(place: Place, tmp_path: Any) -> None:
    app, topic = await settled(place)
    environment = {"TEST_APP": app.name, "TEST_TOPIC": topic}
    async with running(["run", NEW], place.settings(log_level="warning"), tmp_path, **environment) as worker:

        async def warnings() -> list[Any]:
            return [event for event in worker.events() if "its messages were identified by default" in str(event)]

        assert len(await until("the warning", warnings)) == 1
    assert await value(place.dsn, "select id_rule from consumer.handlers where app = $1", app.name) == "default"


async def test_options_of_accepted_rules_that_do_not_fit_are_refused(place: Place) -> None:
    app, topic = await settled(place, 1)
    accepting = ["positions", NEW, "--accept-id-rule"]
    is_one_line(await command(place, app, *accepting), "--accept-id-rule goes with --handler alone")
    for more in (["--topic", topic], ["--begin-here"], ["--partition", "0"]):
        is_one_line(await command(place, app, *accepting, "--handler", "settle", *more), "goes with --handler alone")
    is_one_line(await command(place, app, *accepting, "--handler", "setle"), "no handler 'setle'")


def identify(value: object) -> object:
    return value


class Identify:
    def __call__(self, value: object) -> object:
        return value


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (None, "default"),
        ("offset", "offset"),
        ("header:X", "header:X"),
        ("field:a.b", "field:a.b"),
        (identify, "function test_id_rules:identify"),
        (functools.partial(identify), "function test_id_rules:identify"),
        (Identify(), "function test_id_rules:Identify"),
    ],
)
def test_rule_is_remembered_by_a_text_without_values(option: Any, text: str) -> None:
    assert rule_text(parse_rule(option)) == text
