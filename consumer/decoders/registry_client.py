"""Asks a schema registry over HTTP, with the interface of Confluent's.

Blocking: registry.py calls it in a thread. Limitations: follows no redirect, so that credentials stay with the registry.
"""

from __future__ import annotations

import base64
import json
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlsplit

from consumer.core import hosts
from consumer.core.errors import ConsumerError, Misconfigured
from consumer.decoders.wire_format import SchemaKey
from consumer.settings import Settings

_SECONDS = 5.0  # of one request
_ANSWER_BYTES_MAX = 16 << 20
_UNKNOWN = (40401, 40402, 40403)  # subject, version, schema not found
_REFERENCES_MAX = 500
_NO_REGISTRY = "an answer of another form; is CONSUMER_SCHEMA_REGISTRY_URL a schema registry?"
_PROTOBUF_TEXT = re.compile(r"[^A-Za-z0-9+/=]")  # what base64 has not
_MEDIA_TYPES = "application/vnd.schemaregistry.v1+json, application/json"


class RegistryUnavailable(ConsumerError):
    """The registry gave no answer about a schema."""


class SchemaUnknown(ConsumerError):
    """The registry knows no such schema."""


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema and those that it refers to.

    kind: AVRO, JSON or PROTOBUF. text: as the registry has it; for Protobuf a FileDescriptorProto in base64. references: names and
    texts, each after those that it refers to.
    """

    kind: str
    text: str
    references: tuple[tuple[str, str], ...] = ()
    id: int = -1


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class RegistryClient:
    """A client of one registry, which may have several addresses.

    Raises Misconfigured for settings that cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._urls = _urls_of(settings)
        self._headers = {"Accept": _MEDIA_TYPES, **_authorization(settings)}
        self._opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=_tls(settings)), _NoRedirect())

    def schema(self, key: SchemaKey) -> Schema:
        """Return the schema of an id or a GUID.

        Raises RegistryUnavailable and SchemaUnknown.
        """
        path = f"/schemas/ids/{key}" if isinstance(key, int) else f"/schemas/guids/{key}"
        return self._whole(path, self._get(path), key if isinstance(key, int) else -1)

    def latest(self, subject: str) -> Schema:
        """Return the newest schema of a subject, with its id.

        Raises RegistryUnavailable and SchemaUnknown.
        """
        path = f"/subjects/{quote(subject, safe='')}/versions/latest"
        answer = self._get(path)
        if not isinstance(answer.get("id"), int):
            raise RegistryUnavailable(_NO_REGISTRY)
        return self._whole(path, answer, answer["id"])

    def _whole(self, path: str, answer: Mapping[str, Any], id: int) -> Schema:
        """Return a schema with its references, read as its kind needs it."""
        kind = answer.get("schemaType") or "AVRO"
        if kind == "PROTOBUF":
            answer = self._get(f"{path}?format=serialized")
            if _PROTOBUF_TEXT.search(_text_of(answer)):
                raise RegistryUnavailable(
                    "it has a Protobuf schema as text only; use one that answers format=serialized, as Confluent's does"
                )
        references: dict[str, str] = {}
        self._add_references(answer, kind, references, set())
        return Schema(kind, _text_of(answer), tuple(references.items()), id)

    def _add_references(self, answer: Mapping[str, Any], kind: str, texts: dict[str, str], begun: set[str]) -> None:
        for name, subject, version in _references_of(answer):
            if name in begun:
                continue
            if len(begun) >= _REFERENCES_MAX:
                raise SchemaUnknown("a schema with more references than are followed")
            begun.add(name)
            path = f"/subjects/{quote(subject, safe='')}/versions/{version}"
            inner = self._get(path + ("?format=serialized" if kind == "PROTOBUF" else ""))
            self._add_references(inner, kind, texts, begun)
            texts[name] = _text_of(inner)

    def _get(self, path: str) -> dict[str, Any]:
        """Return the answer of the first address that gives one."""
        failure = RegistryUnavailable("no address")
        for url in self._urls:
            try:
                return self._get_from(url, path)
            except RegistryUnavailable as error:
                failure = error
        raise failure

    def _get_from(self, url: str, path: str) -> dict[str, Any]:
        request = urllib.request.Request(url + path, headers=self._headers)  # noqa: S310 - http and https only, see _urls_of
        try:
            with self._opener.open(request, timeout=_SECONDS) as response:
                body = response.read(_ANSWER_BYTES_MAX + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error.code, error.read(_ANSWER_BYTES_MAX)) from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise RegistryUnavailable(f"{_label(url)} does not answer ({reason or type(error).__name__})") from None
        answer = _json(body) if len(body) <= _ANSWER_BYTES_MAX else None
        if not isinstance(answer, dict):
            raise RegistryUnavailable(
                f"{_label(url)} answers no JSON; is CONSUMER_SCHEMA_REGISTRY_URL a schema registry?"
            )
        return answer


