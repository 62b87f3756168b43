"""A registered handler: its options, checked, and its call plan, compiled once.

handler_signature.py reads the plan from the annotations. Knows no connection. Resources (the lifespan's) are bound when the worker starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from consumer.core import constraints, decode, fingerprint, identity, record_decoding, topic_names
from consumer.core.errors import CallNotMade, RegistrationError
from consumer.core.handler_options import HANDLER_OPTIONS
from consumer.core.handler_signature import Function, OrmSession, Resource, Wrong, call_plan, is_sqlalchemy
from consumer.core.message import Record
from consumer.core.retry import Retry

Call: TypeAlias = Callable[[Any, Any, Any], Awaitable[object]]  # (value, message, tx)

ORDERS = ("key", "partition", "none")
_NAME = re.compile(r"[^\s\x00-\x1f]{1,200}")


@dataclasses.dataclass(slots=True, eq=False)
class Effect:
    """What an effect does before its handler runs: it calls another system.

    call, unsure: their functions take a `Call` in the place of a Tx. remembers: seconds for which the other system
    knows a key. encode, decode: its reply as the database keeps it.
    """

    call: Handler
    remembers: float
    reply_type: Any
    encode: Callable[[Any], bytes]
    decode: decode.Decoder
    unsure: Handler | None = None


@dataclasses.dataclass(slots=True, eq=False)
class Handler:
    """One handler of an App.

    `number` is its place in the ledger, known once the worker has read it. `topics` are those that it names, and those that
    `pattern` matches among those that `discover` got.
    """

    name: str
    topics: tuple[str, ...]
    function: Function
    place: str  # file:line, for errors
    rule: identity.IdRule
    fingerprint: fingerprint.FingerprintRule
    order: str
    concurrency: int
    batch: int | None
    retry: Retry
    timeout: float | None  # seconds of one call; 0 without a limit, None as the settings say
    idempotent: bool
    value_type: Any
    decoder: decode.Decoder
    takes_none: bool
    wants_message: bool
    wants_tx: bool
    # "value" | "message" | "tx" | "reply" | Resource | OrmSession, in the order of the signature
    parameters: tuple[str | Resource | OrmSession, ...]
    call: Call | None = None  # set by bind()
    open_session: Callable[[Any, Any], Any] | None = None  # where it takes one: from a Tx and the session's class
    number: int = -1
    allow_nan: bool = False
    version: str | None = None  # of its code, as the user names it
    codes: tuple[str, str] | None = None  # fingerprints of its code, once they were computed
    app: str = ""  # its App's name, part of the ids of what it publishes
    publishes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # its App's: topic -> bytes of a record
    effect: Effect | None = None  # of a handler that gets the reply of another system
    decode: record_decoding.DecodeOption = None  # the option; None for JSON
    read: record_decoding.Read | None = None  # from a record to its value, in place of `decoder`
    schema_needed: Callable[[Record], Any] | None = None  # which schema a record needs that is not fetched yet
    encode: Callable[[str, Any], Any] | None = None  # its App's, for what it publishes
    named_topics: tuple[str, ...] = ()
    pattern: topic_names.Pattern | None = None

    def discover(self, topics: Iterable[str]) -> None:
        """Take those of the topics that the pattern matches."""
        if self.pattern is not None:
            new = {topic for topic in topics if topic_names.matches(self.pattern, topic)}.difference(self.topics)
            self.topics += tuple(sorted(new))

    @property
    def selection(self) -> topic_names.TopicSelection:
        """Its names and its pattern."""
        return topic_names.TopicSelection(self.named_topics, [] if self.pattern is None else [self.pattern])

    def wrong(self, problem: str) -> RegistrationError:
        """Return an error that names the place of the handler."""
        return RegistrationError(f"{self.place}: handler {self.name!r}: {problem}")

    def bind(self, resources: Mapping[str, object]) -> None:
        """Compile the call, with the lifespan's resources.

        Raises RegistrationError for a missing one.
        """
        kinds: list[str | object] = []
        for parameter in self.parameters:
            kinds.append(_Bound(self._find(parameter, resources)) if isinstance(parameter, Resource) else parameter)
        self.call = (
            _compile(self.function, kinds, self.effect) if self.open_session is None else self._with_session(kinds)
        )
        if self.effect is not None:
            for other in (self.effect.call, self.effect.unsure):
                if other is not None:
                    other.bind(resources)

    @property
    def wants_session(self) -> bool:
        return any(isinstance(parameter, OrmSession) for parameter in self.parameters)

    def _with_session(self, kinds: list[Any]) -> Call:
        """Return a call in a session that ends with it."""
        [kind] = [kind.kind for kind in kinds if isinstance(kind, OrmSession)]
        open_session = self.open_session
        assert open_session is not None

        async def call(value: Any, message: Any, tx: Any) -> object:
            async with open_session(tx, kind) as session:
                given = _given(value, message, tx, self.effect)
                arguments = [
                    kind.value if isinstance(kind, _Bound) else session if isinstance(kind, OrmSession) else given[kind]
                    for kind in kinds
                ]
                return await self.function(*arguments)

        return call

    def _find(self, wanted: Resource, resources: Mapping[str, object]) -> object:
        if isinstance(wanted.annotation, type):
            try:
                fitting = [value for value in resources.values() if isinstance(value, wanted.annotation)]
            except TypeError:  # a Protocol, a TypedDict, Any: isinstance does not work
                fitting = []
            if len(fitting) == 1:
                return fitting[0]
        if wanted.name in resources:
            return resources[wanted.name]
        has = ", ".join(sorted(resources)) or "nothing"
        action = f'yield {{"{wanted.name}": …}} from the App\'s lifespan'
        if is_sqlalchemy(wanted.annotation):
            action = f"annotate it as AsyncSession for a session on the message's transaction, or {action}"
        raise RegistrationError(
            f"{self.place}: handler {self.name!r} asks for {wanted.name!r}, and the lifespan yields {has}; {action}"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Bound:
    value: object


def _compile(function: Function, kinds: list[Any], effect: Effect | None) -> Call:
    """Return a call; without a loop for the usual signatures."""
    match [] if effect is not None else kinds:
        case ["value"]:
            return lambda value, message, tx: function(value)
        case ["value", "tx"]:
            return lambda value, message, tx: function(value, tx)
        case ["message"]:
            return lambda value, message, tx: function(message)
        case ["message", "tx"]:
            return lambda value, message, tx: function(message, tx)
        case _:
            pass

    def call(value: Any, message: Any, tx: Any) -> Awaitable[object]:
        given = _given(value, message, tx, effect)
        return function(*[kind.value if isinstance(kind, _Bound) else given[kind] for kind in kinds])

    return call


def _given(value: Any, message: Any, tx: Any, effect: Effect | None) -> dict[str, Any]:
    """Return what parameters are filled with.

    The handler of an effect never runs without the other system's reply: raises CallNotMade.
    """
    given = {"value": value, "message": message, "tx": tx}
    if effect is not None:
        raw = tx.subject.reply
        if raw is None:
            raise CallNotMade("the other system was not called; a worker calls it")
        given["reply"] = effect.decode(raw)
    return given


def place_of(function: object) -> str:
    """Return file:line of a function, for errors."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def build(function: Function, topics: tuple[str, ...], options: Mapping[str, Any], tx_type: type) -> Handler:
    """Check a handler's options and signature, and return the handler.

    Raises RegistrationError, which names the place and what to write instead.
    """
    place = place_of(function)
    name = options.get("name")
    if name is None:
        name = getattr(function, "__name__", "")

    def wrong(problem: str) -> RegistrationError:
        return RegistrationError(f"{place}: handler {name!r}: {problem}")

    check_option_names(options, HANDLER_OPTIONS, wrong)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise wrong("name= must be text of 1 to 200 characters without spaces")
    _check_surrogates((name, *topics), place)
    pattern = topic_names.check_topics(topics, options.get("topics"), wrong)
    if not inspect.iscoroutinefunction(inspect.unwrap(function)):
        raise wrong("must be an `async def` function")
    order = _order(options, wrong)
    concurrency, batch = _concurrency_and_batch(options, wrong)
    retry, timeout = _retry(options, wrong), _timeout(options, wrong)
    idempotent, allow_nan = _flag(options, "idempotent", True, wrong), _flag(options, "allow_nan", False, wrong)
    version = _version(options, wrong)
    rule, compared = _rules(options, idempotent, wrong)
    parameters, value_type, wants_message = call_plan(function, batch, tx_type, wrong)
    _check_tx(parameters, idempotent, wrong)
    if isinstance(rule, identity.FieldId):
        _check_field(rule.path[0], value_type, wrong)
    decoder, read, takes_null = _decoders(options, value_type, allow_nan, wrong)
    return Handler(
        name=name,
        topics=topics,
        function=function,
        place=place,
        rule=rule,
        fingerprint=compared,
        order=order,
        concurrency=concurrency,
        batch=batch,
        retry=retry,
        timeout=timeout,
        idempotent=idempotent,
        value_type=value_type,
        decoder=decoder,
        takes_none=takes_null,
        wants_message=wants_message,
        wants_tx="tx" in parameters,
        parameters=parameters,
        allow_nan=allow_nan,
        version=version,
        decode=options.get("decode"),
        read=read,
        schema_needed=record_decoding.schema_question(options.get("decode")),
        named_topics=topics,
        pattern=pattern,
    )


