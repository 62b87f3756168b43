"""The options of handlers and effects, as type checkers know them.

handler.py checks their values. Limitations: a checker does not see that a function of the value takes the handler's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypedDict
from uuid import UUID

from consumer.core.fingerprint import Option as FingerprintOption
from consumer.core.record_decoding import DecodeOption
from consumer.core.retry import Retry
from consumer.core.topic_names import Pattern

MessageId: TypeAlias = UUID | str | bytes | int | None  # None: this message has none, and becomes a dead letter


class EffectOptions(TypedDict, total=False):
    """The options of `App.effect`, except remembers.

    `App.handler` says what they mean.
    """

    message_id: str | Callable[[Any], MessageId] | None
    fingerprint: FingerprintOption
    name: str | None
    order: Literal["key", "partition", "none"]
    concurrency: int
    retry: Retry | None
    timeout: float | None
    allow_nan: bool
    version: str | None
    decode: DecodeOption
    topics: Pattern | None


class HandlerOptions(EffectOptions, total=False):
    """The options of `App.handler`, except batch.

    For options that handlers share: ``SLOW: HandlerOptions = {"timeout": 30, "concurrency": 10}``, then
    ``@app.handler("payments", **SLOW)``. `App.handler` says what they mean.
    """

    idempotent: bool


HANDLER_OPTIONS = (*HandlerOptions.__annotations__, "batch")
EFFECT_OPTIONS = (*EffectOptions.__annotations__, "remembers")
