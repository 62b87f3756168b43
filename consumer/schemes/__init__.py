"""Defences against repeated requests that complement the ledger.

docs/how-to/schemes.md says which to use. Each name is loaded on first use, so that a module of handlers imports only
what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consumer.schemes.database import Misfit, NotFound
    from consumer.schemes.lock import LateWriter, Lock, LockBusy, LockLost, check_fence
    from consumer.schemes.redis_call import RedisAway
    from consumer.schemes.states import Held, IllegalMove, Moved, NotMoved, StateMachine, TooEarly, TooLate
    from consumer.schemes.tokens import Tokens
    from consumer.schemes.unique import insert_once
    from consumer.schemes.versioned import Stale, update_versioned
    from consumer.schemes.web import TokenTaps

_FILES = {
    "redis_call": ("RedisAway",),
    "database": ("Misfit", "NotFound"),
    "lock": ("LateWriter", "Lock", "LockBusy", "LockLost", "check_fence"),
    "states": ("Held", "IllegalMove", "Moved", "NotMoved", "StateMachine", "TooEarly", "TooLate"),
    "tokens": ("Tokens",),
    "unique": ("insert_once",),
    "versioned": ("Stale", "update_versioned"),
    "web": ("TokenTaps",),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}

__all__ = [
    "Held",
    "IllegalMove",
    "LateWriter",
    "Lock",
    "LockBusy",
    "LockLost",
    "Misfit",
    "Moved",
    "NotFound",
    "NotMoved",
    "RedisAway",
    "Stale",
    "StateMachine",
    "TokenTaps",
    "Tokens",
    "TooEarly",
    "TooLate",
    "check_fence",
    "insert_once",
    "update_versioned",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"consumer.schemes.{_FILE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
