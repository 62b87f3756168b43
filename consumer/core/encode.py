"""Encodes values as JSON: what msgspec encodes, with pydantic models anywhere inside.

The counterpart of decode.py. Numbers that are not finite become null: `not_finite` of values.py finds them.
"""

from __future__ import annotations

from typing import Any

import msgspec


def _model(value: Any) -> msgspec.Raw:
    """Return a pydantic model as JSON, alike wherever it is."""
    if not hasattr(value, "model_dump_json"):
        raise TypeError(f"it holds a {type(value).__name__}")
    return msgspec.Raw(value.model_dump_json().encode())


to_json = msgspec.json.Encoder(enc_hook=_model).encode