def check_option_names(options: Iterable[str], known: Sequence[str], wrong: Wrong) -> None:
    """Refuse an unknown option; name the one that was meant."""
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            raise wrong(
                f"unknown option {option!r}"
                + (f", did you mean {near[0]!r}?" if near else "")
                + f" (there are: {', '.join(known)})"
            )


def _check_surrogates(texts: tuple[object, ...], place: str) -> None:
    for text in texts:
        if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
            raise RegistrationError(
                f"{place}: {text.encode('ascii', 'backslashreplace').decode()}: a lone surrogate, which UTF-8 cannot write; leave it out"
            )


def _order(options: Mapping[str, Any], wrong: Wrong) -> str:
    order = options.get("order", "key")
    if order not in ORDERS:
        raise wrong(f"order={order!r}: one of {', '.join(map(repr, ORDERS))}")
    return order  # type: ignore[no-any-return]


def _concurrency_and_batch(options: Mapping[str, Any], wrong: Wrong) -> tuple[int, int | None]:
    concurrency = options.get("concurrency", 1)
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or not 1 <= concurrency <= 1000:
        raise wrong(f"concurrency={concurrency!r}: a whole number from 1 to 1000")
    batch = options.get("batch")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise wrong(f"batch={batch!r}: the most messages for one call, a whole number of at least 1")
    if batch is not None and concurrency > 1:
        raise wrong("batch= and concurrency= exclude each other: one call takes the whole batch")
    return concurrency, batch


