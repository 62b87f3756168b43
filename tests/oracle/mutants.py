"""The framework, broken on purpose: the oracle must find each."""

from __future__ import annotations

from collections.abc import Callable

MUTANTS: dict[str, Callable[[], None]] = {}


def install(name: str) -> None:
    """Break the framework of this process in this way; "" leaves it alone."""
    if name:
        MUTANTS[name]()
