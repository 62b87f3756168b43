"""What to replay, its limits, and how it reports progress.

Imports the core only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from consumer.core.errors import Misconfigured

Mode = Literal["check", "apply"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The range and the messages to replay.

    Empty tuples mean all. kafka/bounds.py parses the bounds.
    """

    mode: Mode = "check"
    start: str = "earliest"
    end: str = "latest"
    partitions: tuple[int, ...] = ()
    key: str | bytes | None = None
    message_id: str | None = None
    handlers: tuple[str, ...] = ()
    assume_unapplied: bool = False
    call_handlers: bool = False
    allow_outside: bool = False

    @property
    def is_dry_run(self) -> bool:
        """Whether handlers run and everything is rolled back."""
        return self.mode == "check" and self.call_handlers


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes and times of a replay; tests choose smaller ones.

    fruitless_attempts, fruitless_seconds: a message whose handler raises RunAgain is never given up. After so many
    attempts and so much time without any other result, the replay ends with that answer.
    """

    chunk_deliveries: int = 4096  # in one transaction: enough to make its round trips cheap
    save_seconds: float = 5.0
    fruitless_attempts: int = 20
    fruitless_seconds: float = 60.0
    last_look_seconds: float = 3.0  # for reading the sequences before an interrupted replay ends
    redis_timeouts: int = 3  # consecutive timeouts, after which Redis is not asked again
    precheck_seconds: float = 2.0  # more patient than a worker: latency does not matter here


@dataclass(frozen=True, slots=True)
class Progress:
    """Callbacks with which a replay reports what it does."""

    line: Callable[[str], None] = lambda _: None
    announce: Callable[[str], None] = lambda _: None  # what an operator must know before the work begins
    progress: Callable[[str, int, int], None] = lambda *_: None  # phase, done, total
    save: Callable[[dict[str, Any]], None] | None = None  # keeps the state for --resume


def validate(options: Options) -> None:
    """Raise Misconfigured for options that contradict each other."""
    if options.call_handlers and options.mode != "check":
        raise Misconfigured(f"--call-handlers: not with --{options.mode}; leave it out")
    if options.allow_outside and not options.is_dry_run:
        raise Misconfigured(
            "--allow-outside: no effect alone, since a dry run calls no handlers; it goes with --call-handlers"
        )
    validate_filters(options.key, options.message_id, options.partitions)


def validate_filters(key: object, message_id: object, partitions: tuple[object, ...]) -> None:
    """Raise Misconfigured for an empty filter or a wrong type."""
    if key is not None and not isinstance(key, str | bytes):
        raise Misconfigured(f"key: a {type(key).__name__}; give text or bytes")
    if message_id is not None and not (isinstance(message_id, str) and message_id):
        raise Misconfigured("--message-id: empty; give the id as its producer sent it")
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in partitions):
        raise Misconfigured("--partition: below 0; give a number of at least 0")


def filters(
    start: str = "earliest",
    end: str = "latest",
    partitions: tuple[int, ...] = (),
    key: str | bytes | None = None,
    message_id: str | None = None,
    handlers: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the filters for the findings; None where nothing is filtered."""
    return {
        "from": None if start == "earliest" else start,
        "until": None if end == "latest" else end,
        "partitions": list(partitions) or None,
        "key": key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else key,
        "message_id": message_id,
        "handlers": list(handlers) or None,
    }


def key_bytes(key: str | bytes | None) -> bytes | None:
    """Return the key as Kafka holds it."""
    return key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