def _retry(options: Mapping[str, Any], wrong: Wrong) -> Retry:
    retry = options.get("retry")
    if retry is None:
        return Retry()
    if not isinstance(retry, Retry):
        raise wrong(f"retry={retry!r}: a Retry(attempts=…, base=…, cap=…)")
    return retry


def _timeout(options: Mapping[str, Any], wrong: Wrong) -> float | None:
    timeout = options.get("timeout")
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout <= 2_000_000
    ):
        raise wrong(f"timeout={timeout!r}: seconds that one call may take, 0 for no limit")
    return timeout


def _flag(options: Mapping[str, Any], option: str, default: bool, wrong: Wrong) -> bool:
    flag = options.get(option, default)
    if not isinstance(flag, bool):
        raise wrong(f"{option}={flag!r}: True or False")
    return flag


def _version(options: Mapping[str, Any], wrong: Wrong) -> str | None:
    version = options.get("version")
    if version is not None and not (isinstance(version, str) and _NAME.fullmatch(version)):
        raise wrong("version= must be text of 1 to 200 characters without spaces")
    return version


def _rules(
    options: Mapping[str, Any], idempotent: bool, wrong: Wrong
) -> tuple[identity.IdRule, fingerprint.FingerprintRule]:
    """Return the rule of message ids, and the rule of payload fingerprints."""
    try:
        rule = identity.parse_rule(options.get("message_id"))
        compared = fingerprint.parse_rule(options.get("fingerprint", "bytes"))
    except RegistrationError as error:
        raise wrong(str(error)) from None
    if not idempotent and compared is not fingerprint.BYTES:
        raise wrong("idempotent=False opts out of the ledger, so no payloads are compared: drop fingerprint=")
    return rule, compared


def _check_tx(parameters: tuple[str | Resource | OrmSession, ...], idempotent: bool, wrong: Wrong) -> None:
    sessions = sum(isinstance(parameter, OrmSession) for parameter in parameters)
    if not idempotent and ("tx" in parameters or sessions):
        raise wrong(
            "idempotent=False opts out of the ledger, so there is no transaction to hand over: "
            f"drop the {'session' if sessions else 'Tx'} parameter, or drop idempotent=False"
        )
    if sessions > 1:
        raise wrong("asks for two sessions; drop one, there is one transaction")


def _decoders(
    options: Mapping[str, Any], value_type: Any, allow_nan: bool, wrong: Wrong
) -> tuple[decode.Decoder, record_decoding.Read | None, bool]:
    """Return the decoder of JSON, or what reads records.

    And whether null values are taken.
    """
    option = options.get("decode")
    try:
        record_decoding.check_option(option)
        if not record_decoding.is_json(option):
            read, takes_null = record_decoding.reader(option, value_type, allow_nan=allow_nan)
            return _undecoded, read, takes_null
        record_decoding.check_plain(value_type)
        constraints.check(value_type)
        return decode.decoder(value_type, allow_nan=allow_nan), None, decode.takes_none(value_type)
    except RegistrationError as error:
        raise wrong(str(error)) from None


def _undecoded(raw: bytes) -> Any:
    raise AssertionError("a handler with decode= reads records")


def _check_field(field: str, declared: Any, wrong: Wrong) -> None:
    """Check the field of message_id="field:…" against the payload's type.

    With a misspelt one, every message would become a dead letter.
    """
    names: list[str] = []
    declared = record_decoding.envelope_in(declared) or decode.bare(declared)
    if isinstance(declared, type) and issubclass(declared, msgspec.Struct):
        names = list(declared.__struct_fields__)
    elif dataclasses.is_dataclass(declared):
        names = [attribute.name for attribute in dataclasses.fields(declared)]
    elif isinstance(declared, type) and hasattr(declared, "model_fields"):
        names = list(declared.model_fields)
    elif typing.is_typeddict(declared):
        names = list(declared.__annotations__)
    elif declared in (bytes, str, int, float, bool):
        raise wrong(f"message_id='field:{field}' needs a payload with fields, and it is {declared.__name__}")
    if names and field not in names:
        near = difflib.get_close_matches(field, names, 1)
        raise wrong(
            f"message_id='field:{field}': {getattr(declared, '__name__', declared)} has no such field"
            + (f", did you mean {near[0]!r}?" if near else f" (there are: {', '.join(names)})")
        )
