"""Leaves out tests whose extra is missing; `make test` installs it."""

from __future__ import annotations

from importlib.util import find_spec

if not (find_spec("sqlalchemy") and find_spec("sqlmodel")):
    collect_ignore = ["test_sqlalchemy.py", "test_sqlalchemy_publishing.py"]
