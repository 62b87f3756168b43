"""Sources, parsed once for all checks of a process."""

from __future__ import annotations

import ast
import functools
import gc
from pathlib import Path


@functools.cache
def tree_of(source: str) -> ast.Module:
    """A source parsed. Callers change nothing in it."""
    gc.disable()  # it finds no garbage in a tree that stays, and looks through it again and again
    try:
        tree = ast.parse(source)
        gc.freeze()
        return tree
    finally:
        gc.enable()


@functools.cache
def nodes_of(source: str) -> tuple[ast.AST, ...]:
    """All nodes of a source, as `ast.walk` yields them."""
    return tuple(ast.walk(tree_of(source)))


@functools.cache
def text_of(path: Path) -> str:
    """The text of a file that does not change meanwhile."""
    return path.read_text("utf-8")
