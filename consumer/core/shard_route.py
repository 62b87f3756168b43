"""Asks the application's route for shards, and detects changed answers.

Pure: calls the function and compares its answers; knows no database. A route must be a pure function of the message
key: a key that moves from one shard to another is applied in the second one although it was applied in the first.
Limitations: answers for keys that it has not seen are unknown. It remembers a bounded number of answers. Only those for
applied messages are stored in the database: a wrong route's answer for a refused message must not count against the
right route.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b

from consumer.core.errors import Misconfigured
from consumer.core.message import Record

Route = Callable[[bytes | None], str]
Probes = Mapping[bytes | None, str]  # what the route answered: key (None: a message without one) -> shard

_REMEMBERED_MAX = 20_000  # answers, in this process
RECORDED_MAX = 200  # keys of messages that each shard keeps, beside the fixed ones
_FIXED: tuple[bytes | None, ...] = (
    None,
    b"",
    *(str(n).encode() for n in range(32)),
    *(f"key-{n}".encode() for n in range(32)),
    *(bytes([n * 37 % 256, n * 101 % 256, 255 - n]) for n in range(16)),
)
_SHOWN_MAX = 60  # characters of a wrong answer


class RouteFault(Misconfigured):
    """The route is unreliable, so nothing more is applied."""


class Router:
    """Asks the route, and compares every answer with what it answered before."""

    def __init__(self, shards: Sequence[str], route: Route | None) -> None:
        self.shards = tuple(shards)
        self._route = route
        self._places = {name: place for place, name in enumerate(self.shards)}
        self._answers: dict[bytes | None, str] = {}
        self._to_record: dict[str, dict[bytes, None]] = {}  # by shard: keys that it may keep, in order
        self._recorded: dict[str, set[bytes]] = {}  # by shard: those that were taken from there
        self._recordable: dict[str, int] = {}  # by shard: how many more

    def split(self, records: Sequence[Record]) -> list[Sequence[Record]]:
        """Return the records of each shard, in their own order.

        Shards come in the order of `shards`. Raises RouteFault, naming the record.
        """
        if self._route is None:
            return [records]
        by_shard: list[list[Record]] = [[] for _ in self.shards]
        for record in records:
            try:
                name = self.shard_of(record.key)
            except RouteFault as fault:
                raise RouteFault(
                    f"{fault} (message {record.topic}:{record.partition}:{record.offset}, which was not applied)"
                ) from fault
            by_shard[self._places[name]].append(record)
        return list(by_shard)

    def shard_of(self, key: bytes | None) -> str:
        """Return the shard of a key.

        Raises RouteFault when the route raises, names no shard, or has changed its answer.
        """
        earlier = self._answers.get(key)
        # Ask twice for a new key, to detect a route that is not deterministic.
        for _ in range(1 if earlier is not None else 2):
            name = self._asked(key)
            if earlier is not None and name != earlier:
                raise RouteFault(f"the route answers {name!r} for key {shown(key)}, and answered {earlier!r} before")
            earlier = name
        assert earlier is not None
        if key not in self._answers:
            self._remember(key, earlier)
        return earlier

    def _asked(self, key: bytes | None) -> str:
        assert self._route is not None
        try:
            name = self._route(key)
        except Exception as error:
            raise RouteFault(f"the route raises {type(error).__name__} for key {shown(key)}") from error
        if not isinstance(name, str) or name not in self._places:
            said = repr(name)[:_SHOWN_MAX] if key in _FIXED else f"a {type(name).__name__}"  # it may contain the key
            raise RouteFault(
                f"the route answers {said} for key {shown(key)}, which is none of {', '.join(self.shards)}"
            )
        return name

    def _remember(self, key: bytes | None, name: str) -> None:
        if len(self._answers) >= _REMEMBERED_MAX:
            del self._answers[next(iter(self._answers))]  # the oldest
        self._answers[key] = name

    def fixed_probes(self) -> Probes:
        """Return the route's answers for a fixed set of keys.

        Raises RouteFault.
        """
        return {key: self.shard_of(key) for key in _FIXED}

    def start_recording(self, shard: str, count: int) -> None:
        """Keep the next `count` keys of a shard for `to_record`."""
        self._recordable[shard] = count

    def applied(self, shard: str, records: Iterable[Record]) -> None:
        """Remember keys of records that were applied in a shard."""
        room = self._recordable.get(shard, 0)
        if room <= 0:
            return
        waiting, recorded = self._to_record.setdefault(shard, {}), self._recorded.setdefault(shard, set())
        for record in records:
            if room > 0 and record.key is not None and record.key not in waiting and record.key not in recorded:
                waiting[record.key] = None
                room -= 1
        self._recordable[shard] = room

    def to_record(self, shard: str) -> list[bytes]:
        """Return keys that this process applied first since the last call."""
        keys = list(self._to_record.pop(shard, ()))
        self._recorded.setdefault(shard, set()).update(keys)
        return keys

    def changed(self, probes: Probes) -> tuple[bytes | None, str, str] | None:
        """Return the first key whose shard has changed: key, then, now.

        Raises RouteFault.
        """
        for key, then in probes.items():
            now = self._asked(key)
            if now != then:
                return key, then, now
        return None


def shown(key: bytes | None) -> str:
    """Format a key for logs: keys of messages as a digest."""
    if key is None:
        return "None (a message without a key)"
    if key in _FIXED:
        return repr(key)[1:]
    return f"{blake2b(key, digest_size=4).hexdigest()} (BLAKE2b-32 of its {len(key)} bytes)"


def explain_change(app: str, change: tuple[bytes | None, str, str]) -> str:
    """Return the error text for a changed route."""
    key, then, now = change
    return (
        f"the route of App {app!r} has changed: key {shown(key)} now goes to shard {now!r}, and went to {then!r}. Messages "
        "applied in one shard would be applied again in the other. Restore the old route, or move the keys as "
        "docs/how-to/shards.md says and then run `consumer migrate APP --new-route`. (A route that uses hash() answers differently "
        "in each process: use zlib.crc32 or hashlib.)"
    )


def check_names(names: Iterable[str]) -> str | None:
    """Return what is wrong with the names of shards, or None."""
    for name in names:
        if not isinstance(name, str) or not name.isascii() or not name.replace("-", "_").isidentifier():
            return f"{name!r} cannot name a shard; use letters, digits, - and _, not beginning with a digit"
    return None
