"""CloudEvents as the project's SDK writes them (cloudevents.json)."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pydantic
import pytest

from consumer import App, TransactionMisuse
from consumer.core.delivery import Delivery
from consumer.core.message import LogRecord
from consumer.core.outcome import Dead, Reason
from consumer.decoders import CloudEvent, CloudEvents
from consumer.outbox.encoding import encode_function, encoded
from consumer.transaction.identify import decoded, identify

pytestmark = pytest.mark.unit

CASES = json.loads((Path(__file__).parent / "cloudevents.json").read_text("utf-8"))["cases"]


class Model(pydantic.BaseModel):
    id: str
    price: int


class Payment(msgspec.Struct):
    payment_id: str
    amount: int
    name: str = ""


DATA: dict[str, tuple[Any, Any]] = {
    "json": (Payment, Payment("p-1", 12, "é")),
    "vendor": (Payment, Payment("p-1", 12, "é")),
    "text": (str, "hé"),
    "bytes": (bytes, b"\x00\xff"),
    "nothing": (Payment | None, None),
}


def of_type(data: Any) -> Any:
    """The annotation of an event with data of this type."""
    return CloudEvent[data]


def delivery(declared: Any, value: bytes | None, headers: dict[str, str], **options: Any) -> Delivery:
    app = App("shop", decode=CloudEvents(**options))

    async def pay(event: Any) -> None: ...

    pay.__annotations__["event"] = declared
    app.handler("events")(pay)
    pairs = tuple((name, text.encode()) for name, text in headers.items())
    return Delivery(app.handlers["pay"], LogRecord("events", 0, 0, 0, None, value, pairs))


@pytest.mark.parametrize("name", CASES)
def test_events_of_the_sdk_are_decoded(name: str) -> None:
    declared, data = DATA[name.partition("-")[0]]
    case = CASES[name]
    of_default = delivery(of_type(declared), base64.b64decode(case["value"]), case["headers"])
    identify([of_default])
    event = decoded(of_default)
    assert event == CloudEvent(
        id="e-1",
        source="/shop/ö",
        type="org.example.paid",
        subject="order/7",
        time=datetime(2026, 1, 2, 3, 4, 5, 678900, UTC),
        datacontenttype={"json": "application/json", "vendor": "application/vnd.shop+json", "text": "text/plain",
                         "bytes": "application/octet-stream", "nothing": None}[name.partition("-")[0]],
        data=data,
        extensions={"traceid": "abc", "partitionkey": "7"},
    )  # fmt: skip
    assert of_default.outcome is None


def test_both_modes_of_an_event_have_one_id() -> None:
    both = [
        delivery(CloudEvent[Payment], base64.b64decode(case["value"]), case["headers"])
        for case in (CASES["json-binary"], CASES["json-structured"])
    ]
    identify(both)
    assert both[0].id == both[1].id


@pytest.mark.parametrize("mode", ["binary", "structured"])
@pytest.mark.parametrize("name", ["json", "text", "bytes", "nothing"])
def test_encoded_events_are_decoded_again(name: str, mode: str) -> None:
    case = CASES[f"{name}-binary"]
    declared, _ = DATA[name]
    event = decoded(delivery(of_type(declared), base64.b64decode(case["value"]), case["headers"]))
    body, headers = encoded("events", event, {"own": "1"}, encode_function(CloudEvents(mode=mode)))
    texts = {key: text.decode() for key, text in headers if text is not None}
    assert texts.pop("own") == "1"
    again = decoded(delivery(of_type(declared), body, texts))
    if mode == "structured" or name != "json":
        assert again == event
    assert again.data == event.data and again.id == "e-1" and again.extensions == event.extensions
    # As the SDK has them, apart from the order and the spelling of JSON.
    expected = CASES[f"{name}-{mode}"]
    if mode == "structured":
        assert json.loads(body or b"") == json.loads(base64.b64decode(expected["value"])) | {
            "time": "2026-01-02T03:04:05.678900+00:00"
        }
    else:
        assert {**texts, "ce_time": ""} == {**expected["headers"], "ce_time": ""}


@pytest.mark.parametrize("mode", ["binary", "structured"])
def test_models_of_pydantic_are_published_as_data(mode: str) -> None:
    model, expected = Model(id="a", price=1), {"id": "a", "price": 1}
    for data, shown in ((model, expected), ([model], [expected])):
        event = CloudEvent(id="1", source="/s", type="t", data=data)
        body, _ = encoded("events", event, None, encode_function(CloudEvents(mode=mode)))
        sent = json.loads(body or b"")
        assert (sent["data"] if mode == "structured" else sent) == shown


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"id": "1"}, "encode= cannot encode a dict; publish a CloudEvent, or bytes"),
        (CloudEvent(id="", source="/s", type="t", data=None), "id, source and type of a CloudEvent must not be empty"),
        (
            CloudEvent(id="1", source="/s", type="t", data=None, time=datetime(2026, 1, 1)),
            "time of a CloudEvent needs a time zone",
        ),
    ],
)
def test_values_that_are_no_events_are_not_published(value: Any, says: str) -> None:
    with pytest.raises(TransactionMisuse, match=says):
        encoded("events", value, None, encode_function(CloudEvents()))


BINARY = {"ce_specversion": "1.0", "ce_id": "1", "ce_source": "/s", "ce_type": "t"}
STRUCTURED = {"content-type": "application/cloudevents+json"}


@pytest.mark.parametrize(
    ("value", "headers", "reason", "says"),
    [
        (b"{}", {"message-id": "1"}, Reason.UNREADABLE, "neither the header content-type: application/cloudevents+json"),
        (b"1", {**BINARY, "ce_specversion": "0.3", "message-id": "1"}, Reason.UNREADABLE, "specversion is not 1.0"),
        (b"1", {**BINARY, "ce_type": ""}, Reason.UNREADABLE, "without type; let the producer set ce_type"),
        (b"1", {**BINARY, "ce_id": "", "message-id": "1"}, Reason.UNREADABLE, "without id; let the producer set ce_id"),
        (b"1", {**BINARY, "ce_id": ""}, Reason.NO_MESSAGE_ID, "header 'ce_id' is empty"),
        (b"1", {**BINARY, "ce_time": "2026"}, Reason.UNREADABLE, "no RFC 3339 timestamp"),
        (b'{"a": 1}', BINARY, Reason.UNREADABLE, "payment_id"),
        (None, BINARY, Reason.NO_VALUE, "a null value"),
        (b"[1]", {**STRUCTURED, "message-id": "1"}, Reason.UNREADABLE, "no JSON object"),
        (b"[]", {"content-type": "application/cloudevents-batch+json", "message-id": "1"}, Reason.UNREADABLE, "batch"),
        (
            b'{"specversion":"1.0","id":"1","source":"/s","type":"t","data_base64":"?"}',
            STRUCTURED, Reason.UNREADABLE, "data_base64 is not base64",
        ),
        (
            b'{"specversion":"1.0","id":"1","source":"/s","type":"t","data":{"payment_id":"x","amount":"y"}}',
            STRUCTURED, Reason.UNREADABLE, "$.amount",
        ),
    ],
)  # fmt: skip
def test_messages_that_are_no_events_are_at_fault(
    value: bytes | None, headers: dict[str, str], reason: Reason, says: str
) -> None:
    refused = delivery(CloudEvent[Payment], value, headers)
    identify([refused])
    try:
        decoded(refused)
    except Exception as error:
        refused.outcome = refused.outcome or Dead(Reason(error.reason), str(error))  # type: ignore[attr-defined]
    assert isinstance(refused.outcome, Dead)
    assert (refused.outcome.reason, says in refused.outcome.error) == (reason, True), refused.outcome


def test_a_null_value_with_an_events_headers_is_an_event_without_data() -> None:
    event = decoded(delivery(CloudEvent[Payment | None], None, BINARY))
    assert event == CloudEvent(id="1", source="/s", type="t", data=None)
    assert decoded(delivery(CloudEvent[Payment] | None, None, {})) is None


def test_data_of_another_format_has_a_decoder_of_its_own() -> None:
    class Upper:
        def decode(self, record: Any) -> object:
            return (record.value or b"").decode().upper()

    headers = {**BINARY, "content-type": "application/x-upper"}
    assert decoded(delivery(CloudEvent[str], b"abc", headers, data=Upper())).data == "ABC"
    body = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "data_base64": "YWJj"}
    assert decoded(delivery(CloudEvent[str], json.dumps(body).encode(), STRUCTURED, data=Upper())).data == "ABC"


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match='"structured" or "binary"'):
        CloudEvents(mode="batch")
