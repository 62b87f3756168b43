"""Reads settings from flags, the environment, secret files and a TOML file.

Knows precedence and text, not what a setting means. Every error is one line that names a variable or a key, and never its
value: what stands where a path belongs may be the secret itself.

Also imports functions that settings and flags name.
"""

from __future__ import annotations

import datetime
import importlib
import stat
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from consumer.core.errors import Misconfigured
from consumer.logs import describe, log

PREFIX = "CONSUMER_"
CONFIG_VARIABLE = f"{PREFIX}CONFIG"
_FILE_BYTES_MAX = 1 << 20
_SECRET_BYTES_MAX = 1 << 16

Kind = Literal["default", "environment", "file", "flag", "secret file", "app"]


@dataclass(frozen=True)
class Source:
    """Where a setting's value comes from.

    place: the variable, the flag, the key of the file, or the variable or key that names the secret file. secret_file: an
    absolute path, if the file can be read again. `app` is for the address of a shard in code.
    """

    kind: Kind = "default"
    place: str | None = None
    secret_file: str | None = None


@dataclass(frozen=True)
class Known:
    """The settings that exist.

    types: str, int, float or bool, by name. secrets: names.
    """

    types: Mapping[str, type]
    secrets: Collection[str]


@dataclass
class Gathered:
    """The values that are given, and where each comes from."""

    config: str | None = None
    values: dict[str, Any] = field(default_factory=dict, repr=False)
    sources: dict[str, Source] = field(default_factory=dict)

    def add(self, name: str, value: Any, source: Source) -> None:
        """Add a value, unless a source that was added before has one."""
        if name not in self.values:
            self.values[name], self.sources[name] = value, source


def gather(known: Known, flags: Mapping[str, Any], environment: Mapping[str, str], config: str | None) -> Gathered:
    """Collect settings: flags first, then the environment, then the file.

    flags: by the names of settings. config: the path of a TOML file; without it CONSUMER_CONFIG names one. Empty variables
    count as absent. Raises Misconfigured.
    """
    variables = {name.upper(): text for name, text in environment.items() if text and name.upper().startswith(PREFIX)}
    path = config if config is not None else variables.get(CONFIG_VARIABLE)
    gathered = Gathered(path)
    for name, value in flags.items():
        gathered.add(name, value, Source("flag", f"--{name.replace('_', '-')}"))
    _add_variables(gathered, known, variables)
    if path is not None:
        _add_file(gathered, known, path, CONFIG_VARIABLE if path == variables.get(CONFIG_VARIABLE) else "--config")
    return gathered


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{PREFIX}{name.upper()}"


def subject_of(gathered: Gathered, name: str) -> str:
    """Return the variable or key that an error names."""
    source = gathered.sources.get(name, Source())
    if source.kind == "file":
        return f"{gathered.config}: {source.place}"
    if source.kind == "secret file":
        return str(source.place)
    return variable_of(name)


def _add_variables(gathered: Gathered, known: Known, variables: Mapping[str, str]) -> None:
    for name in known.types:
        variable = variable_of(name)
        file_variable = f"{variable}_FILE"
        if name in known.secrets and file_variable in variables:
            if variable in variables:
                raise Misconfigured(f"{variable}: {file_variable} is given, too; unset one of them")
            _add_secret(gathered, name, variables[file_variable], file_variable)
        elif variable in variables:
            gathered.add(name, variables[variable], Source("environment", variable))


def _add_secret(gathered: Gathered, name: str, path: str, place: str) -> None:
    """Read a secret file, unless another source wins."""
    if name in gathered.values:
        return
    content = _read(path, _SECRET_BYTES_MAX, place, "its file")
    try:
        text = content.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise Misconfigured(f"{place}: its file is not UTF-8 text; write the secret as text") from None
    if not text.strip():
        raise Misconfigured(f"{place}: its file is empty; write the secret into it")
    if "\0" in text:
        raise Misconfigured(f"{place}: its file has a NUL character; write the secret as text")
    again = str(Path(path).absolute()) if Path(path).is_file() else None  # a pipe gives its content once
    gathered.add(name, text, Source("secret file", place, again))


