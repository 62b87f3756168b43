"""Consume at-least-once Kafka topics; apply each message's effects in PostgreSQL exactly once.

Start here: an `App` holds handlers; `consumer run module:app` runs them. A batch of messages is fetched (kafka.py),
checked against Redis (precheck.py), and settled in one transaction that holds the claims, the handlers' effects and
the positions (once.py, ledger.py); then it is marked in Redis and its offsets are committed to Kafka (worker.py).
"""

from typing import TYPE_CHECKING, Any

from consumer.app import App
from consumer.core.errors import (
    CannotTell,
    ConsumerError,
    Misconfigured,
    RegistrationError,
    Reject,
    RunAgain,
    TransactionMisuse,
)
from consumer.core.findings import Findings
from consumer.core.message import Message
from consumer.core.retry import Retry
from consumer.dryrun import is_dry_run
from consumer.settings import Settings
from consumer.tx import Tx

if TYPE_CHECKING:
    from consumer.replay import verify

__all__ = [
    "App",
    "CannotTell",
    "ConsumerError",
    "Findings",
    "Message",
    "Misconfigured",
    "RegistrationError",
    "Reject",
    "Retry",
    "RunAgain",
    "Settings",
    "TransactionMisuse",
    "Tx",
    "is_dry_run",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "verify":  # it brings the drivers, which a module of handlers does not need
        from consumer.replay import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
