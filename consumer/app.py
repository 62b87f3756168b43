"""App: the service, its handlers and its resources.

Registers only; connects to nothing.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, Unpack, overload

from consumer.core.effect import ask_with, build_effect, settle_with
from consumer.core.errors import RegistrationError
from consumer.core.handler import Handler, build, place_of
from consumer.core.handler_options import EffectOptions, HandlerOptions
from consumer.core.handler_signature import Function
from consumer.core.record_decoding import DecodeOption, check_option
from consumer.core.shard_route import Route, check_names
from consumer.core.topic_names import TopicSelection, refuse_own
from consumer.core.worker_health import EmbeddedWorker
from consumer.outbox.encoding import EncodeOption, encode_function
from consumer.outbox.record import RECORD_BYTES_MAX, TOPIC
from consumer.settings import Settings
from consumer.transaction.tx import Tx
from consumer.transaction.web_publishing import Publishing, publishing

if TYPE_CHECKING:  # the pytest plugin imports this file and must not load the driver
    from consumer.postgres.application_codecs import ConnectionInit

# What type checkers accept as handlers. The message is the first parameter, or follows the Tx.
OfMessage = TypeVar("OfMessage", bound=Callable[Concatenate[Any, ...], Awaitable[None]])
OfMessages = TypeVar(
    "OfMessages",
    bound=Callable[Concatenate[list[Any], ...], Awaitable[None]]
    | Callable[Concatenate[Tx, list[Any], ...], Awaitable[None]],
)
V = TypeVar("V")  # what a function of an effect takes first: its value, or the message
W = TypeVar("W")  # likewise, of another function
R = TypeVar("R")  # the result of the call
P = ParamSpec("P")
Q = ParamSpec("Q")
Lifespan = Callable[["App"], AbstractAsyncContextManager[Any]]

_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")


class App:
    """A service: its Kafka group, and the scope of its message ids.

    - name: the group id, and part of the ledger's keys. Two Apps apply a message once each; a renamed App applies every message
      again.
    - lifespan: an async context manager function that takes the App and yields a mapping of the application's own resources (or
      one object). Handlers get them by annotation or by parameter name. It is entered in every worker process before the
      first message and left after the last.
    - shards: PostgreSQL databases by name, as DSNs or as ``"env:NAME"`` for the environment variable that holds one; at
      least two.
    - route: a pure function from a message's key (bytes, or None) to the name of the shard in which the message is applied. Its
      ledger row and its effects are there, in one transaction; no transaction spans two shards. So a message that must be applied
      once must always have the same key, in every topic, and the route must never change its answer (no ``hash()``, which
      differs between processes). See docs/how-to/shards.md.
    - connection_init: an async function of an asyncpg connection, called once for every connection on which handlers run, in
      workers, replays, rebuilds, retries of dead letters and tests. It sets type codecs and ``search_path``. Statements of
      the framework do not see the codecs. One that raises is an error at the start. See docs/how-to/codecs.md.
    - publishes: the topics that `Tx.publish` and `publishing` may publish to. A worker checks at its start that they exist.
    - decode: what decodes the records of all handlers without a decode= of their own, by default JSON: a decoder of
      `consumer.decoders`, or a plain function of the record. See docs/how-to/decoders.md.
    - encode: what encodes the values that `publish` gets, except bytes and None, by default JSON: an encoder of
      `consumer.decoders`, or a plain function of the topic and the value that returns bytes, or bytes and headers. It must
      return the same for the same value, since a message may run more than once.
    """

    def __init__(
        self,
        name: str,
        *,
        lifespan: Lifespan | None = None,
        shards: Mapping[str, str] | None = None,
        route: Route | None = None,
        publishes: Collection[str] = (),
        connection_init: ConnectionInit | None = None,
        decode: DecodeOption = None,
        encode: EncodeOption = None,
    ) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RegistrationError(f"App({name!r}): not a name; use 1 to 200 of the characters a-z A-Z 0-9 . _ -")
        if lifespan is not None and not callable(lifespan):
            raise RegistrationError(
                f"App({name!r}): lifespan= is no function; give an async context manager that takes the App"
            )
        if connection_init is not None and not inspect.iscoroutinefunction(connection_init):
            raise RegistrationError(
                f"App({name!r}): connection_init= is no `async def` function; give one that takes an asyncpg connection"
            )
        if (shards is None) != (route is None):
            raise RegistrationError(f"App({name!r}): shards= and route= go together; give both, or neither")
        if shards is not None and (fault := _fault_of_shards(shards, route)):
            raise RegistrationError(f"App({name!r}): {fault}")
        if fault := _fault_of_topics(publishes):
            raise RegistrationError(f"App({name!r}): {fault}")
        try:
            check_option(decode)
            self.encode = encode_function(encode)
            self.encoder = encode
            self._has_registry = False
        except RegistrationError as error:
            raise RegistrationError(f"App({name!r}): {error}") from None
        self.name = name
        self.decode = decode
        self.publishes: dict[str, int] = dict.fromkeys(publishes, RECORD_BYTES_MAX)  # the bytes of a record, at most
        self.shards: Mapping[str, str] = dict(shards or {})
        self.route = route
        self.connection_init = connection_init
        self._lifespan = lifespan
        self._handlers: dict[str, Handler] = {}

    @overload
    def handler(
        self, *names: str, batch: None = None, **options: Unpack[HandlerOptions]
    ) -> Callable[[OfMessage], OfMessage]: ...
    @overload
    def handler(
        self, *names: str, batch: int, **options: Unpack[HandlerOptions]
    ) -> Callable[[OfMessages], OfMessages]: ...
    def handler(self, *names: str, batch: int | None = None, **options: Unpack[HandlerOptions]) -> Callable[[Any], Any]:
        """Register an async function for one or more topics.

        - names: of topics. topics: a compiled pattern of further ones, which must match the whole name. New topics that it
          matches are consumed while workers run. See docs/how-to/topic-patterns.md.
        - message_id: ``"header:NAME"``, ``"field:path.to"``, ``"offset"`` or a function of the value. By default the header
          ``message-id``, else a CloudEvent's source and id, else the offset, which does not recognize a message that its
          producer sent twice.
        - fingerprint: what must be equal when an id comes again, or the message is a dead letter: ``"bytes"``, the decoded
          ``"value"``, the result of a function of the value, or None to compare nothing. See docs/reference/messages.md.
        - name: the handler's identity in the ledger, by default the function's name. Under another name every message is new.
        - order: what keeps its order, ``"key"``, ``"partition"`` or ``"none"``.
        - concurrency: how many messages of different keys run at the same time, for handlers that wait for something slow.
        - batch: call the handler with a list of at most so many messages.
        - retry: see `Retry`.
        - timeout: seconds that one call may take, by default the setting ``handler_timeout_seconds``, 0 for no limit. A call
          that takes longer is cancelled, and that counts as an attempt of its message.
        - idempotent: False opts out of the ledger: the handler is called at least once and gets no Tx.
        - allow_nan: True accepts numbers that are not finite, which are unreadable otherwise.
        - version: names what the code does, so that a rebuild need not compare its source.
        - decode: what decodes a record before its id is read, by default the App's.

        Raises RegistrationError for a handler that cannot work, naming its place. The function is returned unchanged.
        """
        _refuse_functions(names)
        checked = {**options, "batch": batch, "decode": self._decode_of(options)}

        def register(function: Function) -> Function:
            self._add(build(function, names, checked, Tx))
            return function

        return register

    def effect(
        self, *names: str, remembers: timedelta | Literal[0], **options: Unpack[EffectOptions]
    ) -> Callable[[Callable[Concatenate[V, P], Awaitable[R]]], EffectDeclaration[V, P, R]]:
        """Register a function that calls another system, with no transaction open.

        It takes the message and a `Call`, whose key it sends, and returns a result. Before the call an intent is
        committed; after it the result is kept, and handed to the handler that `.settled` registers. See
        docs/how-to/calling-other-systems.md for what is promised.

        - remembers: for how long the other system recognizes a key. Within it (less a tenth, at least 30 s) a call
          whose result is not known is made again, with the same key. Later `.unsure` asks the other system; without it
          the message is a dead letter, `effect_unknown`. 0: there is no key, and the call is made at most once.
        - concurrency: how many calls run at the same time, of different keys.
        - retry: an exception in the call counts as an attempt. `Reject`: a dead letter at once. `NotDone`: nothing was
          done, tried again uncounted.
        - timeout: seconds that one call may take, 0 for no limit.

        The other options are those of `handler`. Raises RegistrationError for functions that cannot work, and for an
        App with shards.
        """
        checked = {**options, "decode": self._decode_of(options)}

        def register(function: Callable[Concatenate[V, P], Awaitable[R]]) -> EffectDeclaration[V, P, R]:
            if self.shards:
                raise RegistrationError(
                    f"{place_of(function)}: an App with shards has no effects yet; call the other system in a handler, "
                    "with message.idempotency_key()"
                )
            handler = build_effect(function, names, remembers, checked, Tx)
            self._add(handler)
            return EffectDeclaration(handler, function)

        return register

    def _decode_of(self, options: Mapping[str, Any]) -> DecodeOption:
        own: DecodeOption = options.get("decode")
        return self.decode if own is None else own

    def _add(self, handler: Handler) -> None:
        other = self._handlers.get(handler.name)
        if other is not None:
            raise RegistrationError(
                f"{handler.place}: two handlers are named {handler.name!r}, the other one at {other.place}; "
                "give one of them another name with name="
            )
        refuse_own(handler.pattern, handler.named_topics, self.publishes, handler.wrong)
        handler.app, handler.publishes, handler.encode = self.name, self.publishes, self.encode
        _open_sessions(handler)
        self._handlers[handler.name] = handler
        self.discover(self.topics)  # a pattern matches topics that other handlers name, too

    def publishing(self, connection: Any) -> AbstractAsyncContextManager[Publishing]:
        """Publish in your own transaction, for example in a web application.

        ``async with app.publishing(connection) as out: out.publish(topic, value)`` stores the records when the block ends,
        in the transaction that is open on this asyncpg connection, or on SQLAlchemy's AsyncSession or AsyncConnection (with
        its driver asyncpg). They commit with your writes, or not at all. A worker of the App sends them, within about a
        second.

        Raises TransactionMisuse where no transaction is open; Misconfigured where the table or the right to insert is
        missing.
        """
        return publishing(connection, self.name, self.publishes, self.encode)

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """The registered handlers by name, in the order of their registration."""
        return self._handlers

    @property
    def topics(self) -> list[str]:
        """The topics that any handler takes, sorted.

        Of those that only a pattern matches, the ones that `discover` got.
        """
        return sorted({topic for handler in self._handlers.values() for topic in handler.topics})

    @property
    def has_patterns(self) -> bool:
        """Whether some handler takes topics by a pattern."""
        return any(handler.pattern is not None for handler in self._handlers.values())

    @property
    def selection(self) -> TopicSelection:
        """The names and the patterns of all handlers."""
        handlers = self._handlers.values()
        return TopicSelection(
            [name for handler in handlers for name in handler.named_topics],
            [handler.pattern for handler in handlers if handler.pattern is not None],
        )

    def discover(self, topics: Iterable[str]) -> None:
        """Note topics that exist, or that somebody names: patterns may match them.

        What no handler takes is ignored. Handlers keep what they take until the process ends.
        """
        existing = list(topics)
        for handler in self._handlers.values():
            handler.discover(existing)

    def takes(self, topic: str) -> bool:
        """Whether some handler takes a topic, whether it exists or not.

        Notes it, as `discover` does.
        """
        self.discover([topic])
        return any(topic in handler.topics for handler in self._handlers.values())

    def by_topic(self) -> dict[str, list[Handler]]:
        """The handlers of each topic."""
        by_topic: dict[str, list[Handler]] = {topic: [] for topic in self.topics}
        for handler in self._handlers.values():
            for topic in handler.topics:
                by_topic[topic].append(handler)
        return by_topic

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Enter the lifespan and hand its resources to the handlers.

        Opens the schema registry first, if an encoder or a decoder needs one.

        Raises RegistrationError for a resource that is missing, and what `open_registry` raises.
        """
        if not self._has_registry:
            await self.open_registry(None)
        if self._lifespan is None:
            self._bind({})
            yield
            return
        lifespan = self._lifespan(self)
        if not isinstance(lifespan, AbstractAsyncContextManager):
            if inspect.iscoroutine(lifespan):
                lifespan.close()
            raise RegistrationError(
                f"App({self.name!r}): lifespan= returned a {type(lifespan).__name__}; decorate it with @asynccontextmanager"
            )
        async with lifespan as resources:
            if resources is None:
                resources = {}
            self._bind(resources if isinstance(resources, Mapping) else {type(resources).__name__.lower(): resources})
            yield

    async def open_registry(self, settings: Settings | None) -> None:
        """Open the schema registry, if an encoder or a decoder needs one.

        Fetches the schemas that the encoder writes with, which takes at most ``wait_seconds``. settings: by default from
        the environment. Raises Misconfigured for a registry that cannot be used, and ServiceUnavailable.
        """
        self._has_registry = True
        codecs: list[Any] = [handler.decode for handler in self._handlers.values() if handler.schema_needed is not None]
        if hasattr(self.encoder, "use_registry"):
            codecs.append(self.encoder)
        if codecs:
            # Dynamic: its client takes time to import, and few Apps need it.
            open_registry = importlib.import_module("consumer.decoders.preparation").open_registry
            await open_registry(codecs, self.encoder, self.publishes, settings or Settings())

    def worker(self, settings: Settings | None = None) -> AbstractAsyncContextManager[EmbeddedWorker]:
        """Run one worker in this process while a block runs.

        For the lifespan of a web application (``async with app.worker(settings) as worker: yield``): the services are
        checked at the beginning, and at the end the worker drains for at most ``grace_seconds``. ``worker.health`` says
        how it is. settings: by default from the environment.

        What it gives up against ``consumer run``:

        - No supervisor. A worker that has failed is not started again: ``health.state`` is ``failed`` until the process
          restarts, so let the liveness probe look at it.
        - A handler that swallows its cancellation, or blocks the event loop, cannot be ended: it holds up the web
          application too.
        - A killed process leaves the group only after the session timeout, where a supervisor removes it at once.
        - Event loop, garbage collector, signals and logging are the host's. The process must be given time to drain.
        - Each process of the host is one member of the group (``uvicorn --workers 4``: four), and requests and messages
          share one core.

        Raises Misconfigured and ServiceUnavailable, as ``consumer run`` does at its start.
        """
        # Dynamic: an App is a declaration, and below what runs it.
        embedded: Any = importlib.import_module("consumer.worker.embedded").embedded
        worker: AbstractAsyncContextManager[EmbeddedWorker] = embedded(self, settings)
        return worker

    def _bind(self, resources: Mapping[str, object]) -> None:
        for handler in self._handlers.values():
            handler.bind(resources)


