"""Renders the templates, and writes all files of a service or none.

A template's path is the file's: `package/` becomes the name of the service, `dot.` a dot, and the ending `.template` goes, so
that no tool takes a template for code of this project.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib import metadata, resources
from importlib.machinery import PathFinder
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath

from consumer.core.errors import Misconfigured
from consumer.new_service.name_rules import problem_of

_DISTRIBUTION = "idempotent-consumer"


def write(name: str, parent: Path) -> list[str]:
    """Write the service `name` into a new folder of `parent`.

    Returns the paths of its files in that folder, sorted. Raises Misconfigured for a bad name and a folder that is not empty;
    then nothing is written.
    """
    if (problem := problem_of(name, _is_installed)) is not None:
        raise Misconfigured(f"{name[:80]!r}: {problem}")
    target = parent / name
    files = rendered(name, metadata.version(_DISTRIBUTION))
    unfinished = parent / f".{name}.{os.getpid()}"
    try:
        if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
            raise Misconfigured(
                f"{target}: exists, and is not an empty folder; choose another name, or another directory"
            )
        try:
            _write_all(files, unfinished)
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise Misconfigured(f"{target}: cannot be written ({error.strerror}); choose another directory") from None
    return sorted(files)


def _is_installed(name: str) -> bool:
    places = [place for place in sys.path if Path(place).resolve() != Path.cwd().resolve()]
    spec = PathFinder.find_spec(name, places)
    is_importable = spec is not None and spec.origin is not None  # a folder without files has no origin
    return is_importable or name in metadata.packages_distributions()


def rendered(name: str, version: str) -> dict[str, str]:
    """Return the texts of a service's files, by their paths.

    version: of this package, which the service requires up to the next minor version.
    """
    values = {"{{name}}": name, "{{bounds}}": _bounds(version)}
    files = {}
    for path, template in _templates(resources.files("consumer.new_service") / "templates", PurePosixPath()):
        text = template.read_text("utf-8")
        for placeholder, value in values.items():
            text = text.replace(placeholder, value)
        files[_target(path, name)] = text
    return files


def _templates(folder: Traversable, path: PurePosixPath) -> list[tuple[PurePosixPath, Traversable]]:
    templates = []
    for item in folder.iterdir():
        if item.is_dir():
            templates += _templates(item, path / item.name)
        elif item.name.endswith(".template"):
            templates.append((path / item.name.removesuffix(".template"), item))
    return templates


def _target(path: PurePosixPath, name: str) -> str:
    folders = [name if part == "package" else part for part in path.parts[:-1]]
    file = f".{path.name.removeprefix('dot.')}" if path.name.startswith("dot.") else path.name
    return "/".join([*folders, file])


def _bounds(version: str) -> str:
    major, minor = (int(part) for part in version.split(".")[:2])
    return f">={version},<{major}.{minor + 1}"


def _write_all(files: dict[str, str], folder: Path) -> None:
    folder.mkdir()
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
