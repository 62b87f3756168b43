"""Avro values in Confluent's wire format.

They are read with the schema that they were written with.

Pure, apart from the registry, which has fetched the schemas before. Handlers' types do what a reader's schema would: fields
that a type does not declare are dropped, those that are missing need a default.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from consumer.core.errors import RegistrationError
from consumer.core.message import Record
from consumer.core.models import Unfit
from consumer.decoders.connect_types import DECIMAL, NAMES, meaning
from consumer.decoders.registry import Registry
from consumer.decoders.registry_client import Schema
from consumer.decoders.wire_format import SchemaKey, framed, payload, schema_key
from consumer.outbox.encoding import Encoded

_BUILTIN = frozenset(
    {"null", "boolean", "int", "long", "float", "double", "bytes", "string", "record", "enum", "array", "map", "fixed"}
)
_KEPT = (bytes, bytearray)  # msgspec would make text of them


def require_extra(module: str, name: str, extra: str) -> None:
    """Raise RegistrationError where a library is not installed."""
    try:
        __import__(module)
    except ImportError:
        raise RegistrationError(
            f"{name}(): {module.partition('.')[0]} is not installed; pip install 'idempotent-consumer[{extra}]'"
        ) from None


class RegistryCodec:
    """What decoders with a registry share."""

    kind = ""  # of a schema, as the registry calls it
    reads_registry = True  # whether `decode` needs schemas

    def __init__(self) -> None:
        self._registry: Registry | None = None
        self._compiled: dict[SchemaKey, Any] = {}
        self._writers: dict[str, tuple[Schema, Any]] = {}

    def use_registry(self, registry: Registry) -> None:
        """Take the schemas of a registry from now on."""
        if registry is not self._registry:
            self._registry, self._compiled, self._writers = registry, {}, {}

    def use_schema(self, topic: str, schema: Schema) -> None:
        """Write values of a topic with a schema.

        Raises RegistrationError for one of another kind.
        """
        if schema.kind != self.kind:
            raise RegistrationError(
                f"encode={type(self).__name__}(): the schema of topic {topic!r} is {schema.kind}; register one of kind {self.kind}, "
                "or use its encoder"
            )
        self._writers[topic] = schema, self.compile(schema)

    def compile(self, schema: Schema) -> Any:
        """Return a schema as the library reads it.

        Raises anything for one that is malformed.
        """
        raise NotImplementedError

    def schema_needed(self, record: Record) -> tuple[Registry, SchemaKey] | None:
        """Return which schema must be fetched before a record is decoded.

        None where none.
        """
        if self._registry is None or record.value is None:
            return None
        key = schema_key(record)
        return (self._registry, key) if key is not None and self._registry.needs(key) else None

    def reading(self, record: Record) -> tuple[Any, bytes]:
        """Return the compiled schema of a record, and what it describes.

        Raises Unfit, and SchemaNotFetched where the schema was not fetched.
        """
        body = payload(record)
        key = schema_key(record)
        assert key is not None
        compiled = self._compiled.get(key)
        if compiled is None:
            if self._registry is None:
                raise Unfit(f"{type(self).__name__}() has no registry; enter `async with app.running():`")
            schema = self._registry.schema(key)
            if schema.kind != self.kind:
                raise Unfit(
                    f"schema {key} is {schema.kind}, not {self.kind}; give the handler the decoder of that kind"
                )
            try:
                compiled = self._compiled[key] = self.compile(schema)
            except Exception as error:
                why = str(error) if isinstance(error, Unfit) else type(error).__name__
                raise Unfit(f"schema {key} cannot be used ({why})") from error
        return compiled, body

    def writing(self, topic: str) -> tuple[Schema, Any]:
        """Return the schema of a topic. Raises Unfit where none was fetched."""
        writer = self._writers.get(topic)
        if writer is None:
            raise Unfit(f"no schema of topic {topic} was fetched; enter `async with app.running():` before")
        return writer


class Avro(RegistryCodec):
    """Decodes Avro of a schema registry, and encodes it.

    Needs the extra ``[avro]``.

    A decoded record is a dict, with the values of logical types: Decimal, UUID, date, time, datetime (UTC; local timestamps
    without a zone). Annotate the type that validates it. `encode` writes with the newest schema of the subject
    ``TOPIC-value``, as it is when the worker starts.
    """

    kind = "AVRO"

    def __init__(self) -> None:
        super().__init__()
        require_extra("fastavro", "Avro", "avro")

    def compile(self, schema: Schema) -> Any:
        """Return the parsed schema, with its references inside."""
        import fastavro

        definitions = [json.loads(text) for _, text in schema.references]
        names = {name: node for node in definitions for name, node in _definitions(node, "").items()}
        whole = _inlined(json.loads(schema.text), "", names, set())
        return fastavro.parse_schema(_with_meanings(whole))

    def decode(self, record: Record) -> object:
        """Return the value. Raises Unfit."""
        import fastavro

        schema, body = self.reading(record)
        stream = io.BytesIO(body)
        try:
            value = fastavro.schemaless_reader(stream, schema, None)
        except Unfit:
            raise
        except Exception as error:  # the library has no class for bytes that do not fit
            raise Unfit(f"bytes that are not of their Avro schema ({type(error).__name__})") from None
        if stream.tell() != len(body):
            raise Unfit("bytes that are not of their Avro schema (some are left over)")
        return value

    def encode(self, topic: str, value: Any) -> Encoded:
        """Return the bytes of a value.

        Raises Unfit for a value that is not of the topic's schema.
        """
        import fastavro

        schema, parsed = self.writing(topic)
        stream = io.BytesIO()
        try:
            fastavro.schemaless_writer(stream, parsed, as_builtins(value), strict_allow_default=True)
        except Exception as error:
            raise Unfit(f"it is not of the Avro schema of topic {topic} ({type(error).__name__})") from error
        return framed(schema.id, stream.getvalue())


def as_builtins(value: Any) -> Any:
    """Return a model or Struct as dicts.

    Decimals, times and bytes stay as they are.
    """
    from datetime import date, datetime, time
    from decimal import Decimal
    from uuid import UUID

    if hasattr(value, "model_dump"):
        return value.model_dump()
    return msgspec.to_builtins(value, builtin_types=(*_KEPT, Decimal, datetime, date, time, UUID), enc_hook=_dumped)


def _dumped(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump()
    raise TypeError(type(value).__name__)


def _full_name(node: Mapping[str, Any], namespace: str) -> tuple[str, str]:
    """Return the full name of a definition, and the namespace inside it."""
    name = str(node.get("name", ""))
    if "." in name:
        return name, name.rpartition(".")[0]
    inside = str(node.get("namespace", namespace))
    return (f"{inside}.{name}" if inside else name), inside


def _definitions(node: Any, namespace: str) -> dict[str, Any]:
    """Return the named types of a referenced schema that stands alone."""
    if isinstance(node, list):
        return {name: inner for part in node for name, inner in _definitions(part, namespace).items()}
    if isinstance(node, dict) and node.get("type") in ("record", "enum", "fixed", "error"):
        name, inside = _full_name(node, namespace)
        return {name: {**node, "name": name, "namespace": inside}}
    return {}


def _inlined(node: Any, namespace: str, names: Mapping[str, Any], defined: set[str]) -> Any:
    """Return a schema with its references inside.

    The first use of a referenced name becomes its definition.
    """
    match node:
        case str() if node not in _BUILTIN:
            full = node if "." in node or not namespace else f"{namespace}.{node}"
            for name in (full, node):
                if name in names and name not in defined:
                    return _inlined(names[name], "", names, defined)
            return node
        case list():
            return [_inlined(part, namespace, names, defined) for part in node]
        case dict():
            if node.get("type") in ("record", "enum", "fixed", "error"):
                name, namespace = _full_name(node, namespace)
                defined.add(name)
            changed = dict(node)
            for key in ("type", "items", "values"):
                if key in changed:
                    changed[key] = _inlined(changed[key], namespace, names, defined)
            if "fields" in changed:
                changed["fields"] = [_inlined(field, namespace, names, defined) for field in changed["fields"]]
            return changed
        case _:
            return node


def _with_meanings(node: Any) -> Any:
    """Return a schema with Debezium's types as logical types.

    Avro's own logical types stay.
    """
    if isinstance(node, list):
        return [_with_meanings(part) for part in node]
    if not isinstance(node, dict):
        return node
    changed = {
        key: _with_meanings(value) if key in ("type", "items", "values", "fields") else value
        for key, value in node.items()
    }
    name, kind = node.get("connect.name"), node.get("type")
    if name in NAMES and name != DECIMAL and "logicalType" not in node and isinstance(kind, str):
        _register(kind, name)
        changed["logicalType"] = name
    return changed


def _register(kind: str, name: str) -> None:
    """Let the library convert values of a type.

    In every schema that names it.
    """
    from fastavro.read import LOGICAL_READERS

    convert = meaning(name)
    assert convert is not None
    LOGICAL_READERS.setdefault(f"{kind}-{name}", _reader(convert))


def _reader(convert: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda value, writer_schema=None, reader_schema=None: convert(value)
