"""What `consumer produce` sends is what a worker identifies and decodes."""

from __future__ import annotations

import gzip
import json
from typing import Any
from uuid import UUID

import msgspec
import pytest
from harness import settings_for

from consumer import App, Misconfigured
from consumer.admin.produce import Line, Producing, Request, readers
from consumer.admin.produce_plan import Outgoing, check, parse_headers
from consumer.core.identity import event_id, message_id
from consumer.core.suggestions import UnknownName
from consumer.decoders import CloudEvent, CloudEvents, Record

pytestmark = pytest.mark.unit


class Payment(msgspec.Struct):
    id: int
    amount: int = 0


def app_of(*handlers: tuple[Any, dict[str, Any]], **options: Any) -> App:
    """An App with a handler for each type and its options."""
    app = App("shop", **options)
    for number, (declared, handler_options) in enumerate(handlers):

        async def store(payload: Any) -> None: ...

        store.__annotations__["payload"] = declared
        app.handler("t", name=f"h{number}", **handler_options)(store)
    return app


async def prepared(app: App, *texts: bytes | None, **more: Any) -> list[Outgoing]:
    """The messages of these values, as they would be sent."""
    lines = [Line(None if len(texts) == 1 else number, text) for number, text in enumerate(texts, 1)]
    request = Request(topic="t", lines=lines, **more)
    settings = settings_for("postgresql://x/y", "127.0.0.1:1", None)
    return await Producing(app, readers(app, "shop:app", "t"), request, settings).prepare(lambda *_: None)


async def refusal(app: App, *texts: bytes | None, **more: Any) -> str:
    with pytest.raises(Misconfigured) as refused:
        await prepared(app, *texts, **more)
    return str(refused.value)


async def test_a_message_gets_the_header_that_each_handler_looks_for() -> None:
    app = app_of((Payment, {}), (Payment, {"message_id": "header:order-id"}), (Payment, {"message_id": "field:id"}))
    [message] = await prepared(app, b'{"id": 1}', message_id=b"o-7")
    assert message.record.headers == (("message-id", b"o-7"), ("order-id", b"o-7")) and message.id == "o-7"
    [message] = await prepared(app, b'{"id": 1}', headers=(("order-id", b"z"), ("x", b"y")))
    assert message.record.headers == (("order-id", b"z"), ("x", b"y"), ("message-id", b"z"))
    [one], [other] = await prepared(app, b'{"id": 1}'), await prepared(app, b'{"id": 1}')
    assert dict(one.record.headers)["message-id"] == (one.id or "").encode() and one.id != other.id
    assert "'order-id' has another message id" in await refusal(
        app, b'{"id": 1}', headers=(("order-id", b"z"),), message_id=b"y"
    )


async def test_an_id_in_the_value_is_not_given_beside_it() -> None:
    app = app_of((Payment, {"message_id": "field:id"}))
    [message] = await prepared(app, b'{"id": 1}')
    assert message.record.headers == () and message.id == str(UUID(bytes=message_id(b"1")))
    assert (await prepared(app, b'{"id": 1}', message_id=b"1"))[0].id == "1"
    assert "takes the id from field:id" in await refusal(app, b'{"id": 1}', message_id=b"2")
    by_offset = app_of((Payment, {"message_id": "offset"}))
    assert (await prepared(by_offset, b'{"id": 1}'))[0].id is None
    assert "by their offset" in await refusal(by_offset, b'{"id": 1}', message_id=b"2")


@pytest.mark.parametrize("mode", ["structured", "binary"])
async def test_a_cloudevent_has_its_id_in_itself(mode: str) -> None:
    app = app_of((CloudEvent[Payment], {"decode": CloudEvents(mode=mode)}))
    event = b'{"source": "/s", "type": "paid", "data": {"id": 1}}'
    [message] = await prepared(app, event, message_id=b"e-1")
    names = [name for name, _ in message.record.headers]
    assert "message-id" not in names and ("ce_id" in names) == (mode == "binary")
    [delivery] = check(list(app.handlers.values()), message.record)
    assert delivery.id == event_id(b"/s", b"e-1")
    own = b'{"id": "e-2", "source": "/s", "type": "paid", "data": {"id": 1}}'
    assert "an id of its own" in await refusal(app, own, message_id=b"e-1")
    assert "without source" in await refusal(app, b'{"type": "paid", "data": {"id": 1}}')
    assert "Expected `int`" in await refusal(app, own.replace(b'{"id": 1}', b'{"id": "x"}'))


