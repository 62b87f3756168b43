"""Between JSON, for people, and the format that handlers read.

Pure. For `consumer produce` and `tail`: where handlers read plain JSON, text or bytes, what is typed is sent as it is. Limitations:
a decoder without a method `encode`, in an App without ``encode=``, gets what is typed as it is, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from consumer.core.decode import explain, read_again
from consumer.core.encode import to_json
from consumer.core.errors import TransactionMisuse
from consumer.core.handler import Handler
from consumer.core.message import LogRecord, Record
from consumer.core.models import Unfit
from consumer.core.record_decoding import Read, converter, is_json
from consumer.decoders.envelopes import CloudEvent
from consumer.outbox.encoding import EncodeFunction, RecordEncoder, encode_function
from consumer.outbox.encoding import encoded as encode_value
from consumer.outbox.record import Headers

_STRUCTURED = (("content-type", b"application/cloudevents+json"),)
_read_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class JsonWriter:
    """Encodes JSON with the codec of a topic.

    codec: what has `encode`, for registries. writes_events: its messages are CloudEvents, typed in their JSON format.
    """

    def __init__(self, codec: Any, encode: EncodeFunction, convert: Callable[[object], Any], topic: str) -> None:
        self.codec = codec
        self.writes_events = getattr(codec, "envelope", None) is CloudEvent
        self._encode = encode
        self._convert = convert
        self._topic = topic

    def write(self, text: bytes, wanted: bytes | None, new: bytes) -> tuple[bytes | None, Headers]:
        """Return the bytes and the headers of a message.

        wanted: the id that a CloudEvent is to have. new: the id of one that has none. Raises Unfit, and Unreadable for
        JSON that is not of the handler's type.
        """
        try:
            value = self._event(text, wanted, new) if self.writes_events else self._convert(msgspec.Raw(text))
        except msgspec.MsgspecError as error:
            raise Unfit(explain(error)) from None
        try:
            return encode_value(self._topic, value, None, self._encode)
        except TransactionMisuse as error:
            raise Unfit(str(error).removeprefix("publish: ")) from None

    def _event(self, text: bytes, wanted: bytes | None, new: bytes) -> Any:
        """Return a CloudEvent from its JSON format, with defaults."""
        event = _read_object(text)
        id = msgspec.json.encode((new if wanted is None else wanted).decode("utf-8", "surrogateescape"))
        if wanted is not None and bytes(event.get("id", id)) != id:
            raise Unfit("a CloudEvent with an id of its own; leave the message id out")
        event.setdefault("specversion", msgspec.Raw(b'"1.0"'))
        event.setdefault("id", msgspec.Raw(id))
        return self.codec.decode(LogRecord("", 0, 0, 0, None, msgspec.json.encode(event), _STRUCTURED))


def json_writer(topic: str, handlers: Sequence[Handler], app_encode: Any) -> JsonWriter | None:
    """Return what writes JSON in the format of a topic.

    None where it is sent as it is. handlers: those of the topic. app_encode: the option ``encode=`` of the App, which
    writes for decoders that only read, and for topics that no handler reads.
    """
    reading = [handler for handler in handlers if not is_json(handler.decode)]
    for handler in reading:
        if isinstance(handler.decode, RecordEncoder):
            return _writer(handler.decode, topic, handler)
    if (reading or not handlers) and encode_function(app_encode) is not None:
        return _writer(app_encode, topic, reading[0] if reading else None)
    return None


def _writer(codec: Any, topic: str, handler: Handler | None) -> JsonWriter:
    encode = encode_function(codec)
    assert encode is not None
    return JsonWriter(codec, encode, _plain if handler is None else _converter(handler), topic)


def _converter(handler: Handler) -> Callable[[object], Any]:
    return converter(handler.value_type, allow_nan=handler.allow_nan)


def _plain(raw: object) -> Any:
    """Return JSON as Python's values, where no handler declares a type."""
    assert isinstance(raw, msgspec.Raw)
    text = bytes(raw)
    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError as error:
        return read_again(msgspec.json.decode, text, error)


def json_of(read: Read, record: Record) -> bytes | None:
    """Return a record's decoded value as JSON.

    Its bytes where it cannot be read, or has no form in JSON.
    """
    try:
        return to_json(read(record))
    except Exception:  # unreadable, or of a type of the application
        return record.value


def field_of(text: bytes, path: Sequence[str]) -> bytes:
    """Return a field of a JSON object as text in UTF-8.

    Numbers keep their digits. Raises Unfit for a field that is missing, empty, or neither text nor a number.
    """
    name = ".".join(path)
    try:
        part = json.loads(text.removeprefix(b"\xef\xbb\xbf"), parse_float=str, parse_int=str)
    except (ValueError, RecursionError):
        raise Unfit("no JSON in UTF-8") from None
    for step in path:
        if not isinstance(part, dict) or step not in part:
            raise Unfit(f"no field {name!r}")
        part = part[step]
    if not isinstance(part, str) or not part:
        raise Unfit(f"the field {name!r} is {'empty' if part in ('', None) else 'neither text nor a number'}")
    try:
        return part.encode()
    except UnicodeEncodeError:
        raise Unfit(f"the field {name!r} has half of a character, an unpaired surrogate") from None
