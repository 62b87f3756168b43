"""A TCP proxy that delays, cuts and silences connections, even within requests.

It may cut exactly where it hurts: it reads enough of PostgreSQL's, Kafka's and Redis's protocols to see a COMMIT, a
Kafka request or a Redis command pass, and cuts before the server has it, after the server has done it, or while it does
it. It counts what it saw and how often each fault fired, because a test whose fault did not fire has shown nothing.

Limitations: it does not read TLS (a connection that negotiates it is passed on unread), and knows no packets: a black
hole holds bytes back, as a network does that loses them, and passes them on when it is over, as retransmission would.

In a test: ``async with Proxy(port, "postgres") as proxy`` and its methods. As a process of its own, with the same
commands as lines on standard input and one JSON answer a line: ``python tests/support/proxy.py --help``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Label = str | int  # "commit" for PostgreSQL, the api key for Kafka, the command in capitals for Redis
Cut = Literal["before", "after", "during"]
Way = Literal["both", "up", "down"]

PRODUCE, FETCH, OFFSET_COMMIT, JOIN_GROUP, HEARTBEAT, LEAVE_GROUP, SYNC_GROUP = 0, 1, 8, 11, 12, 13, 14

_CHUNK = 1 << 16
_REPLY_SECONDS = 30.0  # longest wait for the answer that a cut "after" withholds
_SSL_REQUESTS = (80877103, 80877104)  # SSLRequest and GSSENCRequest: answered with a single byte
_CANCEL_REQUEST = 80877102
_COMMIT = re.compile(rb"\s*(commit|end)\b", re.IGNORECASE)


class _Raw:
    """Any protocol: passes bytes on unread.

    rest: the beginning of an unfinished request.
    """

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Label | None]]:
        yield data, None

    def answered(self, data: bytes) -> bool:
        """Whether the answer to the last labelled request is complete."""
        return bool(data)


class _Postgres(_Raw):
    """PostgreSQL's protocol 3: finds a COMMIT, simple or prepared."""

    def __init__(self) -> None:
        super().__init__()
        self._typed = False  # after the startup message, messages have a type
        self._unreadable = False
        self._prepared: set[bytes] = set()  # statements that are a COMMIT
        self._bound: set[bytes] = set()  # portals of such

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Label | None]]:
        if self._unreadable:
            yield data, None
            return
        self.rest += data
        while True:
            head = 5 if self._typed else 4
            if len(self.rest) < head:
                return
            size = int.from_bytes(self.rest[head - 4 : head], "big") + head - 4
            if not self._typed and not 8 <= size <= 10_000:
                self._unreadable = True  # TLS has begun
                rest, self.rest = self.rest, b""
                yield rest, None
                return
            if len(self.rest) < size:
                return
            message, self.rest = self.rest[:size], self.rest[size:]
            if self._typed:
                yield message, self._label(message[:1], message[5:])
            else:
                self._typed = int.from_bytes(message[4:8], "big") not in (*_SSL_REQUESTS, _CANCEL_REQUEST)
                yield message, None

    def _label(self, kind: bytes, body: bytes) -> Label | None:
        match kind:
            case b"Q":
                return "commit" if _COMMIT.match(body) else None
            case b"P":
                name, text = body.split(b"\0", 2)[:2]
                (self._prepared.add if _COMMIT.match(text) else self._prepared.discard)(name)
            case b"B":
                portal, name = body.split(b"\0", 2)[:2]
                (self._bound.add if name in self._prepared else self._bound.discard)(portal)
            case b"E" if body.split(b"\0", 1)[0] in self._bound:
                return "commit"
        return None

    def answered(self, data: bytes) -> bool:
        position = 0
        while position + 5 <= len(data):
            if data[position : position + 1] in (b"C", b"E"):  # CommandComplete, ErrorResponse
                return True
            position += 1 + int.from_bytes(data[position + 1 : position + 5], "big")
        return False


class _Kafka(_Raw):
    """Kafka's requests, labelled with their api keys, and their answers."""

    def __init__(self) -> None:
        super().__init__()
        self._correlation = -1

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Label | None]]:
        self.rest += data
        if self.rest[:1] == b"\x16":  # TLS
            rest, self.rest = self.rest, b""
            yield rest, None
        while len(self.rest) >= 12:
            size = 4 + int.from_bytes(self.rest[:4], "big")
            if len(self.rest) < size:
                return
            request, self.rest = self.rest[:size], self.rest[size:]
            key, _, self._correlation = struct.unpack(">hhi", request[4:12])
            yield request, key

    def answered(self, data: bytes) -> bool:
        position = 0
        while position + 8 <= len(data):
            size, correlation = struct.unpack(">ii", data[position : position + 8])
            if correlation == self._correlation:
                return True
            position += 4 + size
        return False


