"""What ``decode=`` and ``encode=`` of an App and a handler take.

``from consumer.decoders import CloudEvent, CloudEvents``. See docs/how-to/decoders.md.
"""

from __future__ import annotations

from consumer.core.message import Record
from consumer.decoders.avro import Avro
from consumer.decoders.cloudevents import CloudEvents
from consumer.decoders.debezium import Debezium
from consumer.decoders.envelopes import Change, CloudEvent
from consumer.decoders.json_schema import JsonSchema
from consumer.decoders.protobuf import Protobuf

__all__ = [
    "Avro",
    "Change",
    "CloudEvent",
    "CloudEvents",
    "Debezium",
    "Json",
    "JsonSchema",
    "Protobuf",
    "Record",
]


class Json:
    """JSON, as an App without ``decode=`` and ``encode=`` reads and writes it.

    For a handler of an App that has another default.
    """

    is_plain_json = True

    def decode(self, record: Record) -> object:
        """Never called: the handler reads JSON itself."""
        raise NotImplementedError
