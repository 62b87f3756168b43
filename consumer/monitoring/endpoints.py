"""The pages of `consumer run --http`. None of them asks a service."""

from __future__ import annotations

import json
from http import HTTPStatus

from consumer.metrics.fleet import Fleet
from consumer.monitoring.exposition import Exposition
from consumer.monitoring.http_server import Answer, Request, Route, as_text
from consumer.monitoring.status_page import status_of


def routes_of(fleet: Fleet) -> dict[str, Route]:
    """Return the pages by path."""
    exposition = Exposition(fleet)

    def metrics(request: Request) -> Answer:
        body, content_type = exposition.text(request.headers.get("accept", ""))
        return Answer(body, content_type=content_type)

    def livez(_: Request) -> Answer:
        return _health("live", fleet.not_live())

    def readyz(request: Request) -> Answer:
        return _health("ready", fleet.not_ready(strict="strict" in request.query))

    def status(_: Request) -> Answer:
        return Answer(json.dumps(status_of(fleet)).encode() + b"\n", content_type="application/json")

    return {"/metrics": metrics, "/livez": livez, "/readyz": readyz, "/status": status}


def _health(good: str, problems: list[str]) -> Answer:
    if problems:
        return as_text(f"not {good}", *problems, status=HTTPStatus.SERVICE_UNAVAILABLE)
    return as_text(good)
