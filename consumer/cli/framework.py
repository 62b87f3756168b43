"""Declare commands: arguments and settings as flags, errors as one line.

Imports typer; imports no command. Exit codes: 0 a good answer, 1 a negative answer, 2 it could not start or the result is
inconclusive, 130 and 143 a signal.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, is_dataclass
from dataclasses import fields as dataclass_fields
from typing import Annotated, Any, NoReturn

import typer
from pydantic import SecretStr

from consumer import logs
from consumer.cli.help_text import Command, heading_of, metavar_of
from consumer.cli.signals import Interrupted, signal_handlers_kept, until_signal
from consumer.core.errors import ConsumerError, Misconfigured
from consumer.kafka.errors import KafkaError
from consumer.postgres.errors import redacted_message, sqlstate_of
from consumer.setting_sources import CONFIG_VARIABLE
from consumer.settings import Settings, load
from consumer.worker.event_loop import run as run_loop

cli = typer.Typer(
    name="consumer",
    help="Consume Kafka topics with each message's effects applied exactly once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the names of flags and variables that they should teach
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every setting is also an environment variable: CONSUMER_ and its name, as shown beside it. "
    "--config names a file with settings; `consumer config` shows which apply.",
)
dlq = typer.Typer(
    help="Dead letters: messages that could not be applied, kept with their bytes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
cli.add_typer(dlq, name="dlq")

AppPath = Annotated[str, typer.Argument(metavar="APP", help='the App, as "module:attribute"', show_default=False)]
AppOrName = Annotated[
    str,
    typer.Argument(
        metavar="APP", help='the App, as "module:attribute"; without shards also its name', show_default=False
    ),
]
MaybeApp = Annotated[
    str | None,
    typer.Argument(
        metavar="[APP]", help='the App, as "module:attribute"; needed only if it has shards', show_default=False
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="show what would be done, and change nothing")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON", rich_help_panel="Answer")]

POSTGRES = ("postgres_dsn", "postgres_ca_file", "postgres_pooler", "allow_insecure")
SERVICES = ("kafka_", *POSTGRES)
_SHORT = {"grace_seconds": "--grace", "wait_seconds": "--wait", "workers": "-w"}


class Refused(Exception):
    """The command completed with a negative result (exit code 1)."""


def command(
    app: typer.Typer, name: str, settings: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Declare a command with its settings as flags and one-line errors.

    settings: prefixes of the settings that become flags. A parameter whose type is a dataclass becomes one flag for each of its
    fields; the function receives the dataclass.
    """

    def register(function: Callable[..., Any]) -> Callable[..., None]:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        groups: dict[str, Any] = {
            parameter.name: parameter.annotation for parameter in parameters if is_dataclass(parameter.annotation)
        }
        own = [parameter for parameter in parameters if parameter.name not in {"settings", *groups}]
        own += [parameter for group in groups.values() for parameter in _parameters_of(group)]
        fields = (
            {field: info for field, info in Settings.model_fields.items() if field.startswith(settings)}
            if settings
            else {}
        )

        takes_settings = "settings" in inspect.signature(function).parameters

        @functools.wraps(function)
        def call(**given: Any) -> None:
            flags = {field: given.pop(field) for field in fields}
            config = given.pop("config", None)
            with _errors_as_lines(name):
                _check_text({**given, **flags, "config": config})
                if takes_settings:
                    given["settings"] = own_settings = load(config, **flags)
                    logs.configure(own_settings.log_level, own_settings.log_format, config=own_settings.log_config)
                for argument, group in groups.items():
                    given[argument] = group(**{field.name: given.pop(field.name) for field in dataclass_fields(group)})
                result = function(**given)
                if inspect.iscoroutine(result):
                    with signal_handlers_kept():  # the loop ends with Python's own handlers
                        result = run_loop(until_signal(result))
            raise typer.Exit(result or 0)

        options = [_option(field, info) for field, info in fields.items()]
        if takes_settings:
            options.insert(0, _CONFIG)
        call.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *options]}
        app.command(name, cls=Command)(call)
        return call

    return register


