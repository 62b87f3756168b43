"""Reads requests: the visitor, the media type, the fields of the body."""

from __future__ import annotations

import hmac
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request

from consumer.schemes.web import Problem
from handlers.shop.orders import Order

COOKIE = "shop_visitor"


def visitor_of(request: Request) -> UUID | None:
    text = request.cookies.get(COOKIE, "")
    try:
        return UUID(hex=text) if len(text) == 32 else None
    except ValueError:
        return None


def is_form(request: Request) -> bool:
    return media_type_of(request) == "application/x-www-form-urlencoded"


def media_type_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


_decoder = msgspec.json.Decoder(float_hook=Decimal)


async def body_of(request: Request) -> dict[str, Any]:
    """The body's fields. Raises Problem: 415, 400, 422."""
    if is_form(request):
        try:
            pairs = (await request.form()).multi_items()
        except HTTPException as error:  # too many fields, for example
            raise Problem(error.status_code, "form_malformed", error.detail) from None
        fields: dict[str, Any] = dict(pairs)
        if len(fields) < len(pairs):
            raise Problem(422, "field_repeated", "A field stands there twice.")
        return fields
    if media_type_of(request) != "application/json":
        raise Problem(415, "media_type", "Send application/json, or a form that is application/x-www-form-urlencoded.")
    try:
        decoded = _decoder.decode(await request.body())
    except (msgspec.DecodeError, RecursionError, ValueError, ArithmeticError):
        raise Problem(400, "json_malformed", "The body is not JSON.") from None
    if not isinstance(decoded, dict):
        raise Problem(422, "not_an_object", "The body is JSON, but no object.")
    return decoded


async def has_own_token(request: Request, order: Order) -> bool:
    """Whether the request brings this order's own token."""
    given = request.headers.get("idempotency-key")
    if given is None:
        given = str((await request.form()).get("token", ""))
    return hmac.compare_digest(given.strip('"').encode(), (order.token or "").encode())
