"""Helm and Kubernetes' schemas accept the chart and the manifests.

And the chart's pods are those of deploy/kubernetes.yaml. `make helm` brings what this needs. Limitation: no cluster runs them.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import documents as pages
import manifests
import pytest
import yaml
from harness import ROOT
from jsonschema import Draft7Validator

from consumer.app_loader import load_app

pytestmark = pytest.mark.unit

CHART = ROOT / "deploy" / "helm" / "idempotent-consumer"
MANIFESTS = [ROOT / "deploy" / "kubernetes.yaml", ROOT / "deploy" / "kubernetes-scaling.yaml"]
PROGRAM, SCHEMAS = manifests.helm(), manifests.schemas()
needs_helm = pytest.mark.skipif(PROGRAM is None, reason=f"no Helm: {manifests.why_missing()}")
needs_schemas = pytest.mark.skipif(not SCHEMAS, reason="no schemas of Kubernetes: make helm")

EVERYTHING: dict[str, Any] = {
    "settings": {
        "kafka_bootstrap_servers": "kafka:9093,kafka-2:9093",
        "kafka_security_protocol": "SASL_SSL",
        "kafka_sasl_username": 'a "user"',
        "postgres_ca_file": "/certificates/ca.pem",
        "postgres_pooler": True,
        "buffer_bytes_max": 134217728,  # Go would write 1.34217728e+08
        "dead_letter_limit": 0.25,
        "grace_seconds": 40.5,
        "allow_insecure": "redis",
    },
    "secret": {"name": "w", "keys": {"postgres_dsn": "dsn", "redis_url": "redis", "kafka_sasl_password": "kafka"}},
    "image": {"repository": "registry.example/billing", "tag": "7", "pullSecrets": [{"name": "registry"}]},
    "migrate": {"args": ["handlers:app"]},
    "env": [{"name": "OTEL_METRICS_EXPORTER", "value": "otlp"}],
    "volumes": [{"name": "certificates", "configMap": {"name": "certificates"}}],
    "volumeMounts": [{"name": "certificates", "mountPath": "/certificates"}],
    "podDisruptionBudget": {"maxUnavailable": "25%"},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "scaledObject": {
        "enabled": True,
        "consumerGroup": "billing",
        "topics": ["payments", "refunds"],
        "lagThreshold": 10000000,
        "triggerAuthentication": "kafka",
    },
    "podLabels": {"team": "payments"},
    "podAnnotations": {"example.org/of": "payments"},
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
}
# The chart as deploy/kubernetes.yaml and deploy/kubernetes-scaling.yaml are.
AS_MANIFESTS: dict[str, Any] = {
    "secret": {"name": "consumer-worker", "keys": {"postgres_dsn": "dsn", "redis_url": "redis"}},
    "serviceMonitor": {"enabled": True},
    "scaledObject": {"enabled": True, "consumerGroup": "billing", "topics": ["payments"]},
}


def helm(*arguments: str, values: dict[str, Any] | None = None, directory: Path) -> subprocess.CompletedProcess[str]:
    assert PROGRAM is not None
    file = directory / "values.yaml"
    file.write_text(yaml.safe_dump(values or {}))
    command = [PROGRAM, *arguments, "--values", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def rendered(values: dict[str, Any] | None, directory: Path) -> dict[str, dict[str, Any]]:
    """The objects of the chart, by kind."""
    done = helm("template", "billing", str(CHART), values=values, directory=directory)
    assert done.returncode == 0, done.stderr
    objects = manifests.read(done.stdout)
    assert len({object["kind"] for object in objects}) == len(objects)
    return {object["kind"]: object for object in objects}


def every_fault(objects: Iterable[dict[str, Any]]) -> list[str]:
    return [fault for object in objects for schema in SCHEMAS for fault in manifests.faults(object, schema)]


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# -- what needs neither -------------------------------------------------------------------------------------------------


def test_the_schema_of_the_values_has_every_setting() -> None:
    written = pages.CHART_SCHEMA.read_text("utf-8")
    assert written == pages.chart_schema(), "run: python tests/support/documents.py"


@pytest.mark.parametrize("block", list(pages.blocks(ROOT / "docs" / "how-to" / "kubernetes.md")), ids=str)
def test_values_of_the_page_are_accepted(block: pages.Block) -> None:
    if block.language == "yaml":
        defaults = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
        values = {**defaults, **yaml.safe_load(block.code)}
        values["migrate"] = {**defaults["migrate"], **values["migrate"]}
        assert list(Draft7Validator(json.loads(pages.CHART_SCHEMA.read_text("utf-8"))).iter_errors(values)) == []


def test_the_chart_has_the_version_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert (chart["version"], chart["appVersion"], chart["name"]) == (version, version, CHART.name)


# -- manifests ----------------------------------------------------------------------------------------------------------


@needs_schemas
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_follow_the_schemas(path: Path) -> None:
    assert every_fault(manifests.documents(path)) == []


@needs_schemas
def test_a_misspelt_field_is_a_fault() -> None:
    *_, deployment = manifests.documents(MANIFESTS[0])
    spec, container = manifests.pod(deployment)
    container["readinessprobe"] = container.pop("readinessProbe")
    spec["terminationGracePeriodSeconds"] = "40"
    assert len(every_fault([deployment])) == 2 * len(SCHEMAS)
    *_, scaling = manifests.documents(MANIFESTS[1])
    scaling["spec"]["triggers"][0]["metadata"]["lagThreshold"] = 5000
    scaling["spec"]["minReplicas"] = 1
    assert len(every_fault([scaling])) == 2 * len(SCHEMAS)


# -- the chart ----------------------------------------------------------------------------------------------------------


@needs_helm
@pytest.mark.parametrize("values", [{}, EVERYTHING, AS_MANIFESTS], ids=["defaults", "everything", "as manifests"])
def test_the_chart_is_linted_and_follows_the_schemas(values: dict[str, Any], tmp_path: Path) -> None:
    done = helm("lint", "--strict", str(CHART), values=values, directory=tmp_path)
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout + done.stderr
    objects = rendered(values, tmp_path)
    assert {"Deployment", "Job", "PodDisruptionBudget"} <= objects.keys()
    assert every_fault(objects.values()) == []


@needs_helm
def test_defaults_render_nothing_optional(tmp_path: Path) -> None:
    assert rendered({}, tmp_path).keys() == {"Deployment", "Job", "PodDisruptionBudget"}
    off = {"migrate": {"enabled": False}, "podDisruptionBudget": {"enabled": False}}
    assert rendered(off, tmp_path).keys() == {"Deployment"}
    all_of_them = {"Service", "ServiceMonitor", "PrometheusRule", "ScaledObject"}
    assert all_of_them <= rendered(EVERYTHING, tmp_path).keys()


@needs_helm
def test_settings_reach_the_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    objects = rendered(EVERYTHING, tmp_path)
    variables = manifests.with_stand_ins(manifests.environment(objects["Deployment"]), tmp_path)
    settings = manifests.load_settings(monkeypatch, variables)
    for name, value in EVERYTHING["settings"].items():
        if name != "allow_insecure":
            assert getattr(settings, name) == value, name
    assert (settings.insecure, settings.http, settings.dsn) == ({"http", "redis"}, "0.0.0.0:9464", "made-up-dsn")
    spec, workers = manifests.pod(objects["Deployment"])
    assert spec["terminationGracePeriodSeconds"] >= settings.grace_seconds + 10
    assert manifests.parsed(workers["args"])["workers"] == 2 and variables["OTEL_METRICS_EXPORTER"] == "otlp"
    _, migrate = manifests.pod(objects["Job"])
    assert manifests.parsed(migrate["args"])["app"] == "handlers:app"
    assert migrate["image"] == workers["image"] == "registry.example/billing:7"
    assert "replicas" not in objects["Deployment"]["spec"], "KEDA decides"


def comparable(thing: dict[str, Any], config: dict[str, Any] | None = None) -> dict[str, Any]:
    """A pod without names and labels, its variables in one mapping."""
    template = copy.deepcopy(thing["spec"]["template"])
    (container,) = template["spec"]["containers"]
    container["env"] = manifests.environment(thing, config)
    for field in ("envFrom", "imagePullPolicy"):
        container.pop(field, None)
    return {"spec": template["spec"]}


@needs_helm
def test_the_chart_is_the_manifests_with_values(tmp_path: Path) -> None:
    config, job, deployment = manifests.documents(MANIFESTS[0])
    budget, service, monitor, scaling = manifests.documents(MANIFESTS[1])
    objects = rendered(AS_MANIFESTS, tmp_path)
    assert comparable(objects["Deployment"]) == comparable(deployment, config)
    from_chart, plain = comparable(objects["Job"]), comparable(job)
    for variable in config["data"].keys() - {"CONSUMER_HTTP", "CONSUMER_ALLOW_INSECURE"}:
        assert from_chart["spec"]["containers"][0]["env"].pop(variable)  # all settings, those of workers too
    assert from_chart == plain
    for object in (budget, service, monitor, scaling):
        from_chart = json.loads(
            json.dumps(objects[object["kind"]]["spec"]).replace("billing-workers", "consumer-workers")
        )
        for thing in (from_chart, object["spec"]):
            thing.pop("selector", None)
        assert from_chart == object["spec"], object["kind"]
    assert rendered({}, tmp_path)["Deployment"]["spec"]["replicas"] == deployment["spec"]["replicas"]


@needs_helm
def test_the_chart_selects_its_own_pods(tmp_path: Path) -> None:
    objects = rendered(EVERYTHING, tmp_path)
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert objects[kind]["spec"]["selector"]["matchLabels"].items() <= labels.items(), kind
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()
    selected = objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert selected.items() <= objects["Service"]["metadata"]["labels"].items()
    assert not selected.items() <= objects["Job"]["spec"]["template"]["metadata"]["labels"].items()
    target = objects["ScaledObject"]["spec"]["scaleTargetRef"]["name"]
    assert target == objects["Deployment"]["metadata"]["name"] == "billing-workers"
    assert objects["ScaledObject"]["spec"]["triggers"][0]["metadata"]["consumerGroup"] == load_app("handlers:app").name


@needs_helm
def test_the_migration_runs_before_the_workers_are_replaced(tmp_path: Path) -> None:
    job = rendered({}, tmp_path)["Job"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert "before-hook-creation" in job["metadata"]["annotations"]["helm.sh/hook-delete-policy"]


@needs_helm
def test_the_alerts_of_the_chart_are_those_of_the_project(tmp_path: Path) -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yaml").read_text("utf-8"))
    assert rendered(EVERYTHING, tmp_path)["PrometheusRule"]["spec"] == rules


@needs_helm
@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"settings": {"kafka_bootstrap_server": "k:1"}}, "kafka_bootstrap_server"),
        ({"settings": {"postgres_dsn": "postgresql://u:secret@h/d"}}, "postgres_dsn"),
        ({"settings": {"workers": 3}}, "workers"),
        ({"settings": {"kafka_security_protocol": "TLS"}}, "kafka_security_protocol"),
        ({"secret": {"keys": {"postgres": "dsn"}}}, "postgres"),
        ({"workers": 0}, "workers"),
        ({"replica": 3}, "replica"),
        ({"scaledObject": {"enabled": True}}, "topics"),
        ({"scaledObject": {"minReplicas": 0}}, "minReplicas"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_values_are_refused(values: dict[str, Any], text: str, tmp_path: Path) -> None:
    done = helm("template", "billing", str(CHART), values=values, directory=tmp_path)
    assert done.returncode != 0 and text in done.stderr and "secret@" not in done.stderr
