"""Which files `consumer run --reload` watches.

Those of the App, and its configuration.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from consumer.app_loader import names_in
from consumer.core.errors import Misconfigured

_NOT_SOURCES = {"__pycache__", "venv", "node_modules", "site-packages", "build", "dist"}
_INSTALLED = {"site-packages", "dist-packages"}


def folders_of(path: str, given: Sequence[Path]) -> list[Path]:
    """Return the directories to watch for the App of "module:attribute".

    given: those of --reload-dir, which replace the App's own. The App is not imported: it may be what is being corrected. Its
    directory is the current one, if its module is there or is still missing. Raises Misconfigured.
    """
    module, _ = names_in(path)
    for folder in given:
        if not folder.is_dir():
            raise Misconfigured(f"--reload-dir {folder}: not a directory; name one that holds the App's files")
    if given:
        return [folder.resolve() for folder in given]
    here = Path.cwd().resolve()
    place = _place_of(module.partition(".")[0], here)
    if place is None:
        return [here]
    real = place.resolve()  # what is installed may be a link to the sources, as by `flit install --symlink`
    if _INSTALLED & set(
        real.relative_to(here).parts if real.is_relative_to(here) else real.parts
    ):  # .venv may be in it
        raise Misconfigured(
            f"--reload: {module} is an installed package; name what to watch with --reload-dir DIRECTORY"
        )
    folder = real if real.is_dir() else real.parent
    if folder.is_relative_to(here):
        return [here]
    return [here, folder] if place.is_relative_to(here) else [folder]  # `here`: beside a link that leads elsewhere


def is_source(changed: Path, folders: Collection[Path], files: Collection[Path]) -> bool:
    """Return whether a changed file is watched.

    Each of `files` is. Python files below a folder count; hidden files and directories, virtual environments and caches below it do not.
    """
    if changed in files:
        return True
    below = [changed.relative_to(folder).parts for folder in folders if changed.is_relative_to(folder)]
    return changed.suffix == ".py" and any(
        not any(part.startswith(".") or part in _NOT_SOURCES for part in parts) for parts in below
    )


def _place_of(package: str, here: Path) -> Path | None:
    """Return a package's directory, or a single module's file."""
    before = sys.path
    sys.path = [str(here), *sys.path]
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    finally:
        sys.path = before
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).absolute()
    return Path(spec.origin).absolute() if spec.origin and spec.has_location else None
