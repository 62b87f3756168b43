"""A schema registry with the documented HTTP interface of Confluent's.

As far as clients that read need it.

Its schemas are those of decoders/confluent.json, and what a test adds. Compared with a real one (Apicurio Registry 3.0.9,
`/apis/ccompat/v7`): the same paths, fields and error codes.
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

FIXTURES: dict[str, Any] = json.loads((Path(__file__).parent.parent / "decoders" / "confluent.json").read_text("utf-8"))


class SchemaRegistry:
    """A registry on a free port, while its block runs.

    is_down: it answers 503. requests: the paths that were asked for. credentials: the Authorization header that it wants.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.subjects: dict[str, list[dict[str, Any]]] = {
            name: [dict(subject)] for name, subject in FIXTURES["subjects"].items()
        }
        self.is_down = False
        self.serializes = True  # answers format=serialized
        self.credentials = ""
        self.requests: list[str] = []
        self._tls = tls

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://localhost:{self._server.server_address[1]}"

    def add(self, subject: str, schema: str, kind: str = "AVRO", id: int | None = None) -> int:
        """Register a schema; return its id."""
        versions = self.subjects.setdefault(subject, [])
        known = [version["id"] for other in self.subjects.values() for version in other]
        new = id if id is not None else max(known, default=0) + 1
        versions.append(
            {"id": new, "version": len(versions) + 1, "schemaType": kind, "schema": schema, "references": []}
        )
        return new

    def __enter__(self) -> SchemaRegistry:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, answer = registry._answer(self.path, self.headers.get("Authorization", ""))
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, path: str, credentials: str) -> tuple[int, dict[str, Any]]:
        self.requests.append(path)
        if self.is_down:
            return 503, {"error_code": 50003, "message": "not now"}
        if credentials != self.credentials:
            return 401, {"error_code": 401, "message": "Unauthorized"}
        parts = urlsplit(path)
        is_serialized = parse_qs(parts.query).get("format") == ["serialized"]
        match [unquote(part) for part in parts.path.split("/")[1:]]:
            case ["schemas", "ids", id]:
                chosen = [version for version in self._versions() if str(version["id"]) == id]
                return self._version_answer(chosen, 40403, is_serialized)
            case ["schemas", "guids", guid]:
                return self._version_answer(
                    [one for one in self._versions() if one.get("guid") == guid], 40403, is_serialized
                )
            case ["subjects", subject, "versions", version]:
                if subject not in self.subjects:
                    return 404, {"error_code": 40401, "message": "Subject not found."}
                versions = self.subjects[subject]
                chosen = (
                    versions[-1:]
                    if version == "latest"
                    else [one for one in versions if str(one["version"]) == version]
                )
                return self._version_answer(chosen, 40402, is_serialized, subject)
            case _:
                return 404, {"error_code": 404, "message": "HTTP 404 Not Found"}

    def _versions(self) -> list[dict[str, Any]]:
        return [version for versions in self.subjects.values() for version in versions]

    def _version_answer(
        self, versions: list[dict[str, Any]], code: int, is_serialized: bool, subject: str = ""
    ) -> tuple[int, dict[str, Any]]:
        if not versions:
            return 404, {"error_code": code, "message": "not found"}
        answer = {key: value for key, value in versions[0].items() if key != "schemaType" or value != "AVRO"}
        if not subject:
            answer = {key: value for key, value in answer.items() if key not in ("id", "version")}
        if answer.get("schemaType") == "PROTOBUF" and not (is_serialized and self.serializes):
            answer["schema"] = 'syntax = "proto3"; // the text, which this client does not read'
        return 200, answer


def value_of(case: str) -> bytes:
    """The bytes of a value in decoders/confluent.json."""
    return base64.b64decode(FIXTURES["cases"][case]["value"])


def headers_of(case: str) -> list[tuple[str, bytes]]:
    """Its headers."""
    return [(name, base64.b64decode(value)) for name, value in FIXTURES["cases"][case]["headers"]]
