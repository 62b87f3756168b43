"""Tokens of forms: a page of another site cannot know one.

Pure. A token belongs to one operator and one run of the console; there is no cookie. A site that makes an operator's
browser send a form has no way to read a page of ours, so it has no token.
"""

from __future__ import annotations

import hmac
import re
from urllib.parse import urlsplit

FIELD = "token"
_FORM_ID = re.compile("[0-9a-f]{32}")


class FormTokens:
    """Makes and checks tokens. secret: random, of this run."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def of(self, operator: str) -> str:
        """Return the token of an operator's forms."""
        return hmac.digest(self._secret, operator.encode("utf-8", "surrogatepass"), "sha256").hex()

    def is_valid(self, operator: str, token: str) -> bool:
        """Return whether a form was made for this operator."""
        return hmac.compare_digest(self.of(operator).encode(), token.encode("utf-8", "surrogatepass"))


def is_form_id(text: str) -> bool:
    """Return whether a text has the form of a form's id."""
    return _FORM_ID.fullmatch(text) is not None


def is_same_origin(origin: str | None, host: str | None) -> bool:
    """Return whether a request comes from a page of its own host.

    origin, host: the headers. The scheme may differ: a proxy may end TLS. A browser sends Origin with every POST, and
    "null" where it hides it.
    """
    if not origin or not host or origin == "null":
        return False
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
