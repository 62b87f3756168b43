"""CloudEvents 1.0 in Kafka messages: binary and structured mode.

Pure. Follows the Kafka protocol binding and the JSON event format of the specification, version 1.0.2. Limitations:
batches of events in one message, and structured events in other formats than JSON, are refused.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from consumer.core.encode import to_json
from consumer.core.message import LogRecord, Record
from consumer.core.models import Unfit
from consumer.core.record_decoding import RecordDecoder
from consumer.decoders.envelopes import CloudEvent
from consumer.outbox.encoding import Encoded

_BOM = b"\xef\xbb\xbf"
_STRUCTURED = "application/cloudevents"
_ATTRIBUTES = ("subject", "datacontenttype", "dataschema")
_REQUIRED = ("id", "source", "type")
_OWN = frozenset({*_REQUIRED, *_ATTRIBUTES, "specversion", "time", "data", "data_base64"})
_read_body = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_NO_EVENT = (
    "no CloudEvent: neither the header content-type: application/cloudevents+json nor ce_ headers; let the producer send "
    "one of both, or drop decode=CloudEvents() for plain JSON"
)


class CloudEvents:
    """Decodes CloudEvents to `CloudEvent[T]`, and encodes them.

    - data: a decoder for data that is not JSON, such as ``Avro()``. Without one, such data is text for text/*, else bytes.
    - mode: how `encode` writes: ``"structured"`` (attributes and data in the body) or ``"binary"`` (attributes as headers).

    The message id is the event's source and id, as for a handler without ``decode=``.
    """

    envelope = CloudEvent
    reads_null = True  # an event without data, in binary mode

    def __init__(self, *, data: RecordDecoder | None = None, mode: str = "structured") -> None:
        if mode not in ("structured", "binary"):
            raise ValueError(f'CloudEvents(mode={mode!r}): "structured" or "binary"')
        self.inner = data
        self.is_binary = mode == "binary"

    def decode(self, record: Record) -> CloudEvent[Any] | None:
        """Return the event; None for a null value without an event's headers.

        Raises Unfit.
        """
        headers = {name.lower(): value for name, value in record.headers if value is not None}
        content_type = _text(headers.get("content-type", headers.get("contenttype", b"")), "content-type").strip('" ')
        media_type = content_type.partition(";")[0].strip().lower()
        if media_type.startswith(_STRUCTURED) and record.value is not None:
            return self._structured(record, media_type)
        attributes = {
            name[3:]: _text(value, name) for name, value in headers.items() if name.startswith(("ce_", "ce-"))
        }
        if not attributes:
            if record.value is None:
                return None
            raise Unfit(_NO_EVENT)
        return _event(attributes, content_type or None, self._binary_data(record, media_type))

    def schema_needed(self, record: Record) -> Any:
        """Return which schema the data needs.

        None where none, and where there is no event.
        """
        ask = getattr(self.inner, "schema_needed", None)
        if ask is None or record.value is None:
            return None
        if record.value[:1] == b"{" and b'"data_base64"' in record.value:
            try:
                raw = base64.b64decode(msgspec.json.decode(_read_body(record.value)["data_base64"], type=str))
            except (ValueError, KeyError, msgspec.MsgspecError):
                return None
            return ask(_with_value(record, raw))
        return ask(record)

    def _binary_data(self, record: Record, media_type: str) -> object:
        if record.value is None:
            return None
        if not media_type or _is_json(media_type):
            return msgspec.Raw(record.value) if record.value else None  # no JSON is empty: an event without data
        if self.inner is not None:
            return self.inner.decode(record)
        return _text(record.value, "data") if media_type.startswith("text/") else record.value

    def _structured(self, record: Record, media_type: str) -> CloudEvent[Any]:
        if media_type not in (_STRUCTURED, f"{_STRUCTURED}+json"):
            raise Unfit(
                "a structured CloudEvent that is not JSON, or a batch: send single events as JSON, or binary mode"
            )
        try:
            body = _read_body((record.value or b"").removeprefix(_BOM))
        except msgspec.MsgspecError:
            raise Unfit("a structured CloudEvent whose body is no JSON object in UTF-8") from None
        values = {name: msgspec.json.decode(raw) for name, raw in body.items() if name not in ("data", "data_base64")}
        data = self._structured_data(record, body)
        content_type = values.pop("datacontenttype", None)
        return _event({name: value for name, value in values.items() if value is not None}, content_type, data)

    def _structured_data(self, record: Record, body: Mapping[str, msgspec.Raw]) -> object:
        if "data_base64" in body:
            try:
                raw = base64.b64decode(msgspec.json.decode(body["data_base64"], type=str), validate=True)
            except ValueError:
                raise Unfit("data_base64 is not base64") from None
            return raw if self.inner is None else self.inner.decode(_with_value(record, raw))
        return json_value(body.get("data"))

    def encode(self, topic: str, value: Any) -> Encoded:
        """Return the bytes and headers of an event.

        Raises Unfit for anything but a CloudEvent.
        """
        if not isinstance(value, CloudEvent):
            raise Unfit("publish a CloudEvent, or bytes")
        if not (value.id and value.source and value.type):
            raise Unfit("id, source and type of a CloudEvent must not be empty")
        attributes: dict[str, Any] = {"specversion": "1.0", "id": value.id, "source": value.source, "type": value.type}
        attributes |= {name: text for name in _ATTRIBUTES if (text := getattr(value, name)) is not None}
        if value.time is not None:
            if value.time.tzinfo is None:
                raise Unfit("time of a CloudEvent needs a time zone")
            attributes["time"] = value.time.isoformat()
        attributes |= value.extensions
        if self.is_binary:
            return self._binary(value, attributes)
        if isinstance(value.data, bytes):
            attributes["data_base64"] = base64.b64encode(value.data).decode()
        elif value.data is not None:
            attributes["data"] = value.data
        return to_json(attributes), {"content-type": f"{_STRUCTURED}+json; charset=UTF-8"}

    def _binary(self, event: CloudEvent[Any], attributes: dict[str, Any]) -> Encoded:
        content_type = attributes.pop("datacontenttype", None)
        if content_type is None and event.data is not None:
            content_type = "application/octet-stream" if isinstance(event.data, bytes) else "application/json"
        headers = {f"ce_{name}": str(text) for name, text in attributes.items()}
        if content_type is not None:
            headers["content-type"] = content_type
        if event.data is None or isinstance(event.data, bytes):
            return event.data, headers
        if isinstance(event.data, str) and content_type is not None and content_type.startswith("text/"):
            return event.data.encode(), headers
        return to_json(event.data), headers


def json_value(raw: msgspec.Raw | None) -> object:
    """Return JSON that the handler's type decodes.

    Text and null as they are.
    """
    if raw is None:
        return None
    first = bytes(raw)[:1]
    return msgspec.json.decode(raw) if first in (b'"', b"n") else msgspec.Raw(bytes(raw))


def _event(attributes: Mapping[str, Any], content_type: Any, data: object) -> CloudEvent[Any]:
    """Return an event. Raises Unfit, which names the attribute."""
    version = attributes.get("specversion")
    if not isinstance(version, str) or not version.startswith("1."):
        raise Unfit("a CloudEvent whose specversion is not 1.0; let the producer send version 1.0")
    for name in _REQUIRED:
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise Unfit(f"a CloudEvent without {name}; let the producer set ce_{name}, or {name} in structured mode")
    for name in ("subject", "dataschema"):
        if not isinstance(attributes.get(name, ""), str):
            raise Unfit(f"{name} of a CloudEvent is no text")
    if content_type is not None and not isinstance(content_type, str):
        raise Unfit("datacontenttype of a CloudEvent is no text")
    return CloudEvent(
        id=attributes["id"],
        source=attributes["source"],
        type=attributes["type"],
        subject=attributes.get("subject"),
        time=_time(attributes.get("time")),
        datacontenttype=content_type,
        dataschema=attributes.get("dataschema"),
        data=data,
        extensions={name: value for name, value in attributes.items() if name not in _OWN},
    )


def _time(text: object) -> datetime | None:
    if text is None:
        return None
    try:
        time = msgspec.convert(text, datetime)
    except msgspec.ValidationError:
        raise Unfit("time of a CloudEvent is no RFC 3339 timestamp") from None
    if time.tzinfo is None:
        raise Unfit("time of a CloudEvent is without a time zone")
    return time


def _with_value(record: Record, value: bytes) -> LogRecord:
    """Return a record with another value."""
    return LogRecord(
        record.topic, record.partition, record.offset, record.timestamp, record.key, value, tuple(record.headers)
    )


def _is_json(media_type: str) -> bool:
    return media_type in ("application/json", "text/json") or media_type.endswith("+json")


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise Unfit(f"{name}: not UTF-8") from None
