"""The option ``decode=``: how the value of a record is read.

A decoder is a function of the record, or an object with a method `decode`. What it returns is converted to the type
that the handler declares; `msgspec.Raw` holds JSON that is not read yet. Without the option a payload is JSON, and
nothing here runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self, TypeAlias, get_args, get_origin, runtime_checkable

import msgspec

from consumer.core import decode
from consumer.core.constraints import check, is_pydantic
from consumer.core.errors import RegistrationError, RunAgain, Unreadable
from consumer.core.message import Record
from consumer.core.models import Model, Unfit
from consumer.core.outcome import Reason
from consumer.core.values import not_finite

Read: TypeAlias = Callable[[Record], Any]
Convert: TypeAlias = Callable[[object], Any]


@runtime_checkable
class RecordDecoder(Protocol):
    """Decodes records.

    `decode` is pure, and raises Unfit, or anything, for a record that it cannot read.
    """

    def decode(self, record: Record) -> object: ...


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """A value that wraps contents of the type that the handler declares.

    Its class is generic in that type. decoded_by: the decoder that builds it, for errors.
    """

    decoded_by: ClassVar[str]

    def with_contents(self, convert: Convert) -> Self:
        """Return a copy with converted contents. Raises what convert raises."""
        raise NotImplementedError


DecodeOption: TypeAlias = RecordDecoder | Callable[[Record], object] | None


def check_option(option: object) -> None:
    """Raise RegistrationError for what is no decoder."""
    if option is None or (isinstance(option, RecordDecoder) and not isinstance(option, type)):
        return
    if isinstance(option, type):
        raise RegistrationError(f"decode={option.__name__}: a class; write decode={option.__name__}()")
    if not callable(option):
        raise RegistrationError(
            f"decode={option!r}: not understood; give a decoder such as CloudEvents(), or a plain function of the record"
        )
    if inspect.iscoroutinefunction(option):
        raise RegistrationError(
            "decode=: an `async def` function, and decoding must not wait; give a plain function of the record"
        )


def is_json(option: object) -> bool:
    """Return whether an option means the JSON that is decoded without one."""
    return option is None or getattr(option, "is_plain_json", False) is True


def check_plain(declared: Any) -> None:
    """Raise RegistrationError for a type that JSON alone is not decoded to."""
    check_envelope(envelope_in(declared), None, "")


def reader(option: Any, declared: Any, *, allow_nan: bool) -> tuple[Read, bool]:
    """Return a function that reads a record.

    And whether it takes null values.

    The function raises Unreadable. Raises RegistrationError for a type that does not fit the decoder.
    """
    read: Callable[[Record], object] = option.decode if isinstance(option, RecordDecoder) else option
    envelope = envelope_in(declared)
    check_envelope(envelope, getattr(option, "envelope", None), type(option).__name__)
    takes_none = decode.takes_none(declared)
    if envelope is None:
        check(declared)
        return _reader(read, converter(declared, allow_nan=allow_nan), takes_none, reads_null=False), takes_none
    contents = contents_of(declared)
    check(contents)
    convert_contents = converter(contents, allow_nan=allow_nan)
    fault: str | None = getattr(option, "fault_of_type", lambda contents, takes_none: None)(contents, takes_none)
    if fault is not None:
        raise RegistrationError(fault)

    def convert(value: object) -> Any:
        if not isinstance(value, envelope):
            raise Unfit(f"decode= returned {type(value).__name__}, and the handler takes {envelope.__name__}")
        return value.with_contents(convert_contents)

    reads_null = bool(getattr(option, "reads_null", False))
    takes_null = takes_none or (reads_null and decode.takes_none(contents))
    return _reader(read, convert, takes_none, reads_null), takes_null


def schema_question(option: object) -> Callable[[Record], Any] | None:
    """Return what says which schema a record needs.

    None for decoders that read no registry.
    """
    part: Any = option
    while part is not None and not getattr(part, "reads_registry", False):
        part = getattr(part, "inner", None)
    return None if part is None else getattr(option, "schema_needed", None)


def check_envelope(declared: type[Envelope] | None, decoded: type[Envelope] | None, name: str) -> None:
    """Raise RegistrationError where annotation and decoder do not fit."""
    if declared is decoded:
        return
    if decoded is None:
        assert declared is not None
        by = declared.decoded_by
        raise RegistrationError(
            f"{declared.__name__}[T]: what {by} decodes to; add decode={by}, from consumer.decoders"
        )
    raise RegistrationError(f"decode={name}(): decodes to {decoded.__name__}[T]; annotate the payload with that")


def envelope_in(declared: Any) -> type[Envelope] | None:
    """Return the class of CloudEvent[T], or of CloudEvent[T] | None; else None."""
    kind = _not_none(declared)
    origin = get_origin(kind) or kind
    return origin if isinstance(origin, type) and issubclass(origin, Envelope) else None


def contents_of(declared: Any) -> Any:
    """Return T of CloudEvent[T]; Any for a bare one."""
    arguments = get_args(_not_none(declared))
    return arguments[0] if arguments else Any


def _not_none(declared: Any) -> Any:
    """Return T of T | None."""
    parts = [part for part in decode.members(declared) if part is not type(None)]
    return decode.bare(parts[0] if len(parts) == 1 else declared)


def _reader(read: Callable[[Record], object], convert: Convert, takes_none: bool, reads_null: bool) -> Read:
    def value_of(record: Record) -> Any:
        if record.value is None and not reads_null:
            value = None
        else:
            try:
                value = read(record)
            except (Unreadable, RunAgain):
                raise
            except Exception as error:  # a decoder of the application may raise anything
                raise Unreadable(Reason.UNREADABLE, f"decode=: {decode.explain(error)}") from error
        if value is None and record.value is None:
            if not takes_none:
                raise Unreadable(Reason.NO_VALUE, "a null value, and the handler does not take None")
            return None
        try:
            return convert(value)
        except Unreadable:
            raise
        except Exception as error:
            raise Unreadable(Reason.UNREADABLE, decode.explain(error)) from error

    return value_of


def converter(declared: Any, *, allow_nan: bool) -> Convert:
    """Return a function that converts decoded values to `declared`.

    Raises RegistrationError for a type that nothing can be converted to.
    """
    from_json = decode.decoder(declared, allow_nan=allow_nan)
    convert = _converter(declared, allow_nan)

    def read(value: object) -> Any:
        if type(value) is not msgspec.Raw:
            return convert(value)
        raw = bytes(value)
        try:
            return from_json(raw)
        except Exception as error:
            return decode.read_again(from_json, raw, error)

    return read


def _converter(declared: Any, allow_nan: bool) -> Convert:
    parts = [part for part in decode.members(declared) if part is not type(None)] or [declared]
    if any(is_pydantic(decode.bare(part)) for part in parts):
        convert = Model(declared, allow_nan=allow_nan).from_value
    else:
        inner: dict[Any, Model] = {}

        def with_model(kind: Any, value: Any) -> Any:
            if isinstance(value, kind):
                return value
            if kind not in inner:
                if not is_pydantic(kind):
                    raise TypeError(kind)
                inner[kind] = Model(kind, allow_nan=allow_nan)
            return inner[kind].from_value(value)

        def convert(value: object) -> Any:
            return msgspec.convert(value, declared, dec_hook=with_model)

    def finite(value: object) -> Any:
        converted = convert(value)
        if (place := not_finite(converted)) is not None:
            raise Unfit(f"{place}: a number that is not finite; allow_nan=True of the handler would take it")
        return converted

    return convert if allow_nan else finite
