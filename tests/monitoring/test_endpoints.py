"""The pages without workers: formats, codes, and allowed addresses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from consumer import Settings, tls
from consumer.core.errors import Misconfigured
from consumer.core.retention import Generation, LedgerState, Policy, forgets_in_seconds
from consumer.metrics.catalog import BATCH_MESSAGES, MESSAGES, METRICS, PREFIX, Kind, Source
from consumer.metrics.fleet import Fleet
from consumer.metrics.recorder import Recorder
from consumer.monitoring.endpoints import routes_of
from consumer.monitoring.http_server import Answer, Request

pytestmark = pytest.mark.unit


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet.of("billing", 1)
    process = fleet.started(0, 100)
    recorder = Recorder()
    recorder.add(MESSAGES, ("settle", 'pay"ments\n', "applied", ""), 3)
    recorder.observe(BATCH_MESSAGES, (), 3)
    recorder.observe(BATCH_MESSAGES, (), 1e9)
    fleet.report(0, process, {"member": "m", "metrics": recorder.beat()})
    return fleet


def as_openmetrics(text: str) -> Iterator[Metric]:
    yield from openmetrics(text)  # type: ignore[no-untyped-call]


def get(fleet: Fleet, path: str, accept: str = "", **query: str) -> Answer:
    return routes_of(fleet)[path](Request(path, query, {"accept": accept}))


@pytest.mark.parametrize(
    ("accept", "content_type", "parse"),
    [
        ("", "text/plain; version=", prometheus),
        (
            "application/openmetrics-text;version=1.0.0,text/plain;q=0.5",
            "application/openmetrics-text; version=",
            openmetrics,
        ),
    ],
)
def test_metrics_in_both_formats(fleet: Fleet, accept: str, content_type: str, parse: Any) -> None:
    answer = get(fleet, "/metrics", accept)
    assert answer.content_type.startswith(content_type)
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse(answer.body.decode())
        for sample in family.samples
    }
    labels = {"app": "billing", "handler": "settle", "topic": 'pay"ments\n', "outcome": "applied", "cause": ""}
    assert samples[f"{PREFIX}messages_total", tuple(sorted(labels.items()))] == 3
    of_batches = [f"{PREFIX}batch_messages_{part}" for part in ("bucket", "count", "sum")]
    assert samples[of_batches[1], (("app", "billing"),)] == 2
    assert samples[of_batches[0], (("app", "billing"), ("le", "5.0"))] == 1
    assert samples[of_batches[0], (("app", "billing"), ("le", "+Inf"))] == 2
    assert samples[f"{PREFIX}workers", (("app", "billing"), ("state", "running"))] == 1


def test_every_metric_is_described_with_its_kind(fleet: Fleet) -> None:
    families = {
        family.name: family
        for family in as_openmetrics(get(fleet, "/metrics", "application/openmetrics-text").body.decode())
    }
    for metric in METRICS:
        if metric.source is not Source.REPLAY:
            family = families[metric.full_name.removesuffix("_total")]
            assert family.documentation == metric.help
            assert family.type == {Kind.HIGHEST: "gauge"}.get(metric.kind, metric.kind.value)


def test_health(fleet: Fleet) -> None:
    assert get(fleet, "/livez") == Answer(b"live\n") and get(fleet, "/readyz") == Answer(b"ready\n")
    fleet.ended(0, 1, "killed")
    assert get(fleet, "/readyz").status == 200 and get(fleet, "/livez").status == 200
    strict = get(fleet, "/readyz", strict="")
    assert (strict.status, strict.body) == (503, b"not ready\nworker 0 has not joined its group yet\n")
    fleet.given_up(0)
    assert (get(fleet, "/livez").status, get(fleet, "/livez").body) == (503, b"not live\nworker 0 has ended\n")


def test_status_is_json(fleet: Fleet) -> None:
    answer = get(fleet, "/status")
    assert answer.content_type == "application/json"
    assert json.loads(answer.body)["handlers"]["settle"]["applied"] == 3


def address(http: str, **more: Any) -> tuple[str, int] | None:
    return tls.check_http(Settings(postgres_dsn="postgresql://localhost/x", http=http, **more))


def test_addresses() -> None:
    assert address("127.0.0.1:9464") == ("127.0.0.1", 9464)
    assert address("[::1]:0") == ("::1", 0)
    assert address("localhost:80") == ("localhost", 80)
    assert address("0.0.0.0:9464", allow_insecure="http") == ("0.0.0.0", 9464)
    for refused in ("0.0.0.0:9464", "[::]:9464", "10.0.0.1:9464", "metrics.example:9464"):
        with pytest.raises(Misconfigured, match="CONSUMER_ALLOW_INSECURE=http"):
            address(refused)
    with pytest.raises(Misconfigured, match="no port"):
        address("127.0.0.1:65536")
    for wrong in ("9464", ":9464", "127.0.0.1", "::1:9464", "127.0.0.1:http", "a b:1"):
        with pytest.raises(Misconfigured, match="CONSUMER_HTTP"):
            address(wrong)


def test_time_until_the_ledger_forgets() -> None:
    hour, policy = 3600.0, Policy(retention=24, generation=6, skew=1)

    def state(now: float, *generations: Generation) -> LedgerState:
        return LedgerState(now, 1, generations[-1].number, False, None, generations)

    still_open = Generation(2, 10 * hour, None, False)
    assert forgets_in_seconds(state(12 * hour, Generation(1, 0, 10 * hour, False), still_open), policy) == 22 * hour
    assert forgets_in_seconds(state(40 * hour, Generation(1, 0, 10 * hour, False), still_open), policy) == 0
    assert forgets_in_seconds(state(12 * hour, Generation(1, 0, 10 * hour, True), still_open), policy) == 28 * hour
    assert forgets_in_seconds(state(20 * hour, still_open), policy) == 24 * hour
