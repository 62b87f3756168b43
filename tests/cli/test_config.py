"""Settings from files, secrets from files, and `consumer config`.

Precedence, bad input, and no secret in any text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, consumer, is_one_line
from pydantic import SecretStr

from consumer.core.errors import Misconfigured
from consumer.settings import Settings, known_settings, load

pytestmark = pytest.mark.unit

SECRET = "pa55-w0rd"
DSN = f"postgresql://bob:{SECRET}@host/x"
SECRETS = [
    "console_proxy_secret",
    "kafka_sasl_password",
    "postgres_dsn",
    "redis_url",
    "schema_registry_password",
    "schema_registry_token",
]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("CONSUMER_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.toml"


def written(file: Path, text: str) -> str:
    file.write_text(text)
    return str(file)


def refusal(config: str | None = None, **flags: Any) -> str:
    with pytest.raises(Misconfigured) as refused:
        load(config, **flags)
    text = str(refused.value)
    assert SECRET not in text and "\n" not in text
    return text


# -- precedence ---------------------------------------------------------------------------------------------------------


def test_flag_wins_over_environment_over_file_over_default(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = written(file, "lanes_max = 3\n")
    seen = [load()]
    seen.append(load(config))
    monkeypatch.setenv("CONSUMER_LANES_MAX", "5")
    seen.append(load(config))
    seen.append(load(config, lanes_max=6))
    assert [settings.lanes_max for settings in seen] == [4, 3, 5, 6]
    sources = [settings.source_of("lanes_max") for settings in seen]
    assert [source.kind for source in sources] == ["default", "file", "environment", "flag"]
    assert [source.place for source in sources] == [None, "lanes_max", "CONSUMER_LANES_MAX", "--lanes-max"]


def test_the_variable_names_a_file_and_the_flag_another(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = file.with_name("other.toml")
    monkeypatch.setenv("CONSUMER_CONFIG", written(file, "lanes_max = 3"))
    assert (load().lanes_max, Settings().lanes_max) == (3, 3)
    assert load(written(other, "workers = 7")).lanes_max == 4
    assert Settings(lanes_max=6).lanes_max == 6


def test_empty_variable_of_the_file_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUMER_CONFIG", "")
    assert load().config_file is None


@pytest.mark.parametrize(
    "text",
    [
        'kafka_sasl_username = "bob"',
        '[kafka]\nsasl_username = "bob"',
        '[kafka.sasl]\nusername = "bob"',
        'kafka.sasl.username = "bob"',
        'kafka = { sasl_username = "bob" }',
    ],
)
def test_the_beginning_of_a_name_may_be_a_table(file: Path, text: str) -> None:
    assert load(written(file, text)).kafka_sasl_username == "bob"


def test_each_type_of_the_file_is_taken(file: Path) -> None:
    settings = load(
        written(
            file,
            'workers = 4\ngrace_seconds = 3\nkafka_heartbeat_seconds = 0.25\nlog_level = "DEBUG"\n[postgres]\npooler = true',
        )
    )
    assert (settings.workers, settings.grace_seconds, settings.kafka_heartbeat_seconds) == (4, 3, 0.25)
    assert (settings.log_level, settings.postgres_pooler) == ("debug", True)


def test_empty_text_in_the_file_counts_as_absent(file: Path) -> None:
    settings = load(written(file, 'redis_url = ""\nkafka_client_id = ""\nredis_url_file = ""'))
    assert (settings.redis_url, settings.kafka_client_id) == (None, None)
    assert settings.source_of("redis_url").kind == "default"


def test_every_setting_can_be_in_the_file(file: Path) -> None:
    examples = {
        "kafka_security_protocol": "SSL",
        "kafka_sasl_mechanism": "PLAIN",
        "allow_insecure": "kafka",
        "log_level": "info",
        "log_format": "json",
        "dead_letter_limit": 1,
        "outbox_relay": "off",
        "http": "127.0.0.1:9464",
        "tracing": "link",
    }
    lines = [
        f"{name} = {json.dumps(examples.get(name, {str: 'text', int: 2, float: 70.5, bool: True}[kind]))}"
        for name, kind in known_settings().types.items()
        if name != "postgres_lock_timeout_seconds"
    ]
    settings = load(written(file, "\n".join(lines)))
    from_file = {name for name in Settings.model_fields if settings.source_of(name).kind == "file"}
    assert from_file == set(Settings.model_fields) - {"postgres_lock_timeout_seconds"}


# -- bad files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lanes = 3", "lanes: no such setting; did you mean lanes_max"),
        ('[kafka]\nbootstrap_server = "k:1"', "kafka.bootstrap_server: no such setting; did you mean kafka.bootstrap_servers"),
        ("CONSUMER_LANES_MAX = 3", "CONSUMER_LANES_MAX: no such setting; did you mean lanes_max"),
        ("grace-seconds = 3", "grace-seconds: no such setting; did you mean grace_seconds"),
        ("zzzzzzzz = 3", "zzzzzzzz: no such setting; remove it; `consumer config` lists the settings"),
        ('lanes_max_file = "x"', "lanes_max_file: no such setting; "),
        ('"" = 3', ": no such setting; "),
        ("[lanes_max]\nx = 1", "lanes_max.x: no such setting; "),
        ('lanes_max = "3"', "lanes_max: must be a whole number, is text; correct the file"),
        ("lanes_max = 2.5", "lanes_max: must be a whole number, is a fraction; correct the file"),
        ("lanes_max = true", "lanes_max: must be a whole number, is true or false; correct the file"),
        ("grace_seconds = false", "grace_seconds: must be a number, is true or false; "),
        ("postgres_pooler = 1", "postgres_pooler: must be true or false, is a whole number; "),
        ("log_level = 1", "log_level: must be text in quotes, is a whole number; "),
        ('allow_insecure = ["kafka"]', "allow_insecure: must be text in quotes, is a list; "),
        ("redis_url = 2020-01-01", "redis_url: must be text in quotes, is a date or a time; "),
        ("redis_url = 10:00:00", "redis_url: must be text in quotes, is a date or a time; "),
        ("[[kafka]]\nx = 1", "kafka: no such setting; "),
        ("postgres_dsn_file = 1", "postgres_dsn_file: must be text in quotes, is a whole number; "),
        ("lanes_max = 99", "lanes_max: Input should be less than or equal to 16; correct the file"),
        ("grace_seconds = inf", "grace_seconds: Input should be "),
        (f"grace_seconds = {10**400}", "grace_seconds: Input should be "),
        (f"grace_seconds = {'9' * 5000}", "not valid TOML: "),
        ('log_level = "loud"', "log_level: Input should be 'debug', 'info', 'warning' or 'error'; correct the file"),
        ('kafka_client_id = "a\\u0000b"', "kafka_client_id: has a NUL character; remove it"),
        ('lanes_max = 3\n[kafka]\nclient_id = "a"\n', None),
        ('kafka_client_id = "a"\n[kafka]\nclient_id = "b"', "kafka.client_id is given twice, also as kafka_client_id; remove one"),
        ("lanes_max = 3\nlanes_max = 4", "not valid TOML: "),
        (f'postgres_dsn = "{DSN}', "not valid TOML: "),
        (f"postgres_dsn = {SECRET}", "not valid TOML: "),
        (f"x = {'[' * 100_000}", "not valid TOML: "),
        (f'[postgres]\ndsn = "{DSN}"\ndsn_file = "x"', "postgres.dsn: postgres.dsn_file is given, too; remove one of them"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_that_names_the_key(file: Path, text: str, says: str | None) -> None:
    config = written(file, text)
    if says is None:
        load(config)
    else:
        assert f"{file}: {says}" in refusal(config)


def test_a_key_that_a_flag_overrides_is_checked_too(file: Path) -> None:
    assert "must be a whole number" in refusal(written(file, 'lanes_max = "3"'), lanes_max=3)


def test_a_file_that_is_not_utf8_is_refused(file: Path) -> None:
    file.write_bytes(b"lanes_max = 3 # \xff")
    assert refusal(str(file)) == f"{file}: not UTF-8; save it as UTF-8"


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"#" * ((1 << 20) + 1))
    for path, why in (
        (tmp_path / "missing", "No such file"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "device"),
        (large, "larger than"),
        ("a\0b", "not a path"),
        ("", "cannot be read"),
    ):
        text = refusal(str(path))
        assert text.startswith("--config: ") and why in text and "; name a" in text
    monkeypatch.setenv("CONSUMER_CONFIG", str(tmp_path / "missing"))
    assert refusal().startswith("CONSUMER_CONFIG: ")


# -- secrets in files ---------------------------------------------------------------------------------------------------


def test_the_secret_settings_are_these() -> None:
    assert sorted(known_settings().secrets) == SECRETS


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_secret_is_its_files_content(name: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    path.write_text(f" {SECRET}{end}", newline="")
    monkeypatch.setenv(f"CONSUMER_{name.upper()}_FILE", str(path))
    settings = load()
    assert getattr(settings, name) == SecretStr(f" {SECRET}")
    assert settings.source_of(name).kind == "secret file"
    assert SECRET not in repr(settings) + repr(vars(settings)) + repr(settings._gathered)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_given_twice_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = f"CONSUMER_{name.upper()}"
    monkeypatch.setenv(f"{variable}_FILE", str(tmp_path / "missing"))
    monkeypatch.setenv(variable, SECRET)
    assert refusal() == f"{variable}: {variable}_FILE is given, too; unset one of them"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "its file is empty; write the secret into it"),
        (b" \n\n", "its file is empty; write the secret into it"),
        (SECRET.encode() + b"\xff", "its file is not UTF-8 text; write the secret as text"),
        (SECRET.encode() + b"\0", "its file has a NUL character; write the secret as text"),
        (SECRET.encode() * 10_000, "its file is larger than 65,536 bytes; name another file"),
        (None, "its file cannot be read (No such file or directory); name a file that can be read"),
    ],
)
def test_a_wrong_secret_file_is_refused(
    content: bytes | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("CONSUMER_POSTGRES_DSN_FILE", str(path))
    assert refusal() == f"CONSUMER_POSTGRES_DSN_FILE: {says}"


def test_a_secret_in_place_of_a_path_is_not_shown(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setenv("CONSUMER_POSTGRES_DSN_FILE", DSN)
    assert "cannot be read" in refusal()
    monkeypatch.delenv("CONSUMER_POSTGRES_DSN_FILE")
    assert f"{file}: redis.url_file: its file cannot be read" in refusal(written(file, f'[redis]\nurl_file = "{DSN}"'))


def test_flag_and_environment_win_over_a_secret_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file.with_name("secret")
    path.write_text(DSN)
    config = written(file, f'[postgres]\ndsn_file = "{path}"\n')
    assert load(config).dsn == DSN
    assert load(config).source_of("postgres_dsn").place == f"{file}: postgres.dsn_file"
    assert load(config, postgres_dsn="flag").dsn == "flag"
    monkeypatch.setenv("CONSUMER_POSTGRES_DSN", "variable")
    assert load(config).dsn == "variable"


def test_other_settings_have_no_variable_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUMER_LANES_MAX_FILE", "/missing")  # as any unknown variable
    assert load().lanes_max == 4


# -- processes ----------------------------------------------------------------------------------------------------------

SHOW = "from consumer.settings import load; s = load(); print(s.lanes_max, s.workers, s.dsn, s.redis_url.get_secret_value())"


def shown_by_child(environment: dict[str, str]) -> str:
    return subprocess.run(
        [sys.executable, "-c", SHOW],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_child_process_has_settings_but_no_file_secret_in_its_environment(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file.with_name("secret")
    path.write_text(DSN)
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv("CONSUMER_CONFIG", written(file, 'lanes_max = 5\nredis_url = "redis://r"'))
    monkeypatch.setenv("CONSUMER_POSTGRES_DSN_FILE", "secret")
    monkeypatch.setenv("consumer_workers", "2")
    settings = load(workers=4)
    file.write_text("not TOML")  # changed since
    environment = settings.child_environment()
    assert SECRET not in repr(environment)
    assert not {"CONSUMER_CONFIG", "CONSUMER_POSTGRES_DSN", "consumer_workers"} & set(environment)
    assert environment["CONSUMER_POSTGRES_DSN_FILE"] == str(path)
    assert environment["PATH"] == os.environ["PATH"]
    monkeypatch.chdir("/")
    assert shown_by_child(environment) == f"5 4 {DSN} redis://r"


def test_a_secret_of_a_pipe_reaches_child_processes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, into = os.pipe()
    os.write(into, DSN.encode())
    os.close(into)
    monkeypatch.setenv("CONSUMER_POSTGRES_DSN_FILE", f"/dev/fd/{out}")
    settings = load(redis_url="redis://r")
    os.close(out)
    assert shown_by_child(settings.child_environment()) == f"4 1 {DSN} redis://r"


def test_settings_for_another_database_do_not_keep_the_secret_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(DSN)
    monkeypatch.setenv("CONSUMER_POSTGRES_DSN_FILE", str(file))
    other = load().at("postgresql://other")
    assert other.dump()["CONSUMER_POSTGRES_DSN"] == "postgresql://other"
    assert "CONSUMER_POSTGRES_DSN_FILE" not in other.dump()
    assert load().dump()["CONSUMER_POSTGRES_DSN_FILE"] == str(file)


# -- the command --------------------------------------------------------------------------------------------------------

APP = """
from consumer import App
app = App("sharded", shards={"a": "env:A_DSN", "b": "env:B_DSN", "c": "postgresql://bob:pa55-w0rd@host/c"}, route=lambda key: "a")
@app.handler("t")
async def settle(payment: dict) -> None: ...
"""


def test_config_shows_sources_and_masks_secrets(file: Path) -> None:
    (file.parent / "sharded.py").write_text(APP)
    (file.parent / "secret").write_text(DSN)
    environment = {
        "CONSUMER_CONFIG": written(
            file, f'[kafka.sasl]\nusername = "bob"\npassword = "{SECRET}"\n[redis]\nurl_file = "secret"'
        ),
        "CONSUMER_POSTGRES_DSN": DSN,
        "A_DSN": DSN,
    }
    result = consumer(file.parent, "config", "sharded:app", "--lanes-max", "3", "--json", **environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert SECRET not in result.stdout
    answer = json.loads(result.stdout)
    assert (answer["config_file"], answer["app"]) == (str(file), "sharded")
    assert list(answer["settings"]) == list(Settings.model_fields)
    rows = {name: tuple(row.values()) for name, row in answer["settings"].items()}
    assert rows["lanes_max"] == (3, "flag", "--lanes-max", None)
    assert rows["kafka_sasl_username"] == ("bob", "file", "kafka.sasl.username", None)
    assert rows["kafka_sasl_password"] == ("***", "file", "kafka.sasl.password", None)
    assert rows["postgres_dsn"] == ("***", "environment", "CONSUMER_POSTGRES_DSN", None)
    assert rows["redis_url"] == ("***", "secret file", f"{file}: redis.url_file", str(file.parent / "secret"))
    assert rows["workers"] == (1, "default", None, None)
    shards = {name: (row["value"], row["source"], row["place"]) for name, row in answer["shards"].items()}
    assert shards == {
        "a": ("***", "environment", "A_DSN"),
        "b": (None, "environment", "B_DSN"),
        "c": ("***", "app", None),
    }

    text = consumer(file.parent, "config", "sharded:app", **environment)
    assert (text.returncode, text.stderr) == (0, "")
    assert SECRET not in text.stdout
    lines = [" ".join(line.split()) for line in text.stdout.splitlines()]
    assert {
        f"file: {file}",
        "postgres_pooler false default",
        "postgres_dsn *** environment CONSUMER_POSTGRES_DSN",
    } <= set(lines)
    assert {"sharded: shards", "a *** environment A_DSN", "b - environment B_DSN", "c *** app"} <= set(lines)


@pytest.mark.parametrize("command", ["run", "status", "config"])
def test_a_command_with_a_wrong_file_ends_with_one_line(command: str, file: Path) -> None:
    config = written(file, "[kafka]\nclient = 3")
    is_one_line(consumer(file.parent, command, "missing:app", "--config", config), "kafka.client_id?", str(file))
