"""Describes the topics of an App as an AsyncAPI document, version 3.0.

Reads declarations; asks no service. See https://www.asyncapi.com/docs/reference/specification/v3.0.0 and its bindings
for Kafka, version 0.5.0. Limitations: what handlers publish has no declared type, so the payload of a topic that the App
only publishes is not described.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Container, Sequence
from typing import Any, get_args

from consumer.app import App
from consumer.core import identity
from consumer.core.decode import bare, members
from consumer.core.handler import Handler
from consumer.core.payload_schema import Schema, Schemas
from consumer.core.record_decoding import contents_of, envelope_in, is_json
from consumer.core.topic_names import text_of
from consumer.decoders import Avro, Change, CloudEvent, CloudEvents, Debezium, JsonSchema, Protobuf
from consumer.outbox.record import MESSAGE_ID

VERSION = "3.0.0"
_BINDINGS = "0.5.0"
_JSON = "application/json"
_TEXT: Schema = {"type": "string"}
_ID = {"type": "string", "description": "Identity of the message: the same in every copy that is to be applied once."}
_IN_REGISTRY = ((Avro, "application/vnd.apache.avro"), (Protobuf, "application/x-protobuf"), (JsonSchema, _JSON))


def document(app: App, version: str) -> dict[str, Any]:
    """Return the document.

    version: of the service's interface, as its owners count it.
    """
    parts = _Parts(app)
    for topic in sorted({*app.topics, *app.publishes}):
        parts.add_channel(topic)
    for handler in app.handlers.values():
        parts.add_pattern(handler)
    components: dict[str, Any] = {"messages": parts.messages}
    if parts.schemas.definitions:
        components["schemas"] = dict(sorted(parts.schemas.definitions.items()))
    return {
        "asyncapi": VERSION,
        "info": {"title": app.name, "version": version},
        "channels": parts.channels,
        "operations": parts.operations,
        "components": components,
    }


class _Parts:
    """The parts of a document, as they are collected."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._by_topic = app.by_topic()
        self.schemas = Schemas()
        self.channels: dict[str, Any] = {}
        self.operations: dict[str, Any] = {}
        self.messages: dict[str, Any] = {}

    def add_channel(self, topic: str) -> None:
        """Add a topic, its messages, and what the App does with it."""
        handlers = self._by_topic.get(topic, [])
        is_published = topic in self._app.publishes
        names: dict[str, str] = {}  # of handlers -> of messages
        for handler in handlers:
            names[handler.name] = self._add_message(topic, handler, handlers, is_published)
        if not handlers:
            self.messages[f"{topic}.message"] = _published(self._app)
        known = [name.removeprefix(f"{topic}.") for name in self.messages if name.startswith(f"{topic}.")]
        own = [name for name in known if f"{topic}.{name}" in {*names.values(), f"{topic}.message"}]
        self.channels[topic] = {
            "address": topic,
            "messages": {name: {"$ref": f"#/components/messages/{topic}.{name}"} for name in own},
            "bindings": {"kafka": {"topic": topic, "bindingVersion": _BINDINGS}},
        }
        for handler in handlers:
            name = _key_of(handler) if len(handler.topics) == 1 else f"{_key_of(handler)}.{topic}"
            message = names[handler.name].removeprefix(f"{topic}.")
            self.operations[_free(name, self.operations)] = self._receiving(topic, handler, message)
        if is_published:
            self.operations[_free(f"publish.{topic}", self.operations)] = {
                "action": "send",
                "channel": {"$ref": f"#/channels/{topic}"},
                "messages": [{"$ref": f"#/channels/{topic}/messages/{name}"} for name in own],
            }

    def add_pattern(self, handler: Handler) -> None:
        """Add what a pattern matches, as a channel without an address."""
        if handler.pattern is None:
            return
        channel = _free(f"{_key_of(handler)}.topics", self.channels)
        name = self._add_message(channel, handler, [handler], False)
        message = name.removeprefix(f"{channel}.")
        self.channels[channel] = {
            "address": None,
            "description": f"Topics whose whole name matches the regular expression {text_of(handler.pattern)}",
            "messages": {message: {"$ref": f"#/components/messages/{name}"}},
        }
        self.operations[_free(channel, self.operations)] = self._receiving(channel, handler, message)

    def _receiving(self, topic: str, handler: Handler, message: str) -> dict[str, Any]:
        operation: dict[str, Any] = {
            "action": "receive",
            "channel": {"$ref": f"#/channels/{topic}"},
            "messages": [{"$ref": f"#/channels/{topic}/messages/{message}"}],
            "bindings": {
                "kafka": {"groupId": {"type": "string", "enum": [self._app.name]}, "bindingVersion": _BINDINGS}
            },
        }
        text = inspect.getdoc(handler.function if handler.effect is None else handler.effect.call.function)
        if text:
            operation["summary"] = text.splitlines()[0]
            operation["description"] = text
        return operation

    def _add_message(self, topic: str, handler: Handler, all_of: Sequence[Handler], is_published: bool) -> str:
        """Add what a handler takes from a topic; return its name.

        Handlers that take the same share it.
        """
        payload, content_type = self._payload(handler)
        message: dict[str, Any] = {"name": _type_name(handler.value_type)}
        if content_type is not None:
            message["contentType"] = content_type
        message["headers"] = _headers(all_of, is_published)
        message["payload"] = payload
        if any(isinstance(handler.decode, kind) for kind, _ in _IN_REGISTRY):
            message["bindings"] = {
                "kafka": {
                    "schemaIdLocation": "payload",
                    "schemaIdPayloadEncoding": "confluent",
                    "bindingVersion": _BINDINGS,
                }
            }
        name = base = f"{topic}.{message['name']}"
        number = 2
        while self.messages.get(name, message) != message:
            name, number = f"{base}_{number}", number + 1
        self.messages[name] = message
        return name

    def _payload(self, handler: Handler) -> tuple[Schema, str | None]:
        """Return the schema of a payload, and its content type if known."""
        option, declared = handler.decode, handler.value_type
        envelope = envelope_in(declared)
        if envelope is CloudEvent:
            contents = self.schemas.of(contents_of(declared))
            if isinstance(option, CloudEvents) and option.is_binary:
                return contents, _JSON
            return _event(contents), "application/cloudevents+json"
        if envelope is Change:
            of_registry = next((text for kind, text in _IN_REGISTRY if isinstance(_inner(option), kind)), _JSON)
            return self._or_null(_change(self.schemas.of(contents_of(declared))), handler), of_registry
        for kind, content_type in _IN_REGISTRY:
            if isinstance(option, kind):
                return self.schemas.of(declared), content_type
        plain = [bare(part) for part in members(declared) or [declared] if part is not type(None)]
        if plain == [bytes]:
            return {}, "application/octet-stream"
        if plain == [str]:
            return dict(_TEXT), "text/plain"
        return self.schemas.of(declared), _JSON if is_json(option) else None

    @staticmethod
    def _or_null(schema: Schema, handler: Handler) -> Schema:
        return {"anyOf": [schema, {"type": "null"}]} if handler.takes_none else schema


