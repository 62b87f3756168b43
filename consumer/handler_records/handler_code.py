"""Records which code each handler had and when.

A replay uses it to explain a difference by a change of code. A fingerprint covers the options that decide what a
message is, the source of the function and of what it wraps, and the functions, classes and plain constants of the
application's own package that it reaches by name, with the payload's type. It is written when a worker starts and every
few minutes while it runs. Limitations: objects (clients, settings that are read later), dictionaries and lists, other
packages, and functions of the database; `version=` of a handler replaces all of it.
"""

from __future__ import annotations

import inspect
import linecache
import sys
import typing
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from hashlib import blake2b
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from consumer.app import App
from consumer.core import fingerprint
from consumer.core.handler import Handler
from consumer.core.identity import CallableId, rule_text
from consumer.handler_records.source_text import (
    CodePeriod,
    Versions,
    bytecode_text,
    constant_text,
    function_text,
    names_used,
    type_text,
)
from consumer.postgres import handler_history, ledger_queries
from consumer.postgres.protocol import Connection

RENEW_SECONDS = 180.0
_PARTS_MAX = 2000  # functions, classes and constants that one handler reaches


class Codes(NamedTuple):
    """Fingerprints of a handler's code and of its message_id= function.

    The second is '' if message_id= is not a function.
    """

    code: str
    id_code: str


class Recorded(NamedTuple):
    """The recorded code versions of an App's handlers, by name.

    Of all their code, and of the function of message_id= alone.
    """

    code: Mapping[str, Versions]
    id_code: Mapping[str, Versions]


def codes_of(handler: Handler) -> Codes:
    """The fingerprints of a handler."""
    id_code = ""
    if isinstance(handler.rule, CallableId):
        id_code = (
            f"version:{handler.version}" if handler.version else _hash(_Walk(handler).texts(handler.rule.function))
        )
    if handler.version is not None:
        return Codes(f"version:{handler.version}", id_code)
    options = f"{handler.order} {handler.concurrency} {handler.batch} {handler.allow_nan} {rule_text(handler.rule)}"
    compared = handler.fingerprint
    kind = "bytes" if compared is fingerprint.BYTES else "nothing" if compared is fingerprint.NOTHING else "a function"
    roots = [handler.function, handler.value_type, compared.of_value, id_code]
    if handler.decode is not None:
        roots.append(handler.decode if inspect.isfunction(handler.decode) else type(handler.decode).__qualname__)
    return Codes(_hash([options, kind, *_Walk(handler).texts(*roots)]), id_code)


async def record(connection: Connection, app: App) -> None:
    """Record that the App's code runs now. Its handlers must be registered."""
    kept = [handler for handler in app.handlers.values() if handler.idempotent]
    codes = [(handler.name, *codes_at_start(handler)) for handler in kept]
    await handler_history.record_code(connection, app.name, codes)


async def read_code(connection: Connection, app: App) -> Recorded:
    """What is recorded, beside the App's own code."""
    seen = await handler_history.code(connection, app.name)
    code: dict[str, Versions] = {}
    id_code: dict[str, Versions] = {}
    for handler in app.handlers.values():
        own = [row for row in seen if row.handler == handler.name]
        now = codes_at_start(handler)
        code[handler.name] = _versions(own, 1, now.code)
        id_code[handler.name] = _versions(own, 2, now.id_code)
    return Recorded(code, id_code)


async def gone(connection: Connection, app: App, topics: Iterable[str]) -> list[str]:
    """Return handlers that applied messages of the topics, but left the App."""
    return await ledger_queries.other_handlers(connection, app.name, list(app.handlers), sorted(topics))


def _versions(rows: list[Any], column: int, now: str) -> Versions:
    others = tuple(CodePeriod(row[3], row[4]) for row in rows if row[column] not in ("", now))
    since = min((row[3] for row in rows if row[column] == now), default=None)
    return Versions(others, min((row[3] for row in rows), default=None), since)


def since_text(versions: Versions) -> str:
    """Return when the running code was first seen, after "today's code"."""
    if versions.since is None:
        return "which no worker has recorded"
    at = datetime.fromtimestamp(versions.since / 1_000_000, UTC)
    return f"which is recorded since {at.isoformat(timespec='seconds')}"


def codes_at_start(handler: Handler) -> Codes:
    """Return the result of the first `codes_of` call.

    The code that runs is the code that was imported, whatever its file says by now.
    """
    if not handler.codes:
        try:
            handler.codes = codes_of(handler)
        except Exception:  # an object that cannot be inspected must not stop a worker
            handler.codes = Codes("unknown", "")
    code, id_code = handler.codes
    return Codes(code, id_code)


