"""What Kafka Connect and Debezium encode in numbers, text and bytes.

Pure. The types are named in a schema ("connect.name" in Avro, "name" in JSON); see the section on data types of a
connector's page in Debezium's documentation. Times that a column stores without a zone have none here; Connect's own
Timestamp is an instant, in UTC.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from consumer.core.models import Unfit

_EPOCH = datetime(1970, 1, 1)  # without a zone, as the columns are
UNSENT = "__debezium_unavailable_value"  # of a column that was not changed, and that the database did not log


def decimal_of(raw: object, scale: int) -> Decimal:
    """Return a Decimal of its unscaled value.

    raw: bytes, base64 or an int. Raises Unfit.
    """
    if isinstance(raw, Decimal):
        return raw
    if isinstance(raw, str):
        raw = bytes_of(raw)
    unscaled = int.from_bytes(raw, "big", signed=True) if isinstance(raw, bytes) else raw
    if not isinstance(unscaled, int) or isinstance(unscaled, bool):
        raise Unfit("a decimal is neither bytes nor a number")
    digits = tuple(map(int, str(abs(unscaled))))  # not scaleb(), which rounds
    return Decimal((int(unscaled < 0), digits, -scale))


def bytes_of(value: object) -> bytes:
    """Return bytes of base64. Raises Unfit."""
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(str(value), validate=True)
    except ValueError:
        raise Unfit("bytes that are not base64") from None


def _moment(per_second: int) -> Callable[[Any], Any]:
    def moment(value: int) -> datetime:
        return _EPOCH + _duration(value, per_second)

    return moment


def _clock(per_second: int) -> Callable[[Any], Any]:
    def clock(value: int) -> time:
        passed = _duration(value, per_second)
        if not timedelta(0) <= passed < timedelta(days=1):
            raise Unfit("a time of day that is not within a day; declare the column as int")
        return (_EPOCH + passed).time()

    return clock


def _duration(value: int, per_second: int) -> timedelta:
    if per_second > 10**6:
        value, lost = divmod(value, per_second // 10**6)
        if lost:
            raise Unfit("a time with nanoseconds, which Python's types would round; declare the column as int")
        per_second = 10**6
    return timedelta(microseconds=value * (10**6 // per_second))


def _day(value: int) -> date:
    return (_EPOCH + timedelta(days=value)).date()


def _zoned(value: str) -> datetime:
    return datetime.fromisoformat(value)


def _zoned_time(value: str) -> time:
    return time.fromisoformat(value)


def _variable_decimal(value: Mapping[str, Any]) -> Decimal:
    return decimal_of(value["value"], value["scale"])


DECIMAL = "org.apache.kafka.connect.data.Decimal"
VARIABLE_DECIMAL = "io.debezium.data.VariableScaleDecimal"
_MEANINGS: dict[str, Callable[[Any], Any]] = {
    "io.debezium.time.Date": _day,
    "io.debezium.time.Time": _clock(1000),
    "io.debezium.time.MicroTime": _clock(10**6),
    "io.debezium.time.NanoTime": _clock(10**9),
    "io.debezium.time.Timestamp": _moment(1000),
    "io.debezium.time.MicroTimestamp": _moment(10**6),
    "io.debezium.time.NanoTimestamp": _moment(10**9),
    "io.debezium.time.ZonedTimestamp": _zoned,
    "io.debezium.time.ZonedTime": _zoned_time,
    "io.debezium.time.MicroDuration": lambda value: _duration(value, 10**6),
    "org.apache.kafka.connect.data.Date": _day,
    "org.apache.kafka.connect.data.Time": _clock(1000),
    "org.apache.kafka.connect.data.Timestamp": lambda value: _moment(1000)(value).replace(tzinfo=UTC),
    VARIABLE_DECIMAL: _variable_decimal,
}
NAMES = frozenset({*_MEANINGS, DECIMAL})


def meaning(name: str) -> Callable[[Any], Any] | None:
    """Return what converts a value of a named type.

    None for types that are as they seem.

    It raises Unfit, also for a value that Python's type cannot hold.
    """
    convert = _MEANINGS.get(name)
    if convert is None:
        return None

    def checked(value: Any) -> Any:
        try:
            return convert(value)
        except Unfit:
            raise
        except Exception:
            raise Unfit(f"a value that is no {name.rpartition('.')[2]} of years 1 to 9999") from None

    return checked