def _read(path: str, bytes_max: int, subject: str, what: str) -> bytes:
    try:
        if stat.S_ISCHR(Path(path).stat().st_mode) or stat.S_ISBLK(Path(path).stat().st_mode):
            raise Misconfigured(f"{subject}: {what} is a device; name a file")
        with Path(path).open("rb") as file:
            content = file.read(bytes_max + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or "not a path"
        raise Misconfigured(f"{subject}: {what} cannot be read ({why}); name a file that can be read") from None
    if len(content) > bytes_max:
        raise Misconfigured(f"{subject}: {what} is larger than {bytes_max:,} bytes; name another file")
    return content


# -- the file -----------------------------------------------------------------------------------------------------------


def _add_file(gathered: Gathered, known: Known, path: str, given_by: str) -> None:
    """Add the values of a TOML file, whose keys are all checked."""
    import tomllib

    content = _read(path, _FILE_BYTES_MAX, given_by, path)
    try:
        document = tomllib.loads(content.decode())
    except UnicodeDecodeError:
        raise Misconfigured(f"{path}: not UTF-8; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise Misconfigured(f"{path}: not valid TOML: {why}; correct the file") from None
    keys: dict[str, str] = {}  # by the name of what they set, as written
    secret_files: dict[str, str] = {}
    for key, value in _flat(document):
        name = "_".join(key)
        shown = ".".join(key)[:80]
        if name in keys:
            raise Misconfigured(f"{path}: {shown} is given twice, also as {keys[name]}; remove one of them")
        keys[name] = shown
        secret = name.removesuffix("_file")
        if name in known.types:
            _check_type(path, shown, value, known.types[name])
            if value != "":
                gathered.add(name, value, Source("file", shown))
        elif name.endswith("_file") and secret in known.secrets:
            _check_type(path, shown, value, str)
            if value != "":
                secret_files[secret] = value
        else:
            raise Misconfigured(f"{path}: {shown}: no such setting; {_close_key(key, known)}")
    for secret, file in secret_files.items():
        place = keys[f"{secret}_file"]
        if secret in keys:
            raise Misconfigured(f"{path}: {keys[secret]}: {place} is given, too; remove one of them")
        _add_secret(gathered, secret, file, f"{path}: {place}")


def _flat(table: Mapping[str, Any], above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Return values with their keys: [kafka] client_id is (kafka, client_id)."""
    pairs: list[tuple[tuple[str, ...], Any]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            pairs += _flat(value, (*above, key))
        else:
            pairs.append(((*above, key), value))
    return pairs


_EXPECTED = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
_ACTUAL: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "true or false"),
    (int, "a whole number"),
    (float, "a fraction"),
    (str, "text"),
    (list, "a list"),
    ((datetime.date, datetime.time), "a date or a time"),
)


def _check_type(path: str, key: str, value: Any, expected: type) -> None:
    accepted = (int, float) if expected is float else expected
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        actual = next(text for types, text in _ACTUAL if isinstance(value, types))
        raise Misconfigured(f"{path}: {key}: must be {_EXPECTED[expected]}, is {actual}; correct the file")
    if isinstance(value, str) and "\0" in value:
        raise Misconfigured(f"{path}: {key}: has a NUL character; remove it")


def _close_key(key: tuple[str, ...], known: Known) -> str:
    """Suggest keys that are like this one, in the same table."""
    name = "_".join(key).lower().replace("-", "_").removeprefix(PREFIX.lower())
    names = [*known.types, *(f"{secret}_file" for secret in known.secrets)]
    close = [match for match in get_close_matches(name, names, n=3, cutoff=0.6)]
    if not close:
        return "remove it; `consumer config` lists the settings"
    table = "_".join(key[:-1])
    shown = [
        ".".join((*key[:-1], match.removeprefix(f"{table}_"))) if table and match.startswith(f"{table}_") else match
        for match in close
    ]
    return f"did you mean {' or '.join(shown)}?"


def load_function(subject: str, path: str) -> Callable[..., Any]:
    """Import the function that "module:callable" names.

    subject: begins errors. The current directory is on the import path. Raises Misconfigured.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise Misconfigured(f'{subject}: does not name a function; write "module:callable"')
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with redirect_stdout(sys.stderr):  # what a module prints is not part of our output
            target: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            target = getattr(target, name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise Misconfigured(
            f"{subject}: cannot be imported ({describe(error)}); correct the name or the module"
        ) from None
    if not callable(target):
        raise Misconfigured(f"{subject}: a {type(target).__name__}, which cannot be called; name a function")
    log.disabled = False  # dictConfig in a module disables the loggers that it does not name
    return target  # type: ignore[no-any-return]
