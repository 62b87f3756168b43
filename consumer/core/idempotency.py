"""Keys by which other systems recognize a request that is sent again."""

from __future__ import annotations

from hashlib import blake2b

_NAMESPACE = b"idempotency"  # no other id of the framework is in it


def idempotency_key(app: str, handler: str, message_id: bytes, step: str) -> str:
    """Return 32 hexadecimal digits that are the same for the same request.

    Each field is preceded by its length, so that no two lists of fields have the same bytes.
    """
    fields = (app.encode(), handler.encode(), message_id, step.encode("utf-8", "surrogatepass"))
    raw = b"".join([b"%d:%s" % (len(field), field) for field in fields])
    return blake2b(raw, digest_size=16, person=_NAMESPACE).hexdigest()
