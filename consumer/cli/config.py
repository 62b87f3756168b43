"""`consumer config`: the settings that apply, and where each comes from.

Contacts no service. Secrets are masked whole: an address may hold a password in several places.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr
from rich.markup import escape
from rich.table import Table

from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.framework import AsJson, MaybeApp, cli, command
from consumer.cli.output import line, names, print_json, printable, show
from consumer.setting_sources import Source
from consumer.settings import Settings

_MASK = "***"


@dataclass(frozen=True)
class _Row:
    value: Any
    source: Source

    def as_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "source": self.source.kind,
            "place": self.source.place,
            "secret_file": self.source.secret_file,
        }

    def as_text(self) -> tuple[str, str]:
        value = "-" if self.value in (None, "") else self.value
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        source = " ".join(filter(None, (self.source.kind, self.source.place)))
        return escape(printable(shown)), escape(printable(source))


@command(cli, "config", ("",))
def config(settings: Settings, app: MaybeApp = None, as_json: AsJson = False) -> int:
    """Show the settings that apply, and where each comes from.

    A flag wins over the environment, the environment over the file of --config, the file over the default. Secrets are masked.

    \b
    Examples:
      consumer config
          the environment's settings
      consumer config --config production.toml --json
          with those of a file
      consumer config shop.orders:app
          also the databases of an App with shards
    """
    rows = {name: _row(settings, name) for name in Settings.model_fields}
    loaded = load_app(app) if app is not None else None
    shards = _shards(loaded) if loaded is not None else {}
    if as_json:
        print_json(
            {
                "config_file": settings.config_file,
                "app": loaded.name if loaded is not None else None,
                "settings": {name: row.as_json() for name, row in rows.items()},
                "shards": {name: row.as_json() for name, row in shards.items()},
            }
        )
        return 0
    if settings.config_file is not None:
        line(f"file: {settings.config_file}")
    _print(rows, "setting")
    if loaded is not None and shards:
        line(f"{loaded.name}: shards")
        _print(shards, "shard")
    return 0


def _row(settings: Settings, name: str) -> _Row:
    value = getattr(settings, name)
    if isinstance(value, SecretStr):
        value = _MASK
    return _Row(value, settings.source_of(name))


def _shards(app: App) -> dict[str, _Row]:
    """Return the masked DSN of each shard; None if unset."""
    rows = {}
    for name, address in app.shards.items():
        if address.startswith("env:"):
            variable = address.removeprefix("env:").strip()
            rows[name] = _Row(_MASK if os.environ.get(variable) else None, Source("environment", variable))
        else:
            rows[name] = _Row(_MASK, Source("app"))
    return rows


def _print(rows: dict[str, _Row], title: str) -> None:
    table = Table(*names(title, "value", "source"), box=None, pad_edge=False)
    for name, row in rows.items():
        table.add_row(escape(printable(name)), *row.as_text())
    show(table)
