"""What the page says of an order. Pure.

It follows from what was sent, what PostgreSQL holds and who answers. It never says that something was charged unless
PostgreSQL says so now. Limitations: it does not know whether a message whose COMMIT got no
answer was stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from handlers.shop.application import ORDERS, SANDBOX_TOPIC, START_BALANCE, TOPIC
from handlers.shop.orders import Order, Sent, money

Place = tuple[int, int]

_STOPPED = {
    "precheck": "stopped by the pre-check: Redis had seen this message id",
    "ledger": "stopped by the ledger: PostgreSQL's unique key has this message id",
    "batch": "stopped: the same message id stood before it in the batch",
    "dead_letter": "stopped: the first one of this message id is a dead letter",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What PostgreSQL holds, from one snapshot. amounts: cents."""

    state: str | None = None
    version: int | None = None
    charges: Mapping[Place, int] = field(default_factory=dict)  # how often a message was charged
    charged: int = 0
    balance: int = START_BALANCE
    positions: Mapping[int, int] = field(default_factory=dict)  # below these everything is settled
    letters: Mapping[Place, str] = field(default_factory=dict)  # dead letters, with their reasons


@dataclass(frozen=True, slots=True)
class Services:
    """Who answers. worker: its process id; 0 when there is none."""

    kafka: bool = True
    postgresql: bool = True
    redis: bool = True
    worker: int = 0


def topic_of(order: Order) -> str:
    """Where its payments go."""
    return TOPIC if order.switches.ledger else SANDBOX_TOPIC


def describe(order: Order, seen: Seen | None, services: Services, causes: Mapping[Place, str]) -> dict[str, Any]:
    """The page's content, as JSON.

    seen: None while PostgreSQL does not answer. causes: why a worker stopped a message.
    """
    tone, text = _verdict(order, seen, services)
    return {
        "verdict": {"tone": tone, "text": text},
        "order": {
            "id": str(order.id),
            "state": _state(seen),
            "version": seen.version if seen is not None else None,
            "next": sorted(ORDERS.moves.moves[seen.state]) if seen is not None and seen.state == "paid" else [],
        },
        "charged": {"times": sum(seen.charges.values()), "sum": money(seen.charged)} if seen is not None else None,
        "account": {
            "name": "Your account" if order.switches.ledger else "Your sandbox account",
            "balance": money(seen.balance) if seen is not None else None,
        },
        "token": _token(order),
        "message_id": order.message_id,
        "taps": [{"number": tap.number, "status": tap.status, "text": tap.text} for tap in order.taps],
        "messages": [_message(sent, order, seen, causes) for sent in order.sent],
        "services": {
            "kafka": {"up": services.kafka},
            "postgresql": {"up": services.postgresql},
            "redis": {"up": services.redis},
            "worker": {"up": services.worker != 0, "pid": services.worker},
        },
    }


def is_waiting(order: Order, seen: Seen | None) -> bool:
    """Whether something of this order may still happen."""
    return any(tap.status is None for tap in order.taps) or any(
        (sent.is_stored or sent.place) and (seen is None or sent.place is None or not _is_settled(sent.place, seen))
        for sent in order.sent
    )


def _is_settled(place: Place, seen: Seen) -> bool:
    partition, offset = place
    return offset < seen.positions.get(partition, 0)


def _state(seen: Seen | None) -> str:
    if seen is None:
        return "unknown: PostgreSQL does not answer"
    return seen.state or "not in the database yet"


def _verdict(order: Order, seen: Seen | None, services: Services) -> tuple[str, str]:
    accepted = [sent for sent in order.sent if sent.is_stored or sent.place is not None]
    if seen is None:
        begins = "Accepted (committed with the order). " if accepted else ""
        return "wait", f"{begins}PostgreSQL does not answer: whether it was charged is unknown now."
    times = sum(seen.charges.values())
    if times > 1:
        return "bad", f"Charged {times} times: {money(seen.charged)} in all."
    if times == 1:
        return "ok", f"Charged once: {money(seen.charged)}."
    if any(sent.place is None or not _is_settled(sent.place, seen) for sent in accepted):
        return "wait", f"Accepted, not yet charged.{_why(services)}"
    if len(accepted) < len(order.sent):
        return "wait", "Sent, but PostgreSQL has not confirmed it: perhaps not accepted, and not charged."
    if accepted:
        return "bad", "Not charged: see what became of the messages."
    return "idle", "Nothing was charged."


def _why(services: Services) -> str:
    """Why an accepted message is not charged, if that is known."""
    if not services.worker:
        return " The worker is away; it will be charged when there is one again."
    if not services.kafka:
        return " Kafka is away: the message waits in PostgreSQL, and will be charged when Kafka is back."
    return ""


def _token(order: Order) -> dict[str, str]:
    if not order.switches.token:
        text = (
            "Off. The order's own id is the message id: the ledger needs one that all taps share."
            if order.switches.ledger
            else "Off, and no ledger either: each tap has a message id of its own."
        )
        return {"short": "", "text": text}
    if order.token is None:
        text = (
            "Not issued: Redis did not answer. The order's own id is the message id, and the ledger decides."
            if order.switches.ledger
            else "Not issued: Redis did not answer, and nothing else would stop a second tap. Make a new order later."
        )
        return {"short": "", "text": text}
    if order.unchecked:
        text = "could not be checked for every tap: Redis did not answer in time, so the ledger decides"
    elif order.redeemed_by is not None:
        text = f"used up by tap {order.redeemed_by}"
    else:
        text = "issued, not used yet"
    return {"short": f"{order.token[:8]}…", "text": text}


def _message(sent: Sent, order: Order, seen: Seen | None, causes: Mapping[Place, str]) -> dict[str, Any]:
    place = sent.place
    return {
        "place": f"{topic_of(order)}, partition {place[0]}, offset {place[1]}" if place is not None else None,
        "id": sent.message_id,
        "fate": _fate(sent, order, seen, causes),
    }


def _fate(sent: Sent, order: Order, seen: Seen | None, causes: Mapping[Place, str]) -> str:
    if sent.place is None:
        stored = "committed with the order" if sent.is_stored else "PostgreSQL has not confirmed it"
        return f"{stored}; not seen in Kafka yet"
    if seen is None:
        return "in Kafka; PostgreSQL does not answer, so nothing more is known"
    times = seen.charges.get(sent.place, 0)
    if not order.switches.ledger and times:
        again = "" if times == 1 else f" {times} times: it was delivered again"
        return f"no pre-check and no ledger here: charged{again}"
    if times:
        return "new to the pre-check and to the ledger: charged"
    if sent.place in seen.letters:
        reason = seen.letters[sent.place]
        if reason == "id_conflict":
            return "refused by the ledger: this message id was used for another amount (a dead letter)"
        return f"a dead letter: {reason}"
    if not _is_settled(sent.place, seen):
        return "in Kafka; not settled yet"
    return _STOPPED.get(causes.get(sent.place, ""), "stopped: its message id was applied before")
