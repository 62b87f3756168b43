"""JSON in Confluent's wire format.

Pure. The handler's type validates, so decoding asks no registry for the schema; Confluent's own deserializers do not validate
by default.
"""

from __future__ import annotations

from typing import Any

import msgspec

from consumer.core.encode import to_json
from consumer.core.message import Record
from consumer.core.models import Unfit
from consumer.decoders.avro import RegistryCodec
from consumer.decoders.registry_client import Schema
from consumer.decoders.wire_format import framed, payload
from consumer.outbox.encoding import Encoded


class JsonSchema(RegistryCodec):
    """Decodes and encodes JSON of serializers for JSON Schema.

    `decode` reads the JSON behind the schema id as a handler without ``decode=`` does. `encode` writes the id of the newest
    schema of the subject ``TOPIC-value``, as it is when the worker starts. Limitations: neither checks values against
    the schema.
    """

    kind = "JSON"
    reads_registry = False

    def compile(self, schema: Schema) -> Any:
        """Return nothing: the schema is not read."""
        return None

    def decode(self, record: Record) -> object:
        """Return the JSON. Raises Unfit for a record without a schema id."""
        return msgspec.Raw(payload(record))

    def encode(self, topic: str, value: Any) -> Encoded:
        """Return the bytes of a value.

        Raises Unfit for what cannot become JSON.
        """
        schema, _ = self.writing(topic)
        try:
            return framed(schema.id, to_json(value))
        except Exception as error:
            raise Unfit(f"it cannot become JSON ({type(error).__name__})") from error
