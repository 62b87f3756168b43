"""The option ``encode=``: what a published value becomes.

Pure. An encoder is a function of the topic and the value, or an object with a method `encode`. Without one, values become
JSON (record.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from consumer.core.errors import RegistrationError, TransactionMisuse
from consumer.core.models import Unfit
from consumer.outbox.record import Headers, HeadersArgument, checked_headers, encoded_value

Encoded: TypeAlias = bytes | tuple[bytes | None, HeadersArgument]
EncodeFunction: TypeAlias = Callable[[str, Any], Encoded]


@runtime_checkable
class RecordEncoder(Protocol):
    """Encodes values.

    `encode` waits for nothing, and raises Unfit, or anything, for a value that it cannot encode.
    """

    def encode(self, topic: str, value: Any) -> Encoded: ...


EncodeOption: TypeAlias = RecordEncoder | EncodeFunction | None


def encode_function(option: Any) -> EncodeFunction | None:
    """Return the function of an option; None for JSON. Raises RegistrationError."""
    if option is None or getattr(option, "is_plain_json", False) is True:
        return None
    if isinstance(option, type):
        raise RegistrationError(f"encode={option.__name__}: a class; write encode={option.__name__}()")
    function = option.encode if isinstance(option, RecordEncoder) else option
    if not callable(function) or isinstance(option, str | bytes):
        raise RegistrationError(
            f"encode={option!r}: not understood; give an encoder such as CloudEvents(), or a plain function of the topic "
            "and the value"
        )
    if inspect.iscoroutinefunction(function):
        raise RegistrationError(
            "encode=: an `async def` function, and encoding must not wait; give a plain function of the topic and the value"
        )
    return function


def encoded(
    topic: str, value: Any, headers: HeadersArgument, encode: EncodeFunction | None
) -> tuple[bytes | None, Headers]:
    """Return the bytes and the headers of a record.

    bytes and None stay as they are. A header that the caller gives wins over the encoder's of that name. Raises
    TransactionMisuse.
    """
    own = checked_headers(headers)
    if encode is None:
        return encoded_value(value), own
    if value is None or isinstance(value, bytes | bytearray | memoryview):
        return encoded_value(value), own
    try:
        result = encode(topic, value)
    except TransactionMisuse:
        raise
    except Exception as error:
        what = (
            str(error)
            if isinstance(error, Unfit)
            else f"it raised {type(error).__name__}: give what it takes, or bytes"
        )
        raise TransactionMisuse(f"publish: encode= cannot encode a {type(value).__name__}; {what}") from error
    match result:
        case bytes():
            return result, own
        case (bytes() | None as body, added):
            names = {name for name, _ in own}
            return body, own + tuple(pair for pair in checked_headers(added) if pair[0] not in names)
        case _:
            raise TransactionMisuse(
                f"publish: encode= returned {type(result).__name__}; return bytes, or bytes and headers"
            )
