<<<<<<< HEAD
"""Leaves out tests whose extra is missing; `make test` installs it."""
=======
"""Tests of optional parts, where their extra is installed.

`make test` installs them.
"""
>>>>>>> 480b694 (Hold the newest tests to the rules for names and docstrings)

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("sqlalchemy") and find_spec("sqlmodel") else ["test_sqlalchemy.py"]