def _hash(texts: list[str]) -> str:
    return blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class _Walk:
    """Collects the texts of what a handler reaches, in a fixed order.

    The order depends on nothing but the code.
    """

    def __init__(self, handler: Handler) -> None:
        self._own = getattr(inspect.unwrap(handler.function), "__module__", None) or ""
        self._root = self._own.partition(".")[0]
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # so that no id of a seen object is used again
        self._todo: deque[tuple[str, Any]] = deque()

    def texts(self, *roots: Any) -> list[str]:
        """Return the texts of the roots and of all they use.

        Only of what belongs to the application.
        """
        self._todo.extend(("", root) for root in roots)
        texts: list[str] = []
        while self._todo and len(texts) < _PARTS_MAX:
            name, value = self._todo.popleft()
            if (text := constant_text(value)) is not None:
                texts.append(f"{name}={text}")
                continue
            if id(value) in self._seen:
                continue
            self._seen.add(id(value))
            self._kept.append(value)
            texts += [f"{name}={text}" for text in self._of(value)]
        return texts

    def _is_ours(self, module: str | None) -> bool:
        if module is None:
            return False
        root = module.partition(".")[0]
        return module == self._own or (root == self._root and root != "consumer")

    def _of(self, value: Any) -> Iterator[str]:
        """Yield the texts of one value, and queue what it uses."""
        if isinstance(value, partial):
            self._todo.extend(
                [("", value.func), *(("", argument) for argument in value.args), *sorted(value.keywords.items())]
            )
            return
        if isinstance(value, staticmethod | classmethod) or inspect.ismethod(value):
            value = value.__func__
        for inner in ("__wrapped__", "__supertype__"):  # statically: a proxy may make up any attribute
            with suppress(AttributeError):
                self._todo.append(("", inspect.getattr_static(value, inner)))
        if isinstance(value, getattr(typing, "TypeAliasType", ())):  # type X = …, since Python 3.12
            self._todo.append(("", getattr(value, "__value__", None)))
        if isinstance(value, FunctionType):
            if self._is_ours(value.__module__):
                self._use(value)
                yield _source(value) or bytecode_text(value.__code__, str(sys.implementation.cache_tag))
        elif isinstance(value, type) and typing.get_origin(value) is None:
            if self._is_ours(value.__module__):
                yield from self._of_class(value)
        elif typing.get_args(value):
            self._todo.extend(("", argument) for argument in typing.get_args(value))
        elif self._is_ours(type(value).__module__):
            self._todo.append(("", type(value)))

    def _of_class(self, value: type) -> Iterator[str]:
        annotations: Mapping[str, Any] = {}
        with suppress(Exception):
            annotations = typing.get_type_hints(value, include_extras=True)
        yield _source(value) or " ".join(f"{name}:{type_text(annotation)}" for name, annotation in annotations.items())
        self._todo.extend(("", type_used) for type_used in (*value.__bases__, *annotations.values()))
        for name, member in sorted(vars(value).items()):
            inner = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(inner, FunctionType) and self._is_ours(inner.__module__):
                self._use(inner)
                if inner.__qualname__ != f"{value.__qualname__}.{name}":  # not in the source of the class
                    self._todo.append((name, inner))

    def _use(self, function: FunctionType) -> None:
        """Queue what a function reaches by name.

        These are globals, attributes of the application's modules, and closures.
        """
        names = sorted(names_used(function.__code__))
        for name in names:
            if name not in function.__globals__:
                continue
            value = function.__globals__[name]
            if isinstance(value, ModuleType):
                if self._is_ours(value.__name__):
                    self._todo.extend(
                        (f"{name}.{attribute}", vars(value)[attribute])
                        for attribute in names
                        if attribute in vars(value)
                    )
            else:
                self._todo.append((name, value))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # has no value yet
                self._todo.append((name, cell.cell_contents))
        self._todo.extend(("", default) for default in function.__defaults__ or ())
        self._todo.extend(sorted((function.__kwdefaults__ or {}).items()))


def _source(value: FunctionType | type) -> str:
    """Return the source of a function or class; empty if unknown."""
    try:
        if isinstance(value, type):
            return function_text(inspect.getsource(value))
        # Not inspect.getsource: it returns the source of what a wrapper wraps, and searches all modules.
        lines = linecache.getlines(value.__code__.co_filename, value.__globals__)
        return function_text("".join(inspect.getblock(lines[value.__code__.co_firstlineno - 1 :])))
    except Exception:  # no file, another file by now, or half a statement
        return ""
