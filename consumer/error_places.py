"""Finds where in the application an error was raised.

Also the schema objects that it names. Reads tracebacks and the fields of database errors; never values, arguments or an
error's text. Limitations: a deferred write fails when its batch is sent, outside its handler; then the place is the
handler's.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

FRAMES_MAX = 20
_OWN = str(Path(__file__).resolve().parent) + "/"
_LIBRARIES = tuple(
    f"{path}/" for name in ("stdlib", "platstdlib", "purelib", "platlib") if (path := sysconfig.get_paths().get(name))
)
_DEMO = _OWN + "demo/"  # written as an application is
# Messages of these codes quote one schema object that exists, and no field of the error names it. The name of a missing
# object is not repeated: it comes from the SQL text, which may contain a value.
_NAMING = frozenset(("42501", "2200H"))
_NAME = re.compile(r'"([\w.$-]{1,126})"|for \w+ ([\w.$-]{1,126})$')


def place(error: BaseException | None, handler_place: str = "") -> str:
    """Return the place of an error as file:line.

    That is the innermost frame of the application; else the handler's place, else the innermost frame.
    """
    innermost = users = ""
    for file, line, _ in _frames(error):
        innermost = f"{_short(file, 1)}:{line}"
        if is_users(file):
            users = innermost
    return users or (_short(handler_place, 1) if handler_place else innermost)


def frames(error: BaseException | None) -> list[str]:
    """Return the frames as `file:line in function`, without values.

    The outermost is first; causes come before, as Python prints them.
    """
    trace: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        lines = [f"{_short(file, 2)}:{line} in {name}" for file, line, name in _frames(error)]
        trace = [*lines[-FRAMES_MAX:], type(error).__name__, *trace]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return trace[-FRAMES_MAX * 2 :]


def names(error: BaseException | None) -> str:
    """Return the schema objects that a database error names.

    As `table t column c constraint x`; empty for other errors.
    """
    if error is None:
        return ""
    parts = [
        f"{kind} {name}"
        for kind in ("table", "column", "constraint")
        if isinstance(name := getattr(error, f"{kind}_name", None), str)
    ]
    if not parts and getattr(error, "sqlstate", None) in _NAMING and error.args:
        match = _NAME.search(str(error.args[0]))
        parts = [next(group for group in match.groups() if group)] if match else []
    return " ".join(parts)


def error_summary(error: BaseException | None, handler_place: str = "") -> str:
    """Return kind, place and schema objects of an error, without values."""
    if error is None:
        return "unknown"
    kind = type(error).__name__
    code = getattr(error, "sqlstate", None)
    text = f"{kind} {code}" if isinstance(code, str) else kind
    if objects := names(error):
        text += f" ({objects})"
    at = place(error, handler_place)
    return f"{text} at {at}" if at else text


def _frames(error: BaseException | None) -> Iterator[tuple[str, int, str]]:
    frame: TracebackType | None = error.__traceback__ if error is not None else None
    while frame is not None:
        code = frame.tb_frame.f_code
        yield code.co_filename, frame.tb_lineno, code.co_name
        frame = frame.tb_next


def is_users(file: str) -> bool:
    """Return whether a file is the application's, not ours or a library's."""
    if file.startswith(_DEMO):
        return True
    return not (file.startswith((_OWN, "<", *_LIBRARIES)) or "site-packages" in file or file.endswith(".pyx"))


def _short(file: str, parts: int) -> str:
    return "/".join(file.rsplit("/", parts)[-parts:])
