"""Orders as the web process knows them. Pure.

Whose they are, under which switches, and the answer to each tap. An order never changes its switches, its token and so
the message id under which it is paid, and every tab that shows it shows the same ones. Changing a switch makes another
order. Limitations: PostgreSQL alone knows whether anything was charged.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from uuid import UUID, uuid4

from consumer.schemes.tokens import message_id_of

AMOUNT_MAX = 1000_00  # cents
_AMOUNT = re.compile(r"[0-9]{1,9}(\.[0-9]{1,2})?")
_ORDERS_MAX = 2000
TAPS_KEPT = 100


@dataclass(frozen=True, slots=True)
class Switches:
    """Which layers an order goes through."""

    greying: bool = True
    token: bool = True
    ledger: bool = True


@dataclass(slots=True)
class Sent:
    """A message of a tap.

    place: partition and offset where it was read in Kafka; None until then. is_stored: committed with the order; until then it
    may be stored or not. tap: its header, since taps of one order share the message id.
    """

    message_id: str
    place: tuple[int, int] | None = None
    is_stored: bool = False
    tap: UUID = field(default_factory=uuid4)


@dataclass(slots=True)
class Tap:
    """One request to pay. status: None while it is worked on."""

    number: int
    status: int | None = None
    text: str = "is worked on"


@dataclass(slots=True)
class Order:
    """An order.

    token: None when the switch is off, and when Redis was away as the order was made.
    """

    id: UUID
    visitor: UUID
    switches: Switches
    token: str | None = None
    redeemed_by: int | None = None  # the number of the tap that used the token up
    unchecked: bool = False  # a tap went on although Redis could not be asked
    tapped: int = 0
    taps: list[Tap] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)

    @property
    def message_id(self) -> str | None:
        """The message id under which this order is paid.

        None in the sandbox without a token: there, each tap has its own. With the ledger, but without a token, it is
        the order's own id: with another id for each tap, the ledger would see as many payments.
        """
        if self.token is not None:
            return message_id_of(self.token)
        return str(self.id) if self.switches.ledger else None

    def tap(self) -> Tap:
        """A new request to pay. Only the newest are kept."""
        self.tapped += 1
        tap = Tap(self.tapped)
        self.taps.append(tap)
        del self.taps[:-TAPS_KEPT]
        return tap

    def send(self, message_id: str) -> Sent:
        """A new message."""
        sent = Sent(message_id)
        self.sent.append(sent)
        del self.sent[:-TAPS_KEPT]
        return sent


class Orders:
    """The orders of all visitors, one open order each.

    The oldest are forgotten.
    """

    def __init__(self) -> None:
        self._orders: OrderedDict[UUID, Order] = OrderedDict()
        self._open: dict[UUID, UUID] = {}

    def add(self, order: Order) -> None:
        """Keep it, as its visitor's open one."""
        self._orders[order.id] = order
        self._open[order.visitor] = order.id
        while len(self._orders) > _ORDERS_MAX:
            self.close(self._orders.popitem(last=False)[1])

    def open(self, visitor: UUID) -> Order | None:
        """The order that a visitor's page shows."""
        id = self._open.get(visitor)
        return self._orders[id] if id is not None else None

    def close(self, order: Order) -> None:
        """Give its visitor another order from now on.

        This one can still be found.
        """
        if self._open.get(order.visitor) == order.id:
            del self._open[order.visitor]

    def find(self, id: UUID, visitor: UUID) -> Order | None:
        """Return an order of this visitor.

        Another visitor's order is as unknown as none.
        """
        order = self._orders.get(id)
        return order if order is not None and order.visitor == visitor else None


def cents(amount: object) -> int:
    """An amount in euros ("12.50", 12.5, 12) as cents.

    Raises ValueError, saying what is accepted.
    """
    text = str(amount) if isinstance(amount, str | int | Decimal) and not isinstance(amount, bool) else ""
    if not _AMOUNT.fullmatch(text):
        raise ValueError("amount: a number of euros with at most two decimals, as 12.50")
    cents = int(Decimal(text) * 100)
    if not 1 <= cents <= AMOUNT_MAX:
        raise ValueError(f"amount: from 0.01 to {money(AMOUNT_MAX)}")
    return cents


def money(amount: int) -> str:
    """Cents as euros: 1,234.50."""
    return f"{'-' if amount < 0 else ''}{abs(amount) // 100:,}.{abs(amount) % 100:02}"


def switches(given: Mapping[str, object]) -> Switches:
    """The switches by name; those that are not named are on.

    Raises ValueError for another name or another value.
    """
    names = ("greying", "token", "ledger")
    for name, value in given.items():
        if name not in names:
            raise ValueError(f"there are the switches {', '.join(names)}")
        if not isinstance(value, bool):
            raise ValueError(f"{name}: true or false")
    return Switches(**{name: value for name, value in given.items() if isinstance(value, bool)})
