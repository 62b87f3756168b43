"""Leaves out tests whose extra is missing; `make test` installs it."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("sqlalchemy") and find_spec("sqlmodel") else ["test_sqlalchemy.py"]