class EffectDeclaration(Generic[V, P, R]):
    """What `App.effect` returns; it can be called like the function itself."""

    def __init__(self, handler: Handler, function: Callable[Concatenate[V, P], Awaitable[R]]) -> None:
        self._handler = handler
        self._function = function
        self.__doc__ = function.__doc__

    def __call__(self, value: V, /, *args: P.args, **options: P.kwargs) -> Awaitable[R]:
        """Call the function, without anything around it."""
        return self._function(value, *args, **options)

    @overload
    def settled(self: EffectDeclaration[V, P, None], function: OfMessage) -> OfMessage: ...
    @overload
    def settled(
        self, function: Callable[Concatenate[W, R, Q], Awaitable[None]]
    ) -> Callable[Concatenate[W, R, Q], Awaitable[None]]: ...
    def settled(self, function: Any) -> Any:
        """Register the handler that applies the result.

        It runs in one transaction with the claim. It takes the message, the result, and what other handlers take (Tx, for
        example). The function is returned unchanged.
        """
        settle_with(self._handler, function, Tx)
        _open_sessions(self._handler)
        return function

    def unsure(self, function: Callable[Q, Awaitable[R | None]]) -> Callable[Q, Awaitable[R | None]]:
        """Register the function that asks the other system what it has done.

        It takes what the call takes, and returns the result, or None if nothing was done: then the call is made. It may
        raise. It is asked where a call has no result, and its key may be forgotten by now. The function is returned
        unchanged.
        """
        ask_with(self._handler, function)
        return function


