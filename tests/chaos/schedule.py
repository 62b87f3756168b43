"""Which fault happens when: derived from seed and length alone.

Faults of one resource never overlap, those of different ones do. Every schedule kills a worker and loses the answer to
a COMMIT, because a run without them shows too little; the rest is random. Limitations: it does not know how long a
fault takes on a slow machine. A fault may be late, but none is left out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault.

    at, seconds: when it begins after the start of the run, and how long it lasts. size: its meaning depends on the
    kind.
    """

    at: float
    resource: str
    kind: str
    seconds: float
    size: int


# resource -> kind -> (weight, shortest and longest duration in seconds). A duration of 0 is a moment.
KINDS: dict[str, dict[str, tuple[int, float, float]]] = {
    "workers": {
        "kill worker": (5, 0.0, 0.0),
        "pause worker": (3, 3.5, 5.0),  # beyond the session timeout of 3 s: a zombie when it goes on
        "kill supervisor": (2, 0.5, 1.0),
        "leave and join": (2, 0.2, 1.0),
        "join and leave": (2, 2.0, 3.0),
        "rewind the group's offsets": (1, 0.0, 0.0),
    },
    "postgres": {
        "commit cut before": (3, 0.0, 0.0),
        "commit cut after": (4, 0.0, 0.0),
        "commit cut during": (3, 0.0, 0.0),
        "end backends": (2, 0.0, 0.0),
        "reset postgres": (2, 0.0, 0.0),
        "silence postgres": (2, 0.5, 2.5),
        "slow postgres": (1, 1.0, 2.0),
        "kill postgres": (2, 0.2, 1.5),
        "fail over": (2, 0.7, 1.5),
    },
    "kafka": {
        "kill kafka": (2, 0.2, 1.0),
        "reset kafka": (2, 0.0, 0.0),
        "silence kafka": (2, 0.5, 4.0),
        "slow kafka": (1, 1.0, 2.0),
        "cut offset commits": (2, 0.0, 0.0),
    },
    "redis": {
        "empty redis": (3, 0.0, 0.0),
        "kill redis": (2, 0.3, 2.0),
        "freeze redis": (2, 0.3, 2.0),
        "silence redis": (1, 0.3, 1.5),
    },
}
# What operators do meanwhile, in runs that have some.
OPERATORS: dict[str, tuple[int, float, float]] = {
    "retry letters": (3, 0.0, 0.0),
    "discard letters": (2, 0.0, 0.0),
    "mend a letter": (3, 0.0, 0.0),
    "look at positions": (1, 0.0, 0.0),
    "apply what is missing": (2, 0.0, 0.0),
    "purge": (1, 0.0, 0.0),
}
# Of the way from the first application to the second, in runs with two stages.
OUTBOX: dict[str, tuple[int, float, float]] = {
    "cut acknowledgements": (3, 0.0, 0.0),
    "turn the outbox": (2, 0.0, 0.0),
}
ONCE = {"fail over", "rewind the group's offsets", "kill kafka"}  # at most, for each minute: they take long
_PAUSES = {
    "workers": (1.0, 3.0),
    "postgres": (0.7, 2.5),
    "kafka": (2.0, 6.0),
    "redis": (1.5, 5.0),
    "operators": (1.0, 3.0),
    "outbox": (1.0, 3.0),
}
_MUST = {"workers": "kill worker", "postgres": "commit cut after", "outbox": "cut acknowledgements"}


@dataclass(frozen=True)
class Ways:
    """How a run is set up.

    With a pooler in the path, operators at work, two versions of the application in one group, and a second application that
    consumes what the first one publishes.
    """

    pooler: bool = False
    operators: bool = False
    versions: bool = False
    stages: bool = False

    def __str__(self) -> str:
        return ", ".join(name for name in vars(self) if getattr(self, name)) or "plain"


PLAIN = Ways()


def ways(seed: int) -> Ways:
    """How the run of a seed is set up."""
    chance = random.Random(f"{seed}:ways")
    return Ways(chance.random() < 0.4, chance.random() < 0.6, chance.random() < 0.4, chance.random() < 0.6)


def draw(seed: int, seconds: float, ways: Ways = PLAIN) -> list[Fault]:
    """The faults of a run, in the order in which they begin.

    The same arguments give the same faults, on any machine.
    """
    faults: list[Fault] = []
    more = {"operators": OPERATORS} if ways.operators else {}
    for resource, kinds in (KINDS | more | ({"outbox": OUTBOX} if ways.stages else {})).items():
        chance = random.Random(f"{seed}:{resource}")
        at = chance.uniform(0.5, _PAUSES[resource][1])
        drawn: list[str] = []
        while at < seconds:
            kind = _MUST[resource] if not drawn and resource in _MUST else _kind(chance, kinds, drawn, at)
            drawn.append(kind)
            _, shortest, longest = kinds[kind]
            lasts = chance.uniform(shortest, longest)
            faults.append(Fault(round(at, 2), resource, kind, round(lasts, 2), chance.randint(1, 3)))
            at += lasts + chance.uniform(*_PAUSES[resource])
    return sorted(faults, key=lambda fault: (fault.at, fault.resource))


def _kind(chance: random.Random, kinds: dict[str, tuple[int, float, float]], drawn: list[str], at: float) -> str:
    open_to = [kind for kind in kinds if kind not in ONCE or drawn.count(kind) < 1 + int(at // 60)]
    return chance.choices(open_to, [kinds[kind][0] for kind in open_to])[0]
