"""The option ``fingerprint=``: what is compared when an id repeats.

Knows the option and decoded values; knows no ledger. A message with the id of an earlier one is a duplicate if the
fingerprint is the same, and a conflict otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from consumer.core.errors import RegistrationError, Unreadable
from consumer.core.identity import NO_VALUE_FINGERPRINT, fingerprint
from consumer.core.outcome import Reason
from consumer.core.values import canonical

Option: TypeAlias = Literal["bytes", "value"] | Callable[[Any], object] | None


@dataclass(frozen=True, slots=True)
class FingerprintRule:
    """What is compared: the bytes, a function of the value, or nothing."""

    of_value: Callable[[Any], object] | None = None
    compares: bool = True


BYTES = FingerprintRule()
NOTHING = FingerprintRule(compares=False)


def parse_rule(option: object) -> FingerprintRule:
    """Parse the option ``fingerprint=``. Raises RegistrationError."""
    if option is None:
        return NOTHING
    if option == "bytes":
        return BYTES
    if option == "value":
        return FingerprintRule(_itself)
    if callable(option) and not isinstance(option, type) and not inspect.iscoroutinefunction(option):
        return FingerprintRule(option)
    raise RegistrationError(
        f'fingerprint={option!r}: not understood; use "bytes", "value", a plain function of the value, or None to compare nothing'
    )


def of_value(rule: FingerprintRule, value: object) -> int:
    """Return 64 signed bits of a decoded value under a rule.

    Raises Unreadable for a value, or a function's result, that cannot be compared.
    """
    if not rule.compares or rule.of_value is None or value is None:
        return NO_VALUE_FINGERPRINT
    what = "value" if rule.of_value is _itself else "function"
    try:
        compared = rule.of_value(value)
    except Exception as error:
        raise Unreadable(Reason.UNREADABLE, f"fingerprint function: {type(error).__name__}") from error
    try:
        return fingerprint(canonical(compared))
    except RecursionError:
        raise Unreadable(Reason.UNREADABLE, f"fingerprint {what}: nested too deeply to be compared") from None
    except TypeError as error:
        raise Unreadable(
            Reason.UNREADABLE,
            f"fingerprint {what}: {error} cannot be compared; let a fingerprint= function return text, numbers, or "
            "lists and dicts of them",
        ) from None
    except Exception as error:  # a property, or a container of the user's
        raise Unreadable(Reason.UNREADABLE, f"fingerprint {what}: {type(error).__name__}") from error


def _itself(value: Any) -> object:
    return value
