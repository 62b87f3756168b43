"""The code understands the compose file, the image and the Kubernetes objects.

Settings, flags, topics and paths that these files name are looked up in the code. Needs no Docker. Limitations: whether
the images exist and start.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose_spec
import pytest
from manifests import documents, environment, load_settings, parsed, pod, with_stand_ins

from consumer import tls
from consumer.app_loader import load_app
from consumer.metrics.fleet import Fleet
from consumer.monitoring.endpoints import routes_of
from consumer.settings import Settings, known_settings

ROOT = Path(__file__).parent.parent.parent
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
KUBERNETES = ROOT / "deploy" / "kubernetes.yaml"
SCALING = ROOT / "deploy" / "kubernetes-scaling.yaml"
DURATION = re.compile(r"(?:(\d+)m)?(?:(\d+)s)?")
DEFAULT_PASSWORD = re.compile(r"\$\{[A-Z]+_PASSWORD:-development-only\}")
ONE_SHOT = {"topics", "migrate"}


def seconds(text: str) -> int:
    duration = DURATION.fullmatch(text)
    assert duration and text, f"{text!r} is no duration of minutes and seconds"
    return int(duration[1] or 0) * 60 + int(duration[2] or 0)


def substituted(value: Any) -> Any:
    """Substitute ${NAME:-default}, the only allowed form, with its default."""
    if isinstance(value, dict):
        return {key: substituted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [substituted(item) for item in value]
    if not isinstance(value, str):
        return value
    filled = re.sub(r"\$\{[A-Z_]+:-([^{}$]*)\}", r"\1", value.replace("$$", "\0"))
    assert "$" not in filled, f"{value!r} depends on a variable without a default"
    return filled.replace("\0", "$")


def assert_settings_exist(names: Any) -> None:
    known = {f"CONSUMER_{field.upper()}" for field in Settings.model_fields}
    known |= {f"CONSUMER_{field.upper()}_FILE" for field in known_settings().secrets}
    assert set(names) <= known, f"no such settings: {sorted(set(names) - known)}"


@pytest.fixture
def compose() -> dict[str, Any]:
    (document,) = documents(COMPOSE)
    composed: dict[str, Any] = substituted(document)
    return composed


@pytest.fixture
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    services_found: dict[str, dict[str, Any]] = compose["services"]
    return services_found


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """`handlers:app` is found from the current directory, in the image as here."""
    monkeypatch.chdir(ROOT)


# -- docker-compose.yml -----------------------------------------------------------------------------------------------


def test_compose_follows_the_specification(compose: dict[str, Any]) -> None:
    # Raises for an unknown key, a condition that does not exist, a duration or port that is none. As JSON, in which the
    # anchors are resolved: it knows no merge keys.
    compose_spec.PyCompose.from_json(json.dumps(compose))


def docker_compose(*arguments: str) -> subprocess.CompletedProcess[str]:
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("no docker here")
    return subprocess.run([docker, "compose", *arguments], capture_output=True, text=True, timeout=60)


def test_compose_is_accepted_by_docker() -> None:
    if docker_compose("version").returncode:
        pytest.skip("docker has no compose plugin here")
    done = docker_compose("--file", str(COMPOSE), "config", "--quiet")
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_compose_dependencies_can_be_met(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in services, f"{name} depends on {other}, which does not exist"
            match how["condition"]:
                case "service_healthy":
                    assert "healthcheck" in services[other], f"{name} waits for the health of {other}, which has none"
                case "service_completed_successfully":
                    assert other in ONE_SHOT, f"{name} waits for the end of {other}, which does not end"
                case condition:
                    pytest.fail(f"{name} depends on {other} with {condition}, which waits for nothing")
    needed = services["workers"]["depends_on"]
    assert set(needed) == set(services) - {"workers"}


def test_compose_services_are_watched_or_end(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        if name in ONE_SHOT:
            assert service.get("restart", "no") == "no", f"{name} would run for ever"
            continue
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}, name
        assert seconds(service["healthcheck"]["timeout"]) <= seconds(service["healthcheck"]["interval"]), name


def test_compose_images_are_pinned(services: dict[str, dict[str, Any]]) -> None:
    built = {service["image"] for service in services.values() if "build" in service}
    for name, service in services.items():
        assert service["image"] in built or re.fullmatch(r"[a-z/]+:\d+\.\d+(\.\d+)?", service["image"]), name
    assert services["workers"]["image"] in built
    assert services["kafka"]["image"] == services["topics"]["image"]


def test_compose_publishes_on_loopback_only(services: dict[str, dict[str, Any]]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    for port in ports:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", str(port)), f"{port!r} is published to the network"
    assert not any("network_mode" in service or "privileged" in service for service in services.values())


def test_compose_keeps_data_in_named_volumes(compose: dict[str, Any]) -> None:
    used = [volume.split(":") for service in compose["services"].values() for volume in service.get("volumes", [])]
    assert {name for name, *_ in used} == set(compose["volumes"])
    services = compose["services"]
    assert services["kafka"]["volumes"] == [f"kafka-data:{services['kafka']['environment']['KAFKA_LOG_DIRS']}"]
    # From 18 on the image refuses to start with a volume at the old place, .../data.
    assert services["postgres"]["volumes"] == ["postgres-data:/var/lib/postgresql"]


def test_compose_passwords_come_from_the_environment() -> None:
    text = COMPOSE.read_text("utf-8")
    for line in text.splitlines():
        for names in re.findall(r"(?:PASSWORD|_AUTH|SECRET): (\S+)|://[^:@/\s]*:(\S+)@", line):
            assert DEFAULT_PASSWORD.fullmatch("".join(names)), line
    # --requirepass, which has its value on a line of its own: test_compose_addresses_agree compares it.
    assert text.count("development-only") == len(DEFAULT_PASSWORD.findall(text))


def test_compose_addresses_agree(monkeypatch: pytest.MonkeyPatch, services: dict[str, dict[str, Any]]) -> None:
    kafka = services["kafka"]["environment"]
    advertised = dict(part.split("://") for part in kafka["KAFKA_ADVERTISED_LISTENERS"].split(","))
    listening = dict(part.split("://") for part in kafka["KAFKA_LISTENERS"].split(","))
    assert set(listening) == {*advertised, kafka["KAFKA_CONTROLLER_LISTENER_NAMES"]}
    assert set(listening) == {part.split(":")[0] for part in kafka["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(",")}
    for name, address in advertised.items():
        assert address.rpartition(":")[2] == listening[name].rpartition(":")[2]
    assert f"{advertised['HOST']}:9092" in services["kafka"]["ports"]
    inside = advertised[kafka["KAFKA_INTER_BROKER_LISTENER_NAME"]]
    assert inside.partition(":")[0] in services
    assert inside in services["kafka"]["healthcheck"]["test"]
    assert inside in services["topics"]["command"][-1]
    postgres = services["postgres"]["environment"]
    for name in ("workers", "migrate"):
        settings = load_settings(monkeypatch, services[name]["environment"])
        assert settings.kafka_bootstrap_servers == inside
        assert settings.dsn == (
            f"postgresql://{postgres['POSTGRES_USER']}:{postgres['POSTGRES_PASSWORD']}"
            f"@postgres:5432/{postgres['POSTGRES_DB']}"
        )
    assert postgres["POSTGRES_USER"] != "consumer", "the search path would begin with the ledger's schema"
    redis = load_settings(monkeypatch, services["workers"]["environment"]).redis_url
    requirepass = services["valkey"]["command"][services["valkey"]["command"].index("--requirepass") + 1]
    assert redis is not None
    assert redis.get_secret_value() == f"redis://:{requirepass}@valkey:6379/0"
    assert services["valkey"]["environment"]["VALKEYCLI_AUTH"] == requirepass


def test_compose_settings_exist(services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        assert_settings_exist(name for name in service.get("environment", {}) if name.startswith("CONSUMER_"))


def test_compose_topics_are_those_of_the_handlers(services: dict[str, dict[str, Any]]) -> None:
    environment = services["topics"]["environment"]
    assert sorted(environment["TOPICS"].split()) == load_app("handlers:app").topics
    command = parsed(services["workers"]["command"])
    assert command["workers"] <= int(environment["PARTITIONS"]) == 8


def test_compose_commands_are_understood(monkeypatch: pytest.MonkeyPatch, services: dict[str, dict[str, Any]]) -> None:
    run = parsed(services["workers"]["command"])
    assert (run[""], run["app"]) == ("run", "handlers:app")
    grace = run["grace_seconds"] or load_settings(monkeypatch, services["workers"]["environment"]).grace_seconds
    # The supervisor kills two seconds after the grace; then it still tells Kafka who has left, for five at most.
    assert seconds(services["workers"]["stop_grace_period"]) >= grace + 10
    migrate = parsed(services["migrate"]["command"])
    assert migrate[""] == "migrate"
    assert all((ROOT / path).is_file() for path in migrate["files"])
    *_, code = services["workers"]["healthcheck"]["test"]
    compile(code, "healthcheck", "exec")
    address = load_settings(monkeypatch, services["workers"]["environment"]).http_address
    assert address is not None and f"127.0.0.1:{address[1]}/readyz" in code
    assert services["workers"]["ports"] == [f"127.0.0.1:{address[1]}:{address[1]}"]
    timeout = re.search(r"timeout=(\d+)", code)
    assert timeout and int(timeout[1]) < seconds(services["workers"]["healthcheck"]["timeout"])


def test_compose_own_containers_are_confined(services: dict[str, dict[str, Any]]) -> None:
    for name in ("workers", "migrate"):
        assert services[name]["read_only"] is True, name
        assert services[name]["cap_drop"] == ["ALL"], name
        assert not {"user", "entrypoint", "cap_add", "volumes"} & set(services[name]), name
    for name, service in services.items():
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_deployed_addresses_are_accepted_by_workers(
    monkeypatch: pytest.MonkeyPatch, services: dict[str, dict[str, Any]]
) -> None:
    for name in ("migrate", "workers"):
        settings = load_settings(monkeypatch, services[name]["environment"])
        tls.check_kafka(settings)
        tls.redis_url(settings)
        assert tls.postgres_tls(settings) is None  # in clear, and said so
    # Kubernetes' are TLS, without an exception.
    config, *_ = documents(KUBERNETES)
    settings = load_settings(monkeypatch, config["data"])
    tls.check_kafka(settings)
    assert settings.insecure == {"http"} and "rediss://" in KUBERNETES.read_text("utf-8")


# -- deploy/Dockerfile ------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text("utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def stages() -> Iterator[list[tuple[str, str]]]:
    stage: list[tuple[str, str]] = []
    for word, rest in instructions():
        if word == "FROM":
            if stage:
                yield stage
            stage = []
        stage.append((word, rest))
    yield stage


def test_image_runs_as_any_user() -> None:
    final = list(stages())[-1]
    users = [rest for word, rest in final if word == "USER"]
    assert users and re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]), f"USER {users} is not a number, or is root"
    assert ("STOPSIGNAL", "SIGTERM") in final
    assert [json.loads(rest) for word, rest in final if word == "ENTRYPOINT"] == [["consumer"]]
    # What runs as root may not come after, and nothing is installed where it would stay.
    assert not [rest for word, rest in final if word in {"RUN", "ADD"}]


def test_image_is_built_from_pinned_python() -> None:
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1, "a venv needs the very Python that it was made with"
    assert re.fullmatch(r"python:3\.13\.\d+-slim-[a-z]+", bases[0])


def test_image_copies_what_exists_and_is_not_ignored() -> None:
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copied = {
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    assert copied == kept
    assert {"consumer", "handlers", "pyproject.toml"} <= copied
    assert all((ROOT / path).exists() for path in copied)
    # The last stage has the venv and the handlers; consumer is in the venv.
    final = [rest for word, rest in list(stages())[-1] if word == "COPY"]
    assert final == ["--from=build /venv /venv", "handlers ./handlers"]


def test_image_settings_exist() -> None:
    assert_settings_exist(re.findall(r"CONSUMER_[A-Z_]+", DOCKERFILE.read_text("utf-8")))


# -- deploy/kubernetes.yaml -------------------------------------------------------------------------------------------


@pytest.fixture
def objects() -> dict[str, dict[str, Any]]:
    manifests = documents(KUBERNETES)
    assert [(object["apiVersion"], object["kind"]) for object in manifests] == [
        ("v1", "ConfigMap"),
        ("batch/v1", "Job"),
        ("apps/v1", "Deployment"),
    ]
    return {object["kind"]: object for object in manifests}


def workload(objects: dict[str, dict[str, Any]], kind: str, directory: Path) -> dict[str, str]:
    """The environment of a workload, with files of secrets that exist here."""
    return with_stand_ins(environment(objects[kind], objects["ConfigMap"]), directory)


def test_kubernetes_settings_exist(
    monkeypatch: pytest.MonkeyPatch, objects: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    for kind in ("Job", "Deployment"):
        names = workload(objects, kind, tmp_path)
        assert_settings_exist(names)
        assert load_settings(monkeypatch, names).dsn == "made-up-dsn"
    # In comments, too.
    assert_settings_exist(re.findall(r"CONSUMER_[A-Z_]+", KUBERNETES.read_text("utf-8")))


def test_kubernetes_commands_are_understood(
    monkeypatch: pytest.MonkeyPatch, objects: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    spec, workers = pod(objects["Deployment"])
    run = parsed(workers["args"])
    assert (run[""], run["app"]) == ("run", "handlers:app")
    settings = load_settings(monkeypatch, workload(objects, "Deployment", tmp_path))
    assert spec["terminationGracePeriodSeconds"] >= (run["grace_seconds"] or settings.grace_seconds) + 10
    address = tls.check_http(settings)
    assert workers["ports"] == [{"name": "metrics", "containerPort": address[1] if address else None}]
    annotations = objects["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(workers["ports"][0]["containerPort"])
    routes = routes_of(Fleet.of("any", 1))
    for name, path in (("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
        assert workers[name]["httpGet"] == {"path": path, "port": "metrics"} and path in routes
        assert workers[name]["timeoutSeconds"] < workers[name]["periodSeconds"]
    _, job = pod(objects["Job"])
    migrate = parsed(job["args"])
    assert migrate[""] == "migrate"
    assert all((ROOT / path).is_file() for path in migrate["files"])
    assert job["image"] == workers["image"]


def test_kubernetes_pods_are_confined(objects: dict[str, dict[str, Any]]) -> None:
    for kind in ("Job", "Deployment"):
        spec, container = pod(objects[kind])
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"requests", "limits"} == set(container["resources"])
        assert "command" not in container, "the image's entry point is the command"
    assert objects["Job"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    deployment = objects["Deployment"]["spec"]
    assert deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]


# -- deploy/kubernetes-scaling.yaml -----------------------------------------------------------------------------------


@pytest.fixture
def scaling() -> dict[str, dict[str, Any]]:
    manifests = documents(SCALING)
    assert [(object["apiVersion"], object["kind"]) for object in manifests] == [
        ("policy/v1", "PodDisruptionBudget"),
        ("v1", "Service"),
        ("monitoring.coreos.com/v1", "ServiceMonitor"),
        ("keda.sh/v1alpha1", "ScaledObject"),
    ]
    return {object["kind"]: object for object in manifests}


def test_scaling_selects_the_pods_of_the_workers(
    objects: dict[str, dict[str, Any]], scaling: dict[str, dict[str, Any]]
) -> None:
    pods = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    budget, service, monitor = scaling["PodDisruptionBudget"], scaling["Service"], scaling["ServiceMonitor"]
    assert budget["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == pods
    assert budget["spec"]["maxUnavailable"] < objects["Deployment"]["spec"]["replicas"]
    assert monitor["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    [port], [endpoint] = service["spec"]["ports"], monitor["spec"]["endpoints"]
    _, workers = pod(objects["Deployment"])
    assert endpoint["port"] == port["name"]
    assert (port["targetPort"], port["port"]) == tuple(workers["ports"][0].values())
    assert scaling["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]


def test_scaling_follows_the_lag_of_the_app(
    monkeypatch: pytest.MonkeyPatch,
    objects: dict[str, dict[str, Any]],
    scaling: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    spec = scaling["ScaledObject"]["spec"]
    [trigger] = spec["triggers"]
    kafka, app = trigger["metadata"], load_app("handlers:app")
    assert trigger["type"] == "kafka" and all(isinstance(value, str) for value in kafka.values())
    assert (kafka["consumerGroup"], kafka["topic"] in app.topics) == (app.name, True)
    settings = load_settings(monkeypatch, workload(objects, "Deployment", tmp_path))
    assert kafka["bootstrapServers"] == settings.kafka_bootstrap_servers
    assert (kafka["tls"] == "enable") == (settings.kafka_security_protocol == "SSL")
    _, workers = pod(objects["Deployment"])
    partitions = 8  # of the compose file's topics
    assert 1 <= spec["minReplicaCount"] <= spec["maxReplicaCount"]
    assert spec["maxReplicaCount"] * parsed(workers["args"])["workers"] <= partitions