class _Redis(_Raw):
    """Redis's protocol: commands as arrays of bulk strings.

    The first byte back counts as the answer.
    """

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Label | None]]:
        self.rest += data
        while (parsed := self._command()) is not None:
            size, name = parsed
            command, self.rest = self.rest[:size], self.rest[size:]
            yield command, name

    def _command(self) -> tuple[int, Label | None] | None:
        line, separator, _ = self.rest.partition(b"\r\n")
        if not separator:
            return None
        if not line.startswith(b"*"):
            return len(line) + 2, None
        position, name = len(line) + 2, None
        for _ in range(int(line[1:])):
            end = self.rest.find(b"\r\n", position)
            if end < 0:
                return None
            size = int(self.rest[position + 1 : end])
            if len(self.rest) < end + 2 + size + 2:
                return None
            if name is None:
                name = self.rest[end + 2 : end + 2 + size].decode("ascii", "replace").upper()
            position = end + 2 + size + 2
        return position, name


PROTOCOLS = {"raw": _Raw, "postgres": _Postgres, "kafka": _Kafka, "redis": _Redis}


@dataclass(slots=True)
class _Trigger:
    cut: Cut
    times: int | None
    skip: int
    every: int
    met: int = 0

    def fires(self) -> bool:
        self.met += 1
        if self.times == 0 or self.met <= self.skip or (self.met - self.skip - 1) % self.every:
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass(slots=True, eq=False)
class _Link:
    """One client's connection and its way on to the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    protocol: _Raw
    muted: bool = False  # what the server says is kept from the client
    kept: bytearray = field(default_factory=bytearray)
    answer: asyncio.Event = field(default_factory=asyncio.Event)

    def abort(self) -> None:
        for writer in (self.client, self.server):
            _reset(writer)


class Proxy:
    """Listens on a loopback port and passes connections on, with faults.

    upstream: the server's port on loopback, or (host, port); `point` moves it for new connections. protocol: what it
    can see, "postgres", "kafka", "redis" or "raw". port: 0 takes a free one; it stays the same for as long as this lives.
    seen: requests by label. fired: faults by name, cuts as (label, cut).
    """

    def __init__(self, upstream: int | tuple[str, int], protocol: str = "raw", port: int = 0) -> None:
        self.upstream = ("127.0.0.1", upstream) if isinstance(upstream, int) else upstream
        self.port = port
        self.latency_seconds = 0.0  # of every piece, either way
        self.slice_bytes = 0  # longest piece; 0 for as they come
        self.seen: Counter[Label] = Counter()
        self.fired: Counter[str | tuple[Label, Cut]] = Counter()
        self._protocol = PROTOCOLS[protocol]
        self._triggers: dict[Label, _Trigger] = {}
        self._gates = {"up": asyncio.Event(), "down": asyncio.Event()}
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None
        for gate in self._gates.values():
            gate.set()

    async def __aenter__(self) -> Proxy:
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._listener is not None:
            self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in list(self._links):
            link.abort()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._links)

    # -- faults -----------------------------------------------------------------------------------------------------

    def on(self, label: Label, cut: Cut, times: int | None = 1, skip: int = 0, every: int = 1) -> None:
        """Cut connections at a request.

        before: the server does not get it. after: the server has answered, and the client does not get the answer.
        during: the client is cut off at once, and the server is left alone with the request.

        times: how often, None for always. skip: requests to let through first. every: then every nth request.
        """
        self._triggers[label] = _Trigger(cut, times, skip, every)

    def off(self) -> None:
        """No cuts any more."""
        self._triggers.clear()

    def reset(self) -> None:
        """End every connection with a reset, on both sides."""
        self.fired["reset"] += 1
        for link in list(self._links):
            link.abort()

    def black_hole(self, way: Way = "both") -> None:
        """Pass nothing on, not even an end, and close nothing.

        way: "up" is towards the server. New connections are accepted.
        """
        self.fired[f"black hole {way}"] += 1
        for direction in ("up", "down") if way == "both" else (way,):
            self._gates[direction].clear()

    def heal(self) -> None:
        """End latency, slices and black holes; pass on what was withheld."""
        self.latency_seconds, self.slice_bytes = 0.0, 0
        for gate in self._gates.values():
            gate.set()

    def refuse(self) -> None:
        """Refuse new connections; those that are open stay."""
        if self._listener is not None:
            self.fired["refuse"] += 1
            self._listener.close()
            self._listener = None

    async def accept(self) -> None:
        """Accept connections (again), on the same port."""
        if self._listener is None:
            listening = socket.socket()
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("127.0.0.1", self.port))
            self.port = listening.getsockname()[1]
            self._listener = await asyncio.start_server(self._serve, sock=listening)

    def point(self, upstream: int | tuple[str, int]) -> None:
        """Set where new connections go; `reset` ends the open ones."""
        self.upstream = ("127.0.0.1", upstream) if isinstance(upstream, int) else upstream

    # -- the way ----------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            try:
                from_server, server = await asyncio.open_connection(*self.upstream)
            except OSError:
                _reset(client)
                return
            for writer in (client, server):
                writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(client, server, self._protocol())
            self._links.add(link)
            try:
                async with asyncio.TaskGroup() as ways:
                    ways.create_task(self._up(link, reader))
                    ways.create_task(self._down(link, from_server))
            except* OSError:
                link.abort()
            finally:
                self._links.discard(link)
                link.client.close()
                link.server.close()
        except asyncio.CancelledError:
            pass  # by __aexit__, the only one who does: asyncio's own callback cannot bear a task that was cancelled
        finally:
            self._tasks.discard(task)

    async def _up(self, link: _Link, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_CHUNK):
            for request, label in link.protocol.feed(data):
                trigger = None
                if label is not None:
                    self.seen[label] += 1
                    trigger = self._triggers.get(label)
                if label is None or trigger is None or not trigger.fires():
                    await self._pass(link.server, request, "up")
                    continue
                self.fired[(label, trigger.cut)] += 1
                await self._cut(link, request, trigger.cut)
                return
        await self._gates["up"].wait()
        with contextlib.suppress(OSError):
            link.server.write_eof()

    async def _cut(self, link: _Link, request: bytes, cut: Cut) -> None:
        if cut == "before":
            link.abort()
            return
        link.muted = True
        if cut == "during":
            _reset(link.client)
        # With what came behind it: the server answers a prepared COMMIT when the Sync has come.
        link.server.write(request + link.protocol.rest)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(link.answer.wait(), _REPLY_SECONDS)
        link.abort()

    async def _down(self, link: _Link, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_CHUNK):
            if link.muted:
                link.kept += data
                if link.protocol.answered(bytes(link.kept)):
                    link.answer.set()
            else:
                await self._pass(link.client, data, "down")
        link.answer.set()
        await self._gates["down"].wait()
        with contextlib.suppress(OSError):
            link.client.write_eof()

    async def _pass(self, to: asyncio.StreamWriter, data: bytes, way: str) -> None:
        size = self.slice_bytes or len(data)
        for start in range(0, len(data), size):
            if self.latency_seconds:
                await asyncio.sleep(self.latency_seconds)
            await self._gates[way].wait()
            to.write(data[start : start + size])
            await to.drain()
            if self.slice_bytes:
                await asyncio.sleep(0)


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset."""
    with contextlib.suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# -- as a process ---------------------------------------------------------------------------------------------------

