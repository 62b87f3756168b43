"""Declares effects: handlers that first call another system.

Checks the functions of an effect and builds its handler; calls nothing. The handler's function is the one of `.settled`,
which runs in the transaction. consumer/effects/ makes the calls before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from consumer.core import decode
from consumer.core.encode import to_json
from consumer.core.errors import RegistrationError
from consumer.core.handler import Effect, Handler, build, check_option_names, place_of
from consumer.core.handler_options import EFFECT_OPTIONS
from consumer.core.handler_signature import Function, Resource, Wrong, hints_of
from consumer.core.idempotency import idempotency_key

REMEMBERS_SECONDS_MIN = 60.0
STEP = "call"  # of the key of an effect's call


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call of another system.

    The function of an effect gets it. key: 32 hexadecimal digits to send as the idempotency key, the same ones in every
    call for one message. attempt: how many calls were begun for the message, with this one.
    """

    key: str
    attempt: int = 1


def first_key(handler: Handler, message_id: bytes) -> str:
    """Return the key of a message's calls.

    A stored intent keeps the key it has.
    """
    return idempotency_key(handler.app, handler.name, message_id, STEP)


async def nothing_more(value: object) -> None:
    """Do nothing: the handler of an effect without `.settled`."""


def build_effect(
    function: Function, topics: tuple[str, ...], remembers: object, options: Mapping[str, Any], tx_type: type
) -> Handler:
    """Check an effect's options and its call, and return its handler.

    The handler settles messages and does nothing else until `settle_with`. Raises RegistrationError.
    """
    for option in ("batch", "idempotent"):
        if option in options:
            raise RegistrationError(
                f"{place_of(function)}: {option}= is for @app.handler; leave it out, since an effect calls another system for one message, once"
            )
    check_option_names(options, EFFECT_OPTIONS, lambda problem: RegistrationError(f"{place_of(function)}: {problem}"))
    call = build(function, topics, options, Call)
    wrong = _wrong(call)
    _check_session(call)
    reply_type = hints_of(function, wrong).get("return", Ellipsis)
    if reply_type is Ellipsis:
        raise wrong("annotate what it returns: it is kept, and handed to .settled (None for nothing)")
    if reply_type is not type(None) and decode.takes_none(reply_type):
        raise wrong("what it returns cannot be optional: raise an exception where there is no result")
    try:
        decoder = _decode_null if reply_type is type(None) else decode.decoder(reply_type)
    except RegistrationError as error:
        raise wrong(f"its result: {error}") from None
    effect = Effect(call, _seconds(remembers, wrong), reply_type, encode_reply, decoder)
    handler = dataclasses.replace(
        call,
        function=nothing_more,
        parameters=("value",),
        wants_message=False,
        wants_tx=False,
        timeout=None,
        effect=effect,
    )
    call.name = f"{handler.name} call"
    return handler


def settle_with(handler: Handler, function: Function, tx_type: type) -> None:
    """Make a function the handler of an effect. Raises RegistrationError."""
    assert handler.effect is not None
    settled = _built(handler, function, tx_type)
    wrong = _wrong(settled)
    parameters = list(settled.parameters)
    reply_type = handler.effect.reply_type
    if reply_type is not type(None):
        given = parameters[1] if len(parameters) > 1 else None
        if not isinstance(given, Resource) or given.annotation != decode.bare(reply_type):
            raise wrong(f"its second parameter is the result, of the type {_name_of(reply_type)} that the call returns")
        parameters[1] = "reply"
    handler.function, handler.parameters = function, tuple(parameters)
    handler.wants_message, handler.wants_tx = settled.wants_message, settled.wants_tx


def ask_with(handler: Handler, function: Function) -> None:
    """Make a function the one that asks what was done. Raises RegistrationError."""
    effect = handler.effect
    assert effect is not None
    asking = _built(handler, function, Call)
    wrong = _wrong(asking)
    _check_session(asking)
    if effect.reply_type is type(None):
        raise wrong("the call returns nothing, so no answer could mean that it was done; let the call return a result")
    answer = hints_of(function, wrong).get("return", Ellipsis)
    if type(None) not in decode.members(answer) or effect.reply_type not in decode.members(answer):
        raise wrong(f"it returns {_name_of(effect.reply_type)} | None, where None means that nothing was done")
    asking.name = f"{handler.name} unsure"
    effect.unsure = asking


def _built(handler: Handler, function: Function, tx_type: type) -> Handler:
    options = {
        "name": handler.name,
        "allow_nan": handler.allow_nan,
        "decode": handler.decode,
        "topics": handler.pattern,
    }
    built = build(function, handler.named_topics, options, tx_type)
    if built.value_type != handler.value_type:
        raise _wrong(built)(f"its first parameter has the type that the call takes, {_name_of(handler.value_type)}")
    return built


def _check_session(call: Handler) -> None:
    if call.wants_session:
        raise _wrong(call)("a call has no transaction, so no session; let .settled take it")


def _wrong(handler: Handler) -> Wrong:
    def wrong(problem: str) -> RegistrationError:
        return RegistrationError(f"{handler.place}: effect {handler.name!r}: {problem}")

    return wrong


def _name_of(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def _seconds(remembers: object, wrong: Wrong) -> float:
    """Return for how long the other system knows a key.

    remembers: a timedelta, or 0.
    """
    if remembers == 0 and not isinstance(remembers, bool):
        return 0.0
    total = getattr(remembers, "total_seconds", None)
    seconds = float(total()) if total is not None else -1.0
    if seconds != 0 and seconds < REMEMBERS_SECONDS_MIN:
        raise wrong(
            "remembers= is for how long the other system knows a key, a timedelta of at least a minute; "
            "0 where it knows none, so that it is called at most once"
        )
    return seconds


# -- results as the database keeps them -----------------------------------------------------------------------------


def encode_reply(value: Any) -> bytes:
    """Return a result as bytes; anything but bytes and text becomes JSON.

    Raises TypeError or another exception for what JSON cannot hold.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    return to_json(value)


def _decode_null(raw: bytes) -> None:
    if raw != b"null":
        raise ValueError("a result was kept, and the call returns none now")
