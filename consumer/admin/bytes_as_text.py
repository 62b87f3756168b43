"""Shows bytes of messages in JSON answers."""

from __future__ import annotations

import base64


def text_or_base64(raw: bytes | None) -> str | dict[str, str] | None:
    """Return text for bytes that are UTF-8, else {"base64": …}."""
    if raw is None:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}