_COMMANDS = """commands, one a line on standard input; each is answered with a line of JSON on standard output:
  latency SECONDS                           delay every piece
  slice BYTES                               pass on pieces of at most so many bytes (0: as they come)
  black-hole [both|up|down]                 pass nothing on, close nothing; heal passes on what was held back
  heal                                      no latency, no slices, no black hole
  reset                                     end every connection
  refuse | accept                           new connections
  point [HOST:]PORT                         where new connections go
  on LABEL before|after|during [TIMES [SKIP [EVERY]]]    cut at a request; TIMES 0 for always
  off                                       no cuts
  counts                                    what was seen, and what fired
The end of standard input ends the proxy. The first line out is {"port": N}."""


async def _obey(proxy: Proxy, line: str) -> dict[str, object]:
    match line.split():
        case ["latency", seconds]:
            proxy.latency_seconds = float(seconds)
        case ["slice", size]:
            proxy.slice_bytes = int(size)
        case ["black-hole"]:
            proxy.black_hole()
        case ["black-hole", ("both" | "up" | "down") as way]:
            proxy.black_hole(way)
        case ["heal"]:
            proxy.heal()
        case ["reset"]:
            proxy.reset()
        case ["refuse"]:
            proxy.refuse()
        case ["accept"]:
            await proxy.accept()
        case ["point", upstream]:
            proxy.point(_address(upstream))
        case ["on", label, ("before" | "after" | "during") as cut, *numbers] if len(numbers) <= 3:
            times, skip, every = [*map(int, numbers), *(1, 0, 1)[len(numbers) :]]
            proxy.on(int(label) if label.isdigit() else label, cut, times or None, skip, every)
        case ["off"]:
            proxy.off()
        case ["counts"]:
            seen = {str(label): count for label, count in proxy.seen.items()}
            fired = {
                fault if isinstance(fault, str) else f"{fault[0]} {fault[1]}": n for fault, n in proxy.fired.items()
            }
            return {"seen": seen, "fired": fired, "connections": proxy.connections}
        case _:
            return {"error": f"no such command: {line.strip()}"}
    return {"ok": line.strip()}


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host or "127.0.0.1", int(port)


async def _main() -> None:
    parser = argparse.ArgumentParser(
        description="A TCP proxy with faults.", epilog=_COMMANDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("upstream", type=_address, help="[HOST:]PORT of the server")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), default="raw", help="what it can see pass")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    given = parser.parse_args()
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with Proxy(given.upstream, given.protocol, given.port) as proxy:
        print(json.dumps({"port": proxy.port}), flush=True)
        while line := await lines.readline():
            try:
                answer = await _obey(proxy, line.decode())
            except (ValueError, OSError) as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(_main())
