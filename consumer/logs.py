"""Structured logs: one event per line, as text or JSON.

An event of ours is a constant text and fields. Fields are names, counts, places and durations; never payloads, keys,
message ids or the texts of exceptions (those are in the dead letters, where access is controlled). The application's
loggers keep their level, their `extra=` and their tracebacks. Limitations: the application decides what they log.
"""

from __future__ import annotations

import configparser
import json
import logging
import logging.config
import queue
import sys
import threading
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from consumer.core.errors import Misconfigured
from consumer.error_places import place

log = logging.getLogger("consumer")


def event(level: int, text: str, /, **fields: Any) -> None:
    """Log an event. Its text is constant; the fields vary."""
    if log.isEnabledFor(level):
        log.log(level, text, extra={"fields": fields})


def configure(level: str, style: str, stream: TextIO | None = None, config: str | None = None) -> None:
    """Send logs to a stream, or where a file says.

    stream: stderr by default. level: debug … error, for our events and for loggers without their own level. style:
    auto, text or json. config: the path of a file that configures logging. Raises Misconfigured for a file that cannot
    be used.
    """
    log.setLevel(level.upper())
    # The client logs every rebalance and every refused connection; what matters of that is an event of ours.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL if level != "debug" else logging.INFO)
    for name in ("asyncio", "asyncpg", "redis"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if config is not None:
        log.handlers[:], log.propagate = [], True
        _configure_from(Path(config))
        log.disabled = False
        return
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    as_text = style == "text" or (style == "auto" and stream.isatty())
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Our own handler, so that an application that configures the root logger does not lose our fields.
    log.handlers[:], log.propagate, log.disabled = [handler], False, False


def _configure_from(path: Path) -> None:
    """Configure logging from a file: JSON or TOML for dictConfig, or ini."""
    what = f"CONSUMER_LOG_CONFIG: {path}"
    if (here := str(Path.cwd())) not in sys.path:  # as for the App: a formatter may be the application's
        sys.path.insert(0, here)
    try:
        match path.suffix.lower():
            case ".json":
                configuration = json.loads(path.read_text("utf-8-sig"))
            case ".toml":
                configuration = tomllib.loads(path.read_text("utf-8-sig"))
            case ".ini" | ".cfg" | ".conf":
                path.read_bytes()  # fileConfig does not say that there is no such file
                logging.config.fileConfig(path, disable_existing_loggers=False, encoding="utf-8")
                return
            case _:
                raise Misconfigured(f"{what}: unknown format; name it .json, .toml (both for dictConfig) or .ini")
        if not isinstance(configuration, dict):
            raise Misconfigured(f"{what}: not an object; write what logging.config.dictConfig takes")
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, **configuration})
    except OSError as error:
        raise Misconfigured(
            f"{what}: {error.strerror or type(error).__name__}; give the path of a readable file"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, configparser.Error) as error:
        cause = f" ({type(error.__cause__).__name__})" if error.__cause__ is not None else ""
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise Misconfigured(f"{what}: {text}{cause}; correct the file") from None


class _Background:
    """A stream that never blocks: a thread writes; excess lines are dropped."""

    _LINES_MAX = 10_000

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(self._LINES_MAX)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with suppress(OSError, ValueError):  # the reader is gone
                self._stream.write(line)
                self._stream.flush()

    def write(self, text: str) -> None:
        """Pass a text to the thread."""
        with suppress(queue.Full):
            self._lines.put_nowait(text)

    def flush(self) -> None:
        """Part of a stream; the thread flushes."""

    def end(self, seconds: float) -> bool:
        """Write the rest, within a time. Returns whether all was written."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()


_background: list[_Background] = []


def never_wait() -> None:
    """Write our events in a thread: a full pipe must not block."""
    handlers = [*log.handlers, *(logging.getLogger().handlers if log.propagate else ())]
    for handler in dict.fromkeys(handlers):  # a file may give both loggers one handler
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            background = _Background(handler.stream)
            _background.append(background)
            handler.setStream(background)


def end(seconds: float) -> bool:
    """Write what `never_wait` has queued.

    Returns False if a thread is still blocked: then only os._exit ends the process.
    """
    ended = [thread.end(seconds) for thread in _background]
    return all(ended)


def unhandled(_: object, context: dict[str, Any]) -> None:
    """Log an error that was not awaited, without its text.

    It is an event loop's exception handler. The text may quote a payload.
    """
    event(logging.WARNING, "an error that was not awaited", error=describe(context.get("exception")))


def guard() -> None:
    """Log uncaught exceptions of threads and finalizers without their text."""

    def of_thread(args: threading.ExceptHookArgs) -> None:
        event(logging.WARNING, "an error that ended a thread", error=describe(args.exc_value))

    def of_finalizer(args: sys.UnraisableHookArgs) -> None:
        event(logging.WARNING, "an error that could not be raised", error=describe(args.exc_value))

    threading.excepthook = of_thread
    sys.unraisablehook = of_finalizer


def _clean(value: Any) -> Any:
    """Return a value as a short printable line.

    A name from outside must not forge a line or control a terminal.
    """
    if isinstance(value, str):
        return "".join(character if character.isprintable() else "?" for character in value[:500])
    return value


# Loggers whose texts and exceptions may contain a payload, and are not the application's.
_OURS = ("consumer", "asyncio", "aiokafka", "asyncpg", "redis")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "fields"}


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.split(".", 1)[0] in _OURS


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    """Return the fields of our event, or an application's `extra=`."""
    if _is_ours(record):
        return {name: _clean(value) for name, value in getattr(record, "fields", {}).items()}
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """Formats records as JSON, one line each; for files of --log-config too."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON, with the traceback of an application's record."""
        is_ours = _is_ours(record)
        text = record.getMessage()
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _clean(text) if is_ours else text,
            "pid": record.process,
        }
        for name, value in _fields(record).items():
            line[f"extra_{name}" if name in line and not is_ours else name] = value
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = describe(record.exc_info[1])
            if not is_ours:
                line["traceback"] = self.formatException(record.exc_info)
        if record.stack_info and not is_ours:
            line["stack"] = record.stack_info
        return json.dumps(line, default=_text_of, skipkeys=True)


class TextFormatter(logging.Formatter):
    """Formats records as text; for files of --log-config too.

    One line, and the traceback of an application's record below it.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as text."""
        is_ours = _is_ours(record)
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        fields = "".join(f" {name}={_printable(_text_of(value))}" for name, value in _fields(record).items())
        text = record.getMessage()
        line = f"{time} {record.levelname.lower():7} [{record.process}] "
        line += _clean(text) + fields if is_ours else f"{record.name}: {_printable(text)}{fields}"
        if record.exc_info and record.exc_info[0] is not None:
            line += (
                f" error={describe(record.exc_info[1])}"
                if is_ours
                else f"\n{_printable(self.formatException(record.exc_info))}"
            )
        if record.stack_info and not is_ours:
            line += f"\n{_printable(self.formatStack(record.stack_info))}"
        return line


def _text_of(value: Any) -> str:
    try:
        return str(value)
    except Exception:
        return f"(a {type(value).__name__} without text)"


def _printable(text: str) -> str:
    """Replace what could control a terminal; line ends stay."""
    return "".join(character if character.isprintable() or character in "\n\t" else "?" for character in text)


def describe(error: BaseException | None) -> str:
    """Return the type of an exception and its place, never its text."""
    if error is None:
        return "unknown"
    at = place(error)
    return f"{type(error).__name__} at {at}" if at else type(error).__name__
