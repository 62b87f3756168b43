"""Who acts, for the record of operators' actions."""

from __future__ import annotations

import getpass
import os


def system_user() -> str:
    """Return the name of this process's user."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"uid {os.getuid()}"