async def test_a_value_is_encoded_for_a_decoder_that_only_reads() -> None:
    def unpacked(record: Record) -> msgspec.Raw:
        return msgspec.Raw(gzip.decompress(record.value or b""))

    def packed(topic: str, value: Any) -> bytes:
        return gzip.compress(msgspec.json.encode(value))

    app = app_of((Payment, {"decode": unpacked}), encode=packed)
    [message] = await prepared(app, b'{"id": 1}')
    assert json.loads(gzip.decompress(message.record.value or b"")) == {"id": 1, "amount": 0}
    assert "missing required field `id`" in await refusal(app, b"{}")
    assert "truncated" in await refusal(app, b"{")
    assert "BadGzipFile" in await refusal(app, b'{"id": 1}', is_raw=True)
    raw = packed("t", {"id": 2})
    assert (await prepared(app, raw, is_raw=True))[0].record.value == raw


async def test_one_bad_line_refuses_the_file_and_names_line_and_problem() -> None:
    app = app_of((Payment, {}))
    lines = [b'{"id": 1}', b'{"id": "x"}', b"{}", b'{"id": 4}']
    assert await refusal(app, *lines, where="--file a") == (
        "--file a, line 2: handler 'h0' cannot read it (unreadable): Expected `int`, got `str` - at `$.id` (and so 1 more: 3); "
        "nothing was sent"
    )


async def test_ids_and_keys_are_taken_from_fields() -> None:
    app = app_of((dict, {}))
    one, other = await prepared(
        app, b'{"o": {"id": 1.50}, "k": "a"}', b'{"o": {"id": 2}, "k": "b"}', id_field="o.id", key_field="k"
    )
    assert (one.id, one.record.key, other.id, other.record.key) == ("1.50", b"a", "2", b"b")
    assert "no field 'o.no'" in await refusal(app, b'{"o": {}}', id_field="o.no")
    assert "neither text nor a number" in await refusal(app, b'{"o": {}}', key_field="o")
    assert "half of a character" in await refusal(app_of((bytes, {})), b'{"k": "\\ud83d"}', key_field="k")


async def test_one_id_with_two_values_is_refused_and_a_repetition_is_not() -> None:
    app = app_of((Payment, {}))
    same = [b'{"id": 1, "amount": 1}', b'{"id": 1, "amount": 1}']
    assert len(await prepared(app, *same, id_field="id")) == 2
    assert "line 2: it has the message id of line 1 and another value" in await refusal(
        app, same[0], b'{"id": 1, "amount": 2}', id_field="id"
    )


async def test_a_key_that_no_shard_takes_is_refused() -> None:
    app = app_of((Payment, {}), shards={"a": "env:A", "b": "env:B"}, route=lambda key: (key or b"").decode())
    assert await prepared(app, b'{"id": 1}', key=b"a")
    assert "which is none of a, b" in await refusal(app, b'{"id": 1}', key=b"c")


async def test_a_null_value_needs_a_handler_that_takes_it() -> None:
    assert (await prepared(app_of((Payment | None, {})), None, key=b"k"))[0].record.value is None
    assert "does not take None" in await refusal(app_of((Payment, {})), None, key=b"k")


def test_an_unknown_topic_is_refused_and_a_published_one_is_not() -> None:
    app = app_of((Payment, {}), publishes=["receipts"])
    assert readers(app, "shop:app", "receipts") == []
    with pytest.raises(UnknownName, match="did you mean receipts"):
        readers(app, "shop:app", "receipt")


@pytest.mark.parametrize("text", ["novalue", "=x", "message-id=3", "Message-Id=3", "a=\0"])
def test_a_header_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(Misconfigured, match="--header"):
        parse_headers([text])
    assert parse_headers(["a=b=c", "a="]) == (("a", b"b=c"), ("a", b""))


def test_a_refused_header_is_not_quoted() -> None:
    with pytest.raises(Misconfigured) as refused:
        parse_headers(["authorization: 4929"])  # as other tools take it
    assert "4929" not in str(refused.value)
