"""Reads from annotations what each parameter of a handler gets."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias

from consumer.core import decode
from consumer.core.errors import RegistrationError
from consumer.core.message import Message

Function: TypeAlias = Callable[..., Awaitable[Any]]
Wrong: TypeAlias = Callable[[str], RegistrationError]  # problem -> the error, which names the handler


@dataclasses.dataclass(frozen=True, slots=True)
class Resource:
    """A parameter that the lifespan fills, by its annotation or its name."""

    name: str
    annotation: Any


@dataclasses.dataclass(frozen=True, slots=True)
class OrmSession:
    """A parameter that is filled with a session of SQLAlchemy."""

    kind: Any


def call_plan(
    function: Function, batch: int | None, tx_type: type, wrong: Wrong
) -> tuple[tuple[str | Resource | OrmSession, ...], Any, bool]:
    """Return the call plan of a handler.

    What each parameter is filled with, the declared type of the value, and whether it is a Message.
    """
    hints = hints_of(function, wrong)
    plan: list[str | Resource | OrmSession] = []
    declared: Any = inspect.Parameter.empty
    wants_message = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY):
            raise wrong(f"parameter {parameter.name!r}: use plain positional parameters, each with an annotation")
        hint = hints.get(parameter.name, inspect.Parameter.empty)
        if hint is inspect.Parameter.empty:
            raise wrong(f"parameter {parameter.name!r} has no annotation: the annotation says what to fill it with")
        bare = decode.bare(hint)
        parts = [part for part in decode.members(bare) if part is not type(None)]
        if bare is tx_type or parts == [tx_type]:
            if "tx" in plan:
                raise wrong("asks for two Tx: there is one transaction")
            plan.append("tx")
            continue
        item = _list_item(bare) if batch is not None and declared is inspect.Parameter.empty else None
        if batch is not None and declared is inspect.Parameter.empty:
            if item is None:
                raise wrong(f"batch= hands over a list: annotate {parameter.name!r} as list[T]")
            hint, bare = item, decode.bare(item)
        message_type = _message_value(bare)
        if declared is inspect.Parameter.empty:
            if _is_session(bare):
                raise wrong(f"takes {parameter.name!r}, a session, in place of the payload: put the payload before it")
            wants_message = message_type is not None
            declared = message_type if message_type is not None else hint
            plan.append("message" if wants_message else "value")
        elif message_type is not None:
            raise wrong("asks for the message twice: Message[T] holds the value as .value")
        else:
            kind = parts[0] if len(parts) == 1 else bare
            plan.append(OrmSession(kind) if _is_session(kind) else Resource(parameter.name, bare))
    if declared is inspect.Parameter.empty:
        raise wrong("takes no message: its first parameter is the payload, for example `payment: Payment`")
    return tuple(plan), declared, wants_message


def _is_session(hint: Any) -> bool:
    """Whether this is an AsyncSession of SQLAlchemy or SQLModel."""
    return isinstance(hint, type) and any(
        base.__name__ == "AsyncSession" and base.__module__.startswith("sqlalchemy.") for base in hint.__mro__
    )


def is_sqlalchemy(hint: Any) -> bool:
    """Whether this is a class of SQLAlchemy."""
    return isinstance(hint, type) and hint.__module__.startswith("sqlalchemy.")


def hints_of(function: Function, wrong: Wrong) -> dict[str, Any]:
    """Return the annotations of a function. Raises what `wrong` returns."""
    inner = inspect.unwrap(function)
    closure: dict[str, Any] = {}
    if inspect.isfunction(inner):
        for name, cell in zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True):
            with suppress(ValueError):  # a name of the enclosing function that has no value yet, such as this handler's
                closure[name] = cell.cell_contents
    try:
        return typing.get_type_hints(inner, localns=closure, include_extras=True)
    except NameError as error:
        raise wrong(f"annotation not found: {error}. Types of a handler must be at the top of its module") from None
    except Exception as error:
        raise wrong(f"annotation that is no type: {error}") from None


def _list_item(hint: Any) -> Any | None:
    if hint is list:
        return dict
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else None


def _message_value(hint: Any) -> Any | None:
    """T of Message[T]; bytes for a bare Message; None for anything else."""
    if hint is Message:
        return bytes
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Message else None
