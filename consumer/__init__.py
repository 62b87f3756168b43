"""Consume at-least-once Kafka topics; apply each message's effects in PostgreSQL exactly once.

Start here: an `App` holds handlers; `consumer run module:app` runs them. A batch of messages is fetched (kafka.py),
checked against Redis (precheck.py), and settled in one transaction that holds the claims, the handlers' effects and
the positions (once.py, ledger.py); then it is marked in Redis and its offsets are committed to Kafka (worker.py).
"""

from consumer.app import App
from consumer.core.errors import ConsumerError, Misconfigured, RegistrationError, Reject, TransactionMisuse
from consumer.core.message import Message
from consumer.core.retry import Retry
from consumer.settings import Settings
from consumer.tx import Tx

__all__ = [
    "App",
    "ConsumerError",
    "Message",
    "Misconfigured",
    "RegistrationError",
    "Reject",
    "Retry",
    "Settings",
    "TransactionMisuse",
    "Tx",
]