def _inner(option: Any) -> Any:
    return getattr(option, "inner", None) if isinstance(option, Debezium) else None


def _published(app: App) -> dict[str, Any]:
    """Return the message of a topic that the App only publishes."""
    message: dict[str, Any] = {"name": "message", "headers": _headers([], True)}
    for kind, content_type in ((CloudEvents, "application/cloudevents+json"), *_IN_REGISTRY):
        if isinstance(app.encoder, kind):
            message["contentType"] = content_type
    return message


def _headers(handlers: Sequence[Handler], is_published: bool) -> Schema:
    """Return the schema of the headers that identify messages."""
    properties: dict[str, Schema] = {}
    required: list[str] = []
    for handler in handlers:
        is_event = isinstance(handler.decode, CloudEvents)
        match handler.rule:
            case identity.DefaultId() if not is_event:
                properties[MESSAGE_ID] = _ID
            case identity.HeaderId(name):
                properties[name] = _ID
                required.append(name)
            case _:
                pass
        if isinstance(handler.decode, CloudEvents):
            if handler.decode.is_binary:
                for name in ("ce_specversion", "ce_id", "ce_source", "ce_type"):
                    properties[name] = _TEXT
                    required.append(name)
            else:
                properties["content-type"] = _TEXT
                required.append("content-type")
    if is_published:
        properties[MESSAGE_ID] = _ID
        if not handlers:
            required.append(MESSAGE_ID)
    schema: Schema = {"type": "object", "properties": properties}
    return schema | ({"required": list(dict.fromkeys(required))} if required else {})


def _event(data: Schema) -> Schema:
    """Return the schema of a CloudEvent in its JSON format."""
    return {
        "type": "object",
        "properties": {
            "specversion": {"const": "1.0"},
            "id": _TEXT,
            "source": {"type": "string", "format": "uri-reference"},
            "type": _TEXT,
            "subject": _TEXT,
            "time": {"type": "string", "format": "date-time"},
            "datacontenttype": _TEXT,
            "dataschema": {"type": "string", "format": "uri"},
            "data": data,
        },
        "required": ["specversion", "id", "source", "type"],
    }


def _change(row: Schema) -> Schema:
    """Return the schema of Debezium's envelope."""
    maybe = {"anyOf": [row, {"type": "null"}]}
    return {
        "type": "object",
        "properties": {
            "op": {"enum": ["c", "u", "d", "r", "t"]},
            "before": maybe,
            "after": maybe,
            "source": {"type": "object"},
            "ts_ms": {"type": ["integer", "null"]},
        },
        "required": ["op", "source"],
    }


def _type_name(declared: Any) -> str:
    """Return the name of a type, as the key of a message."""
    parts = [part for part in members(declared) if part is not type(None)]
    if len(parts) > 1:
        return "-or-".join(map(_type_name, parts))
    kind = bare(parts[0] if parts else declared)
    name = getattr(kind, "__name__", None) or str(kind)
    inside = [_type_name(part) for part in get_args(kind) if isinstance(part, type)]
    return _key("-".join([name, *inside])) or "message"


def _key_of(handler: Handler) -> str:
    return _key(handler.name) or "handler"


def _free(name: str, taken: Container[str]) -> str:
    """Return a key that is not taken."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free


def _key(name: str) -> str:
    """Return a name with the characters that AsyncAPI's keys may have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_")
