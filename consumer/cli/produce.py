"""`consumer produce`: send messages that the App's handlers can read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from consumer.admin.bytes_as_text import text_or_base64
from consumer.admin.produce import Acknowledged, Line, Producing, Request, readers
from consumer.admin.produce_plan import Outgoing, parse_headers
from consumer.app_loader import load_app
from consumer.cli.framework import AppPath, AsJson, DryRun, cli, command
from consumer.cli.output import err, line, print_json, printable
from consumer.cli.progress import progress
from consumer.core.errors import Misconfigured
from consumer.settings import Settings

_BOM = b"\xef\xbb\xbf"


_option = partial(typer.Option, rich_help_panel="Message")


@dataclass(frozen=True, kw_only=True)
class MessageFlags:
    """What the messages are, beside their values."""

    key: Annotated[str | None, _option("--key", help="key of the message, or of all of --file")] = None
    key_field: Annotated[
        str | None, _option("--key-field", metavar="PATH", help="take the key from this field of the value")
    ] = None
    message_id: Annotated[str | None, _option("--message-id", help="id of the message; by default a new one")] = None
    id_field: Annotated[
        str | None, _option("--id-field", metavar="PATH", help="take the id from this field of the value")
    ] = None
    headers: Annotated[
        list[str] | None, _option("--header", metavar="NAME=VALUE", help="a header (may be repeated)")
    ] = None
    partition: Annotated[
        int | None, _option("--partition", min=0, help="send to this partition; by default the key decides")
    ] = None


_Topic = Annotated[
    str,
    typer.Argument(metavar="TOPIC", help="a topic that the App has a handler of, or publishes", show_default=False),
]
_Value = Annotated[
    str | None,
    typer.Argument(metavar="[VALUE]", help="the value, as JSON; - for standard input", show_default=False),
]
_File = Annotated[
    Path | None,
    typer.Option("--file", metavar="FILE", help="send each line, a value as JSON; - for standard input"),
]
_Tombstone = Annotated[bool, typer.Option("--tombstone", help="send a null value, for --key")]
_Raw = Annotated[
    bool, typer.Option("--raw", help="VALUE is in the topic's own format already, such as Avro, and sent as it is")
]


@command(cli, "produce", ("kafka_", "allow_insecure", "schema_registry_", "wait_", "log_"))
def produce(
    app: AppPath,
    to_topic: _Topic,
    settings: Settings,
    message: MessageFlags,
    value: _Value = None,
    file: _File = None,
    tombstone: _Tombstone = False,
    raw: _Raw = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> Any:
    """Send messages to a topic, once the App's handlers could read them.

    Every value is decoded as a worker of the App would decode it, for each
    handler of the topic, and gets the message id that the handlers look for:
    a header, or the id of a CloudEvent. A message that would become a dead
    letter because of its form is refused; of a file with one such line
    nothing is sent. Where the handlers have decode= with an encoder (Avro,
    Protobuf, CloudEvents), type JSON: it is encoded. Ends when all in-sync
    replicas have the messages. Writes nothing to PostgreSQL.

    The same --message-id again is the same message: it is applied once.

    \b
    Examples:
      consumer produce shop:app payments '{"id": 7, "amount": 5}'
      consumer produce shop:app payments --key k --message-id o-7 - < a.json
      consumer produce shop:app payments --file many.jsonl --id-field id
      consumer produce shop:app payments --file many.jsonl --dry-run
    """
    loaded = load_app(app)
    handlers = readers(loaded, app, to_topic)
    _check_together(message, value, file, tombstone)
    request = Request(
        topic=to_topic,
        lines=_lines(value, file, tombstone, raw),
        where=f"--file {file}" if file is not None else "VALUE",
        is_raw=raw,
        key=None if message.key is None else message.key.encode("utf-8", "surrogateescape"),
        key_field=message.key_field,
        message_id=None if message.message_id is None else message.message_id.encode("utf-8", "surrogateescape"),
        id_field=message.id_field,
        headers=parse_headers(message.headers or ()),
        partition=message.partition,
    )
    if not handlers:
        err.print(
            f"consumer: {printable(to_topic)}: no handler of this App reads it, so the values are not checked",
            markup=False,
            highlight=False,
        )
    names = [handler.name for handler in handlers]
    return _run(Producing(loaded, handlers, request, settings), to_topic, names, dry_run, as_json)


def _check_together(message: MessageFlags, value: str | None, file: Path | None, tombstone: bool) -> None:
    """Raise Misconfigured for arguments that contradict each other."""
    if sum([value is not None, file is not None, tombstone]) != 1:
        what = "missing" if value is None else "not with --file or --tombstone"
        raise Misconfigured(f"VALUE: {what}; give one of a value, - for standard input, --file or --tombstone")
    if tombstone and message.key is None:
        raise Misconfigured("--tombstone: no key; give the --key whose value is to be deleted")
    if message.key is not None and message.key_field is not None:
        raise Misconfigured("--key-field: not with --key; give one of them")
    if message.message_id is not None and message.id_field is not None:
        raise Misconfigured("--id-field: not with --message-id; give one of them")
    if message.message_id == "":
        raise Misconfigured("--message-id: empty; give an id, or leave it out for a new one")
    if message.message_id is not None and file is not None:
        raise Misconfigured("--message-id: the same for all messages of a file; use --id-field, or leave it out")
    for flag, path in (("--key-field", message.key_field), ("--id-field", message.id_field)):
        if path is not None and not all(path.split(".")):
            raise Misconfigured(f"{flag} {path!r}: not a path; write a field's name, or names with dots between")
        if path is not None and tombstone:
            raise Misconfigured(f"{flag}: not with --tombstone, which has no fields; leave it out")


def _lines(value: str | None, file: Path | None, tombstone: bool, raw: bool) -> Sequence[Line]:
    """Return the values. Raises Misconfigured for what cannot be read."""
    if tombstone:
        return [Line(None, None)]
    if file is not None:
        return _lines_of(file)
    assert value is not None
    if value != "-":
        return [Line(None, value.encode())]
    text = sys.stdin.buffer.read()
    return [Line(None, text if raw else text.removesuffix(b"\n").removesuffix(b"\r"))]


def _lines_of(file: Path) -> Sequence[Line]:
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise Misconfigured(f"--file {file}: {error.strerror}; name a file that can be read") from None
    numbered = enumerate(content.removeprefix(_BOM).split(b"\n"), 1)
    lines = [Line(number, text.removesuffix(b"\r")) for number, text in numbered if text.strip()]
    if not lines:
        raise Misconfigured(f"--file {file}: no messages; write a value on each line")
    if lines[0].text is not None and lines[0].text.strip() in (b"{", b"["):
        raise Misconfigured(
            f"--file {file}: a JSON document of several lines; write each message on one line, for example with jq -c"
        )
    return lines


async def _run(producing: Producing, topic: str, names: Sequence[str], dry_run: bool, as_json: bool) -> int:
    rows: list[dict[str, Any]] = []

    def acknowledged(sent: Acknowledged) -> None:
        rows.append(_row(sent.message, sent.partition, sent.offset))
        if not as_json:
            place = f"{topic}:{sent.partition}:{sent.offset}"
            line(place if sent.message.id is None else f"{place} {sent.message.id}")

    with progress("messages") as bar:
        messages = await producing.prepare(bar.progress)
        if not dry_run:
            await producing.send(messages, acknowledged, bar.progress)
    if as_json:
        rows = rows or [_row(message, None, None) for message in messages]
        print_json({"topic": topic, "handlers": list(names), "dry_run": dry_run, "messages": rows})
    elif dry_run:
        readers = f"for {', '.join(names)}" if names else "with no handler to check them"
        line(f"{len(messages):,} message{'s are' if len(messages) > 1 else ' is'} valid {readers}; nothing was sent")
    return 0


def _row(message: Outgoing, partition: int | None, offset: int | None) -> dict[str, Any]:
    id = message.id
    if id is None and partition is not None:
        id = f"{message.record.topic}:{partition}:{offset}"
    return {
        "line": message.line,
        "partition": partition,
        "offset": offset,
        "id": id,
        "key": text_or_base64(message.record.key),
    }
