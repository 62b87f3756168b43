"""Texts by which code is compared: source, or bytecode without it.

The text of a function is the same on every Python version where its source is known, and a change of layout, comments,
decorators or of the function's own name leaves it the same. Limitation: brackets or quotes that a formatter changes
count.
"""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterator
from decimal import Decimal
from enum import Enum
from types import CodeType
from typing import Any, NamedTuple
from uuid import UUID

_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_MARGIN_US = 600_000_000  # a worker renews its period every few minutes, and one that was killed has not


class CodePeriod(NamedTuple):
    """When workers may have applied messages with one code.

    Microseconds since 1970 by PostgreSQL's clock.
    """

    first: int
    last: int


class Versions(NamedTuple):
    """The recorded code versions of one handler, except the running one.

    recorded: when any code was first recorded, None if none was. since: when the running code was, None if never.
    """

    others: tuple[CodePeriod, ...] = ()
    recorded: int | None = None
    since: int | None = None

    def may_be_other(self, applied_at: int | None) -> bool:
        """Whether a message may have been applied with other code than today's.

        applied_at: None if unknown.
        """
        if applied_at is None:
            return bool(self.others)
        if self.since is None or self.recorded is None or applied_at < self.recorded:
            return True
        return any(period.first <= applied_at <= period.last + _MARGIN_US for period in self.others)


def function_text(source: str) -> str:
    """Return a source without layout, comments, decorators and its own name.

    Raises SyntaxError or tokenize.TokenError if it is no whole statement (a lambda in the middle of a call).
    """
    words = list(_words(source))
    for place, word in enumerate(words):
        if word in ("def", "class"):
            start = place - 1 if place and words[place - 1] == "async" else place
            return " ".join([*words[start : place + 1], "_", *words[place + 2 :]])
    return " ".join(words)


def _words(source: str) -> Iterator[str]:
    """Yield the tokens of a source.

    An f-string, which Python splits since 3.12, is one token as it is written.
    """
    lines = [f"{line}\n" for line in source.split("\n")]
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    # A line must keep its end: an empty one is the end of the source.
    lines = [line[margin:] if line[:margin].isspace() and line.strip() else line for line in lines]
    lines = [line if line.strip() else "\n" for line in lines]
    depth, begun = 0, (0, 0)
    for token in tokenize.generate_tokens(iter(lines).__next__):
        name = tokenize.tok_name[token.type]
        if name.endswith("STRING_START"):
            begun = token.start if not depth else begun
            depth += 1
        elif name.endswith("STRING_END"):
            depth -= 1
            if not depth:
                yield _between(lines, begun, token.end)
        elif depth or token.type in _LAYOUT:
            continue
        elif token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE):
            yield f"<{name.lower()}>"
        else:
            yield token.string


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    first, last = start[0] - 1, end[0] - 1
    if first == last:
        return lines[first][start[1] : end[1]]
    return "".join([lines[first][start[1] :], *lines[first + 1 : last], lines[last][: end[1]]])


def bytecode_text(code: CodeType, python: str) -> str:
    """Return a code object as text that holds for one Python version.

    python: that version.
    """
    consts = [
        bytecode_text(const, python) if isinstance(const, CodeType) else constant_text(const) or type(const).__name__
        for const in code.co_consts
    ]
    return " ".join([python, code.co_code.hex(), *consts, *code.co_names, *code.co_varnames, *code.co_freevars])


def names_used(code: CodeType) -> set[str]:
    """Return global names and attributes used by a function.

    Includes the functions inside it.
    """
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, CodeType):
            names |= names_used(const)
    return names


def constant_text(value: Any) -> str | None:
    """A plain value that cannot change, as text; None for anything else."""
    if value is None or type(value) in (bool, int, float, str, bytes, complex, Decimal, UUID):
        return repr(value)
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if type(value) in (tuple, frozenset):
        parts = [constant_text(item) for item in value]
        if None in parts:
            return None
        texts = [part for part in parts if part is not None]
        return f"{type(value).__name__}({', '.join(texts if isinstance(value, tuple) else sorted(texts))})"
    if isinstance(value, re.Pattern):
        return f"re({value.pattern!r}, {value.flags})"
    return None


def type_text(annotation: Any) -> str:
    """A type as text, without addresses."""
    if isinstance(annotation, type):
        return f"{annotation.__module__}.{annotation.__qualname__}"
    return _ADDRESS.sub("", str(annotation))
