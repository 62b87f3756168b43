"""Debezium's change events, as JSON with or without schemas, or as Avro.

Pure. With a schema in each message (``schemas.enable=true``), or as Avro, decimals, times and bytes get their values.
Without one, JSON is read as the handler's type says: let the connector send decimals as text
(``decimal.handling.mode=string``). Limitations: events that a transformation has unwrapped are no envelopes any more:
drop ``decode=`` for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import msgspec

from consumer.core.identity import own_id
from consumer.core.message import Record
from consumer.core.models import Unfit
from consumer.core.record_decoding import RecordDecoder
from consumer.core.values import canonical
from consumer.decoders.connect_types import DECIMAL, UNSENT, bytes_of, decimal_of, meaning
from consumer.decoders.envelopes import Change

_OPS = ("c", "u", "d", "r", "t")
_SCHEMAS_MAX = 1000  # kept; a topic has few at a time
_read_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_read_tree = msgspec.json.Decoder(float_hook=Decimal).decode
_UNSENT = f'"{UNSENT}"'.encode()
_NO_CHANGE = "no change of Debezium: no 'op' with 'before', 'after' and 'source'; "
_UNWRAPPED = "for events that ExtractNewRecordState has unwrapped, drop decode=Debezium() and declare the row"

_NULL = msgspec.Raw(b"null")

Plan = Callable[[Any], Any]


class Debezium:
    """Decodes Debezium's envelopes to `Change[T]`.

    - of: the decoder of the envelope, such as ``Avro()``; by default JSON.

    Annotate `Change[T] | None`: after each delete Debezium sends a null value (a tombstone), which is None.
    Register with ``message_id="field:id"``: a connector sends changes again after it was stopped.
    """

    envelope = Change

    def __init__(self, of: RecordDecoder | None = None) -> None:
        self.inner = of
        self._plans: dict[bytes, dict[str, Plan | None]] = {}

    @staticmethod
    def fault_of_type(contents: Any, takes_none: bool) -> str | None:
        """Return what is wrong with an annotation."""
        if takes_none:
            return None
        name = getattr(contents, "__name__", "T")
        return f"Debezium sends a null value after each delete; annotate Change[{name}] | None, and return for None"

    def decode(self, record: Record) -> Change[Any] | None:
        """Return the change. Raises Unfit."""
        if self.inner is not None:
            return self._of_tree(self.inner.decode(record))
        try:
            message = _read_object(record.value or b"")
        except msgspec.MsgspecError:
            raise Unfit("no JSON object; for Avro, write decode=Debezium(Avro())") from None
        plans: Mapping[str, Plan | None] = {}
        if message.keys() == {"schema", "payload"}:
            plans = self._plans_of(bytes(message["schema"]))
            try:
                message = _read_object(message["payload"])
            except msgspec.MsgspecError:
                raise Unfit(f"{_NO_CHANGE}{_UNWRAPPED}") from None
        if "op" not in message or "source" not in message:
            raise Unfit(f"{_NO_CHANGE}{_UNWRAPPED}")
        op, source = _op(msgspec.json.decode(message["op"])), msgspec.json.decode(message["source"])
        before, after = message.get("before", _NULL), message.get("after", _NULL)
        return Change(
            id=_id_of(source, op, b"%s %s" % (bytes(before), bytes(after))),
            op=op,
            before=_row(before, plans.get("before")),
            after=_row(after, plans.get("after")),
            source=source,
            ts_ms=_optional(message.get("ts_ms")),
            transaction=_optional(message.get("transaction")),
        )

    def schema_needed(self, record: Record) -> Any:
        """Return which schema the envelope needs; None where none."""
        ask = getattr(self.inner, "schema_needed", None)
        return None if ask is None else ask(record)

    def _plans_of(self, raw: bytes) -> dict[str, Plan | None]:
        plans = self._plans.get(raw)
        if plans is None:
            if len(self._plans) >= _SCHEMAS_MAX:
                self._plans.clear()
            schema = msgspec.json.decode(raw)
            fields = schema.get("fields") if isinstance(schema, dict) else None
            plans = {
                field["field"]: _plan(field)
                for field in fields or ()
                if isinstance(field, dict) and field.get("field") in ("before", "after")
            }
            self._plans[raw] = plans
        return plans

    def _of_tree(self, tree: object) -> Change[Any]:
        if not isinstance(tree, dict) or "op" not in tree or not isinstance(tree.get("source"), dict):
            raise Unfit(f"{_NO_CHANGE}{_UNWRAPPED}")
        op, before, after = _op(tree["op"]), tree.get("before"), tree.get("after")
        return Change(
            id=_id_of(tree["source"], op, canonical([before, after])),
            op=op,
            before=_sent(before),
            after=_sent(after),
            source=tree["source"],
            ts_ms=tree.get("ts_ms"),
            transaction=tree.get("transaction"),
        )


def _op(op: object) -> Any:
    if op not in _OPS:
        raise Unfit("an operation that is no change of a row; filter such events out with a transformation")
    return op


def _optional(raw: msgspec.Raw | None) -> Any:
    return None if raw is None else msgspec.json.decode(raw)


def _row(raw: msgspec.Raw, plan: Plan | None) -> Any:
    """Return a row.

    JSON that is not read yet where nothing in it needs a schema.
    """
    if bytes(raw) == b"null":
        return None
    if plan is not None:
        return _sent(plan(_read_tree(raw)))
    body = bytes(raw)
    if _UNSENT in body:
        body = msgspec.json.encode(
            {name: value for name, value in _read_object(body).items() if bytes(value) != _UNSENT}
        )
    return msgspec.Raw(body)


def _sent(row: Any) -> Any:
    """Return a row without the columns that were not sent.

    The placeholder must never be stored: a column that may be absent needs a default in the type.
    """
    if isinstance(row, dict) and any(
        value in (UNSENT, UNSENT.encode()) for value in row.values() if value.__class__ in (str, bytes)
    ):
        return {name: value for name, value in row.items() if value not in (UNSENT, UNSENT.encode())}
    return row


def _plan(schema: Any) -> Plan | None:
    """Return what converts a value of a Connect schema.

    None where nothing does.

    Numbers with a point arrive as Decimals.
    """
    if not isinstance(schema, dict):
        return None
    convert = _named(schema) or _unnamed(schema)
    if convert is None:
        return None
    return lambda value: None if value is None else convert(value)


def _named(schema: dict[str, Any]) -> Plan | None:
    name = schema.get("name")
    if name == DECIMAL:
        try:
            scale = int(schema.get("parameters", {}).get("scale", 0))
        except ValueError:
            raise Unfit("a schema whose decimal has no scale") from None
        return lambda value: decimal_of(value, scale)
    return meaning(name) if isinstance(name, str) else None


def _unnamed(schema: dict[str, Any]) -> Plan | None:
    match schema.get("type"):
        case "bytes":
            return bytes_of
        case "float" | "double" | "float32" | "float64":
            return float
        case "array":
            inner = _plan(schema.get("items"))
            return None if inner is None else lambda values: [inner(value) for value in values]
        case "struct":
            plans = {field.get("field"): _plan(field) for field in schema.get("fields", ()) if isinstance(field, dict)}
            plans = {name: plan for name, plan in plans.items() if plan is not None}
            return None if not plans else lambda row: _converted(row, plans)
        case _:
            return None


def _converted(row: Any, plans: Mapping[Any, Plan | None]) -> Any:
    if not isinstance(row, dict):
        raise Unfit("a row that is no object, which its schema says it is")
    for name, value in row.items():
        plan = plans.get(name)
        if plan is not None and value is not None and value != UNSENT:
            try:
                row[name] = plan(value)
            except Unfit:
                raise
            except Exception:
                raise Unfit("a value that is not of its schema's type") from None
    return row


# The fields of `source` that say where a change is in the log of the database.
_PLACES = {
    "postgresql": ("db", "schema", "table", "lsn", "txId"),
    "mysql": ("db", "table", "server_id", "file", "pos", "row"),
    "mariadb": ("db", "table", "server_id", "file", "pos", "row"),
}


def _id_of(source: Any, op: str, rows: bytes) -> bytes | None:
    """Return what identifies a change, as its connector sends it again.

    rows: before and after. One place in PostgreSQL's log has several changes where rows were inserted together.
    """
    names = _PLACES.get(source.get("connector", "")) if isinstance(source, dict) else None
    if names is None:
        return None
    places = canonical([source.get(name) for name in ("connector", "name", *names)])
    return own_id(b"debezium", places + op.encode() + rows)
