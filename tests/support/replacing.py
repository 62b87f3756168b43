"""Replaces functions and methods, and refuses names that do not exist.

A mutant whose target was renamed would otherwise set an attribute that is never read, and break nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

INHERITED = object()  # in the place of the original of a method that a base class has


class NothingToReplace(AttributeError):
    """The attribute that a mutant replaces does not exist."""


class Replacement(NamedTuple):
    """An attribute that was replaced, and what it was."""

    owner: Any
    name: str
    original: Any


_recorded: list[list[Replacement]] = [[]]  # the last list is that of the innermost block


def replace(owner: Any, name: str, new: object) -> None:
    """Set an attribute of a module or class that has it.

    Raises NothingToReplace when it does not exist.
    """
    if not hasattr(owner, name):
        label = owner.__name__ if isinstance(owner, ModuleType | type) else repr(owner)
        raise NothingToReplace(f"{label}.{name}: no such attribute; name what the code calls now")
    _recorded[-1].append(Replacement(owner, name, vars(owner).get(name, INHERITED)))
    setattr(owner, name, new)


def replace_everywhere(owner: Any, name: str, new: object) -> None:
    """Replace an attribute, also in framework modules that imported it by name."""
    original = getattr(owner, name, None)
    replace(owner, name, new)
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "consumer" and getattr(module, name, None) is original:
            replace(module, name, new)


@contextmanager
def undone_at_the_end() -> Iterator[list[Replacement]]:
    """Undo at the end of the block what was replaced in it.

    Gives the list of replacements, which grows meanwhile.
    """
    replacements: list[Replacement] = []
    _recorded.append(replacements)
    try:
        yield replacements
    finally:
        _recorded.pop()
        for owner, name, original in reversed(replacements):
            if original is INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
