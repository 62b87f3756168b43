"""Identifies CloudEvents by source and id, in binary and structured mode.

Reads headers and, in structured mode, two fields of the body. An event whose id cannot be read is refused. With the
offset as its id, a second send would be applied again; with the id without the source, another producer's event would
be dropped as a duplicate.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from consumer.core.errors import Unreadable
from consumer.core.identity import event_id
from consumer.core.message import Record
from consumer.core.outcome import Reason

_ID = ("ce_id", "ce-id")  # the Kafka binding's spelling, and HTTP's, which bridges keep
_SOURCE = ("ce_source", "ce-source")
_CONTENT_TYPE = ("content-type", "contenttype")  # Spring writes contentType, older ones with the value in quotes
_STRUCTURED = b"application/cloudevents"
_BOM = b"\xef\xbb\xbf"


class _Envelope(msgspec.Struct):
    id: str
    source: str


_read_envelope = msgspec.json.Decoder(_Envelope).decode


def from_event(record: Record) -> bytes | None:
    """Return the 16 bytes of a CloudEvent's id; None for other records.

    Raises Unreadable for an event without id or source.
    """
    ids: list[bytes | None] = []
    sources: list[bytes | None] = []
    for key, value in record.headers:
        if key in _ID:
            ids.append(value)
        elif key in _SOURCE:
            sources.append(value)
        elif len(key) in (11, 12) and key.lower() in _CONTENT_TYPE and value is not None:
            media_type = value.partition(b";")[0].strip(b' "').lower()
            if media_type.startswith(_STRUCTURED) and record.value is not None:
                return _from_body(media_type, record.value)
    if not ids:
        return None
    id = _only(ids, "ce_id")
    if not sources:
        raise Unreadable(
            Reason.NO_MESSAGE_ID,
            "header 'ce_id' without 'ce_source': a CloudEvent is identified by both; send ce_source, or register the "
            'handler with message_id="header:ce_id" where one producer gives all ids',
        )
    return event_id(_only(sources, "ce_source"), id)


def _only(values: Sequence[bytes | None], name: str) -> bytes:
    first = values[0]
    if any(value != first for value in values):
        raise Unreadable(Reason.AMBIGUOUS_MESSAGE_ID, f"several {name!r} headers with different values")
    if not first:
        raise Unreadable(Reason.NO_MESSAGE_ID, f"the header {name!r} is empty")
    return first


def _from_body(media_type: bytes, body: bytes) -> bytes:
    if media_type == b"application/cloudevents-batch+json":
        raise Unreadable(
            Reason.NO_MESSAGE_ID, "a batch of CloudEvents has many ids: produce one event in each Kafka message"
        )
    if media_type not in (b"application/cloudevents+json", b"application/cloudevents"):
        raise Unreadable(
            Reason.NO_MESSAGE_ID,
            "a structured CloudEvent that is not JSON: its id cannot be read; send JSON, binary mode, or a "
            "'message-id' header",
        )
    try:
        event = _read_envelope(body.removeprefix(_BOM))
    except msgspec.ValidationError:
        raise Unreadable(
            Reason.NO_MESSAGE_ID, "a structured CloudEvent without the text fields 'id' and 'source'"
        ) from None
    except msgspec.DecodeError:
        raise Unreadable(Reason.UNREADABLE, "a structured CloudEvent whose body is not JSON in UTF-8") from None
    if not event.id or not event.source:
        raise Unreadable(Reason.NO_MESSAGE_ID, "a structured CloudEvent with an empty 'id' or 'source'")
    return event_id(event.source.encode("utf-8", "surrogatepass"), event.id.encode("utf-8", "surrogatepass"))
