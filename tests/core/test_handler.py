"""Handlers that cannot work are refused where they are written.

The RegistrationError begins with the handler's file and line and says what to write instead. An accepted handler is called
with exactly what its annotations ask for, in the order of its signature, and with the lifespan's resources.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any, Protocol, TypedDict

import msgspec
import pytest

from consumer import App, Message, RegistrationError, Tx

pytestmark = pytest.mark.unit


class Payment(msgspec.Struct):
    id: str
    payer: str = ""


class Pool: ...


class Mailer: ...


class Sender(Protocol):
    def send(self) -> None: ...


class Options(TypedDict):
    limit: int


class Session:  # known by its name
    __module__ = "sqlalchemy.ext.asyncio.session"


Session.__name__ = "AsyncSession"


async def fine(payment: Payment) -> None: ...
async def text(payment: str) -> None: ...
async def takes_tx(payment: Payment, tx: Tx) -> None: ...
async def takes_list(payments: list[Payment]) -> None: ...
async def two_tx(payment: Payment, tx: Tx, again: Tx) -> None: ...
async def nothing() -> None: ...
async def only_tx(tx: Tx) -> None: ...
async def session_first(s: Session, payment: Payment) -> None: ...
async def bare(payment) -> None: ...  # type: ignore[no-untyped-def]
async def star(payment: Payment, *rest: Pool) -> None: ...
async def stars(payment: Payment, **rest: Pool) -> None: ...
async def keyword(payment: Payment, *, pool: Pool) -> None: ...
async def bare_message(message: Message) -> None: ...  # type: ignore[type-arg]
async def twice(payment: Payment, message: Message[Payment]) -> None: ...
async def nowhere(payment: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
async def three(payment: 3) -> None: ...  # type: ignore[valid-type]
async def misspelt(payment: msgspec.Strukt) -> None: ...  # type: ignore[name-defined]
async def half(payment: "dict[1:") -> None: ...  # type: ignore[valid-type]  # noqa: F722
def plain(payment: Payment) -> None: ...
async def generator(payment: Payment) -> AsyncIterator[None]:
    yield


Case = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]
T = ("payments",)
BAD_ORDERS: tuple[Any, ...] = ("keys", None, [])
WRONG: list[Case] = [
    (nothing, T, {}, "takes no message"),
    (only_tx, T, {}, "takes no message"),
    (session_first, T, {}, "takes 's', a session, in place of the payload: put the payload before it"),
    (bare, T, {}, "'payment' has no annotation"),
    (star, T, {}, "'rest': use plain positional"),
    (stars, T, {}, "'rest': use plain positional"),
    (keyword, T, {}, "'pool': use plain positional"),
    (twice, T, {}, "asks for the message twice"),
    (two_tx, T, {}, "two Tx"),
    (nowhere, T, {}, "'Nowhere' is not defined"),
    (three, T, {}, "3: JSON cannot be decoded to it"),
    (plain, T, {}, "`async def`"),
    (generator, T, {}, "`async def`"),
    (fine, T, {"concurency": 2}, "unknown option 'concurency', did you mean 'concurrency'?"),
    (fine, T, {"xyz": 2}, "unknown option 'xyz' (there are: message_id, fingerprint, name, "),
    (fine, T, {"name": "a b"}, "name="),
    (fine, T, {"name": "x" * 201}, "name="),
    (fine, T, {"name": 7}, "name="),
    (fine, (), {}, "at least one topic"),
    *[
        (fine, (topic,), {}, "topic " + repr(topic))
        for topic in ("", "a b", "a/b", ".", "..", "x" * 250, "é", "a\n", 7)
    ],
    (fine, ("a", "b", "a"), {}, "a topic is named twice"),
    *[(fine, T, {"order": order}, "one of 'key', 'partition', 'none'") for order in BAD_ORDERS],
    *[(fine, T, {"concurrency": count}, "concurrency=") for count in (0, -1, 1001, True, 1.0, "2", None)],
    *[(takes_list, T, {"batch": size}, "batch=") for size in (0, -1, True, 1.0, "2")],
    (takes_list, T, {"batch": 10, "concurrency": 2}, "exclude each other"),
    (fine, T, {"batch": 10}, "annotate 'payment' as list[T]"),
    *[(fine, T, {"retry": retry}, "a Retry(attempts=") for retry in (3, "3", {"attempts": 3})],
    *[(fine, T, {"idempotent": flag}, "True or False") for flag in (None, 0, "no")],
    (takes_tx, T, {"idempotent": False}, "drop the Tx parameter, or drop idempotent=False"),
    *[(fine, T, {"message_id": rule}, '"header:NAME"') for rule in ("id", "", 7, fine)],
    (fine, T, {"message_id": "field:payr"}, "no such field, did you mean 'payer'?"),
    (fine, T, {"message_id": "field:xyz.id"}, "no such field (there are: id, payer)"),
    (text, T, {"message_id": "field:id"}, "needs a payload with fields, and it is str"),
    *[(fine, T, {"fingerprint": rule}, '"bytes", "value"') for rule in ("id", "", 7, fine, dict)],
    *[(fine, T, {"allow_nan": flag}, "True or False") for flag in (None, 0, "no")],
    (fine, T, {"idempotent": False, "fingerprint": None}, "drop fingerprint="),
    (misspelt, T, {}, "Strukt"),
    (half, T, {}, "dict[1:"),
    (fine, T, {"retry": 0}, "a Retry(attempts="),
    (fine, T, {"retry": False}, "a Retry(attempts="),
    (fine, T, {"name": ""}, "name="),
]


@pytest.mark.parametrize(("function", "topics", "options", "says"), WRONG)
def test_a_handler_that_cannot_work_is_refused_at_its_place(
    function: Callable[..., Any], topics: tuple[str, ...], options: dict[str, Any], says: str
) -> None:
    app = App("shop")
    with pytest.raises(RegistrationError) as caught:
        app.handler(*topics, **options)(function)
    place = re.match(r"(.+):(\d+): handler ", str(caught.value))
    assert place and place[1] == __file__
    assert f"def {function.__name__}(" in linecache.getline(place[1], int(place[2]))
    assert says in str(caught.value)
    assert not app.handlers


def test_second_handler_of_a_name_is_refused_with_both_places() -> None:
    app = App("shop")
    app.handler("a", name="x")(fine)
    with pytest.raises(RegistrationError) as caught:
        app.handler("b", name="x")(takes_tx)
    for function in (fine, takes_tx):
        assert f"{__file__}:{function.__code__.co_firstlineno}" in str(caught.value)
    assert app.handlers["x"].function is fine


async def test_a_lifespan_without_its_decorator_is_refused() -> None:
    async def coroutine(app: App) -> dict[str, int]:
        return {}

    async def generator(app: App) -> AsyncIterator[dict[str, int]]:
        yield {}

    for lifespan in (coroutine, generator):
        wrong: Any = lifespan
        with pytest.raises(
            RegistrationError, match=f"returned a .*{lifespan.__name__}; decorate it with @asynccontext"
        ):
            async with App("shop", lifespan=wrong).running():
                pytest.fail("it has been entered")


def test_a_decorator_without_its_call_is_refused() -> None:
    with pytest.raises(RegistrationError):
        App("shop").handler(fine)  # type: ignore[call-overload]


def test_handler_that_refers_to_itself_registers_inside_a_function() -> None:
    app = App("shop")

    @app.handler("payments")
    async def own(payment: Payment) -> Any:
        return own

    assert "own" in app.handlers


# Each is named after what it is to be given: v(alue), m(essage), t(x), or a resource of that name.
async def v(value: Payment) -> None: ...
async def v_t(value: Payment, tx: Tx) -> None: ...
async def t_v(tx: Tx, value: Payment) -> None: ...
async def m(message: Message[Payment]) -> None: ...
async def m_t(message: Message[Payment], tx: Tx) -> None: ...
async def v_pool(value: Payment, any_name: Pool) -> None: ...
async def v_t_limit_pool(value: Payment, tx: Tx, limit: int | None, p: Pool) -> None: ...
async def m_limit(message: Message[Payment], limit: object) -> None: ...
async def v_two(value: Payment, two: Mailer) -> None: ...
async def batch_v_t(values: list[Payment], tx: Tx) -> None: ...
async def batch_m(messages: list[Message[Payment]]) -> None: ...


SHAPES = [v, v_t, t_v, m, m_t, v_pool, v_t_limit_pool, m_limit, v_two, batch_v_t, batch_m]
MAILER = Mailer()
RESOURCES = {"pool": Pool(), "limit": 5, "one": Mailer(), "two": MAILER}


def recording(stub: Any) -> Any:
    """The function with its signature and a body that returns its arguments."""

    @wraps(stub)
    async def call(*given: object) -> list[object]:
        return list(given)

    return call


def yielding(resources: Any) -> Any:
    @asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[Any]:
        yield resources

    return lifespan


@pytest.mark.parametrize("stub", SHAPES)
async def test_the_call_hands_over_what_the_signature_asks_for(stub: Any) -> None:
    app = App("shop", lifespan=yielding(RESOURCES))
    function = recording(stub)
    assert app.handler("payments", batch=2 if stub in (batch_v_t, batch_m) else None)(function) is function
    handler = app.handlers[stub.__name__]
    given = {"v": object(), "m": object(), "t": object(), **RESOURCES}
    wanted = stub.__name__.removeprefix("batch_").split("_")
    async with app.running():
        assert handler.call is not None
        assert await handler.call(given["v"], given["m"], given["t"]) == [given[name] for name in wanted]
    assert (handler.wants_tx, handler.wants_message, handler.value_type) == ("t" in wanted, "m" in wanted, Payment)


def test_a_message_without_its_type_holds_bytes() -> None:
    app = App("shop")
    app.handler("payments")(bare_message)
    assert app.handlers["bare_message"].decoder(b"\xff") == b"\xff"


async def test_a_single_resource_needs_no_mapping() -> None:
    app = App("shop", lifespan=yielding(MAILER))
    app.handler("payments")(recording(v_two))
    async with app.running():
        call = app.handlers["v_two"].call
        assert call is not None and await call(1, 2, 3) == [1, MAILER]


@pytest.mark.parametrize(
    "resources",
    [None, {}, {"one": 1}, {"a": Mailer(), "b": Mailer()}, Pool()],
    ids=["none", "empty", "one", "two of a type", "another"],
)
async def test_a_resource_that_the_lifespan_does_not_yield_stops_the_start(resources: Any) -> None:
    app = App("shop", lifespan=yielding(resources) if resources is not None else None)
    app.handler("payments")(v_two)
    with pytest.raises(RegistrationError) as caught:
        async with app.running():
            pytest.fail("started")
    assert str(caught.value).startswith(f"{__file__}:{v_two.__code__.co_firstlineno}: handler 'v_two'")
    assert "'two'" in str(caught.value)
    for name in resources if isinstance(resources, dict) else []:
        assert name in str(caught.value)


async def by_protocol(payment: Payment, sender: Sender) -> None: ...
async def by_typed_dict(payment: Payment, options: Options) -> None: ...
async def by_any(payment: Payment, options: Any) -> None: ...


@pytest.mark.parametrize("stub", [by_protocol, by_typed_dict, by_any])
async def test_a_resource_of_a_type_that_isinstance_refuses_is_found_by_name(stub: Any) -> None:
    app = App("shop", lifespan=yielding({"sender": MAILER, "options": {"limit": 1}}))
    app.handler("payments")(stub)
    async with app.running():
        pass