def _refusal(status: int, body: bytes) -> ConsumerError:
    answer = _json(body)
    code = answer.get("error_code") if isinstance(answer, dict) else None
    if status == 404 and code in _UNKNOWN:
        return SchemaUnknown(f"the registry knows no such schema ({code})")
    if status in (401, 403):
        return RegistryUnavailable(
            f"the registry refuses the credentials ({status}); see CONSUMER_SCHEMA_REGISTRY_USERNAME, _PASSWORD and _TOKEN"
        )
    if status == 404:
        return RegistryUnavailable(
            "404 at this path; does CONSUMER_SCHEMA_REGISTRY_URL lack a path, such as /apis/ccompat/v7?"
        )
    return RegistryUnavailable(f"the registry answers {status}")


def _references_of(answer: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Return the names, subjects and versions of what a schema refers to."""
    try:
        return [(one["name"], one["subject"], int(one["version"])) for one in answer.get("references") or ()]
    except (TypeError, KeyError, ValueError):
        raise RegistryUnavailable(_NO_REGISTRY) from None


def _text_of(answer: Mapping[str, Any]) -> str:
    text = answer.get("schema")
    if not isinstance(text, str):
        raise RegistryUnavailable(_NO_REGISTRY)
    return text


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _label(url: str) -> str:
    return urlsplit(url).netloc


def _urls_of(settings: Settings) -> list[str]:
    """Return the addresses. Raises Misconfigured."""
    given = settings.schema_registry_url
    if not given:
        raise Misconfigured(
            "CONSUMER_SCHEMA_REGISTRY_URL: not set, and a decoder or encoder of the App needs it; set it (or "
            "--schema-registry-url) to https://host:port"
        )
    urls = [url.strip().rstrip("/") for url in given.split(",") if url.strip()]
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Misconfigured("CONSUMER_SCHEMA_REGISTRY_URL: no http or https address; write https://host:port")
        if parts.username is not None:
            raise Misconfigured(
                "CONSUMER_SCHEMA_REGISTRY_URL: holds a user; write it to CONSUMER_SCHEMA_REGISTRY_USERNAME and _PASSWORD"
            )
        away = hosts.elsewhere([parts.hostname])
        if parts.scheme == "http" and away and "registry" not in settings.insecure:
            raise Misconfigured(
                f"schema registry at {away[0]}: another machine, reached without verifying the server; write https:// into "
                "CONSUMER_SCHEMA_REGISTRY_URL, or allow it with CONSUMER_ALLOW_INSECURE=registry"
            )
    return urls


def _authorization(settings: Settings) -> dict[str, str]:
    user, password, token = (
        settings.schema_registry_username,
        settings.schema_registry_password,
        settings.schema_registry_token,
    )
    if token is not None and user is not None:
        raise Misconfigured("CONSUMER_SCHEMA_REGISTRY_TOKEN: excludes CONSUMER_SCHEMA_REGISTRY_USERNAME; unset one")
    if (user is None) != (password is None):
        raise Misconfigured(
            "CONSUMER_SCHEMA_REGISTRY_USERNAME: goes with CONSUMER_SCHEMA_REGISTRY_PASSWORD; set both, or neither"
        )
    if token is not None:
        return {"Authorization": f"Bearer {token.get_secret_value()}"}
    if user is not None and password is not None:
        pair = f"{user}:{password.get_secret_value()}".encode()
        return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}
    return {}


def _tls(settings: Settings) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=settings.schema_registry_ca_file)
    except (OSError, ssl.SSLError) as error:
        raise Misconfigured(
            f"CONSUMER_SCHEMA_REGISTRY_CA_FILE: it cannot be used ({error}); name a file with CA certificates"
        ) from None
