"""Protobuf messages in Confluent's wire format, read without generated code.

The registry gives the schema as a FileDescriptorProto. Each schema has a pool of its own, so that two versions of one file do
not clash.
"""

from __future__ import annotations

import base64
import importlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from consumer.core.message import Record
from consumer.core.models import Unfit
from consumer.decoders.avro import RegistryCodec, as_builtins, require_extra
from consumer.decoders.registry_client import Schema
from consumer.decoders.wire_format import framed, indexes_as_bytes, message_indexes
from consumer.outbox.encoding import Encoded

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WELL_KNOWN = "google/protobuf/"
_WRAPPERS = frozenset(
    f"google.protobuf.{kind}Value"
    for kind in ("Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")
)


class Protobuf(RegistryCodec):
    """Decodes Protobuf of a schema registry, and encodes it.

    Needs the extra ``[protobuf]``.

    A decoded message is a dict by the names of the fields in the schema. Enums are their names, bytes are bytes, a
    Timestamp is a datetime in UTC, a Duration a timedelta, wrappers are their values. Fields that can be absent (messages,
    ``optional``, ``oneof``) are left out where they are; others have their default. Annotate the type that validates it.

    `encode` takes a message of generated code, or what becomes JSON, and writes with the newest schema of the subject
    ``TOPIC-value``, as it is when the worker starts. Limitations: the registry must answer format=serialized, as
    Confluent's does.
    """

    kind = "PROTOBUF"

    def __init__(self) -> None:
        super().__init__()
        require_extra("google.protobuf", "Protobuf", "protobuf")

    def compile(self, schema: Schema) -> Any:
        """Return the descriptor of the schema's file."""
        from google.protobuf import descriptor_pool

        pool = descriptor_pool.DescriptorPool()
        files = [(name, _file(text, name)) for name, text in schema.references]
        main = _file(schema.text, "")
        if not main.name:
            main.name = "schema.proto"
        for file in [*(file for _, file in files), main]:
            _add_well_known(pool, file, {name for name, _ in files})
            pool.AddSerializedFile(file.SerializeToString())
        return pool.FindFileByName(main.name)

    def decode(self, record: Record) -> object:
        """Return the message as a dict. Raises Unfit."""
        from google.protobuf import message_factory

        file, body = self.reading(record)
        indexes, body = message_indexes(body)
        message = message_factory.GetMessageClass(_message_type(file, indexes))()
        try:
            message.ParseFromString(body)
        except Exception as error:  # DecodeError of either implementation
            raise Unfit(f"bytes that are not of their Protobuf schema ({type(error).__name__})") from None
        return _tree(message)

    def encode(self, topic: str, value: Any) -> Encoded:
        """Return the bytes of a message.

        Raises Unfit for a value that is not of the topic's schema.
        """
        from google.protobuf import json_format, message, message_factory

        schema, file = self.writing(topic)
        if isinstance(value, message.Message):
            indexes = _indexes_of(file, value.DESCRIPTOR.full_name)
            return framed(schema.id, indexes_as_bytes(indexes) + value.SerializeToString(deterministic=True))
        built = message_factory.GetMessageClass(_message_type(file, [0]))()
        try:
            json_format.ParseDict(_jsonable(as_builtins(value)), built)
        except Exception as error:
            raise Unfit(
                f"it is not of the first message in the schema of topic {topic} ({type(error).__name__})"
            ) from error
        return framed(schema.id, b"\0" + built.SerializeToString(deterministic=True))


def _file(text: str, name: str) -> Any:
    """Return a FileDescriptorProto. name: under which others import it."""
    from google.protobuf import descriptor_pb2

    try:
        file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(text, validate=True))
    except Exception:
        raise Unfit("the registry gives no FileDescriptorProto; it must answer format=serialized") from None
    if name:
        file.name = name
    return file


def _add_well_known(pool: Any, file: Any, given: set[str]) -> None:
    """Add what a file imports of Google's own types."""
    for name in file.dependency:
        if not name.startswith(_WELL_KNOWN) or name in given:
            continue
        module = importlib.import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
        inner = _file(base64.b64encode(module.DESCRIPTOR.serialized_pb).decode(), name)
        _add_well_known(pool, inner, given)
        pool.AddSerializedFile(inner.SerializeToString())


def _message_type(file: Any, indexes: list[int]) -> Any:
    """Return the message type that indexes lead to. Raises Unfit."""
    inside: Any = list(file.message_types_by_name.values())
    kind: Any = None
    for index in indexes:
        if not 0 <= index < len(inside):
            raise Unfit("message indexes that its Protobuf schema does not have")
        kind = inside[index]
        inside = list(kind.nested_types)
    return kind


def _indexes_of(file: Any, name: str) -> list[int]:
    """Return the indexes of a message type in a file. Raises Unfit."""
    todo = [([index], kind) for index, kind in enumerate(file.message_types_by_name.values())]
    while todo:
        indexes, kind = todo.pop()
        if kind.full_name == name:
            return indexes
        todo += [([*indexes, index], inner) for index, inner in enumerate(kind.nested_types)]
    raise Unfit(f"the topic's schema has no message {name}")


def _tree(message: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.has_presence:
            if message.HasField(field.name):
                tree[field.name] = _value(field, value)
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            inner = field.message_type.fields_by_name["value"]
            tree[field.name] = {key: _value(inner, value[key]) for key in value}
        elif _is_repeated(field):
            tree[field.name] = [_value(field, one) for one in value]
        else:
            tree[field.name] = _value(field, value)
    return tree


def _is_repeated(field: Any) -> bool:
    repeated = getattr(field, "is_repeated", None)  # since version 6; `label` is gone in version 7
    return bool(field.label == field.LABEL_REPEATED if repeated is None else repeated)


def _value(field: Any, value: Any) -> Any:
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return value if known is None else known.name  # a number that the schema does not name
    if field.message_type is None:
        return value
    match field.message_type.full_name:
        case "google.protobuf.Timestamp":
            return _moment(value)
        case "google.protobuf.Duration":
            return timedelta(seconds=value.seconds, microseconds=_micros(value))
        case name if name in _WRAPPERS:
            return value.value
        case _:
            return _tree(value)


def _moment(value: Any) -> datetime:
    try:
        return _EPOCH + timedelta(seconds=value.seconds, microseconds=_micros(value))
    except OverflowError:
        raise Unfit("a Timestamp that is not of the years 1 to 9999") from None


def _micros(value: Any) -> int:
    micros, lost = divmod(value.nanos, 1000)
    if lost:
        raise Unfit("a time with nanoseconds, which Python's types would round; send microseconds")
    return int(micros)


def _jsonable(value: Any) -> Any:
    """Return what Protobuf's JSON form takes: bytes as base64, times as text."""
    match value:
        case bytes():
            return base64.b64encode(value).decode()
        case datetime():
            moment = value.astimezone(UTC) if value.tzinfo is not None else value
            return moment.replace(tzinfo=None).isoformat() + "Z"
        case Mapping():
            return {name: _jsonable(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_jsonable(inner) for inner in value]
        case bool() | int() | float() | str() | None:
            return value
        case _:
            return str(value)
