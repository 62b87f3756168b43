"""Help at 80 columns: every name whole, flags under headings.

No Python type; each flag with its default and variable.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from consumer.cli.main import whole
from consumer.settings import Settings


def _commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of each command below a group."""
    if not hasattr(group, "commands"):
        return [path]
    return [
        path_of_command for name, one in group.commands.items() for path_of_command in _commands(one, (*path, name))
    ]


TREE: Any = typer.main.get_command(whole())
COMMANDS = _commands(TREE)


def _command(path: tuple[str, ...]) -> Any:
    command = TREE
    for name in path:
        command = command.commands[name]
    return command


@cache
def help_of(*command: str) -> str:
    result = CliRunner().invoke(whole(), [*command, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return str(result.output)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_at_80_columns_has_no_type_and_cuts_nothing(command: tuple[str, ...]) -> None:
    text = help_of(*command)
    assert not re.search(r"typing|Annotated|<\w|SecretStr|int range", text), text
    assert max(map(len, text.splitlines())) <= 80
    for variable in re.findall(r"CONSUMER_\w+", text):
        assert variable == "CONSUMER_CONFIG" or variable.removeprefix("CONSUMER_").lower() in Settings.model_fields


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_with_settings_takes_a_file(command: tuple[str, ...]) -> None:
    names = {param.name for param in PARAMETERS[command]}
    assert ("config" in names) == bool(names & set(Settings.model_fields) - {"workers"})


def test_help_of_run_shows_every_setting_under_a_heading() -> None:
    text = help_of("run")
    headings = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
    assert headings == [
        "Arguments",
        "Options",
        "Kafka",
        "PostgreSQL",
        "Redis",
        "Schema registry",
        "Ledger",
        "Dead letters",
        "Outbox",
        "Logging",
        "Process",
        "Limits",
    ]
    assert "CONSUMER_CONSOLE_PROXY_SECRET" in help_of("console")
    for name, field in Settings.model_fields.items():
        if name.startswith("console_"):  # no matter of workers
            continue
        assert f"CONSUMER_{name.upper()}" in text, name
        flag = re.search(rf"^  .*--{name.replace('_', '-')}\b.*\n((?:      .*\n)+)", text, re.MULTILINE)
        assert flag, name
        words = " ".join(flag[1].split())
        assert f"env: CONSUMER_{name.upper()}]" in words
        if field.default not in (None, ""):
            assert f"default: {field.default};" in words, name
    assert "default: 1; env: CONSUMER_WORKERS" in text and "1 to 256" in text
    assert "postgresql://user@host/database" in text


PARAMETERS = {path: _command(path).params for path in COMMANDS}
OWN_FLAGS_MAX = 7  # under one heading, beside those of settings


@pytest.mark.parametrize("command", [path for path in COMMANDS if path not in {("demo",), ("new",)}], ids=" ".join)
def test_app_is_the_first_argument_of_every_command(command: tuple[str, ...]) -> None:
    arguments = [param for param in PARAMETERS[command] if param.param_type_name == "argument"]
    assert (arguments[0].name, arguments[0].metavar.strip("[]")) == ("app", "APP")
    assert f"Usage: consumer {' '.join(command)} [OPTIONS] " in help_of(*command)
    assert help_of(*command).split("[OPTIONS] ")[1].split()[0].strip("[]") == "APP"


def test_an_argument_that_may_be_left_out_is_in_brackets_once() -> None:
    assert help_of("tail").startswith("Usage: consumer tail [OPTIONS] APP [TOPIC...]\n")
    assert "[OPTIONS] APP TOPIC [VALUE]\n" in help_of("produce") and "APP TOPIC...\n" in help_of("replay")


def test_flags_of_one_name_have_one_meaning_in_every_command() -> None:
    meanings: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for params in PARAMETERS.values():
        for param in params:
            for flag in param.opts if param.param_type_name == "option" else ():
                # `--partition` of replay may be repeated: partitions
                meanings[flag].add((param.name.removesuffix("s"), str(param.metavar), str(param.is_flag)))
    assert {flag: meaning for flag, meaning in meanings.items() if len(meaning) > 1} == {}


def test_one_meaning_has_one_flag_in_every_command() -> None:
    flags: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for params in PARAMETERS.values():
        for param in params:
            if param.param_type_name == "option":
                flags[param.name.removesuffix("s")].add(tuple(opt for opt in param.opts if opt.startswith("--")))
    assert {name: names for name, names in flags.items() if len(names) > 1} == {}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_flags_of_a_command_are_in_small_groups(command: tuple[str, ...]) -> None:
    options = [param for param in PARAMETERS[command] if param.param_type_name == "option"]
    own = [param for param in options if param.name not in Settings.model_fields]
    groups = Counter(param.rich_help_panel or "Options" for param in own)
    assert {name: count for name, count in groups.items() if count > OWN_FLAGS_MAX} == {}
    if any(param.name == "as_json" for param in own):
        assert groups["Answer"]


# A process for each command, which has imported what only() imports for it and nothing else.
_ONLY = """
import json, os, sys, typer
import consumer.cli.framework
for name, expected in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        from consumer.cli.main import only
        command = typer.main.get_command(only(name)).commands.get(name)
        print(name if command is None or sorted(getattr(command, "commands", [])) != expected else "", flush=True)
        os._exit(0)
    os.wait()
"""


def test_a_command_alone_is_all_of_it() -> None:
    expected: dict[str, list[str]] = {}
    for name, *below in COMMANDS:
        expected[name] = sorted([*expected.get(name, []), *below])
    result = subprocess.run(
        [sys.executable, "-c", _ONLY, json.dumps(expected)], capture_output=True, text=True, check=True, timeout=100
    )
    assert result.stdout.split() == [] and len(result.stdout.splitlines()) == len(expected)