def _open_sessions(handler: Handler) -> None:
    """Let a handler that asks for a session of SQLAlchemy get one."""
    if handler.wants_session:
        from consumer.ext.sqlalchemy import session  # only where it is asked for: it needs the extra

        handler.open_session = session


def _fault_of_topics(publishes: object) -> str | None:
    """Return what is wrong with publishes=."""
    if isinstance(publishes, str) or not isinstance(publishes, Collection):
        return "publishes= is no list; give a list of topics"
    for topic in publishes:
        if not isinstance(topic, str) or not TOPIC.fullmatch(topic):
            return "publishes= has a name of no topic; use 1 to 249 of the characters a-z A-Z 0-9 . _ -"
    return None


def _refuse_functions(topics: tuple[object, ...]) -> None:
    """Refuse `@app.handler` without parentheses."""
    for topic in topics:
        if callable(topic):
            raise RegistrationError(f'{place_of(topic)}: no topic; name the topic: @app.handler("payments")')


def _fault_of_shards(shards: object, route: object) -> str | None:
    """Return what is wrong with shards= or route=.

    The text quotes no address, which may hold a password.
    """
    if not isinstance(shards, Mapping) or len(shards) < 2:
        return (
            "shards= is not a mapping of at least two names; give names with their DSNs (one database needs no shards)"
        )
    if fault := check_names(shards):
        return f"shards=: {fault}"
    for shard, address in shards.items():
        if not isinstance(address, str) or not address.removeprefix("env:").strip():
            return f'shards= has no address for {shard!r}; give a DSN, or "env:NAME" for the variable that holds it'
    if not callable(route) or inspect.iscoroutinefunction(route):
        return "route= is no plain function; give one from a key (bytes or None) to the name of a shard"
    return None
