"""Reads manifests, and checks them against the schemas of Kubernetes.

`make helm` brings Helm and the schemas. Those of ServiceMonitor, PrometheusRule and ScaledObject are beside its script: the
definitions of the Prometheus operator 0.80 and of KEDA 2.16 (both Apache-2.0) without their texts, with unknown fields refused.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from harness import ROOT
from jsonschema import Draft202012Validator

from consumer.cli.main import whole
from consumer.settings import Settings, known_settings, load

HELM = ROOT / ".cache" / "helm"
_CUSTOM = ROOT / "tests" / "helm" / "custom_resources.json"


class _Strict(yaml.SafeLoader):
    """Refuses a repeated key, as compose does; PyYAML takes the last."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Before the merges: a key may well stand both in an anchor and beside it.
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is there twice{node.start_mark}"
        super().flatten_mapping(node)


def read(text: str) -> list[Any]:
    """The documents of a text that are not empty."""
    return [document for document in yaml.load_all(text, _Strict) if document is not None]


def documents(path: Path) -> list[Any]:
    return read(path.read_text("utf-8"))


def parsed(arguments: list[str]) -> dict[str, Any]:
    """Parse arguments as the real command does, without running it."""
    group: Any = typer.main.get_command(whole())
    with group.make_context("consumer", list(arguments), resilient_parsing=True) as context:
        name, command, rest = group.resolve_command(context, arguments)
        with command.make_context(name, list(rest), parent=context, resilient_parsing=False) as inner:
            return dict(inner.params) | {"": name}


def pod(thing: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod of a workload and its only container."""
    spec = thing["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


def environment(thing: dict[str, Any], config: dict[str, Any] | None = None) -> dict[str, str]:
    """The variables of a workload's container; files of secrets must be mounted.

    config: the ConfigMap that it may name.
    """
    spec, container = pod(thing)
    variables: dict[str, str] = {}
    for source in container.get("envFrom", []):
        assert config is not None and source["configMapRef"]["name"] == config["metadata"]["name"]
        variables |= config["data"]
    variables |= {variable["name"]: variable["value"] for variable in container["env"]}
    assert all(isinstance(text, str) for text in variables.values()), "a ConfigMap holds strings: quote the numbers"
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "secret")
    (volume,) = (volume for volume in spec["volumes"] if volume["name"] == "secret")
    files = {f"{mount['mountPath']}/{item['path']}" for item in volume["secret"]["items"]}
    named = {text for name, text in variables.items() if name.endswith("_FILE") and text.startswith(mount["mountPath"])}
    assert named == files, "each key of the Secret is a file that a variable names"
    return variables


def with_stand_ins(variables: dict[str, str], directory: Path) -> dict[str, str]:
    """The variables with files of secrets that exist here."""
    replaced = dict(variables)
    secret = {f"CONSUMER_{name.upper()}_FILE" for name in known_settings().secrets}
    for name, text in variables.items():
        if name in secret:
            file = directory / Path(text).name
            file.write_text(f"made-up-{file.name}\n")
            replaced[name] = str(file)
    return replaced


def load_settings(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Settings:
    for name in os.environ:
        if name.startswith("CONSUMER_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load()


# -- schemas and Helm ---------------------------------------------------------------------------------------------------


def helm() -> str | None:
    """The path of Helm; None where it is missing."""
    return shutil.which("helm", path=os.pathsep.join([str(HELM), os.environ.get("PATH", os.defpath)]))


def why_missing() -> str:
    """Why a test cannot run here."""
    here = f"{sys.platform} on {platform.machine()}"
    return f"make helm brings no Helm for {here}: put one into PATH" if (HELM / ".complete").exists() else "make helm"


def schemas() -> list[Path]:
    """The definitions of some versions of Kubernetes."""
    return sorted(HELM.glob("kubernetes-*.json"))


@functools.cache
def _validator(schema: Path, kind: str) -> Draft202012Validator:
    definitions = json.loads(schema.read_text("utf-8"))
    if schema == _CUSTOM:
        return Draft202012Validator(definitions[kind])
    group_version, name = kind.split()
    group, _, version = group_version.rpartition("/")
    for key, definition in definitions["$defs"].items():
        if {"group": group, "version": version, "kind": name} in definition.get("x-kubernetes-group-version-kind", []):
            return Draft202012Validator({"$ref": f"#/$defs/{key}", "$defs": definitions["$defs"]})
    raise AssertionError(f"{schema.name}: no {kind}")


def faults(thing: dict[str, Any], schema: Path) -> list[str]:
    """What Kubernetes or an operator would refuse in an object."""
    kind = f"{thing['apiVersion']} {thing['kind']}"
    own = json.loads(_CUSTOM.read_text("utf-8"))
    if kind in own:
        validator, thing, place = _validator(_CUSTOM, kind), thing["spec"], "/spec"
    else:
        validator, place = _validator(schema, kind), ""
    errors = sorted(validator.iter_errors(thing), key=lambda error: error.json_path)
    return [f"{kind}: {place}{error.json_path}: {error.message[:200]}" for error in errors]
