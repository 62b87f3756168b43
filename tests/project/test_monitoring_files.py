"""Dashboard, alerts and pages name existing metrics and labels.

And the alerts fire when they should.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import documents
import pytest
import yaml
from prometheus_server import program

from consumer.metrics.catalog import METRICS, PREFIX, Kind

pytestmark = pytest.mark.unit

ROOT = documents.ROOT
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
CASES = ROOT / "tests" / "project" / "alert_cases.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
RUNBOOK = ROOT / "docs" / "how-to" / "monitoring.md"

_NAME = re.compile(rf"{PREFIX}(\w+)(\{{[^}}]*\}})?")


def series() -> dict[str, set[str]]:
    """Every series name without the prefix, and its labels."""
    names: dict[str, set[str]] = {}
    for metric in METRICS:
        labels = {"app", *metric.labels}
        if metric.kind is Kind.HISTOGRAM:
            names |= {f"{metric.name}_{part}": labels for part in ("count", "sum")}
            names[f"{metric.name}_bucket"] = labels | {"le"}
        else:
            names[metric.name] = labels
    return names


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return list(group["rules"])


def panels() -> list[dict[str, Any]]:
    return list(json.loads(DASHBOARD.read_text("utf-8"))["panels"])


def expressions() -> Iterator[tuple[str, str]]:
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def faults(expression: str) -> list[str]:
    """What an expression names that no metric has."""
    known, wrong = series(), []
    uses = _NAME.findall(expression)
    labels: set[str] = set()
    for name, selector in uses:
        if name not in known:
            wrong.append(name)
            continue
        labels |= known[name]
        wrong += [one for one in re.findall(r"(\w+) *(?:=~|!~|!=|=)", selector) if one not in known[name]]
    for by in re.findall(r"by \(([^)]*)\)", expression):
        wrong += [one.strip() for one in by.split(",") if one.strip() not in labels]
    return wrong if uses else ["no metric"]


def test_expressions_name_what_exists() -> None:
    assert {title: wrong for title, expression in expressions() if (wrong := faults(expression))} == {}


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        (f"{PREFIX}messages", ["messages"]),
        (f'{PREFIX}messages_total{{partition="1"}}', ["partition"]),
        (f"sum by (step) ({PREFIX}messages_total)", ["step"]),
        (f"rate({PREFIX}delay_seconds[1m])", ["delay_seconds"]),
        ("up", ["no metric"]),
    ],
)
def test_a_name_that_does_not_exist_is_a_fault(expression: str, wrong: list[str]) -> None:
    assert faults(expression) == wrong


def test_the_dashboard_shows_every_metric() -> None:
    shown = {
        name
        for title, expression in expressions()
        if title in {p["title"] for p in panels()}
        for name, _ in _NAME.findall(expression)
    }
    missing = [metric.name for metric in METRICS if not shown & {metric.name, f"{metric.name}_bucket"}]
    assert missing == []


def test_the_dashboard_is_laid_out_without_overlaps() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    cells: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & own, panel["title"]
        cells |= own


def test_legends_and_summaries_name_labels_of_their_expression() -> None:
    texts = [(rule["annotations"]["summary"], rule["expr"]) for rule in rules()]
    texts += [(target["legendFormat"], target["expr"]) for panel in panels() for target in panel.get("targets", [])]
    for text, expression in texts:
        by = {label.strip() for part in re.findall(r"by \(([^)]*)\)", expression) for label in part.split(",")}
        named = set(re.findall(r"\{\{ ?(?:\$labels\.)?(\w+) ?\}\}", text)) - {"$value"}
        assert named <= by, (text, expression)


def test_every_alert_has_its_part_of_the_runbook() -> None:
    anchors = documents.anchors(RUNBOOK)
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) >= 10
    for rule in rules():
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert ROOT / page == RUNBOOK and anchor == rule["alert"].lower() and anchor in anchors
        assert rule["labels"]["severity"] in {"warning", "critical"}
    headings = re.findall(r"^### (\w+)$", RUNBOOK.read_text("utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(names)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    tests = yaml.safe_load(CASES.read_text("utf-8"))["tests"]
    expected: dict[str, set[bool]] = {}
    for test in tests:
        for alert in test["alert_rule_test"]:
            expected.setdefault(alert["alertname"], set()).add(bool(alert.get("exp_alerts")))
    assert expected == {rule["alert"]: {True, False} for rule in rules()}


def test_alerts_fire_as_promtool_evaluates_them() -> None:
    tool = program("promtool")
    if tool is None:
        pytest.skip("no promtool here: make prometheus")
    for arguments in (["check", "rules", str(RULES)], ["test", "rules", str(CASES)]):
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=120, cwd=CASES.parent)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("source", ["worker", "supervisor", "database", "replay"])
def test_the_metrics_are_listed_as_they_are(source: str) -> None:
    _, table, _ = documents.between(documents.METRICS_PAGE, source)
    assert table == documents.metrics_table(source), "run: python tests/support/documents.py"
