"""The help of a command: options by heading, with defaults and variables.

Knows settings, typer's options and text; knows no command. Lines are wrapped at spaces alone, so that no name is cut.
"""

from __future__ import annotations

import textwrap
import typing
from pathlib import Path
from typing import Any

import typer.core

from consumer.settings import Settings

_WIDTH_MAX = 80
_INDENT = " " * 6

# Prefixes of settings, and the heading of their flags; the first one that fits.
_HEADINGS = (
    ("kafka_", "Kafka"),
    ("postgres_", "PostgreSQL"),
    ("redis_", "Redis"),
    ("precheck_", "Redis"),
    ("schema_registry_", "Schema registry"),
    ("ledger_", "Ledger"),
    ("dead_letter_", "Dead letters"),
    ("outbox_", "Outbox"),
    ("log_", "Logging"),
    (("http", "tracing", "console_", "grace_", "wait_", "watchdog_", "restarts_", "worker", "allow_"), "Process"),
    ("", "Limits"),
)
_ORDER = (
    "Message",
    "Filters",
    "Range",
    "Move",
    "Other changes",
    "Print only",
    "Options",
    "Answer",
    *dict.fromkeys(heading for _, heading in _HEADINGS),
)
_KINDS = (
    (("_file", "_config"), "FILE"),
    ("_url", "URL"),
    ("_dsn", "DSN"),
    ("_topic", "TOPIC"),
    ("http", "HOST:PORT"),
    (("_provider",), "MODULE:NAME"),
    ("_servers", "HOST:PORT,..."),
)


def heading_of(setting: str) -> str:
    """The heading under which a setting's flag is shown."""
    return next(heading for prefix, heading in _HEADINGS if setting.startswith(prefix))


def metavar_of(setting: str, kind: type) -> str:
    """What stands for a setting's value."""
    if kind in (int, float):
        return "NUMBER"
    return next((shown for suffix, shown in _KINDS if setting.endswith(suffix)), "TEXT")


class Command(typer.core.TyperCommand):
    """A command whose help is this module's."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Write the first line: the command and its arguments."""
        arguments = [_shape(param) for param in self.get_params(ctx) if param.param_type_name == "argument"]
        formatter.write_usage(ctx.command_path, " ".join(["[OPTIONS]", *arguments]))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, by heading."""
        width = min(_WIDTH_MAX, formatter.width)
        sections: dict[str, list[str]] = {}
        for param in self.get_params(ctx):
            if getattr(param, "hidden", False):
                continue
            if param.param_type_name == "argument":
                sections.setdefault("Arguments", []).append(_argument(param, width))
            else:
                heading = getattr(param, "rich_help_panel", None) or "Options"
                sections.setdefault(heading, []).append(_option(param, width))
        known = ("Arguments", *_ORDER)
        for heading in [*known, *(heading for heading in sections if heading not in known)]:
            if heading in sections:
                formatter.write(f"\n{heading}:\n" + "".join(sections[heading]))


def _shape(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).replace("[", "").replace("]", "")
    if argument.nargs == -1 and not name.endswith("..."):
        name += "..."
    return name if argument.required else f"[{name}]"


def _argument(argument: Any, width: int) -> str:
    name = argument.metavar or argument.name.upper()
    return f"  {name}\n" + _wrapped(
        getattr(argument, "help", None) or "", [] if not argument.required else ["required"], width
    )


def _option(option: Any, width: int) -> str:
    names = ", ".join(option.opts)
    if option.secondary_opts:
        names += " / " + ", ".join(option.secondary_opts)
    value = "" if option.is_flag or option.count else f" {_value(option)}"
    facts = []
    if option.name in Settings.model_fields and option.rich_help_panel:
        return f"  {names}{value}\n" + _wrapped(option.help or "", _of_setting(option.name), width)
    if (allowed := _range(option)) is not None:
        facts.append(allowed)
    if (default := _default(option)) is not None:
        facts.append(f"default: {default}")
    variables = [option.envvar] if isinstance(option.envvar, str) else option.envvar or []
    facts += [f"env: {variable}" for variable in variables]
    if option.required:
        facts.append("required")
    return f"  {names}{value}\n" + _wrapped(option.help or "", facts, width)


def _value(option: Any) -> str:
    if option.metavar:
        return str(option.metavar)
    kind = getattr(getattr(option, "type_descriptor", None), "annotation", None)
    for alternative in (kind, *typing.get_args(kind)):
        if typing.get_origin(alternative) is typing.Literal:
            return "|".join(map(str, typing.get_args(alternative)))
        if alternative in (int, float):
            return "NUMBER"
        if isinstance(alternative, type) and issubclass(alternative, Path):
            return "FILE"
    return "TEXT"


def _of_setting(name: str) -> list[str]:
    field = Settings.model_fields[name]
    default = (
        [] if field.default is None or field.is_required() or field.default == "" else [f"default: {field.default}"]
    )
    return [*default, f"env: CONSUMER_{name.upper()}"]


def _range(option: Any) -> str | None:
    least, most = getattr(option, "min", None), getattr(option, "max", None)
    if least is None and most is None:
        return None
    if most is None:
        return f"at least {least}"
    return f"at most {most}" if least is None else f"{least} to {most}"


def _default(option: Any) -> str | None:
    default = option.default
    if option.is_flag or default is None or default in ("", (), []) or callable(default) or not option.show_default:
        return None
    return ", ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


def _wrapped(text: str, facts: list[str], width: int) -> str:
    """Wrap a text and its facts; keep each fact on one line."""
    lines = _lines(text, width) if text else []
    if facts:
        bracketed = "[" + "; ".join(facts) + "]"
        joined = f"{lines[-1]} {bracketed}" if lines else _INDENT + bracketed
        if len(joined) <= width:
            lines[-1:] = [joined]
        elif len(_INDENT + bracketed) <= width:
            lines.append(_INDENT + bracketed)
        else:
            parts = [f"{fact};" for fact in facts[:-1]] + [facts[-1]]
            parts[0], parts[-1] = "[" + parts[0], parts[-1] + "]"
            for part in parts:
                lines += _lines(part, width)
    return "".join(f"{line}\n" for line in lines)


def _lines(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        width,
        initial_indent=_INDENT,
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
