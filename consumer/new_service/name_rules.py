"""Which names a new service may have.

The name becomes a package of Python, a role and a database of PostgreSQL, an image, and the Kafka group.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Callable

_LENGTH_MAX = 40  # PostgreSQL cuts names of roles at 63 bytes, and people add to this one
# The project's other folders, its tools, folders that Python's tools leave out of packages, and what PostgreSQL keeps for itself.
_TAKEN = {
    "consumer": "the framework's package",
    "idempotent_consumer": "the framework's distribution",
    "build": "a folder of built files",
    "dist": "a folder of built files",
    "hatchling": "a tool of the project",
    "mypy": "a tool of the project",
    "pytest": "a tool of the project",
    "pytest_asyncio": "a tool of the project",
    "ruff": "a tool of the project",
    "none": "reserved by PostgreSQL",
    "public": "reserved by PostgreSQL",
    "template0": "reserved by PostgreSQL",
    "template1": "reserved by PostgreSQL",
    "tests": "the folder of the tests",
    "wheels": "a folder of the project",
}


def problem_of(name: str, is_installed: Callable[[str], bool]) -> str | None:
    """Return what is wrong with a name; None if it is good.

    The text also says what to do. is_installed: whether an import would find an installed package of that name instead.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > _LENGTH_MAX:
        better = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_0123456789")[:_LENGTH_MAX].strip("_")
        example = better if better and problem_of(better, is_installed) is None else "orders"
        return f"not a package name; write lower-case letters, digits and single _, at most {_LENGTH_MAX}, such as {example}"
    if keyword.iskeyword(name):
        why = "a keyword of Python"
    elif name in sys.stdlib_module_names:
        why = "a module of Python's own"
    elif is_installed(name):
        why = "an installed package"
    elif name.startswith("pg_"):
        why = "reserved by PostgreSQL"
    else:
        why = _TAKEN.get(name, "")
    return f"{why}; choose another name, such as {name.removeprefix('pg_')}_service" if why else None
