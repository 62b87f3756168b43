"""Help at 80 columns: no Python type, no name that is cut, flags under headings with default and variable."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from consumer.cli.main import whole
from consumer.settings import Settings


def _commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not hasattr(group, "commands"):
        return [path]
    return [each for name, one in group.commands.items() for each in _commands(one, (*path, name))]


COMMANDS = _commands(typer.main.get_command(whole()))


def help_of(*command: str) -> str:
    result = CliRunner().invoke(whole(), [*command, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return str(result.output)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_at_80_columns_has_no_type_and_cuts_nothing(command: tuple[str, ...]) -> None:
    text = help_of(*command)
    assert not re.search(r"typing|Annotated|<\w|SecretStr|int range", text), text
    assert max(map(len, text.splitlines())) <= 80
    for each in re.findall(r"CONSUMER_\w+", text):
        assert each == "CONSUMER_WORKERS" or each.removeprefix("CONSUMER_").lower() in Settings.model_fields


def test_help_of_run_shows_every_setting_under_a_heading() -> None:
    text = help_of("run")
    headings = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
    assert headings == [
        "Arguments",
        "Options",
        "Kafka",
        "PostgreSQL",
        "Redis",
        "Ledger",
        "Dead letters",
        "Logging",
        "Process",
        "Limits",
    ]
    for name, field in Settings.model_fields.items():
        assert f"CONSUMER_{name.upper()}" in text, name
        flag = re.search(rf"^  .*--{name.replace('_', '-')}\b.*\n((?:      .*\n)+)", text, re.MULTILINE)
        assert flag, name
        words = " ".join(flag[1].split())
        assert f"env: CONSUMER_{name.upper()}]" in words
        if field.default not in (None, ""):
            assert f"default: {field.default};" in words, name
    assert "default: 1; env: CONSUMER_WORKERS" in text and "1 to 256" in text
    assert "postgresql://user@host/database" in text