_AS_BYTES = ("key", "message_id", "id")  # arguments that may hold bytes that are not UTF-8


def _check_text(given: dict[str, Any]) -> None:
    """Raise Misconfigured for text that is not UTF-8.

    PostgreSQL and Kafka refuse it. Arguments that may be bytes are exempt.
    """
    for name, value in given.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and name not in _AS_BYTES and any("\ud800" <= char <= "\udfff" for char in text):
                raise Misconfigured(f"{_flag_of(name)}: not valid UTF-8; write it in UTF-8")


@contextmanager
def _errors_as_lines(name: str) -> Iterator[None]:
    """Print an error of the block as one line, and exit."""
    try:
        yield
    except Interrupted as stopped:
        _fail(str(stopped), stopped.code)
    except typer.Exit:
        raise
    except Refused as refused:
        _fail(str(refused), 1)
    except ConsumerError as error:
        _fail(str(error), 2)
    except (KafkaError, TimeoutError) as error:
        _fail(f"Kafka: {str(error) or type(error).__name__}", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except asyncio.CancelledError:
        _fail("terminated", 143)
    except BrokenPipeError:
        raise typer.Exit(1) from None
    except Exception as error:
        # An unexpected error: its text may quote secrets, so only its type and place are printed.
        _fail(f"{name}: {logs.describe(error)}{_sqlstate(error)}", 2)


def _fail(text: str, code: int) -> NoReturn:
    from consumer.cli.output import fail  # only now: rich takes 40 ms

    fail(text, code)


_NAMES = {  # of parameters that are not named like their flag
    "app": "APP",
    "name": "NAME",
    "topics": "TOPIC",
    "message_id": "MESSAGE_ID",
    "value": "VALUE",
    "to_topic": "TOPIC",
    "headers": "--header",
    "start": "--from",
    "of_action": "--action",
    "handlers": "--handler",
    "files": "--file",
    "grants_for": "--grants",
    "directory": "--reports",
    "directories": "--reload-dir",
}


def _parameters_of(group: Any) -> Iterator[inspect.Parameter]:
    """Return a parameter for each field of a dataclass of options."""
    annotations = typing.get_type_hints(group, include_extras=True)
    for field in dataclass_fields(group):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotations[field.name]
        )


def _flag_of(name: str) -> str:
    return _NAMES.get(name) or f"--{name.replace('_', '-')}"


def _option(name: str, field: Any) -> inspect.Parameter:
    kinds = [kind for kind in typing.get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if typing.get_origin(field.annotation) is typing.Literal or any(
        typing.get_origin(kind) is typing.Literal for kind in kinds
    ):
        value_type: Any = str
        choices = typing.get_args(field.annotation)
        text = f"{field.description}: {', '.join(map(str, choices))}"
    else:
        value_type = str if SecretStr in kinds else kinds[0]
        while typing.get_origin(value_type) is Annotated:
            value_type = typing.get_args(value_type)[0]
        text = field.description or ""
    flag = f"--{name.replace('_', '-')}"
    flags = [flag, f"--no-{flag[2:]}"] if value_type is bool else [flag]
    if name in _SHORT:
        flags.insert(0, _SHORT[name])
    declaration = "/".join(flags) if value_type is bool else None
    option = typer.Option(
        *([declaration] if declaration else flags),
        help=text,
        metavar=None if value_type is bool else metavar_of(name, value_type),
        show_default=False,
        rich_help_panel=heading_of(name),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[value_type | None, option]
    )


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            envvar=CONFIG_VARIABLE,
            help="TOML file with settings; flags and the environment win over it",
            show_default=False,
            rich_help_panel="Process",
        ),
    ],
)


def _sqlstate(error: BaseException) -> str:
    code = sqlstate_of(error)
    return f" (SQLSTATE {code}: {redacted_message(error)})" if code else ""
